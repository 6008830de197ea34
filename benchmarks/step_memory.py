"""Peak memory of a whole training step of all-MiniLM-L6-v2, against the plain loss's. Linux only.

    python benchmarks/step_memory.py                                        all losses and types, minutes
    python benchmarks/step_memory.py --dtypes float32 --providers ours      and plain, which is always measured

Every figure is from a process of its own: how far the resident set rises in a step above its level before, the second
step at the earliest, because libraries keep what they allocate in the first. The optimiser is SGD without momentum,
which has no state. Gradients of the parameters count; they come with the step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import step_providers
from measure import NUM_THREADS, PeakMemory, in_own_process
from step_providers import OURS, PLAIN, STEP_PROVIDERS, Texts

DTYPES = ("float32", "bfloat16", "autocast")
TEXTS = {"alike": Texts((45, 45), 62), "unlike": Texts((12, 45), 62)}  # columns of about 64 tokens, or 30 and 64
WARMUP, MEASURED = 1, 3
BAR = 1.05
MIB = 2**20


def release_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peaks_of(step: Callable[[], Any], count: int) -> list[int]:
    """By how many bytes each of so many steps raises the resident set."""
    peaks = []
    for _ in range(count):
        release_memory()
        memory = PeakMemory()
        step()
        peaks.append(memory.growth())
    return peaks


def measure(provider: str, dtype: str, texts: str, batch_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    random.seed(0)
    model = step_providers.load_model()
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    batch = step_providers.make_batch(model, TEXTS[texts], batch_size, random.Random(0))
    loss = step_providers.make_loss(provider, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=step_providers.LEARNING_RATE)
    precision = torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()

    def step() -> None:
        with precision:
            value = step_providers.loss_of(loss, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARMUP):
        step()
    return {"peaks": peaks_of(step, MEASURED), "widths": [column["input_ids"].shape[1] for column in batch]}


def table_of(found: dict[tuple[str, str], dict[str, Any]], args: argparse.Namespace) -> Table:
    widths = next(iter(found.values()))["widths"]
    table = Table(
        title=f"Peak memory of a step of all-MiniLM-L6-v2, {args.batch_size} pairs, columns of "
        f"{' and '.join(map(str, widths))} tokens: MiB above the level before, and / plain",
        caption=f"Largest of {MEASURED} steps. Aim of ours: ≤ {BAR}, in float32 and bfloat16.",
    )
    table.add_column("step", no_wrap=True)
    for dtype in args.dtypes:
        table.add_column(f"{dtype}\nMiB", justify="right")
        table.add_column("/ plain", justify="right", style="bold")
    for provider in dict.fromkeys(provider for provider, _ in found):
        cells = []
        for dtype in args.dtypes:
            peak, plain = (max(found[name, dtype]["peaks"]) for name in (provider, PLAIN))
            cells += [f"{peak / MIB:.0f}", f"{peak / plain:.3f}"]
        table.add_row(provider, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", nargs="+", choices=STEP_PROVIDERS, default=list(STEP_PROVIDERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--texts", choices=list(TEXTS), default="alike")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--output", type=Path, help="measure one provider and dtype here, and write JSON")
    args = parser.parse_args()
    if not PeakMemory.is_available():
        parser.error("needs Linux's VmHWM")
    torch.set_num_threads(NUM_THREADS)
    if args.output is not None:
        result = measure(args.providers[0], args.dtypes[0], args.texts, args.batch_size)
        args.output.write_text(json.dumps(result))
        return

    found = {}
    common = ["--texts", args.texts, "--batch-size", str(args.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        for provider in dict.fromkeys((PLAIN, *args.providers)):
            for dtype in args.dtypes:
                arguments = [*common, "--providers", provider, "--dtypes", dtype]
                found[provider, dtype] = in_own_process(Path(__file__), arguments, "prompt", Path(folder))
                print(f"{provider}, {dtype}: {max(found[provider, dtype]['peaks']) / MIB:.0f} MiB", file=sys.stderr)
    Console().print(table_of(found, args))
    ratios = [max(found[OURS, d]["peaks"]) / max(found[PLAIN, d]["peaks"]) for d in args.dtypes if d != "autocast"]
    if OURS in args.providers and any(ratio > BAR for ratio in ratios):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
