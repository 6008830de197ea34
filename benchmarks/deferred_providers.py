"""Who is compared where gradients are deferred: the passes alone, and whole steps of the loss on a chain of states."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from encoder_chain import Layer, Untimed, chained, seconds_between_nodes
from m2d_ext import functional
from m2d_ext.pooling import padded_coefficients
from providers import FLOOR, Candidate, Inputs, Step, floor, grid

DEFERRED = "deferred"
DENSE = "dense"
# All earlier layers' read-add-write passes, on gradients that come out of memory, or that were just written.
PASSES_COLD = "passes, cold"
PASSES_WARM = "passes, warm"
DEFERRED_PROVIDERS = (DEFERRED, DENSE, PASSES_COLD, PASSES_WARM, FLOOR)


def run_loss(inputs: Inputs, deferred: bool, layer: Layer) -> None:
    """Forward and backward through the stand-in encoder."""
    states = chained(inputs.states, layer)
    options = grid(inputs.shape)
    loss = functional.matryoshka_2d_loss(states, inputs.mask, backend="fused", deferred=deferred, **options)
    assert isinstance(loss, Tensor)
    loss.backward(inputs.grad_output)


def whole_step(inputs: Inputs, deferred: bool, layer: Layer) -> Step:
    """``run_loss``, less what the encoder takes."""

    def step() -> list[Tensor]:
        start = time.perf_counter()
        between = seconds_between_nodes(inputs.states, layer)
        layer.untimed.leave_out(time.perf_counter() - start + between)
        run_loss(inputs, deferred, layer)
        return []

    return step


def arriving_gradients(inputs: Inputs, deferred: bool) -> list[Tensor]:
    """What the encoder's layers are handed, final layer first."""
    torch.manual_seed(1)
    layer = Layer(inputs.states[0], Untimed())
    layer.arrived = []
    run_loss(inputs, deferred, layer)
    return layer.arrived


def check_gradients(inputs: Inputs) -> None:
    for found, expected in zip(arriving_gradients(inputs, True), arriving_gradients(inputs, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def passes(inputs: Inputs, gradient: Callable[[int], Tensor]) -> Step:
    """The additions to each earlier layer's gradient, which is asked for right before."""
    shape = inputs.shape
    table = padded_coefficients(inputs.mask, "mean", torch.float32)
    pooled_grads = torch.randn(shape.layers - 1, shape.texts, shape.width)

    def step() -> list[Tensor]:
        # In place, as in a backward where autograd alone holds what arrives.
        for i, rows in enumerate(pooled_grads):
            torch.ops.m2d_ext.add_pooled_grad_(gradient(i), rows, inputs.grad_output, table, None)
        return []

    return step


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    check_gradients(inputs)
    untimed = Untimed()
    layer = Layer(inputs.states[0], untimed)
    given = [torch.randn_like(state) for state in inputs.states[:-1]]
    steps = {
        DEFERRED: whole_step(inputs, True, layer),
        DENSE: whole_step(inputs, False, layer),
        PASSES_COLD: passes(inputs, given.__getitem__),
        PASSES_WARM: passes(inputs, lambda _: layer.incoming_gradient()),
        FLOOR: floor(inputs),
    }
    return {name: Candidate(None, [], step, untimed=untimed.take) for name, step in steps.items()}
