"""Pooling as one coefficient table: ``P[n] = sum_t a[n, t] H[n, t]``.

Every linear mode of sentence-transformers' ``Pooling`` is another ``a``; a token whose coefficient is 0 (padding) is
never read. "max" is the one mode that is not linear: there ``a`` only says which tokens count. A text with no token
left pools to 0.
"""

import torch
from torch import Tensor

MODES = ("mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean", "max")
MIN_WEIGHT_SUM = 1e-9  # the clamp of sentence-transformers' denominators


def padded_coefficients(
    mask: Tensor, pooling: str, dtype: torch.dtype, *, prompt_length: int = 0, weights_sum: Tensor | None = None
) -> Tensor:
    """``a`` for texts padded to one width, on the left or on the right.

    Args:
        mask: (N, T), 0 for padding; other values weigh the tokens of the means.
        pooling: one of ``MODES``.
        dtype: of the result.
        prompt_length: tokens to leave out at the start of each text (``include_prompt=False``).
        weights_sum: (N,), the denominator of "mean", "mean_sqrt_len_tokens" and "weightedmean" in place of the sum of
            the token weights (``token_weights_sum``).

    Returns:
        (N, T).
    """
    if mask.shape[1] == 0:
        return mask.to(dtype)
    kept = mask
    if prompt_length > 0:
        kept = mask * (_positions(mask) >= (_first_token(mask) + prompt_length)[:, None])
    if pooling == "cls":
        # Where the prompt is all there is, its own first token stands for the text.
        emptied = ~kept.bool().any(1, keepdim=True)
        return _one_hot(_first_token(kept), mask, dtype) * (kept + emptied * mask).bool()
    if pooling == "lasttoken":
        return _one_hot(mask.shape[1] - 1 - _first_token(kept.flip(1)), mask, dtype) * kept
    if pooling == "max":
        return kept.bool().to(dtype)
    weights = kept.to(dtype)
    if pooling == "weightedmean":
        weights = weights * (_positions(mask) + 1 - _first_token(mask)[:, None])
    total = weights.sum(1, keepdim=True) if weights_sum is None else weights_sum.to(dtype)[:, None]
    total = total.clamp(min=MIN_WEIGHT_SUM)
    return weights / (total.sqrt() if pooling == "mean_sqrt_len_tokens" else total)


def packed_coefficients(
    cu_seqlens: Tensor, num_tokens: int, pooling: str, dtype: torch.dtype, *, prompt_lengths: Tensor | None = None
) -> Tensor:
    """``a`` (num_tokens,) of the given dtype for texts packed one after another.

    Args:
        cu_seqlens: (N + 1,), where each text starts, and the last one ends.
        num_tokens: in all.
        pooling: one of ``MODES``.
        dtype: of the result.
        prompt_lengths: (N,), tokens to leave out at the start of each text (``include_prompt=False``).
    """
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    # On CUDA the offsets are not looked at: tokens after the last of them count as the last text's.
    text = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=len(cu_seqlens) - 2)
    position = token - cu_seqlens[text]
    lengths = cu_seqlens.diff()
    prompts = torch.zeros_like(lengths) if prompt_lengths is None else prompt_lengths.to(lengths)
    if pooling == "cls":
        # Where the prompt is all there is, its own first token stands for the text.
        return (position == prompts.where(lengths > prompts, 0)[text]).to(dtype)
    if pooling == "lasttoken":
        return (position == lengths[text] - 1).to(dtype)
    kept = position >= prompts[text]
    if pooling == "max":
        return kept.to(dtype)
    if pooling == "weightedmean":  # the sum of prompt + 1, ..., length
        total = (lengths * (lengths + 1) - prompts * (prompts + 1)) // 2
        return kept * (position + 1).to(dtype) / total.clamp(min=1).to(dtype)[text]
    total = (lengths - prompts).clamp(min=1).to(dtype)
    return kept / (total.sqrt() if pooling == "mean_sqrt_len_tokens" else total)[text]


def _positions(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1], device=mask.device)


def _first_token(mask: Tensor) -> Tensor:
    """Index (N,) of each row's first token; 0 for a row without one."""
    return mask.bool().to(torch.int32).argmax(1)


def _one_hot(index: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype).scatter_(1, index[:, None], 1)
