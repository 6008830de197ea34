"""2,000 training steps in which every loss has its turn: nothing grows, no hook or patch stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

endurance = pytest.importorskip("endurance", reason="the benchmarks are not beside the tests")


@pytest.mark.slow
def test_two_thousand_steps_leave_nothing_behind() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trace = endurance.train(steps=2000)
    finally:
        torch.set_num_threads(threads)
    assert endurance.complaints(trace) == []
    assert sum(map(len, trace.values.values())) >= 2000
