"""The arms of the ablation: what is trained, and which question each arm answers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import ModernBertConfig, ModernBertModel

import m2d_ext
from step_providers import load_model as load_minilm

MINILM = "all-MiniLM-L6-v2"
MODERNBERT = "ModernBERT, random weights"
PRE_NORM_WIDTH = 256


@dataclass(frozen=True)
class Model:
    load: Callable[[], SentenceTransformer]
    dims: tuple[int, ...]
    learning_rate: float


@dataclass(frozen=True)
class Arm:
    """One way to train; ``options`` of ``m2d_ext.Matryoshka2dLoss``, on top of all layers × all dims."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = MINILM
    is_plain: bool = False  # no Matryoshka loss at all

    def loss(self, model: SentenceTransformer) -> nn.Module:
        plain = st_losses.MultipleNegativesRankingLoss(model)
        if self.is_plain:
            return plain
        options = {"n_layers_per_step": -1, "n_dims_per_step": -1} | self.options
        return m2d_ext.Matryoshka2dLoss(model, plain, list(MODELS[self.model].dims), **options)


@dataclass(frozen=True)
class Question:
    """Arms that differ in one thing, and the arm that they are held against."""

    title: str
    baseline: str
    arms: tuple[str, ...]


def load_modernbert() -> SentenceTransformer:
    """A pre-norm encoder: 6 layers of random weights, 256 wide, with all-MiniLM-L6-v2's tokenizer."""
    tokenizer = load_minilm().tokenizer
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=PRE_NORM_WIDTH,
        intermediate_size=2 * PRE_NORM_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        ModernBertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder), Pooling(PRE_NORM_WIDTH)], device="cpu")


MODELS = {
    MINILM: Model(load_minilm, (384, 256, 128, 64, 32), 5e-5),
    # From random weights a small step teaches nothing in so few of them.
    MODERNBERT: Model(load_modernbert, (256, 128, 64, 32), 5e-4),
}

ALL = "all cells"
EQUAL = "earlier layers weigh 1 each"
THRICE = "earlier layers weigh 3 each"
# Starbucks' pairs for six layers of 384: small layers serve small dims.
STARBUCKS = [(1, 32), (2, 64), (3, 128), (4, 256), (5, 384), (6, 384)]

_ARMS = (
    Arm("plain", is_plain=True),
    Arm(ALL),
    Arm("no KL", {"kl_div_weight": 0.0}),
    Arm("KL of scores", {"kl_target": "scores"}),
    Arm("one layer drawn", {"n_layers_per_step": 1}),
    Arm("one dim drawn", {"n_dims_per_step": 1}),
    Arm("one cell drawn", {"n_layers_per_step": 1, "n_dims_per_step": 1}),
    Arm("log weights", {"layer_weighting": "log"}),
    Arm("linear weights", {"layer_weighting": "linear"}),
    Arm("Starbucks' pairs", {"pairs": STARBUCKS, "n_layers_per_step": 1, "n_dims_per_step": 1}),
    Arm("last layer weighs 3", {"last_layer_weight": 3.0}),
    Arm(EQUAL, {"prior_layers_weight": 6.0}),
    Arm(THRICE, {"prior_layers_weight": 18.0}),
    Arm("no false negatives (margin 0)", {"false_negative_margin": 0.0}),
    Arm("earlier layers weigh 1 each, KL of scores", {"prior_layers_weight": 6.0, "kl_target": "scores"}),
    Arm(
        "earlier layers weigh 3 each, KL of scores × 5",
        {"prior_layers_weight": 18.0, "kl_target": "scores", "kl_div_weight": 5.0},
    ),
    Arm("pre-norm, norm skipped", model=MODERNBERT),
    Arm("pre-norm, norm applied", {"final_norm": "apply"}, model=MODERNBERT),
)
ARMS = {arm.name: arm for arm in _ARMS}

QUESTIONS = (
    Question("Does a 2D loss help the cells, and what does it cost the final one?", "plain", (ALL,)),
    Question("KL off, of features or of scores?", ALL, ("no KL", "KL of scores")),
    Question("All layers and dims, or drawn ones?", ALL, ("one layer drawn", "one dim drawn", "one cell drawn")),
    Question("How to weigh the layers?", ALL, ("log weights", "linear weights", "Starbucks' pairs", EQUAL, THRICE)),
    Question("How much weight for the last layer?", ALL, ("last layer weighs 3",)),
    Question("Leave out false negatives?", ALL, ("no false negatives (margin 0)",)),
    Question("Final norm on earlier states?", "pre-norm, norm skipped", ("pre-norm, norm applied",)),
)
