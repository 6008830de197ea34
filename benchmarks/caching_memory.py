"""Peak memory of a large batch with gradient caching, all cells and KL. Linux only.

    python benchmarks/caching_memory.py                                     4096 pairs, minutes
    python benchmarks/caching_memory.py --batch-size 512                    sooner

Held to what it has to keep: one uncached step of a small batch, and the pooled rows of all layers three times over
(themselves, their gradients, and the gradients times grad_output). Both peaks are from processes of their own, above
the level before the step, and include the gradients of the parameters.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import m2d_ext
import step_providers
from measure import NUM_THREADS, PeakMemory, in_own_process
from step_memory import MIB, peaks_of
from step_providers import DIMS, Texts

WARMUP_BATCH = 64
COPIES = 3


def measure(batch_size: int, mini_batch_size: int | None, tokens: int) -> dict[str, Any]:
    """One step's peak, in bytes, and what tells how large the pooled rows are."""
    torch.manual_seed(0)
    random.seed(0)
    generator = random.Random(0)
    model = step_providers.load_model()
    texts = Texts((tokens, tokens), tokens - 2)  # most texts are cut to it
    loss = m2d_ext.Matryoshka2dLoss(
        model,
        MultipleNegativesRankingLoss(model),
        DIMS,
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        mini_batch_size=mini_batch_size,
    )
    warmup = step_providers.make_batch(model, texts, min(WARMUP_BATCH, batch_size), generator)
    batch = step_providers.make_batch(model, texts, batch_size, generator)

    def step() -> None:
        step_providers.loss_of(loss, batch).backward()

    step_providers.loss_of(loss, warmup).backward()
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    (peak,) = peaks_of(step, 1)
    return {
        "peak": peak,
        "seconds": time.perf_counter() - start,
        "layers": model[0].auto_model.config.num_hidden_layers + 1,
        "width": model.get_embedding_dimension(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4096, help="pairs [%(default)s]")
    parser.add_argument("--mini-batch-size", type=int, default=32, help="texts of a column at a time [%(default)s]")
    parser.add_argument("--uncached-batch-size", type=int, default=32, help="pairs to compare with [%(default)s]")
    parser.add_argument("--tokens", type=int, default=24, help="per text, at most [%(default)s]")
    parser.add_argument("--uncached", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="measure one step here, and write JSON")
    args = parser.parse_args()
    if not PeakMemory.is_available():
        parser.error("needs Linux's VmHWM")
    torch.set_num_threads(NUM_THREADS)
    if args.output is not None:
        sizes = (args.uncached_batch_size, None) if args.uncached else (args.batch_size, args.mini_batch_size)
        args.output.write_text(json.dumps(measure(*sizes, args.tokens)))
        return

    common = ["--tokens", str(args.tokens), "--batch-size", str(args.batch_size)]
    common += ["--mini-batch-size", str(args.mini_batch_size), "--uncached-batch-size", str(args.uncached_batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        small = in_own_process(Path(__file__), [*common, "--uncached"], "prompt", Path(folder))
        large = in_own_process(Path(__file__), common, "prompt", Path(folder))
    rows = 4 * large["layers"] * 2 * args.batch_size * large["width"]
    allowed = small["peak"] + COPIES * rows
    print(f"uncached, {args.uncached_batch_size} pairs: {small['peak'] / MIB:.0f} MiB")
    print(f"pooled rows of {args.batch_size} pairs, {COPIES} times: {COPIES * rows / MIB:.0f} MiB")
    print(
        f"cached, {args.batch_size} pairs, {args.mini_batch_size} texts at a time: {large['peak'] / MIB:.0f} MiB, "
        f"{large['peak'] / allowed:.3f} of the {allowed / MIB:.0f} MiB allowed, in {large['seconds']:.0f} s"
    )
    raise SystemExit(large["peak"] > allowed)


if __name__ == "__main__":
    main()
