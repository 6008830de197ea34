"""The tables of `make bench` and of docs/benchmarks.md."""

from __future__ import annotations

from rich.table import Table

from deferred_providers import DEFERRED, DEFERRED_PROVIDERS, DENSE, PASSES_COLD, PASSES_WARM
from measure import NUM_THREADS, PROCESSES
from providers import COMPILED, FLOOR, GROWTH_PROVIDERS, OURS, OURS_ONE_DIM, SENTENCE_TRANSFORMERS, growth_name
from results import Results, Speed
from shapes import GROWTH, MAIN_SHAPES, MORE_SHAPES, PADDINGS, SMALL, Shape
from step_providers import BATCH, PLAIN, STEP_PROVIDERS

# What the table is held to, by padding. Resident memory, main shapes.
BARS = {
    FLOOR: {"none": "≤ 1.10", "half": "≤ 0.85"},
    SENTENCE_TRANSFORMERS: {"none": "≥ 5", "half": "≥ 7"},
    COMPILED: {"none": "≥ 2", "half": "≥ 2"},
    OURS_ONE_DIM: {"none": "≤ 1.15", "half": "≤ 1.15"},
}
PASSES_BAR = "≤ 0.60"
DEFERRED_BAR = "≤ 0.70"
STEP_BAR = "≤ 1.02"
BASE_LOSS_BARS = {
    "MultipleNegativesSymmetricRanking": "≥ 5",
    "four directions": "≥ 5",
    "hardness": "≥ 5",
    "CoSENT": "≥ 3",
    "GISTEmbed": "≥ 3",
}


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _reading_order(item: tuple[tuple[Shape, str, str], Speed]) -> tuple[bool, int, int]:
    """Pytest groups tests by fixture, which is nobody's order of reading."""
    shape, padding, allocator = item[0]
    return allocator == "default", (*MAIN_SHAPES, *MORE_SHAPES).index(shape), list(PADDINGS).index(padding)


def _speed_table(results: Results) -> Table:
    table = Table(
        title=f"Loss alone, forward + backward, float32, {NUM_THREADS} threads: medians of {results.rounds} "
        f"interleaved rounds, where there are aims in each of {PROCESSES} processes; ratios within a round",
        caption="Page faults: of ours and of the floor, in one step; 0 where memory is resident. "
        "Others: how many cores other processes kept busy meanwhile; distrust a row where that is not close to 0.",
    )
    table.add_column("shape, allocator, padding", no_wrap=True)
    for name in ("ours", "floor", "s-t", "compile"):
        table.add_column(f"{name}\nms", justify="right")
    for name in ("ours\n/ floor", "s-t\n/ ours", "compile\n/ ours", "ours 5 dims\n/ 1 dim"):
        table.add_column(name, justify="right", style="bold")
    table.add_column("compile\nmode")
    table.add_column("page faults\nours/floor", justify="right")
    table.add_column("others\ncores", justify="right")
    for padding in ("none", "half"):
        bars = [BARS[name][padding] for name in (FLOOR, SENTENCE_TRANSFORMERS, COMPILED, OURS_ONE_DIM)]
        table.add_row(f"aim: resident, {padding}", *[""] * 4, *bars, "", "", "", style="dim")
    for (shape, padding, allocator), speed in sorted(results.speed.items(), key=_reading_order):
        faults = "/".join(f"{speed.providers[name]['page_faults']:.0f}" for name in (OURS, FLOOR))
        compiled = speed.providers.get(COMPILED)
        times = [speed.milliseconds(name) for name in (OURS, FLOOR, SENTENCE_TRANSFORMERS, COMPILED)]
        ratios = [
            speed.ratio(OURS, FLOOR),
            speed.ratio(SENTENCE_TRANSFORMERS, OURS),
            speed.ratio(COMPILED, OURS),
            speed.ratio(OURS, OURS_ONE_DIM),
        ]
        table.add_row(
            f"{shape}, {allocator}, {padding}",
            *[_number(value, 1) for value in times],
            *[_number(value) for value in ratios],
            compiled["note"].replace("-no-cudagraphs", "") if compiled else "fails",
            faults,
            f"{speed.other_cores:.1f}",
        )
    return table


def _memory_table(results: Results) -> Table:
    table = Table(title="Peak memory beyond the hidden states and their gradients, MiB (no padding)")
    table.add_column("shape")
    for name in ("ours", "aim: at most", "s-t", "compile"):
        table.add_column(name, justify="right")
    for shape, peaks in results.peak_bytes.items():
        values = [peaks.get(OURS), shape.peak_bytes_allowed, peaks.get(SENTENCE_TRANSFORMERS), peaks.get(COMPILED)]
        table.add_row(str(shape), *[_number(None if value is None else value / 2**20, 1) for value in values])
    return table


def _deferred_table(results: Results) -> Table:
    table = Table(
        title=f"Deferred gradients, float32, {NUM_THREADS} threads, resident memory: medians of {results.rounds} "
        f"interleaved rounds in each of {PROCESSES} processes, ratios within a round",
        caption="Forward, backward and what is added to the gradients that an encoder brings down, whose own work is "
        "left out. Passes: the additions of all earlier layers, on gradients in memory (cold) or just written (warm).",
    )
    table.add_column("shape, padding", no_wrap=True)
    for name in DEFERRED_PROVIDERS:
        table.add_column(f"{name}\nms", justify="right")
    for name in ("deferred\n/ dense", "cold passes\n/ floor", "warm passes\n/ floor"):
        table.add_column(name, justify="right", style="bold")
    table.add_column("others\ncores", justify="right")
    table.add_row("aim", *[""] * len(DEFERRED_PROVIDERS), DEFERRED_BAR, *[PASSES_BAR] * 2, "", style="dim")
    order = (*MAIN_SHAPES, *MORE_SHAPES)
    for (shape, padding), speed in sorted(results.deferred.items(), key=lambda item: order.index(item[0][0])):
        ratios = [speed.ratio(DEFERRED, DENSE), speed.ratio(PASSES_COLD, FLOOR), speed.ratio(PASSES_WARM, FLOOR)]
        table.add_row(
            f"{shape}, {padding}",
            *[_number(speed.milliseconds(name), 1) for name in DEFERRED_PROVIDERS],
            *[_number(ratio) for ratio in ratios],
            f"{speed.other_cores:.1f}",
        )
    return table


def _step_table(results: Results) -> Table:
    table = Table(
        title=f"Whole training step of all-MiniLM-L6-v2, {BATCH} pairs, AdamW, float32, {NUM_THREADS} threads: "
        f"medians of {results.rounds} interleaved rounds",
        caption="Ratios are to the plain step of the same round and batch; in brackets what half of them lie between. "
        f"Aim of ours: {STEP_BAR}.",
    )
    table.add_column("step", no_wrap=True)
    for texts, speed in results.steps.items():
        table.add_column(f"{texts}\nms", justify="right")
        table.add_column(f"/ plain\nothers' cores {speed.other_cores:.1f}", style="bold")
    for name in STEP_PROVIDERS:
        cells = []
        for speed in results.steps.values():
            low, high = speed.quartiles(name, PLAIN)
            cells += [_number(speed.milliseconds(name), 0)]
            cells += [f"{_number(speed.ratio(name, PLAIN), 3)} [{low:.3f}, {high:.3f}]"]
        table.add_row(name, *cells)
    return table


def _base_loss_table(results: Results) -> Table:
    table = Table(
        title=f"Base losses, all layers × all dims at {SMALL} without padding, resident memory: medians of "
        f"{results.rounds} interleaved rounds"
    )
    table.add_column("base loss", no_wrap=True)
    for name in ("ours\nms", "s-t\nms", "s-t\n/ ours", "aim", "others\ncores"):
        table.add_column(name, justify="right")
    for base, speed in results.base_losses.items():
        table.add_row(
            base,
            *[_number(speed.milliseconds(name), 1) for name in (OURS, SENTENCE_TRANSFORMERS)],
            _number(speed.ratio(SENTENCE_TRANSFORMERS, OURS)),
            BASE_LOSS_BARS.get(base, ""),
            f"{speed.other_cores:.1f}",
        )
    return table


def _growth_table(results: Results) -> Table:
    table = Table(
        title=f"Growth, from {SMALL} without padding, one thing at a time: medians of interleaved rounds",
        caption="Resident memory. Padding: the share of tokens that is padding.",
    )
    table.add_column("axis, value", no_wrap=True)
    for name in GROWTH_PROVIDERS:
        table.add_column(f"{name}\nms", justify="right")
    for name in ("ours / floor", "s-t / ours"):
        table.add_column(name, justify="right", style="bold")
    table.add_column("others\ncores", justify="right")
    for axis, speed in results.growth.items():
        for value in GROWTH[axis]:
            ours, theirs, floor = (growth_name(name, value) for name in GROWTH_PROVIDERS)
            table.add_row(
                f"{axis} {value:g}",
                *[_number(speed.milliseconds(name), 1) for name in (ours, theirs, floor)],
                _number(speed.ratio(ours, floor)),
                _number(speed.ratio(theirs, ours)),
                f"{speed.other_cores:.1f}",
            )
    return table


def tables(results: Results) -> list[Table]:
    """Of all that was measured."""
    makers = (
        (results.speed, _speed_table),
        (results.peak_bytes, _memory_table),
        (results.deferred, _deferred_table),
        (results.steps, _step_table),
        (results.base_losses, _base_loss_table),
        (results.growth, _growth_table),
    )
    return [table(results) for measured, table in makers if measured]
