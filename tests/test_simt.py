"""The CUDA kernels on the CPU: random problems under many schedules and grid sizes against float64, sanitizers, and
faults planted in the kernels that these checks must find. ``simt/simt_emu.h`` says how kernels run without a GPU."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from m2d_ext import reference
from m2d_ext.pooling import MODES, packed_coefficients, padded_coefficients
from simt import emulation

REASON = emulation.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of StateType
WIDTHS = [5, 36, 64, 72, 100, 130]
GRIDS = [1, 2, 3, 5]
# The sanitizers' share of the problems. ThreadSanitizer sees races in almost any schedule.
SANITIZED = {"asan": ([1, 4], [3]), "tsan": ([0, 1, 3], [2])}
FLOAT_TOLERANCE = 1e-5
TF32_TOLERANCE = 1e-2  # of products in tf32 alone: half types, and allow_tf32
UNCENTERED_TF32_TOLERANCE = 5e-2  # where candidates have little in common with the rows that give the center


def seeds_for(number: int) -> list[int]:
    """Of the 12 random schedules two, and the natural one."""
    return [0, 1 + number % 12, 1 + (number + 5) % 12]


@pytest.fixture(scope="module", autouse=True)
def old_builds() -> Iterator[None]:
    yield
    if REASON is None:
        emulation.prune()


def run(
    flavor: str, launcher: str, problem: dict[str, Any], number: int, csrc: Path = emulation.CSRC
) -> emulation.Outcome:
    """One problem; the driver compares all schedules and grids bit by bit."""
    seeds, grids = SANITIZED.get(flavor, (seeds_for(number), GRIDS))
    outcome = emulation.run(emulation.driver(flavor, csrc), launcher, problem, seeds, grids)
    if outcome.status == 2:  # a fault of this file, not of a kernel
        raise RuntimeError(outcome.errors)
    assert outcome.status == 0, outcome.errors
    return outcome


# -- hidden states --


@dataclass
class Tokens:
    """Hidden states of ragged texts: what a launcher reads, and the same numbers in float64."""

    arrays: dict[str, Any]
    dtype: torch.dtype
    views: list[list[Tensor]]  # L × blocks of (n, T, D), or packed (tokens, D), in the memory of `arrays`
    coefficients: list[Tensor]
    offsets: Tensor | None
    width: int

    @property
    def num_layers(self) -> int:
        return len(self.views)

    @property
    def num_texts(self) -> int:
        return sum(self.arrays["block_texts"])

    def texts(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """(tokens (T, D), coefficients (T,)) of each text."""
        if self.offsets is not None:
            lengths = self.offsets.diff().tolist()
            return list(zip(self.views[layer][0].split(lengths), self.coefficients[0].split(lengths), strict=True))
        return [
            (text, a)
            for view, table in zip(self.views[layer], self.coefficients, strict=True)
            for text, a in zip(view, table, strict=True)
        ]

    def empty_texts(self) -> Tensor:
        """(N,) which texts have no token."""
        return torch.stack([(a == 0).all() for _, a in self.texts(0)])

    def sums(self, absolute: bool = False) -> Tensor:
        """(L, N, D) weighted sums in float64."""
        layers = []
        for layer in range(self.num_layers):
            rows = []
            for text, a in self.texts(layer):
                terms = a.double()[:, None] * text.double()
                rows.append((terms.abs() if absolute else terms)[a != 0].sum(0))
            layers.append(torch.stack(rows))
        return torch.stack(layers)


def make_tokens(
    rng: random.Random,
    *,
    dtype: torch.dtype,
    pooling: str,
    num_layers: int,
    columns: int,
    batch: int,
    width: int,
    nan_padding: bool = True,
    ties: bool = False,
    longest: int = 9,
    layout: str | None = None,
    spread: float | None = None,
    dense: bool = False,
) -> Tokens:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    layout = layout or rng.choice(["padded", "columns", "packed"])
    shortest = rng.choice([0, min(1, longest)])
    lengths = [[rng.randint(shortest, longest) for _ in range(batch)] for _ in range(columns)]
    blocks = lengths if layout == "columns" else [[length for column in lengths for length in column]]
    packed = layout == "packed"
    offsets = torch.tensor([0, *blocks[0]]).cumsum(0) if packed else None
    coefficients = []
    for block in blocks:
        if offsets is not None:
            coefficients.append(packed_coefficients(offsets, int(offsets[-1]), pooling, torch.float32))
        else:
            mask = torch.arange(max(block) + rng.choice([0, 1, 3]) or 1) < torch.tensor(block)[:, None]
            mask = mask.flip(1) if rng.random() < 0.5 else mask
            coefficients.append(padded_coefficients(mask.long(), pooling, torch.float32))

    # Rows and texts lie apart by some strides, and what is between them is NaN.
    gap, text_gap = (0, 0) if dense else rng.choice([(0, 0), (0, 0), (8, 16), (3, 1)])
    arrays: dict[str, Any] = {
        "type": DTYPES.index(dtype),
        "num_layers": num_layers,
        "dim": width,
        "state_shift": 0 if dense else rng.choice([0, 0, 1]),
        "block_texts": [len(block) for block in blocks],
        "block_tokens": [a.shape[-1] for a in coefficients],
        "token_strides": [width + gap] * len(blocks),
        "text_strides": [0 if packed else a.shape[-1] * (width + gap) + text_gap for a in coefficients],
        **{f"coefficients.{b}": a for b, a in enumerate(coefficients)},
    }
    if offsets is not None:
        arrays["token_offsets"] = offsets
    views: list[list[Tensor]] = []
    drawn_spread = rng.choice([0.1, 1.0])
    spread = drawn_spread if spread is None else spread
    elements = []
    for layer in range(num_layers):
        common = torch.randn(width, generator=generator)
        views.append([])
        for b, a in enumerate(coefficients):
            shape = (*a.shape, width)
            strides = (
                (arrays["token_strides"][b], 1)
                if packed
                else (arrays["text_strides"][b], arrays["token_strides"][b], 1)
            )
            size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if a.numel() else 0
            memory = torch.full((size,), torch.nan, dtype=dtype)
            view = memory.as_strided(shape, strides)
            values = torch.randn(shape, generator=generator) * spread + common
            if ties:
                values = (2 * values).round() / 2
            view.copy_(values)
            if nan_padding:
                view.masked_fill_((a == 0)[..., None], torch.nan)
            arrays[f"state.{layer}.{b}"] = memory
            views[-1].append(view)
            if layer == 0:
                elements.append(size)
    arrays["state_elements"] = elements
    return Tokens(arrays, dtype, views, coefficients, offsets, width)


def draw_tokens(seed: int, **options: Any) -> tuple[random.Random, Tokens]:
    rng = random.Random(seed)
    defaults = {
        "dtype": DTYPES[seed % 3],
        "pooling": rng.choice(MODES),
        "num_layers": rng.randint(1, 3),
        "columns": rng.randint(2, 4),
        "batch": rng.randint(1, 4),
        "width": rng.choice([*WIDTHS, 1030 if seed % 4 == 0 else 5]),
        # Longer than what one block of pool_backward takes, for some.
        "longest": 70 if seed % 5 == 0 else 9,
    }
    return rng, make_tokens(rng, **(defaults | options))


def check_pool(flavor: str, seed: int, csrc: Path = emulation.CSRC, **options: Any) -> None:
    _, tokens = draw_tokens(seed, **options)
    outcome = run(flavor, "pool", tokens.arrays, seed, csrc)
    pooled = outcome.tensor("pooled", torch.float32, tokens.num_layers, tokens.num_texts, tokens.width)
    error = (pooled.double() - tokens.sums()).abs()
    assert (error <= 1e-6 * tokens.sums(absolute=True)).all()


def check_pool_max(flavor: str, seed: int, csrc: Path = emulation.CSRC) -> None:
    rng, tokens = draw_tokens(seed, pooling="max", ties=True)
    for layer in range(tokens.num_layers):  # some NaN in tokens that count
        for text, a in tokens.texts(layer):
            if rng.random() < 0.3 and a.any():
                text[rng.choice(a.nonzero().flatten().tolist()), rng.randrange(tokens.width)] = torch.nan
    outcome = run(flavor, "pool_max", tokens.arrays, seed, csrc)
    shape = tokens.num_layers, tokens.num_texts, tokens.width
    pooled = outcome.tensor("pooled", torch.float32, *shape)
    indices = outcome.tensor("indices", torch.int32, *shape)
    for layer in range(tokens.num_layers):
        for n, (text, a) in enumerate(tokens.texts(layer)):
            best, index = torch.zeros(tokens.width), torch.full((tokens.width,), -1, dtype=torch.int32)
            for t in a.nonzero().flatten().tolist():
                x = text[t].float()
                larger = (index < 0) | (x > best) | (x.isnan() & ~best.isnan())
                best, index = torch.where(larger, x, best), torch.where(larger, t, index)
            torch.testing.assert_close(pooled[layer, n], best, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(indices[layer, n], index.int())


def check_pool_backward(flavor: str, seed: int, launcher: str, csrc: Path = emulation.CSRC) -> None:
    rng, tokens = draw_tokens(seed, nan_padding=False, pooling="max" if launcher == "pool_max_backward" else "mean")
    generator = torch.Generator().manual_seed(seed)
    rows = tokens.num_layers + rng.randint(0, 2)
    layers = [rng.randrange(rows) for _ in range(tokens.num_layers)]
    pooled_grad = torch.randn(rows, tokens.num_texts, tokens.width, generator=generator)
    pooled_grad[:, tokens.empty_texts()] = torch.inf  # nobody asks for it
    problem = tokens.arrays | {"pooled_grad": pooled_grad, "layers": layers}
    factor = 1.0
    indices = torch.full(pooled_grad.shape, -1, dtype=torch.int32)
    if launcher == "pool_max_backward":
        for n, (_, a) in enumerate(tokens.texts(0)):
            choices = a.nonzero().flatten()
            if len(choices):
                pick = torch.randint(len(choices), (rows, tokens.width), generator=generator)
                indices[:, n] = choices[pick].int()
        problem["indices"] = indices
    elif rng.random() < 0.7:
        factor = 0.75
        problem["grad_output"] = torch.tensor([factor])
    outcome = run(flavor, launcher, problem, seed, csrc)

    for layer in range(tokens.num_layers):
        # The gradients take the place of the states, in the same memory.
        results = []
        for b, view in enumerate(tokens.views[layer]):
            memory = outcome.tensor(f"state.{layer}.{b}", tokens.dtype, tokens.arrays["state_elements"][b])
            results.append(memory.as_strided(view.shape, view.stride()))
            written = torch.zeros(len(memory), dtype=torch.bool)
            written.as_strided(view.shape, view.stride()).fill_(True)
            assert (memory[~written].view(torch.uint8) == 0xFF).all(), "written between the rows"
        mine = Tokens(tokens.arrays, tokens.dtype, [results], tokens.coefficients, tokens.offsets, tokens.width)
        for n, ((text, a), (before, _)) in enumerate(zip(mine.texts(0), tokens.texts(layer), strict=True)):
            row = pooled_grad[layers[layer], n].double()
            if launcher == "pool_max_backward":
                chosen = torch.arange(len(a))[:, None] == indices[layers[layer], n]
                exact = torch.where(chosen, row, 0.0)
            else:
                exact = torch.where(a[:, None] == 0, 0.0, factor * a.double()[:, None] * row)
            scale = exact.abs()
            if launcher == "pool_backward_add":
                exact, scale = exact + before.double(), scale + before.double().abs()
            info = torch.finfo(tokens.dtype)
            allowed = 4e-7 * scale + (0 if tokens.dtype == torch.float32 else 0.51 * info.eps * exact.abs())
            assert ((text.double() - exact).abs() <= allowed + info.smallest_normal * info.eps).all()


# -- the loss --


@dataclass
class LossProblem:
    arrays: dict[str, Any]
    options: dict[str, Any]
    pooled: Tensor  # (L, N, D) float64
    candidates: Tensor | None
    target_offset: int
    counted: Tensor  # (N,) rows whose gradient goes anywhere
    tolerance: float


def draw_loss(seed: int, *, source: str, batch: int | None = None, **options: Any) -> LossProblem:
    """source: a dtype of hidden states, "rows", or "gathered" for rows and candidates from elsewhere."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    columns = options.get("columns") or rng.randint(2, 4)
    batch = batch or rng.randint(1, 9)
    num_layers = options.get("num_layers") or rng.randint(1, 4)
    width = options.get("width") or rng.choice(WIDTHS)
    num_texts = columns * batch
    # Fewer than 4 dimensions of nearly parallel rows leave nothing of a float32 cosine but rounding.
    num_dims = options.get("num_dims") or rng.randint(1, min(8, width - 3))
    dims = sorted(rng.sample(range(4, width + 1), num_dims))
    full = options.get("full", False)  # every cell, KL and gradient is asked for
    zero_share = 0.0 if full else rng.choice([0.0, 0.0, 0.5, 1.0])
    weights = [[0.0 if rng.random() < zero_share else rng.random() for _ in dims] for _ in range(num_layers)]
    kl_share = 0.0 if full else rng.choice([0.0, 0.5, 1.0])
    kl_weights = [0.0 if rng.random() < kl_share else rng.random() for _ in range(num_layers - 1)] + [0.0]
    settings = {
        "dims": dims,
        "weights": weights,
        "kl_weights": kl_weights,
        "scale": rng.choice([1.0, 20.0]),
        "kl_temperature": rng.choice([0.3, 2.0]),
    }
    flags = {
        "normalize": options.get("normalize", full or rng.random() < 0.5),
        "wants_grad": full or rng.random() < 0.85,
        "allow_tf32": not full and rng.random() < 0.2,
    }
    arrays: dict[str, Any] = {
        **settings,
        **{name: int(value) for name, value in flags.items()},
        "num_layers": num_layers,
        "num_texts": num_texts,
        "num_anchors": batch,
        "dim": width,
        "target_offset": 0,
        "row_shift": rng.choice([0, 0, 1]),
    }
    candidates = None
    counted = torch.ones(num_texts, dtype=torch.bool)
    unrelated = False
    magnitude = rng.choice([1.0, 1.0, 1e-6, 10.0])
    zero_rows = rng.choice([0.0, 0.0, 0.2])
    spread = rng.choice([0.03, 0.3, 1.0])
    common = torch.randn(num_layers, 1, width, generator=generator)

    def rows(count: int) -> Tensor:
        values = torch.randn(num_layers, count, width, generator=generator) * spread + common
        values[:, torch.rand(count, generator=generator) < zero_rows] = 0.0
        return values * magnitude

    if source in ("rows", "gathered"):
        arrays["pooled"] = rows(num_texts)
        pooled = arrays["pooled"].double()
    else:
        tokens = make_tokens(
            rng,
            dtype=getattr(torch, source),
            pooling=rng.choice([mode for mode in MODES if mode != "max"]),
            num_layers=num_layers,
            columns=columns,
            batch=batch,
            width=width,
            spread=options.get("spread"),
        )
        arrays |= tokens.arrays
        pooled = tokens.sums()
        counted = ~tokens.empty_texts()
    if source == "gathered":
        count = num_texts - batch + rng.randint(0, 9) + options.get("more", 0)
        arrays["target_offset"] = rng.randint(0, count - batch)
        unrelated = rng.random() < 0.2
        if unrelated:  # so that nothing is gained by a common center
            common = torch.randn(num_layers, 1, width, generator=generator)
        arrays["candidates"] = rows(count)
        arrays["num_candidates"] = count
        candidates = arrays["candidates"].double()
    hardness = draw_hardness(seed, arrays, columns)
    arrays |= hardness
    options = settings | hardness | {"num_columns": columns, "normalize": flags["normalize"]}
    del options["column_size"]
    tolerance = FLOAT_TOLERANCE
    if source in ("rows", "gathered"):
        arrays["were_half"] = int(not full and random.Random(f"half {seed}").random() < 0.3)
    if source in ("bfloat16", "float16") or flags["allow_tf32"] or arrays.get("were_half"):
        tolerance = UNCENTERED_TF32_TOLERANCE if unrelated else TF32_TOLERANCE
    return LossProblem(arrays, options, pooled, candidates, arrays["target_offset"], counted, tolerance)


def draw_hardness(seed: int, arrays: dict[str, Any], columns: int) -> dict[str, Any]:
    """Nothing is hard where there is not a place for each candidate in every column."""
    count = arrays.get("num_candidates", arrays["num_texts"] - arrays["num_anchors"])
    size, rest = divmod(count, columns - 1)
    has_places = rest == 0 and arrays["target_offset"] + arrays["num_anchors"] <= size
    strengths = [(0.0, 0.0), (9.0, 0.0), (0.0, 5.0), (4.0, 4.0)] if has_places else [(0.0, 0.0)]
    others, own = random.Random(f"hardness {seed}").choice(strengths)
    return {"hardness": others, "own_hardness": own, "column_size": size}


def check_loss_problem(outcome: emulation.Outcome, problem: LossProblem) -> None:
    pooled = problem.pooled.clone().requires_grad_()
    candidates = None if problem.candidates is None else problem.candidates.clone().requires_grad_()
    truth = oracle.loss_of_pooled(pooled, candidates, problem.target_offset, **problem.options)
    weights = torch.tensor(problem.options["weights"], dtype=torch.float64)
    kl_weights = torch.tensor(problem.options["kl_weights"], dtype=torch.float64)
    with torch.no_grad():
        _, cells, kl = reference.matryoshka_2d_loss_pooled(
            problem.pooled,
            problem.candidates,
            problem.target_offset,
            **(problem.options | {"weights": weights, "kl_weights": kl_weights}),
        )
    tolerance = problem.tolerance
    noise = tolerance / 30 * problem.options["scale"]  # what rounding leaves of a logit
    values = {"loss": truth.detach(), "cells": cells, "kl": kl}
    for name, exact in values.items():
        found = outcome.tensor(name, torch.float32, *exact.shape)
        total = weights.sum() + kl_weights.sum() if name == "loss" else 1.0
        atol = float(noise * total) + 1e-7
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=atol, equal_nan=True)
    if not problem.arrays["wants_grad"]:
        assert "pooled_grad" not in outcome.arrays
        return
    pairs, zeros = [], []
    for leaf, name in [(pooled, "pooled_grad"), (candidates, "candidate_grad")]:
        if leaf is None:
            continue
        (exact,) = torch.autograd.grad(truth, leaf, retain_graph=True, materialize_grads=True)
        found = outcome.tensor(name, torch.float32, *leaf.shape).double()
        counted = problem.counted if leaf is pooled else torch.ones(leaf.shape[1], dtype=torch.bool)
        zero = (leaf == 0).all(-1).all(0)
        assert found[:, counted].isfinite().all()
        pairs += list(zip(found[:, counted & ~zero], exact[:, counted & ~zero], strict=True))
        zeros += list(zip(found[:, counted & zero], exact[:, counted & zero], strict=True))
    floor = 1e-3 * max(exact.norm().item() for _, exact in pairs) + 1e-7
    # softmax(z) - q is no smaller than the rounding of their exponentials, however near z is to the teacher's.
    noise = 1e-8 * kl_weights.max().item() / problem.options["kl_temperature"]
    for found, exact in pairs:
        assert (found - exact).norm().item() <= tolerance * max(exact.norm().item(), floor) + noise
    # The gradient of a row of zeros is divided by eps, and so is what rounding leaves of it in the truth.
    for found, exact in zeros:
        assert (found - exact).norm().item() <= tolerance * exact.norm().item() + 1e-15 / reference.NORM_EPS


def check_loss(flavor: str, seed: int, csrc: Path = emulation.CSRC, **options: Any) -> None:
    problem = draw_loss(seed, **options)
    check_loss_problem(run(flavor, "loss", problem.arrays, seed, csrc), problem)


SOURCES = ["float32", "bfloat16", "float16", "rows", "gathered"]
# More anchors than a tile has rows; then so much of everything that the kernels' tables are full.
LARGE = [
    {"source": "rows", "batch": 70, "columns": 2, "width": 36, "num_layers": 2, "num_dims": 2, "full": True},
    {"source": "gathered", "batch": 66, "width": 72, "num_layers": 1, "num_dims": 3, "full": True, "normalize": False},
    {"source": "bfloat16", "batch": 65, "columns": 3, "width": 36, "num_layers": 1, "num_dims": 2, "full": True},
    # More candidates than are summed in one part.
    {"source": "gathered", "batch": 18, "more": 1100, "width": 24, "num_layers": 1, "num_dims": 3, "full": True},
    {"source": "float32", "batch": 1, "columns": 2, "width": 5, "num_layers": 128, "num_dims": 1},
    {"source": "float32", "batch": 2, "columns": 8, "width": 64, "num_layers": 2, "num_dims": 16},
]


# -- the tests --


@pytest.mark.parametrize("flavor", emulation.FLAVORS)
def test_the_emulation(flavor: str) -> None:
    done = emulation.execute([emulation.emulator_tests(flavor)], timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


MISUSES = {
    "divergent_barrier": "divergent __syncthreads",
    "divergent_warp": "divergent warp",
    "half_warp": "deadlock",
    "misaligned_copy": "misaligned copy of 16 bytes",
    "copy_to_global": "copy to outside this block's shared memory",
    "read_before_wait": "NaN",
    "forgotten_copy": "never waited for",
    "shared_overrun": "shared memory overrun",
    "unwritten_shared": "NaN",
    "early_exit": "grid sync waits for a thread that has exited",
    "no_grid": "not cooperative",
}
SANITIZER_MISUSES = [
    ("asan", "read_before_wait", "use-after-poison"),
    ("asan", "shared_overrun", "out of bounds"),
    ("asan", "misaligned_vector", "misaligned address"),
    ("tsan", "race", "data race"),
]


@pytest.mark.parametrize(
    ("flavor", "misuse", "message"), [*(("plain", *item) for item in MISUSES.items()), *SANITIZER_MISUSES]
)
def test_misuse_is_diagnosed(flavor: str, misuse: str, message: str) -> None:
    done = emulation.execute([emulation.emulator_tests(flavor), misuse], timeout=60)
    assert done.returncode not in (0, 2, 124)
    assert message in done.stderr


@pytest.mark.parametrize("flavor", emulation.FLAVORS)
def test_no_misuse_is_no_error(flavor: str) -> None:
    done = emulation.execute([emulation.emulator_tests(flavor), "none"], timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(15))
def test_pool(seed: int) -> None:
    check_pool("plain", seed)


@pytest.mark.parametrize("seed", range(9))
def test_pool_max(seed: int) -> None:
    check_pool_max("plain", seed)


BACKWARD = ["pool_backward", "pool_backward_add", "pool_max_backward"]


@pytest.mark.parametrize("launcher", BACKWARD)
@pytest.mark.parametrize("seed", range(9))
def test_pool_backward(launcher: str, seed: int) -> None:
    check_pool_backward("plain", seed, launcher)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", range(16))
def test_loss(seed: int, source: str) -> None:
    check_loss("plain", seed, source=source)


@pytest.mark.parametrize(
    ("flavor", "number"), [*(("plain", i) for i in range(len(LARGE))), *((f, i) for f in SANITIZED for i in range(2))]
)
def test_large_loss(flavor: str, number: int) -> None:
    check_loss(flavor, number, **LARGE[number])


@pytest.mark.parametrize("flavor", SANITIZED)
@pytest.mark.parametrize("seed", range(3))
def test_pooling_under_sanitizers(flavor: str, seed: int) -> None:
    check_pool(flavor, seed)
    check_pool_max(flavor, seed)
    for launcher in BACKWARD:
        check_pool_backward(flavor, seed, launcher)


@pytest.mark.parametrize("flavor", SANITIZED)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_under_sanitizers(flavor: str, source: str) -> None:
    for seed in range(100, 103):
        check_loss(flavor, seed, source=source, batch=3)


@pytest.mark.parametrize("source", SOURCES[:3])
def test_texts_without_tokens_do_not_pull_the_center(source: str) -> None:
    """Where all texts but the empty ones are alike, centered rows are 0, and so is what rounding leaves of dP."""
    problem = draw_loss(1, source=source, batch=6, columns=2, num_layers=1, full=True, normalize=False, spread=0.0)
    empty = (problem.pooled == 0).all(-1)[0]
    assert empty.any()
    outcome = run("plain", "loss", problem.arrays, 1)
    found = outcome.tensor("pooled_grad", torch.float32, *problem.pooled.shape)[0, ~empty].double()
    assert found.norm(dim=-1).max() < 3e-6 * problem.options["scale"] / problem.pooled[0, ~empty].norm(dim=-1).min()


@pytest.mark.parametrize("flavor", emulation.FLAVORS)
@pytest.mark.parametrize("launcher", ["pool", "pool_max", "pool_backward", "loss"])
def test_wrong_offsets_reach_nothing_else(flavor: str, launcher: str) -> None:
    """Offsets in device memory are not checked before the launch: they are clamped to the tokens that are there."""
    coefficients = torch.ones(6)
    arrays: dict[str, Any] = {
        "type": 0,
        "num_layers": 1,
        "dim": 8,
        "state_shift": 0,
        "block_texts": [4],
        "block_tokens": [6],
        "token_strides": [8],
        "text_strides": [0],
        "state_elements": [48],
        "coefficients.0": coefficients,
        "token_offsets": [-5, 2, 2, 10**12, 4],  # of which [0, 2), [2, 2), [2, 6), [6, 6) is left
        "state.0.0": torch.arange(48.0),
        "pooled_grad": torch.ones(1, 4, 8),
        "layers": [0],
        "num_texts": 4,
        "num_anchors": 2,
        "target_offset": 0,
        "dims": [4, 8],
        "weights": [[1.0, 1.0]],
        "kl_weights": [0.0],
        "scale": 20.0,
        "hardness": 0.0,
        "own_hardness": 0.0,
        "column_size": 2,
        "kl_temperature": 1.0,
        "normalize": 0,
        "wants_grad": 1,
        "allow_tf32": 0,
        "row_shift": 0,
    }
    outcome = run(flavor, launcher, arrays, 0)
    if launcher == "pool":
        tokens = arrays["state.0.0"].reshape(6, 8)
        expected = torch.stack([tokens[:2].sum(0), torch.zeros(8), tokens[2:].sum(0), torch.zeros(8)])
        assert torch.equal(outcome.tensor("pooled", torch.float32, 4, 8), expected)
    elif launcher == "pool_backward":
        assert torch.equal(outcome.tensor("state.0.0", torch.float32, 6, 8), torch.ones(6, 8))


def _packed(states: Tensor, offsets: list[int]) -> dict[str, Any]:
    tokens, width = states.shape
    return {
        "type": 0,
        "num_layers": 1,
        "dim": width,
        "state_shift": 0,
        "block_texts": [len(offsets) - 1],
        "block_tokens": [tokens],
        "token_strides": [width],
        "text_strides": [0],
        "state_elements": [states.numel()],
        "coefficients.0": torch.ones(tokens),
        "token_offsets": offsets,
        "state.0.0": states.flatten(),
    }


@pytest.mark.parametrize("flavor", emulation.FLAVORS)
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("launcher", BACKWARD)
def test_gradients_of_tokens_outside_of_all_texts(flavor: str, launcher: str, width: int) -> None:
    """Before the first offset and behind the last one: nobody looked at the offsets, and the memory is not blank."""
    states = torch.arange(40.0 * width).reshape(40, width)
    inside = torch.zeros(40, 1)
    inside[2:5] = 1
    problem = _packed(states, [2, 3, 3, 5]) | {
        "pooled_grad": torch.ones(1, 3, width),
        "layers": [0],
        "indices": torch.zeros(1, 3, width, dtype=torch.int32),
    }
    grad = run(flavor, launcher, problem, 0).tensor("state.0.0", torch.float32, 40, width)
    if launcher == "pool_backward_add":
        assert torch.equal(grad, states + inside)
    elif launcher == "pool_backward":
        assert torch.equal(grad, inside.expand_as(grad))
    else:
        inside[4] = 0  # the last text's second token, not the first
        assert torch.equal(grad, inside.expand_as(grad))


@pytest.mark.parametrize("width", [1024, 5])
def test_long_texts_are_pooled_to_the_last_digit(width: int) -> None:
    states = 1 + 0.1 * torch.randn(2000, width, generator=torch.Generator().manual_seed(0))
    pooled = run("plain", "pool", _packed(states, [0, 2000]), 0).tensor("pooled", torch.float32, width)
    exact = states.double().sum(0)
    assert ((pooled - exact).abs() < 1.5e-7 * exact).all()


@pytest.mark.parametrize("flavor", emulation.FLAVORS)
def test_no_tokens_at_all(flavor: str) -> None:
    rng = random.Random(0)
    for pooling, launcher in [("mean", "pool"), ("max", "pool_max"), ("mean", "pool_backward")]:
        tokens = make_tokens(
            rng,
            dtype=torch.float32,
            pooling=pooling,
            num_layers=2,
            columns=2,
            batch=2,
            width=36,
            longest=0,
            layout="packed",
        )
        problem = tokens.arrays | {"pooled_grad": torch.ones(2, 4, 36), "layers": [0, 1]}
        outcome = run(flavor, launcher, problem, 0)
        if launcher != "pool_backward":
            assert not outcome.tensor("pooled", torch.float32, 2, 4, 36).any()


# -- faults --


@dataclass
class Fault:
    """A change of a kernel, and a check that must notice it."""

    file: str
    old: str
    new: str
    check: str = "loss"
    flavors: tuple[str, ...] = ("plain", "asan", "tsan")


FAULTS = {
    "no barrier after the wait for copies": Fault(
        "tile_product.cuh",
        "      wait_copies<kStages - 2>();\n      __syncthreads();\n",
        "      wait_copies<kStages - 2>();\n",
    ),
    "insufficient wait for copies": Fault(
        "tile_product.cuh", "wait_copies<kStages - 2>();", "wait_copies<kStages - 1>();"
    ),
    "a stage is overwritten while it is read": Fault(
        "tile_product.cuh", "scratch + next % kStages", "scratch + (next + 1) % kStages"
    ),
    "unmasked tail of a row": Fault("tile_product.cuh", "from + e, e < present);", "from + e, present > 0);"),
    "unmasked tail of a tile": Fault("tile_product.cuh", "if (column < columns) body", "body"),
    "no grid sync after the norms": Fault("forward.cu", "  norms(p);\n  grid_sync();", "  norms(p);"),
    "no grid sync after the centers": Fault("forward.cu", "  centers(p);\n  grid_sync();", "  centers(p);"),
    "no grid sync after the rows are centered": Fault(
        "forward.cu", "  center_rows(p);\n  grid_sync();", "  center_rows(p);"
    ),
    "the KL's rows are counted from anywhere": Fault("forward.cu", "*p.kl_ticket = 0;", "*p.kl_ticket = 1;"),
    "no grid sync before the softmax": Fault("forward.cu", "learn(p);\n  grid_sync();", "learn(p);"),
    "no grid sync before the columns": Fault(
        "forward.cu", "anchor_cells(p, wave);\n  grid_sync();", "anchor_cells(p, wave);"
    ),
    "no grid sync before the gradients": Fault("forward.cu", "kl_means(p);\n  grid_sync();", "kl_means(p);"),
    "no barrier between the warps' sums of a column": Fault(
        "cells.cuh",
        "      __syncthreads();\n      const int g = thread / kColumnWidth;",
        "      const int g = thread / kColumnWidth;",
    ),
    "no barrier before the candidates' sides are read": Fault(
        "cells.cuh", "    __syncthreads();\n    for (int index", "    for (int index"
    ),
    "the sums of the next cell where those of this one are": Fault("cells.cuh", "      turn = 1 - turn;\n", ""),
    "no barrier between the terms and the elements": Fault(
        "gradients.cuh",
        "  __syncthreads();\n  const GradientRows<Real> rows",
        "  const GradientRows<Real> rows",
    ),
    "the terms are not loaded": Fault(
        "tile_product.cuh", "if (stage == -1) meanwhile();", "if (stage == -kStages) meanwhile();"
    ),
    "no barrier before the next tile": Fault("gradients.cuh", "  __syncthreads();  // before the terms", "  //"),
    "no grid sync before the parts of a cell are merged": Fault(
        "forward.cu",
        "  grid_sync();\n  if (p.parts > 1) {\n    merge_cell",
        "  if (p.parts > 1) {\n    merge_cell",
        "parts",
    ),
    "no grid sync before the parts of the gradients are merged": Fault(
        "forward.cu", "    grid_sync();\n    merge_gradient", "    merge_gradient", "parts"
    ),
    "shared write out of bounds": Fault(
        "forward.cu", "if (lane == 0) sums[warp] = sum;", "if (lane == 0) sums[warp] = sums[warp + 1] = sum;"
    ),
    "no barrier between the groups' sums": Fault(
        "tokens.cuh", "  __syncthreads();\n  const int columns", "  const int columns", "pool"
    ),
    "tokens are summed before they are there": Fault(
        "tokens.cuh", "kPoolSteps / kPoolCommit - 1>();", "kPoolSteps / kPoolCommit>();", "pool"
    ),
    "padding is read": Fault("tokens.cuh", "? coefficients[i] : 0.0f", "? coefficients[i] + 1e-30f : 0.0f", "pool"),
    "coefficients are read past their end": Fault("tokens.cuh", "i < left ?", "i <= left ?", "pool"),
    "a row of the backward pass is too wide": Fault(
        "tokens.cuh",
        "const int left = (dim - begin) / kCount;",
        "const int left = (dim - begin) / kCount + 1;",
        "backward",
    ),
}
# More candidates than one part has.
PARTS_PROBLEM = {
    "source": "gathered",
    "batch": 3,
    "more": 1030,
    "width": 12,
    "num_layers": 1,
    "num_dims": 2,
    "full": True,
}
# Two layers, both with every cell and KL, two tiles of anchors and tails in each direction.
FAULT_PROBLEM = {
    "source": "rows",
    "batch": 67,
    "columns": 2,
    "width": 36,
    "num_layers": 2,
    "num_dims": 2,
    "full": True,
}


def mutant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault."""
    csrc = folder / "csrc"
    shutil.copytree(emulation.CSRC, csrc)
    path = csrc / "cuda" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times: {fault.old!r}"
    path.write_text(text.replace(fault.old, fault.new))
    return csrc


def check_for_faults(flavor: str, check: str, csrc: Path) -> None:
    if check == "pool":
        for width in (64, 72):
            check_pool(flavor, 1, csrc, width=width, longest=70, layout="padded", dense=True)
    elif check == "parts":
        check_loss(flavor, 3, csrc, **PARTS_PROBLEM)
    elif check == "backward":
        check_pool_backward(flavor, 0, "pool_backward", csrc)
    else:
        check_loss(flavor, 5, csrc, **FAULT_PROBLEM)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """csrc with each of the faults; compiled ahead of the tests that ask for it."""

    def build(fault: Fault, folder: Path) -> Path:
        csrc = mutant(fault, folder)
        emulation.driver(fault.flavors[0], csrc)
        return csrc

    pool = ThreadPoolExecutor(emulation.JOBS)
    try:
        yield {name: pool.submit(build, fault, tmp_path_factory.mktemp("fault")) for name, fault in FAULTS.items()}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, mutants: dict[str, Future[Path]]) -> None:
    csrc = mutants[name].result()
    for flavor in FAULTS[name].flavors:
        try:
            check_for_faults(flavor, FAULTS[name].check, csrc)
        except AssertionError:
            return
    pytest.fail(f"no check finds: {name}")


@pytest.mark.parametrize("check", sorted({fault.check for fault in FAULTS.values()}))
@pytest.mark.parametrize("flavor", emulation.FLAVORS)
def test_without_a_fault_nothing_is_found(flavor: str, check: str) -> None:
    check_for_faults(flavor, check, emulation.CSRC)


WAVES = Fault("forward.cu", "const int64_t budget =", "const int64_t budget = 1 + 0 *")


@pytest.mark.parametrize("number", range(3))
def test_waves(number: int, tmp_path: Path) -> None:
    """Work in so many waves, of one layer and 64 anchors each, as otherwise only far larger problems have."""
    check_loss("plain", number, mutant(WAVES, tmp_path), **(LARGE[number] | {"num_layers": 2}))
