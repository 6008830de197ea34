"""GridEvaluator: what sentence-transformers' evaluators say of every layer and dim, from one encode."""

import copy
import csv
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import quantize_embeddings
from torch import Tensor

from . import plots
from .encode import AllLayers
from .grid import Grid, check_axis
from .tables import Table, table_of

logger = logging.getLogger("m2d_ext")

SMALLEST_DEFAULT_DIM = 32
Primary = Literal["last", "mean"] | tuple[int, int]


class GridEvaluator(BaseEvaluator):
    """Evaluates every layer × dim cell of a model; each text is encoded once, whatever the number of cells.

    A cell (l, d) is the model cut to its first l layers and d dimensions
    (``m2d_ext.truncate_model``), and its score is what the evaluator says of that model. Of the corpus of an
    ``InformationRetrievalEvaluator`` no more than a chunk's rows are in memory at a time (its ``corpus_chunk_size``);
    of one inside another evaluator, and of all other texts, the rows of all layers are.

    Args:
        evaluator_or_data: a sentence-transformers evaluator of embeddings: similarity, triplets, binary
            classification, information retrieval, or any other that asks a model for nothing but ``encode`` and
            ``similarity``; of an ``MSEEvaluator`` only the teacher's width can be in ``dims``. Or rows, as a
            ``datasets.Dataset`` or a sequence of mappings, with the columns sentence1 and sentence2 (or s1, s2) and
            score, or label; anchor, positive and negative; or anchor and positive, which are retrieved among all
            positives. Labels of 0 and 1 are two classes; where one is a fraction they are similarities, as a score is.
        layers: numbers of layers to keep; None: 0, where the architecture can be without, up to all: those of a
            ``profile``.
        dims: numbers of dimensions to keep; None: as many as the model returns, and its halves down to 32.
        metric: which of the evaluator's; None: its primary one, of the largest cell at the first call.
        primary: what ``primary_metric`` names, by which a Trainer picks its best model: "last" is the whole model,
            "mean" the mean of the grid's cells that have a score, (layer, dim) one cell.
        final_norm: "apply" gives the earlier layers the encoder's final norm, if it has one, as a cut model does;
            "skip" evaluates the bare hidden states.
        batch_size: texts encoded at a time; None: as the evaluator says.
        show_progress_bar: over the batches; None: as the evaluator says.
        name: of the data, in front of the metrics; None: the evaluator's.
        write_csv: whether to write ``grid_evaluation_<name>.csv`` where a call has an output path.
        write_plots: whether to draw ``grid_heatmap_<name>.png`` and ``grid_curves_<name>.png`` there, anew each time.

    Raises:
        TypeError: neither an evaluator nor rows.
        ValueError: no rows, or other columns; an empty text, a score that is no finite number, whole labels other
            than 0 and 1; an evaluator with a ``truncate_dim`` of its own; an unknown ``primary`` or ``final_norm``;
            layers or dims that are empty, repeated or below 0 and 1.
    """

    def __init__(
        self,
        evaluator_or_data: Any,
        layers: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        *,
        metric: str | None = None,
        primary: Primary = "last",
        final_norm: Literal["apply", "skip"] = "apply",
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        name: str | None = None,
        write_csv: bool = True,
        write_plots: bool = False,
    ) -> None:
        super().__init__()
        is_evaluator = isinstance(evaluator_or_data, BaseEvaluator)
        self.evaluator: Any = evaluator_or_data if is_evaluator else evaluator_of(evaluator_or_data, name or "")
        if getattr(self.evaluator, "truncate_dim", None) is not None:
            raise ValueError(f"the evaluator's truncate_dim must be None, got {self.evaluator.truncate_dim}: dims cut")
        check_axis("layers", layers, least=0)
        check_axis("dims", dims, least=1)
        if final_norm not in ("apply", "skip"):
            raise ValueError(f"final_norm must be 'apply' or 'skip', got {final_norm!r}")
        if primary not in ("last", "mean") and not (isinstance(primary, tuple) and len(primary) == 2):
            raise ValueError(f"primary must be 'last', 'mean' or (layer, dim), got {primary!r}")
        self.layers = None if layers is None else list(layers)
        self.dims = None if dims is None else list(dims)
        self.metric = metric
        self.primary = primary
        self.final_norm = final_norm
        self.name = str(getattr(self.evaluator, "name", "") or "") if name is None else name
        self.write_csv = write_csv
        self.write_plots = write_plots
        self.csv_file = self._file("evaluation", "csv")
        self._has_warned = False
        self._seen_metric: str | None = None
        self._encoding = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate every cell.

        Args:
            model: the model.
            output_path: folder to add a line per cell to a CSV file in.
            epoch: for that line.
            steps: likewise.

        Returns:
            ``[name_]layer_{l}_dim_{d}_{metric}`` for each cell, and ``[name_]grid_mean_{metric}``.

        Raises:
            ImportError: plots without matplotlib.
            ValueError: layers or dims that the model does not have, an unknown metric, a pipeline of other modules.
        """
        grid = self.grid(model)
        metrics = {
            f"layer_{layer}_dim_{dim}_{grid.metric}": grid.score(layer, dim)
            for layer in grid.layers
            for dim in grid.dims
        }
        metrics[f"grid_mean_{grid.metric}"] = grid.mean()
        self.greater_is_better = grid.greater_is_better
        primary = self._primary_name(grid)
        logger.info("%s: mean of the grid %.4f", self.name or "grid", grid.mean())
        if output_path is not None and self.write_csv:
            self._append_csv(Path(output_path), grid, epoch, steps)
        if output_path is not None and self.write_plots:
            Path(output_path).mkdir(parents=True, exist_ok=True)
            plots.heatmap(grid, Path(output_path, self._file("heatmap", "png")))
            plots.curves(grid, Path(output_path, self._file("curves", "png")))
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        # Here, for that leaves a metric as it is whose own first word is the name.
        self.primary_metric = f"{self.name}_{primary}" if self.name else primary
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def grid(self, model: SentenceTransformer) -> Grid:
        """The scores themselves.

        Raises:
            ValueError: as a call.
        """
        encoder = AllLayers(model, self.layers, apply_norm=self.final_norm == "apply")
        dims = default_dims(encoder.width) if self.dims is None else self.dims
        if max(dims) > encoder.width:
            raise ValueError(f"dims must be at most {encoder.width} for this model, got {dims}")
        self._check_teacher(dims)
        rows = _Rows(encoder, self._encoding)
        cells = [[_CellModel(rows, place, dim) for dim in dims] for place in range(len(encoder.layers))]
        if isinstance(self.evaluator, InformationRetrievalEvaluator):
            results = list(_retrieve(self.evaluator, rows, cells))
        else:
            results = [[_evaluated(self.evaluator, cell) for cell in row] for row in cells]
        whole = results[encoder.layers.index(max(encoder.layers))][list(dims).index(max(dims))]
        metric = self._metric_of(whole)
        grid = Grid(
            layers=encoder.layers,
            dims=list(dims),
            scores=[[cell[metric] for cell in row] for row in results],
            metric=metric,
            greater_is_better=bool(getattr(self.evaluator, "greater_is_better", True)),
            model=str(model.model_card_data.base_model or ""),
            name=self.name,
            extra={
                other: [[cell[other] for cell in row] for row in results]
                for other in whole
                if other not in (metric, PRIMARY)
            },
        )
        self._warn_of_undefined(grid)
        return grid

    def _check_teacher(self, dims: Sequence[int]) -> None:
        """The distance from a teacher's rows is of rows as wide as they are."""
        if isinstance(self.evaluator, MSEEvaluator):
            width = self.evaluator.source_embeddings.shape[1]
            if list(dims) != [width]:
                raise ValueError(f"dims must be [{width}] for this MSEEvaluator's teacher, got {list(dims)}")

    def _warn_of_undefined(self, grid: Grid) -> None:
        """Once, and not at every evaluation of a training."""
        layers = [layer for layer, row in zip(grid.layers, grid.scores, strict=True) if any(map(math.isnan, row))]
        if layers and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s is undefined in cells of layers %s, which are left out of the mean. The first token of every text "
                "is the same in layer 0, and so is a row that is pooled from it alone.",
                grid.metric,
                layers,
            )

    def _metric_of(self, metrics: Mapping[str, Any]) -> str:
        # Which of several score functions is best may change from one evaluation of a training to the next.
        if self._seen_metric not in metrics:
            self._seen_metric = metrics[PRIMARY]
        metric = self.metric or self._seen_metric
        if metric not in metrics or metric == PRIMARY:
            known = ", ".join(name for name in metrics if name != PRIMARY)
            raise ValueError(f"metric must be one of {known}, got {metric!r}")
        return str(metric)

    def _primary_name(self, grid: Grid) -> str:
        if self.primary == "mean":
            return f"grid_mean_{grid.metric}"
        layer, dim = (max(grid.layers), max(grid.dims)) if self.primary == "last" else self.primary
        grid.score(layer, dim)
        return f"layer_{layer}_dim_{dim}_{grid.metric}"

    def _file(self, what: str, kind: str) -> str:
        return f"grid_{what}{'_' + self.name if self.name else ''}.{kind}"

    def _append_csv(self, folder: Path, grid: Grid, epoch: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.csv_file
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["epoch", "steps", "layer", "dim", grid.metric])
            for layer in grid.layers:
                writer.writerows([epoch, steps, layer, dim, grid.score(layer, dim)] for dim in grid.dims)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this evaluator."""
        return {"evaluator": type(self.evaluator).__name__, "layers": self.layers, "dims": self.dims}


def default_dims(width: int) -> list[int]:
    """The width and its halves, down to 32."""
    dims = [width]
    while dims[-1] // 2 >= SMALLEST_DEFAULT_DIM:
        dims.append(dims[-1] // 2)
    return dims


def evaluator_of(data: Any, name: str = "") -> BaseEvaluator:
    """The evaluator of rows, by their columns; see ``GridEvaluator``.

    Raises:
        TypeError: no rows.
        ValueError: no rows, or other columns; an empty text, a score that is no finite number, whole labels other
            than 0 and 1.
    """
    table = table_of(data, kinds="an evaluator, a Dataset or a sequence of mappings")
    columns = {_column(name): name for name in table.columns}
    for wanted, build in _READERS.items():
        if set(wanted) <= set(columns):
            return build(table, *(columns[column] for column in wanted), name)
    accepted = "; ".join(", ".join(wanted) for wanted in _READERS)
    raise ValueError(f"{table.name} must have the columns of one of: {accepted}; got {', '.join(sorted(columns))}")


def _column(name: str) -> str:
    lower = name.lower()
    return {"s1": "sentence1", "s2": "sentence2"}.get(lower, lower)


def _similarity(table: Table, first: str, second: str, score: str, name: str) -> BaseEvaluator:
    if len(table) < 2:
        raise ValueError(f"{table.name} must hold at least two rows, whose {score} correlates, got one")
    return EmbeddingSimilarityEvaluator(table.texts(first), table.texts(second), table.numbers(score), name=name)


def _labelled(table: Table, first: str, second: str, label: str, name: str) -> BaseEvaluator:
    labels = table.numbers(label)
    if not all(map(float.is_integer, labels)):
        return _similarity(table, first, second, label, name)
    for row, value in enumerate(labels):
        if value not in (0, 1):  # more classes than two, or similarities: which, the numbers do not tell
            place = f"{table.place(row)}: {label}"
            raise ValueError(f"{place} must be 0 or 1, got {value:g}; a column of similarities is to be named score")
    return BinaryClassificationEvaluator(
        table.texts(first), table.texts(second), [int(value) for value in labels], name=name
    )


def _triplets(table: Table, anchor: str, positive: str, negative: str, name: str) -> BaseEvaluator:
    return TripletEvaluator(table.texts(anchor), table.texts(positive), table.texts(negative), name=name)


def _retrieval(table: Table, anchor: str, positive: str, name: str) -> BaseEvaluator:
    """Every anchor's positives among all of them; texts that are equal are one."""
    anchors, positives = table.texts(anchor), table.texts(positive)
    corpus = {text: str(i) for i, text in enumerate(dict.fromkeys(positives))}
    queries = {text: str(i) for i, text in enumerate(dict.fromkeys(anchors))}
    relevant: dict[str, set[str]] = {}
    for query, found in zip(anchors, positives, strict=True):
        relevant.setdefault(queries[query], set()).add(corpus[found])
    texts = ({number: text for text, number in each.items()} for each in (queries, corpus))
    return InformationRetrievalEvaluator(*texts, relevant, name=name)


_READERS: dict[tuple[str, ...], Callable[..., BaseEvaluator]] = {
    ("sentence1", "sentence2", "score"): _similarity,
    ("sentence1", "sentence2", "label"): _labelled,
    ("anchor", "positive", "negative"): _triplets,
    ("anchor", "positive"): _retrieval,
}


class _Rows:
    """The rows of all layers of every text that was encoded, by how it was."""

    def __init__(self, encoder: AllLayers, encoding: Mapping[str, Any]) -> None:
        self.encoder = encoder
        self._encoding = {name: value for name, value in encoding.items() if value is not None}
        self._known: dict[tuple[Any, ...], tuple[dict[str, int], list[Tensor]]] = {}

    def of(self, texts: Sequence[str], how: str, place: int, dim: int, **options: Any) -> Tensor:
        """(N, dim) of one cell, normalised if the model does."""
        key = how, options.get("prompt_name"), options.get("prompt")
        places, blocks = self._known.setdefault(key, ({}, []))
        new = list(dict.fromkeys(text for text in texts if text not in places))
        if new:
            first = len(places)
            blocks.append(self.encoder.encode(new, how, **options | self._encoding))
            places.update({text: first + i for i, text in enumerate(new)})
            if len(blocks) > 1:
                blocks[:] = [torch.cat(blocks)]
        rows = blocks[0][torch.tensor([places[text] for text in texts], dtype=torch.int64), place, :dim]
        return F.normalize(rows, dim=-1) if self.encoder.normalizes else rows

    def forget(self, how: str) -> None:
        for key in [key for key in self._known if key[0] == how]:
            del self._known[key]


class _Card:
    """Of a cell, which is no model to write a card for."""

    def set_evaluation_metrics(self, *_: Any) -> None:
        pass


class _CellModel:
    """What an evaluator takes for the model cut to one cell."""

    def __init__(self, rows: _Rows, place: int, dim: int) -> None:
        self._rows = rows
        self._place = place
        self._dim = dim
        self.model_card_data = _Card()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows.encoder.model, name)

    def encode(self, sentences: Any, **options: Any) -> Any:
        return self._encode(sentences, "encode", **options)

    def encode_query(self, sentences: Any, **options: Any) -> Any:
        return self._encode(sentences, "encode_query", **options)

    def encode_document(self, sentences: Any, **options: Any) -> Any:
        return self._encode(sentences, "encode_document", **options)

    def _encode(
        self,
        sentences: Any,
        how: str,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        precision: str | None = None,
        truncate_dim: int | None = None,
        **options: Any,
    ) -> Any:
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        dim = self._dim if truncate_dim is None else min(self._dim, truncate_dim)
        rows = self._rows.of(texts, how, self._place, dim, **options)
        if normalize_embeddings:
            rows = F.normalize(rows, dim=-1)
        found: Any = rows.numpy()
        if precision and precision != "float32":
            found = quantize_embeddings(found, precision=precision)
        if convert_to_tensor or not convert_to_numpy:
            found = torch.as_tensor(found)
        if not (convert_to_tensor or convert_to_numpy):
            found = list(found)
        return found[0] if isinstance(sentences, str) else found


PRIMARY = "primary_metric"


def _copied(evaluator: Any) -> Any:
    """For one cell: evaluators note the similarity of the model that they are given, and a column of it."""
    own = copy.copy(evaluator)
    if hasattr(own, "csv_headers"):
        own.csv_headers = list(own.csv_headers)
    return own


def _evaluated(evaluator: Any, cell: _CellModel) -> dict[str, Any]:
    """What an evaluator says of a cell, without its name in front, and which of it is primary."""
    own = _copied(evaluator)
    found = own(cell)
    if not isinstance(found, Mapping):
        return {"score": float(found), PRIMARY: "score"}
    prefix = f"{own.name}_" if getattr(own, "name", "") else ""
    metrics: dict[str, Any] = {name.removeprefix(prefix): value for name, value in found.items()}
    primary = str(own.primary_metric)
    # One whose own first word is the name has none in front.
    metrics[PRIMARY] = primary.removeprefix(prefix) if primary in found else primary
    return metrics


def _retrieve(
    evaluator: InformationRetrievalEvaluator, rows: _Rows, cells: Sequence[Sequence[_CellModel]]
) -> Iterator[list[dict[str, Any]]]:
    """Chunk by chunk of the corpus, so that the rows of a chunk serve all cells and are then forgotten."""
    hits: dict[_CellModel, dict[str, list[list[Any]]]] = {cell: {} for row in cells for cell in row}
    largest = max(
        max(counts)
        for counts in (
            evaluator.mrr_at_k,
            evaluator.ndcg_at_k,
            evaluator.accuracy_at_k,
            evaluator.precision_recall_at_k,
            evaluator.map_at_k,
        )
    )
    for first in range(0, len(evaluator.corpus), evaluator.corpus_chunk_size):
        for cell, found in hits.items():
            for name, lists in _hits_in_chunk(evaluator, cell, first).items():
                merged = found.setdefault(name, [[] for _ in lists])
                for all_hits, new in zip(merged, lists, strict=True):
                    all_hits.extend(new)
                    all_hits.sort(key=lambda hit: (-hit["score"], hit["corpus_id"]))
                    del all_hits[largest:]
        rows.forget("encode_document")
    for row in cells:
        yield [_scored(evaluator, cell, hits[cell]) for cell in row]


def _hits_in_chunk(evaluator: Any, cell: _CellModel, first: int) -> dict[str, list[list[Any]]]:
    """The best of a chunk of the corpus, by score function and query, as the evaluator finds them."""
    chunk = _copied(evaluator)
    last = first + evaluator.corpus_chunk_size
    chunk.corpus, chunk.corpus_ids = evaluator.corpus[first:last], evaluator.corpus_ids[first:last]
    chunk._corpus_id_ranks = None
    chunk.score_functions = _score_functions(evaluator, cell)
    chunk.score_function_names = sorted(chunk.score_functions)
    chunk.write_predictions = False
    chunk.compute_metrics = lambda found: found
    chunk.output_scores = lambda _: None
    found: dict[str, list[list[Any]]] = chunk.compute_all_metrics(cell)
    return found


def _score_functions(evaluator: Any, cell: _CellModel) -> dict[str, Any]:
    if getattr(evaluator, "_score_functions_from_model", not evaluator.score_functions):
        return {cell.similarity_fn_name: cell.similarity}
    functions: dict[str, Any] = evaluator.score_functions
    return functions


def _scored(evaluator: Any, cell: _CellModel, hits: dict[str, list[list[Any]]]) -> dict[str, Any]:
    own = _copied(evaluator)
    scores = {name: own.compute_metrics(lists) for name, lists in hits.items()}
    own.compute_all_metrics = own.compute_metrices = lambda *_, **__: scores
    return _evaluated(own, cell)
