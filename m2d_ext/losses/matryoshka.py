"""MatryoshkaLoss: a base loss at several embedding dimensions."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch import Tensor, nn

from . import fallback, pipeline
from .cached import Caching, choose_caching, read_caching, uncached
from .embed import Features, merged_candidates, transforms_rows
from .gather import Draw, Drawn, gathers
from .recipe import check_base_loss, margin_config, read_ints, read_margin
from .step import Cells, Step

logger = logging.getLogger("m2d_ext")


def say_fallback(loss: Any, reason: str) -> None:
    """One log line per loss object; none where another loss's loop, which said why, calls this one."""
    if fallback.is_looping(pipeline.find_model(loss.model)):
        return
    if getattr(loss, "_fallback_reason", None) != reason:
        object.__setattr__(loss, "_fallback_reason", reason)
        logger.warning("%s is falling back to the loop: %s.", type(loss).__name__, reason)


def check_uncached(loss: nn.Module, caching: Caching | None, reason: str) -> None:
    """ValueError where gradients are to be cached and only the reference loop would do."""
    if caching is not None and torch.is_grad_enabled():
        raise ValueError(f"{type(loss).__name__} cannot cache gradients (mini_batch_size) here: {reason}")


def check_fusable(loss: nn.Module, reason: str, **options: Any) -> None:
    """ValueError where an option is set that the reference loop does not have.

    Args:
        loss: ours.
        reason: why only the loop would do.
        options: by name, false where they are not set.
    """
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"{given[0]} needs the fused path, which {type(loss).__name__} does not take here: {reason}")


class MatryoshkaLoss(nn.Module):
    """Trains embeddings that can be cut to fewer dimensions: the sum of a base loss over prefixes of them.

    A drop-in for ``sentence_transformers.losses.MatryoshkaLoss``: the same loss, gradients and draws. All
    dims cost one loss for what ``m2d_ext.AdaptiveLayerLoss`` takes; anything else runs the reference loop, and
    one log line says why.

    Kusupati et al., "Matryoshka Representation Learning", arXiv:2205.13147.

    Args:
        model: the model.
        loss: the base loss.
        matryoshka_dims: dimensions, in any order.
        matryoshka_weights: one weight per dimension; None: 1 each.
        n_dims_per_step: how many dims to draw per step; -1 for all.
        false_negative_margin: leave out candidates whose cosine with the anchor exceeds its positive's by more than
            this, at full width and in every dim alike: they may be unlabelled positives. Zhang et al., "Qwen3
            Embedding", arXiv:2506.05176, take 0.1.
        mini_batch_size: embed so many texts of a column at a time, twice, and keep the activations of no more
            (gradient caching). None: the whole batch at once, or as a ``Cached…`` base loss says.
        mini_batch_num_tokens: as many texts at a time as have so many tokens, padding apart, in place of that.
        show_progress_bar: whether to show one over the mini-batches.

    Raises:
        TypeError: a dim or a size of mini-batches is not an int; a margin is not a number.
        ValueError: no dims, dims <= 0 or above the model's, or weights of another length; a margin for a base loss
            that ranks no candidates; a size of mini-batches that is not positive or given twice; a base loss that
            has layers or dims of its own.
    """

    # Any, because the Trainer puts a wrapper in the model's place.
    model: Any
    loss: Any

    def __init__(
        self,
        model: SentenceTransformer,
        loss: Any,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
        *,
        false_negative_margin: float | None = None,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        check_base_loss(loss)
        if not matryoshka_dims:
            raise ValueError("You must provide at least one dimension in matryoshka_dims.")
        if any(dim <= 0 for dim in matryoshka_dims):
            raise ValueError("All dimensions passed to a matryoshka loss must be > 0.")
        if matryoshka_weights is None:
            matryoshka_weights = [1] * len(matryoshka_dims)
        elif len(matryoshka_weights) != len(matryoshka_dims):
            raise ValueError("matryoshka_weights must be the same length as matryoshka_dims.")
        _check_width(model.get_embedding_dimension(), matryoshka_dims)

        dims = read_ints("matryoshka_dims", matryoshka_dims)
        pairs = sorted(zip(dims, matryoshka_weights, strict=True), key=lambda pair: pair[0], reverse=True)
        self.matryoshka_dims: tuple[int, ...] = tuple(dim for dim, _ in pairs)
        self.matryoshka_weights: tuple[float, ...] = tuple(weight for _, weight in pairs)
        self.n_dims_per_step = n_dims_per_step
        self.false_negative_margin = read_margin(false_negative_margin, loss)
        self._caching = choose_caching(read_caching(mini_batch_size, mini_batch_num_tokens, show_progress_bar), loss)
        self.uses_gradient_cache = uses_gradient_cache(loss)
        if self.uses_gradient_cache:
            loss.calculate_loss = fallback.CachedDims(
                loss.calculate_loss, self.matryoshka_dims, self.matryoshka_weights, n_dims_per_step
            )

    @property
    def grid_dims(self) -> list[int]:
        """The distinct dims, ascending: the columns of the grid."""
        return sorted(set(self.matryoshka_dims))

    def draw_dims(self) -> Sequence[int]:
        """This step's dims, as indices into ``matryoshka_dims``."""
        return sorted(fallback.sample(len(self.matryoshka_dims), self.n_dims_per_step))

    def row(self, drawn: Sequence[int]) -> list[float]:
        """The weights of ``grid_dims`` for the drawn dims; repeated dims add up."""
        weights = dict.fromkeys(self.grid_dims, 0.0)
        for index in drawn:
            weights[self.matryoshka_dims[index]] += float(self.matryoshka_weights[index])
        return list(weights.values())

    @torch.compiler.disable  # it replaces modules' forward for a call; a compiled model inside stays compiled
    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            sentence_features: C feature dicts of B texts each.
            labels: passed to the base loss.

        Returns:
            A scalar.

        Raises:
            ValueError: too few columns for the base loss; gradients are to be cached where there is no fused path, or
                a margin kept, or candidates gathered for columns of different lengths.
        """
        features = list(sentence_features)
        model = pipeline.find_model(self.model)
        reason = pipeline.why_not_settings(self) or pipeline.why_not_fused(
            model, self.loss, features, labels, cuts_dims=True
        )
        if reason is None:
            return self._fused(model, features, labels)
        check_fusable(
            self,
            reason,
            false_negative_margin=self.false_negative_margin is not None,
            gather_across_devices=reason == pipeline.RAGGED and gathers(self.loss),
        )
        if self.uses_gradient_cache:
            say_fallback(self, reason)
            return self.loss(features, labels)
        check_uncached(self, self._caching, reason)
        drawn = self.draw_dims()
        say_fallback(self, reason)
        return self.loop(features, labels, drawn)

    def loop(self, features: list[Features], labels: Tensor, drawn: Sequence[int]) -> Tensor:
        """The reference loop over the drawn dims (indices into ``matryoshka_dims``)."""
        return fallback.matryoshka_loss(
            self.model, self.loss, self.matryoshka_dims, self.matryoshka_weights, drawn, features, labels
        )

    def _fused(self, model: Any, features: list[Features], labels: Any) -> Tensor:
        step = Step(
            wrapper=self.model,
            model=model,
            loss=uncached(self.loss),
            normalize=pipeline.is_normalized(model) and not transforms_rows(model),
            draw=lambda _: {0: Drawn(self.draw_dims(), 1.0)},
            cells=self._cells,
            num_dims=len(self.matryoshka_dims),
            num_states=1,  # none but the final one
            selects=True,
            merge=merged_candidates,
            norm=None,
            deferred=False,
            caching=self._caching,
            false_negative_margin=self.false_negative_margin,
        )
        return step.run(features, labels).loss

    def _cells(self, draw: Draw, _: int) -> Cells:
        row = self.row(draw[0].dims)
        return Cells(self.grid_dims, [row], [0.0], 1.0, [[weight != 0 for weight in row]])

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        return {
            "loss": type(self.loss).__name__,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "n_dims_per_step": self.n_dims_per_step,
            **margin_config(self.false_negative_margin),
        }

    @property
    def citation(self) -> str:
        """BibTeX."""
        return """
@misc{kusupati2024matryoshka,
    title={Matryoshka Representation Learning},
    author={Aditya Kusupati and Gantavya Bhatt and Aniket Rege and Matthew Wallingford and Aditya Sinha and Vivek Ramanujan and William Howard-Snyder and Kaifeng Chen and Sham Kakade and Prateek Jain and Ali Farhadi},
    year={2024},
    eprint={2205.13147},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""  # noqa: E501


def _check_width(width: int | None, dims: Sequence[int]) -> None:
    """ValueError if a dim exceeds the model's; a warning if the full width is not trained."""
    if width is None:
        return
    if any(dim > width for dim in dims):
        raise ValueError(f"Dimensions in matryoshka_dims cannot exceed the model's embedding dimension of {width}.")
    if width not in dims:
        logger.warning(
            f"The model's embedding dimension {width} is not included in matryoshka_dims: {dims}. "
            "This means that the full model dimension won't be trained, which may lead to degraded performance "
            "when using the model without specifying a lower truncation dimension. It is strongly recommended to "
            f"include {width} in matryoshka_dims."
        )
