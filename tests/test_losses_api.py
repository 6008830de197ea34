"""Drop-in means the same constructors, errors, warnings, nesting and manners as sentence-transformers' classes."""

from __future__ import annotations

import copy
import inspect
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from packaging.version import Version
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.model_card import get_losses
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import Tensor, nn

import m2d_ext
from parity import compare, recorded_fallbacks
from tiny_models import HIDDEN, VOCAB_SIZE, features_of, sentence, tiny_model

pytestmark = pytest.mark.skipif(
    Version(sentence_transformers.__version__).release[:2] != (6, 2),
    reason="the behaviour to match is that of sentence-transformers 6.2, whichever version is installed",
)

OURS = m2d_ext
THEIRS = st_losses
WRAPPERS = ("MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss")
WITH_DIMS = ("MatryoshkaLoss", "Matryoshka2dLoss")
WITH_LAYERS = ("AdaptiveLayerLoss", "Matryoshka2dLoss")
DIMS = [HIDDEN, 8]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, waiting for a second thread takes many times longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base_loss(model: SentenceTransformer) -> nn.Module:
    return st_losses.MultipleNegativesRankingLoss(model)


def cached_loss(model: SentenceTransformer) -> nn.Module:
    return st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


def build(
    library: Any,
    wrapper: str,
    model: SentenceTransformer | None = None,
    base: Callable[[SentenceTransformer], nn.Module] = base_loss,
    **arguments: Any,
) -> nn.Module:
    model = tiny_model() if model is None else model
    if wrapper in WITH_DIMS:
        arguments.setdefault("matryoshka_dims", DIMS)
    return getattr(library, wrapper)(model, base(model), **arguments)


def texts(model: SentenceTransformer, columns: int = 2, batch: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [[1 + (3 * row + 5 * column) % 11 for row in range(batch)] for column in range(columns)]
    return features_of(model, [[sentence(length, generator) for length in column] for column in lengths])


# ---------------------------------------------------------------- constructors


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_signature(wrapper: str) -> None:
    theirs = list(inspect.signature(getattr(THEIRS, wrapper)).parameters.values())
    ours = list(inspect.signature(getattr(OURS, wrapper)).parameters.values())
    shared, extensions = ours[: len(theirs)], ours[len(theirs) :]
    assert [(p.name, p.kind, p.default) for p in shared] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extensions)
    assert all(p.default is not inspect.Parameter.empty for p in extensions)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_forward_signature(wrapper: str) -> None:
    """The trainer calls with two positional arguments, users also by name."""
    theirs = inspect.signature(getattr(THEIRS, wrapper).forward).parameters
    ours = inspect.signature(getattr(OURS, wrapper).forward).parameters
    assert list(ours)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_class_keeps_its_name(wrapper: str) -> None:
    """Model cards and get_config_dict name a loss by its class."""
    assert getattr(OURS, wrapper).__name__ == wrapper


def raised(function: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what the caller compares
        function()
    return caught.type, str(caught.value)


BAD_DIMS: dict[str, dict[str, Any]] = {
    "no dims": {"matryoshka_dims": []},
    "dim zero": {"matryoshka_dims": [HIDDEN, 0]},
    "dim negative": {"matryoshka_dims": [-8]},
    "dim too large": {"matryoshka_dims": [HIDDEN + 1, 8]},
    "too few weights": {"matryoshka_dims": DIMS, "matryoshka_weights": [1]},
    "too many weights": {"matryoshka_dims": DIMS, "matryoshka_weights": [1, 1, 1]},
    "empty weights": {"matryoshka_dims": DIMS, "matryoshka_weights": []},
    # Two faults at once: the one named first is part of the behaviour.
    "dim zero and too few weights": {"matryoshka_dims": [HIDDEN, 0], "matryoshka_weights": [1]},
    "too few weights and dim too large": {"matryoshka_dims": [HIDDEN + 1, 8], "matryoshka_weights": [1]},
}
BAD_LAYERS: dict[str, dict[str, Any]] = {
    "unknown weighting": {"layer_weighting": "exponential"},
    "no weighting": {"layer_weighting": None},
}


@pytest.mark.parametrize("wrapper", WITH_DIMS)
@pytest.mark.parametrize("name", BAD_DIMS)
def test_bad_dims(name: str, wrapper: str) -> None:
    ours = raised(lambda: build(OURS, wrapper, **BAD_DIMS[name]))
    assert ours == raised(lambda: build(THEIRS, wrapper, **BAD_DIMS[name]))
    assert ours[0] is ValueError


@pytest.mark.parametrize("wrapper", WITH_LAYERS)
@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layer_weighting(name: str, wrapper: str) -> None:
    ours = raised(lambda: build(OURS, wrapper, **BAD_LAYERS[name]))
    assert ours == raised(lambda: build(THEIRS, wrapper, **BAD_LAYERS[name]))
    assert ours[0] is ValueError


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_unknown_argument(wrapper: str) -> None:
    assert raised(lambda: build(OURS, wrapper, layers=3))[0] is TypeError


def test_dims_are_bound_by_truncate_dim() -> None:
    model = tiny_model()
    model.truncate_dim = 16
    ours = raised(lambda: build(OURS, "MatryoshkaLoss", model, matryoshka_dims=[HIDDEN]))
    assert ours == raised(lambda: build(THEIRS, "MatryoshkaLoss", model, matryoshka_dims=[HIDDEN]))
    assert "16" in ours[1]


@pytest.mark.parametrize("convert", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
@pytest.mark.parametrize("wrapper", WITH_DIMS)
def test_ints_of_other_libraries(wrapper: str, convert: Callable[[int], Any]) -> None:
    arguments = {"matryoshka_dims": list(map(convert, DIMS)), "matryoshka_weights": list(map(np.float32, (1.0, 0.5)))}
    comparison = compare(
        tiny_model(),
        lambda model: build(OURS, wrapper, model, **arguments),
        lambda model: build(THEIRS, wrapper, model, **arguments),
        texts,
    )
    assert not comparison.fallbacks
    assert [type(dim) for dim in build(OURS, wrapper, **arguments).get_config_dict()["matryoshka_dims"]] == [int, int]


def test_layers_and_pairs_of_other_libraries() -> None:
    layers = build(OURS, "Matryoshka2dLoss", layers=np.array([2, 0])).get_config_dict()["layers"]
    pairs = build(OURS, "Matryoshka2dLoss", pairs=np.array([[2, 8], [1, HIDDEN]])).get_config_dict()["pairs"]
    assert (layers, pairs) == ([0, 2], [(1, HIDDEN), (2, 8)])


@pytest.mark.parametrize("dims", [[16.0], [True]], ids=str)
def test_dims_that_are_no_ints(dims: list[Any]) -> None:
    with pytest.raises(TypeError, match="matryoshka_dims must be ints"):
        build(OURS, "MatryoshkaLoss", matryoshka_dims=dims)


@pytest.mark.parametrize("wrapper", WITH_LAYERS)
def test_first_module_must_be_a_transformer(wrapper: str) -> None:
    class NotATransformer(nn.Module):
        def get_embedding_dimension(self) -> int:
            return HIDDEN

    def make(library: Any) -> nn.Module:
        model = tiny_model()
        model[0] = NotATransformer()
        return build(library, wrapper, model)

    assert raised(lambda: make(OURS))[0] is raised(lambda: make(THEIRS))[0] is AssertionError


@pytest.mark.parametrize("wrapper", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_model_without_token_embeddings(wrapper: str, tmp_path: Path) -> None:
    """sentence-transformers would train the final layer under every layer's name."""
    model = tiny_model()
    model[0].auto_model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    modalities = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    transformer = Transformer(str(tmp_path), modality_config=modalities, module_output_name="sentence_embedding")
    with pytest.raises(ValueError, match="model must have a Transformer that returns token embeddings"):
        build(OURS, wrapper, SentenceTransformer(modules=[transformer]))


def user_warnings(function: Callable[[], Any]) -> list[tuple[str, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    caught = [warning for warning in caught if warning.category is UserWarning]
    return [(str(warning.message), Path(warning.filename).name) for warning in caught]


def mega_batch_loss(model: SentenceTransformer) -> nn.Module:
    return st_losses.MegaBatchMarginLoss(model)


@pytest.mark.parametrize("base", [base_loss, mega_batch_loss])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_warning_about_gradient_caching(wrapper: str, base: Callable[[SentenceTransformer], nn.Module]) -> None:
    ours = user_warnings(lambda: build(OURS, wrapper, base=base))
    theirs = user_warnings(lambda: build(THEIRS, wrapper, base=base))
    # Their 2D loss reports its own file, since the warning looks only one call up: the text is what counts.
    assert [text for text, _ in ours] == [text for text, _ in theirs]
    if wrapper == "AdaptiveLayerLoss":
        assert ours == theirs
        assert len(ours) == (1 if base is mega_batch_loss else 0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_warning_about_gradient_caching_that_works(wrapper: str) -> None:
    assert user_warnings(lambda: build(OURS, wrapper, base=cached_loss)) == []


@pytest.mark.parametrize("dims", [[16, 8], DIMS], ids=["absent", "present"])
@pytest.mark.parametrize("wrapper", WITH_DIMS)
def test_log_line_about_the_absent_full_dim(wrapper: str, dims: list[int], caplog: pytest.LogCaptureFixture) -> None:
    lines = []
    for library in (OURS, THEIRS):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(library, wrapper, matryoshka_dims=dims)
        lines.append([(record.levelno, record.getMessage()) for record in caplog.records])
    assert lines[0] == lines[1]
    assert len(lines[0]) == (0 if HIDDEN in dims else 1)


# ---------------------------------------------------------------- what the object shows


def rising_weight(layer_index: int) -> float:
    return 0.5 + layer_index


class NamelessWeight:
    def __call__(self, layer_index: int) -> float:
        return 1.0


DIM_SETTINGS = {"matryoshka_dims": [8, HIDDEN, 16, 8], "matryoshka_weights": [1, 2.0, 3, 4], "n_dims_per_step": 2}
LAYER_SETTINGS = {
    "n_layers_per_step": 2,
    "last_layer_weight": 0.5,
    "prior_layers_weight": 0.25,
    "kl_div_weight": 2.0,
    "kl_temperature": 0.7,
}
WEIGHTINGS = {
    "uniform": "uniform",
    "log": "log",
    "linear": "linear",
    "function": rising_weight,
    "lambda": lambda layer_index: 1.0,
    "nameless": NamelessWeight(),
}


def settings_of(wrapper: str, weighting: str = "log") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if wrapper in WITH_DIMS:
        settings |= DIM_SETTINGS
    if wrapper in WITH_LAYERS:
        settings |= LAYER_SETTINGS | {"layer_weighting": WEIGHTINGS[weighting]}
    return settings


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_config_dict(weighting: str, wrapper: str) -> None:
    settings = settings_of(wrapper, weighting)
    ours = build(OURS, wrapper, **settings).get_config_dict()
    theirs = build(THEIRS, wrapper, **settings).get_config_dict()
    assert list(ours.items()) == list(theirs.items())
    assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_config_dict_of_the_defaults(wrapper: str) -> None:
    assert build(OURS, wrapper).get_config_dict() == build(THEIRS, wrapper).get_config_dict()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_citation(wrapper: str) -> None:
    assert build(OURS, wrapper).citation == build(THEIRS, wrapper).citation


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_public_attributes(wrapper: str) -> None:
    """What users and callbacks read from a loss, apart from the modules."""

    def public(loss: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(loss).items() if not name.startswith("_")}

    ours = public(build(OURS, wrapper, **settings_of(wrapper)))
    theirs = public(build(THEIRS, wrapper, **settings_of(wrapper)))
    assert {name: ours.get(name) for name in theirs} == theirs


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_layer_weight(weighting: str) -> None:
    ours, theirs = (
        build(library, "AdaptiveLayerLoss", layer_weighting=WEIGHTINGS[weighting]) for library in (OURS, THEIRS)
    )
    assert [ours.get_layer_weight(i) for i in range(5)] == [theirs.get_layer_weight(i) for i in range(5)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_modules_nest_alike(wrapper: str) -> None:
    """The trainer swaps children named `model`, the model card follows `.loss`, the optimiser takes parameters."""
    ours, theirs = build(OURS, wrapper), build(THEIRS, wrapper)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_inner_loss_of_the_2d_loss() -> None:
    model = tiny_model()
    base = base_loss(model)
    loss = OURS.Matryoshka2dLoss(model, base, DIMS, n_dims_per_step=2)
    assert type(loss.loss) is OURS.MatryoshkaLoss
    assert loss.loss.loss is base
    assert loss.model is loss.loss.model is model
    assert loss.loss.n_dims_per_step == 2


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_model_card_finds_every_loss(wrapper: str) -> None:
    names = [[type(loss).__name__ for loss in get_losses(build(library, wrapper))] for library in (OURS, THEIRS)]
    assert names[0] == names[1]
    assert names[0][-1] == "MultipleNegativesRankingLoss"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_deep_copy_is_independent(wrapper: str) -> None:
    loss = build(OURS, wrapper)
    twin = copy.deepcopy(loss)
    assert twin.model is not loss.model
    inner = twin.loss.loss if wrapper == "Matryoshka2dLoss" else twin.loss
    assert inner.model is twin.model
    # One seed for both, or their draws would differ.
    values = []
    for one in (loss, twin):
        random.seed(0)
        values.append(one(texts(one.model), None).item())
    assert values[0] == values[1]


# ---------------------------------------------------------------- wrapped models


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        setattr(self, attribute, model)
        self.attribute = attribute

    def forward(self, features: dict[str, Any], **keywords: Any) -> Any:
        return getattr(self, self.attribute)(features, **keywords)


class DeadEnd(nn.Module):
    """Not a wrapper anyone can look into."""


def override_model(loss: nn.Module, model: nn.Module) -> nn.Module:
    # The trainer's method uses the trainer only to call itself.
    return SentenceTransformerTrainer.override_model_in_loss(object.__new__(SentenceTransformerTrainer), loss, model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_trainer_swaps_the_model_in_every_loss(wrapper: str) -> None:
    loss = build(OURS, wrapper)
    wrapped = Wrapper(loss.model, "module")
    assert override_model(loss, wrapped) is loss
    inner = loss.loss
    while True:
        assert inner.model is wrapped
        if not hasattr(inner, "loss"):
            break
        inner = inner.loss
    assert loss.model is wrapped
    assert torch.isfinite(loss(texts(wrapped.module), None))


@pytest.mark.parametrize("wrapper", WITH_LAYERS)
@pytest.mark.parametrize("attributes", [(), ("module",), ("_orig_mod", "module")], ids=["bare", "one", "two"])
def test_unknown_wrapper(wrapper: str, attributes: tuple[str, ...]) -> None:
    """The message names the outermost type and the one that could not be looked into."""

    def call(library: Any) -> Tensor:
        loss = build(library, wrapper)
        features = texts(loss.model)
        wrapped: nn.Module = DeadEnd()
        for attribute in attributes:
            wrapped = Wrapper(wrapped, attribute)
        return override_model(loss, wrapped)(features, None)

    ours = raised(lambda: call(OURS))
    assert ours == raised(lambda: call(THEIRS))
    assert ours[0] is TypeError
    assert "DeadEnd" in ours[1]


# ---------------------------------------------------------------- what a step leaves behind


def snapshot(model: SentenceTransformer) -> dict[str, Any]:
    """All that a loss may be tempted to patch for the time of a step."""
    # Not deeper: transformers installs hooks of its own, for good, when it first collects hidden states.
    outer = (model, *model)
    return {
        "model.forward": model.forward,
        "module.forward": [module.forward for module in model],
        "module.hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in outer],
        "output_hidden_states": model[0].auto_model.config.output_hidden_states,
        "training": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("output_hidden_states", [False, True])
@pytest.mark.parametrize("base", [base_loss, lambda model: st_losses.CoSENTLoss(model)], ids=["fused", "fallback"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_step_leaves_the_model_as_it_was(
    wrapper: str, base: Callable[[SentenceTransformer], nn.Module], output_hidden_states: bool
) -> None:
    model = tiny_model()
    model[0].auto_model.config.output_hidden_states = output_hidden_states
    loss = build(OURS, wrapper, model, base=base)
    before = snapshot(model)
    loss(texts(model), torch.linspace(0.0, 1.0, 4)).backward()
    assert snapshot(model) == before


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_step_leaves_the_inputs_as_they_were(wrapper: str) -> None:
    """Entries may be added to the feature dicts, as sentence-transformers does; none may change."""
    model = tiny_model()
    features = texts(model)
    entries = [dict(column) for column in features]
    values = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in column.items()}
        for column in features
    ]
    build(OURS, wrapper, model)(features, None).backward()
    for column, entry, value in zip(features, entries, values, strict=True):
        assert all(column[name] is entry[name] for name in entry)
        assert all(torch.equal(column[name], value[name]) for name in value if isinstance(value[name], Tensor))


@pytest.mark.parametrize("base", [base_loss, lambda model: st_losses.CoSENTLoss(model)], ids=["fused", "fallback"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_exception_leaves_everything_as_it_was(wrapper: str, base: Callable[[SentenceTransformer], nn.Module]) -> None:
    """The second column fails inside the transformer, with the first already embedded."""
    model = tiny_model()
    loss = build(OURS, wrapper, model, base=base)
    before = snapshot(model)
    features = texts(model)
    good_ids = features[1]["input_ids"]
    features[1]["input_ids"] = good_ids + VOCAB_SIZE
    entries = [dict(column) for column in features]
    with pytest.raises(IndexError):
        loss(features, torch.linspace(0.0, 1.0, 4))
    assert snapshot(model) == before
    for column, entry in zip(features, entries, strict=True):
        assert all(column[name] is entry[name] for name in entry)

    # The same dicts, mended, give what fresh ones give.
    features[1]["input_ids"] = good_ids
    random.seed(0)
    mended = loss(features, torch.linspace(0.0, 1.0, 4))
    random.seed(0)
    fresh = loss(texts(model), torch.linspace(0.0, 1.0, 4))
    assert torch.equal(mended, fresh)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_features_may_be_any_iterable(wrapper: str) -> None:
    loss = build(OURS, wrapper, **({"n_dims_per_step": -1} if wrapper in WITH_DIMS else {}))
    columns = texts(loss.model)
    random.seed(0)
    expected = loss(columns, None)
    random.seed(0)
    assert torch.equal(loss(tuple(texts(loss.model)), None), expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_column_is_an_error(wrapper: str) -> None:
    def call(library: Any) -> Tensor:
        loss = build(library, wrapper)
        return loss(texts(loss.model, columns=1), None)

    assert raised(lambda: call(OURS)) == raised(lambda: call(THEIRS))


def test_matryoshka_loss_of_another_models_loss() -> None:
    """Sentence-transformers cuts what its own model embeds: a base loss of another model is not cut at all."""
    values = []
    for library in (OURS, THEIRS):
        model, other = tiny_model(seed=0), tiny_model(seed=1)
        loss = library.MatryoshkaLoss(model, base_loss(other), DIMS, [0.25, 0.5])
        values.append(loss(texts(model), None).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


# ---------------------------------------------------------------- fuse


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fuse_keeps_configuration_and_objects(weighting: str, wrapper: str) -> None:
    theirs = build(THEIRS, wrapper, **settings_of(wrapper, weighting))
    fused = m2d_ext.fuse(theirs)
    assert type(fused) is getattr(OURS, wrapper)
    assert fused.get_config_dict() == theirs.get_config_dict()
    assert fused.model is theirs.model
    if wrapper == "Matryoshka2dLoss":
        assert type(fused.loss) is OURS.MatryoshkaLoss
        assert fused.loss.loss is theirs.loss.loss
        assert fused.loss.model is theirs.loss.model
    else:
        assert fused.loss is theirs.loss


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fused_twin_gives_the_same_step(wrapper: str) -> None:
    arguments = settings_of(wrapper)
    if wrapper in WITH_DIMS:
        # Where a sample of dims repeats the largest of them, sentence-transformers' 2D loss raises.
        arguments |= {"matryoshka_dims": [8, HIDDEN, 16, 4]}

    def theirs(model: SentenceTransformer) -> nn.Module:
        return build(THEIRS, wrapper, model, **arguments)

    comparison = compare(tiny_model(), lambda model: m2d_ext.fuse(theirs(model)), theirs, texts, seed=3)
    assert not comparison.fallbacks


def test_fuse_takes_settings_changed_since_construction() -> None:
    theirs = build(THEIRS, "AdaptiveLayerLoss")
    theirs.kl_div_weight = 7.0
    assert m2d_ext.fuse(theirs).kl_div_weight == 7.0


def test_fuse_with_gradient_caching_cuts_once() -> None:
    """Their constructor has already put its decorator on the cached loss: another would count every dim twice."""

    def theirs(model: SentenceTransformer) -> nn.Module:
        return build(THEIRS, "MatryoshkaLoss", model, base=cached_loss)

    compare(tiny_model(), lambda model: m2d_ext.fuse(theirs(model)), theirs, texts)


def test_fuse_is_silent_about_what_was_said_before(caplog: pytest.LogCaptureFixture) -> None:
    theirs = build(THEIRS, "AdaptiveLayerLoss")
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        m2d_ext.fuse(theirs)
    assert not caplog.records


@pytest.mark.parametrize(
    "other",
    [base_loss, lambda model: st_losses.CoSENTLoss(model), lambda model: model],
    ids=["MultipleNegativesRankingLoss", "CoSENTLoss", "SentenceTransformer"],
)
def test_fuse_refuses_others(other: Callable[[SentenceTransformer], nn.Module], request: Any) -> None:
    with pytest.raises(TypeError, match=request.node.callspec.id):
        m2d_ext.fuse(other(tiny_model()))


def test_fuse_refuses_a_users_subclass() -> None:
    """Its overrides would be lost without a word."""

    class UsersWrapper(st_losses.AdaptiveLayerLoss):
        pass

    model = tiny_model()
    with pytest.raises(TypeError, match="UsersWrapper"):
        m2d_ext.fuse(UsersWrapper(model, base_loss(model)))


# ---------------------------------------------------------------- training


def train(library: Any, wrapper: str, folder: Path) -> tuple[SentenceTransformer, float]:
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    columns = {
        name: [sentence(2 + row % 5, generator) for row in range(8)] for name in ("anchor", "positive", "negative")
    }
    model = tiny_model()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=build(library, wrapper, model),
    )
    return model, trainer.train().training_loss


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_trainer_trains_alike(wrapper: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    before = tiny_model().state_dict()
    with recorded_fallbacks() as fallbacks:
        our_model, our_loss = train(OURS, wrapper, tmp_path / "ours")
    their_model, their_loss = train(THEIRS, wrapper, tmp_path / "theirs")
    assert not fallbacks
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    moved, apart = 0.0, 0.0
    for name, ours in our_model.state_dict().items():
        moved += (ours - before[name]).norm().item()
        apart += (ours - their_model.state_dict()[name]).norm().item()
    assert moved > 0.0
    # Adam divides by the gradient's own size, which turns the rounding of a zero gradient into a step.
    assert apart < 0.05 * moved


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_model_card_after_training(wrapper: str, tmp_path: Path) -> None:
    model, _ = train(OURS, wrapper, tmp_path)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert wrapper in card
    assert "MultipleNegativesRankingLoss" in card
