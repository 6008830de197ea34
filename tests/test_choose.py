"""Which cell to deploy: the front is what nothing dominates, and the pick is on it."""

from __future__ import annotations

import itertools
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2d_ext import inference
from m2d_ext.inference import Cell, Grid, Profile, choose, plots, profile
from m2d_ext.inference.memory import PeakMemory
from tiny_models import HIDDEN, tiny_model


def profile_of(latencies: list[float], layers: list[int] | None = None) -> Profile:
    layers = list(range(len(latencies))) if layers is None else layers
    count = len(latencies)
    return Profile(layers, [1.0] * count, latencies, [1] * count, None, 4, 64, {"device": "none"})


GRID = Grid(layers=[1, 2, 3], dims=[8, 4], scores=[[0.5, 0.4], [0.8, 0.79], [0.82, 0.6]], metric="ndcg")
COSTS = profile_of([1.0, 2.0, 3.0], layers=[1, 2, 3])

PICKS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({}, (3, 8)),
    ({"max_latency": 2.5}, (2, 8)),
    ({"max_bytes": 16}, (2, 4)),
    ({"min_quality": 0.75}, (2, 4)),
    ({"min_quality": 0.8}, (2, 8)),
    ({"min_quality": "95%"}, (2, 4)),
    ({"min_quality": "0.45"}, (1, 8)),
    ({"min_quality": "45%", "max_bytes": 16}, (1, 4)),
]


@pytest.mark.parametrize(("limits", "cell"), PICKS)
def test_the_pick(limits: dict[str, Any], cell: tuple[int, int]) -> None:
    choice = choose(GRID, COSTS, **limits)
    assert (choice.pick.layer, choice.pick.dim) == cell
    assert {(c.layer, c.dim) for c in choice.front} == {(1, 4), (1, 8), (2, 4), (2, 8), (3, 8)}
    assert choice.pick.bytes_per_vector == 4 * choice.pick.dim


def test_lower_is_better() -> None:
    grid = Grid([1, 2], [8], [[0.5], [0.1]], "mse", greater_is_better=False)
    costs = profile_of([1.0, 2.0], layers=[1, 2])
    assert choose(grid, costs).pick.layer == 2
    assert choose(grid, costs, min_quality=0.6).pick.layer == 1
    with pytest.raises(ValueError, match="min_quality must be a number where lower scores are better"):
        choose(grid, costs, min_quality="98%")


@pytest.mark.parametrize("limits", [{}, {"min_quality": "98%"}, {"min_quality": 0.1}, {"max_latency": 9.0}])
def test_cells_without_a_score_are_not_chosen(limits: dict[str, Any], tmp_path: Path) -> None:
    nan = float("nan")
    grid = Grid([1, 2, 3], [8, 4], [[nan, nan], [0.1, nan], [0.1, 0.1]], "ndcg")
    choice = choose(grid, COSTS, **limits)
    assert (choice.pick.layer, choice.pick.dim) == (2, 8)
    assert {(c.layer, c.dim) for c in choice.cells} == {(2, 8), (3, 8), (3, 4)}
    assert {(c.layer, c.dim) for c in choice.front} == {(2, 8), (3, 4)}
    empty = Grid([1, 2, 3], [8], [[nan]] * 3, "ndcg")
    with pytest.raises(ValueError, match="grid must have a cell whose ndcg is defined, but has none"):
        choose(empty, COSTS, **limits)
    for each in (grid, empty):
        plots.heatmap(each, tmp_path / "grid.png")
        plots.curves(each, tmp_path / "curves.png")


def test_the_colours_are_of_the_scores_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    scales = []
    imshow = Axes.imshow

    def watch(self: Axes, *arguments: Any, **options: Any) -> Any:
        scales.append((options["vmin"], options["vmax"]))
        return imshow(self, *arguments, **options)

    monkeypatch.setattr(Axes, "imshow", watch)
    plots.heatmap(Grid([0, 1], [8, 4], [[float("nan")] * 2, [0.1, 0.2]], "ndcg"), tmp_path / "grid.png")
    assert scales == [(0.1, 0.2)]


def test_a_share_of_a_best_score_below_zero() -> None:
    grid = Grid([1, 2, 3], [8], [[-0.9], [-0.4], [-0.2]], "negative_mse")
    with pytest.raises(ValueError, match="min_quality must be a number where all scores are below 0, got '98%'"):
        choose(grid, COSTS, min_quality="98%")
    assert choose(grid, COSTS, min_quality=-0.5).pick.layer == 2
    assert choose(Grid([1, 2, 3], [8], [[-0.9], [-0.4], [0.0]], "rho"), COSTS, min_quality="98%").pick.layer == 3


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.one_of(st.none(), st.integers(0, 5)),
    st.one_of(st.none(), st.integers(1, 3)),
    st.one_of(st.none(), st.sampled_from([4, 16, 64])),
)
def test_the_front_is_what_nothing_dominates(
    scores: list[list[int]], latencies: list[int], quality: int | None, latency: int | None, size: int | None
) -> None:
    grid = Grid(list(range(len(scores))), [16, 4, 1], [list(map(float, row)) for row in scores], "score")
    costs = profile_of([float(value) for value in latencies])
    limits: dict[str, Any] = {"min_quality": quality, "max_latency": latency, "max_bytes": size}

    def keeps(cell: Cell) -> bool:
        return (
            (quality is None or cell.quality >= quality)
            and (latency is None or cell.latency_ms <= latency)
            and (size is None or cell.bytes_per_vector <= size)
        )

    everything = choose(grid, costs)
    if not any(map(keeps, everything.cells)):
        with pytest.raises(ValueError, match="no cell has a"):
            choose(grid, costs, **limits)
        return
    choice = choose(grid, costs, **limits)
    good = [(cell.quality, -cell.latency_ms, -cell.bytes_per_vector) for cell in choice.cells]
    for cell, own in zip(choice.cells, good, strict=True):
        dominated = any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in good)
        assert (cell in choice.front) != dominated
    assert choice.front == everything.front
    assert choice.pick in choice.front
    assert keeps(choice.pick)
    for cell in filter(keeps, choice.cells):
        if quality is None:
            assert cell.quality <= choice.pick.quality
        else:
            assert cell.latency_ms >= choice.pick.latency_ms


def test_bad_limits() -> None:
    with pytest.raises(
        ValueError, match=r"no cell has a quality of at least 0.9000 and a latency of at most 2 ms: .*0.82"
    ):
        choose(GRID, COSTS, min_quality=0.9, max_latency=2)
    with pytest.raises(ValueError, match="no cell has at most 1 bytes per vector: the best"):
        choose(GRID, COSTS, max_bytes=1)
    with pytest.raises(ValueError, match=r"no cell has a quality of at most 0\.1000: the best"):
        choose(Grid([1, 2, 3], [8], [[0.5]] * 3, "mse", greater_is_better=False), COSTS, min_quality=0.1)
    for quality in ("most", "nan", float("nan"), "inf%"):
        with pytest.raises(
            ValueError, match=f"min_quality must be a number or a share such as '98%', got {quality!r}"
        ):
            choose(GRID, COSTS, min_quality=quality)
    with pytest.raises(ValueError, match="max_latency must be a number, got nan"):
        choose(GRID, COSTS, max_latency=float("nan"))
    with pytest.raises(ValueError, match=r"profile must have the grid's layers \[1, 2, 3\], but lacks \[3\]"):
        choose(GRID, profile_of([1.0, 2.0], layers=[1, 2]))


def test_the_default_grid_has_the_layers_of_the_default_profile() -> None:
    rows = [{"sentence1": f"w{i}", "sentence2": f"w{i + 9} w3", "score": i / 4} for i in range(5)]
    for architecture, first in (("modernbert", 1), ("bert", 0), ("t5", 0)):
        model = tiny_model(architecture, num_layers=2)
        grid = inference.GridEvaluator(rows, dims=[8]).grid(model)
        costs = profile(model, ["w1"], repeats=1)
        assert grid.layers == costs.layers == list(range(first, 3))
        assert choose(grid, costs).pick.layer in grid.layers


def test_profile(tmp_path: Path) -> None:
    model = tiny_model(num_layers=3)
    found = profile(model, repeats=1, batch_size=16)
    assert found.layers == [0, 1, 2, 3]
    assert profile(tiny_model("modernbert"), ["w1"], repeats=1).layers == [1, 2, 3]
    assert min(*found.texts_per_second, *found.latency_ms) > 0
    layer = sum(p.numel() * p.element_size() for p in model[0].auto_model.encoder.layer[0].parameters())
    assert [b - a for a, b in itertools.pairwise(found.parameter_bytes)] == [layer] * 3
    assert found.bytes_per_dim * HIDDEN == model.encode("w1").nbytes
    if PeakMemory.is_available():
        assert found.peak_bytes is not None
        assert len(found.peak_bytes) == 4
        block = PeakMemory()
        with mmap.mmap(-1, 1 << 26) as pages:  # fresh ones; torch may be given some that are resident already
            pages.write(bytes(1 << 26))
        assert block.growth() >= 0.9 * (1 << 26)  # the kernel counts pages by the batch
    found.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == found
    assert profile(model, ["w1 w2"], layers=[2], repeats=1).layers == [2]
    with pytest.raises(ValueError, match="texts must hold at least one text"):
        profile(model, [])
    with pytest.raises(ValueError, match="batch_size and repeats must be positive, got 0 and 5"):
        profile(model, batch_size=0)
    with pytest.raises(ValueError, match="num_layers must be from 0 to 3"):
        profile(model, layers=[4])
    for layers in ([], [2, 2], [-1]):
        with pytest.raises(ValueError, match="layers must be distinct and at least 0, got"):
            profile(model, layers=layers)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": None}, "layers must be a list of distinct whole numbers from 0 up, got None"),
        ({"latency_ms": [1.0]}, r"latency_ms must be a list of 3 numbers, got \[1.0\]"),
        ({"latency_ms": [1.0, "x", 2.0]}, "latency_ms must be finite numbers from 0 up, got 'x'"),
        ({"texts_per_second": [1.0, -1.0, 2.0]}, "texts_per_second must be finite numbers from 0 up, got -1.0"),
        ({"parameter_bytes": [1, float("inf"), 2]}, "parameter_bytes must be finite numbers from 0 up, got inf"),
        ({"peak_bytes": 3}, "peak_bytes must be a list of 3 numbers, got 3"),
        ({"bytes_per_dim": 4.5}, "bytes_per_dim must be a whole number, got 4.5"),
        ({"machine": "this"}, "machine must be an object, got 'this'"),
        ({"color": 1}, "a profile has no 'color'"),
    ],
)
def test_a_broken_profile(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "profile.json"
    COSTS.write(path)
    assert Profile.read(path) == COSTS
    path.write_text(json.dumps(COSTS.to_json() | changed))
    with pytest.raises(ValueError, match=f"profile.json is no profile: {message}"):
        Profile.read(path)
    for text, why in (("[]", "must be an object"), ("{}", "must have 'layers'"), ("{", "Expecting")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"is no profile: .*{why}"):
            Profile.read(path)


def test_pictures(tmp_path: Path) -> None:
    """That they are written and differ; what they look like, only eyes can tell."""
    plots.heatmap(GRID, tmp_path / "one.png")
    plots.heatmap(GRID, tmp_path / "two.png", before=GRID)
    plots.curves(GRID, tmp_path / "curves.png")
    plots.front(choose(GRID, COSTS), tmp_path / "front.png")
    pictures = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(pictures) == 4
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)
    with pytest.raises(ValueError, match="before must have the layers and dims of the grid"):
        plots.heatmap(GRID, tmp_path / "x.png", before=Grid([1], [8], [[0.1]], "ndcg"))


def test_public_names() -> None:
    assert {"Grid", "GridEvaluator", "choose", "profile", "truncate_model"} <= set(inference.__all__)
