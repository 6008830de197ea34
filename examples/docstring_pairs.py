"""Text pairs from the docstrings of the installed packages: summary (the anchor) and body (the positive).

A few thousand real (short text, long text) pairs on any machine with Python, without a download. Source files are
parsed with `ast` and never imported. One environment always gives the same pairs.

Run on its own, it writes the pairs as tab-separated files to look at:

    python examples/docstring_pairs.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_PAIRS = 10_000
# Hash-ordered files of a package are read until one of these is reached, so that no giant (sympy, torch) sets the
# tone of the data or the time it takes to read it.
MAX_PAIRS_PER_PACKAGE = 800
MAX_FILES_PER_PACKAGE = 200
MAX_FILE_BYTES = 200_000
HELD_OUT_FRACTION = 0.2

# Vendored copies would put one text into two packages, hence on both sides of the split.
SKIPPED_FOLDER = re.compile(
    r"tests?|testing|idle_test|site-packages|dist-packages|node_modules|"
    r"_?vendor|_?vendored|extern|externals|_distutils"
)

SECTION = re.compile(
    r"^(args|arguments|attributes|caveats|changed in .*|deprecated.*|examples?|example usage|inputs?|keyword arg\w*|"
    r"kwargs|methods|notes?|options|other parameters|outputs?|parameters?|params|raises|references|returns?|see also|"
    r"shape|todo|usage|versionadded.*|warns?|warnings?|yields?)\s*:*$",
    re.IGNORECASE,
)
FIELD = re.compile(r"^\s*([:@](param|arg|type|return|rtype|raise|keyword|var|ivar)\w*|>>>|\.\. |[-=~+|*#`^]{3,})")
SENTENCE_END = re.compile(r"(?<=[^.A-Z][.!?])\s+(?=[\"'`(]?[A-Z])")
ROLE = re.compile(r":[\w:]+:`~?([^`<]+)(?:<[^`]*>)?`")
MARKUP = re.compile(r"`+|\*\*|\\")
NOT_LETTER = re.compile(r"[^A-Za-z ]")
SPACES = re.compile(r"\s+")
NOT_WORD = re.compile(r"[\W_]+")
COMMON_WORD = re.compile(
    r"\b(a|an|and|are|as|at|be|been|but|by|can|for|from|has|have|if|in|into|is|it|its|may|must|no|not|of|on|only|or|"
    r"so|such|than|that|the|then|there|these|they|this|to|used|using|was|when|where|which|will|with|you)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pair:
    """A docstring's summary and body, and the top-level package it came from."""

    anchor: str
    positive: str
    package: str


@dataclass
class PairSplit:
    """Training and held-out pairs; no package, summary or body is in both."""

    train: list[Pair] = field(default_factory=list)
    held_out: list[Pair] = field(default_factory=list)


def harvest(
    roots: Iterable[Path] | None = None,
    max_pairs: int = MAX_PAIRS,
    track: Callable[[list], Iterable] = iter,
) -> PairSplit:
    """Collect pairs from every package under `roots` (default: the standard library and the installed packages).

    `track` wraps the list of packages that is iterated over: the place for a progress bar.
    """
    pairs: list[Pair] = []
    seen: set[str] = set()
    for name, files in track(find_packages(installed_roots() if roots is None else roots)):
        pairs += package_pairs(name, files, seen)
    pairs = sorted(pairs, key=lambda pair: stable_hash(pair.anchor))[:max_pairs]
    split = PairSplit()
    for pair in pairs:
        (split.held_out if is_held_out(pair.package) else split.train).append(pair)
    return split


def installed_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def find_packages(roots: Iterable[Path]) -> list[tuple[str, list[Path]]]:
    """(name, Python files) of each top-level package or module, in an order that depends only on the names."""
    packages: dict[str, list[Path]] = {}
    for root in roots:
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and entry.name.isidentifier() and not SKIPPED_FOLDER.fullmatch(entry.name):
                packages.setdefault(entry.name, []).extend(source_files(entry))
            elif entry.suffix == ".py":
                packages.setdefault(entry.stem, []).append(entry)
    return sorted((name, files) for name, files in packages.items() if files)


def source_files(package: Path) -> list[Path]:
    """A package's Python files, in an order that mixes its parts but is the same on every machine."""
    files = []
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        if not any(map(SKIPPED_FOLDER.fullmatch, parts[:-1])) and not re.match(r"test_|conftest", parts[-1]):
            files.append((stable_hash("/".join(parts)), path))
    return [path for _, path in sorted(files)][:MAX_FILES_PER_PACKAGE]


def package_pairs(name: str, files: list[Path], seen: set[str]) -> list[Pair]:
    """Pairs of one package whose summary and body are not in `seen`, which is extended by them."""
    pairs: list[Pair] = []
    for path in files:
        for docstring in file_docstrings(path):
            texts = summary_and_body(docstring)
            if texts is None:
                continue
            keys = {text_key(text) for text in texts}
            if len(keys) == 2 and seen.isdisjoint(keys):
                seen |= keys
                pairs.append(Pair(*texts, package=name))
                if len(pairs) == MAX_PAIRS_PER_PACKAGE:
                    return pairs
    return pairs


def file_docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a file's module, classes and functions; nothing for a file that cannot be parsed."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like in other people's files
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    # Only statements have a `body`; `ast.walk` would spend most of its time inside expressions.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        nodes += reversed(getattr(node, "body", []))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def summary_and_body(docstring: str) -> tuple[str, str] | None:
    """The first sentence and the prose after it, up to the first parameter section; None if either is no prose."""
    lines = prose_lines(docstring)
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
    summary, *rest_of_first = SENTENCE_END.split(plain(paragraphs[0]), maxsplit=1)
    body = plain(" ".join(rest_of_first + paragraphs[1:]))
    if len(summary) > 200 or len(summary.split()) < 3 or len(body.split()) < 8:
        return None
    return (summary, body[:1000]) if is_english(summary, 1) and is_english(body, 3) else None


def prose_lines(docstring: str) -> list[str]:
    """The lines before the first section, field list, example or table."""
    lines: list[str] = []
    for line in docstring.splitlines():
        if FIELD.match(line):
            # An underline also ends the prose, and takes the title above it along.
            return lines[:-1] if re.match(r"^\s*[-=~^]{3,}\s*$", line) else lines
        if SECTION.match(line.strip().strip("*")):
            return lines
        lines.append(line)
    return lines


def plain(text: str) -> str:
    """Text without reStructuredText or Markdown marks, on one line."""
    return SPACES.sub(" ", MARKUP.sub("", ROLE.sub(r"\1", text))).strip()


def is_english(text: str, min_common_words: int) -> bool:
    """Whether a text reads like a sentence rather than like code, a table or another language."""
    letters = len(text) - len(NOT_LETTER.findall(text))
    return letters >= 0.85 * len(text) and len(COMMON_WORD.findall(text)) >= min_common_words


def text_key(text: str) -> str:
    """Texts that differ in case or punctuation, or only after their first 100 letters, count as one."""
    return NOT_WORD.sub("", text.lower())[:100]


def is_held_out(package: str) -> bool:
    """The side of the split, by package: neighbours in one package share wording, so they stay together."""
    return stable_hash(package) < HELD_OUT_FRACTION * 2**64


def stable_hash(text: str) -> int:
    """64 bits that, unlike `hash`, are the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: docstring_pairs.py OUTPUT_DIR")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    split = harvest()
    for name, pairs in (("train", split.train), ("held_out", split.held_out)):
        rows = "".join(f"{pair.anchor}\t{pair.positive}\t{pair.package}\n" for pair in pairs)
        (folder / f"{name}.tsv").write_text("anchor\tpositive\tpackage\n" + rows, encoding="utf-8")
        print(f"{len(pairs):,} pairs in {folder / name}.tsv")


if __name__ == "__main__":
    main()
