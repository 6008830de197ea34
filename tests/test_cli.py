"""The command line m2d: its tables and JSON, and one line for what it cannot do."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

pytest.importorskip("typer", reason="the command line needs the cli extra")

from m2d_ext import cli
from m2d_ext.inference import Grid, Profile
from tiny_models import HIDDEN, tiny_model

LAYERS = 3
ROWS = [("w1 w2", "w3", 4.5), ("w4", "w5 w6", 1.0), ("w7 w8 w9", "w7 w8", 3.0), ("w10", "w11", 0.0)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)``: the exit code, stdout and stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["m2d", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_layers=LAYERS, normalize=True).eval().save_pretrained(str(folder))
    return folder


def table(separator: str, quoted: str = "") -> str:
    lines = [("sentence1", "sentence2", "score"), *ROWS]
    return "".join(separator.join(f"{quoted}{value}{quoted}" for value in line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text(table("\t"))
    return path


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.csv", "pairs.jsonl", "pairs.tsv.gz", "pairs.csv.gz"])
def test_grid(run: Run, model: Path, tmp_path: Path, name: str) -> None:
    texts = {
        "tsv": table("\t"),
        "csv": table(",", '"'),
        "jsonl": "".join(json.dumps({"sentence1": a, "sentence2": b, "score": c}) + "\n" for a, b, c in ROWS),
    }
    text = texts[name.split(".")[1]]
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    pictures = [tmp_path / "heat.png", tmp_path / "new" / "curves.png"]
    options = ["--dims", "32,8", "--layers", "1,3", "--output", tmp_path / "grid.json", "--csv", tmp_path / "grid.csv"]
    options += ["--heatmap", pictures[0], "--curves", pictures[1]]
    code, out, err = run("grid", model, "--data", path, *options)
    assert (code, err) == (0, "")
    grid = Grid.read(tmp_path / "grid.json")
    assert (grid.layers, grid.dims) == ([1, 3], [32, 8])
    assert f"{grid.score(3, 8):.4f}" in out
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    assert len((tmp_path / "grid.csv").read_text().splitlines()) == 5
    code, out, _ = run("grid", model, "--data", path, "--dims", "32,8", "--layers", "1,3", "--json")
    assert code == 0
    assert Grid.from_json(json.loads(out)) == grid


def test_from_grid_to_cut_model(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("grid.json", "profile.json", "front.png")}
    assert run("grid", model, "--data", data, "--output", files["grid.json"])[0] == 0
    code, out, _ = run("profile", model, "--repeats", 1, "--output", files["profile.json"])
    assert code == 0
    assert "texts/s" in out
    assert Profile.read(files["profile.json"]).layers == [0, 1, 2, 3]
    code, out, _ = run("profile", model, "--repeats", 1, "--layers", "2", "--json")
    assert json.loads(out)["layers"] == [2]
    arguments = ["choose", files["grid.json"], "--profile", files["profile.json"], "--min-quality", "50%"]
    code, out, _ = run(*arguments, "--plot", files["front.png"])
    assert code == 0
    assert "→" in out
    assert files["front.png"].stat().st_size > 5000
    pick = json.loads(run(*arguments, "--json")[1])["pick"]
    small = tmp_path / "small"
    code, out, _ = run("cut", model, "--layers", pick["layer"], "--dim", pick["dim"], small, "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["num_layers"], facts["of_layers"], facts["dim"], facts["of_dims"]) == (
        pick["layer"],
        LAYERS,
        pick["dim"],
        HIDDEN,
    )
    assert SentenceTransformer(str(small), device="cpu").encode("w1").shape == (pick["dim"],)
    code, out, _ = run("cut", model, "--dim", 4, tmp_path / "smaller")
    assert code == 0
    assert "dimensions" in out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    lines = ["anchor\tpositive\tnegative", *(f"w{i} w{i + 1}\tw{i + 2}\tw{i + 3} w1" for i in range(24))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_train(run: Run, model: Path, data: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--data", pairs, "--eval", data, "--steps", 3, "--batch-size", 8, "--lr", 0.01, "--dims", "32,8"]
    code, out, _ = run("train", model, tmp_path / "one", *options, "--heatmap", tmp_path / "grids.png", "--json")
    assert code == 0
    facts = json.loads(out)
    before, after = (Grid.from_json(facts[name]) for name in ("before", "after"))
    assert before != after
    assert (tmp_path / "grids.png").stat().st_size > 5000
    code, out, _ = run("grid", tmp_path / "one", "--data", data, "--dims", "32,8", "--json")
    assert Grid.from_json(json.loads(out)).scores == after.scores
    # The same again, and with gradient caching, which changes nothing but the memory.
    _, out, _ = run("train", model, tmp_path / "two", *options, "--mini-batch-size", 3, "--json")
    assert json.loads(out)["training_loss"] == pytest.approx(facts["training_loss"], rel=1e-4)
    code, out, _ = run("train", model, tmp_path / "three", *options)
    assert code == 0
    assert f"{after.score(3, 8):.4f}" in out


def test_choose_profiles_a_model(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    assert run("grid", model, "--data", data, "--layers", "3", "--output", tmp_path / "grid.json")[0] == 0
    code, out, _ = run("choose", tmp_path / "grid.json", "--model", model, "--json")
    assert code == 0
    assert json.loads(out)["pick"]["layer"] == 3


@pytest.mark.parametrize("command", ["train", "grid", "profile", "choose", "cut"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: m2d {command} " in out


BAD: list[tuple[list[str], str]] = [
    (["grid", "MODEL", "--data", "TMP/none.tsv"], "there is no file TMP/none.tsv"),
    (["grid", "MODEL", "--data", "TMP/empty.tsv"], "at least one row, got none"),
    (["grid", "MODEL", "--data", "TMP/columns.tsv"], "must have the columns of one of: .* got color, text"),
    (["grid", "MODEL", "--data", "TMP/pairs.txt"], "must end in .tsv, .csv, .jsonl, .json, perhaps with .gz"),
    (["grid", "TMP/no/model", "--data", "DATA"], "there is no folder TMP/no/model"),
    (["grid", "MODEL", "--data", "DATA", "--dims", "64"], "dims must be at most 32 for this model, got .64."),
    (["grid", "MODEL", "--data", "DATA", "--dims", "8,x"], "--dims must be numbers with commas between, got '8,x'"),
    (["grid", "MODEL", "--data", "DATA", "--layers", "9"], "layers must be distinct and from 0 to 3 for this model"),
    (["grid", "MODEL"], "Missing option '--data'"),
    (["cut", "MODEL", "TMP/out"], "give --layers, --dim or both"),
    (["cut", "MODEL", "--layers", "7", "TMP/out"], "num_layers must be from 0 to 3 for this model, got 7"),
    (["cut", "MODEL", "--dim", "64", "TMP/out"], "dim must be from 1 to 32 for this model, got 64"),
    (["cut", "MODEL", "--dim", "x", "TMP/out"], "Invalid value for '--dim'"),
    (["cut", "MODEL", "--dim", "4", "TMP"], "TMP exists and is not an empty folder"),
    (["choose", "TMP/none.json", "--profile", "TMP/none.json"], "there is no file TMP/none.json"),
    (["choose", "TMP/columns.tsv", "--profile", "TMP/columns.tsv"], "is no grid"),
    (["choose", "TMP/columns.tsv"], "give one of --profile and --model"),
    (["profile", "MODEL", "--layers", "5"], "num_layers must be from 0 to 3 for this model, got 5"),
    (["train", "MODEL", "TMP/out", "--data", "DATA"], "must have the columns anchor and positive, got sentence1"),
    (["train", "MODEL", "TMP/out", "--data", "PAIRS"], "must hold at least a batch of 64 rows, got 24"),
    (["train", "MODEL", "TMP/out", "--data", "PAIRS", "--kl-target", "x", "--batch-size", "4"], "kl_target must be"),
    (["train", "MODEL", "TMP/out"], "Missing option '--data'"),
    (["frobnicate"], "No such command 'frobnicate'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line(
    run: Run, model: Path, data: Path, pairs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.tsv").write_text("sentence1\tsentence2\tscore\n")
    (tmp_path / "columns.tsv").write_text("text\tcolor\nw1\tred\n")
    (tmp_path / "pairs.txt").write_text("w1")
    places: dict[str, Any] = {"MODEL": model, "DATA": data, "PAIRS": pairs, "TMP": tmp_path}

    def filled(text: str) -> str:
        return re.sub("|".join(places), lambda match: str(places[match[0]]), text)

    code, out, err = run(*map(filled, arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("m2d: ")
    assert err.count("\n") == 1
    assert re.search(filled(message), err), err
