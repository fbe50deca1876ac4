"""Rename rules: source module names to the model's, as templates with {i} for numbers.

A family is a table of them, `{"down.{i}.block.{j}.temb_proj": "down.{i}.blocks.{j}.time_proj", ...}`. What a rule
names is a module; its `weight` and `bias` go to whichever leaves the target module has (`kernel`, `scale` or
`embedding`, `bias`), and the layout follows from the target leaf: OIHW -> HWIO, (out, in) -> (in, out), 1x1
convolutions into linears. A source module that stacks several of the model's, such as a qkv projection, is `Fused`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several target modules whose outputs one source module stacks on its first axis.

    parts: templates of the target modules, all of one width. groups: the axis is [group][part][the group's share of
    the part's width], so 1 means the parts one after the other (OpenAI's new attention order, lucidrains), and the
    number of heads means that each head's q, k and v stand together (OpenAI's legacy order).
    """

    parts: tuple[str, ...]
    groups: int = 1

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The source tensor's shape, from that of a part."""
        return (len(self.parts) * shape[0], *shape[1:])

    def split(self, array: NDArray) -> list[NDArray]:
        """A source tensor `(parts * width, ...)` -> each part's, `(width, ...)`; [] if it does not divide."""
        count = len(self.parts)
        if array.ndim == 0 or array.shape[0] % (count * self.groups):
            return []
        width, rest = array.shape[0] // count, array.shape[1:]  # spelled out: -1 is no size where the array is empty
        blocks = array.reshape(self.groups, count, width // self.groups, *rest)
        return [blocks[:, i].reshape(width, *rest) for i in range(count)]

    def join(self, arrays: Sequence[NDArray]) -> NDArray:
        """The parts' tensors, `(width, ...)` each, as the source's: the inverse of `split`."""
        rest = arrays[0].shape[1:]
        return np.stack([a.reshape(self.groups, -1, *rest) for a in arrays], axis=1).reshape(-1, *rest)


@dataclasses.dataclass(frozen=True)
class Nin:
    """A linear or 1x1 convolution that the source keeps as W (in, out) and b (score_sde's NIN). parts: its target."""

    parts: tuple[str, ...]

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The source tensor's shape, from that of torch's linear or 1x1 convolution."""
        return shape[1::-1]

    def split(self, array: NDArray) -> list[NDArray]:
        """[The source tensor as torch's linears have it]; W becomes (out, in)."""
        return [array.T]

    def join(self, arrays: Sequence[NDArray]) -> NDArray:
        """The inverse of `split`."""
        return arrays[0].T


Target = str | Fused | Nin
Rules = Mapping[str, Target]

_LEAVES = {"weight": ("kernel", "scale", "embedding"), "bias": ("bias",)}
_NIN_LEAVES = {"W": ("kernel",), "b": ("bias",)}


def targets_of(name: str, rules: Rules) -> list[Target]:
    """What source module `name` maps to: one target, unless the table has a gap or an overlap."""
    found: list[Target] = []
    for source, target in rules.items():
        if numbers := _match(source, name):
            found.append(_formatted(target, numbers))
    return found


def source_of(name: str, rules: Rules) -> str:
    """The source tensor that would fill target leaf `name`: for naming what is missing."""
    module, _, leaf = name.rpartition(".")
    for source, target in rules.items():
        for part in parts_of(target):
            if numbers := _match(part, module):
                kind = next((kind for kind, leaves in _kinds(target).items() if leaf in leaves), leaf)
                return f"{source.format_map(numbers)}.{kind}"
    return f"? (for {name}: no rule)"


def parts_of(target: Target) -> tuple[str, ...]:
    """The target modules, of which there are several for `Fused` alone."""
    return (target,) if isinstance(target, str) else target.parts


def _kinds(target: Target) -> Mapping[str, tuple[str, ...]]:
    return _NIN_LEAVES if isinstance(target, Nin) else _LEAVES


def target_leaves(target: Target, kind: str, leaves: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The leaves, one for each of the target's parts, that take a source tensor; [] if a part has none."""
    ends = _kinds(target).get(kind, (kind,))
    found = [next((name for end in ends if (name := f"{part}.{end}") in leaves), None) for part in parts_of(target)]
    return [] if None in found else [leaf for leaf in found if leaf is not None]


def to_layout(array: NDArray, shape: tuple[int, ...], leaf: str = "kernel") -> NDArray:
    """A torch tensor, of the shape that `torch_shape` says, in the layout of a target leaf of this shape.

    Kernels are transposed: 4-d ones are convolutions, OIHW -> HWIO; 2-d ones are linears, from (out, in) or a 1x1
    convolution. leaf: the target leaf's name, or the last part of it.
    """
    if not _is_kernel(leaf):
        return array.reshape(shape)
    return array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.reshape(array.shape[:2]).T


def from_layout(array: NDArray, leaf: str = "kernel") -> NDArray:
    """A target leaf's array in torch's layout, linears as (out, in): the inverse of `to_layout`."""
    if not _is_kernel(leaf):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def torch_shape(
    target: tuple[int, ...], array: NDArray, leaf: str = "kernel", ones: int | None = None
) -> tuple[int, ...]:
    """The shape in torch's layout of a tensor that fills a leaf of shape `target`.

    ones: how many sides of 1 a linear's kernel has there, as a convolution; None: as many as `array` has. A list named
    g is (1, c, 1, 1), shaped to broadcast over an image (lucidrains' norms).
    """
    if len(target) == 4 and _is_kernel(leaf):
        return (target[3], target[2], target[0], target[1])
    if len(target) == 2 and _is_kernel(leaf):
        return (target[1], target[0]) + (1,) * (max(np.ndim(array) - 2, 0) if ones is None else ones)
    return (1, *target, 1, 1) if leaf.rpartition(".")[2] == "g" else target


def _is_kernel(leaf: str) -> bool:
    return leaf.rpartition(".")[2] == "kernel"


def _formatted(target: Target, numbers: Mapping[str, str]) -> Target:
    if isinstance(target, str):
        return target.format_map(numbers)
    return dataclasses.replace(target, parts=tuple(part.format_map(numbers) for part in target.parts))


def _match(template: str, name: str) -> Mapping[str, str] | None:
    if "{" not in template:  # most rules of a family whose numbers run through the whole network
        return {"": ""} if template == name else None  # truthy even without numbers
    found = _pattern(template).fullmatch(name)
    return None if found is None else found.groupdict()


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template)))
