"""In-batch candidates from every process: one small collective before the step, one large each way.

sentence-transformers gathers each column of each layer and dim by itself. Here one exchange of integers settles which
cells are trained and how many texts each process has (the very first step takes two: the encoder's layers are not yet
counted); one all_gather then brings the pooled candidates of all layers, and one reduce_scatter takes their gradients
back, each already multiplied by its own process's ``grad_output``.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("m2d_ext")

HEADER = 2  # columns, texts per column

# The names up to torch 2.12, and those since.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Drawn(NamedTuple):
    """What was drawn for one layer."""

    dims: Sequence[int]  # indices of them
    weight: float  # w(layer), asked for after the layer's dims: a user's function may draw too


Draw: TypeAlias = dict[int, Drawn]  # by hidden state


class Batches(NamedTuple):
    """Every process's share of the batch."""

    sizes: list[int]  # texts per column
    rank: int

    @property
    def offset(self) -> int:
        """Where this process's texts start in a gathered column."""
        return sum(self.sizes[: self.rank])


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def gathers(loss: Any) -> bool:
    """Whether the loss takes candidates from other processes, and there are any."""
    if not getattr(loss, "gather_across_devices", False):
        return False
    if is_distributed():
        return True
    _warn_alone(loss)
    return False


def _warn_alone(loss: Any) -> None:
    if not getattr(loss, "_warned_alone", False):
        object.__setattr__(loss, "_warned_alone", True)
        logger.warning(
            "gather_across_devices=True, but torch.distributed is not initialized: the candidates are this process's."
        )


def agree(
    draw: Draw, num_states: int, num_dims: int, num_columns: int, batch_size: int, device: Any
) -> tuple[Draw, Batches]:
    """Take the first process's draw, and learn the size of each one's batch.

    Args:
        draw: this process's; empty where it cannot be drawn yet.
        num_states: of the encoder; 0 where that is not known yet.
        num_dims: K, which the draw's indices are below.
        num_columns: C.
        batch_size: texts per column here.
        device: where collectives take their tensors from.

    Returns:
        The draw, and the ``Batches``.

    Raises:
        ValueError: on every process: fewer than two columns, differing numbers of them, or an empty batch.
    """
    message = torch.zeros(HEADER + num_states * (2 + num_dims), dtype=torch.float64)
    message[0], message[1] = num_columns, batch_size
    table = message[HEADER:].view(num_states, 2 + num_dims)
    for state, drawn in draw.items():
        table[state, 0], table[state, 1] = 1, drawn.weight
        table[state, [2 + k for k in drawn.dims]] = 1
    received = message.new_empty(dist.get_world_size() * len(message), device=device)
    _all_gather(received, message.to(device))
    messages = received.view(-1, len(message)).cpu()
    sizes = [int(size) for size in messages[:, 1]]
    _check([int(columns) for columns in messages[:, 0]], sizes)
    common: Draw = {}
    for state, (is_drawn, weight, *dims) in enumerate(messages[0, HEADER:].view(num_states, 2 + num_dims).tolist()):
        if is_drawn:
            common[state] = Drawn([k for k, used in enumerate(dims) if used], weight)
    return common, Batches(sizes, dist.get_rank())


def _check(columns: list[int], sizes: list[int]) -> None:
    if min(columns) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {columns} on the processes")
    if len(set(columns)) > 1:
        raise ValueError(f"every process must have the same number of columns, got {columns}")
    if min(sizes) < 1:
        raise ValueError(f"every process must have at least one text per column, got {sizes}")


def gather_rows(rows: Tensor, batches: Batches) -> Tensor:
    """The rows of every process, differentiably.

    Args:
        rows: (L, C * B, D), this process's rows of C columns, one column after the other.
        batches: every process's share.

    Returns:
        (L, C * sum(sizes), D): likewise, each column in the order of the processes.
    """
    size, largest = batches.sizes[batches.rank], max(batches.sizes)
    own = rows.unflatten(1, (-1, size))
    if size < largest:
        own = torch.nn.functional.pad(own, (0, 0, 0, largest - size))
    gathered = _Gather.apply(own.contiguous()).movedim(0, 2).flatten(2, 3)
    if min(batches.sizes) < largest:
        places = [rank * largest + i for rank, count in enumerate(batches.sizes) for i in range(count)]
        gathered = gathered.index_select(2, torch.tensor(places, device=gathered.device))
    return gathered.flatten(1, 2)


class _Gather(torch.autograd.Function):
    """All processes' tensors on a new first dimension; the adjoint sums their gradients where they came from."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.shape = own.shape
        gathered = own.new_empty(dist.get_world_size() * own.shape[0], *own.shape[1:])
        _all_gather(gathered, own)
        return gathered.view(-1, *own.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(ctx.shape)
        _reduce_scatter(own, grad.contiguous().flatten(0, 1))
        return own
