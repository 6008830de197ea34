"""Matryoshka2dLoss: a base loss at several layers and dimensions."""

from collections.abc import Sequence
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from torch import nn

from .adaptive_layer import AdaptiveLayerLoss
from .matryoshka import MatryoshkaLoss
from .recipe import LayerWeighting, Pairs, read_pairs


class Matryoshka2dLoss(AdaptiveLayerLoss):
    """Trains models that can be cut to fewer layers and fewer dimensions.

    A drop-in for ``sentence_transformers.losses.Matryoshka2dLoss``: an ``AdaptiveLayerLoss`` around a
    ``MatryoshkaLoss`` around the base loss. ``n_layers_per_step=-1, n_dims_per_step=-1`` trains every cell.

    Li et al., "2D Matryoshka Sentence Embeddings", arXiv:2402.14776.

    Args:
        model: the model.
        loss: the base loss.
        matryoshka_dims: dimensions, in any order.
        matryoshka_weights: one weight per dimension; None: 1 each.
        n_layers_per_step: how many earlier layers to draw per step; -1 for all.
        n_dims_per_step: how many dims to draw per layer; -1 for all.
        last_layer_weight: weight of the final layer's loss.
        prior_layers_weight: weight of the mean of the earlier layers' losses.
        kl_div_weight: weight of the KL.
        kl_temperature: T; no KL if <= 0.
        layer_weighting: w(j) of the earlier layers: "uniform", "log", "linear", a list of numbers or a function.
        layers: earlier layers to train in every step, in place of a draw.
        pairs: the (layer, dim) cells to train in every step, in place of all draws; of the final layer too, which
            teaches in any case. Zhuang et al., "Starbucks", arXiv:2410.13230, counts layers as hidden states are
            counted here: 0 is the embedding output.
        kl_target: what the KL compares, "features" (embeddings) or "scores" (of the in-batch candidates).
        false_negative_margin: leave out candidates that the final layer finds more similar to the anchor than its
            positive by more than this.
        final_norm: "apply" gives the earlier layers the encoder's final norm, as a cut pre-norm model has it; "skip"
            as sentence-transformers.
        log_cells: return a dict of the weighted losses of all cells and KLs, which a Trainer logs.
        deferred: whether earlier layers' gradients are added where autograd brings those layers' own, for less memory
            and time.
        mini_batch_size: embed so many texts of a column at a time, twice (gradient caching).
        mini_batch_num_tokens: as many texts at a time as have so many tokens, in place of that.
        show_progress_bar: whether to show one over the mini-batches.

    All of it in more words at ``AdaptiveLayerLoss``.

    Raises:
        TypeError, ValueError: as the two losses that it is made of; ``pairs`` that are not pairs of ints, empty,
            negative, repeated, of other dims than ``matryoshka_dims``, with ``layers`` or with draws.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float | int] | None = None,
        n_layers_per_step: int = 1,
        n_dims_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: LayerWeighting = "uniform",
        *,
        layers: Sequence[int] | None = None,
        pairs: Pairs | None = None,
        kl_target: Literal["features", "scores"] = "features",
        false_negative_margin: float | None = None,
        final_norm: Literal["skip", "apply"] = "skip",
        log_cells: bool = False,
        deferred: bool = True,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model,
            MatryoshkaLoss(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step),
            n_layers_per_step=n_layers_per_step,
            last_layer_weight=last_layer_weight,
            prior_layers_weight=prior_layers_weight,
            kl_div_weight=kl_div_weight,
            kl_temperature=kl_temperature,
            layer_weighting=layer_weighting,
            layers=layers,
            kl_target=kl_target,
            false_negative_margin=false_negative_margin,
            final_norm=final_norm,
            log_cells=log_cells,
            deferred=deferred,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.pairs = read_pairs(pairs, self.loss.matryoshka_dims, layers, n_layers_per_step, n_dims_per_step)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        dims = self.loss.matryoshka_dims
        pairs = (
            [] if self.pairs is None else [(layer, dims[k]) for layer, places in self.pairs.items() for k in places]
        )
        return {**super().get_config_dict(), **self.loss.get_config_dict(), **({"pairs": pairs} if pairs else {})}
