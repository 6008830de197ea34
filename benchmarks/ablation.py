"""Ablation of 2D Matryoshka recipes: every arm from the same start, on the same batches, with several seeds.

    python benchmarks/ablation.py run --pairs nli_pairs.tsv.gz --dev stsb_dev.tsv.gz --test stsb_test.tsv.gz
    python benchmarks/ablation.py cost --pairs nli_pairs.tsv.gz
    python benchmarks/ablation.py report

`run` trains each arm (ablation_arms.py) with each seed and writes one JSON file per run; what is there already with
the same settings is not run again, so it can be stopped at any time. `--epochs 1` in place of the default 50 steps
trains on all pairs. `cost` times one step of every arm, in interleaved rounds. `report` makes docs/ablation.md and its
plots.

Data: tab-separated, perhaps .gz. Pairs: anchor, positive, negative. Dev and test: s1, s2 and score, as the STS
benchmark; recipes are chosen on dev alone. The retrieval task comes of the test file: from the first sentences of
pairs that score at least 4, find the second one among all of the file's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports that read it

import torch
import typer
from datasets import Dataset, disable_progress_bars
from rich.progress import Progress, track
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import set_seed

import ablation_report
from ablation_arms import ARMS, MODELS, Arm
from m2d_ext import GridEvaluator
from m2d_ext.inference.profile import cpu_name
from m2d_ext.training import fit
from measure import interleaved
from providers import Candidate
from step_providers import train_step

MAX_LENGTH = 64
NUM_THREADS = 2
RELEVANT = 4.0  # of 5: "mostly equivalent"
COST_BATCHES, COST_BATCH_SIZE = 4, 32
PACKAGES = ("torch", "sentence-transformers", "transformers", "m2d_ext")

app = typer.Typer(help=__doc__.partition("\n")[0], add_completion=False, pretty_exceptions_enable=False)
Pairs = Annotated[Path, typer.Option(help="anchor, positive, negative", exists=True, dir_okay=False)]
Folder = Annotated[Path, typer.Option(help="Of the runs' files.")]
Chosen = Annotated[list[str] | None, typer.Option("--arm", help="Only these arms; may be repeated.")]
OUTPUT = Path("runs/ablation")


@dataclass(frozen=True)
class Length:
    """Of a run."""

    steps: int | None
    epochs: float  # where there are no steps
    batch_size: int


def read(path: Path) -> Dataset:
    disable_progress_bars()
    return Dataset.from_csv(str(path), delimiter="\t", quoting=3)


def evaluators(dev: Dataset, test: Dataset, dims: tuple[int, ...]) -> dict[str, GridEvaluator]:
    options: dict[str, Any] = {"dims": list(dims), "show_progress_bar": False, "batch_size": 128}
    columns = ["s1", "s2", "score"]
    corpus = {text: str(i) for i, text in enumerate(dict.fromkeys(test["s2"]))}
    relevant: dict[str, set[str]] = {}
    for row in test:
        if row["score"] >= RELEVANT:
            relevant.setdefault(row["s1"], set()).add(corpus[row["s2"]])
    queries = {text: str(i) for i, text in enumerate(relevant)}
    retrieval = InformationRetrievalEvaluator(
        {number: text for text, number in queries.items()},
        {number: text for text, number in corpus.items()},
        {queries[text]: found for text, found in relevant.items()},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[1],
        map_at_k=[10],
        batch_size=128,
    )
    return {
        "dev": GridEvaluator(dev.select_columns(columns), **options),
        "test": GridEvaluator(test.select_columns(columns), **options),
        "retrieval": GridEvaluator(retrieval, metric="cosine_ndcg@10", **options),
    }


def chosen_arms(names: list[str] | None) -> list[Arm]:
    unknown = set(names or ()) - set(ARMS)
    if unknown:
        raise typer.BadParameter(f"--arm must be one of {', '.join(ARMS)}; got {sorted(unknown)[0]}")
    return [ARMS[name] for name in names or ARMS]


def settings_of(arm: Arm, seed: int, length: Length, data: list[Path]) -> dict[str, Any]:
    """All that a run's numbers depend on, but for the versions, which it notes."""
    return {
        **asdict(arm),
        "dims": list(MODELS[arm.model].dims),
        "learning_rate": MODELS[arm.model].learning_rate,
        "seed": seed,
        **asdict(length),
        "max_length": MAX_LENGTH,
        "threads": NUM_THREADS,
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in data},
    }


def train_arm(arm: Arm, seed: int, length: Length, data: Dataset) -> tuple[Any, dict[str, float]]:
    set_seed(seed)
    model = MODELS[arm.model].load()
    model.max_seq_length = MAX_LENGTH
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loss = fit(
            model,
            arm.loss(model),
            data,
            folder,
            **asdict(length),
            learning_rate=MODELS[arm.model].learning_rate,
            seed=seed,
            show_progress=False,
        )
    return model.eval(), {"loss": loss, "seconds": time.perf_counter() - start}


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """A run that is cut off leaves no half of a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["settings"] == json.loads(
        json.dumps(settings)
    )


def file_name(arm: str, seed: int) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in arm.lower()).split()
    return f"{'-'.join(words)}-seed{seed}.json"


@app.command()
def run(
    pairs: Pairs,
    dev: Annotated[Path, typer.Option(help="s1, s2, score; to choose on", exists=True, dir_okay=False)],
    test: Annotated[Path, typer.Option(help="s1, s2, score; to report", exists=True, dir_okay=False)],
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 50,
    epochs: Annotated[float | None, typer.Option(help="In place of steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Triplets.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="0 to this, without it.")] = 3,
    arm: Chosen = None,
    output: Folder = OUTPUT,
) -> None:
    """Train and evaluate every arm with every seed."""
    torch.set_num_threads(NUM_THREADS)
    length = Length(steps if epochs is None else None, epochs or 0.0, batch_size)
    folder = output / (f"steps-{steps}" if epochs is None else f"epochs-{epochs:g}")
    data, tests = read(pairs).select_columns(["anchor", "positive", "negative"]), (read(dev), read(test))
    todo = [(each, seed) for seed in range(seeds) for each in chosen_arms(arm)]
    with Progress() as progress:
        task = progress.add_task("arms × seeds", total=len(todo))
        for each, seed in todo:
            progress.update(task, description=f"{each.name}, seed {seed}")
            settings = settings_of(each, seed, length, [pairs, dev, test])
            path = folder / file_name(each.name, seed)
            if not is_done(path, settings):
                model, training = train_arm(each, seed, length, data)
                grids = {
                    name: evaluator.grid(model).to_json()
                    for name, evaluator in evaluators(*tests, MODELS[each.model].dims).items()
                }
                write_whole(path, {"settings": settings, "training": training, "grids": grids} | environment())
            progress.advance(task)


def environment() -> dict[str, Any]:
    machine = {"device": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"versions": {name: version(name) for name in PACKAGES}, "machine": machine}


@app.command()
def cost(
    pairs: Pairs,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    arm: Chosen = None,
    output: Folder = OUTPUT,
) -> None:
    """Time one step of every arm beside the plain one of its model, in interleaved rounds."""
    torch.set_num_threads(NUM_THREADS)
    rows = read(pairs).select(range(COST_BATCHES * COST_BATCH_SIZE))
    found = {}
    for name in track(MODELS, "models"):
        arms = [each for each in chosen_arms(arm) if each.model == name]
        if not arms:
            continue
        plain = Arm("plain", is_plain=True, model=name)
        samples = interleaved(step_candidates([plain, *(each for each in arms if each.name != "plain")], rows), rounds)
        seconds = {each: [second for second, _ in pairs] for each, pairs in samples.items()}
        for each, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds["plain"], strict=True)]
            if each != "plain" or name == ARMS["plain"].model:
                found[each] = {"seconds": statistics.median(times), "ratio": statistics.median(ratios)}
    write_whole(output / "cost.json", {"steps": found, "rounds": rounds} | environment())


def step_candidates(arms: list[Arm], rows: Dataset) -> dict[str, Candidate]:
    """One model and one optimiser serve all, as in step_providers."""
    set_seed(0)
    model = MODELS[arms[0].model].load().train()
    model.max_seq_length = MAX_LENGTH
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batches = [
        [model.preprocess(rows[name][first : first + COST_BATCH_SIZE]) for name in ("anchor", "positive", "negative")]
        for first in range(0, COST_BATCHES * COST_BATCH_SIZE, COST_BATCH_SIZE)
    ]

    def candidate(arm: Arm) -> Candidate:
        loss, turn = arm.loss(model), itertools.cycle(batches)

        def step() -> list[torch.Tensor]:
            train_step(loss, next(turn), optimizer)
            return []

        return Candidate(None, [], step)

    return {arm.name: candidate(arm) for arm in arms}


@app.command()
def report(
    output: Folder = OUTPUT,
    results: Annotated[Path, typer.Option(help="All runs in one file.")] = Path("benchmarks/results/ablation.json"),
    page: Path = Path("docs/ablation.md"),
) -> None:
    """Write the page and its plots, from the results that are kept and the runs that are new or in their place."""
    kept: dict[str, Any] = {"runs": {}, "cost": None}
    if results.exists():
        kept = json.loads(results.read_text(encoding="utf-8"))
    for folder in sorted(output.glob("*-*")):
        new = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
        kept["runs"][folder.name] = joined(kept["runs"].get(folder.name, []), new)
    found = output / "cost.json"
    if found.exists():
        kept["cost"] = json.loads(found.read_text(encoding="utf-8"))
    write_whole(results, kept)
    ablation_report.write(kept, page)


def joined(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run per arm and seed, a new one in place of a kept one."""
    runs = {(run["settings"]["name"], run["settings"]["seed"]): run for run in [*kept, *new]}
    return [runs[key] for key in sorted(runs)]


if __name__ == "__main__":
    app()
