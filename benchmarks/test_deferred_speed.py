"""Speed where gradients are deferred: the passes by which they are added, and what the loss costs in a backward.

    make bench BENCH_ARGS="-k deferred"

Two ratios. The passes of all earlier layers to the floor, which copies as many bytes and one layer more. And forward,
backward and additions of one loss, deferred to dense: the engine and its additions are autograd's own, the encoder's
work is not in it (encoder_chain.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conftest import Recording
from deferred_providers import DEFERRED_PROVIDERS
from results import Speed
from shapes import PADDINGS, Shape


@pytest.mark.parametrize("provider", DEFERRED_PROVIDERS)
@pytest.mark.parametrize("padding", list(PADDINGS), scope="session")
def test_deferred(
    shape: Shape,
    padding: str,
    provider: str,
    measured_deferred: Callable[[Shape, str], Speed],
    recording: Recording,
    benchmark: Any,
) -> None:
    recording.replay(measured_deferred(shape, padding), provider, benchmark)
