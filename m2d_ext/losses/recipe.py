"""Which layers and dims a step trains: drawn, as sentence-transformers does, or as the user lists them."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from . import adapters
from .cached import uncached
from .fallback import sample

LayerWeighting: TypeAlias = Literal["uniform", "log", "linear"] | Sequence[float] | Callable[[int], float]
Pairs: TypeAlias = Sequence[tuple[int, int]]


def read_layers(layers: Sequence[int] | None, layers_per_step: int) -> list[int] | None:
    """The layers to train in every step, ascending.

    Raises:
        TypeError: they are not ints.
        ValueError: none, repeated or negative ones; or layers are to be drawn as well.
    """
    if layers is None:
        return None
    layers = _read_indices("layers", layers)
    if len(layers) == 0:
        raise ValueError("layers must hold at least one layer, got none")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must be distinct, got {list(layers)}")
    _check_no_draw("layers", "n_layers_per_step", layers_per_step)
    return sorted(layers)


def read_pairs(
    pairs: Pairs | None, dims: Sequence[int], layers: Any, layers_per_step: int, dims_per_step: int
) -> dict[int, list[int]] | None:
    """For each layer of the pairs the indices of its dims, both ascending.

    Raises:
        TypeError: they are not pairs of ints.
        ValueError: none, repeated ones, a negative layer, a dim that is not among ``dims``; or layers are given too,
            or layers or dims are to be drawn.
    """
    if pairs is None:
        return None
    if any(len(tuple(pair)) != 2 for pair in pairs):
        raise TypeError(f"pairs must be (layer, dim) tuples, got {list(pairs)}")
    pairs = [(layer, dim) for layer, dim in (_read_indices("pairs", pair) for pair in pairs)]
    if len(pairs) == 0:
        raise ValueError("pairs must hold at least one (layer, dim), got none")
    if len(set(map(tuple, pairs))) < len(pairs):
        raise ValueError(f"pairs must be distinct, got {list(pairs)}")
    if layers is not None:
        raise ValueError("layers must be None where pairs are given: they name the layers")
    _check_no_draw("pairs", "n_layers_per_step", layers_per_step)
    _check_no_draw("pairs", "n_dims_per_step", dims_per_step)
    unknown = sorted({dim for _, dim in pairs} - set(dims))
    if unknown:
        raise ValueError(f"pairs must take their dims from matryoshka_dims {list(dims)}, got {unknown}")
    places: dict[int, list[int]] = {}
    for layer, place in sorted((layer, list(dims).index(dim)) for layer, dim in pairs):
        places.setdefault(layer, []).append(place)
    return places


def read_weighting(weighting: LayerWeighting) -> LayerWeighting:
    """A list as floats; anything else as it is.

    Raises:
        ValueError: neither a known name, nor callable, nor numbers.
    """
    if callable(weighting) or weighting in ("uniform", "log", "linear"):
        return weighting
    if isinstance(weighting, Sequence) and not isinstance(weighting, str):
        return [float(weight) for weight in weighting]
    raise ValueError(f'layer_weighting must be "uniform", "log", "linear", or a callable, but got {weighting!r}.')


def is_trained(setting: Any) -> bool:
    """Whether a setting wants a gradient, which only the reference loop gives: for the fused path they are numbers."""
    return isinstance(setting, Tensor) and setting.requires_grad


def read_layer_weight(weight: Any) -> float:
    """What a function gave for a layer.

    Raises:
        ValueError: it wants a gradient. That is seen only once the layers are drawn: too late for the reference loop.
    """
    if is_trained(weight):
        raise ValueError(
            "layer_weighting must be a torch.nn.Module with the parameters of its weights where these are trained; "
            "got a function that returned a tensor which requires a gradient"
        )
    return float(weight)


def read_margin(margin: float | None, loss: Any) -> float | None:
    """The margin of false negatives as a float.

    Args:
        margin: the user's.
        loss: the base loss.

    Raises:
        TypeError: not a number.
        ValueError: not finite; or the loss ranks no candidates.
    """
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"false_negative_margin must be a number or None, got {type(margin).__name__}")
    if not math.isfinite(margin):
        raise ValueError(f"false_negative_margin must be finite, got {margin}")
    if not adapters.is_ranking(uncached(loss)):
        raise ValueError(
            "false_negative_margin must be None for a base loss that ranks no in-batch candidates, "
            f"{type(loss).__name__}, got {margin}"
        )
    return float(margin)


def check_base_loss(loss: Any) -> None:
    """ValueError where the loss of one dim is itself one of layers or dims."""
    if hasattr(loss, "matryoshka_dims") or hasattr(loss, "n_layers_per_step"):
        raise ValueError(
            f"loss must be of the embeddings as they are, got {type(loss).__name__}, which has layers or dims of its "
            "own; for both together there is Matryoshka2dLoss, or AdaptiveLayerLoss around MatryoshkaLoss"
        )


def margin_config(margin: float | None) -> dict[str, float]:
    """What a model card says of it."""
    return {} if margin is None else {"false_negative_margin": margin}


def choose_layers(num_states: int, layers: Sequence[int] | None, layers_per_step: int) -> Sequence[int]:
    """This step's layers below the final one, in the order in which their dims are drawn.

    Raises:
        ValueError: a listed layer is not below the final one.
    """
    if layers is None:
        return sample(num_states - 1, layers_per_step)
    check_below("layers", layers, num_states - 1)
    return layers


def check_below(name: str, layers: Sequence[int], limit: int) -> None:
    """ValueError where a layer is not below the limit."""
    if any(layer >= limit for layer in layers):
        raise ValueError(f"{name} must be of layers below {limit} for this model, got {list(layers)}")


def read_ints(name: str, values: Sequence[int]) -> list[int]:
    """Ints of any library. TypeError where one is none."""
    if any(isinstance(value, bool) for value in values):
        raise TypeError(f"{name} must be ints, got {list(values)}")
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be ints, got {list(values)}") from None


def _read_indices(name: str, values: Sequence[int]) -> list[int]:
    indices = read_ints(name, values)
    if any(index < 0 for index in indices):
        raise ValueError(f"{name} must not be negative: 0 is the embedding output, got {indices}")
    return indices


def _check_no_draw(name: str, option: str, count: int) -> None:
    """-1 is all of them, and 1 a default."""
    if count not in (-1, 1):
        raise ValueError(f"{option} must be left as it is where {name} are given, got {count}")
