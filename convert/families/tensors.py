"""What several families ask of a file's tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..engine import ConversionError, shortened

Tensors = Mapping[str, np.ndarray]


def check_tensors(state: Mapping[Any, Any], file_name: str) -> None:
    """Raises ConversionError, naming the entries, if a state dict holds anything but tensors."""
    odd = [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, np.ndarray)]
    if odd:
        raise ConversionError(f"{file_name} holds entries that are not tensors: {shortened(odd)}")


def stripped(state: Mapping[Any, Any], prefix: str, file_name: str) -> dict[str, Any]:
    """A state dict without a prefix that some of its names have. ConversionError if two names would become one."""
    names = [str(name) for name in state]
    if twice := [name for name in names if prefix + name in state]:
        raise ConversionError(f"{file_name} holds, with and without the prefix {prefix}, {shortened(twice)}")
    return {str(name).removeprefix(prefix): value for name, value in state.items()}


def common_size(tensors: Tensors, pattern: str, axis: int, divide: int = 1) -> int | None:
    """The size of an axis that most tensors of these names have, divided; None if none has the axis.

    A majority, so that one missing, misshapen or stray tensor is reported as such and not as a different network.
    """
    matching = (value for name, value in tensors.items() if re.fullmatch(pattern, name))
    sizes = Counter(value.shape[axis] // divide for value in matching if value.ndim > max(axis, 0))
    return sizes.most_common(1)[0][0] if sizes else None
