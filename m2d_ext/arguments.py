"""From what a user passes to what the operators take, or one error that names the argument at fault."""

import functools
import itertools
import math
import operator
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from .grid import Grid
from .pooling import MODES, packed_coefficients, padded_coefficients
from .reference import accumulate_dtype

BACKENDS = ("auto", "fused", "reference")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

HiddenStates: TypeAlias = Sequence[Tensor | Sequence[Tensor]]
Weights: TypeAlias = Sequence[Sequence[float]] | Tensor


class Tokens(NamedTuple):
    """Hidden states as blocks of texts, and the coefficient table that pools them."""

    states: list[Tensor]  # L * blocks, layer-major: (n, T, D), or packed ([1,] total_tokens, D)
    coefficients: list[Tensor]  # per block (n, T), or packed (total_tokens,)
    cu_seqlens: Tensor | None = None  # (N + 1,) int64, packed only
    maximum: bool = False  # pool by maximum over the tokens whose coefficient is not 0

    @property
    def num_layers(self) -> int:
        return len(self.states) // len(self.coefficients)

    @property
    def num_texts(self) -> int:
        return sum(map(len, self.coefficients)) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def learns(self) -> bool:
        """Whether the coefficients too want a gradient."""
        return torch.is_grad_enabled() and any(table.requires_grad for table in self.coefficients)

    @property
    def flat_states(self) -> list[Tensor]:
        """Packed states without the leading 1 that an encoder gives them; padded ones as they are."""
        if self.cu_seqlens is None:
            return self.states
        return [state.view(-1, state.shape[-1]) for state in self.states]

    def select(self, layers: Sequence[int]) -> "Tokens":
        blocks = len(self.coefficients)
        states = [state for layer in layers for state in self.states[layer * blocks : (layer + 1) * blocks]]
        return self._replace(states=states)


def read_backend(backend: str) -> str:
    """ValueError if unknown."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def read_tokens(
    hidden_states: HiddenStates,
    attention_mask: Tensor | Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
    pooling: str,
) -> Tokens:
    """Check the hidden states and their mask or ``cu_seqlens``, and make the coefficients.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, a device or a value is wrong.
    """
    if pooling not in MODES:
        raise ValueError(f"pooling must be one of {', '.join(map(repr, MODES))}, got {pooling!r}")
    layers = _read_layers(hidden_states)
    _check_alike(layers, packed=cu_seqlens is not None)
    blocks = layers[0]
    states = [state for layer in layers for state in layer]
    dtype = accumulate_dtype(blocks[0].dtype)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None where cu_seqlens is given")
        offsets = _read_cu_seqlens(cu_seqlens, blocks[0])
        tables = [packed_coefficients(offsets, len(blocks[0]), pooling, dtype)]
        return Tokens(states, tables, offsets, pooling == "max")
    masks = _read_masks(attention_mask, blocks)
    tables = [padded_coefficients(mask, pooling, dtype) for mask in masks]
    return Tokens(states, tables, None, pooling == "max")


def _read_layers(hidden_states: HiddenStates) -> list[list[Tensor]]:
    if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
        raise TypeError(
            f"hidden_states must be a sequence with one entry per layer, got {type(hidden_states).__name__}"
        )
    if len(hidden_states) == 0:
        raise ValueError("hidden_states must hold at least one layer, got none")
    of = "tensors, or sequences of tensors"
    layers = [
        [layer] if isinstance(layer, Tensor) else _read_list(f"hidden_states[{i}]", layer, of)
        for i, layer in enumerate(hidden_states)
    ]
    for i, layer in enumerate(layers):
        if not layer or len(layer) != len(layers[0]):
            raise ValueError(
                f"hidden_states must hold the same number of tensors per layer, "
                f"got {len(layer)} in layer {i} and {len(layers[0])} in layer 0"
            )
        for state in layer:
            if not isinstance(state, Tensor):
                raise TypeError(f"hidden_states[{i}] must be a tensor or tensors, got {type(state).__name__}")
    return layers


def _check_alike(layers: list[list[Tensor]], packed: bool) -> None:
    first = layers[0][0]
    dtype, device, shapes = first.dtype, first.device, [block.shape for block in layers[0]]
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden_states must be float64, float32, bfloat16 or float16, got {dtype}")
    if packed and len(layers[0]) != 1:
        raise ValueError(f"hidden_states must be one tensor per layer with cu_seqlens, got {len(layers[0])}")
    if shapes[0][-1:] == (0,):
        raise ValueError(f"hidden_states must have a width D >= 1, got shape {tuple(shapes[0])}")
    ndim, names = (2, "(total_tokens, D)") if packed else (3, "(N, T, D)")
    for i, layer in enumerate(layers):
        for state, shape in zip(layer, shapes, strict=True):
            name, found = f"hidden_states[{i}]", state.shape
            if len(found) != ndim:
                raise ValueError(f"{name} must have shape {names}, got {tuple(found)}")
            if found != shape or found[-1] != shapes[0][-1]:
                expected = (*shape[:-1], shapes[0][-1])
                raise ValueError(f"{name} must have the shape {expected} of layer 0, got {tuple(found)}")
            if state.dtype != dtype:
                raise TypeError(f"{name} must have the dtype {dtype} of layer 0, got {state.dtype}")
            if state.device != device:
                raise ValueError(f"{name} must be on the device {device} of layer 0, got {state.device}")


def _read_masks(attention_mask: Tensor | Sequence[Tensor] | None, blocks: list[Tensor]) -> list[Tensor]:
    if attention_mask is None:
        return [torch.ones(block.shape[:2], device=block.device) for block in blocks]
    if not isinstance(attention_mask, (Tensor, Sequence)):
        kind = type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a tensor, or one per tensor of a layer, got {kind}")
    masks = [attention_mask] if isinstance(attention_mask, Tensor) else list(attention_mask)
    if len(masks) != len(blocks):
        raise ValueError(f"attention_mask must be {len(blocks)} tensors as in each layer, got {len(masks)}")
    for mask, block in zip(masks, blocks, strict=True):
        if not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
        if mask.shape != block.shape[:2]:
            raise ValueError(f"attention_mask must have shape {tuple(block.shape[:2])}, got {tuple(mask.shape)}")
        if mask.is_complex():
            raise TypeError(f"attention_mask must be boolean, integer or floating point, got {mask.dtype}")
        if mask.device != block.device:
            raise ValueError(f"attention_mask must be on the states' device {block.device}, got {mask.device}")
    return masks


def _read_cu_seqlens(cu_seqlens: Tensor, states: Tensor) -> Tensor:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape (N + 1,) with N >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != states.device:
        raise ValueError(f"cu_seqlens must be on the states' device {states.device}, got {cu_seqlens.device}")
    offsets = cu_seqlens.to(torch.int64, copy=True)  # the backward needs them, whatever becomes of the caller's
    check_offsets(offsets, len(states))
    return offsets


def check_offsets(offsets: Tensor, num_tokens: int) -> None:
    """Look at the offsets (N + 1,) of packed texts where that is free, or ``M2D_CHECK=1`` asks for it.

    On other devices it would synchronise; there the kernels clamp them to the tokens that are there.

    Raises:
        ValueError: they do not start at 0, decrease, or end elsewhere than at the number of tokens.
    """
    looks = offsets.device.type == "cpu" or os.environ.get("M2D_CHECK") == "1"
    if not looks or torch.compiler.is_compiling():
        return
    if offsets[0] != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {offsets.tolist()}")
    if offsets[-1] != num_tokens:
        raise ValueError(f"cu_seqlens must end at the token count {num_tokens}, got {int(offsets[-1])}")


def read_grid(
    *,
    num_layers: int,
    num_texts: int,
    width: int,
    num_columns: int,
    dims: Sequence[int],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor | None,
    **options: Any,
) -> tuple[Grid, list[int], Grid]:
    """Check what the loss is asked for.

    Returns:
        The grid; the layers that matter; and the grid over them alone (``Grid.active``). Inside torch.compile
        all layers matter: which weights are 0 would be a question to the data.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a value is wrong.
    """
    num_columns = _read_columns(num_columns, num_texts)
    dims = _read_dims(dims, width)
    kl_weights = (0.0,) * num_layers if kl_weights is None else kl_weights
    read = _read_weights
    if not (isinstance(weights, Tensor) or isinstance(kl_weights, Tensor) or torch.compiler.is_compiling()):
        # A training loop asks for the same thing in every step.
        # Numbers all: a tensor would be known by its identity, and not by its value.
        weights = tuple(map(tuple, _read_rows("weights", weights)))
        kl_weights = tuple(_read_numbers("kl_weights", kl_weights))
        options |= {name: _read_number(name, value) for name, value in options.items() if name != "normalize"}
        options["normalize"] = bool(options["normalize"])
        read = _read_weights_once
    grid, layers, active = read(num_layers, num_columns, dims, weights, kl_weights, **options)
    return _of_this_mode(grid), layers, _of_this_mode(active)


def _of_this_mode(grid: Grid) -> Grid:
    """With tables that the operators take where tensors only say what they would be."""
    mode = None if torch.compiler.is_compiling() else _get_current_dispatch_mode()
    if not isinstance(mode, FakeTensorMode):
        return grid
    return grid._replace(weights=mode.from_tensor(grid.weights), kl_weights=mode.from_tensor(grid.kl_weights))


def _read_weights(
    num_layers: int,
    num_columns: int,
    dims: tuple[int, ...],
    weights: Weights,
    kl_weights: Sequence[float] | Tensor,
    *,
    kl_temperature: float,
    scale: float,
    normalize: bool,
    hardness: float = 0.0,
    own_hardness: float = 0.0,
) -> tuple[Grid, list[int], Grid]:
    grid = Grid(
        _read_table("weights", weights, (num_layers, len(dims))),
        _read_table("kl_weights", kl_weights, (num_layers,)),
        dims,
        num_columns,
        _read_positive("scale", scale),
        _read_positive("kl_temperature", kl_temperature),
        bool(normalize),
        hardness,
        own_hardness,
    )
    if not _is_traced(kl_weights) and kl_weights[-1] != 0:
        raise ValueError(
            f"kl_weights must be 0 for the final layer, which is the teacher, got {float(kl_weights[-1])}"
        )
    if torch.compiler.is_compiling():
        return grid, list(range(num_layers)), grid
    return grid, *grid.active()


@functools.lru_cache(maxsize=64)
def _read_weights_once(*shape_and_weights: Any, **options: Any) -> tuple[Grid, list[int], Grid]:
    # Kept for other steps: those that save the tensors for their backward, and those that no mode traces.
    with torch.inference_mode(False), _disable_current_modes():
        return _read_weights(*shape_and_weights, **options)


def _read_columns(num_columns: SupportsIndex, num_texts: int) -> int:
    num_columns = _read_int("num_columns", num_columns)
    if num_columns < 2:
        raise ValueError(f"num_columns must be at least 2 (anchor and positive), got {num_columns}")
    if num_texts == 0:
        raise ValueError("the batch must hold at least one text per column, got none")
    if num_texts % num_columns:
        raise ValueError(f"num_columns must divide the {num_texts} texts, got {num_columns}")
    return num_columns


def _read_dims(dims: Sequence[int], width: int) -> tuple[int, ...]:
    dims = _read_list("dims", dims, "a sequence of ints")
    if len(dims) == 0:
        raise ValueError("dims must hold at least one dimension, got none")
    dims = tuple(_read_int("dims", d, "ints") for d in dims)
    if dims[0] <= 0 or any(a >= b for a, b in itertools.pairwise(dims)):
        raise ValueError(f"dims must be positive, ascending and distinct, got {list(dims)}")
    if dims[-1] > width:
        raise ValueError(f"dims must not exceed the width {width}, got {list(dims)}")
    return dims


def _read_list(name: str, values: Any, of: str) -> list[Any]:
    """TypeError where they cannot be iterated over, of which there must be ``of``."""
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name} must be {of}, got {values!r}") from None


def _read_numbers(name: str, values: Any) -> list[float]:
    return [_read_number(name, value) for value in _read_list(name, values, "a sequence of numbers")]


def _read_rows(name: str, table: Any) -> list[list[float]]:
    of = "a sequence of sequences of numbers"
    rows = [_read_list(name, row, of) for row in _read_list(name, table, of)]
    return [_read_numbers(name, row) for row in rows]


def _read_int(name: str, value: Any, what: str = "an int") -> int:
    """Numpy's too."""
    if type(value) is int:  # asking a protocol takes longer than all else here
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be {what}, got {value!r}")


def _read_number(name: str, value: Any) -> float:
    """Numpy's, or a tensor's, too; a gradient is formed for none."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} must be a number, got a tensor that requires grad")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value!r}") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def _read_positive(name: str, value: float) -> float:
    value = _read_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if value < sys.float_info.min:
        raise ValueError(f"{name} must have a finite inverse, got {value}")
    return value


def _is_traced(value: Any) -> bool:
    """A tensor inside torch.compile: its values cannot be looked at."""
    return isinstance(value, Tensor) and torch.compiler.is_compiling()


def _read_table(name: str, table: Any, shape: tuple[int, ...]) -> Tensor:
    """A table of numbers as a float64 CPU tensor. Sequences are checked as such: torch.compile sees their values."""
    if isinstance(table, Tensor):
        if table.device.type != "cpu" or table.requires_grad:
            raise ValueError(f"{name} must be a CPU tensor without gradient, got one on {table.device}")
        if table.is_complex():
            raise TypeError(f"{name} must be real, got {table.dtype}")
        if tuple(table.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(table.shape)}")
        if not _is_traced(table) and not bool(table.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {table.tolist()}")
        return table.to(torch.float64).contiguous()
    rows = _read_rows(name, table) if len(shape) == 2 else [_read_numbers(name, table)]
    found = (len(rows), *sorted({len(row) for row in rows})) if len(shape) == 2 else (len(rows[0]),)
    if found != shape:
        raise ValueError(f"{name} must have shape {shape}, got rows of lengths {[len(row) for row in rows]}")
    if not all(-math.inf < value < math.inf for row in rows for value in row):
        raise ValueError(f"{name} must be finite, got {rows}")
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(shape)  # whatever the default device is


def check_pooled(pooled: Tensor, candidates: Tensor | None, target_offset: int, num_columns: int) -> None:
    """Check pooled rows (L, N, D) and gathered candidates (L, M, D).

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, a device or the offset is wrong.
    """
    for name, rows in (("pooled", pooled), ("candidates", candidates)):
        if rows is None and name == "candidates":
            continue
        if not isinstance(rows, Tensor) or rows.dtype not in FLOAT_DTYPES:
            kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"{name} must be a float64, float32, bfloat16 or float16 tensor, got {kind}")
        if rows.ndim != 3 or 0 in rows.shape:
            raise ValueError(f"{name} must have shape (layers, texts, D), none of them 0, got {tuple(rows.shape)}")
    num_anchors = pooled.shape[1] // _read_columns(num_columns, pooled.shape[1])
    num_candidates = pooled.shape[1] - num_anchors
    if candidates is not None:
        num_candidates = candidates.shape[1]
        if (candidates.shape[0], candidates.shape[2]) != (pooled.shape[0], pooled.shape[2]):
            expected = (pooled.shape[0], "M", pooled.shape[2])
            raise ValueError(f"candidates must have shape {expected}, got {tuple(candidates.shape)}")
        if candidates.dtype != pooled.dtype:
            raise TypeError(f"candidates must have pooled's dtype {pooled.dtype}, got {candidates.dtype}")
        if candidates.device != pooled.device:
            raise ValueError(f"candidates must be on pooled's device {pooled.device}, got {candidates.device}")
    target_offset = _read_int("target_offset", target_offset)
    if not 0 <= target_offset <= num_candidates - num_anchors:
        raise ValueError(
            f"target_offset must be in 0..{num_candidates - num_anchors}, so that each of the {num_anchors} anchors "
            f"has a positive among the {num_candidates} candidates, got {target_offset}"
        )
