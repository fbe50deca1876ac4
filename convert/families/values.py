"""Settings as files and --set spell them -> values: one function for each kind, raising ValueError("what is allowed").

The spellings here are YAML's, which several sources share; a source with its own (OpenAI's flags) reads its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import yaml


def literal(text: str) -> Any:
    """The YAML value of a --set, or the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    # Python's own errors: of a date without such a day, a number too long to read, brackets too deep, a tag on anything
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError):
        return text


def integer(value: Any) -> int:
    """A whole number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an integer")
    return value


def number(value: Any) -> float:
    """A finite number, or text of one: YAML 1.1 takes 1e-4 for text."""
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError("a number")
    return found


def positive(value: Any) -> float:
    """A finite number above 0."""
    if (found := number(value)) <= 0:
        raise ValueError("a number above 0")
    return found


def boolean(value: Any) -> bool:
    """True or false; 0 and 1 are neither."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def one_of(*allowed: str) -> Callable[[Any], str]:
    """One of these names."""

    def read(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return read
