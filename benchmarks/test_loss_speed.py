"""Speed and memory of the loss alone, against everything it should be compared with. `make bench` runs it.

    make bench                                                  two shapes, a few minutes
    make bench BENCH_ARGS="--more-shapes"                       also other batch sizes and lengths
    make bench BENCH_ARGS="--benchmark-json=bench.json"         every round's time, for other tools

Times mean something only beside others of the same minute: no test here asserts one. The table at the end gives
ratios. Every problem is measured with the default allocator, which may hand freed gradients back to the kernel and
pay page faults for the next ones, and with memory kept resident, as a training loop that reuses its blocks has it;
how, see measure.ALLOCATORS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from conftest import Speed
from measure import PeakMemory
from providers import OURS, PROVIDERS
from shapes import MAIN_SHAPES, PADDINGS, Shape


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


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Recording:
    """To be requested before `benchmark`, which reads the marker as it is made."""
    recording = Recording()
    request.node.add_marker(pytest.mark.benchmark(timer=recording.clock, group=_group(**request.node.callspec.params)))
    return recording


def _group(shape: Shape, padding: str, allocator: str, provider: str) -> str:
    return f"{shape}, {allocator}, padding {padding}"


# The default allocator is of interest for the main shapes; beyond them only what the kernels do is.
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("padding", list(PADDINGS), scope="session")
@pytest.mark.parametrize("allocator", ["resident", "default"], scope="session")
def test_speed(
    shape: Shape,
    allocator: str,
    padding: str,
    provider: str,
    measured_speed: Callable[[Shape, str, str], Speed],
    recording: Recording,
    benchmark: Any,
) -> None:
    if allocator == "default" and shape not in MAIN_SHAPES:
        pytest.skip("measured with resident memory only")
    speed = measured_speed(shape, padding, allocator)
    if provider not in speed.providers:
        pytest.skip("does not work here")
    measured = speed.providers[provider]
    recording.load(measured["seconds"])
    benchmark.extra_info |= {key: measured[key] for key in ("page_faults", "note")}
    benchmark.extra_info["other_cores"] = speed.other_cores
    benchmark.pedantic(recording.step, rounds=len(measured["seconds"]), iterations=1)


@pytest.mark.skipif(not PeakMemory.is_available(), reason="needs Linux's VmHWM")
def test_peak_memory(shape: Shape, measured_peak: Callable[[Shape], dict[str, int]]) -> None:
    assert measured_peak(shape)[OURS] <= shape.peak_bytes_allowed
