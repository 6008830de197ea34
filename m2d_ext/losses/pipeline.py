"""What the losses need to know of a SentenceTransformer: whether the fused path fits, and its hidden states."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import cos_sim, pytorch_cos_sim
from torch import Tensor, nn

from ..arguments import Tokens
from ..pooling import padded_coefficients
from ..reference import accumulate_dtype

Features = dict[str, Any]

# What only the reference loop reads from a batch.
UNFUSED_FEATURES = ("cu_seq_lens_q", "token_weights_sum", "cls_token_embeddings")


def find_model(model: Any) -> Any:
    """The model inside DistributedDataParallel (``.module``) and torch.compile (``._orig_mod``), or what stops it."""
    while not isinstance(model, BaseModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            break
        model = inner
    return model


def why_not_fused(model: Any, base_loss: Any, features: Sequence[Features]) -> str | None:
    """The reason why this loss, model or batch needs the reference loop; None if the fused path is the same."""
    return _why_not_loss(base_loss, model) or _why_not_model(model) or _why_not_features(features)


def _why_not_loss(loss: Any, model: Any) -> str | None:
    name = type(loss).__name__
    if type(loss) is not MultipleNegativesRankingLoss:
        return f"{name} has no fused path"
    if loss.similarity_fct not in (cos_sim, pytorch_cos_sim):
        return f"{name} has another similarity_fct than cos_sim"
    if getattr(loss, "directions", ("query_to_doc",)) != ("query_to_doc",):
        return f"{name} has other directions than query_to_doc"
    if getattr(loss, "hardness_mode", None) is not None and loss.hardness_strength > 0:
        return f"{name} has a hardness_mode"
    if loss.gather_across_devices:
        return f"{name} gathers across devices"
    if find_model(loss.model) is not model:
        return f"{name} has another model"
    return None if not _is_hooked(loss) else f"{name} has hooks or a replaced forward"


def _why_not_model(model: Any) -> str | None:
    if getattr(type(model), "forward", None) is not SentenceTransformer.forward:
        return f"{type(model).__name__} has its own forward"
    modules = list(model.children())
    if [type(module) for module in modules[:2]] != [Transformer, Pooling]:
        return "the model does not start with Transformer and Pooling"
    transformer, pooling = modules[:2]
    if getattr(transformer, "module_output_name", "token_embeddings") != "token_embeddings":
        return "the Transformer does not return token embeddings"
    if not isinstance(pooling.pooling_mode, str):
        return "Pooling concatenates several modes"
    if len(modules) > 2 and [type(module) for module in modules[2:]] != [Normalize]:
        return "the model has modules other than Normalize after Pooling"
    if any(getattr(m, "module_output_name", "sentence_embedding") != "sentence_embedding" for m in modules[2:]):
        return "Normalize does not write the sentence embedding"
    if model._forward_hooks or any(map(_is_hooked, modules)):
        return "the model's modules have hooks or a replaced forward"
    return None


def _why_not_features(features: Sequence[Features]) -> str | None:
    present = [key for key in UNFUSED_FEATURES if any(key in column for column in features)]
    return f"the batch has {present[0]}" if present else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def is_normalized(model: Any) -> bool:
    """Whether a Normalize follows the pooling."""
    return any(isinstance(module, Normalize) for module in model.children())


@contextmanager
def all_hidden_states(model: Any) -> Iterator[None]:
    """Let the encoder return every layer's hidden states, and leave its configuration as it was."""
    config = model[0].auto_model.config
    before = config.output_hidden_states
    try:
        config.output_hidden_states = True
        yield
    finally:
        config.output_hidden_states = before


def final_tokens(model: nn.Module, inner: Any, features: Sequence[Features]) -> Tokens:
    """The final layer's token embeddings, column-major, as one block per model call.

    Candidate columns share one call where sentence-transformers merges them.
    """
    candidates = list(features[1:])
    merged = merge_feature_batches(candidates) if len(candidates) > 1 else None
    columns = [features[0], *(candidates if merged is None else [merged])]
    outputs = [_call(model, column) for column in columns]
    return _tokens([[output["token_embeddings"]] for output in outputs], outputs, inner[1])


def layer_tokens(model: nn.Module, inner: Any, features: Sequence[Features]) -> Tokens:
    """Every layer's hidden states, the last one as the encoder's own output; one block and call per column."""
    with all_hidden_states(inner):
        outputs = [_call(model, column) for column in features]
    states = [[*output["all_layer_embeddings"][:-1], output["token_embeddings"]] for output in outputs]
    return _tokens(states, outputs, inner[1])


def _call(model: nn.Module, features: Features) -> Features:
    # A copy: the modules write their outputs into the dict, and the caller's would keep all states alive.
    return model(dict(features))


def _tokens(states: Sequence[Sequence[Tensor]], outputs: Sequence[Features], pooling: Any) -> Tokens:
    """Blocks of states (calls × layers) and the coefficients of sentence-transformers' ``Pooling`` for them."""
    dtype = _common_dtype(state.dtype for block in states for state in block)
    tables = [
        padded_coefficients(
            _mask(output, block[-1]),
            pooling.pooling_mode,
            accumulate_dtype(dtype),
            prompt_length=0 if pooling.include_prompt else _prompt_length(output),
        )
        for output, block in zip(outputs, states, strict=True)
    ]
    layer_major = [state.to(dtype) for layer in zip(*states, strict=True) for state in layer]
    return Tokens(layer_major, tables, maximum=pooling.pooling_mode == "max")


def _mask(features: Features, states: Tensor) -> Tensor:
    mask = features.get("attention_mask")
    if mask is not None and mask.shape[-1] == states.shape[1]:
        return mask
    return torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)


def _prompt_length(features: Features) -> int:
    length = features.get("prompt_length", 0)
    return int(length[0]) if isinstance(length, Tensor) else int(length)


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Autocast leaves some layers in float32 and others in a half type."""
    common, *others = set(dtypes)
    for dtype in others:
        common = torch.promote_types(common, dtype)
    return common
