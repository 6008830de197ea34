"""Rows with named columns, from a file or from memory, whose every error says where."""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")

# The csv module's own limit of 2^17 characters is shorter than some documents.
LONGEST_VALUE = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """Columns of equally many values.

    Args:
        name: of the file; "data" for what is in memory.
        columns: the values by column.
        lines: of the file, one per row; None: rows are counted from 0.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def place(self, row: int) -> str:
        """Where a row is, for an error."""
        return f"{self.name}[{row}]" if self.lines is None else f"{self.name}, line {self.lines[row]}"

    def need(self, *columns: str) -> None:
        """ValueError where one of the columns is missing."""
        if not set(columns) <= set(self.columns):
            known = ", ".join(self.columns)
            raise ValueError(f"{self.name} must have the columns {' and '.join(columns)}, got {known}")

    def texts(self, column: str) -> list[str]:
        """The values of a column.

        Raises:
            ValueError: one is no text, or has nothing but spaces.
        """
        for row, text in enumerate(self.columns[column]):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{self.place(row)}: {column} must be a text that is not empty, got {text!r}")
        return self.columns[column]

    def numbers(self, column: str) -> list[float]:
        """The values of a column, which may be written out.

        Raises:
            ValueError: one is no number, or not finite.
        """
        return [self._number(column, row, value) for row, value in enumerate(self.columns[column])]

    def _number(self, column: str, row: int, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{self.place(row)}: {column} must be a finite number, got {value!r}")
        return number


def table_of(data: Any, kinds: str = "a Dataset or a sequence of mappings") -> Table:
    """Rows in memory: a ``datasets.Dataset`` or a sequence of mappings. A table stays what it is.

    Args:
        data: the rows.
        kinds: what the error says that they must be.

    Raises:
        TypeError: other data.
        ValueError: no rows.
    """
    if isinstance(data, Table):
        return data
    if hasattr(data, "column_names"):  # datasets.Dataset
        columns = {str(name): list(data[name]) for name in data.column_names}
    elif isinstance(data, Sequence) and not isinstance(data, str) and all(isinstance(row, Mapping) for row in data):
        columns = _columns_of(data)
    else:
        raise TypeError(f"data must be {kinds}, got {type(data).__name__}")
    return _with_rows(Table("data", columns))


def read_table(path: str | Path) -> Table:
    """Rows of a .tsv, .csv, .jsonl or .json file, perhaps .gz.

    Values of .tsv and .csv files are the texts that stand there: "NA" is one, and "007". Blank lines are left out.

    Raises:
        ValueError: a file of another kind, that cannot be read, or that holds no rows; lines that are none of its
            kind, or of more or fewer values than the first.
    """
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}, perhaps with .gz")
    try:
        with _opened(path) as file, _long_values():
            table = _read_json(path, file) if kind in (".jsonl", ".json") else _read_separated(path, file, kind)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _with_rows(table)


def _opened(path: Path) -> TextIO:
    open_text: Any = gzip.open if path.suffix == ".gz" else open
    return open_text(path, "rt", encoding="utf-8-sig", newline="")


@contextmanager
def _long_values() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_VALUE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _with_rows(table: Table) -> Table:
    if len(table) == 0:
        raise ValueError(f"{table.name} must hold at least one row, got none")
    return table


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """With None where a row lacks a column of another."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {str(name): [row.get(name) for row in rows] for name in names}


def _read_separated(path: Path, file: TextIO, kind: str) -> Table:
    # Quotation marks are text in tab-separated files, as everywhere in this field.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
    reader = csv.reader(file, **options)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    header = rows.pop(0)[1] if rows else []
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} must have distinct columns, but {repeated[0]!r} is there twice")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: must have {len(header)} values, as the first has, got {len(row)}")
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(header)}
    return Table(str(path), columns, [line for line, _ in rows])


def _read_json(path: Path, file: TextIO) -> Table:
    """An object per line, or one list of them."""
    text = file.read()
    if text.lstrip().startswith("["):
        rows = _parsed(path, text, 1)
        table = Table(str(path), {})
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [_parsed(path, line, number) for number, line in lines]
        table = Table(str(path), {}, [number for number, _ in lines])
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{table.place(i)}: must be an object of columns, got {json.dumps(row)[:40]}")
    return Table(table.name, _columns_of(rows), table.lines)


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}, character {error.colno}"
        raise ValueError(f"{place}: {error.msg}") from error
