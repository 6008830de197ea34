"""The command line m2d: its tables and JSON, and one line for what it cannot do."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

pytest.importorskip("typer", reason="the command line needs the cli extra")

import typer

import m2d_ext
from m2d_ext import cli, training
from m2d_ext.inference import Grid, GridEvaluator, Profile
from m2d_ext.inference.outputs import new_folder
from m2d_ext.inference.tables import read_table
from tiny_models import HIDDEN, tiny_model

LAYERS = 3
ROWS = [("w1 w2", "w3", 4.5), ("w4", "w5 w6", 1.0), ("w7 w8 w9", "w7 w8", 3.0), ("w10", "w11", 0.0)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments, columns=…)``: the exit code, stdout and stderr, on a console so wide."""

    def run_command(*arguments: object, columns: str = "160") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["m2d", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", columns)
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


def test_tables_have_whole_figures(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    dims = range(3, 23)
    options = ["--data", data, "--dims", ",".join(map(str, dims)), "--output", tmp_path / "grid.json"]
    code, out, _ = run("grid", model, *options, columns="80")
    assert code == 0
    grid = Grid.read(tmp_path / "grid.json")
    assert "…" not in out
    assert all(f"│{grid.score(layer, dim):.4f}" in out for layer in grid.layers for dim in dims)


def test_a_table_is_set_tightly_where_it_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    grid = Grid([1], [2048, 1024, 512, 256, 128, 64, 32, 16], [[0.5] * 8], "ndcg")
    for columns, row in ((82, "│ 0.5000 │ 0.5000 │"), (81, "│0.5000│0.5000│")):
        monkeypatch.setenv("COLUMNS", str(columns))
        cli._print(cli._grid_table(grid))
        assert row in capsys.readouterr().out


def test_paths_are_no_markup(run: Run, model: Path, pairs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", lambda *_, **__: training.Trained(1.5))
    for name in ("one[v2]", "[bold]x:cat:"):
        assert name in run("cut", model, "--dim", 4, name)[1]
        assert f"model in new{name}\n" in run("train", model, f"new{name}", "--data", pairs)[1]


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


def test_train_takes_every_negative(run: Run, model: Path, tmp_path: Path) -> None:
    """Each column of them is as many candidates more; any other column is left out."""
    rows = [[*(f"w{i} w{20 + column}" for column in range(4)), "0.5"] for i in range(8)]
    names = ["anchor", "positive", "negative_1", "negative_2", "negative_score"]

    def loss(count: int) -> float:
        lines = ["\t".join(row[:count]) for row in [names, *rows]]
        (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
        options = ["--data", tmp_path / "pairs.tsv", "--steps", 1, "--batch-size", 8, "--overwrite", "--json"]
        return json.loads(run("train", model, tmp_path / "out", *options)[1])["training_loss"]

    assert loss(2) < loss(3) < loss(4) == loss(5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_stored_in_a_half_type_is_trained_in_float32(
    run: Run, pairs: Path, tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    half = tiny_model(num_layers=LAYERS, normalize=True).eval().to(dtype)
    half.save_pretrained(str(tmp_path / "half"))
    options = ["--data", pairs, "--steps", 2, "--batch-size", 8, "--json"]
    losses = []
    half.float().save_pretrained(str(tmp_path / "float"))
    for name in ("half", "float"):
        code, out, _ = run("train", tmp_path / name, tmp_path / "out" / name, *options)
        assert code == 0
        losses.append(json.loads(out)["training_loss"])
    assert losses[0] == losses[1]
    assert f"parameters are {dtype}: it is trained and saved in float32" in caplog.text
    assert next(SentenceTransformer(str(tmp_path / "out" / "half"), device="cpu").parameters()).dtype == torch.float32


@pytest.mark.parametrize("training_of", [training.train, training.fit])
def test_parameters_of_half_types_are_not_trained(training_of: Any, tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    rows = [{"anchor": f"w{i}", "positive": f"w{i} w1"} for i in range(4)]
    arguments = (rows,) if training_of is training.train else (torch.nn.Identity(), rows)
    with pytest.raises(ValueError, match=r"model must have parameters of float32 to be trained, got torch.bfloat16"):
        training_of(model, *arguments, tmp_path / "out", batch_size=4)


def test_training_has_the_models_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []
    model = tiny_model()
    preprocess = model.preprocess

    def watched(texts: Any, prompt: str | None = None, **options: Any) -> Any:
        seen.extend((text, prompt) for text in texts)
        return preprocess(texts, prompt=prompt, **options)

    model.preprocess = watched  # type: ignore[method-assign]
    rows = [{"anchor": f"w{i}", "positive": f"w{i} w1", "negative_1": f"w{i} w2"} for i in range(4)]
    model.prompts = {"query": "w90 ", "passage": "w91 "}
    of_columns = {"anchor": "w90 ", "positive": "w91 ", "negative_1": "w91 "}
    for number, (given, expected) in enumerate(
        [(None, of_columns), ({}, {}), ({"anchor": "w92 "}, {"anchor": "w92 "})]
    ):
        seen.clear()
        training.train(model, rows, tmp_path / str(number), steps=1, batch_size=4, prompts=given, show_progress=False)
        wanted = {(text, expected[column]) for row in rows for column, text in row.items() if column in expected}
        assert {(text, prompt) for text, prompt in seen if prompt} == wanted  # the model card counts tokens without
    model.prompts, model.default_prompt_name = {"query": "", "all": "w93 "}, "all"
    assert training.prompts_of(model, ["anchor", "positive"]) == {"positive": "w93 "}


def test_choose_profiles_a_model(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    assert run("grid", model, "--data", data, "--layers", "3", "--output", tmp_path / "grid.json")[0] == 0
    code, out, _ = run("choose", tmp_path / "grid.json", "--model", model, "--json")
    assert code == 0
    assert json.loads(out)["pick"]["layer"] == 3


def test_the_saved_model_keeps_its_own_length(run: Run, model: Path, tmp_path: Path) -> None:
    long = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}" for i in range(16)]
    (tmp_path / "pairs.tsv").write_text("anchor\tpositive\n" + "".join(f"{a}\tw1 {a}\n" for a in long))
    scored = [f"{a}\tw90 w91 w92 {a}\t{i * 7 % 5}\n" for i, a in enumerate(long)]
    (tmp_path / "sts.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(scored))
    options = ["--data", tmp_path / "pairs.tsv", "--eval", tmp_path / "sts.tsv", "--steps", 1, "--batch-size", 4]
    code, out, _ = run("train", model, tmp_path / "out", *options, "--max-length", 5, "--json")
    assert code == 0
    saved, started = (SentenceTransformer(str(folder), device="cpu") for folder in (tmp_path / "out", model))
    assert saved.max_seq_length == started.max_seq_length == 64
    assert saved.encode(long[0]).tolist() != saved.encode(long[0][:8]).tolist()
    assert '"max_length": 5' not in (tmp_path / "out" / "tokenizer.json").read_text()
    # Before as after, at the length of the training.
    evaluator = GridEvaluator(read_table(tmp_path / "sts.tsv"))
    whole = evaluator.grid(started)
    for name, each in (("before", started), ("after", saved)):
        each.max_seq_length = 5
        assert json.loads(out)[name]["scores"] == evaluator.grid(each).scores != whole.scores


@pytest.mark.parametrize("encodes_before", [False, True])
def test_a_limit_is_taken_back(encodes_before: bool) -> None:
    model = tiny_model()
    if encodes_before:  # from then on the tokenizer itself holds a length
        model.encode("w1 w2")
    before = model.max_seq_length, model.tokenizer.backend_tokenizer.truncation
    rows = model.encode("w1 w2 w3 w4"), model.encode("w1 w2 w3")
    model.tokenizer.backend_tokenizer.no_truncation()
    if encodes_before:
        model.tokenizer.backend_tokenizer.enable_truncation(**before[1])
    with training.limited_length(model, 5):
        assert model.encode("w1 w2 w3 w4").tolist() == rows[1].tolist()
    assert (model.max_seq_length, model.tokenizer.backend_tokenizer.truncation) == before
    assert model.encode("w1 w2 w3 w4").tolist() == rows[0].tolist()


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "roberta", "modernbert"])
def test_the_longest_limit_is_one(architecture: str) -> None:
    """Positions of RoBERTa's kind begin behind the one of padding."""
    model = tiny_model(architecture)
    with pytest.raises(ValueError, match="max_length must be from 1 to") as error:
        training.limited_length(model, 1000).__enter__()
    most = int(re.findall(r"from 1 to (\d+)", str(error.value))[0])
    with training.limited_length(model, most):
        assert model.encode(" ".join(["w1"] * 200)).shape == (32,)
    assert most == {"roberta": 65}.get(architecture, 64)


def test_options_of_the_loss(run: Run, model: Path, pairs: Path, tmp_path: Path, monkeypatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(training, "train", lambda *_, **options: given.update(options) or training.Trained(1.5))
    options = "--prior-layers-weight 3 --kl-weight 0.5 --kl-target scores --final-norm apply --layers-per-step 2"
    assert run("train", model, tmp_path / "out", "--data", pairs, *options.split())[0] == 0
    assert (given["prior_layers_weight"], given["kl_div_weight"]) == (3, 0.5)
    assert (given["kl_target"], given["final_norm"], given["n_layers_per_step"]) == ("scores", "apply", 2)


def test_fewer_steps_than_asked_for_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"anchor": "w1" if i < 12 else f"w{i}", "positive": f"w{i + 30}"} for i in range(16)]
    with caplog.at_level(logging.WARNING, logger="m2d_ext"):
        training.train(tiny_model(), rows, tmp_path / "out", batch_size=4, show_progress=False)
    told = [record.getMessage() for record in caplog.records if record.name == "m2d_ext"]
    assert len(told) == 1
    assert re.fullmatch(r"Trained [1-3] of 4 steps: the rows share texts and give no more batches of 4\.", told[0])


BAD_TRAINING: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"epochs": 0}, ValueError, "epochs must be more than 0 and finite, got 0"),
    ({"epochs": float("nan")}, ValueError, "epochs must be more than 0 and finite, got nan"),
    ({"steps": 0}, ValueError, "steps must be more than 0"),
    ({"learning_rate": -1.0}, ValueError, "learning_rate must be more than 0 and finite, got -1.0"),
    ({"warmup_ratio": 2}, ValueError, "warmup_ratio must be from 0 to 1, got 2"),
    ({"batch_size": 0}, ValueError, "batch_size must be more than 0"),
    ({"prompts": {"query": "w1"}}, ValueError, "prompts must be of the columns anchor, positive, got one of query"),
    ({"max_length": 0}, ValueError, "max_length must be from 1 to 64 for this model, got 0"),
    ({"max_length": 65}, ValueError, "max_length must be from 1 to 64 for this model, got 65"),
    ({"max_length": 8.0}, TypeError, "max_length must be an int or None, got float"),
    ({"dims": [33]}, ValueError, r"dims must be at most 32 for this model, got \[33\]"),
    (
        {"n_layers_per_step": 4},
        ValueError,
        "n_layers_per_step must be from 1 to 3 for this model, or -1 for all, got 4",
    ),
    ({"n_dims_per_step": 0}, ValueError, "n_dims_per_step must be from 1 to 1 for this model, or -1 for all, got 0"),
    ({"data": 3}, TypeError, "data must be a Dataset or a sequence of mappings, got int"),
    ({"data": [{"anchor": "w1"}]}, ValueError, "data must have the columns anchor and positive, got anchor"),
    (
        {"data": [{"anchor": "w1", "positive": "w2"}, {"anchor": "w3"}]},
        ValueError,
        r"data\[1\]: positive must be a text that is not empty, got None",
    ),
    (
        {"data": [{"anchor": "w1", "positive": f"w{i}"} for i in range(8)]},
        ValueError,
        "data must give at least one batch of 4 rows that share no text, got none",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_TRAINING)
def test_bad_training(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    good = Dataset.from_dict(
        {name: [f"w{i + shift}" for i in range(8)] for name, shift in (("anchor", 0), ("positive", 40))}
    )
    arguments = {"data": good, "batch_size": 4, "steps": 1, "show_progress": False} | options
    with pytest.raises(error, match=message):
        training.train(tiny_model(), output=tmp_path / "new" / "out", **arguments)
    assert not (tmp_path / "new").exists()


def fill_half(place: Path) -> None:
    with new_folder(place, overwrite=True) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    for place in (tmp_path / "a" / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with new_folder(place) as folder:
            (folder / "modules.json").write_text("[]")
            assert not (place / "modules.json").exists()
        assert [path.name for path in place.iterdir()] == ["modules.json"]
        with pytest.raises(ValueError, match="output must be new or empty"), new_folder(place):
            pass
        (place / "sub").mkdir()
        (place / "sub" / "old").write_text("")
        with pytest.raises(KeyboardInterrupt):
            fill_half(place)
        assert sorted(path.name for path in place.iterdir()) == ["modules.json", "sub"]
        with new_folder(place, overwrite=True) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "new").write_text("")
        assert [str(path.relative_to(place)) for path in sorted(place.rglob("*"))] == ["sub", "sub/new"]
        with pytest.raises(ValueError, match=r"has no modules\.json"), new_folder(place, overwrite=True):
            pass
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "b" / "c" / "new"):
        raise OSError("full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def write_model(folder: Path, text: str) -> None:
    (folder / "runs").mkdir()
    for name in ("modules.json", "model.safetensors", "runs/log"):
        (folder / name).write_text(text)


def texts_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stuck", ["out", "in"])
@pytest.mark.parametrize("name", ["modules.json", "model.safetensors", "runs"])
def test_what_cannot_be_replaced_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stuck: str
) -> None:
    """Root may move and delete everything, so it is the move that refuses here."""
    write_model(tmp_path, "old")
    before = texts_of(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == name and (target.parent == tmp_path) == (stuck == "in") and "-old-" not in str(self):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    def replace() -> None:
        with new_folder(tmp_path, overwrite=True) as folder:
            write_model(folder, "new")
            monkeypatch.setattr(Path, "rename", refuse)

    with pytest.raises(PermissionError):
        replace()
    assert texts_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "modules.json", "runs"]


def test_what_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, "old")
    rmtree = shutil.rmtree

    def delete(path: Any, *arguments: Any, **options: Any) -> None:
        if "-old-" not in str(path):
            rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", delete)
    with caplog.at_level(logging.WARNING), new_folder(tmp_path, overwrite=True) as folder:
        write_model(folder, "new")
    assert {text for name, text in texts_of(tmp_path).items() if not name.startswith(".m2d-old-")} == {"new"}
    assert "what was there cannot be deleted: it is in" in caplog.text


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("command", ["train", "cut"])
def test_a_model_that_cannot_be_saved_leaves_nothing(
    run: Run, model: Path, pairs: Path, tmp_path: Path, monkeypatch, command: str, error: BaseException
) -> None:
    def save(self: Any, path: str) -> None:
        Path(path, "half").write_text("")
        raise error

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", save)
    monkeypatch.setattr(training, "fit", lambda *_, **__: 1.0)
    options = {"train": ["--data", pairs, "--batch-size", 4, "--json"], "cut": ["--layers", 2]}[command]
    code, _, err = run(command, model, tmp_path / "new" / "out", *options)
    assert list(tmp_path.iterdir()) == []
    told = "interrupted" if isinstance(error, KeyboardInterrupt) else "No space left on device"
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert err.strip().splitlines()[-1].startswith("m2d: ")
    assert told in err
    assert "Traceback" not in err


def test_overwrite(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("cut", model, "--layers", 2, tmp_path / "out")[0] == 0
    assert run("cut", model, "--layers", 1, tmp_path / "out")[0] == 2
    code, out, _ = run("cut", model, "--layers", 1, tmp_path / "out", "--overwrite", "--json")
    assert (code, json.loads(out)["num_layers"]) == (0, 1)
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert loaded[0].auto_model.config.num_hidden_layers == 1


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interrupt_of_a_command(run: Run, model: Path, monkeypatch, error: BaseException) -> None:
    monkeypatch.setattr(cli, "_load", raiser(error))
    code, out, err = run("profile", model)
    assert (code, out, err.strip()) == (130, "", "m2d: interrupted")


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process on the spot")
@pytest.mark.parametrize("command", ["train", "cut"])
def test_sigterm_leaves_nothing_behind(
    run: Run, model: Path, pairs: Path, tmp_path: Path, monkeypatch, command: str
) -> None:
    def save(self: Any, path: str) -> None:
        Path(path, "half").write_text("")
        os.kill(os.getpid(), signal.SIGTERM)

    def handler(*_: object) -> None:
        pytest.fail("the command took no SIGTERM")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        monkeypatch.setattr(SentenceTransformer, "save_pretrained", save)
        monkeypatch.setattr(training, "fit", lambda *_, **__: 1.0)
        options = {"train": ["--data", pairs, "--batch-size", 4, "--json"], "cut": ["--layers", 2]}[command]
        code, out, err = run(command, model, tmp_path / "new" / "out", *options)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, out, err.splitlines()[-1]) == (143, "", "m2d: terminated")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("app", "code", "err"),
    [
        (raiser(KeyboardInterrupt()), 130, "m2d: interrupted\n"),
        (raiser(typer.Abort()), 130, "m2d: interrupted\n"),
        (raiser(typer.Exit(130)), 130, "m2d: interrupted\n"),
        (lambda **_: 130, 130, "m2d: interrupted\n"),
        (raiser(typer.Exit(3)), 3, ""),
        (lambda **_: 3, 3, ""),
        (raiser(typer.Exit(0)), 0, ""),
        (lambda **_: None, 0, ""),
    ],
)
def test_exits_of_all_versions_of_typer(run: Run, monkeypatch, app: Any, code: int, err: str) -> None:
    monkeypatch.setattr(cli, "app", app)
    assert run() == (code, "", err)


@pytest.mark.parametrize("command", ["train", "grid", "profile", "choose", "cut"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: m2d {command} " in out


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train", ["the model's and its halves", "the model's)", "skip|apply", "features|scores", "--kl-weight"]),
        ("grid", ["the model's and its halves", "(all)"]),
        ("profile", ["(all)"]),
        ("cut", ["(all)"]),
    ],
)
def test_help_shows_defaults_and_choices(run: Run, command: str, shown: list[str]) -> None:
    out = run(command, "--help")[1]
    assert [text for text in shown if text not in out] == []


def test_without_a_command(run: Run) -> None:
    assert run("--version") == (0, f"m2d_ext {m2d_ext.__version__}\n", "")
    code, out, err = run()
    assert (code, err) == (2, "")
    assert all(command in out for command in ("train", "grid", "profile", "choose", "cut"))


FILES = {
    "empty.tsv": "sentence1\tsentence2\tscore\n",
    "columns.tsv": "text\tcolor\nw1\tred\n",
    "pairs.txt": "w1",
    "score.tsv": "sentence1\tsentence2\tscore\nw1\tw2\t1\n\nw1\tw2\tx\n",
    "no_score.csv": 'sentence1,sentence2,score\n"w1\nw2",w2,1\nw1,w2,\n',
    "text.tsv": "sentence1\tsentence2\tscore\nw1\tw2\t1\n \tw2\t1\n",
    "label.tsv": "sentence1\tsentence2\tlabel\nw1\tw2\t1\nw1\tw2\t2\n",
    "one.tsv": "sentence1\tsentence2\tscore\nw1\tw2\t1\n",
    "long.tsv": "anchor\tpositive\nw1\tw2\tw3\n",
    "short.csv": "anchor,positive\nw1,w2\nw3\n",
    "twice.csv": "anchor,positive,anchor\nw1,w2,w3\n",
    "quote.csv": 'anchor,positive\n"w1,w2\nw3,w4\n',
    "types.jsonl": '{"anchor": "w1", "positive": "w2"}\n\n{"anchor": 7, "positive": "w2"}\n',
    "lacks.jsonl": '{"anchor": "w1", "positive": "w2"}\n{"anchor": "w3"}\n',
    "broken.jsonl": '{"anchor": "w1", "positive": "w2"}\n{"anchor": w1}\n',
    "list.jsonl": '{"anchor": "w1", "positive": "w2"}\n[1]\n',
    "list.json": '[{"anchor": "w1", "positive": "w2"}, {"anchor": "w1", "positive": null}]',
    "plain.tsv.gz": "anchor\tpositive\n",
    "number.json": "3",
}
GRID = {"layers": [1, 2], "dims": [8], "scores": [[0.5], [0.75]], "metric": "ndcg"}
PROFILE = {
    "layers": [1, 2],
    "texts_per_second": [2.0, 1.0],
    "latency_ms": [1.0, 2.0],
    "parameter_bytes": [8, 16],
    "peak_bytes": None,
    "bytes_per_dim": 4,
    "batch_size": 64,
    "machine": {},
}


def write_files(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "bytes.tsv").write_bytes(b"\xff\xfe\x00")
    (folder / "cut.tsv.gz").write_bytes(gzip.compress(b"anchor\tpositive\n" + bytes(range(256)) * 9)[:40])
    (folder / "grid.json").write_text(json.dumps(GRID))
    (folder / "deep_grid.json").write_text(json.dumps(GRID | {"layers": [1, 9]}))
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    (folder / "short_profile.json").write_text(json.dumps(PROFILE | {"latency_ms": [1.0]}))
    (folder / "broken_model").mkdir()
    (folder / "broken_model" / "modules.json").write_text("{")


BAD: list[tuple[list[str], str]] = [
    (["grid", "MODEL", "--data", "TMP/none.tsv"], "there is no file TMP/none.tsv"),
    (["grid", "MODEL", "--data", "TMP/empty.tsv"], "at least one row, got none"),
    (["grid", "MODEL", "--data", "TMP/columns.tsv"], "must have the columns of one of: .* got color, text"),
    (["grid", "MODEL", "--data", "TMP/pairs.txt"], "must end in .tsv, .csv, .jsonl, .json, perhaps with .gz"),
    (["grid", "TMP/no/model", "--data", "DATA"], "there is no folder TMP/no/model"),
    (["grid", "MODEL", "--data", "DATA", "--dims", "64"], "m2d: --dims must be at most 32 for this model, got .64."),
    (["grid", "MODEL", "--data", "DATA", "--dims", "8,x"], "--dims must be numbers with commas between, got '8,x'"),
    (
        ["grid", "MODEL", "--data", "DATA", "--layers", "9"],
        "m2d: --layers must be distinct and from 0 to 3 for this model",
    ),
    (["grid", "MODEL"], "Missing option '--data'"),
    (["cut", "MODEL", "TMP/out"], "give --layers, --dim or both"),
    (["cut", "MODEL", "--layers", "7", "TMP/out"], "m2d: --layers must be from 0 to 3 for this model, got 7"),
    (["cut", "MODEL", "--dim", "64", "TMP/out"], "m2d: --dim must be from 1 to 32 for this model, got 64"),
    (["cut", "MODEL", "--dim", "x", "TMP/out"], "Invalid value for '--dim'"),
    (["cut", "MODEL", "--dim", "4", "TMP"], "TMP exists and is not an empty folder"),
    (["choose", "TMP/none.json", "--profile", "TMP/none.json"], "there is no file TMP/none.json"),
    (["choose", "TMP/columns.tsv", "--profile", "TMP/columns.tsv"], "is no grid"),
    (
        ["choose", "TMP/deep_grid.json", "--model", "MODEL"],
        "m2d: GRID's layers must be from 0 to 3 for this model, got 9",
    ),
    (["choose", "TMP/columns.tsv"], "give one of --profile and --model"),
    (["choose", "TMP/number.json", "--profile", "TMP/profile.json"], "is no grid: a grid must be an object, got 3"),
    (["choose", "TMP/grid.json", "--profile", "TMP/number.json"], "is no profile: a profile must be an object, got 3"),
    (
        ["choose", "TMP/grid.json", "--profile", "TMP/grid.json"],
        "is no profile: a profile must have 'texts_per_second'",
    ),
    (
        ["choose", "TMP/grid.json", "--profile", "TMP/short_profile.json"],
        "short_profile.json is no profile: latency_ms must be a list of 2 numbers, got .1.0.",
    ),
    (
        ["choose", "TMP/grid.json", "--profile", "TMP/profile.json", "--max-bytes", "1"],
        "m2d: no cell has at most 1 bytes per vector: the best quality",
    ),
    (
        ["choose", "TMP/grid.json", "--profile", "TMP/profile.json", "--min-quality", "nan"],
        "--min-quality must be a number or a share such as '98%', got 'nan'",
    ),
    (
        ["choose", "TMP/grid.json", "--profile", "TMP/profile.json", "--max-latency", "nan"],
        "--max-latency must be a number, got nan",
    ),
    (["choose", "TMP/grid.json", "--profile", "TMP/profile.json", "--plot", "TMP/p.xyz"], "--plot must end in .*png"),
    (["grid", "MODEL", "--data", "TMP/score.tsv"], "TMP/score.tsv, line 4: score must be a finite number, got 'x'"),
    (
        ["grid", "MODEL", "--data", "TMP/no_score.csv"],
        "TMP/no_score.csv, line 4: score must be a finite number, got ''",
    ),
    (["grid", "MODEL", "--data", "TMP/text.tsv"], "TMP/text.tsv, line 3: sentence1 must be a text .*, got ' '"),
    (["grid", "MODEL", "--data", "TMP/label.tsv"], "TMP/label.tsv, line 3: label must be 0 or 1, got 2"),
    (["grid", "MODEL", "--data", "TMP/one.tsv"], "TMP/one.tsv must hold at least two rows"),
    (["grid", "MODEL", "--data", "TMP/long.tsv"], "TMP/long.tsv, line 2: must have 2 values, as the first has, got 3"),
    (
        ["grid", "MODEL", "--data", "TMP/short.csv"],
        "TMP/short.csv, line 3: must have 2 values, as the first has, got 1",
    ),
    (["grid", "MODEL", "--data", "TMP/twice.csv"], "TMP/twice.csv must have distinct columns, but 'anchor' is there"),
    (["grid", "MODEL", "--data", "TMP/quote.csv"], "TMP/quote.csv, line 3: unexpected end of data"),
    (["grid", "MODEL", "--data", "TMP/types.jsonl"], "TMP/types.jsonl, line 3: anchor must be a text .*, got 7"),
    (["grid", "MODEL", "--data", "TMP/lacks.jsonl"], "TMP/lacks.jsonl, line 2: positive must be a text .*, got None"),
    (["grid", "MODEL", "--data", "TMP/broken.jsonl"], "TMP/broken.jsonl, line 2, character 12: Expecting value"),
    (["grid", "MODEL", "--data", "TMP/list.jsonl"], "TMP/list.jsonl, line 2: must be an object of columns, got .1."),
    (["grid", "MODEL", "--data", "TMP/list.json"], r"TMP/list.json\[1\]: positive must be a text .*, got None"),
    (["grid", "MODEL", "--data", "TMP/plain.tsv.gz"], "TMP/plain.tsv.gz cannot be read: Not a gzipped file"),
    (["grid", "MODEL", "--data", "TMP/cut.tsv.gz"], "TMP/cut.tsv.gz cannot be read: Compressed file ended before"),
    (["grid", "MODEL", "--data", "TMP/bytes.tsv"], "TMP/bytes.tsv cannot be read: 'utf-8' codec can't decode"),
    (["grid", "MODEL", "--data", "no_such_name"], "--data no_such_name is no file, and no dataset that can be loaded"),
    (["cut", "TMP/broken_model", "--dim", "4", "TMP/out"], "TMP/broken_model is no model that can be loaded: "),
    # Where results go is looked at before anything is loaded: here, what there is not.
    (["grid", "TMP/no", "--data", "TMP/no", "--output", "TMP"], "--output must be a file, but TMP is a folder"),
    (["grid", "TMP/no", "--data", "TMP/no", "--csv", "TMP/pairs.txt/x"], "--csv must be where files can be written"),
    (["grid", "TMP/no", "--data", "TMP/no", "--heatmap", "TMP/a"], "--heatmap must end in .*png.*, got TMP/a"),
    (["grid", "TMP/no", "--data", "TMP/no", "--curves", "TMP/a.xyz"], "--curves must end in .*png.*, got TMP/a.xyz"),
    (["profile", "TMP/no/model", "--output", "TMP"], "--output must be a file, but TMP is a folder"),
    (["train", "TMP/no", "TMP/out", "--data", "TMP/no", "--heatmap", "a.png"], "--heatmap needs --eval"),
    (["train", "TMP/no", "TMP", "--data", "TMP/no"], "OUTPUT must be new or empty, but TMP exists"),
    (["train", "TMP/no", "TMP", "--data", "TMP/no", "--overwrite"], "but TMP has no modules.json"),
    (["train", "TMP/no", "TMP/pairs.txt", "--data", "TMP/no"], "OUTPUT must be a folder, but TMP/pairs.txt is a file"),
    (["cut", "TMP/no/model", "--dim", "4", "TMP/pairs.txt/x"], "OUTPUT must be where files can be written"),
    (
        ["train", "MODEL", "TMP/out", "--data", "PAIRS", "--batch-size", "4", "--epochs", "0"],
        "--epochs must be more than 0",
    ),
    (["train", "MODEL", "TMP/out", "--data", "PAIRS", "--batch-size", "4", "--lr", "nan"], "--lr must be more than 0"),
    (
        ["train", "MODEL", "TMP/out", "--data", "PAIRS", "--batch-size", "4", "--layers-per-step", "9"],
        "--layers-per-step must be from 1 to 3 for this model, or -1 for all, got 9",
    ),
    (
        ["train", "MODEL", "TMP/out", "--data", "PAIRS", "--batch-size", "4", "--max-length", "99"],
        "--max-length must be from 1 to 64 for this model, got 99",
    ),
    (["profile", "MODEL", "--layers", "5"], "m2d: --layers must be from 0 to 3 for this model, got 5"),
    (
        ["train", "MODEL", "TMP/out", "--data", "PAIRS", "--batch-size", "4", "--dims", "64"],
        "m2d: --dims must be at most 32 for this model, got .64.",
    ),
    (["train", "MODEL", "TMP/out", "--data", "DATA"], "must have the columns anchor and positive, got sentence1"),
    (["train", "MODEL", "TMP/out", "--data", "PAIRS"], "must hold at least a batch of 64 rows, got 24"),
    (["train", "MODEL", "TMP/out", "--data", "PAIRS", "--kl-target", "x"], "Invalid value for '--kl-target'"),
    (["train", "MODEL", "TMP/out"], "Missing option '--data'"),
    (["frobnicate"], "No such command 'frobnicate'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line(
    run: Run, model: Path, data: Path, pairs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_files(tmp_path)
    before = set(tmp_path.rglob("*"))
    places: dict[str, Any] = {"MODEL": model, "DATA": data, "PAIRS": pairs, "TMP": tmp_path}

    def filled(text: str) -> str:
        return re.sub("|".join(places), lambda match: str(places[match[0]]), text)

    code, out, err = run(*map(filled, arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("m2d: ")
    assert err.count("\n") == 1
    assert re.search(filled(message), err), err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["accelerate", "datasets"])
def test_training_says_what_is_not_installed(
    run: Run, model: Path, pairs: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    loaded = tiny_model()
    monkeypatch.setattr(cli, "_load", lambda _: loaded)  # whose libraries look for it, too
    monkeypatch.setitem(sys.modules, name, None)  # Python then behaves as if it were not installed
    code, out, err = run("train", model, tmp_path / "out", "--data", pairs, "--batch-size", 4)
    assert (code, out, err.splitlines()[-1]) == (2, "", f"m2d: training needs {name}: pip install 'm2d_ext[cli]'")
    assert list(tmp_path.iterdir()) == []


def test_a_named_dataset_needs_datasets(run: Run, model: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, out, err = run("grid", model, "--data", "some/name")
    told = "m2d: --data some/name is no file, and a dataset's name needs datasets: pip install 'm2d_ext[cli]'\n"
    assert (code, out, err) == (2, "", told)
