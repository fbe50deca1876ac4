"""Settings as files and --set spell them -> values: one function for each kind, raising ValueError("what is allowed").

The spellings here are YAML's, which several sources share; a source with its own (OpenAI's flags) reads those.
`parse` reads a family's settings, each by the function that the family names for it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from typing import Any, TypeGuard

import yaml

from jddim.config import did_you_mean

from ..engine import shortened
from ..files.pickles import printable


def parse(
    told: Mapping[str, Mapping[str, Any]], parsers: Mapping[str, Callable[[Any], Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Settings' values, and a sentence on each key that is none and each value that its parser refuses.

    told: where settings are from, as the sentences call it -> key -> value; each is parsed, and the last there wins.
    parsers: every setting -> the function that reads it.
    """
    parsed, problems = {}, []
    for origin, values in told.items():
        for key, value in values.items():
            if key not in parsers:
                problems.append(f"unknown {origin} key {key!r}{did_you_mean(str(key), parsers)}")
                continue
            try:
                parsed[key] = parsers[key](value)
            except ValueError as error:
                problems.append(f"{origin}: {key} must be {error}, got {value!r}")
    return parsed, problems


def section(config: Any, *keys: str) -> Mapping[str, Any]:
    """What a config has under these keys, one in the other; {} if there is no section."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


_ELSEWHERE = ("training", "train", "optim", "optimizer", "sampling", "ema")
"""Sections of a config that are not on the network and its schedule, whatever their keys are called."""


def sections(config: Mapping[str, Any] | None, known: Collection[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The known keys of a config, flat or in sections; the keys that are not read; a sentence on each contradiction.

    A section in which nothing is known counts as one key that is not read.
    """
    told: dict[str, Any] = {}
    problems = []

    def visit(entries: Mapping[str, Any], path: str) -> list[str]:
        unread = []
        for key, value in entries.items():
            name = f"{path}{key}"
            if key in known:
                if (first := told.setdefault(key, value)) != value:
                    both = (printable(repr(each), 60) for each in (first, value))
                    problems.append(f"config: {key} is {' in one section and '.join(both)} in another")
            elif isinstance(value, Mapping) and key not in _ELSEWHERE:
                before = len(told)
                inner = visit(value, f"{name}.")
                unread += inner if len(told) > before else [name]
            else:
                unread.append(name)
        return unread

    return told, visit(config or {}, ""), problems


def not_read(unread: list[str]) -> list[str]:
    """For a plan's notes: the keys of a config that no family knows."""
    return [f"config: not read: {shortened([printable(name) for name in unread])}"] if unread else []


def misspelt(odd: list[str], known: Collection[str], file: str) -> tuple[list[str], list[str]]:
    """Of unknown keys of diffusers' configs: what is wrong with those that are near a known one; and the rest."""
    near = {key: found[0] for key in odd if (found := difflib.get_close_matches(key, known, n=1))}
    problems = [
        f"{file}: unknown key {printable(key)!r}, which diffusers ignores (did you mean {meant!r}?)"
        for key, meant in near.items()
    ]
    return problems, [key for key in odd if key not in near]


def settling(told: Mapping[str, Any], assumed: list[str]) -> Callable[[str, Any, str], Any]:
    """`settle(key, default, why)`: the value told, or else the default, with a sentence on it added to `assumed`."""

    def settle(key: str, default: Any, why: str) -> Any:
        if key not in told:
            assumed.append(f"{key} = {default} ({why})")
        return told.get(key, default)

    return settle


def asking(keys: Iterable[str], told: Container[str], missing: Iterable[str] = ()) -> tuple[str, ...]:
    """What `jddim info` asks for: the KEY=WHAT of `missing`, and KEY=VALUE of every other key that nothing told.

    keys: settings that no tensor tells and that runs of the source differ in. missing: those without a safe default.
    """
    missing = tuple(missing)
    without = {ask.partition("=")[0] for ask in missing}
    return (*missing, *(f"{key}=VALUE" for key in keys if key not in told and key not in without))


def literal(text: str) -> Any:
    """The YAML value of a --set, or the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    # Python's own errors: of a date without such a day, a number too long to read, brackets too deep, a tag on anything
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError):
        return text


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number, as which Python takes true and false too."""
    return isinstance(value, int) and not isinstance(value, bool)


def integer(value: Any) -> int:
    """A whole number; true and false are none."""
    if not is_integer(value):
        raise ValueError("an integer")
    return value


def integers(value: Any) -> tuple[int, ...]:
    """Whole numbers: one, a list of them, or text of them with commas between."""
    if isinstance(value, str):  # --set ch_mult=1,2,2
        value = [literal(part) for part in value.split(",")]
    items = value if isinstance(value, list) else [value]
    if not all(map(is_integer, items)):
        raise ValueError("integers (KEY=1,2,2)")
    return tuple(items)


def whole(value: float) -> float:
    """A number as one writes it: 2 for 2.0, and 1.5."""
    return int(value) if value == int(value) else value


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


def sides(value: Any) -> tuple[int, int]:
    """(height, width) from the side of a square, text "HEIGHTxWIDTH", or both sides."""
    if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
        value = [int(side) for side in value.split("x")]
    found = value if isinstance(value, (tuple, list)) else (value, value)
    if len(found) != 2 or not all(map(is_integer, found)):
        raise ValueError("an integer, HEIGHTxWIDTH or (height, width)")
    return found[0], found[1]


def boolean(value: Any) -> bool:
    """True or false; 0 and 1 are neither."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def one_of(*allowed: str) -> Callable[[Any], str]:
    """One of these names."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return read
