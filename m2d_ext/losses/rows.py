"""A batch's pooled rows, as the losses beside plain InfoNCE see them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..similarity import nested_cosines, nested_pair_cosines
from .embed import Features

MOST_SCORES = 1 << 24  # in memory at a time, in double: 128 MiB


@dataclass(frozen=True)
class Rows:
    """The pooled rows of a batch as an adapter sees them.

    Args:
        columns: C tensors (L, B, D), this process's.
        gathered: the same of all processes, (L, M, D); without gathering the same tensors.
        offset: where this process's rows start in a gathered column.
        dims: K ascending, distinct prefix lengths.
        features: what the columns were embedded from.
        labels: those of the batch.
        gather: from this process's (L, C * B, D), of whatever model, to all processes', (L, C * M, D), detached.
        false_negative_margin: candidates that the final layer finds more similar to the anchor than the positive, by
            more than this, are no negatives; None: all are.
        as_called: puts back the autocast under which the loss was called, for what is not computed in double.
    """

    columns: list[Tensor]
    gathered: list[Tensor]
    offset: int
    dims: Sequence[int]
    features: list[Features]
    labels: Any
    gather: Callable[[Tensor], Tensor]
    false_negative_margin: float | None = None
    as_called: Callable[[], AbstractContextManager[Any]] = nullcontext

    def cosines(self, a: Tensor, b: Tensor) -> Tensor:
        """(L, K, A, B)."""
        return nested_cosines(a, b, self.dims)

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """(L, K, A)."""
        return nested_pair_cosines(a, b, self.dims)

    @property
    def batch_size(self) -> int:
        return self.columns[0].shape[1]

    def own_of(self, anchors: slice) -> Tensor:
        """(A, M), true where a gathered row of a column is the same process's row of the same text as the anchor."""
        shape = anchors.stop - anchors.start, self.gathered[0].shape[1]
        own = torch.zeros(shape, dtype=torch.bool, device=self.columns[0].device)
        own.diagonal(self.offset + anchors.start).fill_(True)
        return own

    def final(self) -> "Rows":
        """The final layer's at full width, detached."""
        columns = [rows[-1:].detach() for rows in self.columns]
        gathered = columns if self.gathered is self.columns else [rows[-1:].detach() for rows in self.gathered]
        return replace(self, columns=columns, gathered=gathered, dims=[self.columns[0].shape[-1]])

    @staticmethod
    def most_at_once(scores: int) -> int:
        """How many anchors may be in memory at a time, of so many scores each."""
        return max(1, MOST_SCORES // max(1, scores))

    def by_anchors(self, candidates: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """Values of every anchor (L, K, B), in memory for few of them at a time where all would take much.

        Args:
            candidates: how many scores an anchor takes in each layer and dim.
            compute: from a slice of the A anchors to their values, (..., L, K, A). It runs twice where anchors are
                split.
        """
        cells = len(self.columns[0]) * len(self.dims)
        size = self.most_at_once(cells * candidates)
        if size >= self.batch_size:
            return compute(slice(0, self.batch_size))
        slices = [slice(first, min(first + size, self.batch_size)) for first in range(0, self.batch_size, size)]
        return torch.cat([checkpoint(compute, part, use_reentrant=False) for part in slices], dim=-1)
