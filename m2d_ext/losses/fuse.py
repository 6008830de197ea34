"""From a sentence-transformers loss object to its fused twin."""

from typing import Any

from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer import losses
from torch import nn

from .adaptive_layer import AdaptiveLayerLoss
from .matryoshka import MatryoshkaLoss
from .matryoshka_2d import Matryoshka2dLoss

LAYER_OPTIONS = (
    "n_layers_per_step",
    "last_layer_weight",
    "prior_layers_weight",
    "kl_div_weight",
    "kl_temperature",
    "layer_weighting",
)


def fuse(loss: Any) -> nn.Module:
    """The fused twin of an existing sentence-transformers loss, over the same model and base loss.

    Args:
        loss: a sentence-transformers ``Matryoshka2dLoss``, ``AdaptiveLayerLoss`` or ``MatryoshkaLoss``.

    Returns:
        The m2d_ext loss of that name and configuration.

    Raises:
        TypeError: any other type, a subclass included.
    """
    if type(loss) is losses.MatryoshkaLoss:
        return MatryoshkaLoss(
            loss.model,
            _without_dims(loss.loss),
            loss.matryoshka_dims,
            loss.matryoshka_weights,
            loss.n_dims_per_step,
        )
    if type(loss) is losses.Matryoshka2dLoss:
        inner = loss.loss
        return Matryoshka2dLoss(
            loss.model,
            _without_dims(inner.loss),
            inner.matryoshka_dims,
            inner.matryoshka_weights,
            n_dims_per_step=inner.n_dims_per_step,
            **_layer_options(loss),
        )
    if type(loss) is losses.AdaptiveLayerLoss:
        base = fuse(loss.loss) if type(loss.loss) is losses.MatryoshkaLoss else loss.loss
        return AdaptiveLayerLoss(loss.model, base, **_layer_options(loss))
    raise TypeError(
        "loss must be a sentence-transformers Matryoshka2dLoss, AdaptiveLayerLoss or MatryoshkaLoss, "
        f"got {type(loss).__module__}.{type(loss).__qualname__}"
    )


def _layer_options(loss: Any) -> dict[str, Any]:
    return {name: getattr(loss, name) for name in LAYER_OPTIONS}


def _without_dims(loss: Any) -> nn.Module:
    """Undo what a sentence-transformers MatryoshkaLoss did to a gradient-caching loss; the twin does it anew."""
    if uses_gradient_cache(loss) and hasattr(loss.calculate_loss, "matryoshka_dims"):
        loss.calculate_loss = loss.calculate_loss.fn
    return loss
