"""Deferred gradients: added where autograd brings those of the hidden states, instead of beside them.

A loss over all layers would hand autograd one gradient as large as each hidden state, to hold until the one from the
next layer arrives and is added to it. But wherever the final state was computed from an earlier one, that other
gradient is sure to come, and to come after the loss's own backward. So the loss returns a dense gradient for the
final state alone, and a hook on each earlier state adds ``g a dP`` to what arrives: no gradient of its own, and one
pass over memory. In place, on the CPU, where nobody else holds what arrives: what autograd itself asks before it
accumulates in place. (An addition hands one gradient to both of its terms.) Then padding is not even touched.

Where that premise fails a gradient would be lost in silence. It is therefore checked, not assumed: a state is deferred
only if an edge of the autograd graph leads from the final state to it, and a backward that should have reached a hook
and did not raises.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import ops

Edge: TypeAlias = tuple[Any, int]  # a node of the autograd graph, and which of its outputs


class DeferredGradients:
    """The deferred gradients of one call of the loss.

    Args:
        states: hidden states, layer-major, as in :func:`m2d_ext.ops.loss`.
        coefficients: one table per block.
        cu_seqlens: packed states only.
    """

    def __init__(self, states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> None:
        self._coefficients = coefficients
        self._cu_seqlens = cu_seqlens
        self._source: tuple[Tensor, Tensor | None] | None = None  # dP and g, while a backward runs
        self._expected: set[int] = set()
        chosen, self._leaf = _deferrable(states, len(coefficients))
        self.places = frozenset(chosen)
        _references_of_an_own_gradient()  # before a backward runs
        for place in self.places:
            states[place].register_hook(partial(self._add, place))

    def start(self, edges: Sequence[Edge], pooled_grad: Tensor, grad_output: Tensor | None) -> bool:
        """Let the hooks of the present backward add their parts. To be called inside it.

        Args:
            edges: of the autograd graph, to each state.
            pooled_grad: dP (L, N, D).
            grad_output: g, a scalar; None: 1.

        Returns:
            False where all gradients must be dense: ``autograd.grad`` may have been asked for those of the states, and
            takes them before it calls a hook.
        """
        if not self.places or not self._runs_to_the_leaves():
            return False
        self._source = pooled_grad, grad_output
        self._expected = {place for place in self.places if torch._C._will_engine_execute_node(edges[place][0])}
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        return True

    def _runs_to_the_leaves(self) -> bool:
        """Whether the present backward accumulates into leaves, as ``backward()`` does, unlike ``autograd.grad``."""
        try:
            return torch._C._will_engine_execute_node(self._leaf)
        except RuntimeError:  # the answer for a leaf that autograd.grad was asked for
            return False

    def _add(self, place: int, grad: Tensor | None) -> Tensor | None:
        if self._source is None or grad is None:  # not our backward; or no gradient, which _finish will report
            return None
        if grad.requires_grad:
            raise RuntimeError("the gradient of m2d_ext's loss cannot be differentiated again (create_graph=True)")
        self._expected.discard(place)
        pooled_grad, grad_output = self._source
        layer, block = divmod(place, len(self._coefficients))
        table = self._coefficients[block]
        rows = pooled_grad[layer]
        if len(self._coefficients) > 1:
            rows = rows.narrow(0, sum(map(len, self._coefficients[:block])), len(table))
        if _is_own(grad):
            ops.add_pooled_grad_(_flat(grad, self._cu_seqlens), rows, grad_output, table, self._cu_seqlens)
            return None
        added = ops.add_pooled_grad(_flat(grad, self._cu_seqlens), rows, grad_output, table, self._cu_seqlens)
        return added.view(grad.shape)

    def _finish(self) -> None:
        missing = sorted(self._expected)
        self._source, self._expected = None, set()
        if missing:
            layers = sorted({place // len(self._coefficients) for place in missing})
            raise RuntimeError(
                f"the gradients of layers {layers} would be lost: autograd did not bring their hidden states' own. "
                "Construct the loss with deferred=False."
            )


def _flat(grad: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Packed gradients as the operators take them."""
    return grad if cu_seqlens is None else grad.reshape(-1, grad.shape[-1])


def _is_own(grad: Tensor) -> bool:
    """Whether a hook of :class:`DeferredGradients` may write into the gradient it was given."""
    return (
        grad.device.type == "cpu"
        and grad.is_contiguous()
        and type(grad) is Tensor
        and _references(grad) == _references_of_an_own_gradient()
    )


def _references(grad: Tensor) -> tuple[int, int, int]:
    """How many hold the Python object, the tensor and its memory."""
    tensor: Any = grad
    return sys.getrefcount(grad), tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def _references_of_an_own_gradient() -> tuple[int, int, int]:
    """What :func:`_references` are inside :func:`_is_own` inside a hook where autograd alone holds the gradient.

    Found by a backward like that, because every version of Python and torch counts the hands on the way differently.
    """
    probe = _Probe()
    # Outside of what a user counts or traces.
    with _disable_current_modes(), torch.enable_grad():
        for _ in range(3):
            state = torch.ones(1, 1, requires_grad=True) * 2.0
            state.register_hook(partial(probe._add, 0))
            (state * 3.0).backward(torch.ones(1, 1))
    return min(probe.seen)


class _Probe:
    """Looks at a gradient from where :meth:`DeferredGradients._add` does."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def _add(self, place: int, grad: Tensor | None) -> Tensor | None:
        assert grad is not None
        self._is_own(grad)
        return None

    def _is_own(self, grad: Tensor) -> None:
        self.seen.append(_references(grad))


def _deferrable(states: Sequence[Tensor], blocks: int) -> tuple[list[int], Any]:
    """The states that the final one of their block was computed from, by nodes of their own; and a leaf's node."""
    edges = [_edge(state) for state in states]
    times = Counter(node for node, _ in edges)
    chosen: list[int] = []
    leaf = None
    for block in range(blocks):
        column = range(block, len(states), blocks)
        root = edges[column[-1]]
        wanted = {edges[i]: i for i in column if edges[i][0] is not None and times[edges[i][0]] == 1}
        wanted.pop(root, None)
        found, below = _reached(root[0], set(wanted))
        leaf = leaf or below
        chosen += [wanted[edge] for edge in found]
    return (chosen, leaf) if leaf is not None else ([], None)


def _edge(state: Tensor) -> Edge:
    return state.grad_fn, state.output_nr


def _reached(root: Any, wanted: set[Edge]) -> tuple[set[Edge], Any]:
    """Those of the wanted edges that lie on a way from the root, and the node of a leaf that does."""
    found: set[Edge] = set()
    leaf = None
    seen = {root}
    waiting = [root] if root is not None else []
    while waiting and (len(found) < len(wanted) or leaf is None):
        for edge in waiting.pop().next_functions:
            if edge in wanted:
                found.add(edge)
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                waiting.append(edge[0])
                leaf = edge[0] if leaf is None and hasattr(edge[0], "variable") else leaf
    return found, leaf
