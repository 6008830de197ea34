"""Options, the measuring processes, and the table at the end of `make bench`."""

from __future__ import annotations

import functools
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from deferred_providers import DEFERRED, DEFERRED_PROVIDERS, DENSE, PASSES_COLD, PASSES_WARM
from measure import NUM_THREADS, in_own_process
from providers import COMPILED, FLOOR, OURS, OURS_ONE_DIM, SENTENCE_TRANSFORMERS
from shapes import MAIN_SHAPES, MORE_SHAPES, PADDINGS, Shape
from step_providers import BATCH, PLAIN, STEP_PROVIDERS

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
PASSES_BAR = "≤ 0.60"
DEFERRED_BAR = "≤ 0.70"
STEP_BAR = "≤ 1.02"


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
        return statistics.median(self._ratios(name, to))

    def quartiles(self, name: str, to: str) -> tuple[float, float]:
        """Between which half of those ratios lie."""
        low, _, high = statistics.quantiles(self._ratios(name, to), n=4)
        return low, high

    def _ratios(self, name: str, to: str) -> list[float]:
        pairs = zip(self.providers[name]["seconds"], self.providers[to]["seconds"], strict=True)
        return [a / b for a, b in pairs]


@dataclass
class Results:
    """Everything measured in this session, for the tables."""

    rounds: int
    speed: dict[tuple[Shape, str, str], Speed] = field(default_factory=dict)  # (shape, padding, allocator)
    peak_bytes: dict[Shape, dict[str, int]] = field(default_factory=dict)
    deferred: dict[tuple[Shape, str], Speed] = field(default_factory=dict)  # (shape, padding)
    steps: dict[str, Speed] = field(default_factory=dict)  # by kind of texts


class Recording:
    """Steps that were timed already, for pytest-benchmark: a clock that only they move.

    pytest-benchmark runs all rounds of one function after the other; rounds that are interleaved with other
    providers' can only be replayed to it. With it come its statistics and its JSON.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        self._seconds = list(seconds)

    def clock(self) -> float:
        return self._now

    def step(self) -> None:
        self._now += self._seconds.pop(0)

    def replay(self, speed: Speed, provider: str, benchmark: Any) -> None:
        if provider not in speed.providers:
            pytest.skip("does not work here")
        measured = speed.providers[provider]
        self.load(measured["seconds"])
        benchmark.extra_info |= {key: measured[key] for key in ("page_faults", "note")}
        benchmark.extra_info["other_cores"] = speed.other_cores
        benchmark.pedantic(self.step, rounds=len(measured["seconds"]), iterations=1)


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


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Recording:
    """To be requested before `benchmark`, which reads the marker as it is made."""
    recording = Recording()
    parameters = [str(value) for name, value in request.node.callspec.params.items() if name != "provider"]
    group = f"{request.node.originalname}: {', '.join(parameters)}"
    request.node.add_marker(pytest.mark.benchmark(timer=recording.clock, group=group))
    return recording


def _measure(what: Sequence[str], allocator: str, rounds: int, folder: Path) -> dict[str, Any]:
    return in_own_process(MEASURE, [*what, "--rounds", str(rounds)], allocator, folder)


def _problem(what: str, shape: Shape, padding: str) -> list[str]:
    return [what, "--shape", json.dumps(asdict(shape)), "--padding", padding]


@pytest.fixture(scope="session")
def measured_speed(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Shape, str, str], Speed]:
    """All providers on one problem; measured on the first call, together, since their rounds are interleaved."""
    results = pytestconfig.stash[RESULTS]
    folder = tmp_path_factory.mktemp("speed")

    @functools.cache
    def measure(shape: Shape, padding: str, allocator: str) -> Speed:
        speed = Speed(**_measure(_problem("speed", shape, padding), allocator, results.rounds, folder))
        results.speed[shape, padding, allocator] = speed
        return speed

    return measure


@pytest.fixture
def measured_peak(pytestconfig: pytest.Config, tmp_path: Path) -> Callable[[Shape], dict[str, int]]:
    """Peak bytes per provider beyond the hidden states and their gradients."""
    results = pytestconfig.stash[RESULTS]

    def measure(shape: Shape) -> dict[str, int]:
        results.peak_bytes[shape] = _measure(_problem("memory", shape, "none"), "prompt", 1, tmp_path)["peak_bytes"]
        return results.peak_bytes[shape]

    return measure


@pytest.fixture(scope="session")
def measured_deferred(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Shape, str], Speed]:
    """As measured_speed, where gradients are deferred."""
    results = pytestconfig.stash[RESULTS]
    folder = tmp_path_factory.mktemp("deferred")

    @functools.cache
    def measure(shape: Shape, padding: str) -> Speed:
        speed = Speed(**_measure(_problem("deferred", shape, padding), "resident", results.rounds, folder))
        results.deferred[shape, padding] = speed
        return speed

    return measure


@pytest.fixture(scope="session")
def measured_step(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Speed]:
    """As measured_speed, whole training steps by kind of texts."""
    results = pytestconfig.stash[RESULTS]
    folder = tmp_path_factory.mktemp("step")

    @functools.cache
    def measure(texts: str) -> Speed:
        # Resident memory: with the default allocator a step's page faults depend on who was before it in the round.
        results.steps[texts] = Speed(**_measure(["step", "--texts", texts], "resident", results.rounds, folder))
        return results.steps[texts]

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


def _deferred_table(results: Results) -> Table:
    table = Table(
        title=f"Deferred gradients, float32, {NUM_THREADS} threads, resident memory: medians of {results.rounds} "
        "interleaved rounds, ratios within a round",
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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=terminalreporter.hasmarkup)
    for measured, table in (
        (results.speed, _speed_table),
        (results.peak_bytes, _memory_table),
        (results.deferred, _deferred_table),
        (results.steps, _step_table),
    ):
        if measured:
            console.print(table(results))
    terminalreporter.write(f"\n{console.file.getvalue()}")
