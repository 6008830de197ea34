"""What the losses ask of the model: how many calls, which hidden states, nothing twice, and nothing left behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn
from torch._dynamo.testing import CompileCounter

import m2d_ext
from m2d_ext.losses import embed
from tiny_models import CONFIGS, HIDDEN, features_of, sentence, tiny_model

LAYERS = 5


class Recorder:
    """The calls of an encoder: the shape of each one's input, and which states came back."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.states: list[list[int]] = []
        # No hook: sentence-transformers calls the encoder's forward by its name.
        self._forward = model[0].auto_model.forward
        model[0].auto_model.forward = self._record

    def _record(self, **inputs: Any) -> Any:
        output = self._forward(**inputs)
        self.shapes.append(tuple(inputs["input_ids"].shape))
        states = output.get("hidden_states") or ()
        self.states.append([i for i, state in enumerate(states) if state is not None])
        return output


def loss_of(model: SentenceTransformer, **options: Any) -> nn.Module:
    return m2d_ext.Matryoshka2dLoss(
        model, MultipleNegativesRankingLoss(model), [HIDDEN, 8], **({"n_layers_per_step": -1} | options)
    )


def columns_of(model: SentenceTransformer, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """One column of three texts per length."""
    generator = torch.Generator().manual_seed(0)
    return features_of(model, [[sentence(length, generator) for _ in range(3)] for length in lengths])


SELECTING = [name for name in CONFIGS if name != "mpnet"]  # which returns all states whatever it is asked for


@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_only_drawn_states_are_asked_for(architecture: str, mini_batch_size: int | None) -> None:
    model = tiny_model(architecture, num_layers=LAYERS)
    loss = loss_of(model, n_layers_per_step=2, mini_batch_size=mini_batch_size)
    recorder = Recorder(model)
    for step in range(5):
        random.seed(step)
        state = random.getstate()
        loss(columns_of(model, (4, 4)), None).backward()
        random.setstate(state)
        random.sample(range(2), 1)  # the final layer's dims
        drawn = sorted(random.sample(range(LAYERS), 2))
        # The first step learns how many there are.
        everything = step == 0 or architecture not in SELECTING or not embed.TAKES_LISTS_OF_STATES
        expected = list(range(LAYERS + 1)) if everything else drawn
        assert recorder.states == [expected] * (1 if mini_batch_size is None else 8)
        recorder.states.clear()
    assert not model[0].auto_model.config.output_hidden_states


def test_dims_alone_ask_for_no_states() -> None:
    model = tiny_model()
    recorder = Recorder(model)
    loss = m2d_ext.MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [HIDDEN, 8])
    loss(columns_of(model, (4, 4)), None)
    assert recorder.states == [[], []]


def test_layers_that_were_cut_off_are_not_drawn() -> None:
    """The surgery that users are taught, between two steps: how many states there are is learned anew."""
    model = tiny_model(num_layers=LAYERS)
    loss = loss_of(model, n_layers_per_step=1)
    loss(columns_of(model, (4, 4)), None)
    model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:2]
    recorder = Recorder(model)
    for _ in range(8):
        loss(columns_of(model, (4, 4)), None).backward()
    asked = {0, 1} if embed.TAKES_LISTS_OF_STATES else {0, 1, 2}
    assert {state for states in recorder.states[1:] for state in states} == asked


@pytest.mark.parametrize("architecture", ["qwen3", "modernbert"])
@pytest.mark.parametrize(("before", "after"), [(5, 2), (2, 5)])
def test_layers_that_the_configuration_leaves_out(architecture: str, before: int, after: int) -> None:
    """Some encoders run as many of their layers as it says; the modules stay."""
    model = tiny_model(architecture, num_layers=LAYERS).double()
    config = model[0].auto_model.config
    losses = [
        library.AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model), n_layers_per_step=1)
        for library in (m2d_ext, st_losses)
    ]
    for seed in range(6):
        values = []
        for loss in losses:
            random.seed(seed)
            steps = []
            for config.num_hidden_layers in (before, after):
                steps.append(loss(columns_of(model, (4, 4)), None).item())
            values.append(steps)
        assert values[0] == pytest.approx(values[1], rel=1e-10)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize("dense", [None, HIDDEN])
@pytest.mark.parametrize(("returned", "match"), [(2, "2 hidden states"), (LAYERS + 3, f"{LAYERS + 3} hidden states")])
def test_another_number_of_states(returned: int, match: str, dense: int | None, mini_batch_size: int | None) -> None:
    """One error where nothing told it before; the next step starts with what there is then."""
    model = tiny_model(num_layers=LAYERS, dense=dense)
    loss = loss_of(model, layers=[LAYERS - 1], mini_batch_size=mini_batch_size)
    loss(columns_of(model, (4, 4)), None)
    encoder = model[0].auto_model
    forward = encoder.forward

    def other(**inputs: Any) -> Any:
        output = forward(**inputs)
        states = output.hidden_states * 2
        output.hidden_states = states[:returned]
        return output

    encoder.forward = other
    with pytest.raises(RuntimeError, match=f"the encoder returned {match}"):
        loss(columns_of(model, (4, 4)), None)
    encoder.forward = forward
    loss(columns_of(model, (4, 4)), None).backward()


@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize("dense", [None, HIDDEN])
def test_an_encoder_that_returns_no_states(dense: int | None, mini_batch_size: int | None) -> None:
    """As sentence-transformers, which lacks a key then: the final layer alone is not what was asked for."""
    model = tiny_model(num_layers=LAYERS, dense=dense)
    encoder = model[0].auto_model
    forward = encoder.forward

    def silent(**inputs: Any) -> Any:
        return forward(**inputs | {"output_hidden_states": False})

    encoder.forward = silent
    with pytest.raises(RuntimeError, match="the encoder returned no hidden states"):
        loss_of(model, mini_batch_size=mini_batch_size)(columns_of(model, (4, 4)), None)
    dims = m2d_ext.MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [HIDDEN, 8])
    assert dims(columns_of(model, (4, 4)), None).isfinite()  # which needs none


@pytest.mark.parametrize(("lengths", "shapes"), [((8, 8), [(6, 10)]), ((24, 8), [(3, 26), (3, 10)])], ids=str)
def test_columns_without_a_mask_are_not_padded(lengths: tuple[int, ...], shapes: list[tuple[int, int]]) -> None:
    """The padding would count as tokens."""
    model = tiny_model().double()
    columns = columns_of(model, (max(lengths), min(lengths)))
    for column, length in zip(columns, lengths, strict=True):
        del column["attention_mask"]
        assert column["input_ids"].shape == (3, length + 2)
    recorder = Recorder(model)
    value = loss_of(model, n_dims_per_step=-1)(columns, None)
    assert recorder.shapes == shapes
    theirs = st_losses.Matryoshka2dLoss(
        model, MultipleNegativesRankingLoss(model), [HIDDEN, 8], n_layers_per_step=-1, n_dims_per_step=-1
    )
    torch.testing.assert_close(value, theirs(columns, None).to(value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrapper", ["MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss"])
@pytest.mark.parametrize("modules", [{}, {"dense": HIDDEN}, {"normalize": True}], ids=str)
def test_compiled_loss(modules: dict[str, Any], wrapper: str) -> None:
    """What replaces modules' forward runs as it is; a model inside that is compiled stays so."""
    torch._dynamo.reset()
    model = tiny_model(**modules)
    columns = columns_of(model, (4, 9))
    dims = [] if wrapper == "AdaptiveLayerLoss" else [[HIDDEN, 8]]
    loss = getattr(m2d_ext, wrapper)(model, MultipleNegativesRankingLoss(model), *dims)
    compiled = torch.compile(loss, backend="eager")
    values = []
    for step in (loss, compiled):
        random.seed(0)
        values.append(step(columns, None))
    values[1].backward()
    torch.testing.assert_close(*values)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ((8, 8), [(6, 10)]),
        ((24, 8), [(6, 26)]),
        ((25, 8), [(3, 27), (3, 10)]),
        ((3, 30, 31, 60), [(3, 5), (6, 33), (3, 62)]),
        ((30, 3, 30), [(3, 32), (3, 5), (3, 32)]),
    ],
    ids=str,
)
def test_columns_of_like_width_share_a_call(lengths: tuple[int, ...], shapes: list[tuple[int, int]]) -> None:
    model = tiny_model().double()
    recorder = Recorder(model)
    loss = loss_of(model, n_dims_per_step=-1)
    loss(columns_of(model, lengths), None).backward()
    assert recorder.shapes == shapes
    merged = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "MERGED_TOKENS", -1)
        loss(columns_of(model, lengths), None).backward()
    assert len(recorder.shapes) == len(shapes) + len(lengths)
    for name, grad in merged.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_of_different_lengths_share_a_call_where_they_are_pooled(include_prompt: bool) -> None:
    model = tiny_model(include_prompt=include_prompt).double()
    columns = columns_of(model, (8, 8))
    columns[0]["prompt_length"], columns[1]["prompt_length"] = 3, 2
    recorder = Recorder(model)
    value = loss_of(model, n_dims_per_step=-1)(columns, None)
    assert recorder.shapes == ([(6, 10)] if include_prompt else [(3, 10), (3, 10)])
    assert [column["prompt_length"] for column in columns] == [3, 2]
    theirs = st_losses.Matryoshka2dLoss(
        model, MultipleNegativesRankingLoss(model), [HIDDEN, 8], n_layers_per_step=-1, n_dims_per_step=-1
    )
    torch.testing.assert_close(value, theirs(columns, None).to(value), rtol=1e-6, atol=0)


def test_modules_after_the_encoder_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused loss pools and normalises by itself."""
    model = tiny_model(normalize=True)
    columns = columns_of(model, (4, 9))

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("ran")

    monkeypatch.setattr(Pooling, "forward", fail)
    monkeypatch.setattr(Normalize, "forward", fail)
    loss_of(model)(columns, None).backward()
    with pytest.raises(AssertionError, match="ran"):
        model(columns[0])


@pytest.mark.parametrize("wrapper", ["MatryoshkaLoss", "Matryoshka2dLoss"])
@pytest.mark.parametrize("modules", [{"dense": HIDDEN}, {"word_weights": True}], ids=["dense", "word_weights"])
def test_compiled_once(modules: dict[str, Any], wrapper: str) -> None:
    """A module's forward that is another object in every step would be compiled in every step."""
    torch._dynamo.reset()  # it compiles the same function a limited number of times
    model = tiny_model("mpnet", **modules)
    counter = CompileCounter()
    loss = getattr(m2d_ext, wrapper)(model, MultipleNegativesRankingLoss(model), [HIDDEN, 8])
    compiled = torch.compile(model, backend=counter, dynamic=True)
    override = SentenceTransformerTrainer.override_model_in_loss
    override(object.__new__(SentenceTransformerTrainer), loss, compiled)
    counts = []
    for _ in range(6):
        loss(columns_of(model, (4, 9)), None).backward()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] > 0


class Broken(Exception):
    pass


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_nothing_stays_changed_after_an_exception(mini_batch_size: int | None) -> None:
    model = tiny_model(normalize=True, num_layers=LAYERS)
    loss = loss_of(model, mini_batch_size=mini_batch_size, n_layers_per_step=2)
    loss(columns_of(model, (4, 9)), None)

    def fail(*_: Any) -> None:
        raise Broken

    handle = model[0].auto_model.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(Broken):
        loss(columns_of(model, (4, 9)), None)
    handle.remove()
    assert model[0].auto_model.config.output_hidden_states is False
    assert not any("forward" in vars(module) for module in model.modules())
    assert model(columns_of(model, (4,))[0])["sentence_embedding"].shape == (3, HIDDEN)


def test_after_a_loss_of_sentence_transformers(caplog: pytest.LogCaptureFixture) -> None:
    """Which leaves the modules' own forward in their place: nothing that the fused path would miss."""
    model = tiny_model()
    loss_of(model)(columns_of(model, (4, 9)), None)
    theirs = st_losses.Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), [HIDDEN, 8])
    theirs(columns_of(model, (4, 9)), None)
    assert any("forward" in vars(module) for module in model.modules())
    loss_of(model)(columns_of(model, (4, 9)), None)
    assert not caplog.messages


def test_features_are_left_as_they_are() -> None:
    model = tiny_model()
    columns = columns_of(model, (4, 9))
    before = [dict(column) for column in columns]
    loss_of(model)(columns, None).backward()
    for column, expected in zip(columns, before, strict=True):
        assert column.keys() == expected.keys()
        assert all(column[key] is expected[key] for key in expected)
