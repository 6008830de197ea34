"""A stand-in for the encoder, to time what a loss adds to a backward: everything of it but the encoder's own work.

A deferred gradient is added to one that autograd brings from the layer above; a dense one is added to it by autograd
itself. Neither shows where the hidden states are leaves. Here they hang in a chain of nodes, one per layer, so that
the real engine, hooks and accumulation run. (autograd adds in place: the loss's gradient arrives first and nobody
else holds it, so the layer's is added into it.)

What a layer would do is left out of the time, but not out of the cache: before a node hands down its gradient it reads
as much memory as a layer's backward reads activations, and it writes that gradient as its last deed. So the gradient
is as warm as in training, and all that was written earlier, such as the loss's own gradients, as cold.

The way from one node to the next is not the loss's either: these nodes are Python's, a layer's are not. It is timed
where no loss is in the way, right before each step, and left out too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Saved activations that a layer's backward reads, in sizes of a hidden state: a BERT layer has more than twenty.
READ_BY_A_LAYER = 8


class Untimed:
    """Adds up the time of what a step has to do but is not measured by: ``with untimed:``."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._left_out = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._start, time.perf_counter()))

    def leave_out(self, seconds: float) -> None:
        self._left_out += seconds

    def take(self) -> float:
        """Seconds since this was last asked."""
        seconds = self._left_out + sum(end - start for start, end in self._spans)
        self._spans, self._left_out = [], 0.0
        return seconds

    def between(self) -> float:
        """Seconds from each span to the next one since ``take``."""
        return sum(start - end for (_, end), (start, _) in pairwise(self._spans))


class Layer:
    """What each node of the chain does. All layers share it: of the values only their shape matters.

    Args:
        state: a hidden state, for its shape.
        untimed: where the time of what stands for the encoder goes.
    """

    def __init__(self, state: Tensor, untimed: Untimed) -> None:
        self.untimed = untimed
        self.arrived: list[Tensor] | None = None  # gradients, final layer first, if they are to be kept
        self._source = torch.randn_like(state)
        self._activations = torch.ones(READ_BY_A_LAYER * state.numel())

    def incoming_gradient(self) -> Tensor:
        """What comes down from a layer, as warm as it then is."""
        with self.untimed:
            return self._make_gradient()

    def backward(self, grad: Tensor, is_first: bool) -> Tensor:
        """What a node does with its gradient and hands down, none of it timed."""
        with self.untimed:
            if self.arrived is not None:
                self.arrived.append(grad)
            return grad.new_zeros(()) if is_first else self._make_gradient()

    def read_activations(self) -> None:
        """Empties the caches of all else."""
        self._activations.sum()

    def _make_gradient(self) -> Tensor:
        self.read_activations()
        # Not a copy, which could bypass the cache.
        return self._source * 1.0


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Tensor, state: Tensor, layer: Layer) -> Tensor:
        ctx.layer, ctx.is_first = layer, below.ndim == 0
        return state.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layer.backward(grad, ctx.is_first), None, None


def chained(states: Sequence[Tensor], layer: Layer) -> list[Tensor]:
    """The states, each with the one before as its origin, and a parameter as the first one's."""
    with layer.untimed:
        below = torch.zeros((), requires_grad=True)
        result = []
        for state in states:
            below = _Node.apply(below, state.detach(), layer)
            result.append(below)
        return result


def seconds_between_nodes(states: Sequence[Tensor], layer: Layer) -> float:
    """What autograd and Python take from the work of one node to that of the next, where no loss is in the way."""
    final, gradient = chained(states, layer)[-1], layer.incoming_gradient()
    layer.untimed.take()
    final.backward(gradient)
    seconds = layer.untimed.between()
    layer.read_activations()
    layer.untimed.take()
    return seconds
