"""Who is compared for each base loss: our Matryoshka2dLoss and sentence-transformers' own, on the same states."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

import m2d_ext
from providers import KL_TEMPERATURE, Candidate, GivenStates, Inputs, step

OURS = "ours"
SENTENCE_TRANSFORMERS = "sentence-transformers"
LIBRARIES: dict[str, ModuleType] = {OURS: m2d_ext, SENTENCE_TRANSFORMERS: st_losses}

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
LOSS_TOLERANCE = 1e-4


class Encoder(nn.Module):
    """What the losses ask an encoder for."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(output_hidden_states=False)


def make_model(inputs: Inputs) -> SentenceTransformer:
    """A model whose encoder costs nothing.

    Its Transformer is of that very class, of which alone our fused path knows what it does; so the class is changed,
    for the rest of this process.
    """
    Transformer.forward = GivenStates.forward  # type: ignore[method-assign]
    Transformer.get_embedding_dimension = GivenStates.get_embedding_dimension  # type: ignore[method-assign]
    transformer = Transformer.__new__(Transformer)
    nn.Module.__init__(transformer)  # the class's loads a model from a folder
    transformer.model = Encoder()
    transformer.width = inputs.shape.width
    # Each column's states are leaves of their own.
    transformer.columns = [
        [column.detach().requires_grad_() for column in columns]
        for columns in zip(*(state.detach().chunk(inputs.shape.columns) for state in inputs.states), strict=True)
    ]
    return SentenceTransformer(modules=[transformer, Pooling(inputs.shape.width)], device="cpu").train()


class GivenGuide(nn.Module):
    """A guide whose embeddings cost nothing."""

    def __init__(self, columns: list[Tensor]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": self.columns[features["column"]]}


def gist(model: SentenceTransformer) -> nn.Module:
    """GISTEmbedLoss without its constructor, which wants a guide with a tokenizer."""
    loss = st_losses.GISTEmbedLoss.__new__(st_losses.GISTEmbedLoss)
    nn.Module.__init__(loss)
    columns = model[0].columns
    width, texts = model[0].width, len(columns[0][0])
    generator = torch.Generator().manual_seed(0)
    loss.model = model
    loss.guide = GivenGuide([torch.randn(texts, width, generator=generator) for _ in columns])
    loss.temperature, loss.must_retokenize, loss.gather_across_devices = 0.01, False, False
    loss.margin_strategy, loss.margin = "absolute", 0.0
    loss.contrast_anchors = loss.contrast_positives = True
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    return loss


BASE_LOSSES: dict[str, Callable[[SentenceTransformer], nn.Module]] = {
    "MultipleNegativesRanking": st_losses.MultipleNegativesRankingLoss,
    "MultipleNegativesSymmetricRanking": st_losses.MultipleNegativesSymmetricRankingLoss,
    "four directions": lambda model: st_losses.MultipleNegativesRankingLoss(model, directions=DIRECTIONS),
    "hardness": lambda model: st_losses.MultipleNegativesRankingLoss(
        model, hardness_mode="in_batch_negatives", hardness_strength=9.0
    ),
    "CoSENT": st_losses.CoSENTLoss,
    "AnglE": st_losses.AnglELoss,
    "CosineSimilarity": st_losses.CosineSimilarityLoss,
    "GISTEmbed": gist,
}


def candidates(inputs: Inputs, base: str) -> dict[str, Candidate]:
    """Of both libraries; they must give one value."""
    shape = inputs.shape
    model = make_model(inputs)
    leaves = [state for columns in model[0].columns for state in columns]
    masks = inputs.mask.chunk(shape.columns)
    labels = torch.rand(shape.batch, generator=torch.Generator().manual_seed(0))
    found, values = {}, []
    for name, library in LIBRARIES.items():
        loss = library.Matryoshka2dLoss(
            model,
            BASE_LOSSES[base](model),
            list(shape.dims),
            n_layers_per_step=-1,
            n_dims_per_step=-1,
            kl_temperature=KL_TEMPERATURE,
        )

        def run(loss: nn.Module = loss) -> Tensor:
            value = loss([{"column": c, "attention_mask": mask} for c, mask in enumerate(masks)], labels)
            for module in loss.modules():
                vars(module).pop("forward", None)  # see step_providers.loss_of
            return value

        found[name] = Candidate(run, leaves, step(run, leaves, inputs.grad_output))
        value = run()
        if name == OURS and getattr(loss, "_fallback_reason", None):
            raise RuntimeError(f"{base} is not fused: {loss._fallback_reason}")
        values.append(value.item())
    if abs(values[0] - values[1]) > LOSS_TOLERANCE * abs(values[1]):
        raise RuntimeError(f"{base}: ours gives a loss of {values[0]}, sentence-transformers {values[1]}")
    return found
