"""Speed and memory of the loss alone, against everything it should be compared with. `make bench` runs it.

    make bench                                                  two shapes
    make bench BENCH_ARGS="--more-shapes"                       also other batch sizes and lengths
    make bench BENCH_ARGS="--benchmark-json=bench.json"         every round's time, for other tools

Times mean something only beside others of the same minute: no test here asserts one. The table at the end gives
ratios. Every problem is measured with the default allocator, which may hand freed gradients back to the kernel and
pay page faults for the next ones, and with memory kept resident, as a training loop that reuses its blocks has it;
how, see measure.ALLOCATORS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conftest import Recording
from measure import PeakMemory
from providers import OURS, PROVIDERS
from results import Speed
from shapes import MAIN_SHAPES, PADDINGS, Shape


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
    recording.replay(measured_speed(shape, padding, allocator), provider, benchmark)


@pytest.mark.skipif(not PeakMemory.is_available(), reason="needs Linux's VmHWM")
def test_peak_memory(shape: Shape, measured_peak: Callable[[Shape], dict[str, int]]) -> None:
    assert measured_peak(shape)[OURS] <= shape.peak_bytes_allowed
