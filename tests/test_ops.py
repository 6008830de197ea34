"""The compiled operators: torch's own checks of registration, gradients and compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import m2d_ext
from m2d_ext.functional import matryoshka_2d_loss, matryoshka_2d_loss_pooled
from m2d_ext.grid import Grid

pytestmark = pytest.mark.skipif(m2d_ext.build_info()["build"] == "none", reason="no extension")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _grid(num_layers: int, dims: tuple[int, ...] = (4, 8)) -> Grid:
    # No weight is 0: cells that are not computed are NaN, which opcheck does not compare.
    kl_weights = torch.ones(num_layers, dtype=torch.float64)
    return Grid(torch.ones(num_layers, len(dims), dtype=torch.float64), kl_weights, dims, 2, 20.0, 0.3, True)


def _tokens(dtype: torch.dtype, packed: bool) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    if packed:
        offsets = torch.tensor([0, 2, 5, 6, 9])
        return [torch.randn(9, 8, dtype=dtype) for _ in range(3)], [torch.rand(9, dtype=_accumulate(dtype))], offsets
    states = [torch.randn(2, t, 8, dtype=dtype) for _ in range(3) for t in (3, 5)]
    return states, [torch.rand(2, t, dtype=_accumulate(dtype)) for t in (3, 5)], None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_tokens(dtype: torch.dtype, packed: bool) -> None:
    states, coefficients, offsets = _tokens(dtype, packed)
    torch.library.opcheck(torch.ops.m2d_ext.pool, (states, coefficients, offsets))
    torch.library.opcheck(torch.ops.m2d_ext.pool_max, (states, coefficients, offsets))
    for needs_grad in (False, True):
        torch.library.opcheck(torch.ops.m2d_ext.loss, (states, coefficients, offsets, *_grid(3), needs_grad))
    for layers in ([], [0, 2]):
        torch.library.opcheck(
            torch.ops.m2d_ext.loss_and_gradients, (states, coefficients, offsets, *_grid(3), 1.5, layers)
        )
    rows = torch.randn(3, 4, 8, dtype=_accumulate(dtype))
    torch.library.opcheck(
        torch.ops.m2d_ext.pool_backward, (rows, torch.tensor(2.0), [0, 2], coefficients, offsets, dtype)
    )
    for i, table in enumerate(coefficients):
        grad = torch.randn(*table.shape, 8).to(dtype)
        texts = len(offsets) - 1 if packed else len(table)
        torch.library.opcheck(
            torch.ops.m2d_ext.add_pooled_grad, (grad, rows[i, :texts], torch.tensor(2.0), table, offsets)
        )
        torch.library.opcheck(
            torch.ops.m2d_ext.add_pooled_grad_, (grad, rows[i, :texts], torch.tensor(2.0), table, offsets)
        )
    indices = torch.zeros(3, 4, 8, dtype=torch.int32)
    torch.library.opcheck(torch.ops.m2d_ext.pool_max_backward, (rows, indices, [0, 2], coefficients, offsets, dtype))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_come_with_the_loss(dtype: torch.dtype, packed: bool) -> None:
    """The bits of the loss alone and of its backward: small; so large that the caches are passed by; and of whole
    cache lines, which one thread reads of one layer while it writes others of another layer.
    """
    for texts, tokens, width in ((4, 3, 8), (80, 140, 1016), (80, 140, 1024)):
        table = torch.rand(texts, tokens, dtype=_accumulate(dtype))
        table = table * (table > 0.3) * (torch.arange(tokens) < torch.randint(0, tokens + 1, (texts, 1)))
        offsets = None
        if packed:
            ends = torch.randint(0, texts * tokens + 1, (texts - 1,)).sort().values
            table, offsets = table.flatten(), torch.cat([torch.tensor([0]), ends, torch.tensor([texts * tokens])])
        inputs = [torch.randn(*table.shape, width).to(dtype) for _ in range(3)], [table], offsets
        for layers in ([], [1], [0, 2], [0, 1, 2]):
            *expected, rows = torch.ops.m2d_ext.loss(*inputs, *_grid(3), True)
            for g in (1.0, 0.3):
                dense = torch.ops.m2d_ext.pool_backward(
                    rows, torch.tensor(g, dtype=torch.float64), layers, [table], offsets, dtype
                )
                # One thread alone computes whatever it can, and then always reads and writes at once.
                for threads in (1, 3):
                    with _threads(threads):
                        *found, found_rows, grads = torch.ops.m2d_ext.loss_and_gradients(*inputs, *_grid(3), g, layers)
                    assert all(map(torch.equal, [*found, found_rows], [*expected, rows]))
                    assert len(grads) == len(dense) == len(layers)
                    assert all(map(torch.equal, grads, dense))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_pooled_grad(dtype: torch.dtype, packed: bool) -> None:
    """Small, and so large that it is written past the caches."""
    offsets = torch.tensor([0, 3, 3, 7, 12]) if packed else None
    for texts, tokens, width in ((4, 3, 8), (80, 140, 1024)):
        if packed and texts != 4:
            continue
        table = torch.rand((12,) if packed else (texts, tokens), dtype=_accumulate(dtype))
        table = table * (table > 0.3)
        grad = torch.randn(*table.shape, width).to(dtype)
        rows = torch.randn(texts, width, dtype=_accumulate(dtype))
        text = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3]) if packed else torch.arange(texts)[:, None]
        expected = grad + 2.5 * table[..., None] * rows[text].expand(*table.shape, width)
        found = torch.ops.m2d_ext.add_pooled_grad(grad, rows, torch.tensor(2.5), table, offsets)
        torch.testing.assert_close(found, expected.to(dtype))
        assert torch.equal(found[table == 0], grad[table == 0])
        for threads in (1, 2, 3, 24):  # 80 texts are 5, 5, 6 and 40 tasks
            given = grad.clone()
            with _threads(threads):
                torch.ops.m2d_ext.add_pooled_grad_(given, rows, torch.tensor(2.5), table, offsets)
            assert torch.equal(given, found)


def test_a_pass_writes_to_no_lazy_clone() -> None:
    kept = torch.zeros(4, 3, 8)
    clone = torch._lazy_clone(kept)
    torch.ops.m2d_ext.add_pooled_grad_(clone, torch.ones(4, 8), None, torch.ones(4, 3), None)
    assert torch.equal(clone, torch.ones(4, 3, 8))
    assert not kept.any()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_pooled(gathered: bool, needs_grad: bool, dtype: torch.dtype) -> None:
    candidates = torch.randn(3, 7, 8).to(dtype) if gathered else None
    for grid in (_grid(3), _grid(3)._replace(hardness=5.0, own_hardness=2.0)):
        arguments = (torch.randn(3, 4, 8).to(dtype), candidates, 1 if gathered else 0, *grid, needs_grad)
        torch.library.opcheck(torch.ops.m2d_ext.pooled_loss, arguments)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    """Numerical derivatives, without KL: its teacher is detached, and so is no derivative of the loss's value."""
    states = [torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0]])
    options: dict[str, Any] = {"dims": [3, 6], "weights": [[1.0, 0.5]] * 3, "scale": 3.0, "normalize": normalize}
    assert torch.autograd.gradcheck(lambda *s: matryoshka_2d_loss(s, mask, **options), states)
    pooled = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    options["weights"] = options["weights"][:2]
    assert torch.autograd.gradcheck(
        lambda p, c: matryoshka_2d_loss_pooled(p, candidates=c, target_offset=2, **options), (pooled, candidates)
    )


def test_gradcheck_of_earlier_layers_with_kl() -> None:
    states = [torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=i < 2) for i in range(3)]
    options: dict[str, Any] = {"dims": [3, 6], "weights": [[1.0, 0.5]] * 3, "kl_weights": [1.0, 0.5, 0.0]}
    assert torch.autograd.gradcheck(lambda a, b: matryoshka_2d_loss([a, b, states[2]], **options), states[:2])


def test_malformed_calls_are_refused() -> None:
    """The private operators check what their kernels rely on."""
    states, coefficients, _ = _tokens(torch.float32, packed=False)
    with pytest.raises(RuntimeError, match="expected a multiple of 2 hidden states"):
        torch.ops.m2d_ext.pool(states[:5], coefficients, None)
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.m2d_ext.pool(states[::-1], coefficients, None)
    with pytest.raises(RuntimeError, match="coefficients must be"):
        torch.ops.m2d_ext.pool(states, [a.double() for a in coefficients], None)
    with pytest.raises(RuntimeError, match="cu_seqlens must end"):
        torch.ops.m2d_ext.pool([torch.randn(9, 8)], [torch.rand(9)], torch.tensor([0, 20]))
    for layers in ([1, 0], [1, 1]):
        with pytest.raises(RuntimeError, match="layers must ascend"):
            torch.ops.m2d_ext.loss_and_gradients(states, coefficients, None, *_grid(3), 1.0, layers)
    with pytest.raises(RuntimeError, match="layer 3 is out of range"):
        torch.ops.m2d_ext.loss_and_gradients(states, coefficients, None, *_grid(3), 1.0, [3])
    rows = torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError, match="dims must ascend"):
        torch.ops.m2d_ext.pooled_loss(rows, None, 0, *_grid(1, (4, 9)), True)
    for offset in (1, 2**63 - 2, 2**63 - 1):
        with pytest.raises(RuntimeError, match="target_offset"):
            torch.ops.m2d_ext.pooled_loss(rows, None, offset, *_grid(1), True)
    with pytest.raises(RuntimeError, match=r"^rows must be float64, .* got Long"):
        torch.ops.m2d_ext.pooled_loss(rows.long(), None, 0, *_grid(1), True)
    with pytest.raises(RuntimeError, match=r"candidates must be \(L, M, D\), got \[3\]"):
        torch.ops.m2d_ext.pooled_loss(rows, torch.ones(3), 0, *_grid(1), True)
    hard = _grid(1)._replace(num_columns=3, hardness=1.0)
    for texts, count, offset in [(3, 3, 0), (6, 4, 1), (6, 8, 2**63 - 1)]:
        rows, candidates = torch.randn(1, texts, 8), torch.randn(1, count, 8)
        with pytest.raises(RuntimeError, match="hardness asks for as many candidates in every column"):
            torch.ops.m2d_ext.pooled_loss(rows, candidates, offset, *hard, True)


def test_a_recorded_step_depends_on_no_value() -> None:
    """make_fx records the gradients of one g, and the graph gives those of any."""

    def step(upstream: Tensor, *states: Tensor) -> list[Tensor]:
        loss = matryoshka_2d_loss(list(states), dims=[4, 8], weights=[[1.0, 0.5]] * 2)
        assert isinstance(loss, Tensor)
        return list(torch.autograd.grad(loss, states, upstream))

    states = [torch.randn(4, 3, 8, requires_grad=True) for _ in range(2)]
    step(torch.ones(()), *states)  # the weights are read once, which is not to be recorded
    recorded = make_fx(step)(torch.ones(()), *states)
    for upstream in (torch.ones(()), torch.tensor(2.5)):
        assert all(map(torch.equal, recorded(upstream, *states), step(upstream, *states)))


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: str) -> None:
    options: dict[str, Any] = {"dims": [4, 8], "weights": [[1.0, 0.5]] * 2, "kl_weights": [0.5, 0.0]}
    options["backend"] = backend

    def step(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        return matryoshka_2d_loss([a * 2, b], mask, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_tokens in (3, 5):
        states = [torch.randn(4, num_tokens, 8, requires_grad=True) for _ in range(2)]
        mask = torch.ones(4, num_tokens)
        eager, traced = step(*states, mask), compiled(*states, mask)
        torch.testing.assert_close(traced, eager)
        for a, b in zip(torch.autograd.grad(traced, states), torch.autograd.grad(eager, states), strict=True):
            torch.testing.assert_close(a, b)
