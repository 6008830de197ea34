"""Retrieval quality of every (layer, dimension) cell of a sentence-transformers model, as numbers, table and picture.

A cell (l, d) is the model cut after layer l (0 is the embedding layer's output) whose embeddings keep their first d
coordinates. Its score is accuracy@1: the share of anchors whose nearest text by cosine, among all positives, is their
own. Each text runs through the transformer once, whatever the number of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F


def retrieval_grid(
    model: SentenceTransformer,
    anchors: Sequence[str],
    positives: Sequence[str],
    dims: Sequence[int],
    batch_size: int = 64,
    track: Callable[[list], Iterable] = iter,
) -> Tensor:
    """(layers, dims) accuracy@1 of finding `positives[i]` for `anchors[i]`; `track` wraps the batches, as a bar."""
    embeddings = encode_layers(model, [*anchors, *positives], batch_size, track)
    rows = []
    for layer in embeddings:
        queries, candidates = layer.split(len(anchors))
        rows.append([accuracy_at_1(queries[:, :dim], candidates[:, :dim]) for dim in dims])
    return torch.tensor(rows)


def encode_layers(
    model: SentenceTransformer,
    texts: Sequence[str],
    batch_size: int = 64,
    track: Callable[[list], Iterable] = iter,
) -> Tensor:
    """(layers, texts, D) embeddings: every hidden state through all that the model has after its transformer."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch: less padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    encoded = []
    with torch.inference_mode(), hidden_states_returned(model):
        for batch in track(batches):
            features = model.preprocess([texts[i] for i in batch])
            features = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in features.items()}
            features = model[0](features)
            states = features.pop("all_layer_embeddings")
            encoded.append(torch.stack([finish(model, features, state) for state in states]).float().cpu())
    model.train(was_training)
    return torch.cat(encoded, dim=1)[:, torch.tensor(order).argsort()]


@contextmanager
def hidden_states_returned(model: SentenceTransformer) -> Iterator[None]:
    """Within the context, the transformer module also returns `all_layer_embeddings`, a (B, T, D) tensor per layer."""
    config = model[0].model.config
    before = config.output_hidden_states
    config.output_hidden_states = True
    try:
        yield
    finally:
        config.output_hidden_states = before


def finish(model: SentenceTransformer, features: dict, hidden_state: Tensor) -> Tensor:
    """(B, D) embeddings of one layer: pooling, and normalisation or whatever else follows it."""
    features = {**features, model[0].module_output_name: hidden_state}
    for module in list(model)[1:]:
        features = module(features)
    return features["sentence_embedding"]


def accuracy_at_1(queries: Tensor, candidates: Tensor) -> float:
    """Share of the rows of `queries` (N, d) whose nearest row of `candidates` (N, d) by cosine has the same index."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T
    return (scores.argmax(dim=1) == torch.arange(len(scores))).float().mean().item()


def print_table(console: Console, before: Tensor, after: Tensor, dims: Sequence[int], caption: str) -> None:
    """The two grids in one table, in percent; better cells in green, worse ones in red."""
    names = f"Layer 0: the embedding layer's output; layer {len(before) - 1}: the last"
    table = Table(title="Accuracy@1 in %, before → after", caption=f"{caption}\n{names}", header_style="bold")
    table.add_column("layer", justify="right")
    for dim in dims:
        table.add_column(f"{dim} dims", justify="right", no_wrap=True)
    for layer, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        table.add_row(str(layer), *map(change, old, new))
    table.add_section()
    table.add_row("mean", *map(change, before.mean(0).tolist(), after.mean(0).tolist()))
    console.width = max(console.width, console.measure(table).maximum)  # never cut a cell short, even in a log file
    console.print(table)


def change(old: float, new: float) -> str:
    """`old → new` in percent, coloured by direction when they differ by half a point or more."""
    color = "green" if new - old >= 0.005 else "red" if old - new >= 0.005 else "default"
    return f"{100 * old:.1f} → [{color}]{100 * new:.1f}[/]"


def layer_name(layer: int, num_layers: int) -> str:
    note = {0: " (embeddings)", num_layers - 1: " (last)"}.get(layer, "")
    return f"{layer}{note}"


def save_heatmap(path: Path, before: Tensor, after: Tensor, dims: Sequence[int], title: str) -> None:
    """A picture of the two grids and of their difference, side by side, with the value in every cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers = len(before)
    figure = Figure(figsize=(2.5 + 3 * 0.75 * max(4, len(dims)), 2.2 + 0.5 * num_layers), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves the user's matplotlib settings alone
    figure.suptitle(title)
    before, after = 100 * before, 100 * after
    top = max(before.max().item(), after.max().item())
    gap = max((after - before).abs().max().item(), 1.0)
    panels = [
        ("before training", before, "viridis", 0.0, top, ".1f"),
        ("after training", after, "viridis", 0.0, top, ".1f"),
        ("change (points)", after - before, "RdBu", -gap, gap, "+.1f"),
    ]
    for axes, (name, grid, colors, low, high, number) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        image = axes.imshow(grid.numpy(), cmap=colors, vmin=low, vmax=high, aspect="auto")
        axes.set_title(name)
        axes.set_xlabel("embedding dimensions")
        axes.set_xticks(range(len(dims)), dims)
        axes.tick_params(length=0)
        for (row, column), value in ((divmod(i, len(dims)), v) for i, v in enumerate(grid.flatten().tolist())):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(column, row, format(value, number), ha="center", va="center", color=ink, fontsize=9)
    first = figure.axes[0]
    first.set_ylabel("layer")
    first.set_yticks(range(num_layers), [layer_name(layer, num_layers) for layer in range(num_layers)])
    figure.savefig(path, dpi=150)
