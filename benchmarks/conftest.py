"""Options, the measuring processes, and the table at the end of `make bench`."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from measure import PROCESSES, in_own_process
from results import Results, Speed
from shapes import MAIN_SHAPES, MORE_SHAPES, SMALL, Shape
from tables import tables

MEASURE = Path(__file__).with_name("measure.py")
RESULTS = pytest.StashKey["Results"]()
WIDTH = 150


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
    group.addoption("--rounds", type=int, default=9, help="interleaved rounds per problem, at least 7")


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


def _measure_in_turn(what: Sequence[str], rounds: int, folder: Path) -> Speed:
    """The rounds of several processes, with resident memory."""
    found = [Speed(**_measure(what, "resident", rounds, folder)) for _ in range(PROCESSES)]
    return functools.reduce(Speed.joined, found)


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
        problem = _problem("speed", shape, padding)
        if allocator == "resident" and shape in MAIN_SHAPES:
            speed = _measure_in_turn(problem, results.rounds, folder)
        else:
            speed = Speed(**_measure(problem, allocator, results.rounds, folder))
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
        results.deferred[shape, padding] = _measure_in_turn(
            _problem("deferred", shape, padding), results.rounds, folder
        )
        return results.deferred[shape, padding]

    return measure


@pytest.fixture(scope="session")
def measured_growth(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Speed]:
    """As measured_speed, by axis of shapes.GROWTH."""
    results = pytestconfig.stash[RESULTS]
    folder = tmp_path_factory.mktemp("growth")

    @functools.cache
    def measure(axis: str) -> Speed:
        results.growth[axis] = Speed(**_measure(["growth", "--axis", axis], "resident", results.rounds, folder))
        return results.growth[axis]

    return measure


@pytest.fixture(scope="session")
def measured_base_loss(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Speed]:
    """As measured_speed, by base loss."""
    results = pytestconfig.stash[RESULTS]
    folder = tmp_path_factory.mktemp("base-loss")

    @functools.cache
    def measure(base: str) -> Speed:
        what = [*_problem("base-loss", SMALL, "none"), "--base", base]
        results.base_losses[base] = Speed(**_measure(what, "resident", results.rounds, folder))
        return results.base_losses[base]

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


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """With --benchmark-json: what report.py makes its page of."""
    output_json["m2d_ext"] = config.stash[RESULTS].to_json()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=terminalreporter.hasmarkup)
    for table in tables(config.stash[RESULTS]):
        console.print(table)
    terminalreporter.write(f"\n{console.file.getvalue()}")
