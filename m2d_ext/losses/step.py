"""One step of a loss on the fused path: draw, embed, perhaps gather, and one fused loss over all cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.losses.gradcache import _get_batch_size
from torch import Tensor

from .. import functional
from ..arguments import Tokens
from .cached import Caching, MiniBatches
from .embed import Features, embed
from .gather import Batches, Draw, agree, gather_candidates, gathers


class Cells(NamedTuple):
    """What a draw trains: the rows of W and V of the drawn states, the final one last."""

    dims: list[int]
    weights: list[list[float]]
    kl_weights: list[float]
    kl_temperature: float


@dataclass(frozen=True)
class Step:
    """What a step does, whatever its batch.

    Args:
        wrapper: what is called: the model itself, or what wraps it.
        model: the SentenceTransformer.
        loss: the ranking loss of each cell.
        normalize: whether the model normalises its embeddings.
        draw: one draw out of so many hidden states, the last of which is the final one.
        cells: the cells of a draw; the width D of the hidden states.
        num_dims: what the draw's indices of dims are below.
        num_states: how many hidden states the encoder has; None: all are asked for, and then they are counted.
        merge: from columns to the batches of the model's calls.
        deferred: whether the gradients of earlier layers may be deferred.
        caching: how to cache gradients; None: not at all.
    """

    wrapper: Any
    model: Any
    loss: Any
    normalize: bool
    draw: Callable[[int], Draw]
    cells: Callable[[Draw, int], Cells]
    num_dims: int
    num_states: int | None
    merge: Callable[[Sequence[Features]], list[Features]]
    deferred: bool
    caching: Caching | None

    def run(self, columns: list[Features]) -> tuple[Tensor, int]:
        """The loss of a batch of C feature dicts, and how many hidden states the encoder has.

        Raises:
            ValueError: fewer than two columns.
        """
        plan = _Plan(self, columns)
        if self.caching is None:
            return plan.loss(), plan.num_states
        return plan.cached_loss(self.caching), plan.num_states


class _Plan:
    """A step's draw and batch."""

    def __init__(self, step: Step, columns: list[Features]) -> None:
        self._step = step
        self._columns = columns
        self._gathers = gathers(step.loss)
        if len(columns) < 2 and not self._gathers:
            raise ValueError(f"Expected at least 2 embeddings, got {len(columns)}")
        self._batches: Batches | None = None
        self._draw: Draw = {}
        self._earlier: list[int] | None = None
        self.num_states = 0
        if step.num_states is not None:
            self._settle(step.num_states)
            self._earlier = sorted(self._draw)[:-1]

    def _settle(self, num_states: int) -> None:
        """Draw, and agree on it with the other processes."""
        self.num_states = num_states
        self._draw = self._step.draw(num_states)
        if self._gathers:
            shape = num_states, self._step.num_dims, len(self._columns)
            size = _get_batch_size(self._columns[0]) if self._columns else 0
            self._draw, self._batches = agree(self._draw, *shape, size, self._step.model.device)

    def _layers(self, num_states: int) -> list[int]:
        """Places of the drawn layers among the states that were asked for."""
        if self._earlier is not None:
            return list(range(len(self._earlier) + 1))
        self._settle(num_states)
        return sorted(self._draw)

    def loss(self) -> Tensor:
        step = self._step
        tokens, num_states = embed(step.wrapper, step.model, step.merge(self._columns), self._earlier)
        tokens = tokens.select(self._layers(num_states))
        if not self._gathers:
            loss, *_ = functional.loss_of_tokens(tokens, deferred=step.deferred, **self._options(_width(tokens)))
            return loss
        return self._pooled_loss(functional.pool_of_tokens(tokens, deferred=step.deferred))

    def cached_loss(self, caching: Caching) -> Tensor:
        step = self._step
        batches = MiniBatches(step.wrapper, step.model, self._columns, caching, step.deferred)
        pooled, num_states = batches.pool(self._earlier)
        layers = self._layers(num_states)
        if len(layers) < len(pooled):
            pooled = pooled[layers]
        pooled.requires_grad_(torch.is_grad_enabled())
        loss = self._pooled_loss(pooled)
        if not torch.is_grad_enabled():
            return loss
        handle = loss.detach().requires_grad_()
        handle.register_hook(partial(_push, loss, pooled, partial(batches.push, earlier=self._earlier, layers=layers)))
        return handle

    def _pooled_loss(self, pooled: Tensor) -> Tensor:
        candidates, offset = None, 0
        if self._batches is not None:
            candidates = gather_candidates(pooled, len(self._columns), self._batches)
            offset = self._batches.offset
        loss = functional.matryoshka_2d_loss_pooled(
            pooled, candidates=candidates, target_offset=offset, **self._options(pooled.shape[-1])
        )
        assert isinstance(loss, Tensor)
        return loss

    def _options(self, width: int) -> dict[str, Any]:
        step = self._step
        return {
            "num_columns": len(self._columns),
            "scale": step.loss.scale,
            "normalize": step.normalize,
            **step.cells(self._draw, width)._asdict(),
        }


def _push(loss: Tensor, pooled: Tensor, push: Callable[[Tensor], None], grad_output: Tensor) -> None:
    """The backward of a loss that stands apart from its graph: to the pooled rows, and on through the model."""
    (pooled_grad,) = torch.autograd.grad(loss, pooled, grad_output, retain_graph=True)
    push(pooled_grad)


def _width(tokens: Tokens) -> int:
    return tokens.states[0].shape[-1]
