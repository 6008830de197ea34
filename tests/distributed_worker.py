"""Processes of one group for test_distributed.py, and what they run.

Importing torch and transformers takes longer than all the tests: a server process does it once, and every process of
every world is forked from it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import m2d_ext
from m2d_ext.losses.embed import TAKES_LISTS_OF_STATES
from parity import recorded_dense_gradients
from tiny_models import CONFIGS, HIDDEN, features_of, sentence, tiny_model

DIMS = [HIDDEN, 8, 4]
ALL_CELLS: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1}
GROUP_TIMEOUT = 20.0  # seconds until a collective that not all processes join fails

# --- worlds ---------------------------------------------------------------------------------------------------------


class Raised(NamedTuple):
    """An exception in a process."""

    kind: str
    message: str
    trace: str


class World:
    """Processes of one group, which wait for jobs.

    Args:
        size: how many.
        folder: where they find each other.
        timeout: seconds until a collective that not all of them join fails.
    """

    def __init__(self, size: int, folder: Path, timeout: float = GROUP_TIMEOUT) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipes = []
        self._processes = []
        with _inherited_path():
            for rank in range(size):
                here, there = context.Pipe()
                arguments = rank, size, str(folder / "rendezvous"), timeout, there
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)

    def run(
        self, job: Callable[..., Any], *arguments: Any, waits: Sequence[int] | None = None, seconds: float = 60.0
    ) -> list[Any]:
        """``job(*arguments)`` in all processes: what each returned, ``Raised``, or None if it ended.

        Args:
            job: a function of this module.
            arguments: its arguments.
            waits: the processes to hear from; None: all.
            seconds: how long to wait for them.

        Raises:
            TimeoutError: some gave no answer in so many seconds.
        """
        for pipe in self._pipes:
            pipe.send((job, arguments))
        end = time.monotonic() + seconds
        outcomes = []
        for rank in range(len(self._pipes)) if waits is None else waits:
            try:
                if not self._pipes[rank].poll(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"no answer from process {rank} in {seconds} seconds")
                outcomes.append(pickle.loads(self._pipes[rank].recv_bytes()))
            except (EOFError, ConnectionResetError):
                outcomes.append(None)
        return outcomes

    def leave(self, *, seconds: float, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Let all processes, or some, end by themselves; their exit codes, None for those that did not in time."""
        end = time.monotonic() + seconds
        ranks = range(len(self._pipes)) if ranks is None else ranks
        for rank in ranks:
            self._pipes[rank].close()
        for rank in ranks:
            self._processes[rank].join(max(0.0, end - time.monotonic()))
        return [self._processes[rank].exitcode for rank in ranks]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def _inherited_path() -> Iterator[None]:
    """The server that processes are forked from finds modules where this one does: not so in Python 3.11 by itself."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(rank: int, size: int, rendezvous: str, timeout: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    for architecture in CONFIGS:
        tiny_model(architecture)  # kept; in a group only the first process saves a model, as making them does
    dist.init_process_group("gloo", f"file://{rendezvous}", timedelta(seconds=timeout), world_size=size, rank=rank)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            outcome = job(*arguments)
        except Exception as error:
            outcome = Raised(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(outcome))  # not send: torch would put tensors into shared memory


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Some steps of training, the same for all processes.

    Args:
        sizes: texts per column of each process. Where they differ, each one's loss is weighted by them, so that the
            average over processes is the loss of the joined batch.
        columns: C.
        loss: "2d", "layers" or "dims".
        options: the loss's.
        library: "m2d" or "st".
        cached_base: mini_batch_size of a CachedMultipleNegativesRankingLoss in place of the usual base loss.
        guided: whether the base loss is a GISTEmbedLoss, whose guide is another model.
        base: the base loss's options.
        gather: whether candidates come from all processes.
        widths: words per text of each column of each process; None: drawn.
        architecture: of the model.
        normalize: whether the model normalises.
        dense: the width of a Dense after the pooling; None: no such module.
        pooling: the mode of it, or several.
        dtype: of its parameters.
        ddp: DistributedDataParallel's options; None: the gradients are averaged by hand.
        steps: how many.
        batches: per step; gradients accumulate over them.
        seeds: of Python's random numbers, one per process or one for all.
    """

    sizes: tuple[int, ...]
    columns: int = 2
    loss: str = "2d"
    options: dict[str, Any] = field(default_factory=dict)
    library: str = "m2d"
    cached_base: int | None = None
    guided: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    gather: bool = True
    widths: tuple[tuple[int, ...], ...] | None = None
    architecture: str = "bert"
    normalize: bool = False
    dense: int | None = None
    pooling: str | tuple[str, ...] = "mean"
    dtype: torch.dtype = torch.float64
    ddp: dict[str, Any] | None = None
    steps: int = 1
    batches: int = 1
    seeds: tuple[int, ...] = (0,)


class Collective(NamedTuple):
    name: str
    num_bytes: int  # that each process sends


class Trained(NamedTuple):
    """What came out of a task."""

    losses: list[float]  # of each batch
    grads: dict[str, Tensor]  # of the last step
    parameters: dict[str, Tensor]  # after it
    random_state: Any
    collectives: list[Collective]  # of the last step, without DistributedDataParallel's own
    buckets: list[list[int]]  # by step, how many gradients DistributedDataParallel averaged at a time
    dense: list[int]  # states to which each step brought a gradient of their own; those of the others were deferred


class Recorder(TorchDispatchMode):
    """Notes the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = [value for value in tree_leaves(args[1]) if isinstance(value, Tensor)]
            self.collectives.append(Collective(func._opname, sum(tensor.nbytes for tensor in sent)))
        return func(*args, **(kwargs or {}))


def texts_of(task: Task, seed: int) -> list[list[str]]:
    """The columns of all processes' joined batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (task.columns, sum(task.sizes)), generator=generator)
    if task.widths is not None:
        lengths = torch.tensor(task.widths).repeat_interleave(torch.tensor(task.sizes), dim=0).T
    return [[sentence(length, generator) for length in column] for column in lengths.tolist()]


def own_columns(task: Task, seed: int = 0) -> list[list[str]]:
    """This process's part of them."""
    first = sum(task.sizes[: dist.get_rank()])
    return [column[first : first + task.sizes[dist.get_rank()]] for column in texts_of(task, seed)]


def make_model(task: Task) -> SentenceTransformer:
    model = tiny_model(task.architecture, normalize=task.normalize, dense=task.dense, pooling=task.pooling)
    return model.to(task.dtype)


def drawn_weight(_: int) -> float:
    """A layer's weight that each process would draw for itself."""
    return 0.5 + random.random()


def make_loss(task: Task, model: SentenceTransformer, gather: bool) -> nn.Module:
    library: Any = m2d_ext if task.library == "m2d" else st_losses
    if task.guided:
        guide = tiny_model("mpnet").to(task.dtype)
        base: nn.Module = st_losses.GISTEmbedLoss(model, guide, gather_across_devices=gather, **task.base)
    elif task.cached_base is None:
        base = st_losses.MultipleNegativesRankingLoss(model, gather_across_devices=gather, **task.base)
    else:
        base = st_losses.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=task.cached_base, gather_across_devices=gather
        )
    if task.loss == "layers":
        return library.AdaptiveLayerLoss(model, base, **({"n_layers_per_step": -1} | task.options))
    if task.loss == "dims":
        return library.MatryoshkaLoss(model, base, DIMS, [1.0, 0.7, 0.4], **task.options)
    return library.Matryoshka2dLoss(model, base, DIMS, [1.0, 0.7, 0.4], **(ALL_CELLS | task.options))


def put_wrapper(loss: nn.Module, wrapper: nn.Module) -> None:
    """In place of the model wherever it is, as the Trainer does."""
    for name, child in loss.named_children():
        if name == "model":
            loss.model = wrapper
        else:
            put_wrapper(child, wrapper)


def wrapped(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Older transformers save a buffer, the positions, for the backward, and the next call broadcasts it in place:
    several calls a step, sentence-transformers' too, then need ddp_broadcast_buffers=False.
    """
    return DistributedDataParallel(model, broadcast_buffers=TAKES_LISTS_OF_STATES, **options)


def train(task: Task) -> Trained:
    """In a process of a world."""
    return _train(task, own_columns, task.seeds[dist.get_rank() % len(task.seeds)], dist.get_world_size())


def train_alone(task: Task) -> Trained:
    """In one process without a group: the joined batches, drawn as the first process draws."""
    return _train(task, texts_of, task.seeds[0], None)


def _train(task: Task, texts: Callable[[Task, int], list[list[str]]], seed: int, processes: int | None) -> Trained:
    model = make_model(task)
    loss_module = make_loss(task, model, gather=task.gather and processes is not None).train()
    wrapper: Any = None
    buckets: list[list[int]] = []
    if processes is not None and task.ddp is not None:
        # Small buckets: there shall be several.
        wrapper = wrapped(model, bucket_cap_mb=0.05, **task.ddp)
        wrapper.register_comm_hook(buckets, _counted_average)
        put_wrapper(loss_module, wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    random.seed(seed)
    losses: list[float] = []
    dense: list[int] = []
    recorder = Recorder()
    with recorded_dense_gradients() as handed:
        for i in range(task.steps):
            optimizer.zero_grad()
            buckets.append([])
            handed.clear()
            for j in range(task.batches):
                columns = texts(task, task.batches * i + j)
                weight = len(columns[0]) * (processes or 1) / sum(task.sizes) / task.batches
                features = features_of(model, columns)
                with ExitStack() as stack:
                    if wrapper is None:
                        recorder.collectives.clear()
                        stack.enter_context(recorder)
                    stack.enter_context(wrapper.no_sync() if wrapper and j < task.batches - 1 else nullcontext())
                    loss = loss_module(features, None)
                    (loss * weight).backward()
                losses.append(loss.item())
            dense.append(sum(handed))
            if processes is not None and wrapper is None:
                _average(model)
            optimizer.step()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return Trained(losses, grads, parameters, random.getstate(), recorder.collectives, buckets, dense)


def _average(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _counted_average(buckets, bucket):  # type: ignore[no-untyped-def]  # strings as annotations would be refused
    """DistributedDataParallel's own average."""
    buckets[-1].append(bucket.buffer().numel())
    rows = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(rows, async_op=True).get_future().then(lambda future: future.value()[0])


def evaluate(task: Task) -> float:
    """The loss without gradients."""
    model = make_model(task)
    with torch.no_grad():
        return make_loss(task, model, gather=True)(features_of(model, own_columns(task)), None).item()


# --- what goes wrong ------------------------------------------------------------------------------------------------


def two_steps_of(task: Task, shapes: Sequence[Sequence[int]]) -> float:
    """A good step, unless ``steps`` is 0; then one in which each process has columns of so many texts."""
    model = make_model(task)
    loss = make_loss(task, model, gather=True).train()
    if task.ddp is not None:
        put_wrapper(loss, wrapped(model, **task.ddp))
    if task.steps:
        loss(features_of(model, own_columns(task)), None).backward()
    features = []
    for size in shapes[dist.get_rank()]:
        (column,) = features_of(model, own_columns(task)[:1])
        features.append({name: v[:size] if isinstance(v, Tensor) else v for name, v in column.items()})
    return loss(features, None).item()


def share_a_backward(task: Task, others: dict[str, Any]) -> float:
    """One backward of the task's loss and of another one with these options; by how much processes differ after it."""
    model = make_model(task)
    modules = [make_loss(replace(task, options=options), model, gather=False) for options in (task.options, others)]
    wrapper = wrapped(model, **(task.ddp or {}))
    for module in modules:
        put_wrapper(module, wrapper)
    features = features_of(model, own_columns(task))
    sum(module.train()(features, None) for module in modules).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    norms = torch.stack([norm, -norm])
    dist.all_reduce(norms, op=dist.ReduceOp.MAX)
    return norms.sum().item()


class Doomed(TorchDispatchMode):
    """The process gets a signal instead of its n-th collective."""

    def __init__(self, number: int, how: signal.Signals) -> None:
        super().__init__()
        self._left = number
        self._how = how

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._how)
        return func(*args, **(kwargs or {}))


def lose_one(task: Task, number: int, how: signal.Signals) -> None:
    """A step in which the last process is lost at its n-th collective."""
    model = make_model(task)
    loss_module = make_loss(task, model, gather=True).train()
    features = features_of(model, own_columns(task))
    with Doomed(number, how) if dist.get_rank() == dist.get_world_size() - 1 else nullcontext():
        loss_module(features, None).backward()
