"""What was measured: a score for every layer and dimension."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import fields


@dataclass(frozen=True)
class Grid:
    """Scores of layers × dims cells.

    Args:
        layers: how many layers a cell keeps; 0 is the embedding layer's output.
        dims: how many dimensions it keeps.
        scores: (layers, dims); NaN where the metric is undefined, as a correlation is where all texts have one row.
        metric: what they are, such as "spearman_cosine".
        greater_is_better: whether a higher score is better.
        model: its name or path.
        name: of the data.
        extra: other metrics of the same shape, by name.

    Raises:
        ValueError: scores of another shape than layers × dims.
    """

    layers: list[int]
    dims: list[int]
    scores: list[list[float]]
    metric: str
    greater_is_better: bool = True
    model: str = ""
    name: str = ""
    extra: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric, scores in {self.metric: self.scores, **self.extra}.items():
            if len(scores) != len(self.layers) or any(len(row) != len(self.dims) for row in scores):
                raise ValueError(f"{metric} must be {len(self.layers)} layers × {len(self.dims)} dims")

    def score(self, layer: int, dim: int) -> float:
        """Of one cell. ValueError if it is not in the grid."""
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {self.layers}, got {layer}")
        if dim not in self.dims:
            raise ValueError(f"dim must be one of {self.dims}, got {dim}")
        return self.scores[self.layers.index(layer)][self.dims.index(dim)]

    def defined(self) -> list[float]:
        """The scores of the cells that have one, layer by layer."""
        return [score for row in self.scores for score in row if not math.isnan(score)]

    def mean(self) -> float:
        """Over the cells that have a score; NaN where none has."""
        return statistics.fmean(self.defined() or [math.nan])

    def to_json(self) -> dict[str, Any]:
        """The fields, with None where a score is undefined: JSON has no NaN."""
        extra = {metric: _nan_to_none(rows) for metric, rows in self.extra.items()}
        return asdict(self) | {"scores": _nan_to_none(self.scores), "extra": extra}

    @classmethod
    def from_json(cls, data: Any) -> "Grid":
        """What ``to_json`` gave. ValueError where it is no grid, or a score of it is neither finite nor None."""
        fields.check_object("grid", data, cls.__dataclass_fields__, ("layers", "dims", "scores", "metric"))
        fields.check_counts("layers", data["layers"], least=0)
        fields.check_counts("dims", data["dims"], least=1)
        kinds = {"metric": str, "greater_is_better": bool, "model": str, "name": str, "extra": dict, "scores": list}
        for name, kind in kinds.items():
            if name in data:
                fields.check_type(name, data[name], kind)
        for metric, rows in {"scores": data["scores"], **data.get("extra", {})}.items():
            fields.check_rows(metric, rows)
        extra = {metric: _none_to_nan(rows) for metric, rows in data.get("extra", {}).items()}
        grid = cls(**data | {"scores": _none_to_nan(data["scores"]), "extra": extra})
        for layer, row in zip(grid.layers, data["scores"], strict=True):
            fields.check_numbers(f"scores of layer {layer}", row, len(grid.dims), allow_none=True)
        return grid

    def write(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Grid":
        """What ``write`` wrote. ValueError where it is no grid."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is no grid: {error}") from error

    def write_csv(self, path: str | Path) -> None:
        """A line per cell: layer, dim, the metric and the others."""
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", "dim", self.metric, *self.extra])
            for i, layer in enumerate(self.layers):
                for k, dim in enumerate(self.dims):
                    writer.writerow([layer, dim, self.scores[i][k], *(rows[i][k] for rows in self.extra.values())])


def _nan_to_none(rows: list[list[float]]) -> list[list[float | None]]:
    return [[None if math.isnan(score) else score for score in row] for row in rows]


def _none_to_nan(rows: list[list[float | None]]) -> list[list[float]]:
    return [[math.nan if score is None else score for score in row] for row in rows]


def check_axis(name: str, numbers: Sequence[int] | None, least: int) -> None:
    """Of layers or dims that are asked for; None is any.

    Raises:
        TypeError: they are not ints.
        ValueError: none, repeated ones or one below the least.
    """
    if numbers is None:
        return
    if any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        raise TypeError(f"{name} must be ints, got {list(numbers)}")
    if len(numbers) == 0 or len(set(numbers)) < len(numbers) or min(numbers) < least:
        raise ValueError(f"{name} must be distinct and at least {least}, got {list(numbers)}")
