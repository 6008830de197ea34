"""The ablation's page: a table per question and two plots per length of run, from what the runs wrote."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from ablation_arms import ARMS, MINILM, MODELS, QUESTIONS, Question
from m2d_ext.inference import Grid

Run = dict[str, Any]
DECIDED = 2.0  # standard deviations
HALF_A_DIGIT = 5e-5  # of what is printed


INTRODUCTION = f"""
Made by `python benchmarks/ablation.py`, whose `--help` says how; every number is in
`benchmarks/results/ablation.json`. The arms of a model start from the same weights and see the same batches of NLI
triplets. Spearman correlation on the STS benchmark (dev to choose by, test to report) and nDCG@10 of finding the
second sentence of test pairs that score at least 4 by the first; grid mean: over all layers and dims.

Differences are to the first row of their table, between runs of the same seed, ± their standard deviation; one
smaller than {DECIDED:g} standard deviations, or than half of the last digit, is *undecided*, and so is any of a single
seed. A few seeds bound it loosely. Step: time of a step with dropout, as a multiple of the plain one's, which calls
the model once per column where ours calls it once.

A run again gives the same numbers: seed 0 of *earlier layers weigh 1 each*, 50 steps, twice on one machine the same to
the last digit, and within 3e-6 of what another processor gave.
"""


class Measure(NamedTuple):
    title: str
    of: Callable[[Run], float]


def _grid(run: Run, name: str) -> Grid:
    return Grid.from_json(run["grids"][name])


MEASURES = (
    Measure("grid mean, dev", lambda run: _grid(run, "dev").mean()),
    Measure("grid mean, test", lambda run: _grid(run, "test").mean()),
    Measure("final cell, test", lambda run: _final(_grid(run, "test"))),
    Measure("grid mean, retrieval", lambda run: _grid(run, "retrieval").mean()),
)
PLOTTED = MEASURES[1]


def _final(grid: Grid) -> float:
    """The whole model's."""
    return grid.score(max(grid.layers), max(grid.dims))


class Difference(NamedTuple):
    """To the baseline, run by run of the same seed: their mean and standard deviation (None of one seed)."""

    mean: float
    deviation: float | None

    @classmethod
    def between(cls, arm: dict[int, float], baseline: dict[int, float]) -> Difference:
        seeds = sorted(arm.keys() & baseline.keys())
        gaps = [arm[seed] - baseline[seed] for seed in seeds]
        return cls(statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else None)

    @property
    def verdict(self) -> str:
        if self.deviation is None or abs(self.mean) < max(DECIDED * self.deviation, HALF_A_DIGIT):
            return "undecided"
        return "better" if self.mean > 0 else "worse"

    def __str__(self) -> str:
        deviation = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"{self.mean:+.4f}{deviation}, {self.verdict}"


class Runs:
    """Those of one length, by arm and seed."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs: dict[str, dict[int, Run]] = {}
        for run in runs:
            self._runs.setdefault(run["settings"]["name"], {})[run["settings"]["seed"]] = run

    def __contains__(self, arm: str) -> bool:
        return arm in self._runs

    def of(self, arm: str) -> list[Run]:
        return list(self._runs[arm].values())

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        return {seed: measure.of(run) for seed, run in self._runs[arm].items()}

    def difference(self, arm: str, baseline: str, measure: Measure) -> Difference:
        return Difference.between(self.values(arm, measure), self.values(baseline, measure))

    def answered(self) -> list[tuple[Question, list[str]]]:
        """The questions of which the baseline and some arm have a seed in common, and these arms."""
        found = []
        for question in QUESTIONS:
            if question.baseline in self:
                seeds = self._runs[question.baseline].keys()
                arms = [arm for arm in question.arms if arm in self and self._runs[arm].keys() & seeds]
                found += [(question, arms)] if arms else []
        return found


def write(found: dict[str, Any], page: Path) -> None:
    """The page, and its plots beside it."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = _introduction(found)
    for length, listed in sorted(found["runs"].items()):
        runs = Runs(listed)
        if not runs.answered():
            continue
        kind, _, count = length.partition("-")
        lines += [f"## {_counted(count, kind)} an arm", ""]
        for question, arms in runs.answered():
            lines += _table(question, arms, runs, found["cost"])
        plot_differences(runs, images / f"ablation_{length}.png")
        plot_layers(runs, images / f"ablation_layers_{length}.png")
        lines += [f"![Differences of the grid's mean](images/ablation_{length}.png)", ""]
        lines += [f"![Full width by layer](images/ablation_layers_{length}.png)", ""]
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _counted(count: int | str, kind: str) -> str:
    return f"{count} {kind.removesuffix('s') if str(count) == '1' else kind}"


def _introduction(found: dict[str, Any]) -> list[str]:
    run = next(run for runs in found["runs"].values() for run in runs)
    settings, machine = run["settings"], run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lengths = []
    for length, runs in sorted(found["runs"].items()):
        seeds = _counted(len({each["settings"]["seed"] for each in runs}), "seeds")
        kind, _, count = length.partition("-")
        lengths.append(f"{_counted(count, kind)} in batches of {runs[0]['settings']['batch_size']} triplets, {seeds}")
    learning_rates = "; ".join(f"{model.learning_rate:g} for {name}" for name, model in MODELS.items())
    arms = [
        f"- *{name}*: {', '.join(f'`{key}={value!r}`' for key, value in arm.options.items())}"
        for name, arm in ARMS.items()
        if arm.options
    ]
    return [
        "# Ablation: what each choice does to the grid",
        "",
        *INTRODUCTION.strip().splitlines(),
        "",
        f"Machine: {machine['device']}, {settings['threads']} threads, Python {machine['python']}; {versions}.",
        f"Runs: {'; '.join(lengths)}. Learning rate: {learning_rates}.",
        "",
        "Arms, beside all layers × all dims with sentence-transformers' defaults (*all cells*) and",
        f"`MultipleNegativesRankingLoss` alone (*plain*), of {MINILM}; the *pre-norm* ones are of a small ModernBERT",
        "of random weights:",
        "",
        *arms,
        "",
    ]


def _table(question: Question, arms: Sequence[str], runs: Runs, cost: dict[str, Any] | None) -> list[str]:
    titles = ["arm", *(measure.title for measure in MEASURES), "step"]
    lines = [f"**{question.title}**", "", f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for arm in (question.baseline, *arms):
        cells = []
        for measure in MEASURES:
            values = list(runs.values(arm, measure).values())
            cell = f"{statistics.fmean(values):.4f}"
            cell += f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            if arm != question.baseline:
                cell += f" ({runs.difference(arm, question.baseline, measure)})"
            cells.append(cell)
        step = cost["steps"].get(arm) if cost else None
        cells.append("–" if step is None else f"{step['ratio']:.2f}×")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot_differences(runs: Runs, path: Path) -> None:
    """Of the grid's mean, by question."""
    rows = [
        (arm, question.baseline, runs.difference(arm, question.baseline, PLOTTED))
        for question, arms in runs.answered()
        for arm in arms
    ]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.38 * len(rows)), layout="constrained")
    for place, (_, _, difference) in enumerate(rows):
        color = {"better": "tab:green", "worse": "tab:red", "undecided": "tab:gray"}[difference.verdict]
        error = DECIDED * (difference.deviation or 0.0)
        axis.errorbar(difference.mean, place, xerr=error, fmt="o", color=color, capsize=3)
    axis.set_yticks(range(len(rows)), [f"{arm}\nagainst {baseline}" for arm, baseline, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"{PLOTTED.title}: difference ± {DECIDED:g} standard deviations")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_layers(runs: Runs, path: Path) -> None:
    """The score of every layer at full width, a line per arm of the first question's model."""
    model = ARMS[QUESTIONS[0].baseline].model
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, arm in ARMS.items():
        if name in runs and arm.model == model:
            grids = [_grid(run, "test") for run in runs.of(name)]
            means = [statistics.fmean(grid.score(l, max(grid.dims)) for grid in grids) for l in grids[0].layers]
            axis.plot(grids[0].layers, means, marker="o", markersize=3, label=name)
    axis.set_xlabel("layers kept")
    axis.set_ylabel("Spearman correlation, STS benchmark test")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
