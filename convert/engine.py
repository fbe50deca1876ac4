"""Conversion: match names, fill the model's parameters, one report of all that does not fit.

Every source tensor matches exactly one rule or one reasoned ignore; every parameter is filled exactly once; shapes
agree; values are finite. Nothing is returned unless all of it holds. No torch here: tensors come as NumPy arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim.converting import ConversionError, UnsettledError

from .files.mapped import FLOATS, release
from .rules import Rules, Target, from_layout, source_of, target_leaves, targets_of, to_layout, torch_shape


def fill(
    source: Mapping[str, NDArray],
    expected: Mapping[str, tuple[int, ...]],
    rules: Rules,
    ignored: Mapping[str, str] | None = None,
    pointwise: Mapping[str, int] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The model's parameters, by dotted path, from a source's tensors.

    source: torch names -> arrays in torch's layout. expected: parameter paths -> shapes. rules: `convert.rules`.
    ignored: source names that are not weights -> the reason. pointwise: a family's (`convert.families.base`); None:
    any linear may be a 1x1 convolution there. Raises ConversionError naming every tensor that is
    missing, unexpected, of a wrong shape, not floating point or not finite (the first few of each kind).
    """
    fitting, problems = matched(source, expected, rules, ignored, pointwise)
    filled: dict[str, NDArray[np.float32]] = {}
    for name, pairs in fitting.items():
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is reported as such
            values = {leaf: _float32(to_layout(piece, expected[leaf], leaf)) for leaf, piece in pairs}
        release(source[name])  # what has been copied out of a mapped file need not stay in memory
        if bad := sum(int(np.count_nonzero(~np.isfinite(value))) for value in values.values()):
            problems["not usable"].append(
                f"{name} holds NaN or infinity in {bad} of {source[name].size} float32 numbers"
            )
            continue
        filled |= values
    refuse_misfits(problems)
    return filled


Problems = dict[str, list[str]]
"""A kind of misfit -> a sentence on each."""


def matched(
    source: Mapping[str, NDArray],
    expected: Mapping[str, tuple[int, ...]],
    rules: Rules,
    ignored: Mapping[str, str] | None = None,
    pointwise: Mapping[str, int] | None = None,
) -> tuple[dict[str, list[tuple[str, NDArray]]], Problems]:
    """The parameters that each source tensor fills, with the part of it for each, and what does not fit.

    By names, shapes and dtypes alone: no value is read. Arguments as for `fill`.
    """
    ignored = ignored or {}
    fitting: dict[str, list[tuple[str, NDArray]]] = {}
    origin: dict[str, str] = {}
    problems: Problems = {"missing": [], "unexpected": [], "misshapen": [], "not usable": [], "rules": []}
    for name, array in source.items():
        if name in ignored:
            continue
        matches = _matches(name, rules, expected)
        if not matches:
            problems["unexpected"].append(f"unexpected {name} {array.shape}")
            continue
        if len(matches) > 1:
            problems["rules"].append(f"{name} matches {len(matches)} rules")
            continue
        target, leaves = matches[0]
        if taken := [leaf for leaf in leaves if leaf in origin]:
            problems["rules"].append(f"{name} and {origin[taken[0]]} both fill {taken[0]}")
            continue
        origin |= dict.fromkeys(leaves, name)
        ones = None if pointwise is None else _ones(name, pointwise)
        shape = torch_shape(expected[leaves[0]], array, leaves[0], ones)
        wanted = shape if isinstance(target, str) else target.whole(shape)
        pieces = [array] if isinstance(target, str) else target.split(array)
        if array.shape != wanted or not pieces:
            problems["misshapen"].append(f"{name} has shape {array.shape}, expected {wanted}")
            continue
        if not np.issubdtype(array.dtype, np.floating) and array.dtype.name not in FLOATS:
            problems["not usable"].append(f"{name} holds {array.dtype}, not floating point numbers")
            continue
        fitting[name] = list(zip(leaves, [piece.reshape(shape) for piece in pieces], strict=True))
    missing = [source_of(leaf, rules) for leaf in expected if leaf not in origin]
    problems["missing"] += [f"missing {name}" for name in dict.fromkeys(missing)]
    return fitting, problems


def refuse_misfits(problems: Problems) -> None:
    """Raise ConversionError with the first few misfits of each kind, if there are any."""
    if count := sum(map(len, problems.values())):
        what = "1 tensor does not fit" if count == 1 else f"{count} tensors do not fit"
        raise ConversionError(f"{what} the model: " + "; ".join(shortened(kind) for kind in problems.values() if kind))


def _ones(name: str, pointwise: Mapping[str, int]) -> int:
    module = f".{name.rpartition('.')[0]}"
    return next((sides for end, sides in pointwise.items() if module.endswith(f".{end}")), 0)


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


def refuse(problems: Iterable[str], asks: Iterable[str] = ()) -> None:
    """Raise ConversionError with all that is wrong, if anything is; UnsettledError if that is but what `asks` says."""
    if said := "; ".join(problems):
        raise UnsettledError(said, asks) if asks else ConversionError(said)


@contextlib.contextmanager
def refusing(what: object) -> Iterator[None]:
    """A ValueError from within becomes ConversionError("what: why"), an UnsettledError stays one."""
    try:
        yield
    except UnsettledError as error:
        raise UnsettledError(f"{what}: {error}", error.asks) from error
    except ValueError as error:
        raise ConversionError(f"{what}: {error}") from error


def shortened(items: list[str], shown: int = 6) -> str:
    """`first; second; ... and n more`: a list as one line of an error message."""
    more = f"; ... and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(item if len(item) <= 300 else f"{item[:297]}..." for item in items[:shown]) + more


def source_shapes(
    params: Mapping[str, np.ndarray], rules: Rules, pointwise: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Source name -> shape there of what the parameters fill, for `source_tensors`; pointwise: as for `fill`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, value in params.items():
        name = source_of(leaf, rules)
        ((target, _),) = _matches(name, rules, params)
        shape = torch_shape(value.shape, value, leaf, _ones(name, pointwise or {}))
        shapes[name] = shape if isinstance(target, str) else target.whole(shape)
    return shapes


def source_tensors(params: Mapping[str, np.ndarray], rules: Rules, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters under the source's names and in torch's layout: the inverse of `fill`.

    shapes: source name -> shape, of the reference's state dict; in its order. Values are copied only where the
    source fuses them.
    """
    tensors, left = {}, set(params)
    for name, shape in shapes.items():
        ((target, leaves),) = _matches(name, rules, params)
        pieces = [from_layout(params[leaf], leaf) for leaf in leaves]
        tensors[name] = (pieces[0] if isinstance(target, str) else target.join(pieces)).reshape(tuple(shape))
        left -= set(leaves)
    assert not left, f"the reference's state dict has no tensor for {sorted(left)}"
    return tensors


def _matches(name: str, rules: Rules, leaves: Mapping[str, Any]) -> list[tuple[Target, list[str]]]:
    """The targets of a source tensor that have leaves for it, and those leaves."""
    module, _, kind = name.rpartition(".")
    return [(target, found) for target in targets_of(module, rules) if (found := target_leaves(target, kind, leaves))]


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
