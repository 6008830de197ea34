"""What the encoders of different architectures have in common, found by looking at them, not by their names."""

from typing import Any

import torch
from torch import Tensor, nn


def final_norm(transformer: Any) -> nn.Module | None:
    """The norm between an encoder's last layer and its output.

    Pre-norm encoders (ModernBERT, Qwen3, Gemma, T5) have one, and their earlier hidden states are those before it;
    the states of post-norm ones (BERT) are as normalised as the last.

    Args:
        transformer: a sentence-transformers ``Transformer``. It embeds one word, without a trace.

    Returns:
        The module; None if there is none.
    """
    encoder = transformer.auto_model
    outside = [
        module for name, module in encoder.named_modules() if _is_norm(module) and not _in_layers(encoder, name)
    ]
    returned: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, _, output: returned.append((module, output))) for module in outside
    ]
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        encoder.eval()  # dropout after the norm would hide it
        with torch.no_grad():
            features = transformer.preprocess(["word"])
            features = {k: v.to(encoder.device) if isinstance(v, Tensor) else v for k, v in features.items()}
            final = transformer(features)["token_embeddings"]
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    found = [module for module, output in returned if isinstance(output, Tensor) and _is_same(output, final)]
    return found[-1] if found else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _in_layers(encoder: nn.Module, name: str) -> bool:
    """Whether the module of that name belongs to one of a list of layers."""
    parts = name.split(".")
    return any(isinstance(encoder.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts)))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
