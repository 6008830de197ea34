"""bfloat16 and float16: no farther from float64 than sentence-transformers' arithmetic in the same dtype."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

import m2d_ext
import oracle
from m2d_ext.functional import matryoshka_2d_loss

CONFIGURATIONS = 60
pytestmark = pytest.mark.skipif(m2d_ext.build_info()["build"] == "none", reason="no extension")
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _pool_as_sentence_transformers(states: Tensor, mask: Tensor) -> Tensor:
    """Its mean pooling: summed in float32, divided, and cast back to the states' dtype."""
    weights = mask[..., None].to(states.dtype)
    total = (states * weights).sum(1, dtype=torch.float32)
    return (total / weights.sum(1, dtype=torch.float32).clamp(min=1e-9)).to(states.dtype)


def _problem(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    num_layers, batch, tokens, width = 1 + seed % 4, 2 + seed % 13, 1 + seed % 7, (16, 32, 48)[seed % 3]
    common = torch.randn(num_layers, 1, 1, width, generator=generator)
    states = torch.randn(num_layers, 2 * batch, tokens, width, generator=generator) + common * (seed % 3)
    mask = (torch.rand(2 * batch, tokens, generator=generator) > 0.3).long()
    mask[:, 0] = 1
    dims = [(8, width), (width,), (4, 8, width)][seed % 3]
    options = {
        "num_columns": 2,
        "dims": list(dims),
        "weights": [[1.0] * len(dims)] * num_layers,
        "kl_weights": [0.3] * (num_layers - 1) + [0.0],
        "normalize": seed % 2 == 0,
    }
    return [state.to(dtype) for state in states], mask, options


def _run(states: list[Tensor], mask: Tensor, options: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if kind == "truth" else states[0].dtype
    leaves = [state.to(dtype).clone().requires_grad_() for state in states]
    if kind == "ours":
        loss = matryoshka_2d_loss(leaves, mask, **options)
        assert isinstance(loss, Tensor)
    elif kind == "truth":
        rows = torch.stack([oracle.pool(state, mask, "mean") for state in leaves])
        loss = oracle.loss_of_pooled(rows, **options)
    else:
        rows = torch.stack([_pool_as_sentence_transformers(state, mask) for state in leaves])
        loss = oracle.loss_of_pooled(rows, **options)
    grads = torch.autograd.grad(loss, leaves)
    return loss.detach().double(), torch.cat([grad.flatten() for grad in grads]).double()


@half_types
def test_errors_are_no_larger_than_sentence_transformers(dtype: torch.dtype) -> None:
    ratios: dict[str, list[float]] = {"loss": [], "gradient": []}
    errors: dict[str, list[tuple[float, float]]] = {"loss": [], "gradient": []}
    for seed in range(CONFIGURATIONS):
        states, mask, options = _problem(seed, dtype)
        truth = _run(states, mask, options, "truth")
        ours, theirs = _run(states, mask, options, "ours"), _run(states, mask, options, "theirs")
        for name, mine, other, exact in zip(errors, ours, theirs, truth, strict=True):
            pair = oracle.relative_error(mine, exact), oracle.relative_error(other, exact)
            errors[name].append(pair)
            ratios[name].append(pair[0] / max(pair[1], torch.finfo(dtype).eps / 4))
    for name, pairs in errors.items():
        mine, other = zip(*pairs, strict=True)
        assert statistics.median(mine) <= statistics.median(other), name
        assert statistics.quantiles(mine, n=20)[-1] <= statistics.quantiles(other, n=20)[-1], name
        assert max(ratios[name]) <= 2, name


@half_types
def test_texts_without_tokens_are_zero(dtype: torch.dtype) -> None:
    states, mask, options = _problem(5, dtype)
    mask[1] = 0
    leaves = [state.requires_grad_() for state in states]
    loss = matryoshka_2d_loss(leaves, mask, **options)
    assert isinstance(loss, Tensor)
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.isfinite().all()
        assert not grad[1].any()


@half_types
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_the_loss_is_float32(dtype: torch.dtype, backend: str) -> None:
    states, mask, options = _problem(7, dtype)
    assert matryoshka_2d_loss(states, mask, backend=backend, **options).dtype == torch.float32


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_autocast_does_not_round_the_loss(backend: str) -> None:
    states, mask, options = _problem(8, torch.float32)
    plain = matryoshka_2d_loss(states, mask, backend=backend, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = matryoshka_2d_loss(states, mask, backend=backend, **options)
    assert torch.equal(plain, cast)
