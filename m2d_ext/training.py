"""Train a 2D Matryoshka model on pairs or triplets, as ``m2d train`` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from .inference.evaluator import default_dims
from .losses import Matryoshka2dLoss


def train(
    model: SentenceTransformer,
    data: Any,
    output: str | Path,
    *,
    dims: list[int] | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    max_length: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> float:
    """Train every layer × dim of a model by in-batch negatives, and save it.

    AdamW, a linear warmup and then a linear decay to 0; no batch holds a text twice, which would be its own negative.

    Args:
        model: it is trained in place.
        data: a ``datasets.Dataset`` with the columns anchor and positive, and perhaps negative; others are left out.
        output: folder for the model.
        dims: None: the model's width and its halves down to 32.
        epochs: passes over the data; not looked at where there are steps.
        steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: at the end of the warmup.
        warmup_ratio: share of the steps in which it rises.
        max_length: tokens per text; None: as the model says.
        seed: of the order, the dropout and the draws.
        show_progress: whether to show a bar and the losses.
        options: of :class:`m2d_ext.Matryoshka2dLoss`; without any all layers × all dims are trained.

    Returns:
        The mean training loss.

    Raises:
        ValueError: no rows, fewer than a batch, or other columns; what the loss says.
    """
    columns = [name for name in ("anchor", "positive", "negative") if name in data.column_names]
    if columns[:2] != ["anchor", "positive"]:
        raise ValueError(f"data must have the columns anchor and positive, got {', '.join(data.column_names)}")
    if len(data) < batch_size:
        raise ValueError(f"data must hold at least a batch of {batch_size} rows, got {len(data)}")
    if max_length is not None:
        model.max_seq_length = max_length
    every = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    width = model.get_embedding_dimension() or 0
    loss = Matryoshka2dLoss(
        model, MultipleNegativesRankingLoss(model), dims or default_dims(width), **(every | options)
    )
    mean = fit(
        model,
        loss,
        data.select_columns(columns),
        output,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        seed=seed,
        show_progress=show_progress,
    )
    model.save_pretrained(str(output))
    return mean


def fit(
    model: SentenceTransformer,
    loss: nn.Module,
    data: Any,
    output: str | Path,
    *,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    seed: int = 0,
    show_progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """:func:`train` with any loss, and without saving.

    Args:
        model: as there.
        loss: of the model.
        data: a ``datasets.Dataset`` of the loss's columns.
        output: the Trainer's own folder.
        epochs: as there, and so are the next six.
        steps: as there.
        batch_size: as there.
        learning_rate: as there.
        warmup_ratio: as there.
        seed: as there.
        show_progress: as there.
        callbacks: of the Trainer.

    Returns:
        The mean training loss.
    """
    total = steps if steps is not None else round(epochs * (len(data) // batch_size))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            max_steps=-1 if steps is None else steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=round(warmup_ratio * total),
            lr_scheduler_type="linear",
            # An anchor's own positive must not come back in the batch as a negative.
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            dataloader_drop_last=True,
            dataloader_pin_memory=model.device.type == "cuda",
            logging_steps=max(1, total // 10),
            save_strategy="no",
            report_to="none",
            seed=seed,
            disable_tqdm=not show_progress,
            use_cpu=model.device.type == "cpu",
        ),
        train_dataset=data,
        loss=loss,
        callbacks=list(callbacks),
    )
    if not show_progress:
        trainer.remove_callback(PrinterCallback)  # which takes the bar's place
    return float(trainer.train().training_loss)
