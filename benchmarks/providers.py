"""Who is compared, and the one setup that speed and memory measurements share.

Every provider is a function without arguments from the same hidden states to the loss; `step` adds the backward.
All layers, all dims, KL on; weights, KL weights and temperature are sentence-transformers' defaults.
"""

from __future__ import annotations

import ctypes
import mmap
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from m2d_ext import functional
from shapes import SHARES, Shape

OURS = "ours"
OURS_ONE_DIM = "ours, one dim"
SENTENCE_TRANSFORMERS = "sentence-transformers"
COMPILED = "torch.compile"
FLOOR = "floor"
PROVIDERS = (OURS, OURS_ONE_DIM, SENTENCE_TRANSFORMERS, COMPILED, FLOOR)
GROWTH_PROVIDERS = (OURS, SENTENCE_TRANSFORMERS, FLOOR)


def growth_name(provider: str, value: float) -> str:
    """Of a provider at one value of an axis."""
    return f"{provider} @ {value:g}"


COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
KL_TEMPERATURE = 0.3

Loss = Callable[[], Tensor]
Step = Callable[[], Sequence[Tensor]]


class Inputs(NamedTuple):
    shape: Shape
    states: list[Tensor]  # L × (N, T, D), leaves
    mask: Tensor  # (N, T), int64
    grad_output: Tensor  # (); torch would otherwise make a `ones_like` in every backward


def make_inputs(shape: Shape, padding: str) -> Inputs:
    torch.manual_seed(0)
    size = (shape.texts, shape.tokens, shape.width)
    states = [torch.randn(size).requires_grad_() for _ in range(shape.layers)]
    return Inputs(shape, states, ragged_mask(shape, SHARES[padding]), torch.tensor(1.0))


def ragged_mask(shape: Shape, padding: float) -> Tensor:
    """Right-padded texts of different lengths; `padding` of all tokens are padding."""
    if padding == 0:
        return torch.ones(shape.texts, shape.tokens, dtype=torch.int64)
    kept = 1 - padding
    # Evenly spread over kept ± the smaller of kept and padding, so that the mean is `kept`; then shuffled.
    spread = min(kept, padding) * torch.linspace(-1, 1, shape.texts)
    lengths = (shape.tokens * (kept + spread)).round().clamp(1, shape.tokens)
    lengths = lengths[torch.randperm(shape.texts)]
    return (torch.arange(shape.tokens) < lengths[:, None]).long()


def grid(shape: Shape) -> dict[str, Any]:
    """Matryoshka2dLoss's defaults as weights: the final layer 1, the others 1 together, KL times the temperature."""
    earlier = shape.layers - 1
    rows = [[1 / earlier] * len(shape.dims)] * earlier + [[1.0] * len(shape.dims)]
    return {
        "dims": list(shape.dims),
        "weights": rows,
        "kl_weights": [KL_TEMPERATURE] * earlier + [0.0],
        "kl_temperature": KL_TEMPERATURE,
        "num_columns": shape.columns,
    }


def ours(inputs: Inputs) -> Loss:
    options = grid(inputs.shape)
    return lambda: functional.matryoshka_2d_loss(inputs.states, inputs.mask, backend="fused", **options)


def ours_one_dim(inputs: Inputs) -> Loss:
    options = grid(inputs.shape)
    options |= {"dims": options["dims"][-1:], "weights": [row[-1:] for row in options["weights"]]}
    return lambda: functional.matryoshka_2d_loss(inputs.states, inputs.mask, backend="fused", **options)


def compiled(inputs: Inputs, mode: str) -> Loss:
    """torch.compile of the vectorised reference. Graph breaks are its own affair: no `fullgraph`."""
    options = grid(inputs.shape)

    @torch.compile(mode=mode, dynamic=False)
    def loss(states: list[Tensor], mask: Tensor) -> Tensor:
        return functional.matryoshka_2d_loss(states, mask, backend="reference", **options)

    return lambda: loss(inputs.states, inputs.mask)


class GivenStates(Transformer):
    """sentence-transformers' Transformer whose encoder costs nothing: it returns the hidden states it holds."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)  # the parent's loads a model from a folder
        self.width = width
        self.auto_model_stub = SimpleNamespace(config=SimpleNamespace(output_hidden_states=False))
        self.columns: list[list[Tensor]] = []  # per column, one tensor (B, T, D) per layer

    @property
    def auto_model(self) -> Any:
        return self.auto_model_stub

    def get_embedding_dimension(self) -> int:
        return self.width

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        states = self.columns[features["column"]]
        features["token_embeddings"] = states[-1]
        features["all_layer_embeddings"] = tuple(states)
        return features


def sentence_transformers(inputs: Inputs) -> tuple[Loss, list[Tensor]]:
    """Its real classes; also the leaves to differentiate by.

    They embed column by column. Each column's states are leaves of their own on the same memory: cutting the columns
    out of one leaf would charge sentence-transformers for gradients of slices that a real model does not need.
    """
    shape = inputs.shape
    transformer = GivenStates(shape.width)
    transformer.columns = [
        [column.detach().requires_grad_() for column in columns]
        for columns in zip(*(state.detach().chunk(shape.columns) for state in inputs.states), strict=True)
    ]
    leaves = [column for columns in transformer.columns for column in columns]
    masks = inputs.mask.chunk(shape.columns)
    model = SentenceTransformer(modules=[transformer, Pooling(shape.width)], device="cpu").train()
    loss = st_losses.Matryoshka2dLoss(
        model,
        st_losses.MultipleNegativesRankingLoss(model),
        list(shape.dims),
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        kl_temperature=KL_TEMPERATURE,
    )
    labels = torch.zeros(shape.batch)

    def run() -> Tensor:
        # Fresh dicts: the losses write into them.
        return loss([{"column": c, "attention_mask": mask} for c, mask in enumerate(masks)], labels)

    return run, leaves


def step(loss: Loss, leaves: Sequence[Tensor], grad_output: Tensor) -> Step:
    """Forward and backward; returns the gradients."""
    return lambda: torch.autograd.grad(loss(), leaves, grad_outputs=grad_output)


def empty_gradient(state: Tensor) -> Tensor:
    """A buffer allocated as the kernels allocate gradients: huge pages are asked for (csrc/cpu/memory.h).

    Without, fresh memory would cost the floor more page faults than the loss, and flatter every ratio to it.
    """
    grad = torch.empty_like(state)
    if hasattr(mmap, "MADV_HUGEPAGE") and grad.nbytes >= 4 << 20:
        begin = grad.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = grad.data_ptr() + grad.nbytes - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return grad


def floor(inputs: Inputs) -> Step:
    """A copy of the same bytes: every hidden state read once, every gradient written once, where gradients are.

    Padding is copied too: its gradients are zeros, and zeros are bytes. The loss need not read it.
    """
    states = [state.detach() for state in inputs.states]

    def copy() -> Sequence[Tensor]:
        grads = [empty_gradient(state) for state in states]
        for grad, state in zip(grads, states, strict=True):
            grad.copy_(state)
        return grads

    return copy


class Candidate(NamedTuple):
    loss: Loss | None  # None: the floor has none
    leaves: Sequence[Tensor]
    step: Step
    note: str = ""
    untimed: Callable[[], float] | None = None  # seconds of the last step that do not count


def setup(inputs: Inputs, provider: str, compile_modes: Sequence[str] = COMPILE_MODES) -> list[Candidate]:
    """The ways to run a provider; of several, whoever measures takes the fastest. Empty where none works."""
    if provider == FLOOR:
        return [Candidate(None, [], floor(inputs))]
    if provider == SENTENCE_TRANSFORMERS:
        loss, leaves = sentence_transformers(inputs)
        return [_candidate(loss, leaves, inputs)]
    if provider == COMPILED:
        return [c for mode in compile_modes if (c := _working(compiled(inputs, mode), inputs, mode)) is not None]
    loss = {OURS: ours, OURS_ONE_DIM: ours_one_dim}[provider](inputs)
    return [_candidate(loss, inputs.states, inputs)]


def _candidate(loss: Loss, leaves: Sequence[Tensor], inputs: Inputs, note: str = "") -> Candidate:
    return Candidate(loss, leaves, step(loss, leaves, inputs.grad_output), note)


def _working(loss: Loss, inputs: Inputs, mode: str) -> Candidate | None:
    """None where this mode does not compile here, such as without a C++ compiler."""
    candidate = _candidate(loss, inputs.states, inputs, mode)
    try:
        candidate.step()
    except Exception as error:  # inductor raises whatever its C++ compiler runs into
        warnings.warn(f"torch.compile, mode {mode}, does not work here: {error}", stacklevel=2)
        return None
    return candidate
