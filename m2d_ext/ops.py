"""The compiled operators, typed, with their fakes: the only file that names ``torch.ops.m2d_ext``.

The operators are private: called on a tensor that requires grad they record no gradient. Shapes are those of
``m2d_ext.reference``.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _extension
from .grid import Grid
from .reference import accumulate_dtype

# What one launch takes: csrc/cuda/launch.h.
MAX_CUDA_LAYERS = 128
MAX_CUDA_BLOCKS = 8
MAX_CUDA_DIMS = 16
MIN_CUDA_CAPABILITY = (8, 0)
# Between them and others NVIDIA promises no compatibility of compiled code.
TEGRA_CAPABILITIES = ((8, 7), (11, 0))


@torch.compiler.assume_constant_result  # torch.compile cannot ask a device; what it answers is a constant there
def refusal(device: torch.device, dtype: torch.dtype, layers: int, blocks: int, dims: int) -> str | None:
    """Why the compiled operators do not take tensors like these, in words that follow "m2d_ext"; None if they do.

    Args:
        device: of the hidden states or the pooled rows.
        dtype: of them.
        layers: L.
        blocks: tensors of hidden states per layer.
        dims: K; 0 where only pooled.
    """
    if (reason := _refusal_by_device(device)) is not None or device.type != "cuda":
        return reason
    if dtype == torch.float64:
        return "has no kernels for float64 on CUDA"
    for name, count, limit in (
        ("layers", layers, MAX_CUDA_LAYERS),
        ("tensors of hidden states per layer", blocks, MAX_CUDA_BLOCKS),
        ("dims", dims, MAX_CUDA_DIMS),
    ):
        if count > limit:
            return f"has CUDA kernels for at most {limit} {name}, not {count}"
    return None


@functools.cache
def _refusal_by_device(device: torch.device) -> str | None:
    if not _extension.available():
        return _extension.missing()
    # Asked of no other devices: the fakes below count as kernels for "meta".
    supported = device.type in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "m2d_ext::loss", device.type.upper()
    )
    if not supported:
        return f"was compiled without kernels for {device.type} tensors: {_extension.HOW_TO_BUILD}"
    return _refusal_by_cuda_device(device) if device.type == "cuda" else None


def _refusal_by_cuda_device(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    name, found = torch.cuda.get_device_name(device), "{}.{}".format(*capability)
    if capability < MIN_CUDA_CAPABILITY:
        needed = "{}.{}".format(*MIN_CUDA_CAPABILITY)
        return f"has CUDA kernels for compute capability {needed} or higher, and {name} has {found}"
    arches = _extension.cuda_arches()
    if not any(_runs_on(arch, capability) for arch in arches):
        return (
            f"was compiled for compute capability {', '.join(arches)}, and {name} has {found}: "
            f"add it to TORCH_CUDA_ARCH_LIST and {_extension.HOW_TO_BUILD}"
        )
    if not _launches_cooperatively(device):
        return f"needs cooperative launches, which {name} does not offer"
    return None


def _launches_cooperatively(device: torch.device) -> bool:
    return torch.ops.m2d_ext.cuda_launches_cooperatively(device.index)


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of TORCH_CUDA_ARCH_LIST runs on a device.

    "9.0" runs on 9.x from 9.0 on, but not on a Tegra, "9.0+PTX" on all devices from there on, "9.0a" on 9.0 alone, and
    "10.0f" is taken to do as much. Of a name, such as "Hopper", nothing is known: the launch will tell.
    """
    entry = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    if entry is None:
        return True
    built = (int(entry[1]), int(entry[2]))
    if entry[3] or built == capability:
        return built == capability
    if entry[4] is not None and built < capability:
        return True
    is_tegra = built in TEGRA_CAPABILITIES or capability in TEGRA_CAPABILITIES
    return built[0] == capability[0] and built < capability and not is_tegra


def pool(hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """Weighted token sums (L, N, D) in the accumulation dtype; tokens with coefficient 0 are not read."""
    return torch.ops.m2d_ext.pool(hidden_states, coefficients, cu_seqlens)


def pool_backward(
    pooled_grad: Tensor,
    grad_output: Tensor | None,
    layers: Sequence[int],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Hidden-state gradients ``g a[n, t] dP[l, n, :]`` of the given layers, layer-major, of the given dtype."""
    return torch.ops.m2d_ext.pool_backward(pooled_grad, grad_output, layers, coefficients, cu_seqlens, dtype)


def pool_max(
    hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maxima (L, N, D) over the tokens with coefficient != 0, and the first token (int32) that has each; 0 and -1
    for a text without tokens.
    """
    return torch.ops.m2d_ext.pool_max(hidden_states, coefficients, cu_seqlens)


def pool_max_backward(
    pooled_grad: Tensor,
    indices: Tensor,
    layers: Sequence[int],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Hidden-state gradients of the given layers: ``dP`` at the indices, 0 elsewhere."""
    return torch.ops.m2d_ext.pool_max_backward(pooled_grad, indices, layers, coefficients, cu_seqlens, dtype)


def loss(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    grid: Grid,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), cells (L, K), KLs (L,), and dP (L, N, D) if ``needs_grad``, else an empty tensor."""
    return torch.ops.m2d_ext.loss(
        hidden_states,
        coefficients,
        cu_seqlens,
        *grid,
        needs_grad,
    )


def loss_and_gradients(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    grid: Grid,
    grad_output: float,
    layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """``loss`` with dP, and what ``pool_backward`` makes of it for ``grad_output`` and ``layers``. CPU only:
    there one layer's gradients are written while the next one's states are read.
    """
    return torch.ops.m2d_ext.loss_and_gradients(hidden_states, coefficients, cu_seqlens, *grid, grad_output, layers)


def pooled_loss(
    pooled: Tensor,
    candidates: Tensor | None,
    target_offset: int,
    grid: Grid,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``loss``, from pooled rows; the fifth result is the gathered candidates' gradient, or empty.

    Rows of a half type are read as float32, and their gradients are float32.
    """
    return torch.ops.m2d_ext.pooled_loss(
        pooled,
        candidates,
        target_offset,
        *grid,
        needs_grad,
    )


def _empty_loss(rows: Tensor, num_layers: int, num_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(rows.dtype)
    shapes = (), (num_layers, num_dims), (num_layers,)
    loss, cells, kl = (rows.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, cells, kl


def _num_texts(coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> int:
    # Of traced tensors, `len` would make a constant of the batch size.
    return sum(a.shape[0] for a in coefficients) if cu_seqlens is None else cu_seqlens.shape[0] - 1


def computes_cosines(rows: Tensor) -> bool:
    """Whether ``nested_cosines`` takes rows like these: there are kernels for the CPU alone."""
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64) and _extension.available()


def nested_cosines(a: Tensor, b: Tensor, dims: Sequence[int], pairs: bool) -> Tensor:
    """Of rows a (L, A, D) and b (L, B, D) in float64: (L, K, A, B), or (L, K, A) of row i with row i."""
    return torch.ops.m2d_ext.nested_cosines(a, b, dims, pairs)


def nested_cosines_backward(
    grad: Tensor, cosines: Tensor, a: Tensor, b: Tensor, dims: Sequence[int], pairs: bool, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of a and of b, None where it is not needed."""
    grads = torch.ops.m2d_ext.nested_cosines_backward(grad, cosines, a, b, dims, pairs, *needed)
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def masked_logsumexp(scores: Tensor, mask: Tensor | None, scale: float, over_rows: bool) -> Tensor:
    """Of ``scale * scores`` (L, K, A, M) in float64 that the mask (A, M) is not true for: (L, K, A), or (L, K, M) over
    the rows. For scores of ``nested_cosines``.
    """
    return torch.ops.m2d_ext.masked_logsumexp(scores, mask, scale, over_rows)


def masked_logsumexp_backward(
    grad: Tensor, result: Tensor, scores: Tensor, mask: Tensor | None, scale: float, over_rows: bool
) -> Tensor:
    """The gradient of the scores."""
    return torch.ops.m2d_ext.masked_logsumexp_backward(grad, result, scores, mask, scale, over_rows)


def _fake_pool(hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    first = hidden_states[0]
    shape = (len(hidden_states) // len(coefficients), _num_texts(coefficients, cu_seqlens), first.shape[-1])
    return first.new_empty(shape, dtype=accumulate_dtype(first.dtype))


def _fake_pool_backward(
    pooled_grad: Tensor,
    grad_output: Tensor | None,
    layers: Sequence[int],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    dim = pooled_grad.shape[-1]
    return [pooled_grad.new_empty((*a.shape, dim), dtype=dtype) for _ in layers for a in coefficients]


# Two operators that only the hooks of csrc/deferred.cpp call: ``grad + g a[n, t] dP[n, :]`` for one layer and block,
# grad (n, T, D) or packed (total_tokens, D), dP (n, D); and the same into a contiguous grad itself, on the CPU alone.
def _fake_add_pooled_grad(
    grad: Tensor,
    pooled_grad: Tensor,
    grad_output: Tensor | None,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return grad.new_empty(grad.shape)


def _fake_add_pooled_grad_(
    grad: Tensor,
    pooled_grad: Tensor,
    grad_output: Tensor | None,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    pass


def _fake_pool_max(
    hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    pooled = _fake_pool(hidden_states, coefficients, cu_seqlens)
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


def _fake_loss(
    hidden_states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    weights: Tensor,
    kl_weights: Tensor,
    dims: Sequence[int],
    num_columns: int,
    scale: float,
    kl_temperature: float,
    normalize: bool,
    hardness: float,
    own_hardness: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pooled = _fake_pool(hidden_states, coefficients, cu_seqlens)
    grad = torch.empty_like(pooled) if needs_grad else pooled.new_empty(0, 0, 0)
    return (*_empty_loss(pooled, len(pooled), len(dims)), grad)


def _fake_loss_and_gradients(
    hidden_states: Sequence[Tensor], coefficients: Sequence[Tensor], cu_seqlens: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    grid, layers = Grid(*options[:-2]), options[-1]
    loss, cells, kl, rows = _fake_loss(hidden_states, coefficients, cu_seqlens, *grid, needs_grad=True)
    grads = _fake_pool_backward(rows, None, layers, coefficients, cu_seqlens, hidden_states[0].dtype)
    return loss, cells, kl, rows, grads


def _fake_pooled_loss(
    pooled: Tensor,
    candidates: Tensor | None,
    target_offset: int,
    weights: Tensor,
    kl_weights: Tensor,
    dims: Sequence[int],
    num_columns: int,
    scale: float,
    kl_temperature: float,
    normalize: bool,
    hardness: float,
    own_hardness: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(pooled.dtype)
    grad = pooled.new_empty(pooled.shape if needs_grad else (0, 0, 0), dtype=dtype)
    shape = candidates.shape if needs_grad and candidates is not None else (0, 0, 0)
    candidate_grad = pooled.new_empty(shape, dtype=dtype)
    return (*_empty_loss(pooled, len(pooled), len(dims)), grad, candidate_grad)


def _fake_nested_cosines(a: Tensor, b: Tensor, dims: Sequence[int], pairs: bool) -> Tensor:
    shape = (len(a), len(dims), a.shape[1]) if pairs else (len(a), len(dims), a.shape[1], b.shape[1])
    return a.new_empty(shape, dtype=torch.float64)


def _fake_nested_cosines_backward(
    grad: Tensor,
    cosines: Tensor,
    a: Tensor,
    b: Tensor,
    dims: Sequence[int],
    pairs: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if needs_a else (0, 0, 0)), b.new_empty(b.shape if needs_b else (0, 0, 0))


def _fake_masked_logsumexp(scores: Tensor, mask: Tensor | None, scale: float, over_rows: bool) -> Tensor:
    return scores.new_empty((*scores.shape[:2], scores.shape[3 if over_rows else 2]))


def _fake_masked_logsumexp_backward(
    grad: Tensor, result: Tensor, scores: Tensor, mask: Tensor | None, scale: float, over_rows: bool
) -> Tensor:
    return scores.new_empty(scores.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "pool": _fake_pool,
    "pool_backward": _fake_pool_backward,
    "add_pooled_grad": _fake_add_pooled_grad,
    "add_pooled_grad_": _fake_add_pooled_grad_,
    "pool_max": _fake_pool_max,
    "pool_max_backward": _fake_pool_backward,
    "loss": _fake_loss,
    "loss_and_gradients": _fake_loss_and_gradients,
    "pooled_loss": _fake_pooled_loss,
    "nested_cosines": _fake_nested_cosines,
    "nested_cosines_backward": _fake_nested_cosines_backward,
    "masked_logsumexp": _fake_masked_logsumexp,
    "masked_logsumexp_backward": _fake_masked_logsumexp_backward,
}


def _register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Raise ImportError if the extension lacks the operator, or has it with more or fewer arguments."""
    try:
        inspect.signature(fake).bind(*getattr(torch.ops.m2d_ext, name).default._schema.arguments)
    except (AttributeError, TypeError):
        raise ImportError(_extension.STALE) from None
    torch.library.register_fake(f"m2d_ext::{name}", fake)


if _extension.available():
    for _name, _fake in _FAKES.items():
        _register_fake(_name, _fake)
