"""Rename rules: source module names to the model's, as templates with {i} for numbers.

A family is a table of them, `{"down.{i}.block.{j}.temb_proj": "down.{i}.blocks.{j}.time_proj", ...}`. What a rule
names is a module; its `weight` and `bias` go to whichever leaves the target module has (`kernel` or `scale`, `bias`),
and the layout follows from the target leaf: OIHW -> HWIO, (out, in) -> (in, out), 1x1 convolutions into linears.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Rules = Mapping[str, str]

_LEAVES = {"weight": ("kernel", "scale", "embedding"), "bias": ("bias",)}


def targets_of(name: str, rules: Rules) -> list[str]:
    """The target modules that source module `name` maps to: one, unless the table has a gap or an overlap."""
    found = []
    for source, target in rules.items():
        if numbers := _match(source, name):
            found.append(target.format_map(numbers))
    return found


def source_of(name: str, rules: Rules) -> str:
    """The source tensor that would fill target leaf `name`: for naming what is missing."""
    module, _, leaf = name.rpartition(".")
    kind = next((kind for kind, leaves in _LEAVES.items() if leaf in leaves), leaf)
    for source, target in rules.items():
        if numbers := _match(target, module):
            return f"{source.format_map(numbers)}.{kind}"
    return f"? (for {name}: no rule)"


def target_leaf(module: str, kind: str, leaves: Sequence[str] | Mapping[str, object]) -> str | None:
    """The leaf of the target module that takes a source tensor's `weight` or `bias`, or None."""
    names = (f"{module}.{leaf}" for leaf in _LEAVES.get(kind, (kind,)))
    return next((name for name in names if name in leaves), None)


def to_layout(array: NDArray, shape: tuple[int, ...], leaf: str = "kernel") -> NDArray:
    """A torch tensor in the layout of a target leaf of this shape. Returned as it is where no layout rule applies.

    Of kernels, 4-d targets are convolutions, OIHW -> HWIO; 2-d targets are linears, from (out, in) or a 1x1
    convolution. Other leaves keep torch's layout; lists of c may come as (1, c, 1, 1), to broadcast over an image.
    leaf: the target leaf's name, or the last part of it.
    """
    if leaf.rpartition(".")[2] != "kernel":
        return array.reshape(-1) if len(shape) == 1 and array.shape == (1, *shape, 1, 1) else array
    if len(shape) == 4 and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if len(shape) == 2 and array.ndim >= 2 and all(side == 1 for side in array.shape[2:]):
        return array.reshape(array.shape[:2]).T
    return array


def torch_shape(target: tuple[int, ...], array: NDArray, leaf: str = "kernel") -> tuple[int, ...]:
    """The shape that `array` would need in torch's layout to fill a leaf of shape `target`; for error messages."""
    if leaf.rpartition(".")[2] != "kernel":
        return (1, *target, 1, 1) if len(target) == 1 and np.ndim(array) == 4 else target
    if len(target) == 4:
        return (target[3], target[2], target[0], target[1])
    if len(target) == 2:
        return (target[1], target[0]) + (1,) * max(np.ndim(array) - 2, 0)
    return target


def _match(template: str, name: str) -> dict[str, str] | None:
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template))
    found = re.fullmatch(pattern, name)
    return None if found is None else (found.groupdict() or {"": ""})  # truthy even without numbers
