"""The rows of all layers from one ``encode`` of sentence-transformers, whose prompts, batches and order they keep."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import final_norm
from ..losses.embed import Features, pool_all_layers, pooling_of, replaced_forward, replaced_forwards, returned_states
from ..losses.pipeline import why_not_model
from .truncate import CannotBeCutError, fewest_layers, find_layers, tried_view


class AllLayers:
    """A model that encodes to the rows of several layers at once.

    Args:
        model: Transformer, Pooling and modules that work on rows. Its modules, configuration and mode are after every
            ``encode`` what they were; the hooks by which transformers records hidden states stay on the encoder.
        layers: how many layers to keep, each; None: 0, where the architecture can be without, up to all.
        apply_norm: whether the earlier layers pass through the encoder's final norm, if it has one: what a model cut
            there does.

    Raises:
        ValueError: another pipeline; layers that the model does not have; hidden states that are not those of the
            model cut there.
    """

    def __init__(
        self, model: SentenceTransformer, layers: Sequence[int] | None = None, apply_norm: bool = True
    ) -> None:
        reason = why_not_model(model)
        if reason is not None:
            raise ValueError(f"model must be a Transformer, a Pooling and modules that work on rows, but {reason}")
        _, encoder_layers = find_layers(model[0].auto_model)
        count = len(encoder_layers)
        layers = range(fewest_layers(model), count + 1) if layers is None else layers
        if len(layers) == 0 or any(not 0 <= layer <= count for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"layers must be distinct and from 0 to {count} for this model, got {list(layers)}")
        self.model: Any = model
        self.layers = list(layers)
        self._earlier = sorted(layer for layer in layers if layer < count)
        self._norm: nn.Module | None = final_norm(model[0]) if apply_norm else None
        # The final layer comes last and in any case.
        self._places = [self._earlier.index(layer) if layer < count else len(self._earlier) for layer in layers]
        if apply_norm:
            self._check_states()

    def _check_states(self) -> None:
        """The last of the earlier hidden states is what the model cut there returns: Mamba's are counted otherwise."""
        if not self._earlier:
            return
        layer = self._earlier[-1]
        try:
            cut = tried_view(self.model, layer)
        except CannotBeCutError:  # who wants to is told then
            return
        if cut is None:
            return
        with cut.truncate_embeddings(None):
            expected = torch.from_numpy(cut.encode(["word"], show_progress_bar=False))[0]
        found = self.encode(["word"], show_progress_bar=False)[0, self.layers.index(layer), : len(expected)]
        if self.normalizes:
            found = F.normalize(found, dim=-1)
        error = (found - expected).norm() / expected.norm()
        if error > torch.finfo(cut.dtype).eps ** 0.5:
            raise ValueError(
                f"model must have hidden states that are its layers' outputs, but state {layer} of "
                f"{type(cut[0].auto_model).__name__} is not what its first {layer} layers give"
            )

    @property
    def normalizes(self) -> bool:
        """Whether the model normalises what it returns. The rows of ``encode`` are those before."""
        return isinstance(list(self.model.children())[-1], Normalize)

    @property
    def width(self) -> int:
        """How many dimensions the model returns: fewer than its rows have where it has a ``truncate_dim``."""
        return int(self.model.get_embedding_dimension())

    def encode(self, texts: Sequence[str], how: str = "encode", **options: Any) -> Tensor:
        """Rows of all layers.

        Args:
            texts: N.
            how: "encode", "encode_query" or "encode_document".
            options: prompts, batch_size, show_progress_bar.

        Returns:
            (N, layers, D) on the CPU, not normalised.
        """
        training = self.model.training
        try:
            with self._states_returned(), self.model.truncate_embeddings(None):
                rows = getattr(self.model, how)(list(texts), convert_to_numpy=True, **options)
        finally:
            self.model.train(training)
        return torch.from_numpy(rows).unflatten(1, (len(self._earlier) + 1, -1))[:, self._places]

    @contextmanager
    def _states_returned(self) -> Iterator[None]:
        pooling = pooling_of(self.model)
        forwards: dict[nn.Module, Any] = {pooling: partial(pool_all_layers, pooling, self._earlier, self._norm, False)}
        if self.normalizes:
            forwards[list(self.model.children())[-1]] = lambda features, **_: features
        with ExitStack() as stack:
            if self._earlier:
                stack.enter_context(returned_states(self.model, list(self._earlier)))
            stack.enter_context(replaced_forwards(self.model, forwards))
            stack.enter_context(replaced_forward(self.model, partial(self._side_by_side, self.model.forward)))
            yield

    def _side_by_side(self, forward: Any, features: Features, **options: Any) -> Features:
        """The model's forward, with the layers' rows of a text next to each other: a row a text, as encode wants."""
        output: Features = forward(features, **options)
        output["sentence_embedding"] = (
            output["sentence_embedding"].unflatten(0, (-1, len(self._earlier) + 1)).flatten(1)
        )
        return output
