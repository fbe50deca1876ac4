"""`.safetensors` files as arrays that lie in the mapped file; bfloat16 and float8 included, without PyTorch.

The format: 8 bytes with the length of a JSON header, the header, then the tensors' bytes, little-endian and C order,
each where the header says, without gaps or overlaps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jddim.files import parse_json

from .mapped import DTYPES, MappedFile, UnreadableError
from .pickles import printable

MAX_HEADER = 100_000_000
"""The format's own limit, in bytes."""

_NAMES = {
    "BOOL": "bool",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


class SafetensorsError(UnreadableError):
    """A file that is not whole, or not of this format."""


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by name, in the file's order; read-only. Raises UnreadableError."""
    try:
        file = MappedFile.open(path)
        header, start = _header(file)
        placed = [(name, *_placed(name, entry)) for name, entry in header.items() if name != "__metadata__"]
        _check_tiling([(begin, end) for _, _, _, begin, end in placed], file.size - start)
        return {
            name: file.array(dtype, shape, start=start + begin, length=end - begin)
            for name, dtype, shape, begin, end in placed
        }
    except UnreadableError:
        raise
    except (OSError, ValueError) as error:
        raise SafetensorsError(printable(str(error))) from error


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    length = int.from_bytes(file.bytes(0, 8), "little")
    if file.size < 8 or length > min(file.size - 8, MAX_HEADER):
        raise SafetensorsError(f"its header would have {length} bytes, the file has {file.size}")
    try:
        header = parse_json(file.bytes(8, length))
    except ValueError as error:
        raise SafetensorsError(f"its header is not JSON ({printable(str(error))})") from error
    if not isinstance(header, dict):
        raise SafetensorsError("its header is not a table of tensors")
    return header, 8 + length


def _placed(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a tensor."""
    shown = printable(name)
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            if kind not in _NAMES:
                raise SafetensorsError(f"its tensor {shown} has the unknown dtype {printable(kind)}")
            dtype, numbers = DTYPES[_NAMES[kind]], 1
            for side in shape[:64]:
                numbers *= side
            if end - begin != numbers * dtype.itemsize:
                raise SafetensorsError(
                    f"its tensor {shown} has {end - begin} bytes for a {kind} {printable(str(shape))}"
                )
            return dtype, tuple(shape), begin, end
    raise SafetensorsError(f"its tensor {shown} has no dtype, shape and data_offsets")


def _check_tiling(spans: list[tuple[int, int]], size: int) -> None:
    """Raise unless the tensors fill the file without gaps or overlaps, as the format wants."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise SafetensorsError(f"its tensors leave a gap or overlap at byte {min(begin, at)}")
        at = end
    if at != size:
        raise SafetensorsError(f"its tensors have {at} bytes, the file holds {size} of them")
