"""The loss classes in float32, half types and pieces, wherever the models are (`make gpu-check`: on the GPU).

Against sentence-transformers' own loop with whatever version is installed, or against ours with dense gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import Tensor, nn

import m2d_ext
from tiny_models import ARCHITECTURES, DEVICE, HIDDEN, features_of, sentence, tiny_model

DIMS = [HIDDEN, 16, 8]
PAIRS = 16
ALL_CELLS: dict[str, Any] = {"matryoshka_dims": DIMS, "n_layers_per_step": -1, "n_dims_per_step": -1}
FLOAT32_TOLERANCE = 5e-6
HALF_TOLERANCE = 3e-2  # of the encoder's roundings, which fall differently with one call of the model and with two
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="compares the GPU with the CPU")

Build = Callable[[SentenceTransformer], nn.Module]
Gradients = dict[str, Tensor]


def columns() -> list[list[str]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (2, PAIRS), generator=generator).tolist()
    return [[sentence(length, generator) for length in column] for column in lengths]


def ours(
    model: SentenceTransformer, base: Build = st_losses.MultipleNegativesRankingLoss, **options: Any
) -> nn.Module:
    return m2d_ext.Matryoshka2dLoss(model, base(model), **(ALL_CELLS | options))


def theirs(model: SentenceTransformer) -> nn.Module:
    return st_losses.Matryoshka2dLoss(model, st_losses.MultipleNegativesRankingLoss(model), **ALL_CELLS)


def gradients(
    model: SentenceTransformer,
    build: Build,
    *,
    labels: Tensor | None = None,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    device: str = DEVICE,
) -> Gradients:
    """Of a copy of the model, in float64 on the CPU; `scale` is a gradient scaler's."""
    model = copy.deepcopy(model).to(device)
    loss = build(model).to(device)
    features = [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in column.items()}
        for column in features_of(model, columns())
    ]
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        value = loss(features, None if labels is None else labels.to(device))
    (value * scale).backward()
    return {name: p.grad.double().cpu() / scale for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert whole > 0
    return (torch.stack([(found[name] - grad).norm() for name, grad in expected.items()]).norm() / whole).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_deferred_gradients(architecture: str) -> None:
    model = tiny_model(architecture)
    found = gradients(model, ours)
    assert distance(found, gradients(model, partial(ours, deferred=False))) <= FLOAT32_TOLERANCE
    assert distance(found, gradients(model, theirs)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
def test_gradient_checkpointing(architecture: str, use_reentrant: bool) -> None:
    model = tiny_model(architecture)
    expected = gradients(model, partial(ours, deferred=False))
    model[0].auto_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert distance(gradients(model.train(), ours), expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast(architecture: str) -> None:
    model = tiny_model(architecture)
    found = gradients(model, ours, autocast=torch.bfloat16)
    assert distance(found, gradients(model, partial(ours, deferred=False), autocast=torch.bfloat16)) <= HALF_TOLERANCE
    assert distance(found, gradients(model, theirs, autocast=torch.bfloat16)) <= HALF_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float16_with_a_gradient_scaler(architecture: str) -> None:
    model = tiny_model(architecture)
    found = gradients(model, ours, autocast=torch.float16, scale=2.0**10)
    assert distance(found, gradients(model, theirs)) <= HALF_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_caching(architecture: str) -> None:
    model = tiny_model(architecture)
    found = gradients(model, partial(ours, mini_batch_size=5))
    assert distance(found, gradients(model, ours)) <= FLOAT32_TOLERANCE


def guided(model: SentenceTransformer) -> nn.Module:
    return st_losses.GISTEmbedLoss(model, tiny_model(pooling="cls", seed=7).to(model.device))


SCORED = {"CoSENTLoss", "AnglELoss", "CosineSimilarityLoss"}
BASES: dict[str, Build] = {
    "MultipleNegativesSymmetricRankingLoss": st_losses.MultipleNegativesSymmetricRankingLoss,
    "GISTEmbedLoss": guided,
    "CoSENTLoss": st_losses.CoSENTLoss,
    "AnglELoss": st_losses.AnglELoss,
    "CosineSimilarityLoss": st_losses.CosineSimilarityLoss,
}


@on_gpu
@pytest.mark.parametrize("name", BASES)
def test_base_losses_are_those_of_the_cpu(name: str) -> None:
    model = tiny_model()
    labels = torch.arange(PAIRS) % 5 / 4.0 if name in SCORED else None
    build = partial(ours, base=BASES[name])
    found, expected = (gradients(model, build, labels=labels, device=device) for device in (DEVICE, "cpu"))
    assert distance(found, expected) <= FLOAT32_TOLERANCE


@on_gpu
def test_a_grid_is_that_of_the_cpu() -> None:
    model = tiny_model().eval()
    a, b = columns()
    scores = (torch.arange(PAIRS) % 5 / 4.0).tolist()
    evaluator = m2d_ext.GridEvaluator(EmbeddingSimilarityEvaluator(a, b, scores), layers=[1, 2, 3], dims=DIMS[::-1])
    found, expected = (evaluator(copy.deepcopy(model).to(device)) for device in (DEVICE, "cpu"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-3), key


def test_a_cut_model_stays_where_it_was() -> None:
    model = tiny_model().eval()
    cut = m2d_ext.truncate_model(model, num_layers=2, dim=16)
    assert cut.device.type == model.device.type == torch.device(DEVICE).type
    assert cut.encode(columns()[0]).shape == (PAIRS, 16)
