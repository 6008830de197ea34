"""What the losses need to know of a SentenceTransformer: whether the fused path is the same."""

from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, WordWeights
from torch import nn

from . import adapters, fallback
from .cached import uncached
from .embed import Features, is_packed, pooling_of

# What only the reference loop reads from a batch.
UNFUSED_FEATURES = ("token_weights_sum", "cls_token_embeddings")


# What may follow the pooling: it works on each row by itself.
ROW_MODULES = (Dense, LayerNorm, Normalize)


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
        or _why_not_loss(base_loss, model, labels, cuts_dims or is_normalized(model))
        or _why_not_features(model, features)
    )


def _why_not_loss(loss: Any, model: Any, labels: Any, normalized: bool) -> str | None:
    name = type(loss).__name__
    caching, loss = loss, uncached(loss)
    teaches = fallback.are_embeddings(labels, model)
    reason = adapters.refusal(loss, normalized, teaches)
    if reason is not None:
        return f"{name} {reason}"
    if any(find_model(each.model) is not model for each in (caching, loss)):
        return f"{name} has another model"
    return f"{name} has hooks or a replaced forward" if _is_hooked(caching) or _is_hooked(loss) else None


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
    after = modules[modules.index(pooling_of(model)) + 1 :]
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
    if model._forward_hooks or any(map(_is_hooked, modules)):
        return "the model's modules have hooks or a replaced forward"
    return None


def _num_word_weights(model: Any) -> int:
    return sum(type(module) is WordWeights for module in model.children())


def _why_not_features(model: Any, features: Sequence[Features]) -> str | None:
    packed = [is_packed(column) for column in features]
    if any(packed) and not all(packed):
        return "the batch has packed and padded columns"
    if any(packed) and _num_word_weights(model) > 0:
        return "the batch has packed columns, whose tokens WordWeights does not weigh"
    present = [key for key in UNFUSED_FEATURES if any(key in column for column in features)]
    return f"the batch has {present[0]}" if present else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward.

    That forward itself, bound to the module, is what sentence-transformers' own losses leave behind.
    """
    own = vars(module).get("forward")
    replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
    return bool(module._forward_hooks or module._forward_pre_hooks) or replaced


def is_normalized(model: Any) -> bool:
    """Whether the embeddings are normalised."""
    return isinstance(list(model.children())[-1], Normalize)
