"""Which cell to deploy: the trade between quality, latency and the size of an index."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .grid import Grid
from .profile import Profile


@dataclass(frozen=True)
class Cell:
    """One cell and what it costs.

    Args:
        layer: layers kept.
        dim: dimensions kept.
        quality: its score in the grid.
        latency_ms: to encode one text.
        bytes_per_vector: in an index.
    """

    layer: int
    dim: int
    quality: float
    latency_ms: float
    bytes_per_vector: int


@dataclass(frozen=True)
class Choice:
    """The cells, those worth having, and the one to take.

    Args:
        pick: that one. It is on the front.
        front: the cells that no other is at least as good as in everything and better than in something, by latency.
        cells: all of them that have a score.
        metric: what the quality is.
    """

    pick: Cell
    front: list[Cell]
    cells: list[Cell]
    metric: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose(
    grid: Grid,
    profile: Profile,
    *,
    min_quality: float | str | None = None,
    max_latency: float | None = None,
    max_bytes: int | None = None,
) -> Choice:
    """The Pareto front of a grid, and a cell on it. Cells without a score (NaN) are left out.

    With ``min_quality`` the pick is the fastest cell that has it, of equally fast ones the one of fewest bytes;
    without, the best one within the other limits.

    Args:
        grid: the qualities.
        profile: the costs, of at least the grid's layers.
        min_quality: a score; or a share of the best cell's, as "98%", where higher scores are better and that is not
            below 0.
        max_latency: milliseconds to encode one text.
        max_bytes: of a vector in an index.

    Returns:
        The ``Choice``.

    Raises:
        ValueError: a layer that was not profiled, a share that is none, a limit that is no number, limits that no
            cell keeps; a grid without any score.
    """
    for name, limit in (("max_latency", max_latency), ("max_bytes", max_bytes)):
        if limit is not None and math.isnan(limit):
            raise ValueError(f"{name} must be a number, got {limit}")
    cells = _cells_of(grid, profile)
    sign = 1 if grid.greater_is_better else -1
    least = _least_quality(min_quality, cells, sign)
    within = [
        cell
        for cell in cells
        if (least is None or sign * cell.quality >= sign * least)
        and (max_latency is None or cell.latency_ms <= max_latency)
        and (max_bytes is None or cell.bytes_per_vector <= max_bytes)
    ]
    if not within:
        raise ValueError(_nothing_within(cells, sign, least, max_latency, max_bytes))

    def cost(cell: Cell) -> tuple[float, int]:
        return cell.latency_ms, cell.bytes_per_vector

    if least is None:
        pick = min(within, key=lambda cell: (-sign * cell.quality, *cost(cell)))
    else:
        pick = min(within, key=lambda cell: (*cost(cell), -sign * cell.quality))
    front = [cell for cell in cells if not any(_dominates(other, cell, sign) for other in cells)]
    return Choice(pick, sorted(front, key=cost), cells, grid.metric)


def _cells_of(grid: Grid, profile: Profile) -> list[Cell]:
    missing = [layer for layer in grid.layers if layer not in profile.layers]
    if missing:
        raise ValueError(f"profile must have the grid's layers {grid.layers}, but lacks {missing}")
    latencies = dict(zip(profile.layers, profile.latency_ms, strict=True))
    cells = [
        Cell(layer, dim, grid.score(layer, dim), latencies[layer], profile.bytes_per_dim * dim)
        for layer in grid.layers
        for dim in grid.dims
        if not math.isnan(grid.score(layer, dim))
    ]
    if not cells:
        raise ValueError(f"grid must have a cell whose {grid.metric} is defined, but has none")
    return cells


def _least_quality(min_quality: float | str | None, cells: Sequence[Cell], sign: int) -> float | None:
    if min_quality is None:
        return None
    text = str(min_quality).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise ValueError(f"min_quality must be a number or a share such as '98%', got {min_quality!r}")
    if not text.endswith("%"):
        return share
    if sign < 0:
        raise ValueError(f"min_quality must be a number where lower scores are better, got {min_quality!r}")
    best = max(cell.quality for cell in cells)
    if best < 0:
        raise ValueError(f"min_quality must be a number where all scores are below 0, got {min_quality!r}")
    return share * best


def _dominates(other: Cell, cell: Cell, sign: int) -> bool:
    better = (
        sign * (other.quality - cell.quality),
        cell.latency_ms - other.latency_ms,
        cell.bytes_per_vector - other.bytes_per_vector,
    )
    return min(better) >= 0 and max(better) > 0


def _nothing_within(
    cells: Sequence[Cell], sign: int, least: float | None, max_latency: float | None, max_bytes: int | None
) -> str:
    limits = []
    if least is not None:
        limits.append(f"a quality of at {'least' if sign > 0 else 'most'} {least:.4f}")
    if max_latency is not None:
        limits.append(f"a latency of at most {max_latency} ms")
    if max_bytes is not None:
        limits.append(f"at most {max_bytes} bytes per vector")
    best = max(cells, key=lambda cell: sign * cell.quality)
    fastest = min(cells, key=lambda cell: (cell.latency_ms, -sign * cell.quality))
    smallest = min(cells, key=lambda cell: (cell.bytes_per_vector, -sign * cell.quality))
    return (
        f"no cell has {' and '.join(limits)}: the best quality is {best.quality:.4f} "
        f"(layer {best.layer}, dim {best.dim}), the lowest latency {fastest.latency_ms:.2f} ms "
        f"(layer {fastest.layer}), the smallest vector {smallest.bytes_per_vector} bytes (dim {smallest.dim})"
    )
