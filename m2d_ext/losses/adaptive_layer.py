"""AdaptiveLayerLoss: a base loss at several layers."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from ..architecture import final_norm as find_final_norm
from . import fallback, pipeline
from .cached import choose_caching, read_caching, uncached
from .embed import Features, depends_on_padding, merged_alike, pooling_of, transforms_rows
from .gather import Draw, Drawn, gathers, is_distributed
from .matryoshka import MatryoshkaLoss, check_fusable, check_uncached, say_fallback
from .recipe import (
    LayerWeighting,
    check_below,
    choose_layers,
    is_trained,
    margin_config,
    read_layer_weight,
    read_layers,
    read_margin,
    read_weighting,
)
from .step import Cells, Step


class AdaptiveLayerLoss(nn.Module):
    """Trains models that can be cut to fewer layers: a base loss on the final layer and on earlier ones.

    A drop-in for ``sentence_transformers.losses.AdaptiveLayerLoss``: the same loss, gradients and draws.
    With k earlier layers drawn, out of the L - 1 whose index 0 is the embedding output,

        loss = last_layer_weight M(final) + sum_j prior_layers_weight w(j) M(j) / k + sum_j kl_div_weight T KL_j

    where M is the base loss and KL_j = KL(softmax(e_final / T) || softmax(e_j / T)), e_final detached. All layers
    cost one pooling and one loss for sentence-transformers' own base losses, alone or in a ``MatryoshkaLoss``, and
    models of Transformer, perhaps WordWeights, Pooling and modules that work on rows (the README lists both); anything
    else runs the reference loop, and one log line says why.

    Li et al., "2D Matryoshka Sentence Embeddings", arXiv:2402.14776.

    Args:
        model: the model.
        loss: the base loss.
        n_layers_per_step: how many earlier layers to draw per step; -1 for all.
        last_layer_weight: weight of the final layer's loss.
        prior_layers_weight: weight of the mean of the earlier layers' losses.
        kl_div_weight: weight of the KL.
        kl_temperature: T; no KL if <= 0.
        layer_weighting: w(j): "uniform" 1, "log" 1 / (1 + ln(1 + j)), "linear" 1 / (1 + j), a list with one number per
            earlier layer, or a function of j.

        layers: earlier layers to train in every step, in place of a draw.
        kl_target: what the KL compares: "features" as above; "scores" what a cell makes of an anchor's in-batch
            candidates with what the final layer at full width makes of them, p and q being softmaxes of the base
            loss's scores over T. All its cells but the teacher are taught, the final layer's smaller dims too; a
            layer's KL is the mean over its dims.
        false_negative_margin: leave out candidates whose cosine with the anchor exceeds its positive's by more than
            this in the final layer at full width, in every cell alike: they may be unlabelled positives. Zhang et
            al., "Qwen3 Embedding", arXiv:2506.05176, take 0.1.
        final_norm: "apply" gives the earlier layers the encoder's final norm, if it has one: a pre-norm model that is
            cut to fewer layers applies it, so that this trains what will be served. "skip": as sentence-transformers.
        log_cells: return a dict of the weighted losses of all cells and KLs, which a Trainer adds up and logs as means
            over all steps: one that does not draw a cell counts as 0 there. Not in the reference loop, which returns
            their sum alone. In several processes a Trainer with several losses needs the same of all of them: it
            gathers the figures of one process beside those of another.
        deferred: whether the earlier layers' gradients are added where autograd brings those layers' own, which takes
            less memory and time for the same values; wherever that cannot be, they are dense all the same.
        mini_batch_size: embed so many texts of a column at a time, twice, and keep the activations of no more
            (gradient caching). None: the whole batch at once, or as a ``Cached…`` base loss says.
        mini_batch_num_tokens: as many texts at a time as have so many tokens, padding apart, in place of that.
        show_progress_bar: whether to show one over the mini-batches.

    Raises:
        TypeError: a layer or a size of mini-batches is not an int; a margin is not a number.
        ValueError: an unknown ``layer_weighting``, ``kl_target`` or ``final_norm``; a margin for a base loss that
            ranks no candidates; ``layers`` empty, negative, repeated or with
            ``n_layers_per_step``; a size of mini-batches that is not positive or given twice; a model whose encoder
            gives sentence embeddings by itself.
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
        layers: Sequence[int] | None = None,
        kl_target: Literal["features", "scores"] = "features",
        false_negative_margin: float | None = None,
        final_norm: Literal["skip", "apply"] = "skip",
        log_cells: bool = False,
        deferred: bool = True,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.n_layers_per_step = n_layers_per_step
        self.last_layer_weight = last_layer_weight
        self.prior_layers_weight = prior_layers_weight
        self.kl_div_weight = kl_div_weight
        self.kl_temperature = kl_temperature
        self.layer_weighting = read_weighting(layer_weighting)
        self.layers = read_layers(layers, n_layers_per_step)
        self.pairs: dict[int, list[int]] | None = None  # Matryoshka2dLoss: by layer, the indices of its dims
        if kl_target not in ("features", "scores"):
            raise ValueError(f"kl_target must be 'features' or 'scores', got {kl_target!r}")
        self.kl_target = kl_target
        self.false_negative_margin = read_margin(false_negative_margin, self._base_loss())
        if final_norm not in ("skip", "apply"):
            raise ValueError(f"final_norm must be 'skip' or 'apply', got {final_norm!r}")
        self.final_norm = final_norm
        self.log_cells = log_cells
        self.deferred = deferred
        # Learned from the encoder, each with what that was like.
        self._seen_states: tuple[_Encoder | None, int] = (None, 0)
        self._seen_norm: tuple[_Encoder | None, nn.Module | None] = (None, None)
        assert isinstance(self.model[0], Transformer)
        pipeline.check_layered(self.model[0])
        own = read_caching(mini_batch_size, mini_batch_num_tokens, show_progress_bar)
        self._caching = choose_caching(own, loss)
        if uses_gradient_cache(loss) and self._caching is None:
            warnings.warn(f"AdaptiveLayerLoss is not compatible with {type(loss).__name__}.", stacklevel=2)

    def get_layer_weight(self, layer_idx: int) -> float:
        """w(layer_idx)."""
        if callable(self.layer_weighting):
            return self.layer_weighting(layer_idx)
        if isinstance(self.layer_weighting, list):
            return self.layer_weighting[layer_idx]
        if self.layer_weighting == "log":
            return 1.0 / (1.0 + math.log(1 + layer_idx))
        if self.layer_weighting == "linear":
            return 1.0 / (1 + layer_idx)
        return 1.0

    @torch.compiler.disable  # it replaces modules' forward for a call; a compiled model inside stays compiled
    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            sentence_features: C feature dicts of B texts each.
            labels: passed to the base loss.

        Returns:
            A scalar; or the scalars that add up to it (``log_cells``).

        Raises:
            TypeError: no SentenceTransformer inside ``self.model``.
            ValueError: too few columns for the base loss; layers that the model does not have; a trained weight of a
                layer from a function; gradients are to be cached where there is no fused path, or rankings to be
                taught, or a margin kept, or candidates gathered for columns of different lengths.
            RuntimeError: the encoder returned another number of hidden states than in the step before.
        """
        features = list(sentence_features)
        model = self._unwrapped_model()
        reason = self._why_not_fused(model, features, labels)
        if reason is None:
            return self._fused(model, features, labels)
        check_uncached(self, self._caching, reason)
        margin = self._margin()
        check_fusable(
            self,
            reason,
            kl_target=self._ranks_kl(),
            false_negative_margin=margin is not None,
            gather_across_devices=reason == pipeline.RAGGED and gathers(self._base_loss()),
        )
        say_fallback(self, reason)
        return fallback.adaptive_layer_loss(
            model,
            lambda layer: self._loop(layer, features, labels),
            self._choose_layers,
            norm=self._norm(model),
            last_layer_weight=self._last_layer_weight,
            prior_layers_weight=self.prior_layers_weight,
            layer_weight=self.get_layer_weight,
            kl_weight=self.kl_div_weight,
            kl_temperature=self.kl_temperature,
        )

    def _loop(self, layer: int, features: list[Features], labels: Tensor) -> Tensor:
        """The base loss of one layer, -1 for the final one; with pairs, over that layer's dims."""
        if self.pairs is None:
            return self.loss(features, labels)
        return self.loss.loop(features, labels, self.pairs[max(self.pairs) if layer == -1 else layer])

    def _last_layer_weight(self, num_states: int) -> float:
        """0 for a final layer that is in no pair: it only teaches."""
        return self.last_layer_weight if self.pairs is None or num_states - 1 in self.pairs else 0.0

    def _choose_layers(self, num_states: int) -> Sequence[int]:
        if isinstance(self.layer_weighting, list) and len(self.layer_weighting) != num_states - 1:
            raise ValueError(
                f"layer_weighting must have one number per earlier layer, {num_states - 1} for this model, "
                f"got {len(self.layer_weighting)}"
            )
        if self.pairs is None:
            return choose_layers(num_states, self.layers, self.n_layers_per_step)
        check_below("pairs", list(self.pairs), num_states)
        return [layer for layer in self.pairs if layer < num_states - 1]

    def _unwrapped_model(self) -> BaseModel:
        model = pipeline.find_model(self.model)
        if not isinstance(model, BaseModel):
            raise TypeError(
                f"AdaptiveLayerLoss could not unwrap {type(self.model).__name__} to a BaseModel "
                f"(stopped at {type(model).__name__}). "
                "Expected DistributedDataParallel, torch.compile's OptimizedModule, or a BaseModel."
            )
        return model

    def _base_loss(self) -> Any:
        """The loss of one layer and dim."""
        return self.loss.loss if type(self.loss) is MatryoshkaLoss else self.loss

    def _why_not_fused(self, model: BaseModel, features: list[Features], labels: Any) -> str | None:
        cuts_dims = type(self.loss) is MatryoshkaLoss
        if cuts_dims and pipeline.find_model(self.loss.model) is not model:
            return "MatryoshkaLoss has another model"
        if cuts_dims and pipeline.is_hooked(self.loss):
            return "MatryoshkaLoss has hooks or a replaced forward"
        if isinstance(self.layer_weighting, nn.Module) and any(map(is_trained, self.layer_weighting.parameters())):
            return "AdaptiveLayerLoss has a layer_weighting that is trained"
        for wrapper in (self, self.loss) if cuts_dims else (self,):
            reason = pipeline.why_not_settings(wrapper)
            if reason is not None:
                return reason
        return pipeline.why_not_fused(model, self._base_loss(), features, labels, cuts_dims)

    def _fused(self, model: Any, features: list[Features], labels: Any) -> Tensor | dict[str, Tensor]:
        loss = uncached(self._base_loss())
        selects = self._selects()
        # A walk through all modules, and only who draws before the model is called has to know.
        encoder = _Encoder.of(model) if selects or gathers(loss) else None
        num_states = self._known_num_states(encoder)
        self._seen_states = (None, 0)  # until this step has shown that it is still right
        step = Step(
            wrapper=self.model,
            model=model,
            loss=loss,
            normalize=pipeline.is_normalized(model) and not transforms_rows(model),
            draw=self._draw,
            cells=self._cells,
            num_dims=len(self.loss.matryoshka_dims) if isinstance(self.loss, MatryoshkaLoss) else 1,
            num_states=num_states,
            selects=selects,
            merge=self._merge(model),
            norm=self._norm(model),
            deferred=self.deferred,
            caching=self._caching,
            ranks_kl=self._ranks_kl(),
            false_negative_margin=self._margin(),
        )
        result = step.run(features, labels)
        self._seen_states = (encoder, result.num_states)
        if not self.log_cells:
            return result.loss
        every = self._every_draw(result.num_states)
        return result.components(every, self._cells(every, result.cells.dims[-1]))

    def _merge(self, model: Any) -> Callable[[Sequence[Features]], list[Features]]:
        """Columns into the batches of the model's calls."""
        # Widths differ between processes, and these must call the model equally often: what wraps it communicates in
        # every call.
        if is_distributed():
            return list
        reads_prompts = not pooling_of(model).include_prompt
        return partial(merged_alike, may_pad=not depends_on_padding(model), reads_prompts=reads_prompts)

    def _norm(self, model: Any) -> nn.Module | None:
        """What the earlier hidden states pass through before they are pooled."""
        if self.final_norm == "skip":
            return None
        encoder = _Encoder.of(model)
        seen, norm = self._seen_norm
        if seen != encoder or (norm is not None and all(module is not norm for module in model[0].modules())):
            self._seen_norm = (encoder, find_final_norm(model[0]))
        return self._seen_norm[1]

    def _known_num_states(self, encoder: "_Encoder | None") -> int | None:
        """How many hidden states the same encoder returned."""
        seen, num_states = self._seen_states
        return num_states if encoder is not None and seen == encoder else None

    def _selects(self) -> bool:
        """Whether to ask for the drawn states alone. Not where all layers are trained; nor of a compiled encoder,
        which would be compiled again for each draw.
        """
        is_all = self.n_layers_per_step <= 0 and self.layers is None and self.pairs is None
        return not is_all and not pipeline.is_compiled(self.model)

    def _ranks_kl(self) -> bool:
        return self.kl_target == "scores" and self.kl_temperature > 0 and self.kl_div_weight != 0

    def _margin(self) -> float | None:
        """Also that of the MatryoshkaLoss which this one is around."""
        inner = self.loss.false_negative_margin if type(self.loss) is MatryoshkaLoss else None
        return inner if self.false_negative_margin is None else self.false_negative_margin

    def _draw(self, num_states: int) -> Draw:
        """In the reference loop's order: the final layer's dims, the layers, each layer's dims and weight."""
        final = num_states - 1
        draw = {final: Drawn(self._draw_dims(final), 1.0)}
        for layer in self._choose_layers(num_states):
            dims = self._draw_dims(layer)
            draw[layer] = Drawn(dims, read_layer_weight(self.get_layer_weight(layer)))
        return draw

    def _every_draw(self, num_states: int) -> Draw:
        """All that steps may draw between them."""
        num_dims = len(self.loss.matryoshka_dims) if isinstance(self.loss, MatryoshkaLoss) else 1
        if self.pairs is not None:
            return {layer: Drawn(self.pairs.get(layer, ()), 1.0) for layer in {*self.pairs, num_states - 1}}
        layers = range(num_states) if self.layers is None else [*self.layers, num_states - 1]
        return {layer: Drawn(range(num_dims), 1.0) for layer in layers}

    def _draw_dims(self, layer: int) -> Sequence[int]:
        if self.pairs is not None:
            return self.pairs.get(layer, ())
        return self.loss.draw_dims() if isinstance(self.loss, MatryoshkaLoss) else (0,)

    def _cells(self, draw: Draw, width: int) -> Cells:
        *earlier, final = sorted(draw)
        prior_weight, last_weight = float(self.prior_layers_weight), float(self.last_layer_weight)
        factors = [draw[j].weight / len(earlier) * prior_weight for j in earlier]
        has_kl = self.kl_temperature > 0
        kl_weight = float(self.kl_div_weight) * float(self.kl_temperature) if has_kl else 0.0
        matryoshka = isinstance(self.loss, MatryoshkaLoss)
        rows = [self.loss.row(draw[j].dims) if matryoshka else [1.0] for j in (*earlier, final)]
        return Cells(
            dims=self.loss.grid_dims if matryoshka else [width],
            weights=[[f * w for w in row] for f, row in zip((*factors, last_weight), rows, strict=True)],
            kl_weights=[kl_weight] * len(earlier) + [kl_weight if self._ranks_kl() else 0.0],
            kl_temperature=float(self.kl_temperature) if has_kl else 1.0,
            drawn=[[weight != 0 for weight in row] for row in rows],
        )

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        weighting = self.layer_weighting
        name = getattr(weighting, "__name__", "custom") if callable(weighting) else weighting
        return {
            "loss": type(self.loss).__name__,
            "n_layers_per_step": self.n_layers_per_step,
            "last_layer_weight": self.last_layer_weight,
            "prior_layers_weight": self.prior_layers_weight,
            "kl_div_weight": self.kl_div_weight,
            "kl_temperature": self.kl_temperature,
            "layer_weighting": name,
            **({} if self.layers is None else {"layers": self.layers}),
            **({} if self.kl_target == "features" else {"kl_target": self.kl_target}),
            **margin_config(self.false_negative_margin),
            **({} if self.final_norm == "skip" else {"final_norm": self.final_norm}),
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


class _Encoder(NamedTuple):
    """What is compared to know an encoder again, as it was."""

    module: nn.Module
    num_modules: int  # changes where layers are cut off or adapters are added
    num_hidden_layers: int | None  # of its configuration: how many of its layers some encoders run

    @classmethod
    def of(cls, model: Any) -> "_Encoder":
        encoder = model[0].auto_model
        num_modules = sum(1 for _ in encoder.modules())
        return cls(encoder, num_modules, getattr(encoder.config, "num_hidden_layers", None))
