"""Cosines of all prefixes of all layers' rows, and their logsumexp: what the losses beside InfoNCE are made of.

    U_k = U_{k-1} + A[:, chunk k] B[:, chunk k]^T,    S_k = U_k / (max(|A[:, :d_k]|, eps) max(|B[:, :d_k]|, eps))

One pass over the D dimensions serves all K prefixes, and so does one back: with G = dL/dS, X_k = G_k na_k nb_k and
r_k[i] = na_k[i]^2 sum_j G_k[i, j] S_k[i, j], the rows of chunk c get (sum_{k >= c} X_k) B - (sum_{k >= c} r_k) A.

All of it in double: rows of a real batch are nearly parallel in the early layers, where cosines agree in most of their
digits and the two terms of the gradient cancel. On the CPU compiled operators do it (csrc/cpu/cosines.cpp and
logsumexp.cpp).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import first_derivative_only
from .reference import NORM_EPS


def nested_cosines(a: Tensor, b: Tensor, dims: Sequence[int]) -> Tensor:
    """Cosines of every row of ``a`` with every row of ``b``.

    Args:
        a: (L, A, D).
        b: (L, B, D).
        dims: K ascending, distinct prefix lengths.

    Returns:
        (L, K, A, B), float64. A row whose prefix is 0 has cosines of 0.
    """
    return _Cosines.apply(a, b, tuple(dims), False)


def nested_pair_cosines(a: Tensor, b: Tensor, dims: Sequence[int]) -> Tensor:
    """Cosines of row i of ``a`` with row i of ``b``, both (L, A, D); else as ``nested_cosines``: (L, K, A)."""
    return _Cosines.apply(a, b, tuple(dims), True)


def masked_logsumexp(scores: Tensor, scale: float, mask: Tensor | None = None, over_rows: bool = False) -> Tensor:
    """The logsumexp of ``scale * scores`` along the last dimension, or along the rows.

    Args:
        scores: (L, K, A, M), float64.
        scale: what they are multiplied by.
        mask: (A, M), true for scores that are left out; None: none are.
        over_rows: whether to sum over A instead of M.

    Returns:
        (L, K, A), or (L, K, M) ``over_rows``; -inf, without a gradient, where nothing is left.
    """
    if ops.computes_cosines(scores):
        return _MaskedLogSumExp.apply(scores, float(scale), mask, over_rows)
    scores = scores * scale
    scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
    return scores.logsumexp(-2 if over_rows else -1)


def _inverse_norms(rows: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """1 / max(|prefix|, eps) (L, K, R), and its square, but 0 where the norm is clamped and so a constant."""
    squared = torch.stack([rows[..., i:j].square().sum(-1) for i, j in _chunks(dims)], 1).cumsum(1)
    inverse = squared.clamp(min=NORM_EPS**2).rsqrt()
    return inverse, inverse.square().masked_fill(squared < NORM_EPS**2, 0)


def _chunks(dims: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *dims]))


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dims: tuple[int, ...], pairs: bool) -> Tensor:
        if ops.computes_cosines(a):
            cosines = ops.nested_cosines(a, b, dims, pairs)
            ctx.save_for_backward(a, b, cosines)
        else:
            cosines, *others = _cosines(a, b, dims, pairs)
            ctx.save_for_backward(a, b, cosines, *others)
        ctx.dims, ctx.pairs = dims, pairs
        return cosines

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b, cosines, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if not others:
            return *ops.nested_cosines_backward(grad, cosines, a, b, ctx.dims, ctx.pairs, needed), None, None
        scale, radial_a, radial_b = others
        along = grad * cosines
        outer = _suffix_sums(grad * scale)
        along_a, along_b = (along, along) if ctx.pairs else (along.sum(-1), along.sum(-2))
        grad_a = _rows_grad(a, b, outer, along_a * radial_a, ctx) if needed[0] else None
        transposed = outer if ctx.pairs else outer.mT
        return grad_a, _rows_grad(b, a, transposed, along_b * radial_b, ctx) if needed[1] else None, None, None


def _cosines(a: Tensor, b: Tensor, dims: Sequence[int], pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cosines; na nb; and the squares of na and nb, 0 where they are constants."""
    rows, others = a.double(), b.double()
    inverse_a, radial_a = _inverse_norms(rows, dims)
    inverse_b, radial_b = _inverse_norms(others, dims)
    products = [_product(rows[..., i:j], others[..., i:j], pairs) for i, j in _chunks(dims)]
    scale = inverse_a * inverse_b if pairs else inverse_a[..., None] * inverse_b[..., None, :]
    return torch.stack(products, 1).cumsum(1) * scale, scale, radial_a, radial_b


def _product(a: Tensor, b: Tensor, pairs: bool) -> Tensor:
    return (a * b).sum(-1) if pairs else a @ b.mT


def _suffix_sums(values: Tensor) -> Tensor:
    """sum_{k' >= k} along dimension 1."""
    return values.flip(1).cumsum(1).flip(1)


def _rows_grad(rows: Tensor, others: Tensor, outer: Tensor, along: Tensor, ctx: Any) -> Tensor:
    radial = _suffix_sums(along)[..., None]
    grad = torch.zeros_like(rows)
    for k, (i, j) in enumerate(_chunks(ctx.dims)):
        chunk = others[..., i:j].double()
        across = outer[:, k, :, None] * chunk if ctx.pairs else outer[:, k] @ chunk
        grad[..., i:j] = across - radial[:, k] * rows[..., i:j]
    return grad


class _MaskedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float, mask: Tensor | None, over_rows: bool) -> Tensor:
        result = ops.masked_logsumexp(scores, mask, scale, over_rows)
        ctx.save_for_backward(result, scores, mask)
        ctx.scale, ctx.over_rows = scale, over_rows
        return result

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        result, scores, mask = ctx.saved_tensors
        return ops.masked_logsumexp_backward(grad, result, scores, mask, ctx.scale, ctx.over_rows), None, None, None
