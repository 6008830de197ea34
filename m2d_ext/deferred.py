"""Deferred gradients: added where autograd brings those of the hidden states, instead of beside them.

A loss over all layers would hand autograd one gradient as large as each hidden state, to hold until the one from the
next layer arrives and is added to it. But wherever the final state was computed from an earlier one, that other
gradient is sure to come, and to come after the loss's own backward. So the loss returns a dense gradient for the
final state alone, and a hook on each earlier state adds ``g a dP`` to what arrives: no gradient of its own, and one
pass over memory. In place, on the CPU, where nobody else holds what arrives; then padding is not even touched. The
hooks themselves, and the walk from the final state to the others, are C++ (``csrc/deferred.h``).

Where that premise fails a gradient would be lost in silence. It is therefore checked, not assumed: a state is deferred
only if an edge of the autograd graph leads from the final state to it, and a backward that should have reached a hook
and did not raises.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _extension

Edge: TypeAlias = tuple[Any, int]  # a node of the autograd graph, and which of its outputs


class DeferredGradients:
    """The deferred gradients of one call of the loss.

    Args:
        states: hidden states, layer-major, as in ``m2d_ext.ops.loss``.
        coefficients: one table per block.
        cu_seqlens: packed states only.
    """

    def __init__(self, states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> None:
        self._coefficients = list(coefficients)
        chosen, leaf = _extension.deferrable(states, len(coefficients))
        self._leaf: Any = None if leaf is None else torch.autograd.graph.get_gradient_edge(leaf).node
        self.places = frozenset(chosen)
        self._hooks = _extension.deferred_hooks(
            [states[place] for place in chosen], chosen, len(coefficients), cu_seqlens, _own_references()
        )

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
        expected = [place for place in self.places if torch._C._will_engine_execute_node(edges[place][0])]
        backward = self._hooks.start(self._coefficients, pooled_grad, grad_output, expected)
        # The callback holds what the hooks add, and is held by the backward alone, however that ends.
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._check, backward))
        return True

    def _runs_to_the_leaves(self) -> bool:
        """Whether the present backward accumulates into leaves, as ``backward()`` does, unlike ``autograd.grad``."""
        try:
            return torch._C._will_engine_execute_node(self._leaf)
        except RuntimeError:  # the answer for a leaf that autograd.grad was asked for
            return False

    def _check(self, backward: Any) -> None:
        if missing := backward.missing():
            layers = sorted({place // len(self._coefficients) for place in missing})
            raise RuntimeError(
                f"the gradients of layers {layers} would be lost: autograd did not bring their hidden states' own. "
                "Construct the loss with deferred=False."
            )


@cache
def _own_references() -> int:
    """How many hold a gradient inside a hook where autograd alone does.

    Found by a backward like that, because every version of torch counts its own hands on the way.
    """
    # Outside of what a user counts or traces.
    with _disable_current_modes(), torch.enable_grad():
        state = torch.ones(1, 1, device="cpu", requires_grad=True) * 2.0  # whatever the default device is
        hooks = _extension.deferred_hooks([state], [0], 1, None, 0)
        (state * 3.0).backward(torch.ones(1, 1, device="cpu"))
    references: int = hooks.fewest_references
    return references
