"""Conversion: match names, fill the model's parameters, one report of all that does not fit.

Every source tensor matches exactly one rule or one reasoned ignore; every parameter is filled exactly once; shapes
agree; values are finite. Nothing is returned unless all of it holds. No torch here: tensors come as NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.mapped import FLOATS, release
from convert.rules import Rules, source_of, target_leaf, targets_of, to_layout, torch_shape


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
    missing, unexpected, of a wrong shape, not floating point or not finite (the first few of each kind).
    """
    ignored = ignored or {}
    filled: dict[str, NDArray[np.float32]] = {}
    origin: dict[str, str] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "not usable": [], "rules": []}
    for name, array in source.items():
        if name in ignored:
            continue
        module, _, kind = name.rpartition(".")
        leaves = [leaf for target in targets_of(module, rules) if (leaf := target_leaf(target, kind, expected))]
        if not leaves:
            problems["unexpected"].append(f"unexpected {name} {array.shape}")
            continue
        if len(leaves) > 1:
            problems["rules"].append(f"{name} matches {len(leaves)} rules")
            continue
        leaf = leaves[0]
        if leaf in origin:
            problems["rules"].append(f"{name} and {origin[leaf]} both fill {leaf}")
            continue
        origin[leaf] = name
        value = to_layout(array, expected[leaf])
        if value.shape != expected[leaf]:
            problems["misshapen"].append(
                f"{name} has shape {array.shape}, expected {torch_shape(expected[leaf], array)}"
            )
            continue
        if not np.issubdtype(array.dtype, np.floating) and array.dtype.name not in FLOATS:
            problems["not usable"].append(f"{name} holds {array.dtype}, not floating point numbers")
            continue
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is reported as such
            value = _float32(value)
        release(array)  # what has been copied out of a mapped file need not stay in memory
        if bad := np.count_nonzero(~np.isfinite(value)):
            problems["not usable"].append(f"{name} holds NaN or infinity in {bad} of {value.size} float32 numbers")
            continue
        filled[leaf] = value
    problems["missing"] += [f"missing {source_of(leaf, rules)}" for leaf in expected if leaf not in origin]
    if count := sum(map(len, problems.values())):
        what = "1 tensor does not fit" if count == 1 else f"{count} tensors do not fit"
        raise ConversionError(f"{what} the model: " + "; ".join(shortened(kind) for kind in problems.values() if kind))
    return filled


def _float32(value: NDArray) -> NDArray[np.float32]:
    """A contiguous copy, aligned so that jax uses it as it is, without a copy of its own."""
    size = value.size * 4
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + size].view(np.float32).reshape(value.shape)
    if value.ndim < 2:
        copy[...] = value
    # A transposition at once reads or writes one number of a cache line at a time, and takes seven times as long.
    for at in range(0, value.shape[-1] if value.ndim > 1 else 0, 16):
        copy[..., at : at + 16] = value[..., at : at + 16]
    return copy


def shortened(items: list[str], shown: int = 6) -> str:
    """`first; second; ... and n more`: a list as one line of an error message."""
    more = f"; ... and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + more


def source_tensors(params: Mapping[str, np.ndarray], rules: Rules, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters under the source's names and in torch's layout: the inverse of `fill`.

    shapes: source name -> shape, of the reference's state dict; in its order. The values are not copied.
    """
    tensors = {}
    for leaf, value in params.items():
        name = source_of(leaf, rules)
        tensors[name] = _torch_layout(leaf, value).reshape(tuple(shapes[name]))
    return {name: tensors[name] for name in shapes}


def _torch_layout(leaf: str, value: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW; (in, out) -> (out, in); the inverse of `convert.rules.to_layout`."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2 and leaf.endswith(".kernel"):
        return value.T
    return value


def cannot_hold(config: Any, varies: Collection[str], fixed: Mapping[str, Any] | None = None) -> list[str]:
    """Why a source's wiring cannot hold a config: each field that it does not vary and that is not what it has.

    varies: the fields that the source lets one choose. fixed: what it has elsewhere than the config's defaults.
    """
    fixed = fixed or {}
    return [
        f"{field.name} is {value!r}, there always {expected!r}"
        for field in dataclasses.fields(config)
        if field.name not in varies
        and (value := getattr(config, field.name)) != (expected := fixed.get(field.name, field.default))
    ]
