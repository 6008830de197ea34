"""docs/benchmarks.md, its plots and the numbers behind them, from what `make bench` measured.

    make bench && make bench-page

Of several files, such as those of `--more-shapes` measured shape by shape, a problem's last measurement counts. The
numbers go to benchmarks/results/cpu.json, and the page can be made of them again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from providers import FLOOR, GROWTH_PROVIDERS, OURS, growth_name
from results import Results
from shapes import GROWTH, SMALL
from tables import tables

LABELS = {
    "layers": "hidden states",
    "dims": "dims",
    "batch": "pairs",
    "tokens": "tokens per text",
    "padding": "share of padding",
}

INTRODUCTION = """
# Benchmarks

Made by `make bench` and `make bench-page`; every round is in `benchmarks/results/cpu.json`. All providers of a problem
run in one process, one after the other in every round, in changing order; ratios are medians of ratios within a round.
Rows say how busy other processes kept the machine meanwhile. *Resident*: freed memory stays mapped, as in a training
loop that reuses its blocks; *default*: glibc's defaults, whose page faults everyone pays. The floor is a plain copy of
all hidden states to where their gradients go. No figure here comes from a GPU:
those are in `benchmarks/results/gpu-*.md` and in the README.

**Where there is nothing to win:** on a CPU with a real model the loss is a few percent of a training step, whoever
computes it; see the table of whole steps.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "json", type=Path, nargs="+", help="what pytest --benchmark-json wrote, or the results that are kept"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    args = parser.parse_args()
    results, *others = map(read, args.json)
    for each in others:
        results.add(each)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results.to_json()) + "\n", encoding="utf-8")
    write(results, args.page)


def read(path: Path) -> Results:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Results.from_json(found.get("m2d_ext", found))


def write(results: Results, page: Path) -> None:
    """The page, and its plots beside it."""
    lines = [*INTRODUCTION.strip().splitlines(), "", _machine(results.machine), ""]
    for table in tables(results):
        lines += [f"## {str(table.title).partition(',')[0].partition(':')[0]}", "", *markdown(table), ""]
    if results.growth:
        picture = page.parent / "images" / "growth.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_growth(results, picture)
        lines += [f"![Growth of the loss's time](images/{picture.name})", ""]
        lines += [*_slopes(results), ""]
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Machine: {machine['cpu']}, {machine['vectors']}, {machine['threads']} threads; Python {machine['python']}, "
        f"{versions}."
    )


def markdown(table: Table) -> list[str]:
    """The very table that the terminal shows."""

    def row(cells: list[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()) for cell in cells) + " |"

    columns = table.columns
    lines = [f"{table.title}.", ""]
    lines += [row([column.header for column in columns]), "|" + "---|" * len(columns)]
    lines += [row(list(cells)) for cells in zip(*(column.cells for column in columns), strict=True)]
    return lines + (["", str(table.caption)] if table.caption else [])


def plot_growth(results: Results, path: Path) -> None:
    """An axis each: times, log-log where the axis is a size."""
    names = list(results.growth)
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        speed, values = results.growth[name], list(GROWTH[name])
        for provider in GROWTH_PROVIDERS:
            times = [speed.milliseconds(growth_name(provider, value)) for value in values]
            axis.plot(values, times, marker="o", label=provider, linestyle="--" if provider == FLOOR else "-")
        if name not in ("padding", "dims"):
            axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(LABELS[name])
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms, forward + backward")
    axes[0, 0].legend()
    figure.suptitle(f"Loss alone, around {SMALL}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _slopes(results: Results) -> list[str]:
    """What an axis's last value costs beside its first: medians of ratios within a round."""
    lines = ["| axis | from → to | ours | floor |", "|---|---|---|---|"]
    for name, speed in results.growth.items():
        first, *_, last = GROWTH[name]
        growths = [speed.ratio(growth_name(each, last), growth_name(each, first)) for each in (OURS, FLOOR)]
        cells = ["–" if growth is None else f"{growth:.2f}×" for growth in growths]
        lines.append(f"| {LABELS[name]} | {first:g} → {last:g} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
