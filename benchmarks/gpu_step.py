"""Whole optimiser steps on the GPU that is there: time and peak memory. `make gpu-bench PART=step` runs it.

    python benchmarks/gpu_step.py bert-base --output result.json                            in the folder of the build
    python benchmarks/gpu_step.py MiniLM-L6 --output result.json --device cpu --layers 2 --batch 4      without a GPU

Encoders of the shapes of known models with random weights, in training mode: with dropout. All providers share one
model, one optimiser and one batch. Their steps are interleaved, and ratios are medians over the rounds of two steps of
one round. "wall" lasts until the GPU is done, "event" is between CUDA events around the step, "host" lasts until
Python has launched all of it.

Peak memory is how far two steps raise what is allocated above the level before the first of them. The optimiser is
then SGD without momentum, which has no state. Gradients of the parameters count; they come with the step. What
libraries keep from their first call on is there before.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpu_build import markdown_table, number

# Of the others, what needs the build is imported where it is used: gpu_bench.py makes tables outside of its folder.

MINUTES = 3.0
SPARE_SECONDS = 20.0  # of those minutes: imports have taken some, and a table that is begun is finished
ROUNDS, WARMUP = 20, 5
FLOAT32_SHARE = 4  # float32 steps take so much longer that they get a quarter of the rounds
BATCH, TOKENS, COLUMNS = 128, 64, 2
PADDING = 0.25
PRECISIONS = ("float32", "bfloat16", "autocast")
TIMES = ("wall_ms", "event_ms", "host_ms")
MEMORY_STEPS = 2
LEARNING_RATE = 1e-6
LOSS_TOLERANCE = 1e-3
AIM = "Aim of ours: ≤ 1.05 × plain; of memory, in float32 and bfloat16."
MIB = 2**20

Features = list[dict[str, Any]]
Step = Callable[[], None]


@dataclass(frozen=True)
class Encoder:
    """The sizes of a BERT; what is not named is as in BertConfig."""

    layers: int
    width: int
    feed_forward: int
    dims: tuple[int, ...]


ENCODERS = {
    "MiniLM-L6": Encoder(6, 384, 1536, (384, 256, 128, 64, 32)),
    "bert-base": Encoder(12, 768, 3072, (768, 512, 256, 128, 64)),
}


# ---- what is measured ----


def load_model(encoder: Encoder, device: torch.device) -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from tiny_models import tiny_tokenizer

    config = transformers.BertConfig(
        hidden_size=encoder.width, num_hidden_layers=encoder.layers, intermediate_size=encoder.feed_forward
    )
    # The module only loads from a folder. Texts are token ids here, but it wants a tokenizer.
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(encoder.width)], device=str(device)).train()


def make_batch(encoder: Encoder, batch_size: int, vocab_size: int, device: torch.device) -> Features:
    """One feature dict per column, of random tokens and one width."""
    import providers
    from shapes import Shape

    shape = Shape(encoder.layers + 1, batch_size, COLUMNS, TOKENS, encoder.width, encoder.dims)
    mask = providers.ragged_mask(shape, PADDING)
    tokens = torch.randint(1, vocab_size, mask.shape) * mask  # 0 is [PAD]
    return [
        {"input_ids": ids.to(device), "attention_mask": m.to(device)}
        for ids, m in zip(tokens.chunk(COLUMNS), mask.chunk(COLUMNS), strict=True)
    ]


def make_losses(model: Any, dims: Sequence[int]) -> dict[str, nn.Module]:
    from step_providers import OURS_CACHED, STEP_PROVIDERS, make_loss

    return {name: make_loss(name, model, dims) for name in STEP_PROVIDERS if name != OURS_CACHED}


@contextlib.contextmanager
def noted(what: str, failed: dict[str, str]) -> Iterator[None]:
    """What does not work here is a line below the tables."""
    try:
        yield
    except Exception as error:  # of any kind: the providers are not alike
        lines = str(error).strip().splitlines() or [""]
        failed[what] = f"{type(error).__name__}: {lines[0][:300]}"


def agreeing(
    losses: dict[str, nn.Module], model: Any, batch: Features, failed: dict[str, str]
) -> dict[str, nn.Module]:
    """Those that give the loss they should; without dropout, which falls differently in one call and in two."""
    from step_providers import ALL_CELLS, OURS, PLAIN, PLAIN_MERGED, loss_of

    values: dict[str, float] = {}
    model.eval()
    with torch.no_grad():
        for name in (*ALL_CELLS, PLAIN, PLAIN_MERGED):
            if name in losses:
                with noted(name, failed):
                    values[name] = loss_of(losses[name], batch).item()
    model.train()
    for name, value in values.items():
        expected = values.get(OURS if name in ALL_CELLS else PLAIN, value)
        if not abs(value - expected) <= LOSS_TOLERANCE * abs(expected):
            failed[name] = f"another loss: {value}, not {expected}"
        elif reason := getattr(losses[name], "_fallback_reason", None):
            failed[name] = f"not the fused path: {reason}"
    return {name: loss for name, loss in losses.items() if name not in failed}


def make_step(loss: nn.Module, batch: Features, optimizer: torch.optim.Optimizer, precision: str) -> Step:
    from step_providers import loss_of

    device = batch[0]["input_ids"].device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")

    def step() -> None:
        with autocast:
            value = loss_of(loss, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- measuring ----


def timed(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds; of TIMES, without a GPU the first alone."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return {"wall_ms": 1e3 * (time.perf_counter() - start)}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    step()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    wall = time.perf_counter() - start
    return {"wall_ms": 1e3 * wall, "event_ms": begin.elapsed_time(end), "host_ms": 1e3 * host}


def interleaved(
    steps: dict[str, Step], device: torch.device, rounds: int, warmup: int, deadline: float
) -> dict[str, list[dict[str, float]]]:
    """By provider, the times of each round; who is first, and who follows whom, changes from round to round."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    names = list(steps)
    gc.disable()
    for index in range(warmup + rounds):
        if index > warmup and time.monotonic() > deadline:
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            sample = timed(steps[name], device)
            gc.collect(0)  # collection is off while a step runs; this takes what one step leaves
            if index >= warmup:
                samples[name].append(sample)
        names.reverse()
    gc.enable()
    return samples


def speed_summary(samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Medians, and medians of the ratios to the plain step of the same round."""
    from step_providers import PLAIN

    found: dict[str, dict[str, Any]] = {}
    for name, rounds in samples.items():
        entry: dict[str, Any] = {}
        for kind in rounds[0]:
            values = [times[kind] for times in rounds]
            entry[kind] = statistics.median(values)
            entry[f"{kind}_all"] = [round(value, 4) for value in values]
            if PLAIN in samples:
                plain = [times[kind] for times in samples[PLAIN]]
                entry[f"{kind}_to_plain"] = statistics.median(a / b for a, b in zip(values, plain, strict=True))
        found[name] = entry
    return found


def measure_speed(
    losses: dict[str, nn.Module],
    model: Any,
    batch: Features,
    precision: str,
    rounds: int,
    warmup: int,
    deadline: float,
    failed: dict[str, str],
) -> dict[str, dict[str, Any]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    steps: dict[str, Step] = {}
    for name, loss in losses.items():
        step = make_step(loss, batch, optimizer, precision)
        with noted(f"{name}, {precision}", failed):
            step()
            steps[name] = step
    return speed_summary(interleaved(steps, batch[0]["input_ids"].device, rounds, warmup, deadline))


def peak_bytes(step: Step) -> int:
    """Above the level before the first step."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(MEMORY_STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_memory(
    losses: dict[str, nn.Module], model: Any, batch: Features, precision: str, failed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    from step_providers import PLAIN

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    peaks: dict[str, int] = {}
    for name, loss in losses.items():
        step = make_step(loss, batch, optimizer, precision)
        with noted(f"memory of {name}, {precision}", failed):
            if not peaks:
                step()  # libraries allocate in their first calls what they keep
            peaks[name] = peak_bytes(step)
    plain = peaks.get(PLAIN)
    return {
        name: {"mib": peak / MIB, "to_plain": None if plain is None else peak / plain} for name, peak in peaks.items()
    }


def measure(
    name: str, device: torch.device, args: argparse.Namespace, write: Callable[[dict[str, Any]], None]
) -> None:
    """Writes the result anew with each table, the most wanted first."""
    deadline = time.monotonic() + 60 * args.minutes - SPARE_SECONDS
    torch.manual_seed(0)
    random.seed(0)
    import m2d_ext

    encoder = ENCODERS[name]
    if args.layers is not None:
        encoder = replace(encoder, layers=args.layers)
    model = load_model(encoder, device)
    config = model[0].auto_model.config
    batch = make_batch(encoder, args.batch, config.vocab_size, device)
    failed: dict[str, str] = {}
    losses = agreeing(make_losses(model, encoder.dims), model, batch, failed)
    result: dict[str, Any] = {
        "model": name,
        "layers": encoder.layers,
        "width": encoder.width,
        "dims": encoder.dims,
        "pairs": args.batch,
        "tokens": TOKENS,
        "padding": 1 - torch.cat([column["attention_mask"] for column in batch]).float().mean().item(),
        "attention": config._attn_implementation,
        "build": m2d_ext.build_info()["build"],
        "speed": {},
        "memory": {},
        "failed": failed,
    }
    gc.collect()
    gc.freeze()  # what is collected from here on is little

    def speed(precision: str, rounds: int, warmup: int) -> None:
        with noted(f"steps, {precision}", failed):
            found = measure_speed(losses, model, batch, precision, rounds, warmup, deadline, failed)
            result["speed"][precision] = found
            print(speed_table(result, precision), flush=True)
        write(result)

    speed("autocast", args.rounds, args.warmup)
    if device.type == "cuda":
        for precision in PRECISIONS:
            if time.monotonic() > deadline:
                failed[f"memory, {precision}"] = "no time left"
                continue
            model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
            result["memory"][precision] = measure_memory(losses, model, batch, precision, failed)
            write(result)
        print(memory_table(result), flush=True)
    if time.monotonic() > deadline:
        failed["float32 steps"] = "no time left"
    else:
        speed("float32", max(1, args.rounds // FLOAT32_SHARE), 1)
    write(result)
    print(notes(result), flush=True)


# ---- tables ----


def speed_table(result: dict[str, Any], precision: str) -> str:
    found = result["speed"][precision]
    header = ["step", "wall ms", "event ms", "host ms", "wall / plain", "event / plain"]
    rows = [
        [name, *(number(entry.get(kind), 2) for kind in TIMES)]
        + [number(entry.get(f"{kind}_to_plain"), 3) for kind in TIMES[:2]]
        for name, entry in found.items()
    ]
    rounds = max((len(entry["wall_ms_all"]) for entry in found.values()), default=0)
    return f"{result['model']}, a step, {precision}, {rounds} rounds:\n\n{markdown_table(header, rows)}\n"


def memory_table(result: dict[str, Any]) -> str:
    found = result["memory"]
    header = ["step", *(column for precision in found for column in (f"{precision} MiB", "/ plain"))]
    names = dict.fromkeys(name for entries in found.values() for name in entries)
    rows = []
    for name in names:
        entries = [found[precision].get(name, {}) for precision in found]
        rows.append([name])
        rows[-1] += [cell for e in entries for cell in (number(e.get("mib"), 1), number(e.get("to_plain"), 3))]
    return f"{result['model']}, peak memory above the level before:\n\n{markdown_table(header, rows)}\n"


def notes(result: dict[str, Any]) -> str:
    return "\n".join(f"- {what}: {why}" for what, why in result["failed"].items())


def section(result: dict[str, Any]) -> str:
    """All tables that there are of one encoder."""
    lines = [
        f"## {result['model']}: {result['layers']} layers, {result['width']} wide, random weights",
        f"{result['pairs']} pairs of {result['tokens']} tokens, {result['padding']:.0%} of them padding; dims "
        f"{', '.join(map(str, result['dims']))}; {result['attention']}. {AIM}",
        *(speed_table(result, precision) for precision in result["speed"]),
    ]
    if result["memory"]:
        lines.append(memory_table(result))
    return "\n\n".join(line.strip() for line in [*lines, notes(result)]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(ENCODERS))
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of autocast; a quarter as many of float32")
    parser.add_argument("--warmup", type=int, default=WARMUP)
    parser.add_argument("--batch", type=int, default=BATCH, help="pairs")
    parser.add_argument("--layers", type=int, help="other than the model's")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports that read it

    def write(result: dict[str, Any]) -> None:
        args.output.write_text(json.dumps(result))

    measure(args.model, torch.device(args.device), args, write)


if __name__ == "__main__":
    main()
