"""Options, the measuring processes, and the table at the end of `make bench`."""

from __future__ import annotations

import functools
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from measure import ALLOCATORS, NUM_THREADS
from providers import COMPILED, FLOOR, OURS, OURS_ONE_DIM, SENTENCE_TRANSFORMERS
from shapes import MAIN_SHAPES, MORE_SHAPES, PADDINGS, Shape

MEASURE = Path(__file__).with_name("measure.py")
RESULTS = pytest.StashKey["Results"]()
WIDTH = 150

# What the table is held to, by padding. Resident memory, main shapes.
BARS = {
    FLOOR: {"none": "≤ 1.10", "half": "≤ 0.85"},
    SENTENCE_TRANSFORMERS: {"none": "≥ 5", "half": "≥ 7"},
    COMPILED: {"none": "≥ 2", "half": "≥ 2"},
    OURS_ONE_DIM: {"none": "≤ 1.15", "half": "≤ 1.15"},
}


@dataclass(frozen=True)
class Speed:
    """One problem under one allocator, as measure.py reports it."""

    other_cores: float  # kept busy by other processes meanwhile
    providers: dict[str, dict[str, Any]]

    def milliseconds(self, name: str) -> float | None:
        found = self.providers.get(name)
        return 1e3 * statistics.median(found["seconds"]) if found else None

    def ratio(self, name: str, to: str) -> float | None:
        """Median over the rounds of one provider's time to another's in the same round."""
        if name not in self.providers or to not in self.providers:
            return None
        pairs = zip(self.providers[name]["seconds"], self.providers[to]["seconds"], strict=True)
        return statistics.median(a / b for a, b in pairs)


@dataclass
class Results:
    """Everything measured in this session, for the tables."""

    rounds: int
    speed: dict[tuple[Shape, str, str], Speed] = field(default_factory=dict)  # (shape, padding, allocator)
    peak_bytes: dict[Shape, dict[str, int]] = field(default_factory=dict)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("m2d_ext benchmarks")
    group.addoption("--more-shapes", action="store_true", help="also other batch sizes and text lengths (long)")
    group.addoption("--rounds", type=int, default=15, help="interleaved rounds per problem, at least 7")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(config.getoption("--rounds"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        more = MORE_SHAPES if metafunc.config.getoption("--more-shapes") else ()
        metafunc.parametrize("shape", MAIN_SHAPES + more, ids=str, scope="session")


def _measure(what: str, shape: Shape, padding: str, allocator: str, rounds: int, folder: Path) -> dict[str, Any]:
    output = folder / "result.json"
    command = [sys.executable, str(MEASURE), what, "--shape", json.dumps(asdict(shape)), "--padding", padding]
    command += ["--rounds", str(rounds), "--output", str(output)]
    done = subprocess.run(command, env=os.environ | ALLOCATORS[allocator], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def measured_speed(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Shape, str, str], Speed]:
    """All providers on one problem; measured on the first call, together, since their rounds are interleaved."""
    results = pytestconfig.stash[RESULTS]
    folder = tmp_path_factory.mktemp("speed")

    @functools.cache
    def measure(shape: Shape, padding: str, allocator: str) -> Speed:
        speed = Speed(**_measure("speed", shape, padding, allocator, results.rounds, folder))
        results.speed[shape, padding, allocator] = speed
        return speed

    return measure


@pytest.fixture
def measured_peak(pytestconfig: pytest.Config, tmp_path: Path) -> Callable[[Shape], dict[str, int]]:
    """Peak bytes per provider beyond the hidden states and their gradients."""
    results = pytestconfig.stash[RESULTS]

    def measure(shape: Shape) -> dict[str, int]:
        results.peak_bytes[shape] = _measure("memory", shape, "none", "prompt", 1, tmp_path)["peak_bytes"]
        return results.peak_bytes[shape]

    return measure


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _reading_order(item: tuple[tuple[Shape, str, str], Speed]) -> tuple[bool, int, int]:
    """Pytest groups tests by fixture, which is nobody's order of reading."""
    shape, padding, allocator = item[0]
    return allocator == "default", (*MAIN_SHAPES, *MORE_SHAPES).index(shape), list(PADDINGS).index(padding)


def _speed_table(results: Results) -> Table:
    table = Table(
        title=f"Loss alone, forward + backward, float32, {NUM_THREADS} threads: medians of {results.rounds} "
        "interleaved rounds, ratios within a round",
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
            compiled["note"].removesuffix("-no-cudagraphs") if compiled else "fails",
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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=terminalreporter.hasmarkup)
    if results.speed:
        console.print(_speed_table(results))
    if results.peak_bytes:
        console.print(_memory_table(results))
    terminalreporter.write(f"\n{console.file.getvalue()}")
