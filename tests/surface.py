"""Every loss class of sentence-transformers as the base loss of ours: what each one needs, and what comes of it.

`ROWS` says how random configurations of a class are made, and nothing of what comes out. `observe` runs one of them
in sentence-transformers and here, holds the two to each other, and tells the path that was taken. `render` writes
what was observed as docs/losses.md.
"""

from __future__ import annotations

import enum
import functools
import inspect
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.util import (
    dot_score,
    manhattan_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
)
from torch import Tensor, nn

import m2d_ext
from parity import Outcome, judge, recorded_fallbacks, run
from tiny_models import ARCHITECTURES, HIDDEN, features_of, sentence, tiny_model

WRAPPERS = ("MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss")
EXAMPLES = 20  # random configurations of every cell of the table
TOLERANCE = 1e-9  # in float64, where a difference of the formulas shows at once; test_losses_parity.py has float32

# Of a model and of the library whose wrapper is around: only losses made of other wrappers look at the second.
BaseBuilder = Callable[[Any, Any], nn.Module]


# ---------------------------------------------------------------- what a class needs


@dataclass(frozen=True)
class Base:
    """A base loss with the batch that it reads."""

    build: BaseBuilder
    columns: int = 2
    labels: Tensor | None = None
    # Given to sentence-transformers where it raises with `build`: the same values in another way.
    stand_in: BaseBuilder | None = None


@dataclass(frozen=True)
class Row:
    """A class with some of its options: one line of the table."""

    loss: str
    draw: Callable[[random.Random, int], Base]  # with random options, for a batch size
    options: str = ""
    normalize: bool | None = None  # whether the model does; None for both
    architectures: Sequence[str] = ARCHITECTURES
    raises: str = ""  # why, in words, where sentence-transformers raises

    @property
    def name(self) -> str:
        return f"{self.loss}, {self.options.replace('`', '')}" if self.options else self.loss


def seeded(build: BaseBuilder) -> BaseBuilder:
    """With the same weights of its own, wherever it is built."""

    def build_seeded(model: Any, library: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(model, library)

    return build_seeded


def class_of(name: str, **options: Any) -> BaseBuilder:
    return seeded(lambda model, _: getattr(st_losses, name)(model, **options))


def normal(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rng.getrandbits(31)))


def plain(name: str, columns: int = 2, **choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    """A class that reads no labels; every option is drawn from its choices."""

    def draw(rng: random.Random, _: int) -> Base:
        return Base(class_of(name, **drawn(rng, choices)), columns)

    return draw


def drawn(rng: random.Random, choices: dict[str, Sequence[Any]]) -> dict[str, Any]:
    return {option: rng.choice(values) for option, values in choices.items()}


DIRECTIONS = (
    ("query_to_doc", "doc_to_query"),
    ("query_to_doc", "query_to_query"),
    ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
)


def directions_and_hardness(name: str, **choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    def draw(rng: random.Random, _: int) -> Base:
        options = drawn(rng, {"scale": (1.0, 5.0, 20.0), **choices})
        options["directions"] = rng.choice(DIRECTIONS)
        if len(options["directions"]) == 2 and "doc_to_query" in options["directions"]:
            options["partition_mode"] = rng.choice(["joint", "per_direction"])
        options["hardness_mode"] = rng.choice([None, "in_batch_negatives", "hard_negatives", "all_negatives"])
        options["hardness_strength"] = rng.choice([0.5, 5.0]) if options["hardness_mode"] else 0.0
        # Gradient caching runs the loss itself over the whole batch, whatever is around it.
        return Base(class_of(name, **options), rng.choice([2, 3, 4]), stand_in=uncached(name, options))

    return draw


CACHING_OPTIONS = ("mini_batch_size", "mini_batch_num_tokens")


def uncached(name: str, options: dict[str, Any]) -> BaseBuilder | None:
    """The class without gradient caching, where there is one."""
    if not name.startswith("Cached"):
        return None
    kept = {option: value for option, value in options.items() if option not in CACHING_OPTIONS}
    return class_of(name.removeprefix("Cached"), **kept)


def cached(name: str, columns: Sequence[int] = (2, 3), **choices: Sequence[Any]) -> Callable[..., Base]:
    def draw(rng: random.Random, _: int) -> Base:
        options = drawn(rng, {"mini_batch_size": (1, 2, 3, 64), **choices})
        return Base(class_of(name, **options), rng.choice(columns), stand_in=uncached(name, options))

    return draw


def guided(name: str, **choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    def draw(rng: random.Random, _: int) -> Base:
        options = drawn(
            rng,
            {
                "temperature": (0.05, 0.5),
                "margin_strategy": ("absolute", "relative"),
                "margin": (0.0, 0.1),
                "contrast_anchors": (True, False),
                "contrast_positives": (True, False),
                "guide": [guide()],
                **choices,
            },
        )
        return Base(class_of(name, **options), rng.choice([2, 3]), stand_in=uncached(name, options))

    return draw


@functools.cache
def guide() -> SentenceTransformer:
    return tiny_model("mpnet", seed=5).eval().double()


def pair_scores(name: str, **choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    """One score per pair, some of them equal."""

    def draw(rng: random.Random, batch: int) -> Base:
        labels = torch.tensor([rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(batch)])
        return Base(class_of(name, **drawn(rng, choices)), labels=labels)

    return draw


def angle(rng: random.Random, batch: int) -> Base:
    base = pair_scores("AnglELoss", scale=(1.0, 20.0))(rng, batch)
    if rng.random() < 0.5:
        return base
    return Base(base.build, columns=3, labels=rng.choice([None, base.labels]))


def binary(name: str, **choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    def draw(rng: random.Random, batch: int) -> Base:
        labels = torch.tensor([i % 2 for i in rng.sample(range(batch), batch)])
        return Base(class_of(name, **drawn(rng, choices)), labels=labels)

    return draw


SIAMESE = (
    st_losses.SiameseDistanceMetric.EUCLIDEAN,
    st_losses.SiameseDistanceMetric.MANHATTAN,
    st_losses.SiameseDistanceMetric.COSINE_DISTANCE,
)
TRIPLET = (
    st_losses.TripletDistanceMetric.EUCLIDEAN,
    st_losses.TripletDistanceMetric.MANHATTAN,
    st_losses.TripletDistanceMetric.COSINE,
)
BATCH_DISTANCES = (
    st_losses.BatchHardTripletLossDistanceFunction.euclidean_distance,
    st_losses.BatchHardTripletLossDistanceFunction.cosine_distance,
)


def text_classes(name: str, **choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    """One column of texts of several classes, two texts at least of each."""

    def draw(rng: random.Random, batch: int) -> Base:
        labels = torch.tensor([i % 2 for i in rng.sample(range(batch), batch)])
        options = drawn(rng, {"distance_metric": BATCH_DISTANCES, **choices})
        return Base(class_of(name, **options), columns=1, labels=labels)

    return draw


def softmax(rng: random.Random, batch: int) -> Base:
    labels = torch.tensor([rng.randrange(3) for _ in range(batch)])
    options = drawn(rng, {f"concatenation_sent_{what}": (True, False) for what in ("difference", "multiplication")})
    return Base(class_of("SoftmaxLoss", embedding_dimension=HIDDEN, num_labels=3, **options), labels=labels)


def teacher_margins(**choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    def draw(rng: random.Random, batch: int) -> Base:
        columns = rng.choice([3, 4])
        # Margins, or the scores that they are differences of.
        labels = normal(rng, batch, columns - rng.choice([1, 2]))
        if columns == 3 and rng.random() < 0.3:
            labels = labels[:, 0]
        return Base(class_of("MarginMSELoss", **drawn(rng, choices)), columns, labels)

    return draw


def teacher_scores(**choices: Sequence[Any]) -> Callable[[random.Random, int], Base]:
    def draw(rng: random.Random, batch: int) -> Base:
        columns = rng.choice([3, 4])
        options = drawn(rng, {"student_temperature": (0.5, 1.0), "teacher_temperature": (1.0, 2.0), **choices})
        return Base(class_of("DistillKLDivLoss", **options), columns, normal(rng, batch, columns - 1))

    return draw


def teacher_embeddings(name: str, width: int = HIDDEN, **options: Any) -> Callable[[random.Random, int], Base]:
    def draw(rng: random.Random, batch: int) -> Base:
        columns = rng.choice([1, 2])
        shape = rng.choice([(batch, width), (batch, columns, width)])
        return Base(class_of(name, **options), columns, normal(rng, *shape))

    return draw


def orthogonal(rng: random.Random, _: int) -> Base:
    options = drawn(
        rng,
        {"mean_weight": (1.0, 0.3, None), "second_moment_weight": (1.0, 2.0), "aggregation": ("mean", "sum")},
    )
    build = class_of("GlobalOrthogonalRegularizationLoss", **options)
    return Base(build, rng.choice([1, 2, 3]), stand_in=lambda model, library: Summed(build(model, library)))


class Summed(nn.Module):
    """The sum of what a loss returns as a dict, which sentence-transformers adds up in its Trainer alone."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *inputs: Any) -> Tensor:
        return sum(self.loss(*inputs).values())


def nested(name: str, of_ours: bool) -> Callable[[random.Random, int], Base]:
    """A wrapper as base loss of another."""
    options: dict[str, Any] = {}
    if name != "AdaptiveLayerLoss":
        options |= {"matryoshka_dims": [HIDDEN, 16], "n_dims_per_step": -1}
    if name != "MatryoshkaLoss":
        options |= {"n_layers_per_step": -1}

    def build(model: Any, library: Any) -> nn.Module:
        inner = library if of_ours else st_losses
        return getattr(inner, name)(model, st_losses.MultipleNegativesRankingLoss(model), **options)

    return lambda *_: Base(build)


def denoising(rng: random.Random, _: int) -> Base:
    tie = rng.random() < 0.5

    def build(model: Any, _: Any) -> nn.Module:
        folder = saved_encoder(model[0].auto_model.config.num_hidden_layers)
        model[0].auto_model.config._name_or_path = folder
        return st_losses.DenoisingAutoEncoderLoss(model, None if tie else folder, tie_encoder_decoder=tie)

    return Base(seeded(build))


_folders: list[tempfile.TemporaryDirectory[str]] = []  # they go when the process does


@functools.cache
def saved_encoder(num_layers: int) -> str:
    """A folder with the encoder, which a decoder is made from."""
    _folders.append(tempfile.TemporaryDirectory())
    model = tiny_model("bert", num_layers=num_layers)
    model[0].auto_model.save_pretrained(_folders[-1].name)
    model.tokenizer.save_pretrained(_folders[-1].name)
    return _folders[-1].name


CUT_COPY = "the loss compares with a copy of the model made before, whose embeddings nothing cuts"
FIXED_WIDTH = "a layer of the loss is as wide as the whole embedding"
NOT_LAYERED = "gradient caching embeds again in the backward pass, when the layers are no longer replaced"
NESTED = "each of the two would replace the model's forward"

ROWS: tuple[Row, ...] = (
    # ranking in a batch
    Row("MultipleNegativesRankingLoss", plain("MultipleNegativesRankingLoss", scale=(1.0, 5.0, 20.0, 50.0))),
    Row(
        "MultipleNegativesRankingLoss",
        directions_and_hardness("MultipleNegativesRankingLoss"),
        "`directions`, `partition_mode`, `hardness_mode`",
    ),
    Row(
        "MultipleNegativesRankingLoss",
        directions_and_hardness("MultipleNegativesRankingLoss", similarity_fct=[dot_score]),
        "`similarity_fct=dot_score`, normalised embeddings",
        normalize=True,
    ),
    Row(
        "MultipleNegativesRankingLoss",
        plain("MultipleNegativesRankingLoss", similarity_fct=[dot_score], scale=(0.5, 2.0)),
        "`similarity_fct=dot_score`, other embeddings",
        normalize=False,
    ),
    Row(
        "MultipleNegativesRankingLoss",
        plain("MultipleNegativesRankingLoss", similarity_fct=[manhattan_sim], scale=(0.2, 1.0)),
        "another `similarity_fct`",
    ),
    Row("MultipleNegativesSymmetricRankingLoss", plain("MultipleNegativesSymmetricRankingLoss", 3, scale=(1.0, 20.0))),
    Row(
        "CachedMultipleNegativesRankingLoss",
        directions_and_hardness("CachedMultipleNegativesRankingLoss", mini_batch_size=(1, 2, 64)),
        raises=NOT_LAYERED,
    ),
    Row(
        "CachedMultipleNegativesSymmetricRankingLoss",
        cached("CachedMultipleNegativesSymmetricRankingLoss", scale=(1.0, 20.0)),
        raises=NOT_LAYERED,
    ),
    Row("GISTEmbedLoss", guided("GISTEmbedLoss")),
    Row("CachedGISTEmbedLoss", guided("CachedGISTEmbedLoss", mini_batch_size=(1, 2, 64)), raises=NOT_LAYERED),
    Row("MegaBatchMarginLoss", cached("MegaBatchMarginLoss", (2,), negative_margin=(0.1, 0.3)), raises=NOT_LAYERED),
    Row(
        "MegaBatchMarginLoss",
        plain("MegaBatchMarginLoss", use_mini_batched_version=[False], negative_margin=(0.1, 0.3)),
        "`use_mini_batched_version=False`",
    ),
    Row("ContrastiveTensionLoss", plain("ContrastiveTensionLoss"), raises=CUT_COPY),
    Row(
        "ContrastiveTensionLossInBatchNegatives",
        plain("ContrastiveTensionLossInBatchNegatives", 1, scale=(1.0, 20.0)),
        raises=CUT_COPY,
    ),
    # scores of pairs
    Row("CoSENTLoss", pair_scores("CoSENTLoss", scale=(1.0, 20.0))),
    Row("CoSENTLoss", pair_scores("CoSENTLoss", similarity_fct=[pairwise_euclidean_sim]), "another `similarity_fct`"),
    Row("AnglELoss", angle),
    Row("CosineSimilarityLoss", pair_scores("CosineSimilarityLoss")),
    Row(
        "CosineSimilarityLoss",
        pair_scores(
            "CosineSimilarityLoss", loss_fct=[nn.L1Loss(), nn.MSELoss()], cos_score_transformation=[nn.Sigmoid()]
        ),
        "another `loss_fct` or `cos_score_transformation`",
    ),
    Row("ContrastiveLoss", binary("ContrastiveLoss", distance_metric=SIAMESE, size_average=(True, False))),
    Row("OnlineContrastiveLoss", binary("OnlineContrastiveLoss", distance_metric=SIAMESE, margin=(0.5, 2.0))),
    Row("SoftmaxLoss", softmax, raises=FIXED_WIDTH),
    # triplets and classes
    Row("TripletLoss", plain("TripletLoss", 3, distance_metric=TRIPLET, triplet_margin=(5, 0.5))),
    Row("BatchAllTripletLoss", text_classes("BatchAllTripletLoss", margin=(5, 0.5))),
    Row("BatchHardTripletLoss", text_classes("BatchHardTripletLoss", margin=(5, 0.5))),
    Row("BatchHardSoftMarginTripletLoss", text_classes("BatchHardSoftMarginTripletLoss")),
    Row("BatchSemiHardTripletLoss", text_classes("BatchSemiHardTripletLoss", margin=(5, 0.5))),
    # teachers
    Row("MarginMSELoss", teacher_margins(similarity_fct=[pairwise_cos_sim]), "`similarity_fct=pairwise_cos_sim`"),
    Row("MarginMSELoss", teacher_margins(), "normalised embeddings", normalize=True),
    Row("MarginMSELoss", teacher_margins(), "other embeddings", normalize=False),
    Row("DistillKLDivLoss", teacher_scores(similarity_fct=[pairwise_cos_sim]), "`similarity_fct=pairwise_cos_sim`"),
    Row("DistillKLDivLoss", teacher_scores(), "normalised embeddings", normalize=True),
    Row(
        "DistillKLDivLoss",
        teacher_scores(similarity_fct=[pairwise_dot_score]),
        "other embeddings",
        normalize=False,
    ),
    Row("MSELoss", teacher_embeddings("MSELoss"), "normalised embeddings", normalize=True),
    Row("MSELoss", teacher_embeddings("MSELoss"), "other embeddings", normalize=False),
    Row("MSELoss", teacher_embeddings("MSELoss", 24, projection_dim=24), "`projection_dim`", raises=FIXED_WIDTH),
    Row("EmbedDistillLoss", teacher_embeddings("EmbedDistillLoss")),
    Row(
        "EmbedDistillLoss",
        teacher_embeddings("EmbedDistillLoss", distance_metric="mse"),
        "`distance_metric=mse`, normalised embeddings",
        normalize=True,
    ),
    Row("EmbedDistillLoss", teacher_embeddings("EmbedDistillLoss", distance_metric="l2"), "`distance_metric=l2`"),
    Row(
        "EmbedDistillLoss",
        teacher_embeddings("EmbedDistillLoss", 24, projection_dim=24),
        "`projection_dim`",
        raises=FIXED_WIDTH,
    ),
    # regularisation and reconstruction
    Row("GlobalOrthogonalRegularizationLoss", orthogonal, raises="it returns a dict, which is multiplied by a weight"),
    Row("DenoisingAutoEncoderLoss", denoising, architectures=("bert",), raises=FIXED_WIDTH),
    # the wrappers themselves
    *(
        Row(name, nested(name, of_ours), f"of {'m2d_ext' if of_ours else 'sentence-transformers'}", raises=NESTED)
        for name in WRAPPERS
        for of_ours in (False, True)
    ),
)


def exported_losses() -> set[str]:
    """The loss classes of the installed sentence-transformers; what else it exports with them are their helpers."""
    return {
        name
        for name in st_losses.__all__
        if inspect.isclass(getattr(st_losses, name)) and issubclass(getattr(st_losses, name), nn.Module)
    }


# ---------------------------------------------------------------- random configurations


@dataclass(frozen=True)
class Example:
    """One training step."""

    base: Base
    model: SentenceTransformer
    lengths: list[list[int]]  # (columns, batch), in words
    arguments: dict[str, Any]
    seed: int

    def features(self, model: SentenceTransformer) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        return features_of(model, [[sentence(length, generator) for length in column] for column in self.lengths])


random_model = functools.cache(tiny_model)  # every run makes its own copy


def draw_example(row: Row, wrapper: str, index: int) -> Example:
    rng = random.Random(f"{row.name} in {wrapper}, {index}")
    batch = rng.choice([4, 5, 6])
    base = row.draw(rng, batch)
    architecture = rng.choice(row.architectures)
    model = random_model(
        architecture,
        normalize=rng.random() < 0.5 if row.normalize is None else row.normalize,
        pooling=rng.choice(["mean", "cls", "weightedmean"]),
        left_padding=architecture == "qwen3" and rng.random() < 0.5,
        num_layers=rng.choice([1, 2, 3]),
    )
    longest = rng.choice([4, 9])
    lengths = [[rng.randint(1, longest) for _ in range(batch)] for _ in range(base.columns)]
    lengths[0][0] = max(2, lengths[0][0])  # a text of one token has queries and keys without a gradient
    arguments = draw_arguments(rng, wrapper)
    return Example(base, model, lengths, arguments, seed=rng.randrange(1000))


def draw_arguments(rng: random.Random, wrapper: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if wrapper != "AdaptiveLayerLoss":
        dims = rng.sample([2, 5, 8, 16, 24, 31, HIDDEN], rng.choice([2, 3]))
        arguments |= {
            "matryoshka_dims": dims,
            "matryoshka_weights": rng.choice([None, [rng.choice([0.5, 1.0, 2.0]) for _ in dims]]),
            "n_dims_per_step": rng.choice([-1, 1, 2]),
        }
    if wrapper != "MatryoshkaLoss":
        arguments |= {
            "n_layers_per_step": rng.choice([-1, -1, 1, 2]),
            "last_layer_weight": rng.choice([1.0, 0.3]),
            "prior_layers_weight": rng.choice([1.0, 2.0]),
            "kl_div_weight": rng.choice([1.0, 0.2]),
            "kl_temperature": rng.choice([0.3, 1.0, 0.0]),
            "layer_weighting": rng.choice(["uniform", "log", "linear"]),
        }
    return arguments


# ---------------------------------------------------------------- what comes of them


class Path(enum.Enum):
    """What training does, as the table says it."""

    FUSED = "fused"
    LOOP = "same, fallback"
    RAISES = "raises there and here"
    RAISES_HERE = "raises here"
    FUSED_HERE = "raises there, fused here"
    LOOP_HERE = "raises there, fallback here"


@dataclass(frozen=True)
class Observation:
    path: Path
    reason: str = ""  # the fallback's own, or the type of the error
    worst_ratio: float = 0.0  # of the allowed error


@functools.cache
def cell(row: Row, wrapper: str) -> Observation:
    """What all random configurations come to. AssertionError where one differs from sentence-transformers."""
    observations = [observe(wrapper, draw_example(row, wrapper, index)) for index in range(EXAMPLES)]
    # A step that draws nothing but the full dimension may well pass where all others raise.
    raised = [observation for observation in observations if observation.path is Path.RAISES]
    observations = raised or observations
    outcomes = {(observation.path, observation.reason) for observation in observations}
    assert len(outcomes) == 1, f"one line of the table, and several outcomes: {outcomes}"
    return max(observations, key=lambda observation: observation.worst_ratio)


def observe(wrapper: str, example: Example) -> Observation:
    """Run one step there and here. AssertionError where the two differ."""
    theirs = attempt(st_losses, wrapper, example, example.base.build)
    with recorded_fallbacks() as fallbacks:
        ours = attempt(m2d_ext, wrapper, example, example.base.build)
    if isinstance(ours, Exception):
        is_nested = isinstance(ours, ValueError) and str(ours).startswith("loss must be of the embeddings as they are")
        if not isinstance(theirs, Exception):
            if is_nested:
                return Observation(Path.RAISES_HERE)
            raise AssertionError(f"raises here alone: {ours!r}") from ours
        assert type(ours) is type(theirs) or is_nested, f"{theirs!r} there, {ours!r} here"
        return Observation(Path.RAISES, type(theirs).__name__)
    if not isinstance(theirs, Exception):
        path = Path.LOOP if fallbacks else Path.FUSED
        return Observation(path, reason_of(fallbacks), judge(ours, theirs, theirs, TOLERANCE, ()).worst_ratio)
    assert example.base.stand_in is not None, f"raises there alone: {theirs!r}"
    error = type(theirs).__name__
    theirs = attempt(st_losses, wrapper, example, example.base.stand_in)
    if isinstance(theirs, Exception):
        raise theirs
    path = Path.LOOP_HERE if fallbacks else Path.FUSED_HERE
    return Observation(path, error, judge(ours, theirs, theirs, TOLERANCE, ()).worst_ratio)


def attempt(library: Any, wrapper: str, example: Example, base: BaseBuilder) -> Outcome | Exception:
    def build(model: Any) -> nn.Module:
        return getattr(library, wrapper)(model, base(model, library), **example.arguments)

    try:
        inputs = {"labels": example.base.labels, "seed": example.seed}
        return run(build, example.model, example.features, dtype=torch.float64, **inputs)
    except Exception as error:
        return error


def reason_of(fallbacks: Sequence[str]) -> str:
    """What the log line gives as the reason, less the name of the loss; nothing where the class is no known one."""
    reason = fallbacks[0].partition(": ")[2].rstrip(".").partition(" ")[2] if fallbacks else ""
    return "" if reason == "has no fused path" else reason


# ---------------------------------------------------------------- the table

HEADER = f"""\
# Every loss of sentence-transformers as a base loss

What comes of each loss class that sentence-transformers {{version}} exports, as the base loss of the three classes of
m2d_ext, beside sentence-transformers' own. A cell stands for {EXAMPLES} random configurations: tiny BERT, MPNet,
ModernBERT and Qwen3 models, poolings, dims, weights, layers and draws, the base loss's own options and labels. In
float64, the loss and the gradient of every parameter differ by at most {TOLERANCE:.0e} of their norms (of a thousandth
of the norm of all gradients, for one smaller than that), and the same random numbers are drawn.

- **{Path.FUSED.value}**: every layer and dimension in one pass.
- **{Path.LOOP.value}**: the same loss by a loop over layers and dimensions, as in sentence-transformers; one log line
  says why.
- **{Path.RAISES.value}**: the same type of exception; around a loss that has dims or layers of its own, here a
  `ValueError` that says so.
- **raises there, … here**: sentence-transformers raises; ours was compared with its class around an equal loss that it
  does train: the same without gradient caching, or the sum of a dict of losses.

Written by `make loss-table` from what the runs did; `tests/test_surface.py` holds it to them.

| base loss | with | {" | ".join(f"`{wrapper}`" for wrapper in WRAPPERS)} | why |
|---|---|{"---|" * len(WRAPPERS)}---|
"""


def render() -> str:
    """The whole of docs/losses.md."""
    version = ".".join(sentence_transformers.__version__.split(".")[:2])
    return HEADER.format(version=version) + "".join(map(table_line, ROWS))


def table_line(row: Row) -> str:
    cells = [cell(row, wrapper) for wrapper in WRAPPERS]
    reasons = [reason_in_words(row, cell) for cell in cells]
    name = f"`{row.loss}`" if row == next(other for other in ROWS if other.loss == row.loss) else ""
    columns = [
        name,
        row.options,
        *(cell.path.value for cell in cells),
        "; ".join(dict.fromkeys(filter(None, reasons))),
    ]
    return f"| {' | '.join(columns)} |\n"


def reason_in_words(row: Row, observation: Observation) -> str:
    if observation.path in (Path.FUSED, Path.LOOP):
        return observation.reason
    assert row.raises, f"{row.name} raises, and its line does not say why: {observation}"
    return f"`{observation.reason}`: {row.raises}"
