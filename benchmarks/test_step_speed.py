"""Whole training steps of a real model: forward, loss, backward, AdamW. Several minutes of `make bench`.

    make bench BENCH_ARGS="-k training_step"

One model and one optimiser serve all losses, step by step in turn, on the same batches, which are tokenised before.
"plain, merged" is the plain loss in our model calls: where it differs from "plain", that is what merging columns of
like width does; where the columns are unlike, it is the very same step, and its ratio shows the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conftest import Recording
from results import Speed
from step_providers import STEP_PROVIDERS, TEXTS


@pytest.mark.parametrize("provider", STEP_PROVIDERS)
@pytest.mark.parametrize("texts", list(TEXTS), scope="session")
def test_training_step(
    texts: str, provider: str, measured_step: Callable[[str], Speed], recording: Recording, benchmark: Any
) -> None:
    recording.replay(measured_step(texts), provider, benchmark)
