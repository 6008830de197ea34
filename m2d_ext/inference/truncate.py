"""Cut a model to its first layers and dimensions, into a plain SentenceTransformer."""

import copy
import itertools
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import RepoCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn

logger = logging.getLogger("m2d_ext")

CUT_KEY = "m2d_ext_cut"  # of the encoder's configuration
PER_LAYER = ("layer", "mlp_layer", "attention_window")  # what configurations list per layer starts with one of these


def truncate_model(
    model: SentenceTransformer, num_layers: int | None = None, dim: int | None = None
) -> SentenceTransformer:
    """The model with its first layers and dimensions alone: what was trained as one cell of the grid.

    The encoder keeps its embeddings, its first layers and its final norm, so that the rows are those of hidden state
    ``num_layers``, normalised as the architecture does. Of a model that normalises, the cut rows are normalised anew.
    Loads and runs without m2d_ext once saved.

    Args:
        model: Transformer, Pooling and what follows. It is left as it is, and shares no parameters with the result.
        num_layers: how many layers to keep, 0 for the embedding layer alone; None: all.
        dim: how many dimensions to keep; None: all that the model returns, which are fewer than its rows have where it
            has a ``truncate_dim``.

    Returns:
        A new ``SentenceTransformer`` on the same device. Its encoder's ``config.m2d_ext_cut`` and its model card say
        what was cut. The card is a new one, with the licence, languages, data sets and tags that the model's has.

    Raises:
        TypeError: not a SentenceTransformer, or numbers that are not ints.
        ValueError: more layers or dims than there are; fewer layers than the architecture can have, or modules after
            it that need all; an encoder whose layers are not one list as long as its configuration says; one that is
            compiled, or has adapters.
    """
    _check_model(model)
    cut = _truncated(model, num_layers, dim, {})
    _describe(cut, model)
    return cut


def layer_view(model: SentenceTransformer, num_layers: int) -> SentenceTransformer:
    """``truncate_model`` without the memory: the model cut to its first layers, with its own parameters.

    Raises:
        TypeError, ValueError: as ``truncate_model``.
    """
    _check_model(model)
    shared = (*model.parameters(), *model.buffers(), model.tokenizer)
    return _truncated(model, num_layers, None, {id(each): each for each in shared})


def tried_view(model: SentenceTransformer, num_layers: int) -> SentenceTransformer | None:
    """``layer_view``; None of what cannot be tried: with adapters, compiled, or of parts that Python cannot copy.

    Raises:
        CannotBeCutError: it was tried in vain.
    """
    try:
        return layer_view(model, num_layers)
    except (CannotBeCutError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        logger.debug("Not cut to %d layers: %s", num_layers, error)
        return None


class CannotBeCutError(ValueError):
    """What is left of a model cannot be loaded again, or not be run."""


def _truncated(
    model: SentenceTransformer, num_layers: int | None, dim: int | None, shared: dict[int, Any]
) -> SentenceTransformer:
    """The cut model, with what is ``shared``, by its id."""
    name, layers = find_layers(model[0].auto_model)
    num_layers = _check_count("num_layers", num_layers, len(layers), least=0)
    width = full_width(model)
    dim = _check_count("dim", dim, min(width, model.truncate_dim or width), least=1)
    # What is cut off is not even copied: deepcopy takes these layers for copied already, to None.
    dropped: dict[int, Any] = {id(layer): None for layer in list(layers)[num_layers:]}
    cut: SentenceTransformer = copy.deepcopy(model, shared | dropped)
    _cut_layers(cut[0].auto_model, name, num_layers, len(layers))
    if dim < width:
        _cut_dims(cut, dim, width)
    cut[0].auto_model.config.update(
        {CUT_KEY: {"num_layers": num_layers, "of_layers": len(layers), "dim": dim, "of_dims": width}}
    )
    for what, check in (
        ("loaded again", _check_loads),
        ("run", partial(_check_encodes, dim=dim if dim < width else None)),
    ):
        try:
            check(cut)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            name, reason = type(cut[0].auto_model).__name__, (str(error).splitlines() or [""])[0]
            raise CannotBeCutError(
                f"{name} cannot be cut to {num_layers} layers: it could not be {what}: {reason}"
            ) from error
    return cut


def full_width(model: SentenceTransformer) -> int:
    """How many dimensions a model's rows have before its ``truncate_dim`` cuts them.

    Raises:
        ValueError: it does not say.
    """
    with model.truncate_embeddings(None):
        width = model.get_embedding_dimension()
    if width is None:
        raise ValueError("model must say its embedding dimension, but get_embedding_dimension() is None")
    return int(width)


def count_layers(encoder: Any) -> int:
    """How many layers an encoder has, as its configuration counts them."""
    return int(_text_config(encoder.config).num_hidden_layers)


def fewest_layers(model: SentenceTransformer) -> int:
    """How few layers a model can be cut to: 0, or 1 where its architecture cannot be without."""
    try:
        if tried_view(model, 0) is not None:
            return 0
    except CannotBeCutError:
        return 1
    encoder = model[0].auto_model
    config = copy.deepcopy(encoder.config)
    _cut_config(_text_config(config), 0, count_layers(encoder))
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # what they raise is their own
        return 1
    return 0


def find_layers(encoder: Any) -> tuple[str, nn.ModuleList]:
    """The list of an encoder's layers, by name, found as its configuration counts them.

    Raises:
        ValueError: there is none, or more than one.
    """
    count = count_layers(encoder)
    found = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise ValueError(
            f"model must have one list of {count} layers, as its configuration counts them; "
            f"{type(encoder).__name__} has {outermost or 'none'}"
        )
    return outermost[0], found[outermost[0]]


def _check_model(model: Any) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError("model must not be compiled: cut it first, and compile what comes out")
    if not isinstance(model, SentenceTransformer):
        raise TypeError(f"model must be a SentenceTransformer, got {type(model).__name__}")
    if not isinstance(model[0], Transformer):
        raise ValueError(f"model must start with a Transformer, got {type(model[0]).__name__}")
    encoder = model[0].auto_model
    if hasattr(encoder, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model must not be compiled: cut it first, and compile what comes out")
    if hasattr(encoder, "merge_and_unload"):
        raise ValueError("model must have no adapters: model[0].model = model[0].model.merge_and_unload() merges them")
    if hasattr(encoder, "peft_config"):
        raise ValueError(
            "model must have no adapters: load it without them, and then model[0].model = "
            "peft.PeftModel.from_pretrained(model[0].model, ADAPTERS).merge_and_unload() merges those of a folder"
        )


def _check_count(name: str, count: int | None, most: int, least: int) -> int:
    if count is None:
        return most
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int or None, got {type(count).__name__}")
    if not least <= count <= most:
        raise ValueError(f"{name} must be from {least} to {most} for this model, got {count}")
    return count


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _cut_layers(encoder: Any, name: str, num_layers: int, of_layers: int) -> None:
    owner, _, attribute = name.rpartition(".")
    layers = encoder.get_submodule(name)
    setattr(encoder.get_submodule(owner), attribute, nn.ModuleList(list(layers)[:num_layers]))
    seen: set[int] = set()
    for module in encoder.modules():  # a submodule may hold a configuration of its own
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            _cut_config(_text_config(config), num_layers, of_layers)


def _cut_config(config: Any, num_layers: int, of_layers: int) -> None:
    """The number of layers, and all that the configuration lists per layer."""
    if getattr(config, "num_hidden_layers", None) != of_layers:
        return
    lists = {
        name: value[:num_layers]
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == of_layers and name.startswith(PER_LAYER)
    }
    config.num_hidden_layers = num_layers
    for name, value in lists.items():
        setattr(config, name, value)


def _check_loads(model: SentenceTransformer) -> None:
    """An encoder of the cut configuration has the parameters that are left.

    Some configurations cannot be without layers, or want lists of another length. What they raise is their own.
    """
    encoder: Any = model[0].auto_model
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in type(encoder)(config).named_parameters()}
    for name, weight in encoder.named_parameters():
        if weight.is_floating_point() and weight.shape != expected.get(name, weight.shape):
            shapes = f"{tuple(expected[name])}, not {tuple(weight.shape)}"
            raise ValueError(f"its configuration asks for a {name} of shape {shapes}")


def _check_encodes(model: SentenceTransformer, dim: int | None) -> None:
    """A word has a row, and of that width where one is given."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        rows: Any = model.encode(["word"], show_progress_bar=False)
    finally:
        for module, training in modes:
            module.training = training
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(f"its rows have {rows.shape[1]} dimensions, not {dim}")


def _cut_dims(model: SentenceTransformer, dim: int, width: int) -> None:
    modules = list(model.children())
    if not isinstance(modules[-1], Normalize):
        # encode() cuts to it, and save_pretrained() keeps it.
        model.truncate_dim = dim
        return
    model.truncate_dim = None
    first = Dense(width, dim, bias=False, activation_function=nn.Identity())
    parameter = next(model.parameters())
    with torch.no_grad():
        first.linear.weight.copy_(torch.eye(dim, width))
    first.to(device=parameter.device, dtype=parameter.dtype).train(model.training)
    # In between: rows that are cut after they were normalised are shorter than 1.
    normalize = modules[-1]
    names = list(dict(model.named_children()))
    setattr(model, names[-1], first)
    model.add_module(next(name for name in map(str, itertools.count(len(names))) if name not in names), normalize)


def _describe(cut: SentenceTransformer, model: SentenceTransformer) -> None:
    """In the model card. The text that the model was loaded with is of the whole one: the cut one gets a new card."""
    data = cut.model_card_data
    card = _loaded_card(model)
    if card is not None:
        _take_metadata(data, card.data.to_dict())
    cut._model_card_text = None
    data.eval_results_dict = {}  # of the whole model, too
    facts = getattr(cut[0].auto_model.config, CUT_KEY)
    what = "the first {num_layers} of {of_layers} layers and {dim} of {of_dims} dimensions".format(**facts)
    data.model_name = f"{_name_of(model, card)}, cut to {what}"
    tags = [tag for tag in data.tags or [] if tag not in ("matryoshka", "m2d_ext")]
    data.tags = [*tags, "matryoshka", "m2d_ext"]
    logger.info("Kept %s.", what)


def _loaded_card(model: SentenceTransformer) -> RepoCard | None:
    """The text that sentence-transformers would write again; None for a trained model, whose card it makes anew."""
    text = model._model_card_text
    if not text or "generated_from_trainer" in (model.model_card_data.tags or []):
        return None
    try:
        return RepoCard(text)
    except Exception as error:  # of YAML, or of what it says: no reason not to cut
        logger.warning("The head of the model's README.md cannot be read, and is left out: %s", error)
        return None


def _take_metadata(data: Any, known: dict[str, Any]) -> None:
    """What does not change by a cut, where the data of the new card do not say it themselves."""
    for name in ("language", "license", "datasets"):
        if known.get(name) and not getattr(data, name):
            setattr(data, name, known[name])
    data.tags = list(dict.fromkeys([*(data.tags or []), *(known.get("tags") or [])]))


def _name_of(model: SentenceTransformer, card: RepoCard | None) -> str:
    """As its card's title calls it, or by what it was loaded from."""
    data = model.model_card_data
    first = card.text.lstrip().partition("\n")[0] if card is not None else ""
    title = first.removeprefix("# ").strip() if first.startswith("# ") else ""
    origin = str(getattr(model[0].auto_model.config, "_name_or_path", "") or "")
    if Path(origin).is_absolute() or Path(origin).exists():
        origin = Path(origin).name  # a folder, and not where that is on this machine
    nameless = type(model).__name__
    names = (title, data.model_name, data.base_model, origin)
    return str(next((name for name in names if name and name != nameless), nameless))
