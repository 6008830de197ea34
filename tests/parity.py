"""Hold a loss of ours to sentence-transformers' own: value, every gradient, and every random draw.

Neither is the truth: that is sentence-transformers' class run in float64 on a float64 copy of the model, with the
same draws. Being as far from it as sentence-transformers is in float32 is no fault; being farther is.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from m2d_ext import autograd
from tiny_models import DEVICE

LossBuilder = Callable[[SentenceTransformer], nn.Module]
# Called once for every run, because the losses write into the feature dicts that they are given.
FeaturesBuilder = Callable[[SentenceTransformer], list[dict[str, Any]]]

FLOAT32_TOLERANCE = 1e-5
# Some gradients are exactly zero (a key's bias) and come out as rounding noise: they are measured against the
# gradient of all parameters together, not against themselves.
NEGLIGIBLE = 1e-3
# A gradient this small beside all others is one of those.
EXACTLY_ZERO = 1e-12
# How many times sentence-transformers' own rounding error is allowed, where that is above the tolerance.
OWN_ERROR_FACTOR = 2.0
FALLBACK_MARK = "falling back to the loop"


@dataclass(frozen=True)
class Outcome:
    """What one run left behind, as float64."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    random_state: Any


@dataclass(frozen=True)
class Comparison:
    """The errors of one comparison, each divided by what is allowed: 1 is the limit."""

    loss_ratio: float
    gradient_ratios: dict[str, float] = field(default_factory=dict)
    ours: Outcome | None = None
    theirs: Outcome | None = None
    fallbacks: tuple[str, ...] = ()

    @property
    def worst_ratio(self) -> float:
        return max([self.loss_ratio, *self.gradient_ratios.values()])


@contextmanager
def recorded_dense_gradients() -> Iterator[list[int]]:
    """Of each backward of a fused loss or pooling: how many hidden states it hands a dense gradient."""
    counts: list[int] = []
    place = autograd._place

    def recording(*args: Any) -> list[Tensor | None]:
        grads = place(*args)
        counts.append(sum(grad is not None for grad in grads))
        return grads

    autograd._place = recording
    try:
        yield counts
    finally:
        autograd._place = place


@contextmanager
def recorded_fallbacks() -> Iterator[list[str]]:
    """Collect the lines in which our losses say that they left the fused path."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if FALLBACK_MARK in record.getMessage():
                lines.append(record.getMessage())

    logger, collector = logging.getLogger("m2d_ext"), Collector(level=logging.INFO)
    previous_level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(previous_level)
        logger.removeHandler(collector)


def run(
    build: LossBuilder,
    model: SentenceTransformer,
    features: FeaturesBuilder,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    upstream: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """One forward and, where the loss has a gradient, one backward, on a copy of the model."""
    model = copy.deepcopy(model)
    loss_module = build(model).to(DEVICE, dtype)
    if labels is not None:
        labels = labels.to(DEVICE, dtype if labels.is_floating_point() else None)
    inputs = features(model)
    random.seed(seed)
    torch.manual_seed(seed)
    loss = loss_module(inputs, labels)
    if torch.is_grad_enabled() and loss.requires_grad:
        # `upstream` stands for a gradient scaler or gradient accumulation: backward must not assume a 1.
        (loss * upstream).backward()
    return Outcome(
        loss=loss.detach().double(),
        gradients={
            name: None if parameter.grad is None else parameter.grad.double()
            for name, parameter in loss_module.named_parameters()
        },
        random_state=random.getstate(),
    )


def compare(
    model: SentenceTransformer,
    ours: LossBuilder,
    theirs: LossBuilder,
    features: FeaturesBuilder,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = FLOAT32_TOLERANCE,
    **run_arguments: Any,
) -> Comparison:
    """Run ours, theirs and the truth; raise AssertionError with all that differs; return how close it was."""
    their_outcome = run(theirs, model, features, dtype=dtype, **run_arguments)
    truth = run(theirs, model, features, dtype=torch.float64, **run_arguments)
    with recorded_fallbacks() as fallbacks:
        our_outcome = run(ours, model, features, dtype=dtype, **run_arguments)
    return judge(our_outcome, their_outcome, truth, tolerance, tuple(fallbacks))


def judge(ours: Outcome, theirs: Outcome, truth: Outcome, tolerance: float, fallbacks: tuple[str, ...]) -> Comparison:
    assert ours.random_state == theirs.random_state, "the random draws differ from sentence-transformers'"
    assert list(ours.gradients) == list(theirs.gradients), "the parameters of the losses have other names"
    assert ours.loss.shape == theirs.loss.shape
    assert torch.isfinite(truth.loss), "the configuration itself is broken: sentence-transformers' loss is not finite"
    comparison = Comparison(
        loss_ratio=_ratio(
            (ours.loss - truth.loss).norm().item(),
            (theirs.loss - truth.loss).norm().item(),
            tolerance * truth.loss.abs().item(),
        ),
        gradient_ratios=_gradient_ratios(ours, theirs, truth, tolerance),
        ours=ours,
        theirs=theirs,
        fallbacks=fallbacks,
    )
    failures = _failures(comparison, truth)
    assert not failures, "\n".join(["differs from sentence-transformers:", *failures])
    return comparison


def _gradient_ratios(ours: Outcome, theirs: Outcome, truth: Outcome, tolerance: float) -> dict[str, float]:
    total = total_norm(truth.gradients)
    floor = NEGLIGIBLE * total
    their_errors = {
        name: (their - expected).norm().item()
        for name, expected in truth.gradients.items()
        if expected is not None and (their := theirs.gradients[name]) is not None
    }
    ratios = {}
    for name, expected in truth.gradients.items():
        our, their = ours.gradients[name], theirs.gradients[name]
        if expected is None or their is None:
            # No gradient at all: an optimiser would treat anything but zeros differently.
            ratios[name] = 0.0 if our is None or not our.any() else float("inf")
            continue
        our = torch.zeros_like(expected) if our is None else our
        own_error = their_errors[name]
        if expected.norm() <= EXACTLY_ZERO * total:
            # Nothing but the encoder's rounding, of which one run says little: that of the module's other parameters
            # of this shape, such as the query's and the value's biases beside the key's, is rounding of the same sums.
            own_error = max(their_errors[other] for other in _siblings(name, truth.gradients) if other in their_errors)
        allowed = tolerance * max(expected.norm().item(), floor)
        ratios[name] = _ratio((our - expected).norm().item(), own_error, allowed)
    return ratios


def _siblings(name: str, gradients: dict[str, Tensor | None]) -> list[str]:
    """Parameters of the same module's parts that are shaped alike, itself included: of names like parent.part.bias."""
    parent, shape = name.rsplit(".", 2)[0], gradients[name].shape  # type: ignore[union-attr]
    return [
        other
        for other, gradient in gradients.items()
        if gradient is not None and gradient.shape == shape and other.rsplit(".", 2)[0] == parent
    ]


def _ratio(error: float, their_error: float, allowed: float) -> float:
    """Our error over the allowed one, which rounding in sentence-transformers' own run may raise."""
    if error == 0.0:
        return 0.0
    allowed = max(allowed, OWN_ERROR_FACTOR * their_error)
    ratio = error / allowed if allowed > 0.0 else float("inf")
    return float("inf") if ratio != ratio else ratio


def total_norm(gradients: dict[str, Tensor | None]) -> float:
    norms = [gradient.norm() for gradient in gradients.values() if gradient is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def gradient_error(outcome: Outcome, truth: Outcome) -> float:
    """The error of all gradients together, relative to the truth."""
    differences = {
        name: None if expected is None else (outcome.gradients[name] - expected)
        for name, expected in truth.gradients.items()
    }
    return total_norm(differences) / total_norm(truth.gradients)


def _failures(comparison: Comparison, truth: Outcome) -> list[str]:
    assert comparison.ours is not None
    assert comparison.theirs is not None
    lines = []
    if comparison.loss_ratio > 1.0:
        lines.append(
            f"  loss: {comparison.loss_ratio:.3g} times what is allowed (ours {comparison.ours.loss.item():.9g}, "
            f"theirs {comparison.theirs.loss.item():.9g}, truth {truth.loss.item():.12g})"
        )
    for name, ratio in comparison.gradient_ratios.items():
        if ratio > 1.0:
            ours, theirs = comparison.ours.gradients[name], comparison.theirs.gradients[name]
            lines.append(
                f"  gradient of {name}: {ratio:.3g} times what is allowed (norm: ours {_norm(ours)}, "
                f"theirs {_norm(theirs)}, truth {_norm(truth.gradients[name])})"
            )
    return lines


def _norm(gradient: Tensor | None) -> str:
    return "no gradient" if gradient is None else f"{gradient.norm().item():.9g}"
