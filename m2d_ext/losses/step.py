"""One step of a loss on the fused path: draw, embed, perhaps gather, and one fused loss over all cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.losses.gradcache import _get_batch_size
from torch import Tensor, nn

from .. import functional
from . import adapters
from .cached import Caching, MiniBatches
from .embed import Features, embed, embed_rows, is_packed, joined_packed, select_layers, transforms_rows
from .gather import Batches, Draw, agree, gather_rows, gathers
from .rows import Rows
from .score_kl import score_kls


class Cells(NamedTuple):
    """What a draw trains: the rows of W and V of the drawn states, the final one last."""

    dims: list[int]
    weights: list[list[float]]
    kl_weights: list[float]
    kl_temperature: float
    drawn: list[list[bool]]  # of each layer, whether it is trained at a dim, though perhaps by a KL of rankings alone


@dataclass(frozen=True)
class Step:
    """What a step does, whatever its batch.

    Args:
        wrapper: what is called: the model itself, or what wraps it.
        model: the SentenceTransformer.
        loss: the base loss of each cell.
        normalize: whether the embeddings are still to be normalised, as the model does.
        draw: one draw out of so many hidden states, the last of which is the final one.
        cells: the cells of a draw; the width D of the hidden states.
        num_dims: what the draw's indices of dims are below.
        num_states: how many hidden states the encoder has; None: all are asked for, and then they are counted.
        selects: whether only the drawn ones are asked for where their number is known.
        merge: from columns to the batches of the model's calls.
        norm: what the earlier hidden states pass through before they are pooled; None: nothing.
        deferred: whether the gradients of earlier layers may be deferred.
        caching: how to cache gradients; None: not at all.
        ranks_kl: whether the KL is one of rankings (``m2d_ext.losses.score_kl``), not of features.
        false_negative_margin: as ``m2d_ext.losses.rows.Rows`` has it.
    """

    wrapper: Any
    model: Any
    loss: Any
    normalize: bool
    draw: Callable[[int], Draw]
    cells: Callable[[Draw, int], Cells]
    num_dims: int
    num_states: int | None
    selects: bool
    merge: Callable[[Sequence[Features]], list[Features]]
    norm: nn.Module | None
    deferred: bool
    caching: Caching | None
    ranks_kl: bool = False
    false_negative_margin: float | None = None

    def run(self, columns: list[Features], labels: Any) -> "Result":
        """The loss of a batch of C feature dicts and its labels.

        Raises:
            ValueError: too few columns for the base loss, or too many; what the base loss says of labels.
            RuntimeError: the encoder returned another number of hidden states than ``num_states``.
        """
        return _Plan(self, columns, labels).run()


@dataclass(frozen=True)
class Result:
    """What came of a step."""

    loss: Tensor
    cross_entropies: Tensor  # (layers, K), detached, NaN where the weight is 0
    kl: Tensor  # (layers,), likewise
    layers: list[int]  # the hidden states of the draw
    cells: Cells
    num_states: int  # of the encoder

    def components(self, every: Draw, cells: Cells) -> dict[str, Tensor]:
        """The weighted cells and KLs by name, which add up to the loss, and so do their gradients.

        Args:
            every: all that may be drawn. It has a figure in every step, 0 where it was not: a Trainer gathers the
                processes' figures in the order in which each of them gives its own.
            cells: those of ``every``.
        """
        values = []
        for i, (row, kl_weight) in enumerate(zip(self.cells.weights, self.cells.kl_weights, strict=True)):
            values += [weight * self.cross_entropies[i, k] for k, weight in enumerate(row) if weight != 0]
            values += [kl_weight * self.kl[i]] if kl_weight != 0 else []
        drawn = dict(zip(_component_names(self.layers, self.cells), values, strict=True))
        parts = dict.fromkeys(_component_names(sorted(every), cells), self.loss.new_zeros(())) | drawn
        # One of them carries the gradient of all, and what rounding leaves between the loss and their sum.
        first = next(iter([*drawn, *parts]), "loss")
        parts[first] = self.loss - sum(part for name, part in parts.items() if name != first)
        return parts


def _component_names(layers: Sequence[int], cells: Cells) -> list[str]:
    names = []
    for layer, row, kl_weight in zip(layers, cells.weights, cells.kl_weights, strict=True):
        names += [f"layer_{layer}_dim_{dim}" for dim, weight in zip(cells.dims, row, strict=True) if weight != 0]
        names += [f"layer_{layer}_kl"] if kl_weight != 0 else []
    return names


class _Plan:
    """A step's draw and batch."""

    def __init__(self, step: Step, columns: list[Features], labels: Any) -> None:
        self._step = step
        self._columns = columns
        self._labels = labels
        self._directions = [] if step.false_negative_margin is not None else adapters.info_nce_directions(step.loss)
        self._gathers = gathers(step.loss)
        if step.ranks_kl and len(columns) < 2:
            raise ValueError(f"kl_target 'scores' needs at least 2 columns of texts, got {len(columns)}")
        self._batches: Batches | None = None
        self._draw: Draw = {}
        self._earlier: list[int] | None = None
        self.num_states = 0  # not known
        if step.num_states is not None:
            self._settle(step.num_states)
            if step.selects:
                self._earlier = sorted(self._draw)[:-1]
        elif self._gathers:
            self._agree()  # for the batches' sake: a bad one is to be known before the model is called
        adapters.check_columns(step.loss, len(columns))  # where processes agree, all or none of them raise

    def _settle(self, num_states: int) -> None:
        """Draw, and agree on it with the other processes."""
        self.num_states = num_states
        self._draw = self._step.draw(num_states)
        if self._gathers:
            self._agree()

    def _agree(self) -> None:
        shape = self.num_states, self._step.num_dims, len(self._columns)
        size = _get_batch_size(self._columns[0]) if self._columns else 0
        self._draw, self._batches = agree(self._draw, *shape, size, self._step.model.device)

    def _layers(self, num_states: int) -> list[int]:
        """Places of the drawn layers among the states that were asked for.

        Raises:
            RuntimeError: the draw was out of another number of states than the encoder returned.
        """
        # An encoder that was asked for none of its earlier states does not say how many it has.
        if self._draw and self._earlier != [] and num_states != self.num_states:
            raise RuntimeError(
                f"the encoder returned {num_states} hidden states, and {self.num_states} in the step before, out of "
                "which the layers were drawn; the next step counts them anew"
            )
        if self._earlier is not None:
            return list(range(len(self._earlier) + 1))
        if not self._draw:
            self._settle(num_states)
        return sorted(self._draw)

    def run(self) -> Result:
        step = self._step
        if step.caching is not None:
            return self._cached(step.caching)
        is_joined = bool(self._columns) and is_packed(self._columns[0])
        batches = joined_packed(self._columns) if is_joined else step.merge(self._columns)
        if self._gathers or step.ranks_kl or len(self._directions) != 1 or transforms_rows(step.model):
            pooled, num_states = embed_rows(step.wrapper, step.model, batches, self._earlier, step.norm, step.deferred)
            return self._of_pooled(select_layers(pooled, self._layers(num_states)))
        tokens, num_states = embed(step.wrapper, step.model, batches, self._earlier, step.norm)
        tokens = tokens.select(self._layers(num_states))
        cells = step.cells(self._draw, tokens.states[0].shape[-1])
        return self._result(functional.loss_of_tokens(tokens, deferred=step.deferred, **self._options(cells)), cells)

    def _cached(self, caching: Caching) -> Result:
        step = self._step
        batches = MiniBatches(step.wrapper, step.model, self._columns, caching, step.norm, step.deferred)
        pooled, num_states = batches.pool(self._earlier)
        layers = self._layers(num_states)
        pooled = select_layers(pooled, layers)
        pooled.requires_grad_(torch.is_grad_enabled())
        result = self._of_pooled(pooled)
        if not torch.is_grad_enabled():
            return result
        handle = result.loss.detach().requires_grad_()
        push = partial(batches.push, earlier=self._earlier, layers=layers)
        handle.register_hook(partial(_push, result.loss, pooled, push))
        return replace(result, loss=handle)

    def _of_pooled(self, pooled: Tensor) -> Result:
        cells = self._step.cells(self._draw, pooled.shape[-1])
        if len(self._directions) == 1 and not self._step.ranks_kl:
            return self._result(self._info_nce(pooled, cells, self._gathered_candidates(pooled)), cells)
        rows = self._rows(pooled, cells)
        if self._directions and not self._step.ranks_kl:
            return self._result(self._info_nce_of_directions(pooled, cells, rows), cells)
        if self._directions:
            without_kl = cells._replace(kl_weights=[0.0] * len(cells.kl_weights))
            loss, values, _ = self._info_nce_of_directions(pooled, without_kl, rows)
        else:
            loss, values = self._adapted(pooled, cells, rows)
        kl_loss, kl = self._ranking_kl(cells, rows) if self._step.ranks_kl else self._feature_kl(pooled, cells)
        return self._result((loss + kl_loss, values, kl), cells)

    def _rows(self, pooled: Tensor, cells: Cells) -> Rows:
        used = [k for k in range(len(cells.dims)) if any(row[k] for row in cells.drawn)]
        columns = list(pooled.chunk(len(self._columns), dim=1))
        gathered = columns
        if self._batches is not None:
            gathered = list(gather_rows(pooled, self._batches).chunk(len(columns), dim=1))
        return Rows(
            columns=columns,
            gathered=gathered,
            offset=0 if self._batches is None else self._batches.offset,
            dims=[cells.dims[k] for k in used],
            features=self._columns,
            labels=self._labels,
            gather=self._gather_detached,
            false_negative_margin=self._step.false_negative_margin,
            as_called=_present_autocast(pooled.device.type),
        )

    def _gather_detached(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return rows if self._batches is None else gather_rows(rows, self._batches)

    def _gathered_candidates(self, pooled: Tensor) -> Tensor | None:
        """All processes' candidates without their anchors; None without gathering."""
        if self._batches is None:
            return None
        return gather_rows(pooled[:, self._batches.sizes[self._batches.rank] :], self._batches)

    def _info_nce_of_directions(self, pooled: Tensor, cells: Cells, rows: Rows) -> functional.LossAndCells:
        """The mean over the loss's directions, each a cross-entropy of its own; and the KL."""
        share = 1 / len(self._directions)
        cells = cells._replace(weights=[[share * weight for weight in row] for row in cells.weights])
        gathers = self._batches is not None
        candidates = torch.cat(rows.gathered[1:], dim=1) if gathers else None
        loss, values, kl = self._info_nce(pooled, cells, candidates)
        if len(self._directions) > 1:
            turned = torch.cat([rows.columns[1], rows.columns[0]], dim=1)
            only_cells = {"num_columns": 2, "kl_weights": None, "hardness": 0.0, "own_hardness": 0.0}
            back, back_values, _ = self._info_nce(turned, cells, rows.gathered[0] if gathers else None, **only_cells)
            loss, values = loss + back, share * (values + back_values)
        return loss, values, kl

    def _info_nce(
        self, pooled: Tensor, cells: Cells, candidates: Tensor | None, **options: Any
    ) -> functional.LossAndCells:
        offset = 0 if self._batches is None else self._batches.offset
        return functional.loss_of_pooled(pooled, candidates, offset, **self._options(cells) | options)

    def _adapted(self, pooled: Tensor, cells: Cells, rows: Rows) -> tuple[Tensor, Tensor]:
        """The weighted sum of the cells, and each."""
        weights = torch.tensor(cells.weights, dtype=torch.float64, device=pooled.device)
        values = torch.full_like(weights, torch.nan)
        used = [cells.dims.index(dim) for dim in rows.dims]
        if not used:
            return pooled.sum() * 0, values.to(pooled.dtype)
        with torch.autocast(pooled.device.type, enabled=False):
            found = adapters.cells(self._step.loss, rows)
        values[:, used] = found.detach().where(weights[:, used] != 0, torch.nan)
        loss = (found * weights[:, used]).where(weights[:, used] != 0, 0).sum()
        return loss.to(pooled.dtype), values.to(pooled.dtype)

    def _ranking_kl(self, cells: Cells, rows: Rows) -> tuple[Tensor, Tensor]:
        """The weighted sum of the layers' KLs, and each: the mean over its dims."""
        pooled = rows.columns[0]
        if not rows.dims or not any(cells.kl_weights):
            return pooled.new_zeros(()), pooled.new_full((len(pooled),), torch.nan)
        with torch.autocast(pooled.device.type, enabled=False):
            found = score_kls(rows, adapters.score_scale(self._step.loss), cells.kl_temperature)
        used = [cells.dims.index(dim) for dim in rows.dims]
        shares = torch.tensor(cells.drawn, dtype=torch.float64, device=pooled.device)[:, used]
        shares /= shares.sum(1, keepdim=True).clamp(min=1)
        layers = (found * shares).sum(1)
        weights = torch.tensor(cells.kl_weights, dtype=torch.float64, device=pooled.device)
        kl = layers.detach().where(weights != 0, torch.nan)
        return (layers * weights).sum().to(pooled.dtype), kl.to(pooled.dtype)

    def _feature_kl(self, pooled: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """The KLs of all layers, weighted, and each; there is no ranking, so every text may be a column."""
        rows = pooled if pooled.shape[1] > 1 else pooled.repeat(1, 2, 1)
        loss, _, kl = functional.loss_of_pooled(
            rows,
            num_columns=rows.shape[1],
            dims=cells.dims[-1:],
            weights=[[0.0]] * len(rows),
            kl_weights=cells.kl_weights,
            kl_temperature=cells.kl_temperature,
            scale=1.0,
            normalize=self._step.normalize,
        )
        return loss, kl

    def _result(self, results: functional.LossAndCells, cells: Cells) -> Result:
        return Result(*results, layers=sorted(self._draw), cells=cells, num_states=self.num_states)

    def _options(self, cells: Cells) -> dict[str, Any]:
        step = self._step
        hardness, own_hardness = adapters.hardness(step.loss)
        return {
            "num_columns": len(self._columns),
            "hardness": hardness,
            "own_hardness": own_hardness,
            "scale": float(step.loss.scale),
            "normalize": step.normalize,
            "dims": cells.dims,
            "weights": cells.weights,
            "kl_weights": cells.kl_weights,
            "kl_temperature": cells.kl_temperature,
        }


def _present_autocast(device: str) -> Callable[[], torch.autocast]:
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _push(loss: Tensor, pooled: Tensor, push: Callable[[Tensor], None], grad_output: Tensor) -> None:
    """The backward of a loss that stands apart from its graph: to the pooled rows, and on through the model."""
    (pooled_grad,) = torch.autograd.grad(loss, pooled, grad_output, retain_graph=True)
    push(pooled_grad)
