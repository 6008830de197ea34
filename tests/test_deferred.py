"""Deferred gradients: those of the dense path, wherever they come from, or an error; never a lost one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import m2d_ext
import parity
from m2d_ext import _extension
from m2d_ext.functional import matryoshka_2d_loss
from tiny_models import ARCHITECTURES, HIDDEN, features_of, sentence, tiny_model

pytestmark = pytest.mark.skipif(m2d_ext.build_info()["build"] == "none", reason="no extension")

WIDTH, LAYERS = 16, 4
GRID: dict[str, Any] = {
    "dims": [4, 16],
    "weights": [[1.0, 0.5]] * LAYERS,
    "kl_weights": [0.3] * (LAYERS - 1) + [0.0],
}


class Calls:
    """How many states got a dense gradient, and how many an addition."""

    def __init__(self, dense: list[int], hooks: list[Any]) -> None:
        self._dense, self._hooks = dense, hooks

    @property
    def dense(self) -> int:
        return sum(self._dense)

    @property
    def added(self) -> int:
        return sum(hooks.added for hooks in self._hooks)

    @property
    def added_in_place(self) -> int:
        return sum(hooks.added_in_place for hooks in self._hooks)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    made: list[Any] = []
    make = _extension.deferred_hooks

    def recording(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(_extension, "deferred_hooks", recording)
    with parity.recorded_dense_gradients() as dense:
        yield Calls(dense, made)


class Encoder(nn.Module):
    """Every state computed from the one before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = []
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
            states.append(x)
        return states


def tokens(columns: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = 8 // columns
    inputs = [torch.randn(texts, 5 - c, WIDTH, generator=generator, dtype=torch.float64) for c in range(columns)]
    masks = [(torch.rand(x.shape[:2], generator=generator) > 0.3).long() for x in inputs]
    return inputs, masks


States = Callable[[Encoder, Tensor], list[Tensor]]


def loss_of(
    encoder: Encoder, deferred: bool, *, columns: int = 1, states: States = Encoder.forward, **grid: Any
) -> Tensor:
    inputs, masks = tokens(columns)
    layers = [list(layer) for layer in zip(*(states(encoder, x) for x in inputs), strict=True)]
    loss = matryoshka_2d_loss(layers, masks, num_columns=2, deferred=deferred, **(GRID | grid))
    assert isinstance(loss, Tensor)
    return loss


def gradients(encoder: Encoder) -> list[Tensor]:
    grads = [parameter.grad for parameter in encoder.parameters()]
    encoder.zero_grad()
    return [torch.zeros(()) if grad is None else grad for grad in grads]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def both(**options: Any) -> tuple[list[Tensor], list[Tensor]]:
    encoder = Encoder()
    results = []
    for deferred in (True, False):
        (loss_of(encoder, deferred, **options) * 3).backward()
        results.append(gradients(encoder))
    return results[0], results[1]


@pytest.mark.parametrize("columns", [1, 2])
def test_equal_to_dense(columns: int, calls: Calls) -> None:
    found, expected = both(columns=columns)
    assert_same(found, expected)
    assert (calls.dense, calls.added) == (columns + LAYERS * columns, (LAYERS - 1) * columns)


def test_final_layer_of_weight_zero(calls: Calls) -> None:
    assert_same(*both(weights=[[1.0, 0.5]] * (LAYERS - 1) + [[0.0, 0.0]]))
    assert calls.added == LAYERS - 1


def test_fewer_layers(calls: Calls) -> None:
    """Without a final layer among those that matter the last of them takes its place."""
    weights = [[1.0, 1.0], [0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]
    assert_same(*both(weights=weights, kl_weights=None))
    assert (calls.dense, calls.added) == (1 + 2, 1)


def test_other_losses_are_added() -> None:
    encoder = Encoder()
    results = []
    for deferred in (True, False):
        (inputs,), (mask,) = tokens()
        states = encoder(inputs)
        loss = matryoshka_2d_loss(states, mask, deferred=deferred, **GRID)
        assert isinstance(loss, Tensor)
        (loss + sum(state.square().mean() for state in states)).backward()
        results.append(gradients(encoder))
    assert_same(*results)


def test_accumulation_and_second_backward(calls: Calls) -> None:
    encoder = Encoder()
    (loss_of(encoder, False) * 2 + loss_of(encoder, False, columns=2)).backward()
    expected = gradients(encoder)
    loss = loss_of(encoder, True)
    loss.backward(retain_graph=True)
    loss.backward()
    loss_of(encoder, True, columns=2).backward()
    assert_same(gradients(encoder), expected)


def test_part_of_the_graph() -> None:
    """autograd.grad by the last layer's parameters reaches no hook; what follows is not confused by it."""
    encoder = Encoder()
    loss_of(encoder, False).backward()
    expected = gradients(encoder)
    loss = loss_of(encoder, True)
    last = list(encoder.layers[-1].parameters())
    assert_same(list(torch.autograd.grad(loss, last, retain_graph=True)), expected[-2:])
    middle = list(encoder.layers[1].parameters())
    assert_same(list(torch.autograd.grad(loss, middle, retain_graph=True)), expected[2:4])
    loss.backward()
    assert_same(gradients(encoder), expected)


def test_gradients_of_the_states_themselves() -> None:
    encoder = Encoder()
    results = []
    for deferred in (True, False):
        (inputs,), (mask,) = tokens()
        states = encoder(inputs)
        loss = matryoshka_2d_loss(states, mask, deferred=deferred, **GRID)
        assert isinstance(loss, Tensor)
        results.append(list(torch.autograd.grad(loss, states)))
    assert_same(*results)


def test_another_backward_passes_untouched() -> None:
    encoder = Encoder()
    (inputs,), (mask,) = tokens()
    states = encoder(inputs)
    states[-1].sum().backward(retain_graph=True)
    expected = gradients(encoder)
    loss = matryoshka_2d_loss(states, mask, deferred=True, **GRID)
    assert isinstance(loss, Tensor)
    loss.backward(retain_graph=True)
    gradients(encoder)
    states[-1].sum().backward()
    assert_same(gradients(encoder), expected)


def copied(encoder: Encoder, x: Tensor) -> list[Tensor]:
    return [state.clone() for state in encoder(x)]


def one_node(encoder: Encoder, x: Tensor) -> list[Tensor]:
    """What a compiled model or a checkpoint around a whole encoder is to autograd."""
    return list(checkpoint(lambda y: tuple(encoder(y)), x.requires_grad_(), use_reentrant=True))


def leaves(encoder: Encoder, x: Tensor) -> list[Tensor]:
    return [encoder(x)[-1], *[x.clone().requires_grad_() for _ in range(LAYERS - 1)]]


@pytest.mark.parametrize("states", [copied, one_node, leaves])
def test_states_off_the_path_get_dense_gradients(states: States, calls: Calls) -> None:
    assert_same(*both(states=states))
    assert (calls.dense, calls.added) == (2 * LAYERS, 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant: bool, calls: Calls) -> None:
    def states(encoder: Encoder, x: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        result = []
        for layer in encoder.layers:
            x = checkpoint(lambda y, layer=layer: y + torch.tanh(layer(y)), x, use_reentrant=use_reentrant)
            result.append(x)
        return result

    assert_same(*both(states=states))
    assert calls.added == LAYERS - 1


class Cut(torch.autograd.Function):
    """A way in the graph on which no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_a_lost_gradient_is_an_error() -> None:
    def states(encoder: Encoder, x: Tensor) -> list[Tensor]:
        first = torch.tanh(encoder.layers[0](x))
        rest = [torch.tanh(encoder.layers[1](Cut.apply(first)))]
        rest += [torch.tanh(layer(rest[0])) for layer in encoder.layers[2:]]
        return [first, *rest]

    encoder = Encoder()
    loss = loss_of(encoder, True, states=states)
    with pytest.raises(RuntimeError, match=r"gradients of layers \[0\] would be lost.*deferred=False"):
        loss.backward()
    loss_of(encoder, False, states=states).backward()


def test_leaves_frozen_since(calls: Calls) -> None:
    def states(encoder: Encoder, x: Tensor) -> list[Tensor]:
        computed = encoder(x)
        encoder.layers[-1].requires_grad_(False)  # the leaves that lie next to the final state
        return computed

    assert_same(*both(states=states))
    assert calls.added == LAYERS - 1


def test_a_failed_backward_leaves_nothing_behind() -> None:
    """What it did not come to is not added to the gradients of another."""

    def fail(_: Tensor) -> None:
        raise KeyError("on the way down")

    encoder = Encoder()
    states: list[Tensor] = []

    def kept(encoder: Encoder, x: Tensor) -> list[Tensor]:
        states.extend(encoder(x))
        return states

    loss = loss_of(encoder, True, states=kept)
    handle = states[2].register_hook(fail)
    with pytest.raises(KeyError, match="on the way down"):
        loss.backward(retain_graph=True)
    handle.remove()
    encoder.zero_grad()
    states[-1].square().sum().backward(retain_graph=True)
    found = gradients(encoder)
    encoder(tokens()[0][0])[-1].square().sum().backward()
    assert_same(found, gradients(encoder))
    loss.backward()
    found = gradients(encoder)
    loss_of(encoder, False).backward()
    assert_same(found, gradients(encoder))


def test_no_second_derivative() -> None:
    encoder = Encoder()
    with pytest.raises(RuntimeError, match="create_graph"):
        (loss_of(encoder, True) + sum(s.square().sum() for s in encoder(tokens()[0][0]))).backward(create_graph=True)


def test_a_user_sees_whole_gradients() -> None:
    """Hooks of the states, registered before the loss or after it, may scale them or hold them."""
    grads, seen = [], []
    for deferred in (False, True):
        encoder, kept = Encoder(), []
        states = encoder(tokens()[0][0])
        states[0].register_hook(lambda grad: grad * 0.5)
        states[1].register_hook(kept.append)
        loss = matryoshka_2d_loss(states, tokens()[1], deferred=deferred, **GRID)
        states[0].register_hook(kept.append)
        states[1].register_hook(lambda grad: grad * 0.25)
        loss.backward()
        grads.append(gradients(encoder))
        seen.append(kept)
    assert_same(grads[1], grads[0])
    assert_same(seen[1], seen[0])


@pytest.mark.parametrize("nested", [True, False])
def test_a_backward_inside_another_of_the_same_loss(nested: bool) -> None:
    """Or beside it, on another thread, which starts and ends while the first is between two layers."""
    grads = []
    for deferred in (False, True):
        encoder = Encoder()
        states = encoder(tokens()[0][0])
        loss = matryoshka_2d_loss(states, tokens()[1], deferred=deferred, **GRID)
        inside: list[Any] = []

        def second(_: Tensor, loss: Tensor = loss, inside: list[Any] = inside) -> None:
            if not inside:
                inside.append(threading.Thread(target=lambda: loss.backward(retain_graph=True)))
                if nested:
                    inside[0].run()
                else:
                    inside[0].start()
                    inside[0].join()

        states[1].register_hook(second)
        loss.backward(retain_graph=True)
        grads.append(gradients(encoder))
    assert_same(grads[1], grads[0])


class Held:
    """By a node of the autograd graph."""


def test_the_graph_is_freed_after_an_error() -> None:
    """What the hooks keep of a backward must not keep the states, which keep the hooks."""
    encoder, held = Encoder(), Held()
    states = encoder(tokens()[0][0])
    torch.autograd.graph.get_gradient_edge(states[0]).node.metadata["held"] = held
    alive = weakref.ref(held)
    loss = matryoshka_2d_loss(states, tokens()[1], deferred=True, **GRID)
    with pytest.raises(RuntimeError, match="create_graph"):
        (loss * states[0].sum()).backward(create_graph=True)
    encoder.zero_grad()
    del states, loss, held
    gc.collect()
    assert alive() is None


def test_sparse_gradients(calls: Calls) -> None:
    grads = []
    for deferred in (False, True):
        torch.manual_seed(0)
        x = torch.randn(4, 3, WIDTH, dtype=torch.float64, requires_grad=True)
        first = x * 2.0
        index = torch.arange(WIDTH).flip(0).expand(4, 3, WIDTH).contiguous()
        final = torch.gather(first, 2, index, sparse_grad=True)
        loss = matryoshka_2d_loss([first, final], dims=[WIDTH], weights=[[1.0], [1.0]], deferred=deferred)
        loss.backward()
        grads.append(x.grad)
    assert calls.added == 1
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


def test_compiled_autograd_is_refused() -> None:
    encoder = Encoder()
    loss = loss_of(encoder, True)
    with (
        pytest.raises(NotImplementedError, match="deferred=False"),
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        loss.backward()


def model_gradients(
    architecture: str,
    deferred: bool,
    checkpointing: bool | None = None,
    frozen: bool = False,
    prepare: Callable[[SentenceTransformer], Any] = lambda model: model,
) -> dict[str, Tensor]:
    """``prepare`` changes the model, and may return what wraps it, as a Trainer puts it into the loss."""
    model = tiny_model(architecture).double()
    wrapper = prepare(model)
    if checkpointing is not None:
        model[0].auto_model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    if frozen:
        model[0].auto_model.get_input_embeddings().requires_grad_(False)
        next(p for name, p in model.named_parameters() if "layer" in name).requires_grad_(False)
    loss = m2d_ext.Matryoshka2dLoss(
        model,
        MultipleNegativesRankingLoss(model),
        [HIDDEN, 8],
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        deferred=deferred,
    ).train()
    loss.model = loss.loss.model = loss.loss.loss.model = wrapper
    generator = torch.Generator().manual_seed(0)
    texts = [[sentence(n, generator) for n in lengths] for lengths in ([3, 5, 7, 2], [4, 1, 6, 9])]
    loss(features_of(model, texts), None).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


MODELS = [(name, checkpointing) for name in (*ARCHITECTURES, "distilbert") for checkpointing in (None, False, True)]
MODELS = [case for case in MODELS if case[0] != "mpnet" or case[1] is None]  # has no gradient checkpointing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("architecture", "checkpointing"), MODELS)
def test_models(architecture: str, checkpointing: bool | None, frozen: bool, calls: Calls) -> None:
    assert_same_model_gradients(calls, architecture, checkpointing, frozen)
    assert calls.added > 0


def assert_same_model_gradients(calls: Calls, *arguments: Any, **options: Any) -> None:
    found = model_gradients(arguments[0], True, *arguments[1:], **options)
    added = calls.added
    expected = model_gradients(arguments[0], False, *arguments[1:], **options)
    assert calls.added == added
    assert found.keys() == expected.keys()
    scale = max(grad.norm().item() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm().item() <= 1e-12 * scale, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [None, False])  # reentrant, no input requires grad: none without us either
@pytest.mark.parametrize(("architecture", "target"), [("bert", "query"), ("qwen3", "q_proj"), ("modernbert", "Wqkv")])
def test_lora(architecture: str, target: str, checkpointing: bool | None, calls: Calls) -> None:
    def add_adapter(model: SentenceTransformer) -> SentenceTransformer:
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        assert sum(p.requires_grad for p in model.parameters()) > 0
        return model.double()

    assert_same_model_gradients(calls, architecture, checkpointing, prepare=add_adapter)
    assert calls.added > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_compiled_model(architecture: str, calls: Calls) -> None:
    """All states of a compiled model come out of one node: they get dense gradients."""
    assert_same_model_gradients(
        calls, architecture, prepare=lambda model: torch.compile(model, backend="aot_eager", dynamic=False)
    )
    assert calls.added == 0


def test_gradient_scaler() -> None:
    """Half-precision training multiplies the loss by a large number and divides the gradients by it."""
    model = tiny_model()
    loss = m2d_ext.Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), [HIDDEN, 8], None, -1, -1)
    columns = [["w1 w2", "w3"], ["w4", "w5 w6 w7"]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    results = []
    for scale in (lambda value: value, scaler.scale):
        optimizer.zero_grad()
        scale(loss(features_of(model, columns), None)).backward()
        if results:
            scaler.unscale_(optimizer)
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    scaler.step(optimizer)
    total = torch.stack([grad.norm() for grad in results[0]]).norm()
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * total.item())


class CountedOperations(TorchDispatchMode):
    """How many operators run; views, which launch nothing, are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_operations_of_a_step() -> None:
    """All layers and dims of a 12-layer BERT take hardly more operators than plain training."""
    model = tiny_model("bert", num_layers=12, dropout=0.1)
    generator = torch.Generator().manual_seed(0)
    texts = [[sentence(5, generator) for _ in range(8)] for _ in range(2)]
    plain = MultipleNegativesRankingLoss(model)
    every = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    counts = []
    for loss in (plain, m2d_ext.Matryoshka2dLoss(model, plain, [HIDDEN, 16, 8, 4, 2], **every)):
        model.zero_grad()
        with CountedOperations() as operations:
            loss.train()(features_of(model, texts), None).backward()
        counts.append(operations.count)
    assert counts[1] <= counts[0] + 100


# --- in place, or not -----------------------------------------------------------------------------------------------


class GivesBack(torch.autograd.Function):
    """Its gradient is a tensor that somebody holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, saves: bool) -> Tensor:
        ctx.held = None if saves else held
        ctx.save_for_backward(*([held * 1.0] if saves else []))
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.saved_tensors[0] if ctx.held is None else ctx.held, None, None


class Threefold(torch.autograd.Function):
    """Its gradient has been a Python object, which nobody holds any more: those of a compiled model are like that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3.0


HELD = torch.full((4, 3, WIDTH), 0.5, dtype=torch.float64)
# A term from before the state: autograd comes to it later, and keeps the sum's gradient for it. (It saves nothing.)
OTHER = torch.ones(4, 3, WIDTH, dtype=torch.float64, requires_grad=True).view(4, 3, WIDTH)
KEPT: list[tuple[Tensor, Tensor]] = []  # each with a copy made at once


def _kept(state: Tensor) -> Tensor:
    def keep(grad: Tensor) -> None:
        KEPT.append((grad, grad.clone()))

    state.register_hook(keep)
    return state * 3.0


# What follows a state, and whether autograd alone then holds what arrives there.
FOLLOWERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "product": (lambda state: state * 3.0, True),
    "norm": (lambda state: torch.nn.functional.layer_norm(state, (WIDTH,)), True),
    "made in Python": (Threefold.apply, True),
    "two": (lambda state: state.tanh() + state.sin(), True),
    "residual": (lambda state: state + OTHER, False),
    "expanded": (lambda state: state.sum((0, 1), keepdim=True).expand_as(state), False),
    "viewed": (lambda state: (state.flatten() * 3.0).view_as(state), False),
    "held": (lambda state: GivesBack.apply(state, HELD, False), False),
    "saved": (lambda state: GivesBack.apply(state, HELD, True), False),
    "kept by a hook": (_kept, True),  # which sees it after the addition
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_in_place_only_where_nobody_else_holds_it(name: str, calls: Calls) -> None:
    """Right in any case, and what others hold is left as it was."""
    follow, is_own = FOLLOWERS[name]
    mask = torch.ones(4, 3, dtype=torch.int64)
    grads = []
    for deferred in (True, False):
        KEPT.clear()
        earlier = calls.added_in_place
        torch.manual_seed(4)
        x = torch.randn(4, 3, WIDTH, dtype=torch.float64, requires_grad=True)
        first = x * 2.0
        final = follow(first)
        grid = {"dims": [4, WIDTH], "weights": [[1.0, 0.5]] * 2, "kl_weights": [0.3, 0.0]}
        loss = matryoshka_2d_loss([first, final], mask, deferred=deferred, **grid)
        total = loss + (final * torch.linspace(0, 1, WIDTH, dtype=torch.float64)).sum()
        total.backward(retain_graph=True)
        assert calls.added_in_place - earlier == (deferred and is_own)
        total.backward()
        grads.append(x.grad)
        assert len(KEPT) == (2 if name == "kept by a hook" else 0)
        assert all(torch.equal(kept, copied) for kept, copied in KEPT)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(HELD, torch.full_like(HELD, 0.5))
