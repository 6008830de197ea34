"""AdaptiveLayerLoss: a base loss at several layers."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from . import fallback, pipeline
from .matryoshka import MatryoshkaLoss, fused_loss, say_fallback
from .pipeline import Features

LayerWeighting: TypeAlias = Literal["uniform", "log", "linear"] | Callable[[int], float]


class AdaptiveLayerLoss(nn.Module):
    """Trains models that can be cut to fewer layers: a base loss on the final layer and on earlier ones.

    A drop-in for ``sentence_transformers.losses.AdaptiveLayerLoss``: the same loss, gradients, draws and errors.
    With k earlier layers drawn, out of the L - 1 whose index 0 is the embedding output,

        loss = last_layer_weight M(final) + sum_j prior_layers_weight w(j) M(j) / k + sum_j kl_div_weight T KL_j

    where M is the base loss and KL_j = KL(softmax(e_final / T) || softmax(e_j / T)), e_final detached. All layers
    cost one fused loss for a ``MultipleNegativesRankingLoss``, alone or in a ``MatryoshkaLoss``, behind Transformer,
    Pooling and perhaps Normalize; anything else runs the reference loop, and one log line says why.

    Li et al., "2D Matryoshka Sentence Embeddings", arXiv:2402.14776.

    Args:
        model: the model.
        loss: the base loss.
        n_layers_per_step: how many earlier layers to draw per step; -1 for all.
        last_layer_weight: weight of the final layer's loss.
        prior_layers_weight: weight of the mean of the earlier layers' losses.
        kl_div_weight: weight of the KL.
        kl_temperature: T; no KL if <= 0.
        layer_weighting: w(j): "uniform" 1, "log" 1 / (1 + ln(1 + j)), "linear" 1 / (1 + j), or a function of j.

        deferred: whether the earlier layers' gradients are added where autograd brings those layers' own, which takes
            less memory and time for the same values; wherever that cannot be, they are dense all the same.

    Raises:
        ValueError: an unknown ``layer_weighting``.
    """

    # Any, because the Trainer puts a wrapper in the model's place.
    model: Any
    loss: Any

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        n_layers_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: LayerWeighting = "uniform",
        *,
        deferred: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.n_layers_per_step = n_layers_per_step
        self.last_layer_weight = last_layer_weight
        self.prior_layers_weight = prior_layers_weight
        self.kl_div_weight = kl_div_weight
        self.kl_temperature = kl_temperature
        self.layer_weighting = layer_weighting
        self.deferred = deferred
        if not callable(layer_weighting) and layer_weighting not in ("uniform", "log", "linear"):
            raise ValueError(
                f'layer_weighting must be "uniform", "log", "linear", or a callable, but got {layer_weighting!r}.'
            )
        assert isinstance(self.model[0], Transformer)
        if uses_gradient_cache(loss):
            warnings.warn(f"AdaptiveLayerLoss is not compatible with {type(loss).__name__}.", stacklevel=2)

    def get_layer_weight(self, layer_idx: int) -> float:
        """w(layer_idx)."""
        if not isinstance(self.layer_weighting, str):
            return self.layer_weighting(layer_idx)
        if self.layer_weighting == "log":
            return 1.0 / (1.0 + math.log(1 + layer_idx))
        if self.layer_weighting == "linear":
            return 1.0 / (1 + layer_idx)
        return 1.0

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            sentence_features: C feature dicts of B texts each.
            labels: passed to the base loss.

        Returns:
            A scalar.

        Raises:
            TypeError: no SentenceTransformer inside ``self.model``.
        """
        features = list(sentence_features)
        model = self._unwrapped_model()
        reason = self._why_not_fused(model, features)
        if reason is None:
            return self._fused(model, features)
        say_fallback(self, reason)
        return fallback.adaptive_layer_loss(
            model,
            self.loss,
            features,
            labels,
            layers_per_step=self.n_layers_per_step,
            last_layer_weight=self.last_layer_weight,
            prior_layers_weight=self.prior_layers_weight,
            layer_weight=self.get_layer_weight,
            kl_weight=self.kl_div_weight,
            kl_temperature=self.kl_temperature,
        )

    def _unwrapped_model(self) -> BaseModel:
        model = pipeline.find_model(self.model)
        if not isinstance(model, BaseModel):
            raise TypeError(
                f"AdaptiveLayerLoss could not unwrap {type(self.model).__name__} to a BaseModel "
                f"(stopped at {type(model).__name__}). "
                "Expected DistributedDataParallel, torch.compile's OptimizedModule, or a BaseModel."
            )
        return model

    def _why_not_fused(self, model: BaseModel, features: list[Features]) -> str | None:
        base = self.loss
        if type(base) is MatryoshkaLoss:
            if pipeline.find_model(base.model) is not model:
                return "MatryoshkaLoss has another model"
            base = base.loss
        return pipeline.why_not_fused(model, base, features)

    def _fused(self, model: BaseModel, features: list[Features]) -> Tensor:
        # The draws come in the reference loop's order: the final layer's dims, the layers, each layer's dims.
        final_row = self._row()
        tokens = pipeline.layer_tokens(self.model, model, features)
        num_layers = tokens.num_layers
        weights = [[0.0] * len(final_row) for _ in range(num_layers)]
        kl_weights = [0.0] * num_layers
        weights[-1] = [self.last_layer_weight * w for w in final_row]
        layers = fallback.sample(num_layers - 1, self.n_layers_per_step)
        for layer in layers:
            row = self._row()
            factor = self.get_layer_weight(layer) / len(layers) * self.prior_layers_weight
            weights[layer] = [factor * w for w in row]
            kl_weights[layer] = self.kl_div_weight * self.kl_temperature if self.kl_temperature > 0 else 0.0
        return fused_loss(
            tokens,
            len(features),
            self.loss.loss if isinstance(self.loss, MatryoshkaLoss) else self.loss,
            pipeline.is_normalized(model),
            self.deferred,
            dims=self.loss.grid_dims if isinstance(self.loss, MatryoshkaLoss) else [tokens.states[0].shape[-1]],
            weights=weights,
            kl_weights=kl_weights,
            kl_temperature=self.kl_temperature if self.kl_temperature > 0 else 1.0,
        )

    def _row(self) -> list[float]:
        """One layer's weights over the dims, drawn anew."""
        return self.loss.row(self.loss.draw_dims()) if isinstance(self.loss, MatryoshkaLoss) else [1.0]

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        weighting = self.layer_weighting
        name = weighting if isinstance(weighting, str) else getattr(weighting, "__name__", "custom")
        return {
            "loss": type(self.loss).__name__,
            "n_layers_per_step": self.n_layers_per_step,
            "last_layer_weight": self.last_layer_weight,
            "prior_layers_weight": self.prior_layers_weight,
            "kl_div_weight": self.kl_div_weight,
            "kl_temperature": self.kl_temperature,
            "layer_weighting": name,
        }

    @property
    def citation(self) -> str:
        """BibTeX."""
        return """
@misc{li20242d,
    title={2D Matryoshka Sentence Embeddings},
    author={Xianming Li and Zongxi Li and Jing Li and Haoran Xie and Qing Li},
    year={2024},
    eprint={2402.14776},
    archivePrefix={arXiv},
    primaryClass={cs.CL}
}
"""
