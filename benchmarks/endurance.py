"""Thousands of steps of every loss in turn: nothing may grow, and the model stays as it was.

    python benchmarks/endurance.py                  2,000 steps of a tiny model, within a minute
    python benchmarks/endurance.py --steps 20000

A test calls `train` and asserts that `complaints` of what it returns are empty. Memory is looked at only after every
loss had its turn, so that like is compared with like, and by medians of the first and the last quarter of the looks
that follow a warm-up, in which every loss had every batch: a single look can be off by what the allocator just holds.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import logging
import math
import os
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import psutil
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score
from torch import Tensor, nn

import m2d_ext
from tiny_models import HIDDEN, features_of, sentence, tiny_model

DIMS = (HIDDEN, 16, 4)
BATCH = 6
LONGEST = 8
NUM_BATCHES = 16
WARMUP_STEPS = 700
LOOKS = 80
LEARNING_RATE = 1e-5
# Between the medians of the quarters. A leak of one small tensor or closure per step would be far more.
MOST_RSS_GROWTH = 1 << 19
MOST_OBJECTS_GROWTH = 100
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Step = Callable[[list[dict[str, Any]]], None]


@dataclass
class Trace:
    """What a run saw."""

    rss: list[int] = field(default_factory=list)  # bytes, at each look
    objects: list[int] = field(default_factory=list)  # that the collector knows, at each look
    leftovers: set[str] = field(default_factory=set)  # on the model or the losses
    values: dict[str, list[float]] = field(default_factory=dict)  # losses, by variant


def loss_variants(model: SentenceTransformer) -> dict[str, nn.Module]:
    """Every way through the loss classes."""
    base = MultipleNegativesRankingLoss(model)
    other = MultipleNegativesRankingLoss(model, similarity_fct=dot_score)  # runs the loop
    every: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    ours = m2d_ext.Matryoshka2dLoss
    return {
        "deferred": ours(model, base, DIMS, **every),
        "dense": ours(model, base, DIMS, **every, deferred=False),
        "cached": ours(model, base, DIMS, **every, mini_batch_size=4),
        "cached by tokens": ours(model, base, DIMS, **every, mini_batch_num_tokens=20, deferred=False),
        "cached base loss": ours(model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), DIMS, **every),
        "one cell": ours(model, base, DIMS),
        "one layer, cached": ours(model, base, DIMS, n_dims_per_step=2, mini_batch_size=4),
        "no KL": ours(model, base, DIMS, **every, kl_temperature=0.0),
        "loop": ours(model, other, DIMS, **every),
        "dims": m2d_ext.MatryoshkaLoss(model, base, DIMS),
        "dims, one drawn, cached": m2d_ext.MatryoshkaLoss(model, base, DIMS, n_dims_per_step=1, mini_batch_size=4),
        "dims, loop": m2d_ext.MatryoshkaLoss(
            model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, similarity_fct=dot_score), DIMS
        ),
        "layers": m2d_ext.AdaptiveLayerLoss(model, base, n_layers_per_step=-1),
        "layers, loop": m2d_ext.AdaptiveLayerLoss(model, other),
    }


def make_steps(model: SentenceTransformer, losses: dict[str, nn.Module], trace: Trace) -> list[Step]:
    """A training step of each loss, and what else happens to a loss: evaluation, autocast, an exception."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def value(name: str, batch: Sequence[dict[str, Any]]) -> Tensor:
        loss: Tensor = losses[name]([dict(column) for column in batch], torch.zeros(BATCH))
        trace.values.setdefault(name, []).append(loss.item())
        return loss

    def train(name: str) -> Step:
        def step(batch: list[dict[str, Any]]) -> None:
            value(name, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    @torch.no_grad()
    def evaluate(batch: list[dict[str, Any]]) -> None:
        value("deferred", batch)
        value("cached", batch)

    def autocast(batch: list[dict[str, Any]]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = value("deferred", batch)
        loss.backward()
        optimizer.zero_grad(set_to_none=True)

    def fail(batch: list[dict[str, Any]]) -> None:
        """One column is too few; and a backward that never comes."""
        for loss in losses.values():
            with suppress(ValueError):
                loss([dict(batch[0])], torch.zeros(BATCH))
        value("deferred", batch)
        value("cached", batch)

    return [*map(train, losses), evaluate, autocast, fail]


class Untouched:
    """The model and the losses as they should be after every step."""

    def __init__(self, model: SentenceTransformer, losses: dict[str, nn.Module]) -> None:
        self._model = model
        self._modules = {**dict(model.named_modules()), **{f"loss '{name}'": loss for name, loss in losses.items()}}
        self._hooks = self._hooks_now()
        self._config = self._config_now()

    def differences(self) -> Iterator[str]:
        """What was put somewhere and not taken away."""
        for name, module in self._modules.items():
            if "forward" in vars(module):
                yield f"{name} has a forward of its own"
            if not module.training:
                yield f"{name} is no longer in training mode"
        for name, hooks in self._hooks_now().items():
            if hooks != self._hooks[name]:
                yield f"{name} has other hooks"
        if self._config_now() != self._config:
            yield "the encoder's configuration has changed"

    def _hooks_now(self) -> dict[str, list[list[int]]]:
        return {name: [list(getattr(module, hooks)) for hooks in HOOKS] for name, module in self._modules.items()}

    def _config_now(self) -> dict[str, Any]:
        """Also what `to_dict` leaves out."""
        return copy.deepcopy(vars(self._model[0].auto_model.config))


def ask_for_states(model: SentenceTransformer, batch: list[dict[str, Any]]) -> None:
    """Once, without a loss: transformers hooks the layers that it takes states from, and leaves the hooks there."""
    model[0].auto_model(**batch[0], output_hidden_states=True)


def release_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def only_new_objects() -> Iterator[None]:
    """The collector leaves alone, and does not list, the half million objects that importing torch leaves."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines about the loops that run here on purpose."""
    logger = logging.getLogger("m2d_ext")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def train(steps: int = 2000, seed: int = 0, architecture: str = "bert") -> Trace:
    """Train so many steps, every loss in turn.

    Raises:
        ValueError: too few steps to tell growth from warming up.
    """
    if steps < 2 * WARMUP_STEPS:
        raise ValueError(f"steps must be at least {2 * WARMUP_STEPS}, got {steps}")
    random.seed(seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trace = Trace()
    model = tiny_model(architecture, dropout=0.1)
    batches = [features_of(model, [_texts(generator) for _ in range(2)]) for _ in range(NUM_BATCHES)]
    ask_for_states(model, batches[0])
    with quiet(), only_new_objects():
        losses = loss_variants(model)
        turn = make_steps(model, losses, trace)
        untouched = Untouched(model, losses)
        warmup, rounds = WARMUP_STEPS // len(turn), -(-steps // len(turn))
        every = max(1, (rounds - warmup) // LOOKS)
        for index in range(rounds):
            for i, step in enumerate(turn):
                step(batches[(index + i) % NUM_BATCHES])
            if index >= warmup and index % every == 0:
                release_memory()
                trace.rss.append(psutil.Process().memory_info().rss)
                trace.objects.append(len(gc.get_objects()))
                trace.leftovers.update(untouched.differences())
    return trace


def _texts(generator: torch.Generator) -> list[str]:
    lengths = torch.randint(1, LONGEST, (BATCH,), generator=generator).tolist()
    return [sentence(length, generator) for length in lengths]


def growth(looks: Sequence[int]) -> float:
    """Between the medians of the first quarter and the last."""
    quarter = max(1, len(looks) // 4)
    return statistics.median(looks[-quarter:]) - statistics.median(looks[:quarter])


def complaints(trace: Trace) -> list[str]:
    """What is wrong with a run, in words; empty if nothing is."""
    found = sorted(trace.leftovers)
    if growth(trace.rss) > MOST_RSS_GROWTH:
        found.append(f"the resident set grew by {growth(trace.rss) / 2**20:.1f} MiB")
    if growth(trace.objects) > MOST_OBJECTS_GROWTH:
        found.append(f"the number of Python objects grew by {growth(trace.objects):.0f}")
    for name, values in trace.values.items():
        if not all(map(math.isfinite, values)):
            found.append(f"{name}: a loss is not finite")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", default="bert", help="of tests/tiny_models.py [%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trace = train(args.steps, args.seed, args.architecture)
    print(
        f"{sum(map(len, trace.values.values()))} losses; between the medians of the first and the last quarter of "
        f"{len(trace.rss)} looks: resident set {growth(trace.rss) / 2**10:+.0f} KiB, "
        f"Python objects {growth(trace.objects):+.0f}"
    )
    found = complaints(trace)
    print("\n".join(found) or "nothing grew, nothing was left behind")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
