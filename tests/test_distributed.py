"""Several processes: the gradients of one process over the joined batch, from three collectives; and no hang."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

import m2d_ext
from distributed_worker import (
    ALL_CELLS,
    DIMS,
    GROUP_TIMEOUT,
    Raised,
    Task,
    Trained,
    World,
    drawn_weight,
    evaluate,
    lose_one,
    make_loss,
    make_model,
    put_wrapper,
    share_a_backward,
    texts_of,
    train,
    train_alone,
    two_steps_of,
)
from tiny_models import ARCHITECTURES, HIDDEN, NUM_LAYERS, features_of, tiny_model

pytestmark = [
    pytest.mark.skipif(m2d_ext.build_info()["build"] == "none", reason="no extension"),
    pytest.mark.skipif(sys.platform == "win32", reason="the processes are forked"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo"),
]

TOLERANCE = 1e-10
UNUSED: dict[str, Any] = {"find_unused_parameters": True}  # BERT's pooler is
STATIC: dict[str, Any] = {"static_graph": True}
DRAWN: dict[str, Any] = {"n_layers_per_step": 1, "n_dims_per_step": 1}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """``run(size, job, ...)``: a job in a world of so many processes, which stays for the next one."""
    worlds: dict[tuple[int, float], World] = {}

    def run_in_world(size: int, job: Callable[..., Any], *arguments: Any, timeout: float = GROUP_TIMEOUT) -> list[Any]:
        key = size, timeout
        if key not in worlds:
            worlds[key] = World(size, tmp_path_factory.mktemp("world"), timeout)
        try:
            outcomes = worlds[key].run(job, *arguments)
        except BaseException:
            worlds.pop(key).kill()
            raise
        kinds = {outcome.kind if isinstance(outcome, Raised) else type(outcome) for outcome in outcomes}
        if not kinds <= {"ValueError"} and (len(kinds) > 1 or not kinds <= {Trained, float}):
            worlds.pop(key).kill()  # its processes may be out of step with each other
        return outcomes

    yield run_in_world
    for world in worlds.values():
        world.leave(seconds=10)
        world.kill()


def trained(run: Run, task: Task) -> list[Trained]:
    outcomes = run(len(task.sizes), train, task)
    failures = [outcome.trace for outcome in outcomes if isinstance(outcome, Raised)]
    assert not failures, "\n".join(failures)
    return outcomes


_alone: dict[str, Trained] = {}  # many tests have the same reference


def alone(task: Task, **changes: Any) -> Trained:
    """One process over the joined batches; sentence-transformers' own loss, if nothing else is said."""
    changed: dict[str, Any] = {"library": "st", "cached_base": None, "ddp": None, **changes}
    options = {name: value for name, value in task.options.items() if name != "mini_batch_size"}
    reference = dataclasses.replace(task, options=options, **changed)
    name = repr(reference)
    if name not in _alone:
        _alone[name] = train_alone(reference)
    return _alone[name]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    scale = torch.stack([value.norm() for value in expected.values()]).norm().item()
    assert scale > 0
    for name, value in expected.items():
        allowed = tolerance * max(value.norm().item(), 1e-3 * scale)
        assert (found[name] - value).norm().item() <= allowed, name


def assert_same_training(
    found: list[Trained], expected: Trained, sizes: Sequence[int], tolerance: float = TOLERANCE
) -> None:
    """The gradients of the last step and the parameters after it in each process, the losses over all of them."""
    for one in found:
        # DistributedDataParallel leaves no gradient, or zeros, where a parameter is used nowhere.
        grads = {name: grad for name, grad in one.grads.items() if name in expected.grads or grad.any()}
        assert_close(grads, expected.grads, tolerance)
        assert_close(one.parameters, expected.parameters, tolerance)
        assert all(torch.equal(grad, found[0].grads[name]) for name, grad in one.grads.items())
    for i, loss in enumerate(expected.losses):
        mean = sum(size * one.losses[i] for size, one in zip(sizes, found, strict=True)) / sum(sizes)
        assert mean == pytest.approx(loss, rel=tolerance)


# --- the joined batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddp", [None, UNUSED], ids=["by hand", "ddp"])
@pytest.mark.parametrize("loss", ["2d", "layers", "dims"])
@pytest.mark.parametrize(("size", "columns"), [(2, 2), (2, 3), (4, 3)])
def test_equal_to_the_joined_batch(run: Run, size: int, columns: int, loss: str, ddp: dict[str, Any] | None) -> None:
    task = Task((3,) * size, columns, loss, ddp=ddp)
    assert_same_training(trained(run, task), alone(task), task.sizes)


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["at once", "cached"])
@pytest.mark.parametrize(("sizes", "columns"), [((2, 5), 2), ((5, 2), 3), ((4, 1, 3, 2), 2)])
def test_unequal_batches(run: Run, sizes: tuple[int, ...], columns: int, options: dict[str, Any]) -> None:
    task = Task(sizes, columns, normalize=True, options=options, ddp=UNUSED, steps=2)
    assert_same_training(trained(run, task), alone(task), sizes)


def test_one_process(run: Run) -> None:
    task = Task((5,), 3, ddp=UNUSED)
    assert_same_training(trained(run, task), alone(task), task.sizes)


@pytest.mark.parametrize("loss", ["2d", "layers", "dims"])
def test_without_gradients(run: Run, loss: str) -> None:
    task = Task((2, 4), 3, loss)
    values = run(2, evaluate, task)
    mean = (2 * values[0] + 4 * values[1]) / 6
    assert mean == pytest.approx(alone(task).losses[0], rel=TOLERANCE)


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES, "distilbert"} - {"bert"}))
def test_architectures(run: Run, architecture: str) -> None:
    task = Task((3, 4), architecture=architecture, ddp=UNUSED)
    assert_same_training(trained(run, task), alone(task), task.sizes)


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["at once", "cached"])
@pytest.mark.parametrize("loss", ["2d", "dims"])
@pytest.mark.parametrize(
    "model",
    [{"pooling": "max"}, {"pooling": ("mean", "cls")}, {"dense": HIDDEN, "normalize": True}],
    ids=["max", "several", "dense"],
)
def test_other_modules(run: Run, model: dict[str, Any], loss: str, options: dict[str, Any]) -> None:
    task = Task((3, 4), loss=loss, options=options, ddp=UNUSED, steps=2, **model)
    assert_same_training(trained(run, task), alone(task), task.sizes)


@pytest.mark.parametrize("ddp", [None, UNUSED], ids=["by hand", "ddp"])
def test_float32(run: Run, ddp: dict[str, Any] | None) -> None:
    task = Task((3, 4), 3, dtype=torch.float32, ddp=ddp, steps=2)
    assert_same_training(trained(run, task), alone(dataclasses.replace(task, dtype=torch.float64)), task.sizes, 1e-4)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4)])
@pytest.mark.parametrize(
    "base",
    [
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction", "scale": 5.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
    ],
    ids=["joint", "per direction", "hardness"],
)
def test_other_rankings(run: Run, base: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """Those that also need the other processes' anchors."""
    task = Task(sizes, 3, base=base, ddp=UNUSED, steps=2)
    assert_same_training(trained(run, task), alone(task), task.sizes)


# --- DistributedDataParallel ----------------------------------------------------------------------------------------

DDP_CASES = [
    ("bert", UNUSED),
    ("bert", STATIC),
    ("distilbert", {"find_unused_parameters": False}),
    ("distilbert", {"gradient_as_bucket_view": True}),
    ("modernbert", {}),
    ("modernbert", STATIC),
]


@pytest.mark.parametrize("loss", ["2d", "dims"])
@pytest.mark.parametrize(("architecture", "ddp"), DDP_CASES)
def test_several_steps(run: Run, architecture: str, ddp: dict[str, Any], loss: str) -> None:
    task = Task((4, 3), loss=loss, architecture=architecture, ddp=ddp, steps=4)
    found = trained(run, task)
    assert_same_training(found, alone(task), task.sizes)
    assert max(map(len, found[0].buckets)) > 1


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("loss", ["2d", "dims"])
def test_columns_of_other_widths(run: Run, loss: str, gather: bool) -> None:
    """DistributedDataParallel communicates in every call: no process may call the model less often than another."""
    task = Task((3, 3), 3, loss, widths=((5, 5, 5), (2, 9, 4)), gather=gather, ddp=UNUSED, steps=3)
    found = trained(run, task)
    if gather:
        assert_same_training(found, alone(task), task.sizes)
    expected = trained(run, dataclasses.replace(task, ddp=None))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.parameters, other.parameters)


def test_gradients_are_deferred_where_ddp_lets_states_pass(run: Run) -> None:
    """While it searches or learns the graph it routes all states through one node of it: all gradients are dense."""
    task = Task((3, 3), architecture="distilbert", steps=2)
    by_hand, let, static = (trained(run, dataclasses.replace(task, ddp=ddp))[0].dense for ddp in (None, {}, STATIC))
    blocks = task.columns  # each a call of the model, whose final state alone gets a gradient
    assert let == by_hand == [blocks, blocks]
    assert static[1] == blocks


def test_accumulation(run: Run) -> None:
    """Batches under no_sync, as the Trainer accumulates."""
    task = Task((3, 5), ddp=UNUSED, steps=2, batches=3)
    assert_same_training(trained(run, task), alone(task), task.sizes)


# --- sentence-transformers' own loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize(("loss", "ddp"), [("2d", UNUSED), ("2d", None), ("layers", UNUSED), ("dims", None)])
def test_equal_to_sentence_transformers(run: Run, loss: str, ddp: dict[str, Any] | None, columns: int) -> None:
    """Its MatryoshkaLoss has DistributedDataParallel write into the batch's own dicts, which that cannot bear."""
    task = Task((3, 3), columns, loss, ddp=ddp, steps=2)
    found, expected = trained(run, task), trained(run, dataclasses.replace(task, library="st"))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.grads, other.grads)
        assert_close(one.parameters, other.parameters)
        assert one.losses == pytest.approx(other.losses, rel=TOLERANCE)


@pytest.mark.parametrize(
    "base", [{}, {"margin_strategy": "relative", "margin": 0.1, "contrast_anchors": False}], ids=str
)
@pytest.mark.parametrize("columns", [2, 3])
def test_guided_equal_to_sentence_transformers(run: Run, columns: int, base: dict[str, Any]) -> None:
    """One more collective, for the guide's embeddings."""
    task = Task((3, 3), columns, guided=True, base=base)
    found, expected = trained(run, task), trained(run, dataclasses.replace(task, library="st"))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.grads, other.grads)
        assert one.losses == pytest.approx(other.losses, rel=TOLERANCE)
        assert len(one.collectives) <= 5 < len(other.collectives)


def test_equal_to_sentence_transformers_drawn(run: Run) -> None:
    """Which draws in each process by itself: the same only from the same seed."""
    task = Task((3, 3), options=DRAWN, ddp=UNUSED, steps=4)
    found, expected = trained(run, task), trained(run, dataclasses.replace(task, library="st"))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.parameters, other.parameters)
        assert one.losses == pytest.approx(other.losses, rel=TOLERANCE)
        assert one.random_state == other.random_state


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        DRAWN,
        {"n_layers_per_step": 2, "n_dims_per_step": 2},
        {"n_layers_per_step": -1, "n_dims_per_step": 1},
        {"n_layers_per_step": 2, "layer_weighting": drawn_weight},
    ],
    ids=["one of each", "two of each", "dims", "and weights"],
)
@pytest.mark.parametrize("ddp", [None, UNUSED], ids=["by hand", "ddp"])
def test_the_first_process_draws_for_all(run: Run, options: dict[str, Any], ddp: dict[str, Any] | None) -> None:
    """And every process's own random numbers go on as if it trained alone."""
    task = Task((3, 2), options=options, ddp=ddp, steps=5, seeds=(11, 12))
    found = trained(run, task)
    assert_same_training(found, alone(task, library="m2d"), task.sizes)
    for one, seed in zip(found, task.seeds, strict=True):
        assert one.random_state == alone(task, library="m2d", seeds=(seed,)).random_state
    assert found[0].random_state != found[1].random_state


RECIPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("bert", {"layers": [1]}, UNUSED),
    ("bert", {"pairs": [(0, 4), (2, 8), (3, 32)]}, UNUSED),
    ("modernbert", {"final_norm": "apply"}, UNUSED),
    ("modernbert", {"final_norm": "apply"}, STATIC),
    ("modernbert", {"final_norm": "apply", **DRAWN}, {}),
]


@pytest.mark.parametrize("cached", [{}, {"mini_batch_size": 2}], ids=["at once", "cached"])
@pytest.mark.parametrize(("architecture", "options", "ddp"), RECIPES)
def test_recipes(
    run: Run, architecture: str, options: dict[str, Any], ddp: dict[str, Any], cached: dict[str, Any]
) -> None:
    """What sentence-transformers does not have; the norm runs outside of what DistributedDataParallel wraps."""
    task = Task((5, 3), architecture=architecture, options=options | cached, ddp=ddp, steps=3)
    assert_same_training(trained(run, task), alone(task, library="m2d"), task.sizes)


def test_the_first_process_draws_dims(run: Run) -> None:
    task = Task((3, 2, 2, 3), loss="dims", options={"n_dims_per_step": 1}, steps=5, seeds=(11, 12, 13, 14))
    found = trained(run, task)
    assert_same_training(found, alone(task, library="m2d"), task.sizes)
    assert len({one.random_state for one in found}) == 4


# --- collectives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, DRAWN, {"mini_batch_size": 2}], ids=["all", "drawn", "cached"])
@pytest.mark.parametrize("loss", ["2d", "dims"])
@pytest.mark.parametrize("sizes", [(5, 5), (2, 5)])
def test_three_collectives_a_step(run: Run, sizes: tuple[int, ...], loss: str, options: dict[str, Any]) -> None:
    if loss == "dims":
        options = {name: value for name, value in options.items() if name != "n_layers_per_step"}
    task = Task(sizes, 3, loss, options=options, steps=2)
    layers = 1 if loss == "dims" else options.get("n_layers_per_step", NUM_LAYERS) + 1
    candidates = 8 * layers * (task.columns - 1) * max(sizes) * HIDDEN
    for one in trained(run, task):
        first, large, back = one.collectives
        assert "gather" in first.name
        assert first.num_bytes <= 1024
        assert "gather" in large.name
        assert large.num_bytes == candidates
        assert "reduce_scatter" in back.name
        assert back.num_bytes == len(sizes) * candidates


def test_how_many_sentence_transformers_takes(run: Run) -> None:
    task = Task((3, 3), 3, library="st")
    for one in trained(run, task):
        gathers = sum("gather" in collective.name for collective in one.collectives)
        assert gathers == (NUM_LAYERS + 1) * len(DIMS) * task.columns


# --- gradient caching -----------------------------------------------------------------------------------------------

CACHED: dict[str, Any] = {"mini_batch_size": 2}


@pytest.mark.parametrize(("loss", "sizes"), [("2d", (5, 5)), ("2d", (1, 5)), ("dims", (1, 5))])
@pytest.mark.parametrize(("architecture", "ddp"), [*DDP_CASES[:3], ("modernbert", STATIC), ("bert", None)])
def test_cached(run: Run, architecture: str, ddp: dict[str, Any] | None, loss: str, sizes: tuple[int, ...]) -> None:
    """The last mini-batch is smaller; with unequal sizes some processes have fewer of them."""
    task = Task(sizes, loss=loss, architecture=architecture, options=CACHED, ddp=ddp, steps=3)
    found = trained(run, task)
    assert_same_training(found, alone(task), sizes)
    if ddp is None:
        return
    # Each gradient once a step. Only a static graph is learnt from the first mini-batch of all, which averages too.
    uncached = sum(trained(run, dataclasses.replace(task, options={}))[0].buckets[0])
    for one in found:
        assert list(map(sum, one.buckets)) == [uncached * (2 if ddp == STATIC else 1), uncached, uncached]


def test_a_backward_that_would_not_be_averaged_is_refused(run: Run) -> None:
    """DistributedDataParallel takes the cached loss's last mini-batch for the end of the backward."""
    task = Task((3, 3), options={"mini_batch_size": 2}, ddp=UNUSED)
    for outcome in run(2, share_a_backward, task, {}):
        assert outcome.kind == "RuntimeError"
        assert "cannot share a backward() under DistributedDataParallel" in outcome.trace
    assert run(2, share_a_backward, task, {"mini_batch_size": 1}) == [0, 0]


def test_cached_by_tokens(run: Run) -> None:
    task = Task((5, 3), 3, options={"mini_batch_num_tokens": 9}, ddp=UNUSED, steps=2)
    expected = alone(dataclasses.replace(task, options={}))
    assert_same_training(trained(run, task), expected, task.sizes)


@pytest.mark.parametrize("loss", ["2d", "dims"])
def test_cached_base_loss(run: Run, loss: str) -> None:
    task = Task((5, 3), loss=loss, cached_base=2, ddp=UNUSED, steps=2)
    assert_same_training(trained(run, task), alone(task), task.sizes)


@pytest.mark.parametrize("ddp", [UNUSED, STATIC], ids=["unused", "static"])
def test_cached_accumulation(run: Run, ddp: dict[str, Any]) -> None:
    task = Task((3, 5), options=CACHED, ddp=ddp, steps=2, batches=2)
    assert_same_training(trained(run, task), alone(task), task.sizes)


def test_cached_drawn(run: Run) -> None:
    task = Task((5, 3), options=CACHED | DRAWN, ddp=UNUSED, steps=4, seeds=(11, 12))
    assert_same_training(trained(run, task), alone(task, library="m2d"), task.sizes)


# --- bad batches ----------------------------------------------------------------------------------------------------

BAD_SHAPES = {
    "one column": ([[3, 3], [3]], "at least 2"),
    "one column each": ([[3], [3]], "at least 2"),
    "no column": ([[3, 3], []], "at least 2"),
    "other columns": ([[3, 3], [3, 3, 3]], "same number of columns"),
    "empty": ([[0, 0], [3, 3]], "at least one text"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
@pytest.mark.parametrize(
    ("options", "ddp"),
    [({}, None), ({}, UNUSED), (DRAWN, UNUSED), (CACHED, UNUSED)],
    ids=["by hand", "ddp", "drawn", "cached"],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_bad_batch_is_an_error_everywhere(
    run: Run, steps: int, options: dict[str, Any], ddp: dict[str, Any] | None, case: str
) -> None:
    """In the first step, and in a later one, when the encoder's number of layers is known; soon, not by a timeout."""
    shapes, message = BAD_SHAPES[case]
    outcomes = run(2, two_steps_of, Task((3, 3), options=options, ddp=ddp, steps=steps), shapes, timeout=6.0)
    for outcome in outcomes:
        assert isinstance(outcome, Raised), outcome
        assert outcome.kind == "ValueError", outcome.trace
        assert message in outcome.message
    assert outcomes[0].message == outcomes[1].message


# --- a process that is lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "number"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGKILL, 3), (signal.SIGSTOP, 2)],
    ids=["killed before", "killed between", "killed in backward", "stopped between"],
)
def test_a_lost_process_is_an_error_in_the_others(tmp_path: Path, number: int, how: signal.Signals) -> None:
    world = World(3, tmp_path, timeout=4.0)
    try:
        begin = time.monotonic()
        outcomes = world.run(lose_one, Task((3, 3, 3)), number, how, waits=[0, 1])
        assert time.monotonic() - begin < 30
        for outcome in outcomes:
            assert isinstance(outcome, Raised), outcome
            assert outcome.kind in ("RuntimeError", "DistBackendError", "DistNetworkError"), outcome.trace
        assert world.leave(ranks=[0, 1], seconds=30) == [0, 0]
    finally:
        world.kill()


# --- the example ----------------------------------------------------------------------------------------------------


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def launch(command: list[str], folder: Path) -> str:
    """Two steps of the example in two processes, into ``folder / "output"``; what they print."""
    pytest.importorskip("accelerate", reason="the examples need the demo extra")
    tiny_model(normalize=True, dropout=0.1).save_pretrained(str(folder / "start"))
    columns = texts_of(Task((40,)), seed=0)
    rows = [("anchor", "positive"), *((f"{a} w{i}", b) for i, (a, b) in enumerate(zip(*columns, strict=True)))]
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
    arguments = f"--steps 2 --batch-size 4 --model {folder / 'start'} --pairs {folder / 'pairs.tsv'}"
    finished = subprocess.run(
        [*command, *arguments.split(), "--output", str(folder / "output")],
        # torchrun lies beside this interpreter, perhaps in an environment that is not active.
        env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


@pytest.mark.slow
def test_the_example_trains(tmp_path: Path) -> None:
    printed = launch(["bash", str(EXAMPLES / "train_distributed.sh")], tmp_path)
    assert printed.count("2 processes on") == 1
    assert "8 candidates for each anchor" in printed
    assert len(re.findall(r"'loss': '?[0-9.]+", printed)) == 2
    assert re.search(r"mean loss [0-9.]+", printed)
    start, trained = (SentenceTransformer(str(tmp_path / name)) for name in ("start", "output/model"))
    assert not torch.equal(*(each.encode("w1", convert_to_tensor=True) for each in (start, trained)))


# Runs the script that is its first argument, and says how many of gloo's threads its end of the group leaves.
SAY_WHAT_IS_LEFT = """
import pathlib, runpy, sys
import torch.distributed as dist

def destroy(*args, destroy=dist.destroy_process_group):
    names = lambda: [task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    before = sum("gloo" in name for name in names())
    destroy(*args)
    after = sum("gloo" in name for name in names())
    print(f"gloo's threads: {'some' if before else 'none'}, then {after}", flush=True)

dist.destroy_process_group = destroy
sys.argv.pop(0)
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads by name are Linux's")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the example's group is NCCL's")
def test_the_example_leaves_its_group_to_nobody(tmp_path: Path) -> None:
    """Threads that outlive the group's end are waited for by DistributedDataParallel, which may take for ever."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(SAY_WHAT_IS_LEFT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = launch([*torchrun, str(wrapper), str(EXAMPLES / "train_distributed.py")], tmp_path)
    assert printed.count("gloo's threads: some, then 0") == 2, printed


# --- no group -------------------------------------------------------------------------------------------------------


def test_without_a_group_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    task = Task((5,))
    model = make_model(task)
    features = features_of(model, texts_of(task, seed=0))
    loss = make_loss(task, model, gather=True)
    with caplog.at_level(logging.WARNING, logger="m2d_ext"):
        values = [loss(features, None).item() for _ in range(2)]
    assert [record.getMessage() for record in caplog.records if "gather_across_devices" in record.getMessage()] == [
        "gather_across_devices=True, but torch.distributed is not initialized: the candidates are this process's."
    ]
    assert values == [make_loss(task, model, gather=False)(features, None).item()] * 2


# --- DataParallel ---------------------------------------------------------------------------------------------------


class TwoDevices(nn.DataParallel[nn.Module]):
    """What DataParallel does with two GPUs, without any: halves of the batch in, their outputs joined."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        count = len(features["input_ids"])
        parts = [slice(0, -(-count // 2)), slice(-(-count // 2), count)][:count]
        halves = [{name: v[part] if isinstance(v, Tensor) else v for name, v in features.items()} for part in parts]
        return joined([self.module(half) for half in halves])


def joined(outputs: Sequence[Any]) -> Any:
    """As torch.nn.parallel.scatter_gather.gather."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if first is None:
        return None
    if isinstance(first, dict):
        return type(first)((name, joined([output[name] for output in outputs])) for name in first)
    return type(first)(map(joined, zip(*outputs, strict=True)))


@pytest.mark.parametrize("options", [ALL_CELLS, DRAWN, ALL_CELLS | CACHED], ids=["all", "drawn", "cached"])
@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("bert", {}),
        ("modernbert", {}),
        ("qwen3", {}),
        ("bert", {"pooling": "max", "normalize": True}),
        ("bert", {"pooling": ("mean", "cls")}),
        ("bert", {"dense": HIDDEN}),
    ],
    ids=["bert", "modernbert", "qwen3", "max", "several", "dense"],
)
@pytest.mark.parametrize("batch_size", [4, 5])
def test_data_parallel(architecture: str, modules: dict[str, Any], batch_size: int, options: dict[str, Any]) -> None:
    """The joined states are copies, which the final one was not computed from: their gradients are dense."""
    model = tiny_model(architecture, **modules).double()
    features = features_of(model, texts_of(Task((batch_size,), columns=3), seed=0))
    results = []
    for wrapped in (True, False):
        random.seed(5)
        loss = m2d_ext.Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), DIMS, **options)
        if wrapped:
            put_wrapper(loss, TwoDevices(model))
        for _ in range(2):  # the second step asks for drawn states alone
            model.zero_grad()
            loss(copy.deepcopy(features), None).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(results[0], results[1])
