"""Every loss class of sentence-transformers in each of our classes: held to sentence-transformers' own, and the table
in docs/losses.md held to what comes out. `surface.py` says how.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest
import sentence_transformers
import transformers
from packaging.version import Version

import surface
from surface import ROWS, WRAPPERS, Row

TABLE = Path(__file__).resolve().parents[1] / "docs" / "losses.md"

pytestmark = [
    pytest.mark.skipif(
        Version(sentence_transformers.__version__).release[:2] != (6, 2),
        reason="the behaviour to match is that of sentence-transformers 6.2, whichever version is installed",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_equal_to_sentence_transformers(row: Row, wrapper: str) -> None:
    assert 0 <= surface.cell(row, wrapper).worst_ratio <= 1  # of the allowed error


def test_no_class_is_missing() -> None:
    assert {row.loss for row in ROWS} == surface.exported_losses()


def test_table_is_up_to_date() -> None:
    assert TABLE.read_text() == surface.render(), "regenerate docs/losses.md: make loss-table"


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description="Write docs/losses.md from what every loss class does.").parse_args()
    logging.getLogger().addHandler(logging.NullHandler())  # what the random configurations are warned of
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    TABLE.write_text(surface.render())


if __name__ == "__main__":
    main()
