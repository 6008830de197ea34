"""Speed on the GPU that is there: of the loss alone, and of whole steps. `make gpu-bench PART=s1` runs it.

    python benchmarks/gpu_bench.py s1 --build build/gpu --results benchmarks/results

Parts: the shapes s1, s2 and s3, each in bfloat16 and float32; "kernels", their two launches alone and without torch,
in seconds (gpu_kernels.cu); "pooled", one large similarity problem; and "step", whole optimiser steps of two encoders,
of which gpu_step.py says more. Each within 7 minutes, the build not included; what there was no time for is missing
from the results, which are written as they come.

Of the loss alone, a step is a forward and a backward, `torch.autograd.grad(loss, states, grad_outputs=g)`. Steps of
all providers are interleaved, the L2 cache is overwritten before each, and ratios are medians over the rounds of two
steps of one round. Two times of each provider: "eager" is between CUDA events around the step as Python runs it, the
host's work included where the GPU waits for it; "graph" is the same step captured once and replayed: the GPU's work
alone. The floor copies the same bytes into buffers allocated as the gradients are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_step
from gpu_build import ROOT, Results, compile_command, environment, markdown_table, number

MINUTES = 7.0
ROUNDS = 30
WARMUP = 3
PADDING = 0.25
DTYPES = ("bfloat16", "float32")
# What a part measures; but for the kernels, each in a process of its own.
PARTS = {
    "s1": DTYPES,
    "s2": DTYPES,
    "s3": DTYPES,
    "kernels": DTYPES,
    "pooled": ("bfloat16",),
    "step": tuple(gpu_step.ENCODERS),
}
COMPILE_SECONDS = 25.0  # a mode is not begun with less
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
KERNELS = "ours, ready coefficients"  # less the few launches that turn the mask into coefficients
# How far a provider's loss may be from ours: half types round differently.
LOSS_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-3}

Step = Callable[[], Any]


@dataclass
class Candidate:
    """One way to do the step."""

    step: Step
    loss: Callable[[], Tensor] | None = None  # None: the floor has none
    leaves: Sequence[Tensor] = ()
    graph: Any = None  # torch.cuda.CUDAGraph
    why_no_graph: str = ""
    # By round; not every provider takes part in all of them.
    eager_ms: dict[int, float] = field(default_factory=dict)
    graph_ms: dict[int, float] = field(default_factory=dict)
    host_ms: dict[int, float] = field(default_factory=dict)


# ---- measuring ----


class Flush:
    """Overwrites the L2 cache."""

    def __init__(self) -> None:
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.empty(max(size, 2**28), dtype=torch.int8, device="cuda")

    def __call__(self) -> None:
        self._buffer.zero_()


def timed(run: Step, flush: Flush) -> tuple[float, float]:
    """Milliseconds between events around it, and of the host until all was launched."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush()
    begin.record()
    start = time.perf_counter()
    result = run()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end), 1e3 * host


def capture(candidate: Candidate) -> None:
    """The step as a CUDA graph, where it can be one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            candidate.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            candidate.step()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # whatever synchronises raises its own kind
        candidate.why_no_graph = str(error).strip().splitlines()[0][:200]
        return
    candidate.graph = graph


def measure(candidates: dict[str, Candidate], flush: Flush, rounds: int) -> None:
    """Adds interleaved rounds; who is first changes from round to round."""
    names = list(candidates)
    first = 1 + max((max(c.eager_ms, default=-1) for c in candidates.values()), default=-1)
    for index in range(WARMUP + rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            candidate = candidates[name]
            eager, host = timed(candidate.step, flush)
            graph = timed(candidate.graph.replay, flush)[0] if candidate.graph is not None else None
            if index < WARMUP:
                continue
            candidate.eager_ms[first + index] = eager
            candidate.host_ms[first + index] = host
            if graph is not None:
                candidate.graph_ms[first + index] = graph


def median(values: dict[int, float]) -> float | None:
    return statistics.median(values.values()) if values else None


def median_ratio(a: dict[int, float], b: dict[int, float]) -> float | None:
    """Over the rounds that both took part in."""
    return median({index: a[index] / b[index] for index in a.keys() & b.keys()})


def kernels_of(run: Step) -> int:
    """What ran on the device, copies and fills included."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        result = run()
        torch.cuda.synchronize()
    del result
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_bytes(candidate: Candidate, grad_output: Tensor) -> int:
    """Beyond what is there before, and the gradients."""
    assert candidate.loss is not None
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = candidate.loss()
    forward = torch.cuda.max_memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(loss, candidate.leaves, grad_outputs=grad_output)
    backward = torch.cuda.max_memory_allocated() - base - sum(grad.nbytes for grad in grads)
    return max(forward, backward, 0)


def summary(candidates: dict[str, Candidate], extra: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians, and ratios to the floor and to ours, of all that was measured so far."""
    found: dict[str, Any] = {}
    for name, candidate in candidates.items():
        entry: dict[str, Any] = {**extra.get(name, {}), "why_no_graph": candidate.why_no_graph}
        for kind in ("eager_ms", "graph_ms", "host_ms"):
            values = getattr(candidate, kind)
            entry[kind] = median(values)
            entry[f"{kind}_all"] = [round(value, 5) for value in values.values()]
        for kind in ("eager_ms", "graph_ms"):
            for other in ("ours", "floor"):
                if other in candidates:
                    values, theirs = getattr(candidate, kind), getattr(candidates[other], kind)
                    entry[f"{kind.removesuffix('_ms')}_to_{other}"] = median_ratio(values, theirs)
        found[name] = entry
    return found


# ---- s1, s2, s3 ----


def shapes() -> dict[str, Any]:
    from shapes import Shape

    return {
        "s1": Shape(7, 64, 2, 64, 384, (32, 64, 128, 256, 384)),
        "s2": Shape(13, 128, 2, 128, 768, (64, 128, 256, 512, 768)),
        "s3": Shape(25, 256, 2, 128, 1024, (64, 128, 256, 512, 1024)),
    }


def make_inputs(part: str, dtype: str) -> Any:
    import providers

    torch.manual_seed(0)
    shape = shapes()[part]
    size = (shape.texts, shape.tokens, shape.width)
    states = [torch.randn(size, device="cuda").to(getattr(torch, dtype)) for _ in range(shape.layers)]
    mask = providers.ragged_mask(shape, PADDING).cuda()
    return providers.Inputs(shape, [state.requires_grad_() for state in states], mask, torch.ones((), device="cuda"))


def floor(states: Sequence[Tensor], together: bool) -> Step:
    """Every hidden state read once, every gradient written once; by one launch, or one for each."""
    sources = [state.detach() for state in states]

    def copy() -> list[Tensor]:
        grads = [torch.empty_like(source) for source in sources]
        if together:
            torch._foreach_copy_(grads, sources)
        else:
            for grad, source in zip(grads, sources, strict=True):
                grad.copy_(source)
        return grads

    return copy


def fastest_floor(states: Sequence[Tensor], flush: Flush) -> tuple[Candidate, str]:
    ways = {"one launch": Candidate(floor(states, True)), "one copy each": Candidate(floor(states, False))}
    for candidate in ways.values():
        capture(candidate)
    measure(ways, flush, 10)
    name = min(ways, key=lambda name: statistics.median((ways[name].graph_ms or ways[name].eager_ms).values()))
    fresh = Candidate(ways[name].step)
    capture(fresh)
    return fresh, name


def kernels_alone(inputs: Any) -> Callable[[], Tensor]:
    import providers
    from m2d_ext import arguments, autograd, pooling

    shape = inputs.shape
    grid, _, _ = arguments.read_grid(
        num_layers=shape.layers,
        num_texts=shape.texts,
        width=shape.width,
        scale=20.0,
        normalize=False,
        **providers.grid(shape),
    )
    table = pooling.padded_coefficients(inputs.mask, "mean", torch.float32)
    return lambda: autograd.loss(inputs.states, [table], None, grid)[0]


def measure_loss(part: str, dtype: str, deadline: float, write: Callable[[dict[str, Any]], None]) -> None:
    import providers

    inputs, flush = make_inputs(part, dtype), Flush()
    one = inputs.grad_output
    candidates: dict[str, Candidate] = {}
    extra: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}

    def add(
        name: str, make: Callable[[], tuple[Callable[[], Tensor], Sequence[Tensor]]], captured: bool = True
    ) -> bool:
        try:
            loss, leaves = make()
            candidate = Candidate(lambda: torch.autograd.grad(loss(), leaves, grad_outputs=one), loss, leaves)
            value = loss().item()
            candidate.step()
        except Exception as error:  # a provider that does not work here is a line in the table
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
            return False
        ours = extra["ours"]["loss"] if "ours" in extra else value
        if abs(value - ours) > LOSS_TOLERANCE[dtype] * abs(ours):
            failed[name] = f"another loss: {value}, ours is {ours}"
            return False
        extra[name] = {"loss": value, "kernels": kernels_of(candidate.step)}
        extra[name]["peak_mib"] = peak_bytes(candidate, one) / 2**20
        if captured:
            capture(candidate)
        candidates[name] = candidate
        return True

    def report() -> None:
        size = sum(state.nbytes for state in inputs.states)
        about = {
            "shape": str(inputs.shape),
            "dtype": dtype,
            "padding": 1 - inputs.mask.float().mean().item(),
            "floor_bytes": 2 * size,
            "peak_mib_allowed": inputs.shape.peak_bytes_allowed / 2**20,
        }
        write({**about, "providers": summary(candidates, extra), "failed": failed})

    add("ours", lambda: (providers.ours(inputs), inputs.states))
    add(KERNELS, lambda: (kernels_alone(inputs), inputs.states))
    candidates["floor"], extra_note = fastest_floor(inputs.states, flush)
    extra["floor"] = {"note": extra_note}
    measure(candidates, flush, ROUNDS)
    report()

    # Eager only: a capture that fails half-way would leave its mark on what is measured after it.
    add("sentence-transformers", lambda: providers.sentence_transformers(inputs), captured=False)
    measure(candidates, flush, ROUNDS // 3)
    report()
    for mode in COMPILE_MODES:
        if time.monotonic() > deadline - COMPILE_SECONDS:
            failed[f"torch.compile, {mode}"] = "no time left"
            continue
        mode_name = f"torch.compile, {mode}"
        if add(mode_name, lambda mode=mode: (providers.compiled(inputs, mode), inputs.states)):
            names = ("ours", "floor", mode_name)
            measure({name: candidates[name] for name in names if name in candidates}, flush, ROUNDS)
        report()


# ---- pooled ----

POOLED_BATCH, POOLED_WIDTH, POOLED_DIMS = 16384, 768, (64, 128, 256, 512, 768)
POOLED_ROWS_AT_ONCE = 2048
SCALE = 20.0


def chunked_pooled(pooled: Tensor, rows_at_once: int) -> tuple[Tensor, Tensor]:
    """The same algorithm in torch: nested similarities of some anchors at a time, and their gradient as suffix sums.

    Loss and dP of one layer, all cells of weight 1, without KL. Products in the rows' dtype.
    """
    dims, b = POOLED_DIMS, POOLED_BATCH
    rows = pooled[0]
    chunks = list(zip((0, *dims), dims, strict=False))
    squares = torch.stack([rows[:, i:j].float().square().sum(1) for i, j in chunks])
    inverse = squares.cumsum(0).rsqrt()  # (K, N)
    anchors, candidates = rows[:b], rows[b:]
    grad = torch.zeros_like(rows, dtype=torch.float32)
    sums = torch.zeros_like(inverse)  # of G C, by row: what the norms' derivative needs
    loss = rows.new_zeros((), dtype=torch.float32)
    for begin in range(0, b, rows_at_once):
        part = slice(begin, min(begin + rows_at_once, b))
        targets = torch.arange(part.start, part.stop, device=rows.device)[:, None]
        dot = torch.zeros(part.stop - part.start, b, device=rows.device)
        scaled = []  # G ia ib of each prefix
        for k, (i, j) in enumerate(chunks):
            dot += anchors[part, i:j] @ candidates[:, i:j].T
            ia, ib = inverse[k, part, None], inverse[k, b:]
            cosine = dot * ia * ib
            logits = SCALE * cosine
            log_sum = logits.logsumexp(1, keepdim=True)
            loss += (log_sum - logits.gather(1, targets)).sum() / b
            g = (logits - log_sum).exp_()
            g.scatter_add_(1, targets, torch.full_like(log_sum, -1.0))
            g *= SCALE / b
            sums[k, part] = (g * cosine).sum(1)
            sums[k, b:] += (g * cosine).sum(0)
            scaled.append((g * ia * ib).to(rows.dtype))
        x = torch.zeros_like(scaled[-1])
        for k in reversed(range(len(dims))):
            i, j = chunks[k]
            x = x + scaled[k]
            grad[part, i:j] = x @ candidates[:, i:j]
            grad[b:, i:j] += x.T @ anchors[part, i:j]
    factors = (inverse.square() * sums).flip(0).cumsum(0).flip(0)  # (K, N), suffix sums
    for k, (i, j) in enumerate(chunks):
        grad[:, i:j] -= factors[k, :, None] * rows[:, i:j]
    return loss, grad[None]


def bf16_tflops(flush: Flush) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: a @ b, flush)[0] for _ in range(10)]
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e9


def measure_pooled(write: Callable[[dict[str, Any]], None]) -> None:
    from m2d_ext import functional

    torch.manual_seed(0)
    flush, one = Flush(), torch.ones((), device="cuda")
    pooled = torch.randn(1, 2 * POOLED_BATCH, POOLED_WIDTH, device="cuda").bfloat16().requires_grad_()
    options: dict[str, Any] = {"dims": POOLED_DIMS, "weights": [[1.0] * len(POOLED_DIMS)], "scale": SCALE}

    def loss() -> Tensor:
        result = functional.matryoshka_2d_loss_pooled(pooled, backend="fused", **options)
        assert isinstance(result, Tensor)
        return result

    ours = Candidate(lambda: torch.autograd.grad(loss(), pooled, grad_outputs=one), loss, [pooled])
    (grad,) = ours.step()
    detached = pooled.detach()
    chunked = Candidate(lambda: chunked_pooled(detached, POOLED_ROWS_AT_ONCE))
    value, expected = chunked.step()
    extra: dict[str, dict[str, Any]] = {"ours": {"loss": loss().item()}, "row-chunked torch": {"loss": value.item()}}
    agreement = ((grad.float() - expected).norm() / expected.norm()).item()
    extra["ours"]["peak_mib"] = peak_bytes(ours, one) / 2**20
    extra["ours"]["kernels"] = kernels_of(ours.step)
    del grad, expected, value
    candidates = {"ours": ours, "row-chunked torch": chunked}
    for candidate in candidates.values():
        capture(candidate)
    measure(candidates, flush, ROUNDS // 2)
    useful = 3 * 2 * POOLED_BATCH**2 * POOLED_WIDTH
    rate = bf16_tflops(flush)
    milliseconds = statistics.median(ours.eager_ms.values())
    write(
        {
            "shape": f"L1-B{POOLED_BATCH}-M{POOLED_BATCH}-D{POOLED_WIDTH}-K{len(POOLED_DIMS)}",
            "dtype": "bfloat16",
            "gradients_differ_by": agreement,
            "similarity_matrix_mib": POOLED_BATCH**2 * 4 / 2**20,
            "bf16_matmul_tflops": rate,
            "useful_tflops": useful / milliseconds / 1e9,
            "share_of_matmul_rate": useful / milliseconds / 1e9 / rate,
            "providers": summary(candidates, extra),
            "failed": {},
        }
    )


# ---- kernels ----


def compile_kernels(build: Path) -> Path:
    program = build.resolve() / "gpu_kernels"
    command = compile_command(build, ROOT / "benchmarks" / "gpu_kernels.cu", program)
    if command is None:
        raise SystemExit("This needs nvcc: set PATH, or install the CUDA toolkit.")
    subprocess.run(command, check=True)
    return program


def measure_kernels(program: Path, dtype: str) -> dict[str, Any]:
    """Microseconds of each round, by shape and by what was timed."""
    found: dict[str, Any] = {}
    for name, shape in shapes().items():
        sizes = map(str, (shape.layers, shape.batch, shape.tokens, shape.width))
        command = [str(program), *sizes, ",".join(map(str, shape.dims)), dtype, str(ROUNDS)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = {"shape": str(shape), **json.loads(done.stdout)}
    return found


def kernels_section(result: dict[str, Any], dtype: str) -> str:
    header = ["shape", "floor µs", "forward µs", "backward µs", "both µs", "both - floor µs", "both / floor"]
    rows = []
    for name, times in result.items():
        medians = [statistics.median(times[key]) for key in ("floor", "forward", "backward", "both")]
        rounds = list(zip(times["both"], times["floor"], strict=True))
        beyond = statistics.median(both - floor for both, floor in rounds)
        ratio = statistics.median(both / floor for both, floor in rounds)
        rows.append([f"{name}: {times['shape']}", *[number(each, 1) for each in (*medians, beyond)], number(ratio)])
    return f"## {dtype}\n\n{markdown_table(header, rows)}"


# ---- processes and tables ----


def section(result: dict[str, Any]) -> str:
    header = ["provider", "eager ms", "host ms", "graph ms", "eager / ours", "graph / ours", "graph / floor"]
    header += ["kernels", "peak MiB"]
    rows = []
    for name, entry in result["providers"].items():
        numbers = [entry["eager_ms"], entry["host_ms"], entry["graph_ms"]]
        ratios = [entry.get(key) for key in ("eager_to_ours", "graph_to_ours", "graph_to_floor")]
        rows.append([name, *map(number, numbers), *[number(ratio, 2) for ratio in ratios]])
        rows[-1] += [str(entry.get("kernels", "–")), number(entry.get("peak_mib"), 1)]
    facts = [f"{key}: {value:.4g}" for key, value in result.items() if isinstance(value, float)]
    notes = [f"{name}: {why}" for name, why in result["failed"].items()]
    notes += [f"{n}: no graph, {e['why_no_graph']}" for n, e in result["providers"].items() if e["why_no_graph"]]
    lines = [f"## {result['shape']}, {result['dtype']}", "", markdown_table(header, rows), "", ", ".join(facts)]
    return "\n".join(lines + [""] * bool(notes) + [f"- {note}" for note in notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--build", type=Path, required=True, help="the folder of gpu_build.py")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--measure", metavar="DTYPE", help="measure here; without it, in processes of their own")
    parser.add_argument("--output", type=Path, help="with --measure: the JSON to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU and a CUDA build of torch.")
    end = time.monotonic() + 60 * args.minutes
    if args.measure:

        def write(result: dict[str, Any]) -> None:
            args.output.write_text(json.dumps(result))

        if args.part == "pooled":
            measure_pooled(write)
        else:
            measure_loss(args.part, args.measure, end, write)
        return

    results = Results(args.results, f"gpu-bench-{args.part}")

    def add(name: str, result: dict[str, Any], text: str) -> None:
        results.data[name] = result
        results.sections.append(text)
        results.write(f"m2d_ext on a GPU: {args.part}")
        if args.part != "step":  # which prints its tables as they come
            print(text, flush=True)

    if args.part == "kernels":
        program = compile_kernels(args.build)
        for name in PARTS[args.part]:
            result = measure_kernels(program, name)
            add(name, result, kernels_section(result, name))
        return

    complete = True
    for i, name in enumerate(PARTS[args.part]):
        output = args.build.resolve() / f"{args.part}-{name}.json"
        output.unlink(missing_ok=True)
        minutes = (end - time.monotonic()) / 60 / (len(PARTS[args.part]) - i)
        # From the folder of the build: its modules, beside copies of these files.
        command = [sys.executable]
        if args.part == "step":
            command += ["benchmarks/gpu_step.py", name]
        else:
            command += ["benchmarks/gpu_bench.py", args.part, "--build", ".", "--results", ".", "--measure", name]
        command += ["--output", str(output), "--minutes", str(minutes)]
        try:
            done = subprocess.run(
                command, cwd=args.build, env=environment(args.build), timeout=60 * minutes, check=False
            )
            complete = complete and done.returncode == 0
        except subprocess.TimeoutExpired:
            print(f"{args.part}, {name}: time was up", flush=True)
            complete = False
        if output.exists():
            result = json.loads(output.read_text())
            add(name, result, gpu_step.section(result) if args.part == "step" else section(result))
    raise SystemExit(0 if complete else 1)


if __name__ == "__main__":
    main()
