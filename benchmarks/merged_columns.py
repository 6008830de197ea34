"""Two columns in one call of the model, or in two: how much padding is one call worth?

    python benchmarks/merged_columns.py
    python benchmarks/merged_columns.py --width 128 --batch-sizes 8

Forward and backward of all-MiniLM-L6-v2 on columns of which one is --width tokens wide and the other narrower, so that
padding both to one width adds so many tokens, relative. Below 1, one call is faster. Our losses merge where
m2d_ext.losses.embed.MERGED_TOKENS allows it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from torch import Tensor

import step_providers
from m2d_ext.losses.embed import MERGED_TOKENS
from measure import NUM_THREADS, OtherWork, in_own_process, interleaved
from providers import Candidate
from step_providers import Features

PADDED = (0, 5, 10, 20, 40)  # per cent of the columns' own tokens
SHORTEST = 0.6  # of a column's width: real masks are never all ones, and some kernels are faster where they are
FIRST_TOKEN = 1000  # of vocabulary that is words


def narrower(width: int, padded: int) -> int:
    """The width v for which 2 width / (width + v) is 1 + padded / 100."""
    return round(width * (100 - padded) / (100 + padded))


def column(width: int, batch_size: int) -> dict[str, Tensor]:
    lengths = torch.linspace(SHORTEST * width, width, batch_size).round()
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(FIRST_TOKEN, 2 * FIRST_TOKEN, mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def step_of(model: SentenceTransformer, batches: Features) -> Callable[[], list[Tensor]]:
    """Forward and backward; the parameters' gradients are returned, to be freed outside the time."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        rows = torch.cat([model(dict(batch))["sentence_embedding"] for batch in batches])
        rows.square().sum().backward()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        return grads

    return step


def measure(width: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """By padding: the narrower width, and the ratio of one call's time to two calls' in each round."""
    torch.manual_seed(0)
    model = step_providers.load_model()
    found: dict[str, Any] = {}
    others = OtherWork()
    for padded in PADDED:
        columns = [column(width, batch_size), column(narrower(width, padded), batch_size)]
        merged = merge_feature_batches(columns)
        assert merged is not None
        candidates = {
            name: Candidate(None, [], step_of(model, batches))
            for name, batches in (("one", [merged]), ("two", columns))
        }
        samples = interleaved(candidates, rounds)
        pairs = zip(samples["one"], samples["two"], strict=True)
        found[str(padded)] = {
            "width": narrower(width, padded),
            "ratios": [one / two for (one, _), (two, _) in pairs],
            "ms": 1e3 * statistics.median(two for two, _ in samples["two"]),
        }
    return {"paddings": found, "other_cores": others.cores()}


def table_of(found: dict[int, dict[str, Any]], args: argparse.Namespace) -> Table:
    table = Table(
        title=f"One call / two calls, the wider column of {args.width} tokens: medians of {args.rounds} interleaved "
        f"rounds, {NUM_THREADS} threads",
        caption="In brackets what half of the rounds lie between. Merged by our losses: up to "
        f"{MERGED_TOKENS} tokens more.",
    )
    table.add_column("pairs", justify="right")
    for padded in PADDED:
        width = narrower(args.width, padded)
        exact = 2 * args.width / (args.width + width) - 1
        table.add_column(f"+{exact:.1%} tokens\n{args.width} and {width}", justify="right")
    table.add_column("two calls,\n+0%, ms", justify="right")
    table.add_column("others\ncores", justify="right")
    for batch_size, result in found.items():
        cells = []
        for padded in PADDED:
            low, middle, high = statistics.quantiles(result["paddings"][str(padded)]["ratios"], n=4)
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        milliseconds = result["paddings"][str(PADDED[0])]["ms"]
        table.add_row(str(batch_size), *cells, f"{milliseconds:.0f}", f"{result['other_cores']:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32, help="tokens of the wider column [%(default)s]")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="measure the first batch size here, and write JSON")
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    if args.output is not None:
        args.output.write_text(json.dumps(measure(args.width, args.batch_sizes[0], args.rounds)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.batch_sizes:
            arguments = ["--width", str(args.width), "--batch-sizes", str(size), "--rounds", str(args.rounds)]
            found[size] = in_own_process(Path(__file__), arguments, "resident", Path(folder))
    Console(width=150).print(table_of(found, args))


if __name__ == "__main__":
    main()
