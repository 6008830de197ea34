"""``torch.autograd.Function`` around the compiled operators.

The loss is a scalar, so its gradient is only ever multiplied by one number g: the forward already computes dP, and
the backward is the scatter ``g a[n, t] dP[l, n, :]`` alone; see ``m2d_ext.deferred`` for what it leaves to hooks.
On the CPU the forward has even scattered, for the g that it expects: it writes one layer's gradients while it reads
the next one's states. Any other g scatters again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops
from .deferred import DeferredGradients
from .grid import Grid

NO_SECOND_DERIVATIVE = "the gradients of m2d_ext's losses cannot be differentiated again (create_graph=True)"


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a ``backward`` whose results depend on the inputs through constants: it refuses to be recorded.

    torch's ``once_differentiable`` raises only where the incoming gradient has a history, and that of a loss is 1; and
    only on the way back to the gradient's own inputs, which ``autograd.grad`` need not take.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        return once(ctx, *grads)

    return wrapper


def _needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know, which says for itself that there is no forward mode."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    return not torch.compiler.is_compiling() and any(_has_tangent(tensor) for tensor in given)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _needed_layers(needed: Sequence[bool], blocks: int) -> list[int]:
    return [i for i in range(len(needed) // blocks) if any(needed[i * blocks : (i + 1) * blocks])]


def _place(dense: Sequence[Tensor], layers: Sequence[int], needed: Sequence[bool], blocks: int) -> list[Tensor | None]:
    """The gradients of some layers in the places of all states (layer-major), None where none is needed."""
    grads: list[Tensor | None] = [None] * len(needed)
    for i, layer in enumerate(layers):
        grads[layer * blocks : (layer + 1) * blocks] = dense[i * blocks : (i + 1) * blocks]
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


class _ReadyGradients(NamedTuple):
    """Dense gradients of the loss that the forward wrote, for the g that it expected."""

    layers: list[int]
    grad_output: float
    dense: list[Tensor]


class _Expectation:
    """The g that the next backward will ask for: that of the last two, None where they differ.

    ``loss.backward()`` means 1, and it is the same in every step of a loop also where the loss is divided among
    accumulated batches, weighted beside others, or scaled.
    """

    def __init__(self) -> None:
        self._last = 1.0
        self.grad_output: float | None = 1.0

    def see(self, grad_output: float) -> None:
        self.grad_output = grad_output if grad_output == self._last else None
        self._last = grad_output


_expectation = _Expectation()


def _seen(grad_output: Tensor | None) -> float | None:
    """g, where nothing has to wait for it and nothing is recorded."""
    if grad_output is None or not grad_output.is_cpu or _is_traced():
        return None
    asked = grad_output.item()
    _expectation.see(asked)
    return asked


def _is_traced() -> bool:
    """Whether what runs is recorded, or counted: then nothing may depend on a value."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _scatter(ctx: Any, pooled_grad: Tensor, grad_output: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the hidden states, None for the layers of which no state needs one."""
    blocks = len(ctx.coefficients)
    layers = _needed_layers(needed, blocks)
    # Given away: whoever gets them may write into them, and another backward makes its own.
    ready, ctx.ready_gradients = ctx.ready_gradients, None
    asked = _seen(grad_output)
    if ready is not None and (ready.layers, ready.grad_output) == (layers, asked):
        dense = ready.dense
    else:
        del ready  # its memory is what the new ones are written into
        dense = ops.pool_backward(pooled_grad, grad_output, layers, ctx.coefficients, ctx.cu_seqlens, ctx.dtype)
    if ctx.cu_seqlens is not None:
        dense = [grad.view(ctx.shape) for grad in dense]
    return _place(dense, layers, needed, blocks)


def _flat(states: Sequence[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    """Packed states (1, total_tokens, D) as the operators take them. Not a view that autograd sees: gradients are
    deferred to the very tensors that the encoder computes with.
    """
    return list(states) if cu_seqlens is None else [state.view(-1, state.shape[-1]) for state in states]


def _without(deferred: DeferredGradients | None, needed: Sequence[bool]) -> Sequence[bool]:
    if deferred is None:
        return needed
    return [need and place not in deferred.places for place, need in enumerate(needed)]


def _scatter_now(
    ctx: Any, pooled_grad: Tensor, grad_output: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """``_scatter``, but for the states whose gradients are deferred.

    Of a traced function nothing is deferred: its context has no node to ask for edges.
    """
    if ctx.deferred is not None and ctx.deferred.start(ctx.next_functions[-len(needed) :], pooled_grad, grad_output):
        needed = _without(ctx.deferred, needed)
    return _scatter(ctx, pooled_grad, grad_output, needed)


def _detach_extras(ctx: Any, cells: Tensor, kl: Tensor) -> None:
    """What is handed out beside the loss has no gradient, and none is made up for it: two launches on a GPU."""
    ctx.mark_non_differentiable(cells, kl)
    if not _is_traced():
        ctx.set_materialize_grads(False)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Any,
        cu_seqlens: Tensor | None,
        grid: Grid,
        deferred: DeferredGradients | None,
        *states: Tensor,
    ) -> Any:
        inputs = _flat(states, cu_seqlens), coefficients, cu_seqlens, grid
        expected = _expectation.grad_output if states[0].is_cpu and not _is_traced() else None
        ctx.ready_gradients = None
        if expected is None:
            loss, cells, kl, pooled_grad = ops.loss(*inputs, True)
        else:
            needed = _without(deferred, ctx.needs_input_grad[4:])
            layers = _needed_layers(needed, len(coefficients))
            loss, cells, kl, pooled_grad, dense = ops.loss_and_gradients(*inputs, expected, layers)
            ctx.ready_gradients = _ReadyGradients(layers, expected, dense)
        ctx.save_for_backward(pooled_grad)
        ctx.coefficients, ctx.cu_seqlens = coefficients, cu_seqlens
        ctx.dtype, ctx.shape = states[0].dtype, states[0].shape
        ctx.deferred = deferred
        _detach_extras(ctx, cells, kl)
        return loss, cells, kl

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> Any:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        (pooled_grad,) = ctx.saved_tensors
        return (None, None, None, None, *_scatter_now(ctx, pooled_grad, grad_loss, ctx.needs_input_grad[4:]))


class _PooledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, candidates: Tensor | None, target_offset: int, grid: Grid) -> Any:
        loss, cells, kl, *grads = ops.pooled_loss(pooled, candidates, target_offset, grid, True)
        ctx.save_for_backward(*grads)
        ctx.dtype = pooled.dtype
        _detach_extras(ctx, cells, kl)
        return loss, cells, kl

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> Any:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[:2]
        grads = [
            (grad_loss * grad).to(ctx.dtype) if need else None
            for grad, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        return (*grads, None, None)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Any,
        cu_seqlens: Tensor | None,
        deferred: DeferredGradients | None,
        *states: Tensor,
    ) -> Tensor:
        ctx.coefficients, ctx.cu_seqlens = coefficients, cu_seqlens
        ctx.dtype, ctx.shape = states[0].dtype, states[0].shape
        ctx.deferred = deferred
        ctx.ready_gradients = None
        return ops.pool(_flat(states, cu_seqlens), coefficients, cu_seqlens)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_pooled: Tensor) -> Any:
        return (None, None, None, *_scatter_now(ctx, grad_pooled.contiguous(), None, ctx.needs_input_grad[3:]))


class _CoefficientGradients(torch.autograd.Function):
    """Hands on the pooled rows, and gives learned coefficients ``da[n, t] = sum_l <dP[l, n], H[l, n, t]>``."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, blocks: int, *tables_and_states: Tensor) -> Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(*tables_and_states)
        return pooled.view_as(pooled)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_pooled: Tensor) -> Any:
        tables, states = ctx.saved_tensors[: ctx.blocks], ctx.saved_tensors[ctx.blocks :]
        rows = grad_pooled.split([len(table) for table in tables], dim=1)
        grads = [_table_gradient(rows[i], states[i :: ctx.blocks]) for i in range(ctx.blocks)]
        return (grad_pooled, None, *grads, *[None] * len(states))


def _table_gradient(pooled_grad: Tensor, states: Sequence[Tensor]) -> Tensor:
    """From dP (L, n, D) and L states (n, T, D) of one block: (n, T)."""
    parts = [torch.bmm(h.to(rows.dtype), rows[..., None]) for h, rows in zip(states, pooled_grad, strict=True)]
    return torch.stack(parts).sum(0).squeeze(-1)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Any, cu_seqlens: Tensor | None, *states: Tensor) -> Tensor:
        ctx.coefficients, ctx.cu_seqlens, ctx.dtype = coefficients, cu_seqlens, states[0].dtype
        pooled, indices = ops.pool_max(states, coefficients, cu_seqlens)
        ctx.save_for_backward(indices)
        return pooled

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_pooled: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        needed, blocks = ctx.needs_input_grad[2:], len(ctx.coefficients)
        layers = _needed_layers(needed, blocks)
        dense = ops.pool_max_backward(grad_pooled, indices, layers, ctx.coefficients, ctx.cu_seqlens, ctx.dtype)
        return (None, None, *_place(dense, layers, needed, blocks))


def pool_max(hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """Differentiable ``m2d_ext.ops.pool_max``, without the indices."""
    if _needs_grad(*hidden_states):
        return _MaxPool.apply(tuple(coefficients), cu_seqlens, *hidden_states)
    return ops.pool_max(hidden_states, coefficients, cu_seqlens)[0]


def pool(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    deferred: bool = False,
) -> Tensor:
    """Differentiable ``m2d_ext.ops.pool``, in padded coefficients too; ``deferred`` as in ``loss``."""
    constants = tuple(table.detach() for table in coefficients)
    if _needs_grad(*hidden_states):
        later = _deferred(hidden_states, constants, cu_seqlens, deferred)
        pooled = _Pool.apply(constants, cu_seqlens, later, *hidden_states)
    else:
        pooled = ops.pool(_flat(hidden_states, cu_seqlens), constants, cu_seqlens)
    if not _needs_grad(*coefficients):
        return pooled
    return _CoefficientGradients.apply(pooled, len(coefficients), *coefficients, *(h.detach() for h in hidden_states))


def _deferred(
    hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None, wanted: bool
) -> DeferredGradients | None:
    if not wanted or torch.compiler.is_compiling():
        return None
    return DeferredGradients(hidden_states, tuple(coefficients), cu_seqlens)


def loss(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    grid: Grid,
    deferred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable loss with its cells (L, K) and KLs (L,), both detached.

    Args:
        hidden_states: as in ``m2d_ext.ops.loss``, layer-major.
        coefficients: as there.
        cu_seqlens: as there.
        grid: weights, dims and options.
        deferred: whether the gradients of earlier layers may be deferred (``m2d_ext.deferred``).
    """
    if _needs_grad(*hidden_states):
        later = _deferred(hidden_states, coefficients, cu_seqlens, deferred)
        return _Loss.apply(tuple(coefficients), cu_seqlens, grid, later, *hidden_states)
    return ops.loss(_flat(hidden_states, cu_seqlens), coefficients, cu_seqlens, grid, False)[:3]


def pooled_loss(
    pooled: Tensor, candidates: Tensor | None, target_offset: int, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable ``m2d_ext.ops.pooled_loss``; results and ``grid`` as in ``loss``."""
    if _needs_grad(pooled, candidates):
        return _PooledLoss.apply(pooled, candidates, target_offset, grid)
    return ops.pooled_loss(pooled, candidates, target_offset, grid, False)[:3]
