"""Pooling as one coefficient table: ``P[n] = sum_t a[n, t] H[n, t]``.

Every linear mode of sentence-transformers' ``Pooling`` is another ``a``; a token whose coefficient is 0 (padding) is
never read. A text with no token left pools to 0.
"""

import torch
from torch import Tensor

LINEAR_MODES = ("mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean")
MIN_WEIGHT_SUM = 1e-9  # the clamp of sentence-transformers' denominators


def padded_coefficients(mask: Tensor, pooling: str, dtype: torch.dtype) -> Tensor:
    """``a`` (N, T) of the given dtype for an attention mask (N, T), left- or right-padded."""
    weights = mask.to(dtype)
    if pooling == "cls":
        return weights * _one_hot(weights, _first_token(mask))
    if pooling == "lasttoken":
        return weights * _one_hot(weights, mask.shape[1] - 1 - _first_token(mask.flip(1)))
    if pooling == "weightedmean":
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=dtype)
        weights = weights * (position - _first_token(mask)[:, None])
    total = weights.sum(1, keepdim=True).clamp(min=MIN_WEIGHT_SUM)
    return weights / (total.sqrt() if pooling == "mean_sqrt_len_tokens" else total)


def packed_coefficients(cu_seqlens: Tensor, num_tokens: int, pooling: str, dtype: torch.dtype) -> Tensor:
    """``a`` (num_tokens,) of the given dtype for texts packed one after another."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    text = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    position = token - cu_seqlens[text]
    length = cu_seqlens.diff()[text]
    if pooling == "cls":
        return (position == 0).to(dtype)
    if pooling == "lasttoken":
        return (position == length - 1).to(dtype)
    if pooling == "weightedmean":
        return (position + 1).to(dtype) / (length * (length + 1) / 2).to(dtype)
    length = length.to(dtype)
    return 1 / (length.sqrt() if pooling == "mean_sqrt_len_tokens" else length)


def _first_token(mask: Tensor) -> Tensor:
    """Index (N,) of each row's first token; 0 for a row without one."""
    return mask.to(torch.int32).argmax(1)


def _one_hot(like: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(1, index[:, None], 1)
