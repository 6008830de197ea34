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
from sentence_transformers import util as st_util
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import Tensor, nn

import m2d_ext
from m2d_ext import architecture
from m2d_ext.losses import rows
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


def swap_model(loss: nn.Module, model: SentenceTransformer) -> None:
    loss.model = loss.loss.model = loss.loss.loss.model = model


def swap_norm(loss: nn.Module, model: SentenceTransformer) -> None:
    loss.model[0].auto_model.final_norm = model[0].auto_model.final_norm


@pytest.mark.parametrize(
    ("first", "second", "swap"),
    [("modernbert", "modernbert", swap_model), ("bert", "modernbert", swap_model), ("modernbert", None, swap_norm)],
)
def test_final_norm_is_that_of_the_present_model(first: str, second: str | None, swap: Any) -> None:
    """A Trainer puts another model into the loss for each trial; and a norm may be replaced alone."""
    model, other = tiny_model(first), tiny_model(second or first, seed=5)
    options: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1, "final_norm": "apply"}
    loss = loss_2d(model, **options)
    loss(columns_of(model), LABELS)
    swap(loss, other)
    fresh = loss_2d(loss.model, **options)
    assert_same(outcome(loss, loss.model), outcome(fresh, loss.model))


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


@pytest.mark.parametrize(
    "options", [{}, {"n_layers_per_step": 2}, {"n_dims_per_step": -1}, {"layers": [1, 3]}], ids=str
)
def test_every_step_logs_the_same_cells(options: dict[str, Any]) -> None:
    """Processes whose draws differ, and Trainers gather by order."""
    model = tiny_model(num_layers=LAYERS).double()
    loss = loss_2d(model, log_cells=True, **options)
    names: set[tuple[str, ...]] = set()
    drawn = []
    for seed in range(8):
        random.seed(seed)
        parts = loss(columns_of(model), None)
        names.add(tuple(parts))
        drawn.append(tuple(name for name, part in parts.items() if part != 0))
        random.seed(seed)
        torch.testing.assert_close(sum(parts.values()), loss_2d(model, **options)(columns_of(model), None))
    assert len(names) == 1
    assert len(set(drawn)) > 1
    layers = 2 if "layers" in options else LAYERS
    assert len(names.pop()) == len(DIMS) * (layers + 1) + layers


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


# --- false negatives ------------------------------------------------------------------------------------------------

RANKINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two directions": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "four, joint": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    "hardness": {"hardness_mode": "all_negatives", "hardness_strength": 2.0},
}


def rows_of_cells(model: SentenceTransformer) -> dict[tuple[int, int], list[Tensor]]:
    """The normalised columns of every cell, by hand."""
    columns = columns_of(model)
    encoder = model[0].auto_model
    cells: dict[tuple[int, int], list[Tensor]] = {}
    for column in columns:
        mask = column["attention_mask"][..., None]
        states = encoder(
            input_ids=column["input_ids"], attention_mask=column["attention_mask"], output_hidden_states=True
        ).hidden_states
        for layer, state in enumerate(states):
            pooled = (state * mask).sum(1) / mask.sum(1)
            for dim in DIMS:
                cells.setdefault((layer, dim), []).append(torch.nn.functional.normalize(pooled[:, :dim], dim=-1))
    return cells


def margin_by_hand(model: SentenceTransformer, options: dict[str, Any], margin: float) -> Tensor:
    """All cells, one candidate after another."""
    cells = rows_of_cells(model)
    final = cells[LAYERS, HIDDEN]
    directions = options.get("directions", ("query_to_doc",))
    total = torch.zeros((), dtype=torch.float64)
    for (layer, _), columns in cells.items():
        each = []
        for i in range(len(LABELS)):
            bound = final[0][i] @ final[1][i] + margin
            logits: dict[str, list[Tensor]] = {direction: [] for direction in directions}
            for direction in directions:
                source, kind = direction.split("_to_")
                own = 0 if source == "query" else 1
                for c, j in [(c, j) for c in ([0] if kind == "query" else [1, 2]) for j in range(len(LABELS))]:
                    is_positive = i == j and {own, c} == {0, 1}
                    if i == j and source == kind:
                        continue
                    if not is_positive and final[own][i] @ final[c][j] > bound:
                        continue
                    cosine = columns[own][i] @ columns[c][j]
                    strength = options.get("hardness_strength", 0.0) if not is_positive else 0.0
                    logits[direction].append(20.0 * cosine + strength * cosine.detach())
            positive = 20.0 * columns[0][i] @ columns[1][i]
            if options.get("partition_mode") == "per_direction":
                sums = [torch.stack(some).logsumexp(0) for some in logits.values() if some]
                each.append(torch.stack(sums).mean() - positive)
            else:
                each.append(torch.stack([z for some in logits.values() for z in some]).logsumexp(0) - positive)
        total = total + torch.stack(each).mean() / (LAYERS if layer < LAYERS else 1)
    return total


@pytest.mark.parametrize("margin", [-0.001, 0.0, 0.01, 3.0])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_false_negatives_are_no_candidates(ranking: str, margin: float) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    options = RANKINGS[ranking]
    expected = margin_by_hand(model, options, margin)
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    base = st_losses.MultipleNegativesRankingLoss(model, **options)
    loss = m2d_ext.Matryoshka2dLoss(
        model, base, DIMS, n_layers_per_step=-1, n_dims_per_step=-1, kl_temperature=0, false_negative_margin=margin
    )
    assert_same(outcome(loss, model), [expected.detach(), *grads])


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}])
def test_a_wide_margin_changes_nothing(options: dict[str, Any]) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    every = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    plain, with_margin = (loss_2d(model, **every, **more) for more in ({}, options | {"false_negative_margin": 3.0}))
    assert_same(outcome(with_margin, model), outcome(plain, model))
    dims = [
        m2d_ext.MatryoshkaLoss(
            model, st_losses.MultipleNegativesRankingLoss(model), DIMS, false_negative_margin=margin
        )
        for margin in (None, 3.0)
    ]
    assert_same(outcome(dims[1], model), outcome(dims[0], model))


# --- the KL of rankings ---------------------------------------------------------------------------------------------


def kl_by_hand(model: SentenceTransformer, scale: float, temperature: float, weight: float) -> Tensor:
    cells = rows_of_cells(model)
    total = torch.zeros((), dtype=torch.float64)
    a, *b = cells[LAYERS, HIDDEN]
    teacher = (a @ torch.cat(b).T * scale / temperature).detach().softmax(-1)
    for anchors, *others in cells.values():
        student = (anchors @ torch.cat(others).T * scale / temperature).log_softmax(-1)
        kl = torch.nn.functional.kl_div(student, teacher, reduction="batchmean")
        total = total + weight * temperature * kl / len(DIMS)
    return total


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}, {"deferred": False}], ids=["", "cached", "dense"])
@pytest.mark.parametrize(
    "base", ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss", "AnglELoss"]
)
def test_kl_of_rankings(base: str, options: dict[str, Any]) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    every = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    without = outcome(loss_2d(model, base, **every, kl_temperature=0), model)
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    model.zero_grad()
    expected = kl_by_hand(model, 20.0, 0.7, 1.3)
    expected.backward()
    kl = [expected.detach(), *(model.get_parameter(name).grad.clone() for name in names)]
    loss = loss_2d(model, base, **every, kl_target="scores", kl_temperature=0.7, kl_div_weight=1.3, **options)
    assert_same(outcome(loss, model), [a + b for a, b in zip(without, kl, strict=True)])


def test_kl_of_rankings_alone() -> None:
    """Nothing but the KL, which still reaches the final layer's smaller dims."""
    model = tiny_model(num_layers=LAYERS).double()
    every: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1, "prior_layers_weight": 0.0}
    loss = loss_2d(model, **every, last_layer_weight=0.0, kl_target="scores", kl_temperature=1.0, log_cells=True)
    found = outcome(loss, model)
    model.zero_grad()
    expected = kl_by_hand(model, 20.0, 1.0, 1.0)
    expected.backward()
    assert_same(found, [expected.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert set(loss(columns_of(model), LABELS)) == {f"layer_{layer}_kl" for layer in range(LAYERS + 1)}


SPLIT_BASES: dict[str, Any] = {
    "four, joint": lambda model: st_losses.MultipleNegativesRankingLoss(model, **RANKINGS["four, joint"]),
    "guided": lambda model: st_losses.CachedGISTEmbedLoss(model, tiny_model(seed=3), mini_batch_size=3),
    "orthogonal": st_losses.GlobalOrthogonalRegularizationLoss,
}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("four, joint", {"false_negative_margin": 0.1}),
        ("four, joint", {"kl_target": "scores"}),
        ("guided", {}),
        ("orthogonal", {}),
    ],
)
def test_few_anchors_at_a_time_change_nothing(
    base: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all scores together would take too much memory."""
    model = tiny_model(num_layers=LAYERS).double()
    every: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1, **options}
    loss = m2d_ext.Matryoshka2dLoss(model, SPLIT_BASES[base](model), DIMS, **every)
    expected = outcome(loss, model)
    monkeypatch.setattr(rows, "MOST_SCORES", 3 * 15 * 8)
    assert_same(outcome(loss, model), expected)


@pytest.mark.parametrize("base", ["GISTEmbedLoss", "CachedGISTEmbedLoss", "DistillKLDivLoss"])
def test_the_kl_of_rankings_has_the_scale_of_the_base_loss(base: str) -> None:
    model = tiny_model(num_layers=LAYERS).double()
    if base == "DistillKLDivLoss":
        loss = st_losses.DistillKLDivLoss(
            model, similarity_fct=st_util.pairwise_cos_sim, student_temperature=0.05, teacher_temperature=1.0
        )
    else:
        loss = getattr(st_losses, base)(model, tiny_model(seed=3), temperature=0.05)
    ranking = st_losses.MultipleNegativesRankingLoss(model, scale=20.0)
    columns, labels = columns_of(model), torch.rand(len(LABELS), 2)
    kls = []
    for each in (loss, ranking):
        every: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1, "kl_target": "scores"}
        whole = m2d_ext.Matryoshka2dLoss(model, each, DIMS, **every, log_cells=True)
        kls.append({name: value for name, value in whole(columns, labels).items() if name.endswith("_kl")})
    assert kls[0].keys() == kls[1].keys()
    for name, kl in kls[0].items():
        torch.testing.assert_close(kl, kls[1][name])


def test_a_guide_runs_under_the_autocast_of_the_call() -> None:
    """Its precision decides which candidates are left out."""
    model, guide = tiny_model(), tiny_model(seed=3)
    seen: list[torch.dtype] = []
    projection = guide[0].auto_model.encoder.layer[0].attention.self.query
    projection.register_forward_hook(lambda module, _, output: seen.append(output.dtype))
    every: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    for dtype in (torch.float32, torch.bfloat16):
        for loss in (
            st_losses.GISTEmbedLoss(model, guide),
            m2d_ext.Matryoshka2dLoss(model, st_losses.GISTEmbedLoss(model, guide), DIMS, **every),
        ):
            seen.clear()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss(columns_of(model), LABELS)
            assert set(seen) == {dtype}


def test_margins_need_a_negative() -> None:
    model = tiny_model()
    loss = loss_2d(model, "MarginMSELoss", n_layers_per_step=-1, n_dims_per_step=-1)
    with pytest.raises(ValueError, match="Expected at least 3 embeddings, got 2"):
        loss(columns_of(model)[:2], torch.rand(len(LABELS), 1))
    same = [loss(columns_of(model), labels) for labels in (LABELS > 0, (LABELS > 0).float())]
    assert same[0] == same[1]


BAD_RANKING_OPTIONS: list[tuple[dict[str, Any], str, type[Exception], str]] = [
    ({"kl_target": "logits"}, "MultipleNegativesRankingLoss", ValueError, "kl_target must be 'features' or 'scores'"),
    ({"false_negative_margin": "0.1"}, "MultipleNegativesRankingLoss", TypeError, "must be a number or None, got str"),
    ({"false_negative_margin": True}, "MultipleNegativesRankingLoss", TypeError, "must be a number or None, got bool"),
    ({"false_negative_margin": float("nan")}, "MultipleNegativesRankingLoss", ValueError, "must be finite, got nan"),
    ({"false_negative_margin": 0.1}, "CoSENTLoss", ValueError, "ranks no in-batch candidates, CoSENTLoss, got 0.1"),
]


@pytest.mark.parametrize(("options", "base", "error", "message"), BAD_RANKING_OPTIONS)
def test_bad_ranking_options(options: dict[str, Any], base: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_2d(tiny_model(), base, **options)


def test_what_the_loop_does_not_have() -> None:
    model = tiny_model().double()
    base = st_losses.MultipleNegativesRankingLoss(model, similarity_fct=st_util.dot_score)
    for name, value in {"kl_target": "scores", "false_negative_margin": 0.1}.items():
        loss = m2d_ext.AdaptiveLayerLoss(model, base, **{name: value})
        with pytest.raises(ValueError, match=f"{name} needs the fused path, which AdaptiveLayerLoss does not take"):
            loss(columns_of(model), LABELS)
    loss = loss_2d(model, "CosineSimilarityLoss", kl_target="scores")
    with pytest.raises(ValueError, match="needs at least 2 columns"):
        loss(columns_of(model)[:1], LABELS)


def test_ranking_options_are_on_the_model_card() -> None:
    config = loss_2d(tiny_model(), kl_target="scores", false_negative_margin=0.1).get_config_dict()
    assert (config["kl_target"], config["false_negative_margin"]) == ("scores", 0.1)
