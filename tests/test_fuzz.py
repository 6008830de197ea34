"""Random problems over shapes, dtypes, masks, layouts, poolings and weights against plain loops in float64.

100 problems by default; ``make fuzz`` asks for more (M2D_FUZZ_EXAMPLES).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import m2d_ext
import oracle
from m2d_ext.functional import matryoshka_2d_loss

EXAMPLES = int(os.environ.get("M2D_FUZZ_EXAMPLES", "100"))
BACKEND = "reference" if m2d_ext.build_info()["build"] == "none" else "fused"
POOLINGS = ["mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean", "max"]
LAYOUTS = ["padded", "columns", "packed", "strided", "expanded"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Problem:
    layout: str
    dtype: torch.dtype
    pooling: str
    lengths: list[list[int]]  # tokens of each text, per column
    left_padding: bool
    num_layers: int
    width: int
    seed: int
    zero_share: float
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_layers, len(self.options["dims"]))
        drop = torch.rand(shape, generator=self.generator) < self.zero_share
        weights = torch.rand(shape, generator=self.generator, dtype=torch.float64).masked_fill(drop, 0.0)
        kl_weights = torch.rand(self.num_layers, generator=self.generator, dtype=torch.float64)
        kl_weights[-1] = 0.0
        self.options |= {
            "num_columns": len(self.lengths),
            "weights": weights.tolist(),
            "kl_weights": kl_weights.tolist(),
        }

    def blocks(self) -> list[list[int]]:
        """Texts that share a tensor."""
        return self.lengths if self.layout == "columns" else [[t for column in self.lengths for t in column]]

    def masks(self) -> list[Tensor]:
        masks = []
        for block in self.blocks():
            position = torch.arange(max(block) + 1)  # at least one token of padding
            mask = position < torch.tensor(block)[:, None]
            masks.append((mask.flip(1) if self.left_padding else mask).long())
        return masks

    def state(self, block: list[int]) -> Tensor:
        """(n, T, D) of the dtype; expanded: each text holds the same tokens."""
        texts = 1 if self.layout == "expanded" else len(block)
        shape = (texts, max(block) + 1, self.width)
        common = torch.randn(self.width, generator=self.generator, dtype=torch.float64)
        state = (torch.randn(shape, generator=self.generator, dtype=torch.float64) + common).to(self.dtype)
        return state.expand(len(block), -1, -1) if self.layout == "expanded" else state

    def run(self) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """Loss and gradients, ours then the truth's, the latter on padded float64 copies of the same numbers."""
        masks, blocks = self.masks(), self.blocks()
        states = [[self.state(block) for block in blocks] for _ in range(self.num_layers)]
        exact = [[state.double().requires_grad_() for state in layer] for layer in states]
        rows = [
            torch.cat([oracle.pool(h, m, self.pooling) for h, m in zip(layer, masks, strict=True)]) for layer in exact
        ]
        truth = oracle.loss_of_pooled(torch.stack(rows), **self.options)
        expected = torch.autograd.grad(truth, [state for layer in exact for state in layer])

        if self.layout == "packed":
            keep = masks[0].bool()
            leaves = [[layer[0][keep].requires_grad_()] for layer in states]
            offsets = torch.tensor([0, *blocks[0]]).cumsum(0)
            where: dict[str, Any] = {"cu_seqlens": offsets}
            expected = [grad[keep] for grad in expected]
        else:
            if self.layout == "strided":
                states = [[s.transpose(0, 2).contiguous().transpose(0, 2) for s in layer] for layer in states]
            # A detached view keeps its strides, which clone() would not.
            leaves = [[state.detach().requires_grad_() for state in layer] for layer in states]
            where = {"attention_mask": masks}
        loss = matryoshka_2d_loss(leaves, **where, pooling=self.pooling, backend=BACKEND, **self.options)
        assert isinstance(loss, Tensor)
        flat = [state for layer in leaves for state in layer]
        grads = torch.autograd.grad(loss, flat, allow_unused=True)
        grads = [torch.zeros_like(s) if g is None else g for s, g in zip(flat, grads, strict=True)]
        return loss.detach(), grads, truth.detach(), list(expected)


@st.composite
def problems(draw: Any) -> Problem:
    width = draw(st.sampled_from([4, 8, 17, 33, 64]))
    layout = draw(st.sampled_from(LAYOUTS))
    batch = draw(st.integers(1, 7))
    columns = draw(st.integers(2, 4))
    return Problem(
        layout=layout,
        dtype=draw(st.sampled_from(DTYPES)),
        pooling=draw(st.sampled_from(POOLINGS)),
        lengths=[
            [draw(st.integers(0 if draw(st.booleans()) else 1, 6)) for _ in range(batch)] for _ in range(columns)
        ],
        left_padding=draw(st.booleans()),
        num_layers=draw(st.integers(1, 4)),
        width=width,
        seed=draw(st.integers(0, 2**31)),
        zero_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        options={
            "dims": draw(st.lists(st.integers(4, width), min_size=1, max_size=4, unique=True).map(sorted)),
            "scale": draw(st.sampled_from([1.0, 20.0])),
            "kl_temperature": draw(st.sampled_from([0.3, 2.0])),
            "normalize": draw(st.booleans()),
        },
    )


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(problem=problems())
def test_random_problems(problem: Problem) -> None:
    loss, grads, truth, expected = problem.run()
    assert loss.isfinite()
    tolerance = 1e-9 if problem.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=1e-6 if tolerance == 1e-5 else 1e-11)
    # A text without tokens has an embedding of 0 and so 1e12 in the truth's gradient, times coefficients of 0.
    floor = 1e-3 * max(grad.norm().item() for grad in expected) + 1e-7
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == problem.dtype
        assert grad.isfinite().all()
        # Half types round each element that is handed out; float16 is coarse below 6e-5.
        rounding = (exact.to(problem.dtype).double() - exact).norm().item()
        allowed = tolerance * max(exact.norm().item(), floor) + 1.1 * rounding
        assert (grad.double() - exact).norm().item() <= allowed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_reached(layout: str) -> None:
    """What the random problems draw from runs at all, for each dtype and pooling."""
    for dtype in DTYPES:
        for pooling in POOLINGS:
            problem = Problem(
                layout, dtype, pooling, [[3, 0, 2], [1, 4, 2]], False, 2, 8, 0, 0.0, {"dims": [4, 8], "scale": 5.0}
            )
            loss, _, truth, _ = problem.run()
            torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
