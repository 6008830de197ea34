"""Measures all providers on one problem, in a process of its own, and writes what it saw as JSON.

    python benchmarks/measure.py speed --shape '{"layers": 7, ...}' --padding half --output result.json

What: the loss alone ("speed", "memory"; "growth" with --axis; "base-loss" with --base), the deferred passes
("deferred"), or whole training steps ("step", with --texts in place of the shape and the padding).

A process of its own because the allocator is chosen by environment variables that glibc reads at start, and because
nothing that was measured before should have touched its memory. Whoever starts it takes the variables from ALLOCATORS.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before the imports that read it: no provider needs a hub, and one that cannot be reached costs minutes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch

import base_loss_providers
import deferred_providers
import providers
import step_providers
from m2d_ext.inference.memory import PeakMemory
from providers import Candidate
from shapes import GROWTH, SHARES, Shape

NUM_THREADS = 2
PROCESSES = 3  # where it moves a ratio by more than a tenth how near to each other the host puts two virtual cores
WARMUP_ROUNDS = 2
# Two threads that meet at barriers lose far more to a busy neighbour than its share of the machine.
ATTEMPTS = 3
QUIET_CORES = 0.1
LOSS_TOLERANCE = 1e-4

# glibc's malloc, see mallopt(3). Elsewhere the variables have no effect; the page faults that are reported tell.
ALLOCATORS = {
    "default": {},
    # Big blocks come from the heap instead of a mmap of their own, and the heap is never cut at its end: a block that
    # was freed keeps its pages, so the next gradients are written to memory that is already mapped. (Raising
    # M_MMAP_THRESHOLD would not do: glibc refuses more than 32 MiB.)
    "resident": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**46), "MALLOC_TOP_PAD_": str(2**26)},
    # The opposite: blocks go back to the kernel as soon as they are freed, so that the resident set is what is in use.
    "prompt": {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16), "MALLOC_TOP_PAD_": "0"},
}


def in_own_process(script: Path, arguments: Sequence[str], allocator: str, folder: Path) -> dict[str, Any]:
    """What a script writes as JSON to its --output, with that allocator."""
    output = folder / "result.json"
    command = [sys.executable, str(script), *arguments, "--output", str(output)]
    done = subprocess.run(command, env=os.environ | ALLOCATORS[allocator], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(output.read_text())


def check_agreement(loss: float, candidate: Candidate, name: str) -> None:
    """A provider that computes something else has no business in the table."""
    assert candidate.loss is not None
    found = candidate.loss().item()
    if abs(found - loss) > LOSS_TOLERANCE * abs(loss):
        raise RuntimeError(f"{name} gives a loss of {found}, ours is {loss}")


def timed(candidate: Candidate) -> tuple[float, int]:
    """Seconds and page faults of one step. Freeing the gradients is not part of it.

    Faults are counted also while the clock stands still.
    """
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    grads = candidate.step()
    seconds = time.perf_counter() - start
    if candidate.untimed is not None:
        seconds -= candidate.untimed()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    del grads
    gc.collect(0)  # collection is off while a step runs; this takes what one step leaves
    return seconds, faults


def interleaved(candidates: dict[str, Candidate], rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Every round times each candidate once; who is first, and who follows whom, changes from round to round."""
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in range(WARMUP_ROUNDS + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            sample = timed(candidates[name])
            if index >= WARMUP_ROUNDS:
                samples[name].append(sample)
        names.reverse()
    return samples


def quietest(
    candidates: dict[str, Candidate], rounds: int, most_attempts: int = ATTEMPTS
) -> tuple[float, dict[str, list[tuple[float, int]]]]:
    """The attempt with the least other work on the machine, whatever its times; and how many cores that kept busy."""
    attempts = []
    for _ in range(most_attempts):
        others = OtherWork()
        samples = interleaved(candidates, rounds)
        attempts.append((others.cores(), samples))
        if attempts[-1][0] < QUIET_CORES:
            break
    return min(attempts, key=lambda attempt: attempt[0])


def fastest(candidates: list[Candidate]) -> Candidate | None:
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    samples = interleaved({str(i): candidate for i, candidate in enumerate(candidates)}, 5)
    medians = {name: statistics.median(seconds for seconds, _ in pairs) for name, pairs in samples.items()}
    return candidates[int(min(medians, key=medians.__getitem__))]


def chosen_candidates(inputs: providers.Inputs, names: Sequence[str]) -> dict[str, Candidate]:
    found = {name: fastest(providers.setup(inputs, name)) for name in names}
    candidates = {name: candidate for name, candidate in found.items() if candidate is not None}
    ours = candidates[providers.OURS].loss
    assert ours is not None
    loss = ours().item()
    for name in (providers.SENTENCE_TRANSFORMERS, providers.COMPILED):
        if name in candidates:
            check_agreement(loss, candidates[name], name)
    return candidates


def growth_candidates(axis: str) -> dict[str, Candidate]:
    return {
        providers.growth_name(name, value): candidate
        for value, (shape, padding) in GROWTH[axis].items()
        for name, candidate in chosen_candidates(
            providers.make_inputs(shape, padding), providers.GROWTH_PROVIDERS
        ).items()
    }


def measure_speed(candidates: dict[str, Candidate], rounds: int, most_attempts: int = ATTEMPTS) -> dict[str, Any]:
    gc.collect()
    gc.freeze()
    gc.disable()
    other_cores, samples = quietest(candidates, rounds, most_attempts)
    return {
        "other_cores": other_cores,
        "providers": {
            name: {
                "seconds": [seconds for seconds, _ in pairs],
                "page_faults": statistics.median(faults for _, faults in pairs),
                "note": candidates[name].note,
            }
            for name, pairs in samples.items()
        },
    }


class OtherWork:
    """How many cores other processes kept busy since this was made. The machine is seldom one's own."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        elapsed, machine, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, (machine - own) / elapsed)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        machine = psutil.cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        own = psutil.Process().cpu_times()
        return time.perf_counter(), sum(machine) - idle, own.user + own.system


def peak_memory(candidate: Candidate, inputs: providers.Inputs) -> int:
    """Bytes beyond the hidden states and their gradients.

    The forward and the backward are looked at separately: gradients that exist only in the latter, subtracted from a
    common peak, would hide what the forward needs. Those that our forward writes live beside all that it allocates,
    until its end.
    """
    assert candidate.loss is not None
    gc.collect()
    memory = PeakMemory()
    loss = candidate.loss()
    ready = getattr(loss.grad_fn, "ready_gradients", None)
    forward = memory.growth() - sum(grad.nbytes for grad in (ready.dense if ready is not None else ()))
    grads = torch.autograd.grad(loss, candidate.leaves, grad_outputs=inputs.grad_output)
    backward = memory.growth() - sum(grad.nbytes for grad in grads)
    return max(forward, backward, 0)


def measure_memory(inputs: providers.Inputs) -> dict[str, Any]:
    result = {}
    for name in (providers.OURS, providers.SENTENCE_TRANSFORMERS, providers.COMPILED):
        for candidate in providers.setup(inputs, name, compile_modes=providers.COMPILE_MODES[:1]):
            for _ in range(WARMUP_ROUNDS):  # libraries keep what they allocate on first use
                candidate.step()
            result[name] = max(peak_memory(candidate, inputs) for _ in range(3))
    return {"peak_bytes": result}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.what == "step":
        # Tens of seconds a round: one attempt, and the table says how quiet it was.
        return measure_speed(step_providers.candidates(step_providers.TEXTS[args.texts]), args.rounds, most_attempts=1)
    if args.what == "growth":
        return measure_speed(growth_candidates(args.axis), args.rounds)
    inputs = providers.make_inputs(args.shape, args.padding)
    if args.what == "memory":
        return measure_memory(inputs)
    if args.what == "base-loss":
        return measure_speed(base_loss_providers.candidates(inputs, args.base), args.rounds)
    if args.what == "deferred":
        return measure_speed(deferred_providers.candidates(inputs), args.rounds)
    return measure_speed(chosen_candidates(inputs, args.providers), args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "growth", "base-loss", "deferred", "step"])
    parser.add_argument("--shape", type=lambda text: Shape.from_json(json.loads(text)))
    parser.add_argument("--padding", choices=list(SHARES))
    parser.add_argument("--providers", nargs="+", choices=providers.PROVIDERS, default=providers.PROVIDERS)
    parser.add_argument("--axis", choices=list(GROWTH))
    parser.add_argument("--base", choices=list(base_loss_providers.BASE_LOSSES))
    parser.add_argument("--texts", choices=list(step_providers.TEXTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    needed = {"step": ["texts"], "growth": ["axis"], "base-loss": ["shape", "padding", "base"]}.get(
        args.what, ["shape", "padding"]
    )
    if any(getattr(args, name) is None for name in needed):
        parser.error(f"{args.what} needs {' and '.join(f'--{name}' for name in needed)}")

    torch.set_num_threads(NUM_THREADS)
    args.output.write_text(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
