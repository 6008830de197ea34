"""Train a 2D Matryoshka model on pairs or triplets, as ``m2d train`` does."""

import importlib.util
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from .inference.evaluator import GridEvaluator, default_dims
from .inference.grid import Grid, check_axis
from .inference.outputs import check_folder, new_folder
from .inference.tables import table_of
from .inference.truncate import count_layers
from .losses import Matryoshka2dLoss

logger = logging.getLogger("m2d_ext")

NEGATIVE = re.compile(r"negative(_\d+)?")  # the name of such a column


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Args:
        loss: the mean over its steps.
        before: the grid before it; None without an evaluator.
        after: the grid after it.
    """

    loss: float
    before: Grid | None = None
    after: Grid | None = None


def train(
    model: SentenceTransformer,
    data: Any,
    output: str | Path,
    *,
    dims: Sequence[int] | None = None,
    evaluator: GridEvaluator | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    max_length: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
    overwrite: bool = False,
    prompts: Mapping[str, str] | None = None,
    **options: Any,
) -> Trained:
    """Train every layer × dim of a model by in-batch negatives, and save it.

    AdamW, a linear warmup and then a linear decay to 0; no batch holds a text twice, which would be its own negative.
    The output folder appears when the model in it is whole.

    Args:
        model: it is trained in place.
        data: a ``datasets.Dataset`` or a sequence of mappings with the columns anchor and positive, and perhaps
            negative, or negative_1, negative_2 and so on; others are left out.
        output: folder for the model, new or empty.
        dims: None: the model's width and its halves down to 32.
        evaluator: of the grids before and after.
        epochs: passes over the data; not looked at where there are steps.
        steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: at the end of the warmup.
        warmup_ratio: share of the steps in which it rises.
        max_length: tokens per text in the training and in both grids; the saved model keeps its own limit. None: that.
        seed: of the order, the dropout and the draws.
        show_progress: whether to show a bar and the losses.
        overwrite: whether a model in the output folder is replaced.
        prompts: in front of the texts, by column. None: the model's own, as ``encode_query`` puts them in front of
            anchors and ``encode_document`` in front of all others.
        options: of ``m2d_ext.Matryoshka2dLoss``; without any all layers × all dims are trained.

    Returns:
        The mean training loss and the grids, as ``Trained``.

    Raises:
        ImportError: no accelerate or no datasets, which the Trainer needs.
        TypeError: numbers that are not ints; data that are no rows.
        ValueError: no rows, fewer than a batch, other columns or an empty text; an output folder that is not empty;
            dims or draws that the model does not have; as ``fit`` and ``limited_length``; what the loss says.
    """
    _check_installed()
    _check_numbers(epochs, steps, batch_size, learning_rate, warmup_ratio)
    _check_float32(model)
    check_folder("output", output, overwrite)
    rows = _rows_of(data, batch_size)
    _check_prompts(prompts, rows.column_names)
    loss = _loss_of(model, dims, {"n_layers_per_step": -1, "n_dims_per_step": -1} | options)
    with limited_length(model, max_length):
        before = None if evaluator is None else evaluator.grid(model)
    with new_folder(output, overwrite) as folder:
        with limited_length(model, max_length):
            mean = fit(
                model,
                loss,
                rows,
                folder,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_ratio=warmup_ratio,
                seed=seed,
                show_progress=show_progress,
                prompts=prompts_of(model, rows.column_names) if prompts is None else prompts,
            )
        model.save_pretrained(str(folder))
    with limited_length(model, max_length):
        after = None if evaluator is None else evaluator.grid(model)
    return Trained(mean, before, after)


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
    prompts: Mapping[str, str] | None = None,
) -> float:
    """``train`` with any loss, and without saving.

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
        prompts: in front of the texts, by column; None: none.

    Returns:
        The mean training loss.

    Raises:
        ImportError: no accelerate or no datasets.
        ValueError: a number out of its range; parameters of a half type, which AdamW ruins; not one batch of rows that
            share no text, so that nothing was trained.
    """
    _check_installed()
    _check_numbers(epochs, steps, batch_size, learning_rate, warmup_ratio)
    _check_float32(model)
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
            prompts=dict(prompts or {}) or None,
            disable_tqdm=not show_progress,
            use_cpu=model.device.type == "cpu",
        ),
        train_dataset=data,
        loss=loss,
        callbacks=list(callbacks),
    )
    if not show_progress:
        trainer.remove_callback(PrinterCallback)  # which takes the bar's place
    mean = float(trainer.train().training_loss)
    _check_steps(trainer.state.global_step, trainer.state.max_steps, batch_size)
    return mean


def to_float32(model: SentenceTransformer) -> None:
    """Widen parameters of half types, as a stored model may have them, with a warning."""
    dtype = _half_type(model)
    if dtype is not None:
        logger.warning("The model's parameters are %s: it is trained and saved in float32.", dtype)
        model.float()


def _check_prompts(prompts: Mapping[str, str] | None, columns: Sequence[str]) -> None:
    unknown = [name for name in prompts or {} if name not in columns]
    if unknown:
        raise ValueError(f"prompts must be of the columns {', '.join(columns)}, got one of {unknown[0]}")


def _half_type(model: SentenceTransformer) -> torch.dtype | None:
    """Of the parameters that are trained."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    return next((dtype for dtype in dtypes if dtype in (torch.float16, torch.bfloat16)), None)


def _check_float32(model: SentenceTransformer) -> None:
    """A step of AdamW is smaller than what half types resolve, and its second moments underflow in float16."""
    dtype = _half_type(model)
    if dtype is not None:
        raise ValueError(
            f"model must have parameters of float32 to be trained, got {dtype}: model.float() widens them"
        )


def prompts_of(model: SentenceTransformer, columns: Sequence[str]) -> dict[str, str]:
    """What ``encode_query`` puts in front of anchors, and ``encode_document`` in front of all other columns' texts."""
    default = model.prompts.get(model.default_prompt_name or "", "")

    def of(*names: str) -> str:
        return next((model.prompts[name] for name in names if name in model.prompts), default)

    query, document = of("query"), of("document", "passage", "corpus")
    prompts = {column: query if column == "anchor" else document for column in columns}
    return {column: prompt for column, prompt in prompts.items() if prompt}


@contextmanager
def limited_length(model: SentenceTransformer, tokens: int | None) -> Iterator[None]:
    """Within the context, texts are cut to so many tokens; None: as the model says. A saved model must not keep that.

    Raises:
        TypeError: not an int.
        ValueError: not positive, or more than the encoder has positions for.
    """
    if tokens is None:
        yield
        return
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise TypeError(f"max_length must be an int or None, got {type(tokens).__name__}")
    most = _num_positions(model[0].auto_model)
    if not 1 <= tokens <= most:
        raise ValueError(f"max_length must be from 1 to {most} for this model, got {tokens}")
    before = model.max_seq_length
    # Fast tokenizers also keep how they cut last, and write it into tokenizer.json.
    backend: Any = getattr(model.tokenizer, "backend_tokenizer", None)
    truncation = getattr(backend, "truncation", None)
    model.max_seq_length = tokens
    try:
        yield
    finally:
        model.max_seq_length = before
        if truncation is not None:
            backend.enable_truncation(**truncation)
        elif backend is not None:
            backend.no_truncation()


def _num_positions(encoder: Any) -> float:
    """Of the longest text. RoBERTa's kind counts them from behind the one of padding."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return math.inf
    paddings = [
        module.padding_idx
        for name, module in encoder.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return positions - max(paddings, default=-1) - 1


def _rows_of(data: Any, batch_size: int) -> Any:
    """A ``datasets.Dataset`` of the columns to train on."""
    from datasets import Dataset

    table = table_of(data)
    table.need("anchor", "positive")
    columns = ["anchor", "positive", *filter(NEGATIVE.fullmatch, table.columns)]
    texts = {name: table.texts(name) for name in columns}
    if len(table) < batch_size:
        raise ValueError(f"{table.name} must hold at least a batch of {batch_size} rows, got {len(table)}")
    # A Dataset knows its name, which the model card gives.
    return data.select_columns(columns) if isinstance(data, Dataset) else Dataset.from_dict(texts)


def _loss_of(model: SentenceTransformer, dims: Sequence[int] | None, options: dict[str, Any]) -> Matryoshka2dLoss:
    width = model.get_embedding_dimension() or 0
    check_axis("dims", dims, least=1)
    dims = default_dims(width) if dims is None else list(dims)
    if max(dims) > width:
        raise ValueError(f"dims must be at most {width} for this model, got {dims}")
    loss = Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), dims, **options)
    _check_draw("n_layers_per_step", options["n_layers_per_step"], count_layers(model[0].auto_model))
    _check_draw("n_dims_per_step", options["n_dims_per_step"], len(dims))
    return loss


def _check_installed() -> None:
    """Of the Trainer's own needs, which m2d_ext does not have without it."""
    for name in ("accelerate", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"training needs {name}: pip install 'm2d_ext[cli]'")


def _check_draw(name: str, count: int, most: int) -> None:
    """The losses take any other number for all, as sentence-transformers' do."""
    if count != -1 and not 1 <= count <= most:
        raise ValueError(f"{name} must be from 1 to {most} for this model, or -1 for all, got {count}")


def _check_numbers(
    epochs: float, steps: int | None, batch_size: int, learning_rate: float, warmup_ratio: float
) -> None:
    positive = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be more than 0 and finite, got {value}")
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio must be from 0 to 1, got {warmup_ratio}")


def _check_steps(steps: int, wanted: int, batch_size: int) -> None:
    if steps == 0:
        raise ValueError(f"data must give at least one batch of {batch_size} rows that share no text, got none")
    if steps < wanted:
        logger.warning(
            "Trained %d of %d steps: the rows share texts and give no more batches of %d.", steps, wanted, batch_size
        )
