"""The 2D Matryoshka loss as functions of tensors: ``L`` layers × ``K`` dims of in-batch contrastive losses at once.

    P[l, n, :]    = sum_t a[n, t] H[l, n, t, :]                     pooling
    E[l, n, :]    = P[l, n, :], or P / max(|P|, 1e-12) with ``normalize``
    S[l, k, i, j] = scale * cos(E[l, i, :d_k], E[l, j, :d_k])       anchor i, candidate j
    CE[l, k]      = mean_i (logsumexp_j S[l, k, i, j] - S[l, k, i, target(i)])
    KL[l]         = mean_n KL(softmax(E[L-1, n] / tau) || softmax(E[l, n] / tau)), the teacher detached
    loss          = sum W[l, k] CE[l, k] + sum V[l] KL[l]

Li et al., "2D Matryoshka Sentence Embeddings", arXiv:2402.14776.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _extension, arguments, autograd, ops, reference
from .arguments import HiddenStates, Tokens, Weights
from .grid import Grid

__all__ = ["matryoshka_2d_loss", "matryoshka_2d_loss_pooled", "pool_layers"]

LossAndCells = tuple[Tensor, Tensor, Tensor]


@overload
def matryoshka_2d_loss(
    hidden_states: HiddenStates,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    num_columns: int = 2,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    pooling: str = "mean",
    normalize: bool = False,
    deferred: bool = False,
    backend: str = "auto",
    return_cells: Literal[False] = False,
) -> Tensor: ...
@overload
def matryoshka_2d_loss(
    hidden_states: HiddenStates,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    num_columns: int = 2,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    pooling: str = "mean",
    normalize: bool = False,
    deferred: bool = False,
    backend: str = "auto",
    return_cells: Literal[True],
) -> LossAndCells: ...
def matryoshka_2d_loss(
    hidden_states: HiddenStates,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    num_columns: int = 2,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    pooling: str = "mean",
    normalize: bool = False,
    deferred: bool = False,
    backend: str = "auto",
    return_cells: bool = False,
) -> Tensor | LossAndCells:
    """The loss of all layers and dims from the model's hidden states.

    Args:
        hidden_states: L tensors (N, T, D), floating point; or (total_tokens, D) with ``cu_seqlens``; or per layer
            a list of tensors (n, T_c, D), such as one per column, whose texts follow each other. The N texts are
            column-major: all anchors, all positives, all first negatives...
        attention_mask: (N, T), or one (n, T_c) per tensor of a layer; 0 for padding, which the fused path never
            reads. None: every token counts.
        cu_seqlens: (N + 1,) int, where each packed text starts and the last one ends.
        num_columns: C >= 2; N is C times the batch size.
        dims: K prefix lengths, ascending and distinct, at most D.
        weights: W (L, K), a nested sequence or a CPU tensor. A cell of weight 0 costs nothing.
        kl_weights: V (L,), 0 for the final layer, the teacher. None: no KL.
        kl_temperature: tau > 0.
        scale: factor of the cosines, > 0.
        pooling: "mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean" or "max".
        normalize: whether the model normalises its pooled rows; it changes the KL.
        deferred: allows the gradients of all but the final layer to be added where autograd brings those layers'
            own gradients, with the same values, less memory and fewer passes over it. Only where the final layer was
            computed from them; the other layers get dense ones. With the reference it makes no difference.
        backend: "fused", "reference" (eager PyTorch), or "auto": fused where it can be.
        return_cells: whether to return also the cells.

    Returns:
        The loss, a scalar of the accumulation dtype (float32 for half types). With ``return_cells`` also the
        cross-entropies CE (L, K) and the KLs (L,), both detached, NaN where the weight is 0.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, a device or a value is wrong; the message names the argument.
        RuntimeError: ``backend="fused"`` where the extension is not compiled or has no kernels for the tensors.
    """
    results = loss_of_tokens(
        arguments.read_tokens(hidden_states, attention_mask, cu_seqlens, pooling),
        backend,
        deferred,
        num_columns=num_columns,
        dims=dims,
        weights=weights,
        kl_weights=kl_weights,
        kl_temperature=kl_temperature,
        scale=scale,
        normalize=normalize,
    )
    return results if return_cells else results[0]


@overload
def matryoshka_2d_loss_pooled(
    pooled: Tensor,
    *,
    candidates: Tensor | None = None,
    target_offset: int = 0,
    num_columns: int = 2,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    normalize: bool = False,
    backend: str = "auto",
    return_cells: Literal[False] = False,
) -> Tensor: ...
@overload
def matryoshka_2d_loss_pooled(
    pooled: Tensor,
    *,
    candidates: Tensor | None = None,
    target_offset: int = 0,
    num_columns: int = 2,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    normalize: bool = False,
    backend: str = "auto",
    return_cells: Literal[True],
) -> LossAndCells: ...
def matryoshka_2d_loss_pooled(
    pooled: Tensor,
    *,
    candidates: Tensor | None = None,
    target_offset: int = 0,
    num_columns: int = 2,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    normalize: bool = False,
    backend: str = "auto",
    return_cells: bool = False,
) -> Tensor | LossAndCells:
    """The loss of all layers and dims from pooled rows.

    Args:
        pooled: (L, N, D), floating point: the anchors and their own candidates, column-major.
        candidates: (L, M, D), candidates gathered from elsewhere; None: the rows of ``pooled`` after the anchors.
            The KL is always that of ``pooled``.
        target_offset: anchor i's positive is candidate ``target_offset + i``.
        num_columns: as in ``matryoshka_2d_loss``, and so are all the others.
        dims: K prefix lengths.
        weights: W (L, K).
        kl_weights: V (L,).
        kl_temperature: tau > 0.
        scale: factor of the cosines, > 0.
        normalize: whether the rows, and the candidates, are to be normalised first.
        backend: "auto", "fused" or "reference".
        return_cells: whether to return also the cells.

    Returns:
        As ``matryoshka_2d_loss``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``matryoshka_2d_loss``.
    """
    results = loss_of_pooled(
        pooled,
        candidates,
        target_offset,
        backend,
        num_columns=num_columns,
        dims=dims,
        weights=weights,
        kl_weights=kl_weights,
        kl_temperature=kl_temperature,
        scale=scale,
        normalize=normalize,
    )
    return results if return_cells else results[0]


def pool_layers(
    hidden_states: HiddenStates,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    pooling: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Pool every layer's hidden states at once.

    Args:
        hidden_states: as in ``matryoshka_2d_loss``.
        attention_mask: as there.
        cu_seqlens: as there.
        pooling: as there.
        backend: as there.

    Returns:
        (L, N, D) of the hidden states' dtype, summed in float32 or wider.

    Raises:
        TypeError, ValueError, RuntimeError: as ``matryoshka_2d_loss``.
    """
    tokens = arguments.read_tokens(hidden_states, attention_mask, cu_seqlens, pooling)
    return pool_of_tokens(tokens, backend).to(tokens.states[0].dtype)


def pool_of_tokens(tokens: Tokens, backend: str = "auto", deferred: bool = False) -> Tensor:
    """``pool_layers`` from a ready coefficient table, in the accumulation dtype; ``deferred`` as in the loss."""
    layers, blocks = tokens.num_layers, len(tokens.coefficients)
    return _pool(tokens, _is_fused(backend, tokens.states[0], layers=layers, blocks=blocks), deferred)


def loss_of_pooled(
    pooled: Tensor,
    candidates: Tensor | None = None,
    target_offset: int = 0,
    backend: str = "auto",
    *,
    num_columns: int,
    **options: Any,
) -> LossAndCells:
    """``matryoshka_2d_loss_pooled`` of any ``Grid``: the loss, the cells and the KLs."""
    arguments.check_pooled(pooled, candidates, target_offset, num_columns)
    grid, layers, active = arguments.read_grid(
        num_layers=pooled.shape[0],
        num_texts=pooled.shape[1],
        width=pooled.shape[2],
        num_columns=num_columns,
        **options,
    )
    fused = _is_fused(backend, pooled, layers=len(layers), dims=len(active.dims))
    if len(layers) < len(pooled):
        pooled = _select(pooled, layers)
        candidates = None if candidates is None else _select(candidates, layers)
    return _with_cells(_pooled_loss(pooled, candidates, target_offset, active, fused), grid, active, layers)


def loss_of_tokens(tokens: Tokens, backend: str = "auto", deferred: bool = False, **options: Any) -> LossAndCells:
    """``matryoshka_2d_loss`` from a ready coefficient table and of any ``Grid``, as above."""
    grid, layers, active = arguments.read_grid(
        num_layers=tokens.num_layers, num_texts=tokens.num_texts, width=tokens.states[0].shape[-1], **options
    )
    blocks, num_dims = len(tokens.coefficients), len(active.dims)
    fused = _is_fused(backend, tokens.states[0], layers=len(layers), blocks=blocks, dims=num_dims)
    return _with_cells(_loss(tokens.select(layers), active, fused, deferred), grid, active, layers)


def _is_fused(backend: str, tensor: Tensor, *, layers: int, blocks: int = 1, dims: int = 0) -> bool:
    """Whether the compiled operators run: for tensors like this one, so many layers, tensors per layer and dims."""
    if arguments.read_backend(backend) == "reference":
        return False
    reason = ops.refusal(tensor.device, tensor.dtype, layers, blocks, dims)
    if reason is None:
        return True
    if backend == "fused":
        raise RuntimeError(f"m2d_ext {reason}.")
    _extension.warn_missing_once(reason)
    return False


def _loss(tokens: Tokens, grid: Grid, fused: bool, deferred: bool) -> LossAndCells:
    if fused and not tokens.maximum and not tokens.learns:
        return autograd.loss(tokens.states, tokens.coefficients, tokens.cu_seqlens, grid, deferred)
    return _pooled_loss(_pool(tokens, fused), None, 0, grid, fused)


def _pool(tokens: Tokens, fused: bool, deferred: bool = False) -> Tensor:
    table = tokens.coefficients, tokens.cu_seqlens
    with torch.autocast(tokens.states[0].device.type, enabled=False):
        if fused and not tokens.maximum:
            return autograd.pool(tokens.states, *table, deferred)
        inputs = tokens.flat_states, *table
        backend = autograd if fused else reference
        return backend.pool_max(*inputs) if tokens.maximum else reference.pool(*inputs)


def _pooled_loss(
    pooled: Tensor, candidates: Tensor | None, target_offset: int, grid: Grid, fused: bool
) -> LossAndCells:
    if fused:
        return autograd.pooled_loss(pooled, candidates, target_offset, grid)
    dtype = reference.accumulate_dtype(pooled.dtype)
    rows, others = pooled.to(dtype), None if candidates is None else candidates.to(dtype)
    with torch.autocast(pooled.device.type, enabled=False):  # it would multiply in a half type
        return reference.matryoshka_2d_loss_pooled(rows, others, target_offset, **grid._asdict())


def _with_cells(results: LossAndCells, grid: Grid, active: Grid, layers: list[int]) -> LossAndCells:
    """The cells of the active grid in their places of the whole one."""
    loss, active_cells, active_kl = results
    if active.weights.shape == grid.weights.shape:
        return results
    columns = [grid.dims.index(d) for d in active.dims]
    cells = _spread(_spread(active_cells, layers, len(grid.weights), 0), columns, len(grid.dims), 1)
    return loss, cells, _spread(active_kl, layers, len(grid.weights), 0)


def _select(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """``tensor[places]``, but without a copy of the list to the device, for which the host would wait."""
    rows = tensor.unbind()
    return torch.stack([rows[i] for i in places])


def _spread(values: Tensor, places: Sequence[int], size: int, dim: int) -> Tensor:
    """The inverse: values to their places along a dimension of that size, NaN elsewhere."""
    rows = [torch.full_like(values.select(dim, 0), torch.nan)] * size
    for place, row in zip(places, values.unbind(dim), strict=True):
        rows[place] = row
    return torch.stack(rows, dim)
