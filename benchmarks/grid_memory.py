"""Memory of a retrieval grid over a large corpus: the rows of one chunk, not of all of it. Linux only.

python benchmarks/grid_memory.py                      200,000 short texts, a tiny model, minutes
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

import m2d_ext
from measure import PeakMemory
from tiny_models import NUM_WORDS, tiny_model, word

MIB = 2**20
WIDTH, LAYERS = 256, 6
DIMS = (256, 128, 64, 32)
QUERIES = 20


def evaluator_of(rows: int, chunk: int) -> InformationRetrievalEvaluator:
    words = torch.randint(NUM_WORDS, (rows, 3), generator=torch.Generator().manual_seed(0)).tolist()
    corpus = {str(i): " ".join([*map(word, some), word(i)]) for i, some in enumerate(words)}
    queries = {str(i): corpus[str(i * (rows // QUERIES))] for i in range(QUERIES)}
    relevant = {str(i): {str(i * (rows // QUERIES))} for i in range(QUERIES)}
    return InformationRetrievalEvaluator(
        queries, corpus, relevant, corpus_chunk_size=chunk, batch_size=512, show_progress_bar=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="texts of the corpus [%(default)s]")
    parser.add_argument("--chunk", type=int, default=10_000, help="texts of it at a time [%(default)s]")
    args = parser.parse_args()
    if not PeakMemory.is_available():
        parser.error("needs Linux's VmHWM")
    model = tiny_model(hidden=WIDTH, num_layers=LAYERS).eval()
    grid = m2d_ext.GridEvaluator(evaluator_of(args.rows, args.chunk), dims=DIMS)
    m2d_ext.GridEvaluator(evaluator_of(QUERIES * 50, 500), dims=DIMS).grid(model)  # what libraries allocate once
    memory = PeakMemory()
    start = time.perf_counter()
    mean = grid.grid(model).mean()
    peak, seconds = memory.growth(), time.perf_counter() - start
    whole = 4 * (LAYERS + 1) * WIDTH * args.rows
    # The rows of a chunk as encode collects and joins them, a layer's copy of them, and scores.
    allowed = 5 * 4 * (LAYERS + 1) * WIDTH * args.chunk
    print(
        f"{args.rows} texts, {LAYERS + 1} layers × {len(DIMS)} dims: peak {peak / MIB:.0f} MiB in {seconds:.0f} s; "
        f"all rows would be {whole / MIB:.0f} MiB, five times a chunk's are {allowed / MIB:.0f} MiB; "
        f"grid mean {mean:.3f}"
    )
    raise SystemExit(peak > allowed)


if __name__ == "__main__":
    main()
