"""Our losses against sentence-transformers' own: same value, same gradients, same random draws.

Random configurations first, then the cases that a random draw would rarely hit, then everything that takes the
fallback loop. `parity.py` says what counts as equal.
"""

from __future__ import annotations

import copy
import random
import statistics
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import sentence_transformers
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.sentence_transformer.modules import LayerNorm, Normalize, Pooling
from sentence_transformers.util import dot_score, manhattan_sim, pairwise_cos_sim
from torch import Tensor, nn

import m2d_ext
from m2d_ext.losses import embed, gather
from parity import (
    FLOAT32_TOLERANCE,
    OWN_ERROR_FACTOR,
    Comparison,
    LossBuilder,
    compare,
    gradient_error,
    recorded_fallbacks,
    run,
)
from tiny_models import (
    ARCHITECTURES,
    CONFIGS,
    DEVICE,
    HIDDEN,
    MORE_CONFIGS,
    PADDING_CONFIGS,
    features_of,
    sentence,
    tiny_model,
)

pytestmark = pytest.mark.skipif(
    Version(sentence_transformers.__version__).release[:2] != (6, 2),
    reason="the behaviour to match is that of sentence-transformers 6.2, whichever version is installed",
)

OURS = m2d_ext
THEIRS = st_losses
WRAPPERS = ("MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss")
MATRYOSHKA_ARGUMENTS = ("matryoshka_dims", "matryoshka_weights", "n_dims_per_step")
LAYER_ARGUMENTS = (
    "n_layers_per_step",
    "last_layer_weight",
    "prior_layers_weight",
    "kl_div_weight",
    "kl_temperature",
    "layer_weighting",
)
EXAMPLES_PER_WRAPPER = 60

deterministic = settings(
    max_examples=EXAMPLES_PER_WRAPPER,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def rising_weight(layer_index: int) -> float:
    return 0.25 + layer_index


def skip_first_layer(layer_index: int) -> float:
    return float(layer_index > 0)


@dataclass(frozen=True)
class Configuration:
    """All that decides one training step, small enough for a failure report to be read."""

    architecture: str = "bert"
    normalize: bool = False
    left_padding: bool = False
    num_layers: int = 3
    lengths: tuple[tuple[int, ...], ...] = ((3, 5, 2, 7), (11, 4, 6, 1))  # (columns, batch), in words
    scale: float = 20.0
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    upstream: float = 1.0
    model_arguments: dict[str, Any] = field(default_factory=dict)

    def model(self) -> SentenceTransformer:
        return tiny_model(
            self.architecture,
            normalize=self.normalize,
            left_padding=self.left_padding,
            num_layers=self.num_layers,
            **self.model_arguments,
        )

    def features(self, model: SentenceTransformer) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        return features_of(model, [[sentence(length, generator) for length in column] for column in self.lengths])


def base_loss(model: nn.Module, scale: float = 20.0) -> nn.Module:
    return st_losses.MultipleNegativesRankingLoss(model, scale=scale)


def arguments_of(wrapper: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that this wrapper takes, so that one set serves all three."""
    names = {
        "MatryoshkaLoss": MATRYOSHKA_ARGUMENTS,
        "AdaptiveLayerLoss": LAYER_ARGUMENTS,
        "Matryoshka2dLoss": MATRYOSHKA_ARGUMENTS + LAYER_ARGUMENTS,
    }[wrapper]
    return {name: value for name, value in arguments.items() if name in names}


def builder(
    library: Any, wrapper: str, arguments: dict[str, Any], base: Callable[[Any], nn.Module] = base_loss
) -> LossBuilder:
    chosen = arguments_of(wrapper, arguments)
    return lambda model: getattr(library, wrapper)(model, base(model), **chosen)


def check(
    wrapper: str,
    configuration: Configuration,
    base: Callable[[Any], nn.Module] | None = None,
    model: SentenceTransformer | None = None,
    **overrides: Any,
) -> Comparison:
    """Compare one configuration; `overrides` go to `compare`."""
    base = base or partial(base_loss, scale=configuration.scale)
    run_arguments = {
        "features": configuration.features,
        "seed": configuration.seed,
        "upstream": configuration.upstream,
    } | overrides
    return compare(
        configuration.model() if model is None else model,
        builder(OURS, wrapper, configuration.arguments, base),
        builder(THEIRS, wrapper, configuration.arguments, base),
        **run_arguments,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, waiting for a second thread takes many times longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def calls_of_sentence_transformers() -> Iterator[None]:
    """The model rounds differently where columns share a call and are padded to one width: hold only the losses to
    each other. `test_columns_in_shared_calls` is about the rest.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "MERGED_TOKENS", -1)
        yield


@pytest.fixture
def expect_fused() -> Iterator[None]:
    """No line about the fallback loop may appear while the test runs."""
    with recorded_fallbacks() as lines:
        yield
    assert not lines, f"expected the fused path: {lines}"


# ---------------------------------------------------------------- random configurations


@st.composite
def text_lengths(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    """2 to 4 columns of 1 to 9 texts, each column with a longest text of its own.

    One text at least has several tokens: where each attends to itself alone, the gradients of queries and keys are
    exactly zero, and what comes out for them is the encoder's rounding, not the loss's.
    """
    batch = draw(st.integers(1, 9))
    columns = draw(st.integers(2, 4))
    longest = [draw(st.sampled_from([2, 1, 5, 12, 30])) for _ in range(columns)]
    lengths = [[draw(st.integers(1, longest[c])) for _ in range(batch)] for c in range(columns)]
    lengths[0][0] = max(2, lengths[0][0])
    return tuple(map(tuple, lengths))


@st.composite
def dims_and_weights(draw: st.DrawFn) -> dict[str, Any]:
    """Dims in any order, some repeated, the full one often absent; weights given or left out."""
    dims = draw(st.lists(st.sampled_from([2, 3, 8, 16, 24, 31, HIDDEN]), min_size=1, max_size=5))
    weight = st.sampled_from([0, 1, 0.5, 0.25, 2.0])
    weights = draw(st.none() | st.lists(weight, min_size=len(dims), max_size=len(dims)))
    return {
        "matryoshka_dims": dims,
        "matryoshka_weights": weights,
        "n_dims_per_step": draw(st.sampled_from([-1, -1, 1, 2])),
    }


@st.composite
def layer_arguments(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "n_layers_per_step": draw(st.sampled_from([-1, 0, 1, 2, 3, 7])),
        "last_layer_weight": draw(st.sampled_from([1.0, 0.0, 0.3, 2.0])),
        "prior_layers_weight": draw(st.sampled_from([1.0, 0.0, 0.5, 3.0])),
        "kl_div_weight": draw(st.sampled_from([1.0, 0.0, 0.2, 5.0])),
        "kl_temperature": draw(st.sampled_from([0.3, 1.0, 0.1, 2.5, 0, -1.0])),
        "layer_weighting": draw(st.sampled_from(["uniform", "log", "linear", rising_weight, skip_first_layer])),
    }


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    architecture = draw(st.sampled_from(ARCHITECTURES))
    return Configuration(
        architecture=architecture,
        normalize=draw(st.booleans()),
        left_padding=architecture == "qwen3" and draw(st.booleans()),
        num_layers=draw(st.sampled_from([3, 1])),
        lengths=draw(text_lengths()),
        scale=draw(st.sampled_from([20.0, 1.0, 5.0, 50.0])),
        arguments={**draw(dims_and_weights()), **draw(layer_arguments())},
        seed=draw(st.integers(0, 1000)),
        upstream=draw(st.sampled_from([1.0, 0.37, 1024.0])),
    )


def may_raise(wrapper: str, configuration: Configuration) -> bool:
    """Sentence-transformers embeds again for a repeated largest dim, and then compares KL teachers of unequal sizes
    when it samples dims.
    """
    dims, sampled = configuration.arguments["matryoshka_dims"], configuration.arguments["n_dims_per_step"]
    return wrapper == "Matryoshka2dLoss" and 0 < sampled < len(dims) and len(set(dims)) < len(dims)


def they_raise(wrapper: str, configuration: Configuration) -> bool:
    theirs = builder(THEIRS, wrapper, configuration.arguments)
    try:
        run(theirs, configuration.model(), configuration.features, seed=configuration.seed)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("wrapper", WRAPPERS)
@given(configuration=configurations())
@deterministic
def test_random_configurations(wrapper: str, configuration: Configuration) -> None:
    if may_raise(wrapper, configuration) and they_raise(wrapper, configuration):
        event("sentence-transformers itself raises")
        # There is nothing to equal; any exception of ours is as good, a crash is not.
        ours = builder(OURS, wrapper, configuration.arguments)
        try:
            run(ours, configuration.model(), configuration.features, seed=configuration.seed)
        except Exception as error:
            event(f"ours raises {type(error).__name__}")
        return
    comparison = check(wrapper, configuration)
    assert not comparison.fallbacks, f"expected the fused path: {comparison.fallbacks}"


# ---------------------------------------------------------------- named cases, fused

ALL_CELLS: dict[str, Any] = {
    "matryoshka_dims": [HIDDEN, 16, 8],
    "n_layers_per_step": -1,
    "n_dims_per_step": -1,
}
THREE_COLUMNS = ((3, 5, 2, 7), (11, 4, 6, 1), (1, 1, 2, 9))

NAMED_ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {"matryoshka_dims": [HIDDEN, 16, 8]},
    "all cells": ALL_CELLS,
    # The contrastive gradient hides the KL's wherever both are there: these leave the KL alone.
    "KL only": ALL_CELLS | {"last_layer_weight": 0.0, "prior_layers_weight": 0.0},
    "KL only, sampled": {
        "matryoshka_dims": [HIDDEN, 8],
        "last_layer_weight": 0.0,
        "prior_layers_weight": 0.0,
        "n_layers_per_step": 2,
    },
    "KL only through the dim weights": ALL_CELLS | {"matryoshka_weights": [0, 0, 0]},
    "KL only, cold": ALL_CELLS | {"last_layer_weight": 0.0, "prior_layers_weight": 0.0, "kl_temperature": 0.02},
    "KL subtracted": ALL_CELLS | {"kl_div_weight": -2.0},
    "no KL": ALL_CELLS | {"kl_temperature": 0},
    "KL of weight zero": ALL_CELLS | {"kl_div_weight": 0.0},
    # The final layer stays the teacher of the KL.
    "last layer of weight zero": ALL_CELLS | {"last_layer_weight": 0.0},
    "prior layers of weight zero": ALL_CELLS | {"prior_layers_weight": 0.0},
    "everything of weight zero": ALL_CELLS
    | {"last_layer_weight": 0.0, "prior_layers_weight": 0.0, "kl_div_weight": 0.0},
    # The KL is not weighted by layer.
    "log weights": ALL_CELLS | {"layer_weighting": "log"},
    "linear weights": ALL_CELLS | {"layer_weighting": "linear"},
    "weights of a function": ALL_CELLS | {"layer_weighting": rising_weight},
    "repeated largest dim": ALL_CELLS | {"matryoshka_dims": [HIDDEN, HIDDEN, 8], "matryoshka_weights": [1, 0.5, 2]},
    "repeated smaller dim": ALL_CELLS | {"matryoshka_dims": [8, HIDDEN, 8], "matryoshka_weights": [1, 0.5, 2]},
    "only one dim, repeated": ALL_CELLS | {"matryoshka_dims": [8, 8]},
    "dims ascending": ALL_CELLS | {"matryoshka_dims": [4, 8, HIDDEN], "matryoshka_weights": [3, 2, 1]},
    "dims a tuple": ALL_CELLS | {"matryoshka_dims": (HIDDEN, 8), "matryoshka_weights": (1.0, 0.5)},
    "full dim absent": ALL_CELLS | {"matryoshka_dims": [16, 5]},
    "dim of one": ALL_CELLS | {"matryoshka_dims": [HIDDEN, 1]},
    "negative weights": ALL_CELLS | {"matryoshka_weights": [3, -1, 0.5], "prior_layers_weight": -0.5},
    "more layers asked than there are": ALL_CELLS | {"n_layers_per_step": 99},
    # All of them, but without a draw.
    "as many layers asked as there are": ALL_CELLS | {"n_layers_per_step": 3},
    "as many dims asked as there are": ALL_CELLS | {"n_dims_per_step": 3},
    "no layers asked means all": ALL_CELLS | {"n_layers_per_step": 0},
    "no dims asked means all": ALL_CELLS | {"n_dims_per_step": 0},
    # The layers stay in the order of the draw, and each then draws its dims.
    "layers and dims sampled": ALL_CELLS | {"n_layers_per_step": 2, "n_dims_per_step": 1},
    "layers sampled, dims all": ALL_CELLS | {"n_layers_per_step": 2},
    "layers all, dims sampled": ALL_CELLS | {"n_dims_per_step": 2},
}


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("name", NAMED_ARGUMENTS)
def test_named_arguments(name: str, normalize: bool) -> None:
    check("Matryoshka2dLoss", Configuration(normalize=normalize, arguments=NAMED_ARGUMENTS[name], seed=3))


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_columns_in_shared_calls(architecture: str, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as sentence-transformers' calls, one column each: the error of all gradients together, because that of
    a single gradient which is exactly zero is another draw of noise in calls of another width.
    """
    monkeypatch.setattr(embed, "MERGED_TOKENS", 1000)
    configuration = Configuration(architecture=architecture, lengths=THREE_COLUMNS, arguments=ALL_CELLS)
    model, features = configuration.model(), configuration.features
    ours, theirs = builder(m2d_ext, wrapper, ALL_CELLS), builder(st_losses, wrapper, ALL_CELLS)
    truth = run(theirs, model, features, dtype=torch.float64)
    allowed = max(FLOAT32_TOLERANCE, OWN_ERROR_FACTOR * gradient_error(run(theirs, model, features), truth))
    assert gradient_error(run(ours, model, features), truth) <= allowed


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("architecture", PADDING_CONFIGS)
def test_encoders_that_depend_on_padding(architecture: str, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MERGED_TOKENS", 1000)
    configuration = Configuration(architecture=architecture, lengths=THREE_COLUMNS, arguments=ALL_CELLS)
    check(wrapper, configuration, dtype=torch.float64, tolerance=1e-9)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_encoders_whose_states_differ_in_length(wrapper: str) -> None:
    configuration = Configuration(architecture="funnel", lengths=THREE_COLUMNS, arguments=ALL_CELLS)
    comparison = check(wrapper, configuration, dtype=torch.float64, tolerance=1e-9)
    assert ["funnel encoder differ in length" in line for line in comparison.fallbacks] == [True]


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_cells_of_every_architecture(architecture: str, wrapper: str) -> None:
    configuration = Configuration(architecture=architecture, lengths=THREE_COLUMNS, arguments=ALL_CELLS)
    comparison = check(wrapper, configuration)
    assert comparison.theirs.loss > 0.1  # else the comparison would prove little


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_float64_agrees_to_the_last_digits(wrapper: str, normalize: bool) -> None:
    configuration = Configuration(normalize=normalize, lengths=THREE_COLUMNS, arguments=ALL_CELLS)
    check(wrapper, configuration, dtype=torch.float64, tolerance=1e-12)


SATURATED_BATCHES = 15


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_saturated_batch(wrapper: str) -> None:
    """Positives that are the anchors themselves, at a high scale: the softmax is all but one-hot.

    What is left of loss and gradient is exponential in the logits, so one batch may come out ten times better in one
    implementation than in another, by luck. Hence the median of many.
    """
    configuration = Configuration(scale=100.0, arguments=ALL_CELLS)
    model = configuration.model()
    base = partial(base_loss, scale=configuration.scale)
    loss_errors: dict[Any, list[float]] = {OURS: [], THEIRS: []}
    gradient_errors: dict[Any, list[float]] = {OURS: [], THEIRS: []}
    for seed in range(SATURATED_BATCHES):
        generator = torch.Generator().manual_seed(seed)
        texts = [sentence(length, generator) for length in (3, 9, 4, 6, 2)]
        train = partial(run, model=model, features=lambda model, texts=texts: features_of(model, [texts, texts]))
        truth = train(builder(THEIRS, wrapper, ALL_CELLS, base), dtype=torch.float64)
        for library in (OURS, THEIRS):
            outcome = train(builder(library, wrapper, ALL_CELLS, base))
            loss_errors[library].append((outcome.loss / truth.loss - 1.0).abs().item())
            gradient_errors[library].append(gradient_error(outcome, truth))
    for errors in (loss_errors, gradient_errors):
        ours, theirs = (statistics.median(errors[library]) for library in (OURS, THEIRS))
        assert ours <= max(FLOAT32_TOLERANCE, OWN_ERROR_FACTOR * theirs)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_pair_alone(wrapper: str) -> None:
    """One candidate per anchor: the cross-entropy and its gradient are exactly zero, the KL is not."""
    comparison = check(wrapper, Configuration(lengths=((4,), (9,)), arguments=ALL_CELLS))
    if wrapper == "MatryoshkaLoss":
        assert comparison.ours.loss == 0.0


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("left_padding", [False, True], ids=["right", "left"])
def test_text_without_a_token(wrapper: str, left_padding: bool) -> None:
    """An empty text of a tokenizer that adds nothing: every position is padding and the row pools to zero."""
    configuration = Configuration(
        architecture="qwen3",
        left_padding=left_padding,
        lengths=((3, 0, 5), (4, 2, 7)),
        # Two dims: sentence-transformers' own gradient overflows from four on, where each renormalises by 1e-12.
        arguments=ALL_CELLS | {"matryoshka_dims": [HIDDEN, 8]},
    )
    check(wrapper, configuration)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_model_without_prior_layers(wrapper: str) -> None:
    check(wrapper, Configuration(num_layers=0, arguments=ALL_CELLS))


@pytest.mark.usefixtures("expect_fused")
def test_truncate_dim_leaves_the_kl_at_full_width() -> None:
    """`truncate_dim` bounds the dims that may be asked for; training still embeds, and distils, the full width."""
    configuration = Configuration(arguments=ALL_CELLS | {"matryoshka_dims": [16, 8]})
    model = configuration.model()
    model.truncate_dim = 16
    check("Matryoshka2dLoss", configuration, model=model)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("shape", [(4, 16), (4, 2, 16), (4, HIDDEN)], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["MSELoss", "EmbedDistillLoss"])
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_teachers_of_truncated_embeddings(name: str, wrapper: str, shape: tuple[int, ...], normalize: bool) -> None:
    """As wide as `truncate_dim` with dims, which are at most that; without, as wide as the whole embedding."""
    configuration = Configuration(
        lengths=TWO_COLUMNS, normalize=normalize, arguments=ALL_CELLS | {"matryoshka_dims": [16, 8]}
    )
    model = configuration.model()
    model.truncate_dim = 16
    labels = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    base = getattr(st_losses, name)
    if (wrapper == "AdaptiveLayerLoss") == (shape[-1] == HIDDEN):
        comparison = check(wrapper, configuration, base=base, model=model, labels=labels)
        assert bool(comparison.fallbacks) == (wrapper == "AdaptiveLayerLoss")
        return
    for library in (OURS, THEIRS):
        with pytest.raises(RuntimeError):
            run(builder(library, wrapper, configuration.arguments, base), model, configuration.features, labels=labels)


def freeze_embeddings(model: SentenceTransformer) -> None:
    model[0].auto_model.embeddings.requires_grad_(False)


def freeze_first_layer(model: SentenceTransformer) -> None:
    model[0].auto_model.encoder.layer[0].requires_grad_(False)


def freeze_last_layer(model: SentenceTransformer) -> None:
    model[0].auto_model.encoder.layer[-1].requires_grad_(False)


def freeze_up_to_last_layer(model: SentenceTransformer) -> None:
    model.requires_grad_(False)
    model[0].auto_model.encoder.layer[-1].requires_grad_(True)


def freeze_all(model: SentenceTransformer) -> None:
    model.requires_grad_(False)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "freeze", [freeze_embeddings, freeze_first_layer, freeze_last_layer, freeze_up_to_last_layer, freeze_all]
)
def test_frozen_parameters(wrapper: str, freeze: Callable[[SentenceTransformer], None]) -> None:
    configuration = Configuration(arguments=ALL_CELLS)
    model = configuration.model()
    freeze(model)
    check(wrapper, configuration, model=model)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradient_checkpointing(wrapper: str, use_reentrant: bool) -> None:
    configuration = Configuration(arguments=ALL_CELLS)
    model = configuration.model()
    model[0].auto_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    check(wrapper, configuration, model=model)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_evaluation_without_gradients(wrapper: str) -> None:
    """Dropout is on in the model, so that a forward left in training mode would show."""
    configuration = Configuration(
        lengths=THREE_COLUMNS, arguments={"matryoshka_dims": [HIDDEN, 8]}, model_arguments={"dropout": 0.5}
    )
    model = configuration.model().eval()
    with torch.no_grad():
        comparison = check(wrapper, configuration, model=model)
        loss = builder(OURS, wrapper, configuration.arguments)(model)(configuration.features(model), None)
    assert all(gradient is None for gradient in comparison.ours.gradients.values())
    assert not loss.requires_grad


class DrawsWeights:
    """A weighting that uses the same random stream as the sampling of layers and dims."""

    __name__ = "draws"

    def __call__(self, layer_index: int) -> float:
        return random.random() + layer_index


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_layer_weighting_is_called_between_the_draws(wrapper: str) -> None:
    """The order of the draws is final dims, layers, then for each layer its dims before its weight."""
    arguments = {
        "matryoshka_dims": [HIDDEN, 16, 8, 4],
        "n_dims_per_step": 2,
        "n_layers_per_step": 2,
        "layer_weighting": DrawsWeights(),
    }
    check(wrapper, Configuration(arguments=arguments, seed=5))


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_several_steps_keep_the_draws_in_step(wrapper: str) -> None:
    """The draws of step after step from one seed, where a single draw too many would shift all that follow."""
    arguments = {"matryoshka_dims": [HIDDEN, 16, 8, 4], "n_dims_per_step": 2, "n_layers_per_step": 2}
    configuration = Configuration(arguments=arguments)
    model = configuration.model()
    per_library = []
    for library in (OURS, THEIRS):
        loss = builder(library, wrapper, configuration.arguments)(copy.deepcopy(model).double())
        random.seed(11)
        per_library.append([loss(configuration.features(model), None).item() for _ in range(8)])
    assert per_library[0] == pytest.approx(per_library[1], rel=1e-12)
    assert len(set(per_library[0])) > 1  # the draws did vary


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_forwards_before_one_backward(wrapper: str) -> None:
    class Twice(nn.Module):
        def __init__(self, loss: nn.Module) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, features: list[dict[str, Any]], labels: Tensor | None) -> Tensor:
            again = [dict(column) for column in reversed(features)]
            return self.loss(features, labels) + 0.5 * self.loss(again, labels)

    configuration = Configuration(arguments=ALL_CELLS | {"n_dims_per_step": 2})
    build = {
        library: lambda model, library=library: Twice(builder(library, wrapper, configuration.arguments)(model))
        for library in (OURS, THEIRS)
    }
    compare(configuration.model(), build[OURS], build[THEIRS], configuration.features, seed=1)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_second_backward_gives_the_same_gradients(wrapper: str) -> None:
    configuration = Configuration(arguments=ALL_CELLS)
    model = configuration.model()
    loss = builder(OURS, wrapper, configuration.arguments)(model)(configuration.features(model), None)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in first)
    for one, two in zip(first, second, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


SETTINGS_CHANGED_LATER = {
    "last_layer_weight": 0.2,
    "prior_layers_weight": 0.1,
    "kl_div_weight": 3.0,
    "kl_temperature": 1.5,
    "n_layers_per_step": 1,
    "layer_weighting": "linear",
}


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("name", SETTINGS_CHANGED_LATER)
def test_settings_may_change_between_steps(name: str) -> None:
    """A callback that anneals a weight sets the attribute; the next step must see it."""

    def build(library: Any, model: SentenceTransformer) -> nn.Module:
        loss = builder(library, "Matryoshka2dLoss", configuration.arguments)(model)
        setattr(loss, name, SETTINGS_CHANGED_LATER[name])
        return loss

    configuration = Configuration(arguments=ALL_CELLS)
    unchanged = check("Matryoshka2dLoss", configuration)
    changed = compare(
        configuration.model(), partial(build, OURS), partial(build, THEIRS), configuration.features, seed=0
    )
    assert changed.theirs.loss != unchanged.theirs.loss


class Learned(nn.Module):
    """Weights of layers that are trained with the model."""

    __name__ = "learned"

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, layer_index: int) -> Tensor:
        return self.weights[layer_index]


def train_setting(loss: nn.Module, name: str) -> None:
    """Make one of the loss's numbers a parameter, or one of those of a loss inside it."""
    holder = next(module for module in loss.modules() if hasattr(module, name))
    value = getattr(holder, name)
    if isinstance(value, tuple):
        setattr(holder, name, tuple(nn.Parameter(torch.tensor(float(each))) for each in value))
        holder.kept = nn.ParameterList(getattr(holder, name))  # for the comparison of gradients to find them
    else:
        delattr(holder, name)
        setattr(holder, name, nn.Parameter(torch.tensor(float(value))))


TRAINED = {
    "scale": "MatryoshkaLoss",
    "hardness_strength": "AdaptiveLayerLoss",
    "matryoshka_weights": "Matryoshka2dLoss",
    "last_layer_weight": "AdaptiveLayerLoss",
    "prior_layers_weight": "Matryoshka2dLoss",
    "kl_div_weight": "AdaptiveLayerLoss",
    "kl_temperature": "AdaptiveLayerLoss",
    "layer_weighting": "Matryoshka2dLoss",
}


@pytest.mark.parametrize("name", TRAINED)
def test_settings_that_are_trained(name: str) -> None:
    base = multiple_negatives(hardness_mode="all_negatives", hardness_strength=2.0)

    def build(library: Any, model: SentenceTransformer) -> nn.Module:
        arguments = ALL_CELLS | ({"layer_weighting": Learned()} if name == "layer_weighting" else {})
        loss = builder(library, TRAINED[name], arguments, base)(model)
        if name != "layer_weighting":
            train_setting(loss, name)
        return loss

    configuration = Configuration()
    comparison = compare(configuration.model(), partial(build, OURS), partial(build, THEIRS), configuration.features)
    assert f" has a {name} that is trained" in comparison.fallbacks[0]
    found = {key.split("loss.")[-1]: gradient for key, gradient in comparison.ours.gradients.items()}
    of_settings = [gradient for key, gradient in found.items() if not key.startswith("model.")]
    assert of_settings
    assert all(gradient.norm() > 0 for gradient in of_settings)


def test_trained_weights_of_layers_in_a_function() -> None:
    """What it returns is seen after the draw; a gradient is not dropped without a word."""
    configuration = Configuration()
    model = configuration.model()
    loss = OURS.AdaptiveLayerLoss(model, base_loss(model), layer_weighting=lambda j: nn.Parameter(torch.ones(())) * j)
    with pytest.raises(ValueError, match=r"layer_weighting must be a torch.nn.Module"):
        loss(configuration.features(model), None)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize(
    "name", ["scale", "hardness_strength", "matryoshka_weights", *LAYER_ARGUMENTS[1:5], "layer_weighting"]
)
def test_settings_that_are_tensors_may_change_in_place(name: str) -> None:
    base = multiple_negatives(hardness_mode="all_negatives", hardness_strength=2.0)

    def build(library: Any, model: SentenceTransformer) -> nn.Module:
        weight = torch.tensor(1.0)
        given = {"matryoshka_weights": [weight, 1.0, 0.5], "layer_weighting": lambda _: weight}
        arguments = ALL_CELLS | {key: value for key, value in given.items() if key == name}
        loss = builder(library, "Matryoshka2dLoss", arguments, base)(model)
        if name not in given:
            holder = next(module for module in loss.modules() if hasattr(module, name))
            setattr(holder, name, weight)
        with torch.no_grad():
            loss(configuration.features(model), None)
        weight.fill_(3.0)
        return loss

    configuration = Configuration()
    compare(configuration.model(), partial(build, OURS), partial(build, THEIRS), configuration.features)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fused_path_leaves_the_base_loss_alone(wrapper: str) -> None:
    """The log line says which path was taken; here the work itself says so."""
    configuration = Configuration(arguments=ALL_CELLS)
    base_class = st_losses.MultipleNegativesRankingLoss
    calls = {}
    for library in (OURS, THEIRS):
        with mock.patch.object(base_class, "forward", autospec=True, side_effect=base_class.forward) as forward:
            run(builder(library, wrapper, ALL_CELLS), configuration.model(), configuration.features)
        calls[library] = forward.call_count
    assert calls[THEIRS] > 0
    assert calls[OURS] == 0


# ---------------------------------------------------------------- fallback


class UsersLoss(st_losses.MultipleNegativesRankingLoss):
    """A subclass may compute anything: only the class itself is known."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        return 0.5 * super().compute_loss_from_embeddings(embeddings, labels) + embeddings[0].square().mean()


def users_similarity(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b)


def pair_scores(batch: int) -> Tensor:
    return torch.linspace(0.0, 1.0, batch)


def teacher_embeddings(batch: int) -> Tensor:
    return torch.randn(batch, HIDDEN, generator=torch.Generator().manual_seed(1))


def multiple_negatives(**arguments: Any) -> Callable[[Any], nn.Module]:
    return lambda model: st_losses.MultipleNegativesRankingLoss(model, **arguments)


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BaseBuilder = Callable[[Any], nn.Module]
TWO_COLUMNS = ((3, 5, 4, 7), (6, 4, 9, 3))
ONE_COLUMN = ((3, 5, 4, 7),)


@dataclass(frozen=True)
class Base:
    """A base loss with what it needs, and the classes in which it has a fused path."""

    build: BaseBuilder
    labels: Tensor | None = None
    lengths: tuple[tuple[int, ...], ...] = THREE_COLUMNS
    fused: tuple[str, ...] = tuple(WRAPPERS)


def gist(model: Any, **arguments: Any) -> nn.Module:
    guide = tiny_model("mpnet", seed=5).eval().to(model.dtype)
    return st_losses.GISTEmbedLoss(model, guide, **arguments)


def margins(batch: int, columns: int) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(2))


WITH_DIMS_ONLY = tuple(name for name in WRAPPERS if name != "AdaptiveLayerLoss")
BASE_LOSSES: dict[str, Base] = {
    "dot product": Base(multiple_negatives(similarity_fct=dot_score, scale=3.0), fused=WITH_DIMS_ONLY),
    "user's similarity": Base(multiple_negatives(similarity_fct=users_similarity, scale=2.0), fused=()),
    "hard in-batch negatives": Base(multiple_negatives(hardness_mode="in_batch_negatives", hardness_strength=9.0)),
    "hard negatives": Base(multiple_negatives(hardness_mode="hard_negatives", hardness_strength=5.0)),
    "hard negatives of all kinds": Base(multiple_negatives(hardness_mode="all_negatives", hardness_strength=2.0)),
    "four directions": Base(multiple_negatives(directions=ALL_DIRECTIONS)),
    "four directions, hard": Base(
        multiple_negatives(directions=ALL_DIRECTIONS, hardness_mode="all_negatives", hardness_strength=2.0)
    ),
    "two directions": Base(multiple_negatives(directions=("query_to_doc", "doc_to_query"))),
    "two directions, apart": Base(
        multiple_negatives(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    ),
    "symmetric": Base(lambda model: st_losses.MultipleNegativesSymmetricRankingLoss(model)),
    "user's subclass": Base(UsersLoss, fused=()),
    "triplet": Base(lambda model: st_losses.TripletLoss(model), fused=()),
    "CoSENT": Base(lambda model: st_losses.CoSENTLoss(model), pair_scores(4)),
    "CoSENT, ties": Base(lambda model: st_losses.CoSENTLoss(model), torch.tensor([0.5, 0.0, 0.5, 1.0]), TWO_COLUMNS),
    "CoSENT, booleans": Base(lambda model: st_losses.CoSENTLoss(model), torch.tensor([True, False, False, True])),
    "AnglE": Base(lambda model: st_losses.AnglELoss(model), pair_scores(4), TWO_COLUMNS),
    "AnglE, triplets": Base(lambda model: st_losses.AnglELoss(model)),
    "AnglE, labelled triplets": Base(lambda model: st_losses.AnglELoss(model), pair_scores(4)),
    "cosine similarity": Base(lambda model: st_losses.CosineSimilarityLoss(model), pair_scores(4), TWO_COLUMNS),
    "cosine similarity, L1": Base(
        lambda model: st_losses.CosineSimilarityLoss(model, nn.L1Loss()), pair_scores(4), fused=()
    ),
    "margin": Base(lambda model: st_losses.MarginMSELoss(model), margins(4, 1)[:, 0], fused=WITH_DIMS_ONLY),
    "margin, scores": Base(lambda model: st_losses.MarginMSELoss(model), margins(4, 2), fused=WITH_DIMS_ONLY),
    "margin, cosines": Base(
        lambda model: st_losses.MarginMSELoss(model, similarity_fct=pairwise_cos_sim), margins(4, 1)
    ),
    "distilled ranking": Base(
        lambda model: st_losses.DistillKLDivLoss(model, student_temperature=0.5, teacher_temperature=2.0),
        margins(4, 2),
        fused=WITH_DIMS_ONLY,
    ),
    # Labels as wide as the embeddings are cut to each dim, and not normalised.
    "embedding distillation": Base(
        lambda model: st_losses.EmbedDistillLoss(model), teacher_embeddings(4), TWO_COLUMNS
    ),
    "MSE": Base(lambda model: st_losses.MSELoss(model), teacher_embeddings(4), ONE_COLUMN, fused=WITH_DIMS_ONLY),
    "MSE, a teacher per column": Base(
        lambda model: st_losses.MSELoss(model),
        torch.stack([teacher_embeddings(4), teacher_embeddings(4).flip(0)], 1),
        TWO_COLUMNS,
        fused=WITH_DIMS_ONLY,
    ),
    "guided": Base(lambda model: gist(model, margin=0.05), lengths=TWO_COLUMNS),
    "guided triplets": Base(lambda model: gist(model, margin_strategy="relative", margin=0.1, temperature=0.05)),
    "guided, anchors and positives apart": Base(
        lambda model: gist(model, contrast_anchors=False, contrast_positives=False)
    ),
}
FALLBACK_ARGUMENTS = {
    "matryoshka_dims": [HIDDEN, 16, 8],
    "matryoshka_weights": [1.0, 0.5, 2.0],
    "n_dims_per_step": 2,
    "n_layers_per_step": 2,
    "layer_weighting": "log",
}


@pytest.mark.parametrize("every", [False, True], ids=["drawn", "all"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", BASE_LOSSES)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_base_losses(name: str, wrapper: str, normalize: bool, every: bool) -> None:
    base = BASE_LOSSES[name]
    arguments = FALLBACK_ARGUMENTS | ({"n_dims_per_step": -1, "n_layers_per_step": -1} if every else {})
    configuration = Configuration(lengths=base.lengths, arguments=arguments, seed=2, normalize=normalize)
    comparison = check(wrapper, configuration, base=base.build, labels=base.labels)
    if not normalize:  # where a dot product is a cosine, there is a fused path too
        assert bool(comparison.fallbacks) == (wrapper not in base.fused), comparison.fallbacks


RAGGED: dict[str, Base] = {
    "more candidates": Base(base_loss, lengths=((3, 5, 4, 7), (6, 4, 9, 3, 2, 8))),
    "more negatives": Base(base_loss, lengths=((3, 5, 4, 7), (6, 4, 9, 3), (2, 8, 3, 5, 6))),
    "fewer negatives": Base(base_loss, lengths=((3, 5, 4, 7), (6, 4, 9, 3), (2, 8))),
    "a column that is not read": Base(BASE_LOSSES["CoSENT"].build, pair_scores(2), ((3, 5), (6, 4), (2, 8, 3))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", RAGGED)
def test_columns_of_different_lengths(name: str, wrapper: str) -> None:
    base = RAGGED[name]
    configuration = Configuration(lengths=base.lengths, arguments=FALLBACK_ARGUMENTS, seed=2)
    comparison = check(wrapper, configuration, base=base.build, labels=base.labels)
    assert "the columns have different numbers of texts" in comparison.fallbacks[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fewer_positives_than_anchors(wrapper: str) -> None:
    configuration = Configuration(lengths=((3, 5, 4, 7), (6, 4)), arguments=ALL_CELLS)
    for library in (OURS, THEIRS):
        with pytest.raises(IndexError):
            run(builder(library, wrapper, ALL_CELLS), configuration.model(), configuration.features)


COLUMNS = {
    **dict.fromkeys(("CoSENT", "AnglE", "cosine similarity", "margin, cosines"), (0, 1)),
    **dict.fromkeys(("hard negatives", "guided"), (0, 1)),
    "embedding distillation": (0,),
}


@pytest.mark.parametrize(
    ("name", "count"), [(name, count) for name, counts in COLUMNS.items() for count in counts], ids=str
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_too_few_columns(wrapper: str, name: str, count: int) -> None:
    """sentence-transformers raises too, of whatever type."""
    base, configuration = BASE_LOSSES[name], Configuration(lengths=THREE_COLUMNS[:count])
    for library, error, match in (
        (OURS, ValueError, f"Expected .* embeddings, got {count}"),
        (THEIRS, Exception, "."),
    ):
        with pytest.raises(error, match=match):
            run(
                builder(library, wrapper, ALL_CELLS, base.build),
                configuration.model(),
                configuration.features,
                labels=base.labels,
            )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_columns_of_a_loss_of_single_columns(wrapper: str) -> None:
    configuration = Configuration(lengths=())
    with pytest.raises(ValueError, match="Expected at least 1 embeddings, got 0"):
        run(
            builder(OURS, wrapper, ALL_CELLS, st_losses.GlobalOrthogonalRegularizationLoss),
            configuration.model(),
            configuration.features,
        )


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("option", ["mini_batch_size", "gather_across_devices"])
def test_columns_of_different_lengths_where_the_loop_would_not_do(
    option: str, wrapper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes would wait elsewhere than the loop does; and it has no gradient caching."""
    configuration = Configuration(lengths=((3, 5), (6, 4, 9)))
    model = configuration.model()
    gathers = option == "gather_across_devices"
    arguments: dict[str, Any] = {} if wrapper == "AdaptiveLayerLoss" else {"matryoshka_dims": [HIDDEN]}
    loss = getattr(OURS, wrapper)(
        model,
        st_losses.MultipleNegativesRankingLoss(model, gather_across_devices=gathers),
        **arguments,
        **({} if gathers else {option: 2}),
    )
    monkeypatch.setattr(gather, "is_distributed", lambda: gathers)
    with pytest.raises(ValueError, match=f"{option}.*the columns have different numbers of texts"):
        loss(configuration.features(model), None)


METHODS = {
    "compute_loss_from_embeddings": base_loss,
    "calculate_loss": lambda model: st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "forward": base_loss,
}


@pytest.mark.parametrize("wrapper", ["MatryoshkaLoss", "AdaptiveLayerLoss"])
@pytest.mark.parametrize("method", METHODS)
def test_fallback_for_a_method_replaced_on_the_base_loss(method: str, wrapper: str) -> None:
    def base(model: Any) -> nn.Module:
        loss = METHODS[method](model)
        original = getattr(loss, method)
        setattr(loss, method, lambda *args, **options: 2 * original(*args, **options))
        return loss

    configuration = Configuration(arguments=ALL_CELLS)
    if wrapper == "AdaptiveLayerLoss" and method == "calculate_loss":
        with pytest.raises(ValueError, match=r"cannot cache gradients .* has a replaced calculate_loss"):
            run(builder(OURS, wrapper, ALL_CELLS, base), configuration.model(), configuration.features)
        return
    assert f"a replaced {method}" in check(wrapper, configuration, base=base).fallbacks[0]


def test_fallback_for_a_hook_on_the_loss_of_dims() -> None:
    def build(library: Any, model: SentenceTransformer) -> nn.Module:
        loss = builder(library, "Matryoshka2dLoss", FALLBACK_ARGUMENTS)(model)
        loss.loss.register_forward_hook(doubled)
        return loss

    configuration = Configuration(seed=1)
    comparison = compare(
        configuration.model(), partial(build, OURS), partial(build, THEIRS), configuration.features, seed=1
    )
    assert "MatryoshkaLoss has hooks or a replaced forward" in comparison.fallbacks[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_line_says_why(wrapper: str) -> None:
    """Of the loss that the user made; not one of the loss inside it, which finds the model replaced by the loop."""
    with recorded_fallbacks() as lines:
        run(
            builder(OURS, wrapper, FALLBACK_ARGUMENTS, UsersLoss),
            Configuration().model(),
            Configuration(arguments=FALLBACK_ARGUMENTS).features,
        )
    assert lines == [f"{wrapper} is falling back to the loop: UsersLoss has no fused path."]


class Summed(nn.Module):
    """sentence-transformers adds up what a loss returns as a dict in its Trainer alone, and raises in a loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *inputs: Any) -> Tensor:
        return sum(self.loss(*inputs).values())


ORTHOGONAL = [{}, {"aggregation": "sum", "mean_weight": 0.3}, {"second_moment_weight": None}, {"mean_weight": 0.0}]


@pytest.mark.parametrize("arguments", ORTHOGONAL, ids=str)
@pytest.mark.parametrize("lengths", [ONE_COLUMN, THREE_COLUMNS], ids=["one", "three"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_orthogonal_regularization(wrapper: str, lengths: Any, arguments: dict[str, Any]) -> None:
    """A loss that returns a dict: sentence-transformers cannot multiply it by a weight."""
    configuration = Configuration(lengths=lengths, arguments=FALLBACK_ARGUMENTS, seed=2)

    def regularization(model: Any) -> nn.Module:
        return st_losses.GlobalOrthogonalRegularizationLoss(model, **arguments)

    with pytest.raises(TypeError):
        run(
            builder(THEIRS, wrapper, FALLBACK_ARGUMENTS, regularization), configuration.model(), configuration.features
        )
    ours = builder(OURS, wrapper, FALLBACK_ARGUMENTS, regularization)
    theirs = builder(THEIRS, wrapper, FALLBACK_ARGUMENTS, lambda model: Summed(regularization(model)))
    model = configuration.model()
    outcomes = [run(build, model, configuration.features, dtype=torch.float64) for build in (ours, theirs)]
    torch.testing.assert_close(outcomes[0].loss, outcomes[1].loss, rtol=1e-10, atol=0)
    found, expected = (list(outcome.gradients.values()) for outcome in outcomes)
    scale = max(grad.norm() for grad in expected if grad is not None)
    for a, b in zip(found, expected, strict=True):
        a, b = (torch.zeros((), device=DEVICE) if grad is None else grad for grad in (a, b))
        assert (a - b).norm() <= 1e-9 * scale


CACHED_LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "ranking": lambda model: st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "symmetric": lambda model: st_losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=2),
    "no cosine": lambda model: st_losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=2, similarity_fct=manhattan_sim, scale=0.2
    ),
}


@pytest.mark.parametrize("n_dims_per_step", [-1, 1, 2])
@pytest.mark.parametrize("name", CACHED_LOSSES)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_gradient_caching(name: str, n_dims_per_step: int) -> None:
    arguments = FALLBACK_ARGUMENTS | {"n_dims_per_step": n_dims_per_step}
    comparison = check("MatryoshkaLoss", Configuration(arguments=arguments, seed=4), base=CACHED_LOSSES[name])
    assert bool(comparison.fallbacks) == (name == "no cosine")


@pytest.mark.usefixtures("expect_fused")
def test_cached_guide_takes_several_negatives() -> None:
    guide = tiny_model("mpnet", seed=5).double()

    def base(model: Any) -> nn.Module:
        return st_losses.CachedGISTEmbedLoss(model, guide, temperature=0.1, mini_batch_size=2)

    lengths = ((3, 5, 2, 7), (11, 4, 6, 1), (2, 6, 3, 3), (5, 5, 1, 8))
    configuration = Configuration(lengths=lengths, arguments=ALL_CELLS)
    check("MatryoshkaLoss", configuration, base=base, dtype=torch.float64, tolerance=1e-10)


@pytest.mark.parametrize("shared", ["model", "wrapper", "encoder"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_guided_by_the_model_itself(wrapper: str, shared: str) -> None:
    """Whose embeddings sentence-transformers then cuts too."""

    def base(model: Any) -> nn.Module:
        guides = {"model": model, "wrapper": Wrapper(model, "module")}
        guide = guides.get(shared) or SentenceTransformer(modules=[model[0], Pooling(HIDDEN, "cls")], device=DEVICE)
        guided = st_losses.GISTEmbedLoss(model, model, temperature=0.1)
        guided.guide = guide
        return guided

    configuration = Configuration(arguments=ALL_CELLS)
    comparison = check(wrapper, configuration, base=base, dtype=torch.float64, tolerance=1e-10)
    assert "GISTEmbedLoss has the model, or a module of it, as its guide" in comparison.fallbacks[0]


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("prompt_length", [0, 1, 2])
@pytest.mark.parametrize("left_padding", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_poolings(pooling: str, wrapper: str, left_padding: bool, prompt_length: int) -> None:
    configuration = Configuration(
        arguments=FALLBACK_ARGUMENTS,
        left_padding=left_padding,
        lengths=((3, 5, 4, 7), (11, 4, 6, 3)),
        model_arguments={"pooling": pooling, "include_prompt": False},
    )

    def features_with_prompt(model: SentenceTransformer) -> list[dict[str, Any]]:
        return [{**column, "prompt_length": prompt_length} for column in configuration.features(model)]

    check(wrapper, configuration, features=features_with_prompt)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize(
    "pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("mean", "cls")], ids=str
)
@pytest.mark.parametrize("architecture", sorted(CONFIGS | MORE_CONFIGS))
def test_poolings_of_every_architecture(architecture: str, pooling: str | tuple[str, ...]) -> None:
    width = HIDDEN if isinstance(pooling, str) else HIDDEN * len(pooling)
    configuration = Configuration(
        architecture=architecture,
        lengths=THREE_COLUMNS,
        arguments=ALL_CELLS | {"matryoshka_dims": [width, 16, 8]},
        model_arguments={"pooling": pooling},
    )
    # In float64: a decoder pooled at its first token has many gradients that are exactly zero, and noise in float32.
    check("Matryoshka2dLoss", configuration, dtype=torch.float64, tolerance=1e-10)


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("modes", [("mean", "cls"), ("max", "lasttoken", "weightedmean")], ids=" ".join)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_concatenated_poolings(wrapper: str, normalize: bool, modes: tuple[str, ...]) -> None:
    arguments = FALLBACK_ARGUMENTS | {"matryoshka_dims": [len(modes) * HIDDEN, HIDDEN + 3, 8]}
    check(wrapper, Configuration(normalize=normalize, arguments=arguments, model_arguments={"pooling": modes}))


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("base", ["plain", "two directions, apart", "CoSENT"])
@pytest.mark.parametrize("arguments", [ALL_CELLS, FALLBACK_ARGUMENTS], ids=["all", "drawn"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_modules_after_pooling(wrapper: str, normalize: bool, arguments: dict[str, Any], base: str) -> None:
    """A trainable Dense receives a gradient from every layer."""
    configuration = Configuration(arguments=arguments, lengths=THREE_COLUMNS, model_arguments={"dense": HIDDEN})
    model = configuration.model()
    model.append(LayerNorm(HIDDEN))
    if normalize:
        model.append(Normalize())
    chosen = BASE_LOSSES.get(base, Base(base_loss))
    comparison = check(wrapper, configuration, model=model, base=chosen.build, labels=chosen.labels)
    assert any(".linear." in name for name in comparison.gradient_ratios)


def doubled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


def dense_of(name: str) -> Dense:
    """A Dense that does not treat each row by itself in the same way every time it is called."""
    activation = {"BatchNorm1d": nn.BatchNorm1d(HIDDEN), "function": torch.sin, "Dropout": nn.Dropout(0.5)}
    dense = Dense(HIDDEN, HIDDEN, activation_function=activation.get(name, nn.Tanh()))
    if name == "spectral_norm":
        nn.utils.parametrizations.spectral_norm(dense.linear)
    elif name == "hook":
        dense.linear.register_forward_hook(doubled)
    return dense


@pytest.mark.parametrize("wrapper", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "Dropout", "function", "spectral_norm", "hook"])
def test_dense_that_depends_on_the_call(name: str, wrapper: str) -> None:
    configuration = Configuration(arguments=ALL_CELLS, lengths=THREE_COLUMNS)
    model = configuration.model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.append(dense_of(name))
    # In float64: a bias before a BatchNorm has a gradient of exactly zero.
    comparison = check(wrapper, configuration, model=model, dtype=torch.float64, tolerance=1e-10)
    assert " Dense has " in comparison.fallbacks[0] or "parts of Dense have hooks" in comparison.fallbacks[0]


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize(
    "activation", [None, nn.GELU(), nn.PReLU(HIDDEN), nn.Sequential(nn.SiLU(), nn.LayerNorm(HIDDEN))], ids=str
)
def test_activations_of_each_row(activation: nn.Module | None) -> None:
    configuration = Configuration(arguments=ALL_CELLS)
    model = configuration.model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.append(Dense(HIDDEN, HIDDEN, activation_function=copy.deepcopy(activation)))
    check("Matryoshka2dLoss", configuration, model=model)


WORD_WEIGHTS = [
    (pooling, trained)
    for pooling in ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("mean", "cls"))
    for trained in ("all", "weights", "encoder")
    # How long a row of a single token is matters to no cosine: nothing but zeros to compare.
    if (pooling, trained) not in (("cls", "weights"), ("lasttoken", "weights"))
]


@pytest.mark.parametrize("base", ["plain", "two directions, apart", "CoSENT"])
@pytest.mark.parametrize(("pooling", "trained"), WORD_WEIGHTS, ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_word_weights(wrapper: str, pooling: str | tuple[str, ...], trained: str, base: str) -> None:
    """The weights of words are trained by every layer, where they are trained."""
    width = HIDDEN if isinstance(pooling, str) else HIDDEN * len(pooling)
    configuration = Configuration(
        arguments=FALLBACK_ARGUMENTS | {"matryoshka_dims": [width, 16, 8]},
        left_padding=True,
        lengths=((3, 5, 4, 7), (11, 4, 6, 3)),
        model_arguments={"pooling": pooling, "word_weights": True, "include_prompt": False},
    )
    model = configuration.model()
    model[0].requires_grad_(trained != "weights")
    model[1].requires_grad_(trained != "encoder")

    def features_with_prompt(model: SentenceTransformer) -> list[dict[str, Any]]:
        return [{**column, "prompt_length": 1} for column in configuration.features(model)]

    chosen = BASE_LOSSES.get(base, Base(base_loss))
    comparison = check(
        wrapper,
        configuration,
        model=model,
        base=chosen.build,
        labels=chosen.labels,
        features=features_with_prompt,
        dtype=torch.float64,  # some gradients are zero here too, and noise in float32
        tolerance=1e-10,
    )
    assert bool(comparison.fallbacks) == (pooling == "max")
    assert (comparison.ours.gradients["model.1.emb_layer.weight"] is None) == (trained == "encoder")


@pytest.mark.parametrize("index", [1, 2], ids=["pooling", "normalize"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fallback_for_hooked_modules(wrapper: str, index: int) -> None:
    """A hook that changes what the module gives must not be bypassed."""

    def damp_second_half(module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        factor = torch.ones_like(output["sentence_embedding"][0])
        factor[HIDDEN // 2 :] = 0.25
        return {**output, "sentence_embedding": output["sentence_embedding"] * factor}

    configuration = Configuration(normalize=True, arguments=FALLBACK_ARGUMENTS)
    model = configuration.model()
    model[index].register_forward_hook(damp_second_half)
    assert check(wrapper, configuration, model=model).fallbacks


def prepared(model: SentenceTransformer) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(mixed_precision="bf16", cpu=DEVICE == "cpu").prepare_model(model)


def damped(model: SentenceTransformer) -> None:
    """A user's forward in place of the model's."""
    forward = model.forward

    def damp(self: Any, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        output = forward(features, **options)
        factor = torch.linspace(0.1, 2.0, HIDDEN).to(output["sentence_embedding"])
        return {**output, "sentence_embedding": output["sentence_embedding"] * factor}

    model.forward = types.MethodType(damp, model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("after", [(), (prepared,)], ids=["alone", "prepared"])
def test_fallback_for_a_replaced_forward(after: tuple[Any, ...], wrapper: str) -> None:
    def build(library: Any, model: SentenceTransformer) -> nn.Module:
        for change in (damped, *after):
            change(model)
        return builder(library, wrapper, FALLBACK_ARGUMENTS)(model)

    # A model that accelerate prepared rounds to bfloat16: as close as its own rounding, twice.
    configuration = Configuration()
    tolerance = {"tolerance": 0.1} if after else {}
    comparison = compare(
        configuration.model(), partial(build, OURS), partial(build, THEIRS), configuration.features, **tolerance
    )
    assert "the model has a replaced forward" in comparison.fallbacks[0]


@pytest.mark.usefixtures("expect_fused")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mixed_precision_of_accelerate(wrapper: str) -> None:
    """Which puts a forward of its own around the model's."""
    configuration = Configuration(arguments=FALLBACK_ARGUMENTS)
    model = configuration.model()
    prepared(model)
    assert "forward" in vars(model)
    loss = builder(OURS, wrapper, FALLBACK_ARGUMENTS)(model)
    loss(configuration.features(model), None).backward()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prompt_left_out_of_pooling(wrapper: str) -> None:
    configuration = Configuration(arguments=ALL_CELLS, model_arguments={"include_prompt": False})

    def features_with_prompt(model: SentenceTransformer) -> list[dict[str, Any]]:
        return [{**column, "prompt_length": 2} for column in configuration.features(model)]

    with_prompt = check(wrapper, configuration, features=features_with_prompt)
    without = check(wrapper, configuration)
    assert with_prompt.theirs.loss != without.theirs.loss


@pytest.mark.parametrize("inner", [OURS, THEIRS], ids=["ours", "theirs"])
def test_matryoshka_loss_nested_by_hand(inner: Any) -> None:
    """The two wrappers put together by the user are the 2D loss; the inner one may be sentence-transformers'."""
    configuration = Configuration(arguments=FALLBACK_ARGUMENTS, seed=6)

    def nested(outer: Any, inner: Any) -> LossBuilder:
        base = builder(inner, "MatryoshkaLoss", configuration.arguments)
        return builder(outer, "AdaptiveLayerLoss", configuration.arguments, base)

    compare(configuration.model(), nested(OURS, inner), nested(THEIRS, THEIRS), configuration.features, seed=6)


# ---------------------------------------------------------------- wrapped models


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel (`module`) and torch.compile (`_orig_mod`) do."""

    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        setattr(self, attribute, model)
        self.attribute = attribute
        self.calls = 0

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        return getattr(self, self.attribute)(*arguments, **keywords)


def wrap_model_of(loss: nn.Module, model: SentenceTransformer, attributes: Sequence[str]) -> nn.Module:
    """Put the wrapper where the trainer puts it: in the loss and in every loss inside it."""
    trainer_class = sentence_transformers.SentenceTransformerTrainer
    wrapped: nn.Module = model
    for attribute in attributes:
        wrapped = Wrapper(wrapped, attribute)
    # The method uses its trainer only to call itself.
    return trainer_class.override_model_in_loss(object.__new__(trainer_class), loss, wrapped)


@pytest.mark.parametrize("attributes", [("module",), ("_orig_mod",), ("_orig_mod", "module")], ids="-".join)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper: str, attributes: Sequence[str]) -> None:
    configuration = Configuration(arguments=FALLBACK_ARGUMENTS, lengths=THREE_COLUMNS, seed=8)
    wrappers = []

    def build(library: Any, model: SentenceTransformer) -> nn.Module:
        loss = builder(library, wrapper, configuration.arguments)(model)
        loss = wrap_model_of(loss, model, attributes)
        wrappers.append(loss.model)
        return loss

    compare(configuration.model(), partial(build, OURS), partial(build, THEIRS), configuration.features, seed=8)
    # Gradients of several processes are only synchronised when the outermost wrapper is what is called.
    assert all(outermost.calls > 0 for outermost in wrappers)
