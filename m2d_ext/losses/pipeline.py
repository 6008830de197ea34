"""What the losses need to know of a SentenceTransformer: whether the fused path is the same."""

import inspect
from collections.abc import Sequence
from types import FunctionType, NoneType
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import _get_batch_size
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, WordWeights
from torch import nn

from . import adapters, fallback
from .cached import uncached
from .embed import Features, after_pooling, is_packed, model_type, pooling_of
from .recipe import is_trained

# What only the reference loop reads from a batch.
UNFUSED_FEATURES = ("token_weights_sum", "cls_token_embeddings")

# The reason where a column is longer or shorter than the others: rows are cut into columns of one length.
RAGGED = "the columns have different numbers of texts"

# Types of encoders some layers of which have fewer tokens than others: one mask does not fit them all.
SHORTENING = frozenset({"canine", "funnel"})

# What may follow the pooling: it works on each row by itself.
ROW_MODULES = (Dense, LayerNorm, Normalize)

# What those may be made of. Not what looks at other rows (BatchNorm) or changes with every call (a parametrization).
ROW_PARTS = (
    *(nn.Linear, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.Sequential),
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold),
)


def find_model(model: Any) -> Any:
    """The model inside DistributedDataParallel (``.module``) and torch.compile (``._orig_mod``), or what stops it."""
    while not isinstance(model, BaseModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            break
        model = inner
    return model


def is_compiled(model: Any) -> bool:
    """Whether torch.compile was applied to the model or to what wraps it."""
    while model is not None:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            return True
        model = getattr(model, "module", None)
    return False


def check_layered(transformer: Any) -> None:
    """ValueError where a model does not pool a layer's hidden states, so that every layer would be the last."""
    output = getattr(transformer, "module_output_name", "token_embeddings")
    if output != "token_embeddings":
        raise ValueError(
            "model must have a Transformer that returns token embeddings, which a Pooling pools, got one that "
            f"returns '{output}': its layers cannot be told apart; MatryoshkaLoss trains its dims"
        )


def why_not_fused(
    model: Any, base_loss: Any, features: Sequence[Features], labels: Any, cuts_dims: bool
) -> str | None:
    """The reason why this loss, model or batch needs the reference loop; None if the fused path is the same.

    Args:
        model: the SentenceTransformer.
        base_loss: the loss of each cell.
        features: the batch.
        labels: the batch's.
        cuts_dims: whether a MatryoshkaLoss cuts and normalises the embeddings before the base loss sees them.
    """
    return (
        why_not_model(model)
        or _why_not_training(model)
        or _why_not_loss(base_loss, model, labels, cuts_dims)
        or _why_not_features(model, features)
    )


def why_not_settings(loss: nn.Module) -> str | None:
    """The reason why the settings of a loss, a base loss or one of ours, need the reference loop: one is trained."""
    for name, value in (*vars(loss).items(), *loss._parameters.items()):
        if any(map(is_trained, value)) if type(value) is tuple else is_trained(value):
            return f"{type(loss).__name__} has a {name} that is trained"
    return None


def _why_not_loss(loss: Any, model: Any, labels: Any, cuts_dims: bool) -> str | None:
    name = type(loss).__name__
    caching, loss = loss, uncached(loss)
    # Where nothing cuts the embeddings they are wider than truncate_dim says.
    teaches = (cuts_dims or model.truncate_dim is None) and fallback.are_embeddings(labels, model)
    reason = adapters.refusal(loss, cuts_dims or is_normalized(model), teaches)
    if reason is not None:
        return f"{name} {reason}"
    if _is_guided_by(loss, model):
        return f"{name} has the model, or a module of it, as its guide"
    for each in (loss,) if caching is loss else (caching, loss):
        if find_model(each.model) is not model:
            return f"{name} has another model"
        if is_hooked(each):
            return f"{name} has hooks or a replaced forward"
        replaced = _replaced_methods(each)
        if replaced:
            return f"{name} has a replaced {replaced[0]}"
        reason = why_not_settings(each)
        if reason is not None:
            return reason
    return None


def _is_guided_by(loss: Any, model: Any) -> bool:
    """Whether the loop, which replaces forwards of the model, cuts the embeddings of the loss's guide too."""
    guide = find_model(getattr(loss, "guide", None))
    if not isinstance(guide, nn.Module):
        return False
    return not {guide, *guide.children()}.isdisjoint((model, *model.children()))


def why_not_model(model: Any) -> str | None:
    """The reason why a model's rows of all layers are not those of its pooling and row modules; None if they are."""
    if getattr(type(model), "forward", None) is not SentenceTransformer.forward:
        return f"{type(model).__name__} has its own forward"
    modules = list(model.children())
    of_tokens = [type(module) for module in modules if type(module) is not WordWeights][:2]
    if of_tokens != [Transformer, Pooling] or type(modules[0]) is not Transformer:
        return "the model does not start with Transformer and Pooling"
    if getattr(modules[0], "module_output_name", "token_embeddings") != "token_embeddings":
        return "the Transformer does not return token embeddings"
    if model_type(model) in SHORTENING:
        return f"the hidden states of a {model_type(model)} encoder differ in length"
    after = after_pooling(model)
    others = [type(module).__name__ for module in after if type(module) not in ROW_MODULES]
    if others:
        return f"the model has {others[0]} after Pooling"
    if _num_word_weights(model) > 1:
        return "the model has more than one WordWeights"
    if _num_word_weights(model) == 1 and "max" in pooling_of(model).pooling_mode:
        return "the model has WordWeights before a max pooling"
    for module in after:
        for name in ("module_input_name", "module_output_name"):
            if getattr(module, name, "sentence_embedding") != "sentence_embedding":
                return f"{type(module).__name__} does not read or write the sentence embedding alone"
    if model._forward_hooks or any(map(is_hooked, modules)):
        return "the model's modules have hooks or a replaced forward"
    return None


def _why_not_training(model: Any) -> str | None:
    """The reason why a model in training would not do the same with the rows of all layers at once."""
    if _has_own(model, "forward") and not _is_prepared(model):
        return "the model has a replaced forward"
    for module in after_pooling(model):
        name = type(module).__name__
        if not isinstance(getattr(module, "activation_function", None), (nn.Module, NoneType)):
            return f"{name} has an activation_function that is no module of torch.nn"
        parts = list(module.modules())[1:]
        others = [type(part).__name__ for part in parts if type(part) not in ROW_PARTS]
        if others:
            return f"{name} has a {others[0]}, which may do more than work on each row by itself"
        if any(map(is_hooked, parts)):
            return f"the parts of {name} have hooks or a replaced forward"
    return None


def _num_word_weights(model: Any) -> int:
    return sum(type(module) is WordWeights for module in model.children())


def _why_not_features(model: Any, features: Sequence[Features]) -> str | None:
    if len(set(map(_get_batch_size, features))) > 1:
        return RAGGED
    packed = [is_packed(column) for column in features]
    if any(packed) and not all(packed):
        return "the batch has packed and padded columns"
    if any(packed) and _num_word_weights(model) > 0:
        return "the batch has packed columns, whose tokens WordWeights does not weigh"
    present = [key for key in UNFUSED_FEATURES if any(key in column for column in features)]
    return f"the batch has {present[0]}" if present else None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or _has_own(module, "forward")


def _has_own(module: nn.Module, method: str) -> bool:
    """Whether something else than its class's method of that name was put on the module itself.

    That one, bound to the module, is what sentence-transformers' own losses leave behind as its forward.
    """
    own = vars(module).get(method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), method)


def _replaced_methods(loss: nn.Module) -> list[str]:
    """The methods of its class in whose place a loss has something of its own, other than what MatryoshkaLoss puts."""
    return [
        name
        for name, value in vars(loss).items()
        if callable(value)
        and isinstance(getattr(type(loss), name, None), FunctionType)
        and _has_own(loss, name)
        and not (isinstance(value, fallback.CachedDims) and value.is_of(loss))
    ]


def _is_prepared(model: Any) -> bool:
    """Whether the model's own forward is the class's in what accelerate puts around it: mixed precision."""
    inner = inspect.unwrap(model.forward)
    return "_original_forward" in vars(model) and getattr(inner, "__func__", inner) is type(model).forward


def is_normalized(model: Any) -> bool:
    """Whether the embeddings are normalised."""
    return isinstance(list(model.children())[-1], Normalize)
