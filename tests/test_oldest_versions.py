"""The semantics of sentence-transformers 6.2 with the oldest versions of everything that are supported.

`make test-oldest` first writes what the fused losses give with the versions of the Makefile, where test_surface.py
holds them to sentence-transformers' own, then runs this test in a second environment: the same numbers must come out.
The fallback runs the base losses and modules that are installed, whatever they compute.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import Tensor, nn

import m2d_ext
from parity import recorded_fallbacks
from surface import ROWS, WRAPPERS, Row, attempt, draw_example, guide

EXAMPLES = 3
TOLERANCE = 1e-9
# Wrappers around wrappers need no second look, and what decodes is not of our making.
CHECKED = [row for row in ROWS if row.loss not in (*WRAPPERS, "DenoisingAutoEncoderLoss")]
EXPECTED = os.environ.get("M2D_OUTCOMES")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def outcomes(row: Row, wrapper: str) -> list[dict[str, Any]]:
    """What a few random configurations give on the fused path, as figures that fit in a file."""
    found = []
    for index in range(EXAMPLES):
        example = draw_example(row, wrapper, index)
        for model in (example.model, guide()):
            refill(model)
        with recorded_fallbacks() as fallbacks:
            outcome = attempt(m2d_ext, wrapper, example, example.base.build)
        if isinstance(outcome, Exception) or fallbacks:
            found.append({})
            continue
        gradients = {name: grad for name, grad in outcome.gradients.items() if grad is not None}
        found.append({"loss": outcome.loss.item(), "gradients": fingerprint(gradients)})
    return found


@torch.no_grad()
def refill(model: nn.Module) -> None:
    """With the same weights, whatever the installed transformers draws them by."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.1 * noise if is_norm else 0.12 * noise)


def fingerprint(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each its norm and its product with a fixed vector."""
    return {
        name: [tensor.double().norm().item(), (tensor.double().flatten() * waves(tensor.numel())).sum().item()]
        for name, tensor in tensors.items()
    }


def waves(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64).mul(1.7).cos() / count**0.5


@pytest.mark.skipif(EXPECTED is None, reason="M2D_OUTCOMES names no file: make test-oldest writes one")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("row", CHECKED, ids=[row.name for row in CHECKED])
def test_same_numbers_as_with_the_newest_versions(row: Row, wrapper: str) -> None:
    if not hasattr(st_losses, row.loss):
        pytest.skip(f"this sentence-transformers has no {row.loss}")
    expected = json.loads(Path(str(EXPECTED)).read_text())[f"{row.name} in {wrapper}"]
    if not any(expected):
        pytest.skip("not fused")
    for ours, theirs in zip(outcomes(row, wrapper), expected, strict=True):
        assert ours.keys() == theirs.keys()
        if not theirs:
            continue
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        # Gradients that are exactly zero are noise: they are measured against all of them, as in parity.py.
        scale = max(norm for norm, _ in theirs["gradients"].values())
        for name, figures in theirs["gradients"].items():
            assert ours["gradients"][name] == pytest.approx(figures, rel=TOLERANCE, abs=1e-3 * TOLERANCE * scale), name


def main() -> None:
    """Write what the test expects."""
    parser = argparse.ArgumentParser(description="Write what the losses give with the installed versions.")
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    found = {f"{row.name} in {wrapper}": outcomes(row, wrapper) for row in CHECKED for wrapper in WRAPPERS}
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
