"""Gradient caching over layers and dims: the gradients of the whole batch, from mini-batches embedded twice."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sentence_transformers
import torch
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.util import euclidean_sim
from torch import Tensor, nn

import m2d_ext
from m2d_ext.losses import cached
from tiny_models import DEVICE, HIDDEN, features_of, sentence, tiny_model

DIMS = [HIDDEN, 8, 4]
ALL_CELLS: dict[str, Any] = {"matryoshka_dims": DIMS, "n_layers_per_step": -1, "n_dims_per_step": -1}
DRAWN: dict[str, Any] = {"matryoshka_dims": DIMS, "n_layers_per_step": 1, "n_dims_per_step": 2}
Columns = list[dict[str, Any]]


def columns_of(model: SentenceTransformer, batch_size: int = 9, columns: int = 2) -> Columns:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (columns, batch_size), generator=generator).tolist()
    return features_of(model, [[sentence(length, generator) for length in column] for column in lengths])


def loss_2d(model: Any, base: Any = st_losses.MultipleNegativesRankingLoss, **options: Any) -> nn.Module:
    return m2d_ext.Matryoshka2dLoss(model, base(model), **({} | ALL_CELLS | options))


def caching_base(model: Any) -> nn.Module:
    return st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)


def gradients(loss: nn.Module, columns: Columns, factor: float = 1.0, seed: int = 3) -> dict[str, Tensor]:
    random.seed(seed)
    torch.manual_seed(seed)
    loss.zero_grad()
    (loss(columns, None) * factor).backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    assert scale > 0
    for name, grad in expected.items():
        allowed = tolerance * max(grad.norm().item(), 1e-3 * scale)
        assert (found[name] - grad).norm().item() <= allowed, name


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize("pooling", ["mean", "max", "lasttoken"])
@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("deferred", [True, False])
def test_equal_to_the_whole_batch(architecture: str, pooling: str, columns: int, deferred: bool) -> None:
    model = tiny_model(architecture, pooling=pooling, normalize=columns == 3).double()
    batch = columns_of(model, columns=columns)
    expected = gradients(loss_2d(model), batch, 3.0)
    found = gradients(loss_2d(model, mini_batch_size=4, deferred=deferred), batch, 3.0)
    assert_close(found, expected, 1e-10)


def test_weights_of_words_get_the_gradient_of_the_whole_batch() -> None:
    model = tiny_model(word_weights=True).double()
    columns = columns_of(model)
    expected = gradients(loss_2d(model), columns)
    assert expected["model.1.emb_layer.weight"].norm() > 0
    assert_close(gradients(loss_2d(model, mini_batch_size=4), columns), expected, 1e-10)


@pytest.mark.parametrize("name", ["Matryoshka2dLoss", "AdaptiveLayerLoss", "MatryoshkaLoss"])
@pytest.mark.parametrize("size", [{"mini_batch_size": 4}, {"mini_batch_num_tokens": 20}, "base"], ids=str)
def test_every_class(name: str, size: Any) -> None:
    model = tiny_model().double()
    arguments: dict[str, Any] = {} if name == "AdaptiveLayerLoss" else {"matryoshka_dims": DIMS}
    if name != "MatryoshkaLoss":
        arguments["n_layers_per_step"] = 2
    plain = st_losses.MultipleNegativesRankingLoss(model)
    build = getattr(m2d_ext, name)
    expected = gradients(build(model, plain, **arguments), columns_of(model))
    if size == "base":
        loss = build(model, caching_base(model), **arguments)
    else:
        loss = build(model, plain, **arguments, **size)
    assert_close(gradients(loss, columns_of(model)), expected, 1e-10)


def test_dims_inside_layers_may_hold_the_options() -> None:
    model = tiny_model().double()
    inner = m2d_ext.MatryoshkaLoss(
        model, st_losses.MultipleNegativesRankingLoss(model), DIMS, n_dims_per_step=-1, mini_batch_size=4
    )
    loss = m2d_ext.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)
    expected = gradients(loss_2d(model, kl_temperature=1.0), columns_of(model))
    loss.kl_temperature = 1.0
    assert_close(gradients(loss, columns_of(model)), expected, 1e-10)


class Uncached(cached.MiniBatches):
    """The same mini-batches, drawing the same dropout, with all their graphs kept: no gradient caching."""

    def whole(self) -> Tensor:
        return torch.cat([self._embed([part], None)[0] for part in self._parts], dim=1)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_dropout_is_replayed(architecture: str) -> None:
    """Batch 64 in float32; what is drawn between forward and backward must not matter."""
    model = tiny_model(architecture, dropout=0.2)
    batch = columns_of(model, batch_size=64)
    torch.manual_seed(3)
    whole = Uncached(model, model, batch, cached.Caching(8, None, False), deferred=True).whole()
    layers = len(whole)
    weights = [[1.0 / (layers - 1)] * len(DIMS)] * (layers - 1) + [[1.0] * len(DIMS)]
    loss = m2d_ext.functional.matryoshka_2d_loss_pooled(
        whole, dims=sorted(DIMS), weights=weights, kl_weights=[0.3] * (layers - 1) + [0.0]
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    again = copy.deepcopy(model)
    ours = loss_2d(again, mini_batch_size=8)
    torch.manual_seed(3)
    again.zero_grad()
    value = ours(batch, None)
    torch.testing.assert_close(value.detach(), loss.detach(), rtol=1e-6, atol=0)
    torch.rand(17)
    before = torch.get_rng_state()
    value.backward()
    assert torch.equal(before, torch.get_rng_state())  # the replay leaves no trace
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    found = {name: grad for name, grad in found.items() if name in expected}
    assert_close(found, expected, 1e-5)


@pytest.mark.skipif(
    Version(sentence_transformers.__version__) < Version("6.2"),
    reason="the behaviour to match is that of sentence-transformers 6.2",
)
@pytest.mark.parametrize("dims_per_step", [-1, 2])
def test_dims_as_sentence_transformers_with_dropout(dims_per_step: int) -> None:
    """There the combination exists; the mini-batches come in the same order, so that dropout is the same."""
    results = []
    for library in (m2d_ext, st_losses):
        model = tiny_model(dropout=0.2, normalize=True).double()
        loss = library.MatryoshkaLoss(model, caching_base(model), DIMS, n_dims_per_step=dims_per_step)
        results.append(gradients(loss, columns_of(model, columns=3), 0.5))
    assert_close(*results, 1e-10)


def test_draws_are_those_of_the_whole_batch() -> None:
    model = tiny_model(num_layers=4).double()
    batch = columns_of(model)
    whole, parts = loss_2d(model, **DRAWN), loss_2d(model, mini_batch_size=2, **DRAWN)
    for seed in range(6):
        assert_close(gradients(parts, batch, seed=seed), gradients(whole, batch, seed=seed), 1e-10)


def test_backward_twice_and_in_another_order() -> None:
    model = tiny_model().double()
    loss = loss_2d(model, mini_batch_size=4)
    batches = [columns_of(model), columns_of(model, batch_size=5)]
    expected = [gradients(loss, batch) for batch in batches]
    model.zero_grad()
    values = [loss(batch, None) for batch in batches]
    values[1].backward()
    (values[0] * 2).backward(retain_graph=True)
    (values[0] * 3).backward()
    found = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    summed = {name: expected[1][name] + 5 * grad for name, grad in expected[0].items()}
    assert_close(found, summed, 1e-10)


def test_without_gradients() -> None:
    model = tiny_model().double()
    with torch.no_grad():
        found = loss_2d(model, mini_batch_size=4)(columns_of(model), None)
        expected = loss_2d(model)(columns_of(model), None)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_autocast_is_replayed() -> None:
    """The usual loop leaves autocast before its backward; the mini-batches must be embedded as they were."""
    model = tiny_model()
    dtypes = []
    model[0].auto_model.encoder.layer[0].attention.self.query.register_forward_hook(
        lambda _module, _inputs, output: dtypes.append(output.dtype)
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = loss_2d(model, mini_batch_size=4)(columns_of(model), None)
    embedded = len(dtypes)
    value.backward()
    assert len(dtypes) == 2 * embedded == 2 * 6
    assert set(dtypes) == {torch.bfloat16}


def test_no_graph_outlives_its_mini_batch() -> None:
    """Memory is bounded by one mini-batch: never more tokens with a graph than one mini-batch has."""
    model = tiny_model()
    alive: list[int] = []
    counted = {"now": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            counted["now"] += len(x)
            alive.append(counted["now"])
            ctx.size = len(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            counted["now"] -= ctx.size
            return grad

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return Counted.apply(output) if output.requires_grad else output

    model[0].auto_model.embeddings.register_forward_hook(count)
    loss_2d(model, mini_batch_size=4)(columns_of(model), None).backward()
    assert max(alive) == 4
    assert counted["now"] == 0
    assert len(alive) == 2 * 3


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    loss_2d(model, mini_batch_size=4, show_progress_bar=True)(columns_of(model), None).backward()
    assert capsys.readouterr().err.count("Embed mini-batches: 100%") == 2


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mini_batch_size": 0}, ValueError, "mini_batch_size must be positive or None, got 0"),
        ({"mini_batch_size": 2.0}, TypeError, "mini_batch_size must be an int or None, got float"),
        ({"mini_batch_num_tokens": -1}, ValueError, "mini_batch_num_tokens must be positive or None, got -1"),
        ({"mini_batch_size": 2, "base": caching_base}, ValueError, "mini_batch_size.* has its own"),
    ],
    ids=["zero", "float", "negative", "twice"],
)
def test_bad_sizes(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        loss_2d(tiny_model(), **options)


def caching_directions(model: Any, mini_batch_size: int | None = 4) -> nn.Module:
    """Cached, or the same uncached."""
    options: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "hardness_mode": "all_negatives"}
    options["hardness_strength"] = 3.0
    if mini_batch_size is None:
        return st_losses.MultipleNegativesRankingLoss(model, **options)
    return st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, **options)


def test_other_directions() -> None:
    model = tiny_model().double()
    expected = gradients(loss_2d(model, partial(caching_directions, mini_batch_size=None)), columns_of(model))
    assert_close(gradients(loss_2d(model, caching_directions), columns_of(model)), expected, 1e-10)


@pytest.mark.parametrize("name", ["CoSENTLoss", "CosineSimilarityLoss", "AnglELoss"])
def test_losses_that_have_no_caching_of_their_own(name: str) -> None:
    model = tiny_model().double()
    base, labels = getattr(st_losses, name), torch.linspace(0, 1, 9, device=DEVICE).double()
    results = []
    for options in ({}, {"mini_batch_size": 4}):
        loss = loss_2d(model, base, **options)
        model.zero_grad()
        loss(columns_of(model), labels).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(results[1], results[0], 1e-10)


def without_fused_path(model: Any) -> nn.Module:
    return st_losses.TripletLoss(model)


def other_caching_base(model: Any) -> nn.Module:
    return st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, similarity_fct=euclidean_sim)


@pytest.mark.parametrize("build", [without_fused_path, other_caching_base])
def test_no_caching_in_the_loop(build: Callable[[Any], nn.Module]) -> None:
    """Rather than a KeyError in the middle of the backward, or memory that grows with the batch after all."""
    model = tiny_model()
    options = {} if build is other_caching_base else {"mini_batch_size": 4}
    with pytest.raises(ValueError, match=r"Matryoshka2dLoss cannot cache gradients \(mini_batch_size\) here: "):
        loss_2d(model, build, **options)(columns_of(model), torch.zeros(9, device=DEVICE))
