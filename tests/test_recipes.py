"""What our losses offer beside sentence-transformers' arguments: listed layers, pairs, the final norm, logged cells.

A recipe is right if it equals what sentence-transformers' own classes give for the cells that it names: one at a
time, or all of them where only the weights differ.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import Tensor, nn

import m2d_ext
from m2d_ext import architecture
from tiny_models import CONFIGS, HIDDEN, features_of, sentence, tiny_model

LAYERS = 4
DIMS = [HIDDEN, 16, 8]
BASES = ("MultipleNegativesRankingLoss", "CoSENTLoss", "TripletLoss")  # by the kernel, an adapter, the loop


def columns_of(model: SentenceTransformer) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [[3, 7, 5, 2], [6, 4, 9, 3], [5, 5, 3, 8]]
    return features_of(model, [[sentence(length, generator) for length in column] for column in lengths])


LABELS = torch.tensor([0.1, 0.9, 0.4, 0.7], dtype=torch.float64)


def loss_2d(model: SentenceTransformer, base: str = "MultipleNegativesRankingLoss", **options: Any) -> nn.Module:
    return m2d_ext.Matryoshka2dLoss(model, getattr(st_losses, base)(model), DIMS, **options)


def outcome(loss: nn.Module, model: SentenceTransformer) -> list[Tensor]:
    loss.zero_grad()
    value = loss(columns_of(model), LABELS)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(found) == len(expected)
    scale = max(tensor.norm().item() for tensor in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm().item() <= tolerance * scale


def cell(model: SentenceTransformer, base: str, layer: int, dim: int) -> list[Tensor]:
    """sentence-transformers' base loss of the model's first layers and dims; its gradients are the whole model's."""
    model.zero_grad()
    encoder = model[0].auto_model
    layers = encoder.encoder.layer
    encoder.encoder.layer = layers[:layer]
    try:
        loss = st_losses.MatryoshkaLoss(model, getattr(st_losses, base)(model), [dim])
        value = loss(columns_of(model), LABELS)
        value.backward()
    finally:
        encoder.encoder.layer = layers
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [value.detach(), *grads]


@pytest.mark.parametrize(
    ("base", "mini_batch_size"), [*((name, None) for name in BASES), (BASES[0], 3), (BASES[1], 3)]
)
def test_pairs_are_those_cells(base: str, mini_batch_size: int | None) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    weights = {16: 2.0, 8: 0.5, HIDDEN: 1.0}
    pairs = [(3, 16), (1, 8), (4, HIDDEN), (3, 8)]
    loss = m2d_ext.Matryoshka2dLoss(
        model,
        getattr(st_losses, base)(model),
        DIMS,
        [weights[d] for d in DIMS],
        pairs=pairs,
        kl_temperature=0.0,
        last_layer_weight=0.7,
        prior_layers_weight=1.3,
        layer_weighting=[9.0, 2.0, 9.0, 3.0],
        mini_batch_size=mini_batch_size,
    )
    value = loss(columns_of(model), LABELS)
    value.backward()
    found = [value.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]
    factors = {1: 1.3 * 2.0 / 2, 3: 1.3 * 3.0 / 2, 4: 0.7}
    expected = [torch.zeros_like(tensor) for tensor in found]
    for layer, dim in pairs:
        for total, part in zip(expected, cell(model, base, layer, dim), strict=True):
            total += factors[layer] * weights[dim] * part
    assert_same(found, expected)


@pytest.mark.parametrize("base", BASES)
def test_pairs_without_the_final_layer(base: str) -> None:
    """It is the teacher all the same, and its own cells have no weight."""
    model = tiny_model(num_layers=LAYERS).double()
    results = []
    for options in ({"pairs": [(2, 8)]}, {"pairs": [(2, 8), (LAYERS, 16)], "last_layer_weight": 0.0}):
        results.append(outcome(loss_2d(model, base, **options), model))
    assert_same(*results)
    without_kl = outcome(loss_2d(model, base, pairs=[(2, 8)], kl_div_weight=0.0), model)
    assert (without_kl[0] - results[0][0]).abs() > 1e-6


@pytest.mark.parametrize("base", BASES)
def test_listed_layers_are_those_drawn(base: str) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    listed = outcome(loss_2d(model, base, layers=[3, 0], n_dims_per_step=-1), model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "sample", lambda population, count: [0, 3])
        drawn = outcome(loss_2d(model, base, n_layers_per_step=2, n_dims_per_step=-1), model)
    assert_same(listed, drawn)


def test_listed_layers_draw_their_dims() -> None:
    model = tiny_model(num_layers=LAYERS).double()
    random.seed(1)
    loss_2d(model, layers=[1, 2])(columns_of(model), None)
    state = random.getstate()
    random.seed(1)
    for _ in range(3):
        random.sample(range(3), 1)
    assert state == random.getstate()


def test_weighting_by_a_list_and_by_a_function() -> None:
    model = tiny_model(num_layers=LAYERS).double()
    weights = [0.5, 2.0, 0.0, 1.5]
    every = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    assert_same(
        outcome(loss_2d(model, layer_weighting=weights, **every), model),
        outcome(loss_2d(model, layer_weighting=weights.__getitem__, **every), model),
    )


@pytest.mark.parametrize("architecture_name", CONFIGS)
def test_final_norm_is_found(architecture_name: str) -> None:
    model = tiny_model(architecture_name)
    modes = [module.training for module in model.modules()]
    norm = architecture.final_norm(model[0])
    encoder = model[0].auto_model
    assert norm is {"modernbert": getattr(encoder, "final_norm", None), "qwen3": getattr(encoder, "norm", None)}.get(
        architecture_name
    )
    assert modes == [module.training for module in model.modules()]
    assert all(not module._forward_hooks for module in model.modules() if "norm" in type(module).__name__.lower())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("architecture_name", ["modernbert", "qwen3", "bert"])
def test_final_norm_trains_what_the_cut_model_serves(architecture_name: str, base: str) -> None:
    """The loss of one earlier layer is that of the model cut there; without the norm it is another."""
    model = tiny_model(architecture_name, num_layers=LAYERS).double()
    options = {"pairs": [(2, HIDDEN)], "kl_temperature": 0.0}
    ours = loss_2d(model, base, final_norm="apply", **options)(columns_of(model), LABELS)
    cut = copy.deepcopy(model)
    encoder = cut[0].auto_model
    holder = encoder.encoder if architecture_name == "bert" else encoder
    name = "layer" if architecture_name == "bert" else "layers"
    setattr(holder, name, getattr(holder, name)[:2])
    encoder.config.num_hidden_layers = 2
    expected = st_losses.MatryoshkaLoss(cut, getattr(st_losses, base)(cut), [HIDDEN])(columns_of(cut), LABELS)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    skipped = loss_2d(model, base, **options)(columns_of(model), LABELS)
    assert ((skipped - expected).abs() > 1e-4) == (architecture_name != "bert")


@pytest.mark.parametrize("architecture_name", ["modernbert", "qwen3"])
def test_final_norm_rows_equal_the_cut_model(architecture_name: str) -> None:
    model = tiny_model(architecture_name, num_layers=LAYERS).eval()
    columns = columns_of(model)
    norm = architecture.final_norm(model[0])
    tokens, _ = m2d_ext.losses.embed.embed(model, model, columns, None, norm)
    pooled = m2d_ext.functional.pool_of_tokens(tokens)
    for layer in range(1, LAYERS):
        cut = copy.deepcopy(model)
        cut[0].auto_model.layers = cut[0].auto_model.layers[:layer]
        cut[0].auto_model.config.num_hidden_layers = layer
        expected = torch.cat([cut(dict(column))["sentence_embedding"] for column in columns])
        torch.testing.assert_close(pooled[layer], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_logged_cells_add_up(mini_batch_size: int | None) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    every = {"n_layers_per_step": -1, "n_dims_per_step": -1, "mini_batch_size": mini_batch_size}
    assert_same(outcome(loss_2d(model, log_cells=True, **every), model), outcome(loss_2d(model, **every), model))
    parts = loss_2d(model, log_cells=True, **every)(columns_of(model), None)
    assert list(parts) == [
        *(name for j in range(LAYERS) for name in (*(f"layer_{j}_dim_{d}" for d in sorted(DIMS)), f"layer_{j}_kl")),
        *(f"layer_{LAYERS}_dim_{d}" for d in sorted(DIMS)),
    ]
    one = m2d_ext.Matryoshka2dLoss(
        model, st_losses.MultipleNegativesRankingLoss(model), DIMS, pairs=[(LAYERS, 16)], log_cells=True
    )
    found = one(columns_of(model), None)
    assert list(found) == ["layer_4_dim_16"]
    torch.testing.assert_close(found["layer_4_dim_16"], parts["layer_4_dim_16"])


def test_the_trainer_logs_cells(tmp_path: Any) -> None:
    model = tiny_model()
    data = Dataset.from_dict({"a": ["w1 w2", "w3 w4", "w5 w6"], "b": ["w1", "w4", "w6"]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    loss = loss_2d(model, n_layers_per_step=-1, n_dims_per_step=-1, log_cells=True)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    logs = trainer.state.log_history[0]
    cells = {name: value for name, value in logs.items() if name.startswith("layer_")}
    assert len(cells) == 4 * len(DIMS) + 3
    assert sum(cells.values()) == pytest.approx(logs["loss"], rel=1e-3)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layers": []}, ValueError, "layers must hold at least one"),
    ({"layers": [1, 1]}, ValueError, "layers must be distinct"),
    ({"layers": [-1]}, ValueError, "layers must not be negative"),
    ({"layers": [1.0]}, TypeError, "layers must be ints"),
    ({"layers": [1], "n_layers_per_step": 2}, ValueError, "n_layers_per_step must be left as it is where layers"),
    ({"pairs": []}, ValueError, "pairs must hold at least one"),
    ({"pairs": [(1, 8), (1, 8)]}, ValueError, "pairs must be distinct"),
    ({"pairs": [(1, 8, 2)]}, TypeError, "pairs must be .layer, dim. tuples"),
    ({"pairs": [("1", 8)]}, TypeError, "pairs must be ints"),
    ({"pairs": [(-1, 8)]}, ValueError, "pairs must not be negative"),
    ({"pairs": [(1, 7)]}, ValueError, r"pairs must take their dims from matryoshka_dims \[32, 16, 8\], got \[7\]"),
    ({"pairs": [(1, 8)], "layers": [1]}, ValueError, "layers must be None where pairs"),
    ({"pairs": [(1, 8)], "n_dims_per_step": 2}, ValueError, "n_dims_per_step must be left as it is where pairs"),
    ({"layer_weighting": "uniformly"}, ValueError, "layer_weighting must be"),
    ({"final_norm": True}, ValueError, "final_norm must be 'skip' or 'apply', got True"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[str(options) for options, *_ in BAD])
def test_bad_recipes(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        loss_2d(tiny_model(), **options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": [1, LAYERS]}, rf"layers must be of layers below {LAYERS} for this model, got \[1, {LAYERS}\]"),
        ({"pairs": [(LAYERS + 1, 8)]}, rf"pairs must be of layers below {LAYERS + 1} for this model"),
        ({"layer_weighting": [1.0]}, f"layer_weighting must have one number per earlier layer, {LAYERS} for this"),
    ],
    ids=str,
)
def test_layers_that_the_model_lacks(options: dict[str, Any], match: str, base: str) -> None:
    model = tiny_model(num_layers=LAYERS)
    with pytest.raises(ValueError, match=match):
        loss_2d(model, base, **options)(columns_of(model), LABELS.float())
