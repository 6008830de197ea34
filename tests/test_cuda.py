"""The kernels on a GPU, through the public functions, against plain loops in float64 on the CPU.

Skipped where there is no GPU; with M2D_TEST_DEVICE=cuda (``make gpu-check``) that is a failure instead.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.autograd import DeviceType

import m2d_ext
import oracle
import test_functional
import test_half_types
from m2d_ext import _extension, autograd, functional
from m2d_ext.functional import matryoshka_2d_loss, matryoshka_2d_loss_pooled, pool_layers
from m2d_ext.grid import Grid
from m2d_ext.pooling import padded_coefficients
from test_functional import HARD_SHAPES, POOLED_SHAPES, POOLINGS, Case, hard_case, make_case
from test_fuzz import LAYOUTS, Problem, problems

EXPECTED = os.environ.get("M2D_TEST_DEVICE") == "cuda"
AVAILABLE = m2d_ext.build_info()["build"] == "cuda" and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not EXPECTED and not AVAILABLE, reason="no GPU, or built without CUDA")

EXAMPLES = int(os.environ.get("M2D_FUZZ_EXAMPLES", "300"))
REPEATS = int(os.environ.get("M2D_REPEATS", "300"))
DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the loss and of gradients. Half types are multiplied with 11 bits, and a scale of 20 stands before the
# exponential; how near they come is what test_half_types_are_no_farther_from_the_truth is about.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.fixture(autouse=True)
def _full_precision() -> Any:
    """Products of float32 keep their bits, unless a test says otherwise."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_there_is_a_gpu() -> None:
    assert AVAILABLE, m2d_ext.build_info()


def to_device(tensor: Tensor) -> Tensor:
    """With its strides; an expanded tensor stays one."""
    if tensor.dim() > 0 and len(tensor) > 1 and tensor.stride(0) == 0:
        return tensor[:1].to(DEVICE).expand(tensor.shape)
    return tensor.to(DEVICE)


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def assert_near(
    loss: Tensor, grads: Sequence[Tensor], truth: Tensor, expected: Sequence[Tensor], dtype: torch.dtype
) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=tolerance, atol=max(1e-6, tolerance / 10))
    floor = 1e-3 * max(grad.norm().item() for grad in expected) + 1e-7
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert grad.isfinite().all()
        # Half types round each element that is handed out; float16 is coarse below 6e-5.
        rounding = (exact.to(dtype).double() - exact).norm().item()
        allowed = tolerance * max(exact.norm().item(), floor) + 1.1 * rounding
        assert (grad.cpu().double() - exact).norm().item() <= allowed


# ---- random problems ----


def run(problem: Problem) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Loss and gradients on the GPU, then the truth's on padded float64 copies of the same numbers."""
    masks, blocks = problem.masks(), problem.blocks()
    states = [[problem.state(block) for block in blocks] for _ in range(problem.num_layers)]
    exact = [[state.double().requires_grad_() for state in layer] for layer in states]
    rows = [torch.cat([oracle.pool(h, m, problem.pooling) for h, m in zip(x, masks, strict=True)]) for x in exact]
    truth = oracle.loss_of_pooled(torch.stack(rows), **problem.options)
    expected = gradients(truth, [state for layer in exact for state in layer])
    where: dict[str, Any] = {"attention_mask": [mask.to(DEVICE) for mask in masks]}
    if problem.layout == "packed":
        keep = masks[0].bool()
        states = [[layer[0][keep]] for layer in states]
        expected = [grad[keep] for grad in expected]
        where = {"cu_seqlens": torch.tensor([0, *blocks[0]]).cumsum(0).to(DEVICE)}
    elif problem.layout == "strided":
        # Not in all layers: what the kernels take is one layout for all of them.
        states[0] = [state.transpose(0, 2).contiguous().transpose(0, 2) for state in states[0]]
    leaves = [[to_device(state).requires_grad_() for state in layer] for layer in states]
    loss = matryoshka_2d_loss(leaves, **where, pooling=problem.pooling, backend="fused", **problem.options)
    assert isinstance(loss, Tensor)
    return loss.detach(), gradients(loss, [x for layer in leaves for x in layer]), truth.detach(), expected


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(problem=problems().filter(lambda problem: problem.dtype in DTYPES))
def test_random_problems(problem: Problem) -> None:
    assert_near(*run(problem), problem.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_layout(pooling: str, dtype: torch.dtype, layout: str) -> None:
    options = {"dims": [4, 8], "scale": 5.0}
    problem = Problem(layout, dtype, pooling, [[3, 0, 2], [1, 4, 2]], False, 2, 8, 0, 0.0, options)
    assert_near(*run(problem), dtype)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_shapes_beyond_one_tile(normalize: bool, dtype: torch.dtype, pooling: str) -> None:
    """More anchors, candidates, columns and tokens than a tile holds, and no multiple of any."""
    options = {"dims": [33, 129, 1100], "scale": 20.0, "kl_temperature": 0.3, "normalize": normalize}
    lengths = [[(7 * i + 3 * c) % 41 for i in range(83)] for c in range(3)]
    assert_near(*run(Problem("columns", dtype, pooling, lengths, False, 3, 1111, 0, 0.2, options)), dtype)


# ---- pooled rows ----


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", POOLED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled(dtype: torch.dtype, shape: tuple[Any, ...], normalize: bool, gathered: bool) -> None:
    num_layers, batch, columns, num_candidates, width, dims = shape
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(num_layers, columns * batch, width, generator=generator)]
    if gathered:
        rows.append(torch.randn(num_layers, num_candidates, width, generator=generator))
    options: dict[str, Any] = {
        "num_columns": columns,
        "dims": dims,
        "weights": [[1.0, 0.5][: len(dims)]] * num_layers,
        "kl_weights": [0.7] * (num_layers - 1) + [0.0],
        "normalize": normalize,
    }
    offset = num_candidates - batch if gathered else 0
    rows = [x.to(dtype) for x in rows]
    exact = [x.double().requires_grad_() for x in rows]
    truth = oracle.loss_of_pooled(exact[0], exact[1] if gathered else None, offset, **options)
    leaves = [x.to(DEVICE).requires_grad_() for x in rows]
    loss = matryoshka_2d_loss_pooled(
        leaves[0], candidates=leaves[1] if gathered else None, target_offset=offset, backend="fused", **options
    )
    assert isinstance(loss, Tensor)
    assert_near(loss.detach(), gradients(loss, leaves), truth.detach(), gradients(truth, exact), dtype)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("shape", HARD_SHAPES, ids=str)
def test_hard_candidates(shape: tuple[Any, ...], gathered: bool) -> None:
    case = hard_case(shape, gathered)
    truth = oracle.loss_of_pooled(*case.leaves, target_offset=case.offset, **case.options)
    leaves = [x.detach().float().to(DEVICE).requires_grad_() for x in case.leaves]
    loss, _, _ = functional.loss_of_pooled(*leaves, target_offset=case.offset, backend="fused", **case.options)
    assert_near(loss.detach(), gradients(loss, leaves), truth.detach(), gradients(truth, case.leaves), torch.float32)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_nearly_parallel_rows(spread: float, normalize: bool) -> None:
    """Embeddings of early layers: their cosines agree in all digits but the last few that float32 has."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2, 1, 64, generator=generator) * 3
    pooled = common * (1 + torch.rand(2, 24, 1, generator=generator))
    pooled += spread * torch.randn(2, 24, 64, generator=generator)
    exact, leaf = pooled.double().requires_grad_(), pooled.to(DEVICE).requires_grad_()
    options: dict[str, Any] = {"dims": [16, 64], "weights": [[1.0, 1.0]] * 2, "normalize": normalize}
    truth = oracle.loss_of_pooled(exact, num_columns=2, **options)
    loss = matryoshka_2d_loss_pooled(leaf, backend="fused", **options)
    assert isinstance(loss, Tensor)
    assert abs(loss.item() - truth.item()) <= 1e-6 * truth.item()
    (grad,), (expected,) = gradients(loss, [leaf]), gradients(truth, [exact])
    assert oracle.relative_error(grad.cpu(), expected) < 1e-5


def test_the_user_may_allow_tf32() -> None:
    """And what is computed by default is not that."""
    pooled = torch.randn(1, 64, 256, device=DEVICE)
    options: dict[str, Any] = {"dims": [256], "weights": [[1.0]], "backend": "fused"}
    truth = oracle.loss_of_pooled(pooled.cpu().double(), num_columns=2, dims=[256], weights=[[1.0]]).item()
    exact = matryoshka_2d_loss_pooled(pooled, **options)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    coarse = matryoshka_2d_loss_pooled(pooled, **options)
    assert abs(exact.item() - truth) < abs(coarse.item() - truth) < 1e-2 * truth


def test_half_types_are_no_farther_from_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of test_half_types, on the GPU: sentence-transformers' arithmetic there against ours there."""
    ran = set()

    def on_gpu(states: list[Tensor], mask: Tensor, options: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
        ran.add((kind, states[0].dtype))
        if kind == "truth":
            return on_cpu(states, mask, options, kind)
        # The plain loop makes its targets wherever tensors are made by default.
        with torch.device(DEVICE if kind == "theirs" else "cpu"):
            results = on_cpu([state.to(DEVICE) for state in states], mask.to(DEVICE), options, kind)
        return results[0].cpu(), results[1].cpu()

    on_cpu = test_half_types._run
    monkeypatch.setattr(test_half_types, "_run", on_gpu)
    for dtype in (torch.bfloat16, torch.float16):
        test_half_types.test_errors_are_no_larger_than_sentence_transformers(dtype)
        assert {("ours", dtype), ("theirs", dtype)} <= ran  # here, and not where that test runs by itself


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 37])
def test_a_gradient_is_added_in_one_pass(width: int, dtype: torch.dtype, packed: bool) -> None:
    """What deferred gradients take: grad + g a dP, rounded once."""
    shape = (30,) if packed else (5, 7)
    offsets = torch.tensor([0, 6, 6, 17, 29, 30], device=DEVICE) if packed else None
    grad = torch.randn(*shape, width, device=DEVICE).to(dtype)
    table = torch.rand(shape, device=DEVICE) * (torch.rand(shape, device=DEVICE) > 0.3)
    rows, factor = torch.randn(5, width, device=DEVICE), torch.tensor(1.5, device=DEVICE)
    text = torch.searchsorted(offsets[1:], torch.arange(30, device=DEVICE), right=True) if packed else None
    each = rows[:, None] if text is None else rows[text]
    expected = grad.double() + 1.5 * table[..., None].double() * each.double()
    result = torch.ops.m2d_ext.add_pooled_grad(grad, rows, factor, table, offsets)
    torch.testing.assert_close(result.double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(result[table == 0], grad[table == 0])


# ---- what the values must not depend on ----


def small_case(**options: Any) -> Case:
    return make_case(0, 3, (9, 5), 20, 48, [16, 48], **options)


def leaves_of(case: Case, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [[state.to(DEVICE, dtype).requires_grad_() for state in layer] for layer in case.states]


def loss_and_gradients(case: Case, leaves: list[list[Tensor]]) -> list[Tensor]:
    masks = [mask.to(DEVICE) for mask in case.masks]
    loss = matryoshka_2d_loss(leaves, masks, pooling=case.pooling, backend="fused", **case.options)
    assert isinstance(loss, Tensor)
    return [loss.detach(), *gradients(loss, [x for layer in leaves for x in layer])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_pattern(dtype: torch.dtype) -> None:
    case = small_case()
    leaves = leaves_of(case, dtype)
    first = loss_and_gradients(case, leaves)
    differs = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(REPEATS):
        for a, b in zip(first, loss_and_gradients(case, leaves), strict=True):
            differs |= (a != b).any()
    assert not differs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_pattern_of_a_whole_gpu(dtype: torch.dtype) -> None:
    case = make_case(0, 7, (64, 64), 64, 384, [32, 64, 128, 256, 384])
    leaves = leaves_of(case, dtype)
    first = loss_and_gradients(case, leaves)
    for _ in range(20):
        assert all(map(torch.equal, first, loss_and_gradients(case, leaves)))


def test_padding_is_never_read() -> None:
    case = small_case()
    clean = loss_and_gradients(case, leaves_of(case))
    for layer in case.states:
        for state, mask in zip(layer, case.masks, strict=True):
            state[mask == 0] = torch.nan
    assert all(map(torch.equal, clean, loss_and_gradients(case, leaves_of(case))))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_texts_without_tokens_are_zero(dtype: torch.dtype, pooling: str) -> None:
    case = small_case(pooling=pooling)
    case.masks[0][1] = 0
    loss, *grads = loss_and_gradients(case, leaves_of(case, dtype))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad[1].any() for grad in grads[::2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_stay_bad(bad: float) -> None:
    case = small_case()
    case.masks = [torch.ones_like(mask) for mask in case.masks]
    case.states[1][0][0, 0, 0] = bad
    assert not loss_and_gradients(case, leaves_of(case))[0].isfinite()


def test_another_stream() -> None:
    case = small_case()
    leaves = leaves_of(case)
    expected = loss_and_gradients(case, leaves)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        results = loss_and_gradients(case, leaves)
    torch.cuda.synchronize()
    assert all(map(torch.equal, expected, results))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device() -> None:
    pooled = torch.randn(2, 8, 16)
    options: dict[str, Any] = {"dims": [8, 16], "weights": [[1.0, 1.0]] * 2, "backend": "fused"}
    assert torch.cuda.current_device() == 0
    first, second = (matryoshka_2d_loss_pooled(pooled.to(f"cuda:{i}"), **options) for i in range(2))
    assert torch.equal(first.cpu(), second.cpu())


def test_more_than_2_31_elements() -> None:
    num_texts, tokens, width = 2**14, 2**11, 2**7
    states = torch.randn(1, tokens, width, device=DEVICE).expand(num_texts, -1, -1)
    assert states.numel() > 2**31
    mask = torch.zeros(num_texts, tokens, device=DEVICE)
    mask[:, -1] = 1
    assert torch.equal(pool_layers([states], mask, backend="fused")[0], states[:, -1])


# ---- how it is launched ----


def plain_arguments(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Grid]:
    """What autograd.loss takes. S1 of the benchmarks."""
    states = [torch.randn(128, 64, 384, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(7)]
    mask = (torch.arange(64, device=DEVICE) < torch.randint(32, 65, (128, 1), device=DEVICE)).long()
    weights = torch.ones(7, 5, dtype=torch.float64)
    kl_weights = torch.tensor([0.3] * 6 + [0.0], dtype=torch.float64)
    grid = Grid(weights, kl_weights, (32, 64, 128, 256, 384), 2, 20.0, 0.3, True)
    return states, [padded_coefficients(mask, "mean", torch.float32)], grid


def launched(body: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What it returns, and the names of all that ran on the device meanwhile."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        result = body()
        torch.cuda.synchronize()
    return result, [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_kernel_forward_and_one_backward(dtype: torch.dtype) -> None:
    states, coefficients, grid = plain_arguments(dtype)
    one = torch.ones((), device=DEVICE)
    for _ in range(2):  # the first run may load modules and initialise them
        (loss, _, _), forward = launched(lambda: autograd.loss(states, coefficients, None, grid))
        _, backward = launched(lambda loss=loss: torch.autograd.grad(loss, states, grad_outputs=one))
    assert len(forward) == 1, forward
    assert "loss_kernel" in forward[0]
    assert len(backward) == 1, backward
    assert "scatter_kernel" in backward[0]


def test_peak_memory() -> None:
    states, coefficients, grid = plain_arguments(torch.bfloat16)
    one = torch.ones((), device=DEVICE)
    num_layers, (num_texts, _, width) = len(states), states[0].shape
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _, _ = autograd.loss(states, coefficients, None, grid)
    forward = torch.cuda.max_memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(loss, states, grad_outputs=one)
    backward = torch.cuda.max_memory_allocated() - base - sum(grad.nbytes for grad in grads)
    assert max(forward, backward) <= 2.5 * num_layers * num_texts * width * 4 + 2**24


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_host_does_not_wait(pooling: str, sampled: bool) -> None:
    case = small_case(pooling=pooling)
    if sampled:
        case.options["weights"][1] = [0.0, 0.0]
        case.options["kl_weights"][1] = 0.0
    leaves, masks = leaves_of(case), [mask.to(DEVICE) for mask in case.masks]
    flat = [x for layer in leaves for x in layer]
    options: dict[str, Any] = {"pooling": pooling, "backend": "fused", "return_cells": True, **case.options}
    matryoshka_2d_loss(leaves, masks, **options)  # the first call asks the device what it is
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _, _ = matryoshka_2d_loss(leaves, masks, **options)
        torch.autograd.grad(loss, flat, allow_unused=True)
        with pytest.raises(RuntimeError, match="synchronizing"):  # so would whoever waited above
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_replays_with_new_numbers(dtype: torch.dtype) -> None:
    case = small_case()
    leaves, masks = leaves_of(case, dtype), [mask.to(DEVICE) for mask in case.masks]
    flat = [x for layer in leaves for x in layer]

    def step() -> list[Tensor]:
        loss = matryoshka_2d_loss(leaves, masks, backend="fused", **case.options)
        assert isinstance(loss, Tensor)
        return [loss.detach(), *torch.autograd.grad(loss, flat)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for leaf in flat:
                leaf.normal_()
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(map(torch.equal, replayed, step()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    options: dict[str, Any] = {"dims": [4, 8], "weights": [[1.0, 0.5]] * 2, "kl_weights": [0.5, 0.0]}

    def step(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        return matryoshka_2d_loss([a * 2, b], mask, backend="fused", **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_tokens in (3, 5):
        states = [torch.randn(4, num_tokens, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
        mask = torch.ones(4, num_tokens, device=DEVICE)
        eager, traced = step(*states, mask), compiled(*states, mask)
        torch.testing.assert_close(traced, eager)
        for a, b in zip(torch.autograd.grad(traced, states), torch.autograd.grad(eager, states), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, needs_grad: bool) -> None:
    grid = Grid(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), (4, 8), 2, 20.0, 0.3, True)
    grid.kl_weights[:2] = 1
    states = [torch.randn(4, 5, 8, device=DEVICE, dtype=dtype) for _ in range(3)]
    tables = [torch.rand(4, 5, device=DEVICE)]
    # Not the comparison of values: the teacher's KL is NaN, which is never equal.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.m2d_ext.loss, (states, tables, None, *grid, needs_grad), test_utils=utilities)


# ---- what the kernels leave to the reference ----


def test_float64_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_warned", False)
    case = small_case()
    leaves = [[state.to(DEVICE).requires_grad_() for state in layer] for layer in case.states]
    masks = [mask.to(DEVICE) for mask in case.masks]
    with pytest.warns(UserWarning, match="no kernels for float64 on CUDA"):
        loss = matryoshka_2d_loss(leaves, masks, **case.options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matryoshka_2d_loss(leaves, masks, **case.options)
    truth = case.truth()
    outcome = loss.detach().cpu(), [g.cpu() for g in gradients(loss, [x for layer in leaves for x in layer])]
    scaled = outcome[0], [grad * 1.5 for grad in outcome[1]]  # as Case.truth differentiates 1.5 times the loss
    test_functional.assert_close(scaled, truth, 1e-11, noise=1e-12)
    with pytest.raises(RuntimeError, match="no kernels for float64 on CUDA"):
        matryoshka_2d_loss(leaves, masks, backend="fused", **case.options)


def test_malformed_calls_are_refused() -> None:
    states, table = [torch.randn(2, 3, 8, device=DEVICE)], torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="coefficients and cu_seqlens must be on cuda"):
        torch.ops.m2d_ext.pool(states, [table], None)
    with pytest.raises(RuntimeError, match="float64 is left to the reference"):
        torch.ops.m2d_ext.pool([states[0].double()], [table.double().to(DEVICE)], None)
    with pytest.raises(RuntimeError, match="at most 8 tensors of hidden states per layer, got 9"):
        torch.ops.m2d_ext.pool(states * 9, [table.to(DEVICE)] * 9, None)
    rows = torch.randn(1, 2, 8, device=DEVICE)
    with pytest.raises(RuntimeError, match="grad_output must be a scalar on cuda"):
        torch.ops.m2d_ext.pool_backward(rows, torch.ones(()), [0], [table.to(DEVICE)], None, torch.float32)


def test_bad_offsets_read_nothing_that_is_not_there() -> None:
    """Their contents are on the device, where nobody looks before the kernel does: it clamps them."""
    states, table = [torch.randn(9, 8, device=DEVICE)], torch.ones(9, device=DEVICE)
    for offsets, expected in (([0, 4, 20], (0, 4, 9)), ([-5, 3, 9], (0, 3, 9)), ([0, 7, 2], (0, 7, 7))):
        pooled = torch.ops.m2d_ext.pool(states, [table], torch.tensor(offsets, device=DEVICE))
        sums = [states[0][i:j].sum(0) for i, j in itertools.pairwise(expected)]
        torch.testing.assert_close(pooled[0], torch.stack(sums))
