"""What JSON must hold to be a grid or a profile. Each check says what the field was, and what it must be."""

import math
from collections.abc import Collection
from typing import Any


def check_object(what: str, data: Any, known: Collection[str], needed: Collection[str]) -> None:
    """An object with the needed fields and none but the known ones.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a {what} must be an object, got {_shown(data)}")
    for name in needed:
        if name not in data:
            raise ValueError(f"a {what} must have {name!r}")
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"a {what} has no {unknown[0]!r}")


def check_type(name: str, value: Any, kind: type) -> None:
    """ValueError where the value is of another type."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {_NAMES[kind]}, got {_shown(value)}")


def check_counts(name: str, value: Any, least: int) -> None:
    """ValueError where the value is no list of distinct ints from ``least`` up."""
    if (
        not isinstance(value, list)
        or not value
        or any(not isinstance(each, int) or isinstance(each, bool) or each < least for each in value)
        or len(set(value)) < len(value)
    ):
        raise ValueError(f"{name} must be a list of distinct whole numbers from {least} up, got {_shown(value)}")


def check_numbers(name: str, value: Any, count: int, least: float = -math.inf, allow_none: bool = False) -> None:
    """ValueError where the value is no list of so many finite numbers, none below ``least``, or perhaps None."""
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name} must be a list of {count} numbers, got {_shown(value)}")
    for each in value:
        if each is None and allow_none:
            continue
        if not _is_number(each) or not math.isfinite(each) or each < least:
            bound = "" if least == -math.inf else f" from {least:g} up"
            raise ValueError(f"{name} must be finite numbers{bound}, got {_shown(each)}")


def check_rows(name: str, value: Any) -> None:
    """ValueError where the value is no list of lists of numbers, which need not be finite, or None."""
    if not isinstance(value, list) or not all(
        isinstance(row, list) and all(each is None or _is_number(each) for each in row) for row in value
    ):
        raise ValueError(f"{name} must be a list of numbers per layer, got {_shown(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_NAMES: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    int: "a whole number",
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
