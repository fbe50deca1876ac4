"""flax's `.msgpack` files (`flax.serialization.to_bytes`): nested dicts of arrays.

An array is msgpack's extension type 1, which is msgpack again: (shape, name of the dtype, bytes in C order). The two
other types that flax has, and arrays in chunks (above 1 GB each), are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from .mapped import DTYPES, MappedFile, UnreadableError
from .pickles import printable

MAX_DEPTH = 16
"""Of dicts in dicts; networks have about six."""


class MsgpackError(UnreadableError):
    """A file that is not whole, or holds something else than arrays."""


def read(path: Path) -> dict[str, np.ndarray]:
    """Every array by its path, with dots between, in the file's order; read-only. Raises UnreadableError."""
    try:
        file = MappedFile.open(path)
        tree = msgpack.unpackb(
            file.buffer,
            ext_hook=_array,
            object_pairs_hook=tuple,
            max_array_len=0,  # msgpack allocates what a header claims
            max_bin_len=0,
            max_str_len=1000,
            max_map_len=100_000,
        )
        leaves = list(_flat(tree, ""))
    except UnreadableError:
        raise
    except (OSError, ValueError) as error:
        raise MsgpackError(printable(str(error)) or type(error).__name__) from error
    arrays = dict(leaves)
    if len(arrays) < len(leaves):
        raise MsgpackError("it holds two arrays of one name")
    return arrays


def _array(kind: int, content: bytes) -> np.ndarray:
    if kind != 1:
        raise MsgpackError(f"it holds msgpack's extension type {kind}, of which flax's arrays are 1")
    match msgpack.unpackb(content, max_array_len=32, max_str_len=32, max_map_len=0, max_ext_len=0):
        case [[*shape], str(name), bytes(data)] if all(type(side) is int and side >= 0 for side in shape):
            dtype = DTYPES.get(name)
            if dtype is not None and math.prod(shape) * dtype.itemsize == len(data):
                return np.frombuffer(data, dtype).reshape(shape)
            raise MsgpackError(f"it has {len(data)} bytes for a {printable(name)} {printable(str(tuple(shape)))}")
    raise MsgpackError("it holds an array without shape, dtype and bytes")


def _flat(node: Any, at: str, depth: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(node, np.ndarray):
        yield at, node
    elif isinstance(node, tuple) and depth < MAX_DEPTH:  # a dict's pairs
        for key, value in node:
            yield from _flat(value, f"{at}.{key}" if at else str(key), depth + 1)
    else:
        raise MsgpackError(f"under {printable(at) or 'its top'} it holds no array and no dict of arrays")
