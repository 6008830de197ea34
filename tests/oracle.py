"""The loss as plain loops over layers and dims, straight from its definition: what every backend is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(n, T, D), (n, T) -> (n, D), text by text; a text without tokens is 0."""
    rows = []
    for text, keep in zip(states, mask.bool(), strict=True):
        tokens = text[keep]
        if len(tokens) == 0:
            rows.append(text.new_zeros(text.shape[-1]) + text[:0].sum(0))
            continue
        first = int(keep.int().argmax())
        position = torch.arange(len(keep))[keep].to(text.dtype) - first + 1
        rows.append(
            {
                "mean": lambda tokens=tokens: tokens.mean(0),
                "max": lambda tokens=tokens: tokens.max(0).values,  # ties: the first token
                "cls": lambda tokens=tokens: tokens[0],
                "lasttoken": lambda tokens=tokens: tokens[-1],
                "mean_sqrt_len_tokens": lambda tokens=tokens: tokens.sum(0) / len(tokens) ** 0.5,
                "weightedmean": lambda tokens=tokens, position=position: (
                    (position[:, None] * tokens).sum(0) / position.sum()
                ),
            }[pooling]()
        )
    return torch.stack(rows)


def loss_of_pooled(
    pooled: Tensor,
    candidates: Tensor | None = None,
    target_offset: int = 0,
    *,
    num_columns: int,
    dims: list[int],
    weights: list[list[float]],
    kl_weights: list[float] | None = None,
    kl_temperature: float = 0.3,
    scale: float = 20.0,
    normalize: bool = False,
    hardness: float = 0.0,
    own_hardness: float = 0.0,
) -> Tensor:
    """One cross-entropy per cell, one kl_div per layer."""
    embeddings = F.normalize(pooled, dim=-1) if normalize else pooled
    num_anchors = pooled.shape[1] // num_columns
    total = pooled.sum() * 0
    for layer, rows in enumerate(embeddings):
        others = rows[num_anchors:]
        if candidates is not None:
            others = F.normalize(candidates[layer], dim=-1) if normalize else candidates[layer]
        for d, weight in zip(dims, weights[layer], strict=True):
            if weight != 0:
                cosines = F.normalize(rows[:num_anchors, :d], dim=-1) @ F.normalize(others[:, :d], dim=-1).T
                logits = scale * cosines
                if hardness or own_hardness:
                    hard = torch.full_like(cosines, hardness)
                    for place in range(target_offset, hard.shape[1], hard.shape[1] // (num_columns - 1)):
                        own = own_hardness if place > target_offset else 0.0
                        hard[:, place : place + num_anchors].fill_diagonal_(own)
                    logits = logits + hard * cosines.detach()
                total = total + weight * F.cross_entropy(logits, torch.arange(num_anchors) + target_offset)
        if kl_weights is not None and kl_weights[layer] != 0:
            teacher = F.softmax(embeddings[-1].detach() / kl_temperature, dim=-1)
            student = F.log_softmax(rows / kl_temperature, dim=-1)
            total = total + kl_weights[layer] * F.kl_div(student, teacher, reduction="batchmean")
    return total


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """|value - truth| / max(|truth|, floor), of the norms."""
    return ((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=max(floor, 1e-300))).item()
