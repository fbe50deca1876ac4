"""Conversion: match names, fill the model's parameters, one report of all that does not fit.

Every source tensor matches exactly one rule or one reasoned ignore; every parameter is filled exactly once; shapes
agree; values are finite. Nothing is returned unless all of it holds. No torch here: tensors come as NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from convert.rules import Rules, source_of, target_leaf, targets_of, to_layout, torch_shape

SHOWN = 8


class ConversionError(ValueError):
    """A source that cannot be converted, with what was found and what to do about it."""


def fill(
    source: Mapping[str, NDArray],
    expected: Mapping[str, tuple[int, ...]],
    rules: Rules,
    ignored: Mapping[str, str] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The model's parameters, by dotted path, from a source's tensors.

    source: torch names -> arrays in torch's layout. expected: parameter paths -> shapes. rules: `convert.rules`.
    ignored: source names that are not weights -> the reason. Raises ConversionError naming every tensor that is
    missing, unexpected, of a wrong shape, not floating point or not finite.
    """
    ignored = ignored or {}
    filled: dict[str, NDArray[np.float32]] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for name, array in source.items():
        if name in ignored:
            continue
        module, _, kind = name.rpartition(".")
        leaves = [leaf for target in targets_of(module, rules) if (leaf := target_leaf(target, kind, expected))]
        if len(leaves) != 1:
            problems.append(f"unexpected {name} {array.shape}" if not leaves else f"{name} matches {len(leaves)} rules")
            continue
        leaf = leaves[0]
        if leaf in origin:
            problems.append(f"{name} and {origin[leaf]} both fill {leaf}")
            continue
        origin[leaf] = name
        if not np.issubdtype(array.dtype, np.floating):
            problems.append(f"{name} holds {array.dtype}, not floating point numbers")
            continue
        value = to_layout(array, expected[leaf])
        if value.shape != expected[leaf]:
            problems.append(f"{name} has shape {array.shape}, expected {torch_shape(expected[leaf], array)}")
            continue
        value = np.ascontiguousarray(value, dtype=np.float32)
        if not np.isfinite(value).all():
            problems.append(f"{name} holds {np.count_nonzero(~np.isfinite(value))} NaN or infinite values")
            continue
        filled[leaf] = value
    problems += [f"missing {source_of(leaf, rules)}" for leaf in expected if leaf not in origin]
    if problems:
        raise ConversionError(in_one_line(f"{len(problems)} tensors do not fit the model", problems))
    return filled


def in_one_line(summary: str, problems: list[str]) -> str:
    """`summary: first; second; ... and n more`, the one-line report of related failures."""
    more = f"; ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{summary}: " + "; ".join(problems[:SHOWN]) + more
