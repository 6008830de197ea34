"""Gradient caching: large batches of in-batch negatives in the memory of a mini-batch.

The texts are embedded in mini-batches without a graph, keeping the pooled rows of all layers alone; one loss over the
whole batch gives these rows' gradients; and the backward embeds each mini-batch once more, with the same random
numbers, to push its part of them through the model.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import tqdm
from sentence_transformers.base.losses.gradcache import RandContext, _create_minibatch, _minibatch_ranges
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
)
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from .embed import Features, embed_rows, select_layers

# Base losses that cache gradients by themselves, of one layer and dim; they are taken as a wish for the caching here.
CACHING_LOSSES = (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    CachedGISTEmbedLoss,
)


class Caching(NamedTuple):
    """How a batch is split. As in sentence-transformers' ``CachedMultipleNegativesRankingLoss``."""

    mini_batch_size: int | None  # texts of one column; not looked at where tokens are counted
    mini_batch_num_tokens: int | None  # tokens without padding, in place of the texts
    show_progress_bar: bool


def read_caching(
    mini_batch_size: int | None, mini_batch_num_tokens: int | None, show_progress_bar: bool
) -> Caching | None:
    """The options of a loss; None where it does not cache.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is not positive.
    """
    for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value <= 0:
            raise ValueError(f"{name} must be positive or None, got {value}")
    if mini_batch_size is None and mini_batch_num_tokens is None:
        return None
    return Caching(mini_batch_size, mini_batch_num_tokens, show_progress_bar)


def uncached(loss: Any) -> Any:
    """The loss that one with gradient caching computes over the whole batch; any other loss itself."""
    return getattr(loss, "loss", loss) if type(loss) in CACHING_LOSSES else loss


def choose_caching(own: Caching | None, loss: Any) -> Caching | None:
    """The options of a loss itself, or of the loss that it wraps.

    Raises:
        ValueError: both have some.
    """
    inner = getattr(loss, "_caching", None)
    if type(loss) in CACHING_LOSSES:
        inner = Caching(loss.mini_batch_size, loss.mini_batch_num_tokens, loss.show_progress_bar)
    if own is not None and inner is not None:
        raise ValueError(
            f"mini_batch_size and mini_batch_num_tokens must be None where {type(loss).__name__} has its own, "
            f"got {own.mini_batch_size} and {own.mini_batch_num_tokens}"
        )
    return own or inner


class MiniBatches:
    """One batch's texts in mini-batches, to be embedded twice.

    Args:
        wrapper: what is called, as in ``m2d_ext.losses.embed.embed_rows``.
        model: as there.
        columns: the feature dicts, which must stay as they are until the backward.
        caching: how to split them.
        norm: as there.
        deferred: whether the gradients of earlier layers may be deferred (``m2d_ext.deferred``).
    """

    def __init__(
        self,
        wrapper: Any,
        model: Any,
        columns: Sequence[Features],
        caching: Caching,
        norm: nn.Module | None = None,
        deferred: bool = False,
    ) -> None:
        self._embed = partial(embed_rows, wrapper, model, norm=norm)
        self._wrapper = wrapper
        self._caching = caching
        self._deferred = deferred
        ranges = [
            (column, begin, end)
            for column in columns
            for begin, end in _minibatch_ranges(column, caching.mini_batch_size, caching.mini_batch_num_tokens)
        ]
        self._parts = [_create_minibatch(column, begin, end) for column, begin, end in ranges]
        self._num_texts = sum(end - begin for _, begin, end in ranges)
        self._contexts: list[_Context] = []

    def pool(self, earlier: Sequence[int] | None) -> tuple[Tensor, int]:
        """The pooled rows (L, N, D) of the earlier layers wanted and the final one, and how many the encoder has."""
        replayed = torch.is_grad_enabled()
        self._contexts = []
        pooled, first, num_states = torch.empty(0), 0, 0
        with torch.no_grad():
            for part in self._progress(self._parts):
                if replayed:
                    self._contexts.append(_Context(part.values()))
                rows, num_states = self._embed([part], earlier)
                if first == 0:
                    pooled = rows.new_empty(rows.shape[0], self._num_texts, rows.shape[2])
                pooled[:, first : first + rows.shape[1]] = rows
                first += rows.shape[1]
        return pooled, num_states

    def push(self, pooled_grad: Tensor, earlier: Sequence[int] | None, layers: Sequence[int]) -> None:
        """Embed again and backpropagate.

        Args:
            pooled_grad: (len(layers), N, D).
            earlier: as in ``pool``.
            layers: those among the states so wanted that ``pooled_grad`` is of.

        Raises:
            RuntimeError: DistributedDataParallel would leave part of this backward unsynchronised.
        """
        _check_averages_all(self._wrapper)
        first = 0
        last = len(self._parts) - 1
        for i, (part, context) in enumerate(zip(self._progress(self._parts), self._contexts, strict=True)):
            with torch.enable_grad(), _synchronised(self._wrapper, i == last):
                with context.replayed():
                    rows, _ = self._embed([part], earlier, deferred=self._deferred)
                rows = select_layers(rows, layers)
                if rows.requires_grad:
                    rows.backward(pooled_grad[:, first : first + rows.shape[1]])
                first += rows.shape[1]

    def _progress(self, parts: Sequence[Features]) -> Iterable[Features]:
        return tqdm.tqdm(parts, desc="Embed mini-batches", disable=not self._caching.show_progress_bar)


class _Context:
    """The random numbers and the autocast under which a mini-batch was embedded."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        tensors = list(tensors)
        self._random = RandContext(*tensors)
        devices = {"cpu", *(tensor.device.type for tensor in tensors if isinstance(tensor, Tensor))}
        self._autocast = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in devices
        ]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._random)
            for device, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            yield


def _check_averages_all(wrapper: Any) -> None:
    """DistributedDataParallel takes the last mini-batch's backward for the whole, and averages nothing after it."""
    ddp = getattr(wrapper, "_orig_mod", wrapper)
    if not isinstance(ddp, DistributedDataParallel) or not ddp.require_backward_grad_sync:
        return
    nodes = (get_gradient_edge(parameter).node for parameter in ddp.parameters() if parameter.requires_grad)
    if any(torch._C._will_engine_execute_node(node) for node in nodes):
        raise RuntimeError(
            "a loss that caches gradients and one that does not cannot share a backward() under "
            "DistributedDataParallel, which would not average the latter's: cache both, or call backward() on each"
        )


@contextmanager
def _synchronised(wrapper: Any, now: bool) -> Iterator[None]:
    """Let DistributedDataParallel average gradients only with the last mini-batch, over those of all of them.

    With a static graph its very first backward must synchronise too, from which it learns the graph; averaging what
    is then averaged once more changes nothing.
    """
    ddp = getattr(wrapper, "_orig_mod", wrapper)
    if not isinstance(ddp, DistributedDataParallel):
        yield
    elif ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued:
        before = ddp.require_backward_grad_sync
        ddp.require_backward_grad_sync = True
        try:
            yield
        finally:
            ddp.require_backward_grad_sync = before
    else:
        with contextlib.nullcontext() if now else ddp.no_sync():
            yield
