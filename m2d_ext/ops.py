"""The compiled operators, typed, with their fakes: the only file that names ``torch.ops.m2d_ext``.

The operators are private: called on a tensor that requires grad they record no gradient. Shapes are those of
:mod:`m2d_ext.reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _extension
from .grid import Grid
from .reference import accumulate_dtype

# The device types that the compiled extension has kernels for.
KERNEL_DEVICES = frozenset(
    key.lower()
    for key in ("CPU", "CUDA")
    if _extension.available() and torch._C._dispatch_has_kernel_for_dispatch_key("m2d_ext::loss", key)
)


def pool(hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """Weighted token sums (L, N, D) in the accumulation dtype; tokens with coefficient 0 are not read."""
    return torch.ops.m2d_ext.pool(hidden_states, coefficients, cu_seqlens)


def pool_backward(
    pooled_grad: Tensor,
    grad_output: Tensor | None,
    layers: Sequence[int],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Hidden-state gradients ``g a[n, t] dP[l, n, :]`` of the given layers, layer-major, of the given dtype."""
    return torch.ops.m2d_ext.pool_backward(pooled_grad, grad_output, layers, coefficients, cu_seqlens, dtype)


def pool_max(
    hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maxima (L, N, D) over the tokens with coefficient != 0, and the first token (int32) that has each; 0 and -1
    for a text without tokens.
    """
    return torch.ops.m2d_ext.pool_max(hidden_states, coefficients, cu_seqlens)


def pool_max_backward(
    pooled_grad: Tensor,
    indices: Tensor,
    layers: Sequence[int],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Hidden-state gradients of the given layers: ``dP`` at the indices, 0 elsewhere."""
    return torch.ops.m2d_ext.pool_max_backward(pooled_grad, indices, layers, coefficients, cu_seqlens, dtype)


def loss(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    grid: Grid,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), cells (L, K), KLs (L,), and dP (L, N, D) if ``needs_grad``, else an empty tensor."""
    return torch.ops.m2d_ext.loss(
        hidden_states,
        coefficients,
        cu_seqlens,
        *grid,
        needs_grad,
    )


def pooled_loss(
    pooled: Tensor,
    candidates: Tensor | None,
    target_offset: int,
    grid: Grid,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`loss`, from pooled rows; the fifth result is the gathered candidates' gradient, or empty."""
    return torch.ops.m2d_ext.pooled_loss(
        pooled,
        candidates,
        target_offset,
        *grid,
        needs_grad,
    )


def _empty_loss(rows: Tensor, num_layers: int, num_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(()), rows.new_empty(num_layers, num_dims), rows.new_empty(num_layers)


def _num_texts(coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> int:
    return sum(len(a) for a in coefficients) if cu_seqlens is None else len(cu_seqlens) - 1


def _fake_pool(hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    first = hidden_states[0]
    shape = (len(hidden_states) // len(coefficients), _num_texts(coefficients, cu_seqlens), first.shape[-1])
    return first.new_empty(shape, dtype=accumulate_dtype(first.dtype))


def _fake_pool_backward(
    pooled_grad: Tensor,
    grad_output: Tensor | None,
    layers: Sequence[int],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    dim = pooled_grad.shape[-1]
    return [pooled_grad.new_empty((*a.shape, dim), dtype=dtype) for _ in layers for a in coefficients]


def _fake_pool_max(
    hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    pooled = _fake_pool(hidden_states, coefficients, cu_seqlens)
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


def _fake_loss(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    weights: Tensor,
    kl_weights: Tensor,
    dims: Sequence[int],
    num_columns: int,
    scale: float,
    kl_temperature: float,
    normalize: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pooled = _fake_pool(hidden_states, coefficients, cu_seqlens)
    grad = torch.empty_like(pooled) if needs_grad else pooled.new_empty(0, 0, 0)
    return (*_empty_loss(pooled, len(pooled), len(dims)), grad)


def _fake_pooled_loss(
    pooled: Tensor,
    candidates: Tensor | None,
    target_offset: int,
    weights: Tensor,
    kl_weights: Tensor,
    dims: Sequence[int],
    num_columns: int,
    scale: float,
    kl_temperature: float,
    normalize: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = pooled.new_empty(pooled.shape if needs_grad else (0, 0, 0))
    candidate_grad = pooled.new_empty(candidates.shape if needs_grad and candidates is not None else (0, 0, 0))
    return (*_empty_loss(pooled, len(pooled), len(dims)), grad, candidate_grad)


if _extension.available():
    torch.library.register_fake("m2d_ext::pool", _fake_pool)
    torch.library.register_fake("m2d_ext::pool_backward", _fake_pool_backward)
    torch.library.register_fake("m2d_ext::pool_max", _fake_pool_max)
    torch.library.register_fake("m2d_ext::pool_max_backward", _fake_pool_backward)
    torch.library.register_fake("m2d_ext::loss", _fake_loss)
    torch.library.register_fake("m2d_ext::pooled_loss", _fake_pooled_loss)
