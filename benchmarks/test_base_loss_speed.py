"""The loss alone with each base loss, all layers × all dims, against sentence-transformers' own.

make bench BENCH_ARGS="-k base_loss"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from base_loss_providers import BASE_LOSSES, LIBRARIES
from conftest import Recording
from results import Speed


@pytest.mark.parametrize("provider", LIBRARIES)
@pytest.mark.parametrize("base", BASE_LOSSES)
def test_base_loss(
    base: str, provider: str, measured_base_loss: Callable[[str], Speed], recording: Recording, benchmark: Any
) -> None:
    recording.replay(measured_base_loss(base), provider, benchmark)
