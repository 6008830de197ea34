"""Nested cosines: the compiled operator, batched torch, and one plain cosine per prefix agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2d_ext import ops, similarity

if not ops.computes_cosines(torch.zeros(1)):
    pytest.skip("needs the compiled extension", allow_module_level=True)

# Layers, rows, others, width, dims: fewer rows than a block of 64 and more, dims that stop before the width.
SHAPES = [
    (3, 5, 7, 16, (3, 8, 16)),
    (2, 70, 130, 40, (1, 9, 33)),
    (1, 64, 65, 24, (24,)),
    (2, 1, 1, 1, (1,)),
]


def rows_of(shape: tuple, pairs: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    layers, rows, others, width, _ = shape
    torch.manual_seed(0)
    a, b = (
        torch.randn(layers, rows, width, dtype=dtype),
        torch.randn(layers, rows if pairs else others, width, dtype=dtype),
    )
    a[0, 0] = 0  # a row without a direction
    b[-1, -1, : width // 2] = 0  # one whose short prefixes have none
    return a.requires_grad_(), b.requires_grad_()


def plain(a: Tensor, b: Tensor, dims: tuple[int, ...], pairs: bool) -> Tensor:
    prefixes = [(F.normalize(a[..., :d], dim=-1), F.normalize(b[..., :d], dim=-1)) for d in dims]
    return torch.stack([(x * y).sum(-1) if pairs else x @ y.mT for x, y in prefixes], dim=1)


def cosines(a: Tensor, b: Tensor, dims: tuple[int, ...], pairs: bool) -> Tensor:
    return (similarity.nested_pair_cosines if pairs else similarity.nested_cosines)(a, b, dims)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("pairs", [False, True], ids=["blocks", "pairs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_one_cosine_per_prefix(
    shape: tuple, pairs: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(ops, "computes_cosines", lambda rows: False)
    a, b = rows_of(shape, pairs)
    found, expected = cosines(a, b, shape[-1], pairs), plain(a, b, shape[-1], pairs)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # At a row of zeros the gradient is one by 1 / eps.
    scale = expected.new_tensor([1.0 if row.any() else 1e-12 for row in a.detach().flatten(0, 1)])
    grads, truths = torch.autograd.grad(found, (a, b), upstream), torch.autograd.grad(expected, (a, b), upstream)
    factor = scale.unflatten(0, a.shape[:2])[..., None]
    torch.testing.assert_close(grads[0] * factor, truths[0] * factor, rtol=1e-10, atol=1e-10)
    clamped = (b[..., : shape[-1][0]].detach() == 0).all(-1, keepdim=True)
    torch.testing.assert_close(grads[1].where(~clamped, 0), truths[1].where(~clamped, 0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pairs", [False, True], ids=["blocks", "pairs"])
def test_float32_rows_are_multiplied_in_double(pairs: bool) -> None:
    a, b = rows_of(SHAPES[1], pairs, torch.float32)
    found = cosines(a, b, SHAPES[1][-1], pairs)
    expected = plain(a.double(), b.double(), SHAPES[1][-1], pairs)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_computed_for_those_who_need_them() -> None:
    a, b = rows_of(SHAPES[0], False)
    found = cosines(a, b.detach(), (3, 8), False)
    (grad,) = torch.autograd.grad(found.sum(), a)
    expected, _ = torch.autograd.grad(cosines(a, b, (3, 8), False).sum(), (a, b))
    assert torch.equal(grad, expected)
    grads = ops.nested_cosines_backward(torch.ones_like(found), found, a, b, (3, 8), False, (False, True))
    assert grads[0] is None
    assert grads[1] is not None
    assert not cosines(a.detach(), b.detach(), (3, 8), False).requires_grad


@pytest.mark.parametrize("pairs", [False, True], ids=["blocks", "pairs"])
def test_same_bits_for_any_number_of_threads(pairs: bool) -> None:
    a, b = rows_of((4, 150, 170, 40, ()), pairs, torch.float32)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        values = cosines(a, b, (8, 40), pairs)
        found.append((values, *torch.autograd.grad(values.square().sum(), (a, b))))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("pairs", [False, True], ids=["blocks", "pairs"])
def test_opcheck(pairs: bool) -> None:
    a, b = (rows.detach() for rows in rows_of(SHAPES[0], pairs))
    torch.library.opcheck(torch.ops.m2d_ext.nested_cosines, (a, b, [3, 16], pairs))
    values = ops.nested_cosines(a, b, (3, 16), pairs)
    arguments = (torch.ones_like(values), values, a, b, [3, 16], pairs, True, True)
    torch.library.opcheck(torch.ops.m2d_ext.nested_cosines_backward, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [8, 3]}, "dims must ascend"),
        ({"dims": []}, "dims must not be empty"),
        ({"b": torch.zeros(3, 7, 15, dtype=torch.float64)}, "a and b must be rows"),
        ({"pairs": True}, "as many where they are pairs"),
        ({"b": torch.zeros(3, 7, 16)}, "one dtype and device"),
    ],
)
def test_what_the_operator_refuses(change: dict, message: str) -> None:
    a, b = (rows.detach() for rows in rows_of(SHAPES[0], False))
    arguments = {"a": a, "b": b, "dims": [3, 8], "pairs": False} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.m2d_ext.nested_cosines(**arguments)


# Layers, dims, rows, columns: more columns than are summed side by side (256) and fewer, one of each.
SCORES = [(2, 3, 5, 7), (1, 2, 300, 3), (2, 1, 3, 600), (1, 1, 1, 1)]


def scores_and_mask(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    scores = torch.rand(shape, dtype=torch.float64) * 2 - 1
    mask = torch.rand(shape[2:]) < 0.3
    mask[0], mask[:, 0] = True, True  # a row of which nothing is left, and a column
    return scores.requires_grad_(), mask


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("over_rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("scale", [20.0, -3.0, 5000.0])
@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_logsumexp_is_torch_s(
    shape: tuple, scale: float, masked: bool, over_rows: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(ops, "computes_cosines", lambda rows: False)
    scores, mask = scores_and_mask(shape)
    found = similarity.masked_logsumexp(scores, scale, mask if masked else None, over_rows)
    filled = (scores * scale).masked_fill(mask, -torch.inf) if masked else scores * scale
    expected = filled.logsumexp(-2 if over_rows else -1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-13)
    upstream = torch.randn_like(expected)
    (grad,), (truth,) = (torch.autograd.grad(value, scores, upstream) for value in (found, expected))
    torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-13 * abs(scale))
    assert not masked or not grad[..., mask].any()


@pytest.mark.parametrize("over_rows", [False, True], ids=["columns", "rows"])
def test_logsumexp_reads_scores_as_they_lie(over_rows: bool) -> None:
    whole, mask = scores_and_mask((2, 3, 5, 12))
    views = (whole[..., 2:9], whole[:, 1:, 1:4], whole.mT, whole[:, :, :, ::2], whole[:1].expand(4, -1, -1, -1))
    # The stride of a dimension of one element is any, whatever is contiguous.
    ones = (whole[:1].transpose(0, 1), whole[:, :1], whole[:, :, :1].transpose(1, 2), whole[..., :1].mT)
    for view in (*views, *ones):
        none = mask.new_zeros(view.shape[-2:])
        found = similarity.masked_logsumexp(view, 4.0, none, over_rows)
        expected = similarity.masked_logsumexp(view.clone(), 4.0, none, over_rows)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(value.square().sum(), whole, retain_graph=True)[0] for value in (found, expected)]
        assert torch.equal(*grads)


@pytest.mark.parametrize("over_rows", [False, True], ids=["columns", "rows"])
def test_logsumexp_passes_nan_on(over_rows: bool) -> None:
    scores, _ = scores_and_mask((1, 1, 4, 4))
    with torch.no_grad():
        scores[0, 0, 1, 2] = torch.nan
    mask = torch.zeros(4, 4, dtype=torch.bool)
    found = similarity.masked_logsumexp(scores, 2.0, mask, over_rows)
    assert found.isnan().sum() == 1
    assert found[0, 0, 2 if over_rows else 1].isnan()
    mask[1, 2] = True
    assert similarity.masked_logsumexp(scores, 2.0, mask, over_rows).isfinite().all()


def test_logsumexp_opcheck() -> None:
    scores, mask = scores_and_mask(SCORES[0])
    for over_rows in (False, True):
        arguments = (scores.detach(), mask, 2.0, over_rows)
        torch.library.opcheck(torch.ops.m2d_ext.masked_logsumexp, arguments)
        result = ops.masked_logsumexp(*arguments)
        torch.library.opcheck(
            torch.ops.m2d_ext.masked_logsumexp_backward, (torch.ones_like(result), result, *arguments)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 5, 7, dtype=torch.float64)}, "scores must be float64"),
        ({"scores": torch.zeros(2, 3, 5, 7)}, "scores must be float64"),
        ({"mask": torch.zeros(7, 5, dtype=torch.bool)}, r"mask must be bool of shape \[5, 7\]"),
        ({"mask": torch.zeros(5, 7)}, "mask must be bool"),
    ],
)
def test_what_logsumexp_refuses(change: dict, message: str) -> None:
    scores, mask = scores_and_mask(SCORES[0])
    arguments = {"scores": scores.detach(), "mask": mask, "scale": 1.0, "over_rows": False} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.m2d_ext.masked_logsumexp(**arguments)
    result = torch.zeros(2, 3, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grad and result must be float64 of shape"):
        torch.ops.m2d_ext.masked_logsumexp_backward(result, result, scores.detach(), mask, 1.0, False)
