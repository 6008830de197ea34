"""Pictures of a grid and of a choice. They need matplotlib."""

import math
from pathlib import Path
from typing import Any

from .choose import Choice
from .grid import Grid


def check_suffix(name: str, path: str | Path) -> None:
    """Before the work: whether a picture can be of a path's kind.

    Args:
        name: of the argument, for the error.
        path: of the picture.

    Raises:
        ImportError: no matplotlib.
        ValueError: it cannot.
    """
    pyplot = _pyplot()
    figure = pyplot.figure()
    known = figure.canvas.get_supported_filetypes()
    pyplot.close(figure)
    if Path(path).suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{name} must end in .{', .'.join(sorted(known))}, got {path}")


def heatmap(grid: Grid, path: str | Path, before: Grid | None = None) -> None:
    """Layers × dims as colours and numbers; with another grid before it, on one scale.

    Raises:
        ImportError: no matplotlib.
        ValueError: grids of other layers or dims.
    """
    grids = [grid] if before is None else [before, grid]
    if before is not None and (before.layers, before.dims) != (grid.layers, grid.dims):
        raise ValueError("before must have the layers and dims of the grid")
    scores = [score for each in grids for score in each.defined()] or [0.0]
    size = (1.5 + 0.9 * len(grid.dims)) * len(grids), 1.6 + 0.42 * len(grid.layers)
    figure, axes = _pyplot().subplots(1, len(grids), figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    for axis, each, title in zip(axes[0], grids, ("before", "after") if before else ("",), strict=False):
        image = axis.imshow(each.scores, vmin=min(scores), vmax=max(scores), aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(each.dims)), each.dims)
        axis.set_yticks(range(len(each.layers)), each.layers)
        axis.set_xlabel("dimensions")
        axis.set_ylabel("layers")
        axis.set_title(f"{title}, mean {each.mean():.3f}".removeprefix(", "))
        middle = (min(scores) + max(scores)) / 2
        for i, row in enumerate(each.scores):
            for k, score in enumerate(row):
                text = "–" if math.isnan(score) else f"{score:.3f}"
                axis.text(k, i, text, ha="center", va="center", color="white" if score < middle else "black")
    figure.colorbar(image, ax=axes[0], label=grid.metric)
    _save(figure, path)


def curves(grid: Grid, path: str | Path) -> None:
    """The score against the layers, a line per dim. ImportError without matplotlib."""
    figure, axis = _pyplot().subplots(figsize=(6, 4), layout="constrained")
    for k, dim in enumerate(grid.dims):
        axis.plot(grid.layers, [row[k] for row in grid.scores], marker="o", label=str(dim))
    axis.set_xlabel("layers")
    axis.set_ylabel(grid.metric)
    axis.set_xticks(grid.layers)
    axis.grid(alpha=0.3)
    axis.legend(title="dimensions")
    _save(figure, path)


def front(choice: Choice, path: str | Path) -> None:
    """Quality against latency, the front drawn and the pick marked. ImportError without matplotlib."""
    figure, axis = _pyplot().subplots(figsize=(6.5, 4.2), layout="constrained")
    axis.scatter(*_points(choice.cells), color="lightgray", label="cells")
    best: dict[float, Any] = {}
    for cell in choice.front:
        if cell.latency_ms not in best or cell.quality > best[cell.latency_ms].quality:
            best[cell.latency_ms] = cell
    axis.plot(*_points(list(best.values())), marker="o", label="front")
    axis.scatter(*_points([choice.pick]), marker="*", s=220, color="crimson", zorder=3, label="pick")
    pick = choice.pick
    axis.annotate(
        f"{pick.layer} layers, {pick.dim} dims",
        (pick.latency_ms, pick.quality),
        xytext=(-12, -4),
        textcoords="offset points",
        horizontalalignment="right",
    )
    axis.set_xlabel("latency of one text, ms")
    axis.set_ylabel(choice.metric)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def _points(cells: list[Any]) -> tuple[list[float], list[float]]:
    return [cell.latency_ms for cell in cells], [cell.quality for cell in cells]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'm2d_ext[cli]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: str | Path) -> None:
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
