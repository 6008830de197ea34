"""The public functions on both backends, against plain loops in float64."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import m2d_ext
import oracle
from m2d_ext import autograd, functional, ops, similarity
from m2d_ext.functional import matryoshka_2d_loss, matryoshka_2d_loss_pooled, pool_layers

COMPILED = m2d_ext.build_info()["build"] != "none"
BACKENDS = ["reference", pytest.param("fused", marks=pytest.mark.skipif(not COMPILED, reason="no extension"))]
POOLINGS = ["mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean", "max"]
# The reference computes in the states' own dtype, the kernels wider: float32 is rounding in both.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
backends = pytest.mark.parametrize("backend", BACKENDS)


@dataclass
class Case:
    """A batch of L layers × C columns, each column padded to its own width, and the loss asked of it."""

    states: list[list[Tensor]]  # L × C tensors (B, T_c, D), float64
    masks: list[Tensor]  # C tensors (B, T_c)
    options: dict[str, Any]
    pooling: str = "mean"
    upstream: float = 1.5  # the loss's own gradient

    def leaves(self, dtype: torch.dtype) -> list[list[Tensor]]:
        return [[state.to(dtype).clone().requires_grad_() for state in layer] for layer in self.states]

    def truth(self) -> tuple[Tensor, list[Tensor]]:
        leaves = self.leaves(torch.float64)
        rows = [
            torch.cat([oracle.pool(h, m, self.pooling) for h, m in zip(layer, self.masks, strict=True)])
            for layer in leaves
        ]
        loss = oracle.loss_of_pooled(torch.stack(rows), **self.options)
        return loss.detach(), self._gradients(loss, leaves)

    def run(self, backend: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = self.leaves(dtype)
        loss = matryoshka_2d_loss(leaves, self.masks, pooling=self.pooling, backend=backend, **self.options)
        assert isinstance(loss, Tensor)
        return loss.detach(), self._gradients(loss, leaves)

    def _gradients(self, loss: Tensor, leaves: list[list[Tensor]]) -> list[Tensor]:
        flat = [state for layer in leaves for state in layer]
        grads = torch.autograd.grad(loss * self.upstream, flat, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(flat, grads, strict=True)]


def assert_close(
    outcome: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]], tolerance: float, noise: float = 0.0
) -> None:
    """Loss and each gradient within the tolerance of the truth; gradients measured against the largest of them."""
    assert abs(outcome[0].item() - truth[0].item()) <= tolerance * abs(truth[0].item()) + noise
    floor = 1e-3 * max(grad.norm().item() for grad in truth[1]) + noise / tolerance
    for grad, expected in zip(outcome[1], truth[1], strict=True):
        assert oracle.relative_error(grad, expected, floor) <= tolerance


def make_case(
    seed: int,
    num_layers: int,
    lengths: tuple[int, ...],
    batch: int,
    width: int,
    dims: list[int],
    *,
    spread: float = 1.0,
    zero_cells: float = 0.0,
    pooling: str = "mean",
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        # Rounded to float32, so that a float32 run starts from the same numbers as the truth.
        return (torch.randn(shape, generator=generator) * spread).double()

    common = randn(num_layers, 1, 1, width) / spread
    states = [[(randn(batch, t, width) + c).float().double() for t in lengths] for c in common]
    masks = [(torch.rand(batch, t, generator=generator) > 0.3).long() for t in lengths]
    weights = torch.rand(num_layers, len(dims), generator=generator)
    weights = weights.masked_fill(torch.rand(weights.shape, generator=generator) < zero_cells, 0.0)
    kl_weights = torch.rand(num_layers, generator=generator)
    kl_weights[-1] = 0
    defaults = {
        "num_columns": len(lengths),
        "dims": dims,
        "weights": weights.double().tolist(),
        "kl_weights": kl_weights.double().tolist(),
    }
    return Case(states, masks, {**defaults, **options}, pooling)


@st.composite
def cases(draw: Any) -> Case:
    width = draw(st.sampled_from([4, 17, 32, 48]))
    # Fewer than 4 dimensions of nearly parallel rows leave nothing of a float32 cosine but rounding.
    dims = draw(st.lists(st.integers(4, width), min_size=1, max_size=4, unique=True).map(sorted))
    case = make_case(
        draw(st.integers(0, 2**31)),
        draw(st.integers(1, 4)),
        draw(st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)),
        draw(st.integers(1, 9)),
        width,
        dims,
        spread=draw(st.sampled_from([0.3, 1.0, 5.0])),
        zero_cells=draw(st.sampled_from([0.0, 0.5, 1.0])),
        pooling=draw(st.sampled_from(POOLINGS)),
        scale=draw(st.sampled_from([1.0, 20.0])),
        kl_temperature=draw(st.sampled_from([0.3, 1.0])),
        normalize=draw(st.booleans()),
    )
    case.upstream = draw(st.sampled_from([1.0, 1.5]))
    return case


@backends
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_float64(backend: str, case: Case) -> None:
    assert_close(case.run(backend, torch.float64), case.truth(), TOLERANCE[torch.float64], noise=1e-12)


@pytest.mark.skipif(not COMPILED, reason="no extension")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_float32(case: Case) -> None:
    truth = case.truth()
    noise = 1e-7 * max(1.0, truth[0].item())
    assert_close(case.run("fused", torch.float32), truth, TOLERANCE[torch.float32], noise=noise)


@backends
@pytest.mark.parametrize("normalize", [False, True])
def test_kl_alone(backend: str, normalize: bool) -> None:
    """With all cells 0 only the KL is left: an error in it would drown in the contrastive loss."""
    case = make_case(0, 4, (3, 5), 6, 32, [8, 32], zero_cells=1.0, normalize=normalize)
    truth = case.truth()
    assert truth[0] > 0
    assert_close(case.run(backend, torch.float64), truth, TOLERANCE[torch.float64])


@backends
@pytest.mark.parametrize("size", [1e-9, 1.0, 80.0, 1e9])
def test_kl_of_rows_of_any_size(backend: str, size: float) -> None:
    """So small that all features are alike, up to where a softmax is all on one of them."""
    rows = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size
    rows.requires_grad_()
    options: dict[str, Any] = {"num_columns": 2, "dims": [20], "weights": [[0.0]] * 3, "kl_weights": [1.0, 0.5, 0.0]}
    loss = matryoshka_2d_loss_pooled(rows, backend=backend, **options)
    truth = oracle.loss_of_pooled(rows, **options)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-15)
    found, expected = (torch.autograd.grad(value, rows)[0] for value in (loss, truth))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@backends
def test_final_layer_of_weight_zero_still_teaches(backend: str) -> None:
    case = make_case(0, 3, (3, 5), 6, 32, [8, 32])
    case.options["weights"][-1] = [0.0, 0.0]
    truth = case.truth()
    outcome = case.run(backend, torch.float64)
    assert_close(outcome, truth, TOLERANCE[torch.float64])
    assert all(not grad.any() for grad in outcome[1][-2:]), "the teacher is detached"


@backends
def test_saturated_rows(backend: str) -> None:
    """Positives equal to their anchors at a high scale: what is left of the loss is all in small differences."""
    case = make_case(1, 1, (1, 1), 6, 16, [16], scale=100.0)
    case.states[0][1] = case.states[0][0].clone()
    case.masks = [torch.ones(6, 1)] * 2
    truth = case.truth()
    assert truth[0] < 1e-6
    outcome = case.run(backend, torch.float64)
    # The plain loop forms p - 1 and so is itself exact to 1e-16 of 1, not of the gradient.
    torch.testing.assert_close(outcome[0], truth[0], rtol=0, atol=1e-15)
    for grad, expected in zip(outcome[1], truth[1], strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


@backends
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pool_layers(backend: str, pooling: str) -> None:
    case = make_case(2, 3, (7,), 5, 16, [16])
    case.masks[0][2] = 0
    leaves = case.leaves(torch.float64)
    rows = pool_layers(leaves, case.masks, pooling=pooling, backend=backend)
    expected = torch.stack([oracle.pool(layer[0], case.masks[0], pooling) for layer in leaves])
    torch.testing.assert_close(rows, expected)
    upstream = torch.randn_like(rows)
    flat = [layer[0] for layer in leaves]
    for grad, truth in zip(
        torch.autograd.grad(rows, flat, upstream), torch.autograd.grad(expected, flat, upstream), strict=True
    ):
        torch.testing.assert_close(grad, truth)


@backends
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_equals_padded(backend: str, pooling: str) -> None:
    case = make_case(3, 3, (6,), 8, 16, [4, 16])
    lengths = torch.tensor([6, 1, 3, 2, 5, 4, 6, 1])
    mask = torch.arange(6) < lengths[:, None]
    options = {**case.options, "num_columns": 2, "pooling": pooling, "backend": backend}
    padded = [layer[0].clone().requires_grad_() for layer in case.states]
    packed = [state.detach()[mask].requires_grad_() for state in padded]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    loss = matryoshka_2d_loss(padded, mask, **options)
    packed_loss = matryoshka_2d_loss(packed, cu_seqlens=cu_seqlens, **options)
    torch.testing.assert_close(packed_loss, loss)
    for a, b in zip(torch.autograd.grad(packed_loss, packed), torch.autograd.grad(loss, padded), strict=True):
        torch.testing.assert_close(a, b[mask])


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_padding_is_never_read() -> None:
    case = make_case(4, 2, (6, 6), 5, 16, [8, 16])
    clean = case.run("fused", torch.float32)
    for layer in case.states:
        for state, mask in zip(layer, case.masks, strict=True):
            state[mask == 0] = torch.nan
    poisoned = case.run("fused", torch.float32)
    assert torch.equal(clean[0], poisoned[0])
    assert all(map(torch.equal, clean[1], poisoned[1]))


@backends
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_texts_without_tokens_are_zero(backend: str, pooling: str, normalize: bool) -> None:
    case = make_case(5, 2, (4, 3), 4, 16, [8, 16], pooling=pooling, normalize=normalize)
    case.masks[0][1] = 0
    case.masks[1][3] = 0
    loss, grads = case.run(backend, torch.float32)
    assert math.isfinite(loss)
    assert all(grad.isfinite().all() for grad in grads)
    assert all(not grads[i][1].any() and not grads[i + 1][3].any() for i in (0, 2))


@backends
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_tensor_of_no_tokens_pools_to_zero(backend: str, pooling: str) -> None:
    states = [[torch.ones(2, 0, 4), torch.ones(3, 5, 4)]] * 2
    rows = pool_layers(states, [torch.ones(2, 0), torch.ones(3, 5)], pooling=pooling, backend=backend)
    assert rows.shape == (2, 5, 4)
    assert not rows[:, :2].any()
    assert rows[:, 2:].all()


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_bad(backend: str, bad: float) -> None:
    case = make_case(6, 2, (3, 3), 4, 16, [8, 16])
    case.masks = [torch.ones(4, 3)] * 2
    case.states[1][0][0, 0, 0] = bad
    loss, _ = case.run(backend, torch.float32)
    assert not math.isfinite(loss)


@backends
def test_another_default_device(backend: str) -> None:
    case = make_case(13, 2, (3, 3), 4, 16, [8, 16])
    leaves = case.leaves(torch.float32)
    with torch.device("meta"):
        loss = matryoshka_2d_loss(leaves, case.masks, backend=backend, **case.options)
    assert isinstance(loss, Tensor)
    assert loss.device.type == "cpu"


@backends
def test_cells(backend: str) -> None:
    case = make_case(7, 3, (4, 4), 5, 16, [4, 8, 16])
    case.options["weights"] = [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 3.0]]
    case.options["kl_weights"] = [0.0, 0.5, 0.0]
    leaves = case.leaves(torch.float64)
    loss, cells, kl = matryoshka_2d_loss(leaves, case.masks, return_cells=True, backend=backend, **case.options)
    weights, kl_weights = torch.tensor(case.options["weights"]), torch.tensor(case.options["kl_weights"])
    assert torch.equal(cells.isnan(), weights == 0)
    assert torch.equal(kl.isnan(), kl_weights == 0)
    total = (cells.nan_to_num() * weights).sum() + (kl.nan_to_num() * kl_weights).sum()
    torch.testing.assert_close(total.double(), loss.detach())
    assert not cells.requires_grad
    assert not kl.requires_grad


@backends
def test_unused_layers_get_no_gradient(backend: str) -> None:
    case = make_case(8, 3, (4, 4), 5, 16, [16])
    case.options["weights"] = [[1.0], [0.0], [1.0]]
    case.options["kl_weights"] = None
    leaves = case.leaves(torch.float32)
    matryoshka_2d_loss(leaves, case.masks, backend=backend, **case.options).backward()
    assert [leaf.grad is None for layer in leaves for leaf in layer] == [False, False, True, True, False, False]


@backends
def test_partial_requires_grad(backend: str) -> None:
    case = make_case(9, 3, (4, 3), 5, 16, [8, 16])
    dense = case.run(backend, torch.float64)[1]
    leaves = case.leaves(torch.float64)
    leaves[0][0].requires_grad_(False)
    leaves[2][0].requires_grad_(False)
    leaves[2][1].requires_grad_(False)
    loss = matryoshka_2d_loss(leaves, case.masks, backend=backend, **case.options) * 1.5
    loss.backward()
    for i, leaf in enumerate(leaf for layer in leaves for leaf in layer):
        assert (leaf.grad is None) == (i in (0, 4, 5))
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, dense[i])


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    monkeypatch.setattr(autograd, "_expectation", autograd._Expectation())
    for name in ("loss", "loss_and_gradients"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, of=original: (wanted.append(args[-1]), of(*args))[1])
    case = make_case(10, 2, (4, 4), 5, 16, [16])
    leaves = case.leaves(torch.float32)
    with torch.no_grad():
        quiet = matryoshka_2d_loss(leaves, case.masks, **case.options)
    detached = matryoshka_2d_loss([[s.detach() for s in layer] for layer in leaves], case.masks, **case.options)
    loud = matryoshka_2d_loss(leaves, case.masks, **case.options)
    for state in leaves[0]:
        state.requires_grad_(False)
    matryoshka_2d_loss(leaves, case.masks, **case.options)
    assert wanted == [False, False, [0, 1], [1]]
    assert not quiet.requires_grad
    assert torch.equal(quiet, loud.detach())
    assert torch.equal(detached, quiet)


@backends
def test_each_backward_has_gradients_of_its_own(backend: str) -> None:
    """Of any g, in any order, and whatever becomes of those that were handed out before."""
    case = make_case(18, 3, (5, 4), 6, 16, [8, 16])
    leaves = case.leaves(torch.float64)
    flat = [state for layer in leaves for state in layer]
    unit = [grad / case.upstream for grad in case.truth()[1]]
    loss = matryoshka_2d_loss(leaves, case.masks, backend=backend, **case.options)
    assert isinstance(loss, Tensor)
    for upstream in (1.0, 1.0, 2.5, 1.0, 0.0):
        grads = torch.autograd.grad(loss, flat, torch.tensor(upstream, dtype=torch.float64), retain_graph=True)
        for grad, expected in zip(grads, unit, strict=True):
            torch.testing.assert_close(grad, upstream * expected)
            grad.zero_()


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_the_forward_writes_the_gradients_that_a_loop_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for the g of the last two backwards, with the bits of a scatter, which any other g needs."""
    called: list[str] = []
    for name in ("loss", "loss_and_gradients", "pool_backward"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, of=original, name=name: (called.append(name), of(*args))[1])
    monkeypatch.setattr(autograd, "_expectation", autograd._Expectation())
    case = make_case(19, 3, (5, 4), 6, 16, [8, 16])
    leaves = case.leaves(torch.float32)
    flat = [state for layer in leaves for state in layer]
    written, both, scattered = (
        ["loss_and_gradients"],
        ["loss_and_gradients", "pool_backward"],
        ["loss", "pool_backward"],
    )
    first: dict[float, tuple[Tensor, ...]] = {}
    for g, expected in (
        *((1.0, written), (1.0, written)),
        *((0.25, both), (0.25, scattered), (0.25, written), (0.25, written)),
        *((1.0, both), (0.25, scattered), (1.0, scattered), (1.0, scattered), (1.0, written)),
        *((math.nan, both), (1.0, scattered), (1.0, scattered), (1.0, written)),
    ):
        called.clear()
        loss = matryoshka_2d_loss(leaves, case.masks, backend="fused", **case.options)
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, flat, torch.tensor(g))
        assert called == expected
        for grad, other in zip(grads, first.setdefault(g, grads), strict=True):
            torch.testing.assert_close(grad, other, rtol=0, atol=0, equal_nan=True)


@backends
def test_strides_do_not_matter(backend: str) -> None:
    """Transposed, sliced and expanded states are those numbers all the same."""
    case = make_case(11, 2, (4, 4), 5, 16, [8, 16])
    dense = case.run(backend, torch.float64)
    views = [
        [state.transpose(0, 2).contiguous().transpose(0, 2) for state in case.states[0]],
        [torch.cat([state, state], dim=1)[:, :4] for state in case.states[1]],
    ]
    assert not views[0][0].is_contiguous()
    assert_close(Case(views, case.masks, case.options).run(backend, torch.float64), dense, 1e-12)
    expanded = [state[:1].expand(5, -1, -1) for state in case.states[0]]
    copied = [state.contiguous() for state in expanded]
    results = [
        matryoshka_2d_loss([states, states], case.masks, backend=backend, **case.options)
        for states in (expanded, copied)
    ]
    assert torch.equal(*results)


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_more_than_2_31_elements() -> None:
    """Offsets are 64-bit: the texts of an expanded tensor are all the same row in memory."""
    num_texts, tokens, width = 2**14, 2**11, 2**7
    states = torch.randn(1, tokens, width).expand(num_texts, -1, -1)
    assert states.numel() > 2**31
    mask = torch.zeros(num_texts, tokens)
    mask[:, -1] = 1
    pooled = pool_layers([states], mask)
    assert torch.equal(pooled[0], states[:, -1])


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("upstream", [1.0, 1.5])
def test_same_bits_every_time_and_for_any_number_of_threads(upstream: float) -> None:
    case = make_case(12, 3, (9, 5), 40, 48, [16, 48])
    case.upstream = upstream
    first = case.run("fused", torch.float32)
    threads = torch.get_num_threads()
    try:
        for i in range(20):
            torch.set_num_threads((1, 2, 3, 24)[i % 4])
            again = case.run("fused", torch.float32)
            assert torch.equal(first[0], again[0])
            assert all(map(torch.equal, first[1], again[1]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_several_python_threads_at_once() -> None:
    case = make_case(13, 3, (9, 5), 20, 32, [16, 32])
    case.upstream = 1.0
    expected = case.run("fused", torch.float32)
    outcomes: list[tuple[Tensor, list[Tensor]]] = []
    workers = [
        threading.Thread(target=lambda: outcomes.extend(case.run("fused", torch.float32) for _ in range(5)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(outcomes) == 20
    for loss, grads in outcomes:
        assert torch.equal(loss, expected[0])
        assert all(map(torch.equal, grads, expected[1]))


def true_in_a_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        passed = False
        try:
            passed = check()
        finally:  # whatever happens, the child does not go on with the tests
            os._exit(0 if passed else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def forking(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.skipif(not COMPILED or not hasattr(os, "fork"), reason="no extension, or no fork"),
        pytest.mark.skipif(
            torch.cuda.is_available(), reason="torch refuses a backward after a fork with a GPU's threads"
        ),
        pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    ):
        test = mark(test)
    return test


@forking
def test_after_fork() -> None:
    """A child whose parent has a running thread pool computes the same, and does not wait for threads it lacks."""
    torch.set_num_threads(2)
    case = make_case(14, 3, (9, 5), 20, 32, [16, 32])
    expected = case.run("fused", torch.float32)
    assert true_in_a_child(lambda: torch.equal(case.run("fused", torch.float32)[0], expected[0]))


@forking
def test_half_rows_after_fork() -> None:
    """So many that torch copies them by several threads before the kernel has them."""
    torch.set_num_threads(2)
    pooled = torch.randn(1, 1200, 32).bfloat16()
    arguments = (
        None,
        0,
        torch.ones(1, 1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        [32],
        2,
        20.0,
        0.3,
    )

    def loss() -> Tensor:
        return torch.ops.m2d_ext.pooled_loss(pooled, *arguments, False, 0.0, 0.0, False)[0]

    expected = loss()
    assert true_in_a_child(lambda: torch.equal(loss(), expected))


@forking
def test_a_number_of_threads_chosen_after_a_fork() -> None:
    """There are none of them either."""
    torch.set_num_threads(2)
    case = make_case(14, 3, (9, 5), 20, 32, [16, 32])
    expected = case.run("fused", torch.float32)

    def check() -> bool:
        torch.set_num_threads(3)
        return torch.equal(case.run("fused", torch.float32)[0], expected[0])

    assert true_in_a_child(check)


POOLED_SHAPES = [
    # L, B, columns, M, D, dims: small, and so large that not all is worked on at once
    (2, 9, 3, 31, 16, [5, 9]),
    (2, 500, 2, 1100, 24, [8, 24]),
    (1, 800, 2, 1500, 16, [16]),
    (1, 1100, 2, 2600, 8, [4, 8]),  # the anchors of one layer come in several parts
    (40, 5, 2, 7, 24, [8, 24]),  # and so do the layers
]


@backends
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_cells", [(0,), (1, 2), (0, 2), ()], ids=str)
def test_layers_without_cells(backend: str, with_cells: tuple[int, ...], normalize: bool, gathered: bool) -> None:
    """Their rows, gathered ones too, have the gradient of the KL alone, or 0."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(3, 2 * 20, 8, generator=generator, dtype=torch.float64)
    candidates = torch.randn(3, 45, 8, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "num_columns": 2,
        "dims": [3, 8],
        "weights": [[1.0, 0.5] if layer in with_cells else [0.0, 0.0] for layer in range(3)],
        "kl_weights": [0.7, 0.0, 0.0],
        "normalize": normalize,
    }
    leaves = [pooled.requires_grad_(), *([candidates.requires_grad_()] if gathered else [])]
    truth = oracle.loss_of_pooled(pooled, candidates if gathered else None, 25 if gathered else 0, **options)
    loss = matryoshka_2d_loss_pooled(
        pooled,
        candidates=candidates if gathered else None,
        target_offset=25 if gathered else 0,
        backend=backend,
        **options,
    )
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, truth)
    expected = torch.autograd.grad(truth, leaves, allow_unused=True, materialize_grads=True)
    for grad, known in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(grad, known, rtol=1e-11, atol=1e-15)


@backends
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", POOLED_SHAPES, ids=str)
def test_pooled(backend: str, shape: tuple[Any, ...], normalize: bool, gathered: bool) -> None:
    num_layers, batch, columns, num_candidates, width, dims = shape
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(num_layers, columns * batch, width, generator=generator, dtype=torch.float64)
    candidates = torch.randn(num_layers, num_candidates, width, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "num_columns": columns,
        "dims": dims,
        "weights": [[1.0, 0.5][: len(dims)]] * num_layers,
        "kl_weights": [0.7] * (num_layers - 1) + [0.0],
        "normalize": normalize,
    }
    leaves = [pooled.requires_grad_(), *([candidates.requires_grad_()] if gathered else [])]
    offset = num_candidates - batch if gathered else 0
    truth = oracle.loss_of_pooled(pooled, candidates if gathered else None, offset, **options)
    loss = matryoshka_2d_loss_pooled(
        pooled, candidates=candidates if gathered else None, target_offset=offset, backend=backend, **options
    )
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, truth)
    for grad, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert oracle.relative_error(grad, expected) < 1e-12


HARD_SHAPES = [
    # L, B, columns, gathered per column, D, dims, hardness of others' candidates, of own negatives
    (2, 9, 4, 13, 16, [5, 9], 9.0, 0.0),
    (3, 7, 3, 11, 24, [8, 24], 0.0, 5.0),
    (2, 6, 2, 9, 16, [16], 4.0, 4.0),
    (1, 900, 3, 1300, 16, [8, 16], 5.0, 2.0),  # the anchors come in several parts
]


# Logits so far above those of the candidates that are not hard that no exponential spans both.
HARDEST_SHAPE = (2, 6, 3, 9, 16, [8], 0.0, 2000.0)


class HardCase(NamedTuple):
    leaves: list[Tensor]  # pooled rows, and gathered candidates where there are any; float64
    offset: int
    options: dict[str, Any]


def hard_case(shape: tuple[Any, ...], gathered: bool) -> HardCase:
    num_layers, batch, columns, column_size, width, dims, hardness, own_hardness = shape
    generator = torch.Generator().manual_seed(0)
    counts = [columns * batch, *([(columns - 1) * column_size] if gathered else [])]
    options: dict[str, Any] = {
        "num_columns": columns,
        "dims": dims,
        "weights": [[1.0, 0.5][: len(dims)]] * num_layers,
        "kl_weights": [0.7] * (num_layers - 1) + [0.0],
        "kl_temperature": 0.3,
        "scale": 20.0,
        "normalize": False,
        "hardness": hardness,
        "own_hardness": own_hardness,
    }
    leaves = [torch.randn(num_layers, n, width, generator=generator, dtype=torch.float64) for n in counts]
    return HardCase([leaf.requires_grad_() for leaf in leaves], column_size - batch if gathered else 0, options)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("shape", [*HARD_SHAPES, HARDEST_SHAPE], ids=str)
def test_hard_candidates(backend: str, shape: tuple[Any, ...], gathered: bool, dtype: torch.dtype) -> None:
    case = hard_case(shape, gathered)
    truth = oracle.loss_of_pooled(*case.leaves, target_offset=case.offset, **case.options)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves]
    loss, _, _ = functional.loss_of_pooled(*leaves, target_offset=case.offset, backend=backend, **case.options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert oracle.relative_error(loss, truth) < tolerance
    for grad, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, case.leaves), strict=True):
        assert oracle.relative_error(grad, exact) < tolerance


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_nearly_parallel_rows(spread: float, normalize: bool) -> None:
    """Embeddings of early layers: their cosines agree in all digits but the last few that float32 has."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2, 1, 64, generator=generator) * 3
    pooled = common * (1 + torch.rand(2, 24, 1, generator=generator)) + spread * torch.randn(
        2, 24, 64, generator=generator
    )
    exact = pooled.double().requires_grad_()
    pooled.requires_grad_()
    options = {"dims": [16, 64], "weights": [[1.0, 1.0]] * 2, "normalize": normalize}
    truth = oracle.loss_of_pooled(exact, num_columns=2, **options)
    loss = matryoshka_2d_loss_pooled(pooled, **options)
    assert abs(loss.item() - truth.item()) <= 1e-6 * truth.item()
    (grad,), (expected,) = torch.autograd.grad(loss, pooled), torch.autograd.grad(truth, exact)
    assert oracle.relative_error(grad, expected) < 1e-5


@backends
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [2048, 2100])
def test_long_texts(backend: str, tokens: int, packed: bool) -> None:
    """Their means are nearly parallel: what a running sum in float32 loses is what the gradient is made of."""
    generator = torch.Generator().manual_seed(0)
    common, of_text = (torch.randn(shape, generator=generator) for shape in [(96,), (8, 1, 96)])
    state = common + 0.01 * of_text + torch.randn(8, tokens, 96, generator=generator)
    options = {"dims": [24, 96], "weights": [[1.0, 1.0]]}
    exact = state.double().requires_grad_()
    truth = oracle.loss_of_pooled(exact.mean(1)[None], num_columns=2, **options)
    if packed:
        state, options["cu_seqlens"] = state.flatten(0, 1), torch.arange(9) * tokens
    loss = matryoshka_2d_loss([state.requires_grad_()], backend=backend, **options)
    (grad,), (expected,) = torch.autograd.grad(loss, state), torch.autograd.grad(truth, exact)
    assert oracle.relative_error(grad, expected.view(grad.shape)) < 1e-5


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["mean", "weightedmean"])
@pytest.mark.parametrize("width", [512, 509])
def test_gradients_larger_than_the_cache(width: int, pooling: str, dtype: torch.dtype) -> None:
    """They are written past the caches where rows are aligned."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(96, 128, width, generator=generator).to(dtype)
    states = [state.detach().requires_grad_() for _ in range(3)]
    assert sum(state.nbytes for state in states) > 2**25
    mask = (torch.arange(128) < torch.randint(0, 129, (96, 1), generator=generator)).long()
    upstream = torch.randn(3, 96, width, generator=generator).to(dtype)
    many = torch.autograd.grad(pool_layers(states, mask, pooling=pooling), states, upstream)
    one = [
        torch.autograd.grad(pool_layers([state], mask, pooling=pooling), state, up[None])[0]
        for state, up in zip(states, upstream, strict=True)
    ]
    expected = torch.autograd.grad(pool_layers(states, mask, pooling=pooling, backend="reference"), states, upstream)
    for a, b, c in zip(many, one, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
        assert not a[mask == 0].any()


SECOND_DERIVATIVES = {
    "tokens": lambda x: matryoshka_2d_loss([x], dims=[2, 8], weights=[[1.0, 1.0]]),
    "pooled": lambda x: matryoshka_2d_loss_pooled(x, dims=[2, 8], weights=[[1.0, 1.0]] * 4),
    "pooling alone": lambda x: pool_layers([x]).square().sum(),
    "cosines": lambda x: similarity.nested_cosines(x, x.flip(1), [2, 8]).square().sum(),
}


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
def test_second_derivatives_are_refused(name: str) -> None:
    """However they are asked for: a part that is missing from a gradient penalty, or from a Hessian, is not seen."""
    loss = SECOND_DERIVATIVES[name]
    x = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    for value in (loss(x), 2 * loss(x) + x.square().sum()):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("name", [*SECOND_DERIVATIVES, "maximum"])
def test_forward_mode_is_refused(name: str) -> None:
    """A tangent that no operator hands on would be a derivative of 0."""
    loss = (SECOND_DERIVATIVES | {"maximum": lambda x: pool_layers([x], pooling="max").sum()})[name]
    x, tangent = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        loss(x)  # one that asks for nothing
        with pytest.raises(NotImplementedError, match="jvp"):
            loss(forward_ad.make_dual(x, tangent))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.jvp(loss, (x,), (tangent,))


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_batch_sizes_are_compiled_once(packed: bool, pooling: str) -> None:
    """After the first, which is taken for a constant."""
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(state: Tensor, offsets: Tensor | None) -> Tensor:
        return matryoshka_2d_loss([state], cu_seqlens=offsets, pooling=pooling, dims=[2, 8], weights=[[1.0, 1.0]])

    for batch in range(4, 24, 4):
        offsets = torch.arange(0, 3 * batch + 1, 3) if packed else None
        state = torch.randn(3 * batch, 8) if packed else torch.randn(batch, 3, 8)
        expected = matryoshka_2d_loss([state], cu_seqlens=offsets, pooling=pooling, dims=[2, 8], weights=[[1.0, 1.0]])
        torch.testing.assert_close(compiled(state.requires_grad_(), offsets), expected)
    assert counter.frame_count <= 2


@pytest.mark.skipif(not COMPILED, reason="no extension")
@pytest.mark.parametrize("fake_first", [False, True])
def test_fake_tensors(fake_first: bool) -> None:
    """Estimates of memory, say; what is kept of the weights serves both kinds of steps."""
    grid: dict[str, Any] = {"dims": [2, 8], "weights": [[0.321, 1.0 + fake_first]], "kl_weights": [0.0]}
    state = torch.randn(4, 3, 8)
    for is_fake in (fake_first, not fake_first):
        if not is_fake:
            assert matryoshka_2d_loss([state], **grid).isfinite()
            continue
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(state).requires_grad_()
            loss = matryoshka_2d_loss([fake], **grid)
            (grad,) = torch.autograd.grad(loss, fake)
        assert isinstance(loss, FakeTensor)
        assert (loss.shape, grad.shape) == ((), state.shape)


def test_offsets_changed_after_the_forward() -> None:
    """A buffer that the next batch is written into."""
    states = [torch.randn(12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grads = []
    for changes in (False, True):
        offsets = torch.tensor([0, 3, 5, 9, 12])
        loss = matryoshka_2d_loss(states, cu_seqlens=offsets, dims=[8], weights=[[1.0], [1.0]])
        if changes:
            offsets[1] = 1
        grads.append(torch.autograd.grad(3 * loss, states))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_loss_first_computed_in_inference_mode() -> None:
    """What is kept of its weights serves a training step too."""
    state = torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid: dict[str, Any] = {"dims": [2, 8], "weights": [[0.123, 1.0]]}  # of no other test
    with torch.inference_mode():
        before = matryoshka_2d_loss([state], backend="reference", **grid)
    loss = matryoshka_2d_loss([state.requires_grad_()], backend="reference", **grid)
    assert torch.equal(loss, before)
    truth = oracle.loss_of_pooled(state.mean(1)[None], num_columns=2, **grid)
    (grad,), (expected,) = torch.autograd.grad(loss, state), torch.autograd.grad(truth, state)
    assert oracle.relative_error(grad, expected) < 1e-12


def test_numbers_of_other_kinds() -> None:
    state = torch.randn(4, 3, 8)
    expected = matryoshka_2d_loss([state], dims=[2, 8], weights=[[0.5, 1.0]], scale=7.0)
    scale, weight = torch.tensor(1.0), torch.tensor(9.0)
    options = {"dims": list(np.array([2, 8])), "weights": [[weight, np.float32(1.0)]], "scale": scale}
    matryoshka_2d_loss([state], **options)
    scale.fill_(7.0)  # known by their values, and not by who they are
    weight.fill_(0.5)
    assert torch.equal(matryoshka_2d_loss([state], **options), expected)


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_pooled_of_fewer_active_layers() -> None:
    pooled = torch.randn(3, 8, 16, dtype=torch.float64, requires_grad=True)
    weights = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    loss = matryoshka_2d_loss_pooled(pooled, dims=[8, 16], weights=weights)
    truth = oracle.loss_of_pooled(pooled, num_columns=2, dims=[8, 16], weights=weights)
    torch.testing.assert_close(loss, truth)
    (grad,), (expected,) = torch.autograd.grad(loss, pooled), torch.autograd.grad(truth, pooled)
    torch.testing.assert_close(grad, expected)


def _arguments(**changes: Any) -> dict[str, Any]:
    states = [torch.randn(4, 3, 8) for _ in range(2)]
    defaults = {"hidden_states": states, "attention_mask": torch.ones(4, 3), "dims": [4, 8], "weights": [[1, 1]] * 2}
    return {**defaults, **changes}


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dims empty": ({"dims": []}, ValueError, "dims must hold at least one"),
    "dims unsorted": ({"dims": [8, 4]}, ValueError, r"dims must be positive, ascending and distinct, got \[8, 4\]"),
    "dims repeated": ({"dims": [4, 4]}, ValueError, "dims must be .* distinct"),
    "dim of zero": ({"dims": [0, 4]}, ValueError, "dims must be positive"),
    "dim too large": ({"dims": [4, 9]}, ValueError, "dims must not exceed the width 8, got"),
    "dims not ints": ({"dims": [4.0, 8.0]}, TypeError, "dims must be ints, got 4.0"),
    "a dim no int": ({"dims": [torch.tensor(4.0), 8]}, TypeError, r"dims must be ints, got tensor\(4.\)"),
    "weights too few": ({"weights": [[1, 1]]}, ValueError, r"weights must have shape \(2, 2\), got rows"),
    "weights ragged": ({"weights": [[1, 1], [1]]}, ValueError, r"weights must have shape \(2, 2\), got rows"),
    "weights not finite": ({"weights": [[1, math.nan], [1, 1]]}, ValueError, "weights must be finite"),
    "kl_weights too many": ({"kl_weights": [1, 1, 0]}, ValueError, r"kl_weights must have shape \(2,\)"),
    "kl_weights of the teacher": ({"kl_weights": [1, 1]}, ValueError, "kl_weights must be 0 for the final layer"),
    "kl_weights not finite": ({"kl_weights": [math.inf, 0]}, ValueError, "kl_weights must be finite"),
    "temperature": ({"kl_temperature": 0}, ValueError, "kl_temperature must be positive and finite, got 0.0"),
    "dims one number": ({"dims": 4}, TypeError, "dims must be a sequence of ints, got 4"),
    "weights flat": (
        {"weights": [1.0, 1.0]},
        TypeError,
        "weights must be a sequence of sequences .* got 1.0",
    ),
    "weights none": ({"weights": None}, TypeError, "weights must be a sequence of sequences of numbers, got None"),
    "weights complex": ({"weights": torch.ones(2, 2, dtype=torch.cfloat)}, TypeError, "weights must be real"),
    "weights words beside a tensor": (
        {"weights": [["a", "b"]] * 2, "kl_weights": torch.zeros(2)},
        TypeError,
        "weights must be a number, got 'a'",
    ),
    "kl_weights one number": ({"kl_weights": 1.0}, TypeError, "kl_weights must be a sequence of numbers, got 1.0"),
    "states of no tensors": (
        {"hidden_states": [1, 2]},
        TypeError,
        r"hidden_states\[0\] must be tensors, or seq",
    ),
    "mask a number": ({"attention_mask": 5}, TypeError, "attention_mask must be a tensor, or one .* got int"),
    "mask of numpy": ({"attention_mask": np.ones((4, 3))}, TypeError, "attention_mask must be .* got ndarray"),
    "weights learned": (
        {"weights": [[torch.ones((), requires_grad=True), 1], [1, 1]]},
        ValueError,
        "weights must be a number, got a tensor that requires grad",
    ),
    "scale learned": (
        {"scale": torch.ones((), requires_grad=True)},
        ValueError,
        "scale must be a number, got a tensor",
    ),
    "scale a word": ({"scale": "big"}, TypeError, "scale must be a number, got 'big'"),
    "scale a complex number": ({"scale": torch.tensor(1j)}, TypeError, "scale must be a number, got tensor"),
    "scale too large": ({"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
    "scale whose inverse is not finite": (
        {"scale": 1e-310},
        ValueError,
        "scale must have a finite inverse, got 1e-310",
    ),
    "scale": ({"scale": -1}, ValueError, "scale must be positive and finite, got -1.0"),
    "one column": ({"num_columns": 1}, ValueError, "num_columns must be at least 2"),
    "columns do not divide": ({"num_columns": 3}, ValueError, "num_columns must divide the 4 texts, got 3"),
    "columns not int": ({"num_columns": 2.0}, TypeError, r"num_columns must be an int, got 2\.0"),
    "no layers": ({"hidden_states": []}, ValueError, "hidden_states must hold at least one layer"),
    "one tensor": ({"hidden_states": torch.randn(2, 4, 3, 8)}, TypeError, "hidden_states must be a sequence"),
    "integer states": ({"hidden_states": [torch.ones(4, 3, 8, dtype=torch.long)] * 2}, TypeError, "float64"),
    "other shapes": (
        {"hidden_states": [torch.randn(4, 3, 8), torch.randn(4, 2, 8)]},
        ValueError,
        r"hidden_states\[1\]",
    ),
    "other dtypes": (
        {"hidden_states": [torch.randn(4, 3, 8), torch.randn(4, 3, 8).double()]},
        TypeError,
        r"hidden_states\[1\] must have the dtype torch.float32",
    ),
    "other devices": (
        {"hidden_states": [torch.randn(4, 3, 8), torch.randn(4, 3, 8, device="meta")]},
        ValueError,
        r"hidden_states\[1\] must be on the device cpu of layer 0, got meta",
    ),
    "two dimensions": ({"hidden_states": [torch.randn(4, 8)] * 2}, ValueError, r"must have shape \(N, T, D\)"),
    "empty batch": (
        {"hidden_states": [torch.randn(0, 3, 8)] * 2, "attention_mask": torch.ones(0, 3)},
        ValueError,
        "the batch must hold at least one text",
    ),
    "mask shape": ({"attention_mask": torch.ones(4, 2)}, ValueError, r"attention_mask must have shape \(4, 3\)"),
    "mask device": ({"attention_mask": torch.ones(4, 3, device="meta")}, ValueError, "attention_mask must be on"),
    "mask complex": ({"attention_mask": torch.ones(4, 3, dtype=torch.cfloat)}, TypeError, "attention_mask must be"),
    "mask count": ({"attention_mask": [torch.ones(4, 3)] * 2}, ValueError, "attention_mask must be 1 tensors"),
    "unknown pooling": ({"pooling": "median"}, ValueError, "pooling must be one of .* got 'median'"),
    "unknown backend": ({"backend": "triton"}, ValueError, "backend must be one of .* got 'triton'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matryoshka_2d_loss(**_arguments(**changes))


BAD_OFFSETS = {
    "decreasing": ([0, 3, 2, 5], ValueError, "cu_seqlens must start at 0 and never decrease"),
    "not from zero": ([1, 3, 5], ValueError, "cu_seqlens must start at 0"),
    "wrong end": ([0, 3, 4], ValueError, "cu_seqlens must end at the token count 5, got 4"),
    "too short": ([0], ValueError, r"cu_seqlens must have shape \(N \+ 1,\)"),
    "floats": ([0.0, 2.0, 5.0], TypeError, "cu_seqlens must be an int32 or int64 tensor, got torch.float32"),
}


@pytest.mark.parametrize(("offsets", "error", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_bad_cu_seqlens(offsets: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matryoshka_2d_loss([torch.randn(5, 8)], cu_seqlens=torch.tensor(offsets), dims=[8], weights=[[1]])


BAD_POOLED = {
    "two dimensions": ({"pooled": torch.randn(4, 8)}, ValueError, "pooled must have shape"),
    "integers": ({"pooled": torch.ones(1, 4, 8, dtype=torch.long)}, TypeError, "pooled must be a float64"),
    "candidate width": ({"candidates": torch.randn(1, 4, 7)}, ValueError, r"candidates must have shape \(1, 'M', 8\)"),
    "candidate dtype": ({"candidates": torch.randn(1, 4, 8).double()}, TypeError, "candidates must have pooled's"),
    "offset": ({"target_offset": 1}, ValueError, r"target_offset must be in 0\.\.0"),
    "offset not an int": ({"target_offset": 0.0}, TypeError, r"target_offset must be an int, got 0\.0"),
    "negative offset": ({"target_offset": -1}, ValueError, "target_offset must be in"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_POOLED.values(), ids=BAD_POOLED)
def test_bad_pooled(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matryoshka_2d_loss_pooled(**{"pooled": torch.randn(1, 4, 8), "dims": [8], "weights": [[1]], **changes})


@pytest.mark.skipif(COMPILED, reason="the extension is there")
def test_without_extension(recwarn: pytest.WarningsRecorder) -> None:
    loss = matryoshka_2d_loss(**_arguments())
    assert math.isfinite(loss)
    with pytest.raises(RuntimeError, match="M2D_BUILD=cpu"):
        matryoshka_2d_loss(**_arguments(backend="fused"))


@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_device_without_kernels() -> None:
    states = [torch.empty(4, 3, 8, device="meta")] * 2
    with pytest.raises(RuntimeError, match="without kernels for meta tensors"):
        matryoshka_2d_loss(states, dims=[8], weights=[[1]] * 2, backend="fused")
