"""How the loss alone grows with layers, dims, batch, tokens and padding.

    make bench BENCH_ARGS="-k growth"

It should be linear in layers and in tokens, and the same for one dim or five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conftest import Recording
from providers import GROWTH_PROVIDERS, growth_name
from results import Speed
from shapes import GROWTH


@pytest.mark.parametrize("provider", GROWTH_PROVIDERS)
@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis in GROWTH for value in GROWTH[axis]])
def test_growth(
    axis: str,
    value: float,
    provider: str,
    measured_growth: Callable[[str], Speed],
    recording: Recording,
    benchmark: Any,
) -> None:
    recording.replay(measured_growth(axis), growth_name(provider, value), benchmark)
