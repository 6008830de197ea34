"""The loss loop for what has no fused path: sentence-transformers 6.2.0's algorithm, whichever version is installed.

The base loss runs once per (layer, dim). While it does, the model's forward is replaced by one that returns the
same states again, cut to a layer or a dimension; it is restored whatever happens.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from torch import Tensor

from .embed import Features, replaced_forward, returned_states


def sample(population: int, count: int) -> Sequence[int]:
    """``count`` of the first ``population`` indices in random order; all of them, in order and without a draw,
    where ``count`` is not in 1..population - 1.
    """
    indices = range(population)
    return random.sample(indices, count) if 0 < count < population else indices


def shrink(rows: Tensor, dim: int) -> Tensor:
    """The first ``dim`` dimensions, normalised (even at full width). ValueError if there are fewer."""
    if dim > rows.shape[-1]:
        raise ValueError(
            f"Dimension {dim} in matryoshka_dims cannot be greater than the model's embedding dimension: "
            f"{rows.shape[-1]}"
        )
    return F.normalize(rows[..., :dim], p=2, dim=-1)


class DimForward:
    """A model's forward whose outputs are kept from the first dim, then cut further for each next one.

    Dims descend, so each cut starts from the previous one. A dim equal to the first runs the model anew.
    """

    def __init__(self, forward: Callable[..., Features]) -> None:
        self.forward = forward
        self.first_dim: int | None = None
        self.dim = 0
        self.outputs: list[Features] = []
        self.next = 0

    def set_dim(self, dim: int) -> None:
        self.dim = dim
        self.next = 0

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        if self.first_dim in (None, self.dim):
            output = self.forward(features, **kwargs)
            self.outputs.append(output)
            self.first_dim = self.dim
        else:
            output = self.outputs[self.next]
        output["sentence_embedding"] = shrink(output["sentence_embedding"], self.dim)
        self.next += 1
        return output


class LayerForward:
    """A Transformer's forward that runs once, then returns an earlier layer's states as the token embeddings."""

    def __init__(self, forward: Callable[..., Features], model: Any, norm: Callable[[Tensor], Tensor] | None) -> None:
        self.forward = forward
        self.model = model
        self.norm = norm
        self.layer: int | None = None
        self.num_layers = 0

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        if self.layer is not None:
            states = features["all_layer_embeddings"][self.layer]
            return {**features, "token_embeddings": states if self.norm is None else self.norm(states)}
        with returned_states(self.model, True):
            output = self.forward(features, **kwargs)
        self.num_layers = len(output["all_layer_embeddings"])
        return output


class EmbeddingRecorder:
    """A model's forward that remembers the embeddings after all modules, for the KL."""

    def __init__(self, forward: Callable[..., Features]) -> None:
        self.forward = forward
        self.embeddings: list[Tensor] = []

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        output = self.forward(features, **kwargs)
        self.embeddings.append(output["sentence_embedding"])
        return output

    def take(self) -> Tensor:
        embeddings, self.embeddings = torch.cat(self.embeddings), []
        return embeddings


def is_looping(model: Any) -> bool:
    """Whether ``adaptive_layer_loss`` is at work on the model."""
    return isinstance(vars(model).get("forward"), EmbeddingRecorder)


class CachedDims:
    """``calculate_loss`` of a gradient-caching loss, over all dims.

    Such a loss re-embeds in its backward, when a replaced forward would be gone; but its embeddings are there to
    be cut. Each dim backpropagates to its own cut, and from there, weighted, to the embeddings.
    """

    def __init__(
        self, calculate_loss: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float], dims_per_step: int
    ) -> None:
        self.calculate_loss = calculate_loss
        self.dims = dims
        self.weights = weights
        self.dims_per_step = dims_per_step

    def __call__(self, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = 0.0
        for index in sample(len(self.dims), self.dims_per_step):
            loss = loss + self._one_dim(self.dims[index], self.weights[index], reps, *args, **kwargs)
        return loss

    def is_of(self, loss: Any) -> bool:
        """Whether ``loss`` computes nothing else than the method of its class over these dims."""
        return getattr(self.calculate_loss, "__func__", None) is type(loss).calculate_loss

    def _one_dim(self, dim: int, weight: float, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        cuts = [[shrink(rep, dim) for rep in column] for column in reps]
        if not torch.is_grad_enabled():
            return weight * self.calculate_loss(cuts, *args, **kwargs)
        leaves = [[cut.detach().requires_grad_() for cut in column] for column in cuts]
        loss = weight * self.calculate_loss(leaves, *args, **kwargs)
        for column, leaf_column in zip(cuts, leaves, strict=True):
            for cut, leaf in zip(column, leaf_column, strict=True):
                cut.backward(None if leaf.grad is None else weight * leaf.grad)
        return loss


def matryoshka_loss(
    model: Any,
    loss: Any,
    dims: Sequence[int],
    weights: Sequence[float],
    indices: Sequence[int],
    features: Sequence[Features],
    labels: Tensor,
) -> Tensor:
    """Weighted sum of ``loss`` over the given dims (indices into ``dims``, which descend)."""
    forward = DimForward(model.forward)
    total: Any = 0.0
    with replaced_forward(model, forward):
        for index in indices:
            forward.set_dim(dims[index])
            total = total + weights[index] * loss(features, _cut_labels(labels, dims[index], model))
    return total


def are_embeddings(labels: Any, model: Any) -> bool:
    """Whether labels are as wide as the embeddings: MatryoshkaLoss takes them for a teacher's."""
    if not isinstance(labels, Tensor) or labels.ndim not in (2, 3):
        return False
    return labels.shape[-1] == model.get_embedding_dimension()


def _cut_labels(labels: Any, dim: int, model: Any) -> Any:
    """A teacher's embeddings cut to the dim, as the embeddings are."""
    return labels[..., :dim] if are_embeddings(labels, model) else labels


def adaptive_layer_loss(
    model: Any,
    loss: Callable[[int], Tensor],
    choose_layers: Callable[[int], Sequence[int]],
    *,
    norm: Callable[[Tensor], Tensor] | None,
    last_layer_weight: Callable[[int], float],
    prior_layers_weight: float,
    layer_weight: Callable[[int], float],
    kl_weight: float,
    kl_temperature: float,
) -> Tensor:
    """``loss`` of the final layer, of the chosen earlier ones, and the KL between their embeddings.

    The final layer's loss runs first and is told -1; its weight may depend on how many there are, known only then.
    """
    layer_forward = LayerForward(model[0].forward, model, norm)
    recorder = EmbeddingRecorder(model.forward)
    with (
        replaced_forward(model[0], layer_forward),
        replaced_forward(model, recorder),
        column_merging_disabled(),  # states pass from one loss call to the next in the columns' own dicts
    ):
        total = loss(-1)
        total = total * last_layer_weight(layer_forward.num_layers)
        if kl_temperature > 0:
            teacher = F.softmax(recorder.take() / kl_temperature, dim=-1).detach()
        layers = choose_layers(layer_forward.num_layers)
        for layer in layers:
            layer_forward.layer = layer
            layer_loss = loss(layer)
            total = total + layer_loss * layer_weight(layer) / len(layers) * prior_layers_weight
            if kl_temperature > 0:
                student = F.log_softmax(recorder.take() / kl_temperature, dim=-1)
                kl = F.kl_div(student, teacher, reduction="batchmean")
                total = total + kl * kl_temperature * kl_weight
    return total
