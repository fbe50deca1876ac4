"""Files mapped into memory: arrays that lie in a file and are read when they are used, every bound checked."""

from __future__ import annotations

import dataclasses
import mmap
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_CHUNK = 1 << 20

FLOATS = {  # what NumPy itself lacks; jax brings ml_dtypes
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "bool": np.bool_,
        **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
        **{f"float{bits}": f"float{bits}" for bits in (16, 32, 64)},
        "complex64": np.complex64,
        "complex128": np.complex128,
        **FLOATS,
    }.items()
}
"""By torch's names. What is not here has no plain numbers, or less than a byte each."""


class UnreadableError(ValueError):
    """What a reader of ours raises: a file that is broken, or holds what is not read. Its text says which."""


class LayoutError(UnreadableError):
    """A tensor that does not lie in its file."""


@dataclasses.dataclass(frozen=True)
class MappedFile:
    """A file's bytes, read-only; an operating system reads them when they are touched and may drop them again.

    Or bytes that are in memory, for `array` alone.
    """

    buffer: Any

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a file that is not empty. OSError and ValueError as of `mmap`."""
        with open(path, "rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.buffer)

    def bytes(self, start: int, length: int) -> bytes:
        """A copy of a part of the file."""
        part: bytes = self.buffer[start : start + length]
        return part

    def release(self) -> None:
        """Give back the memory of what has been read; reading it again brings it back."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.buffer.madvise(mmap.MADV_DONTNEED)

    def crc32(self, start: int, length: int) -> int:
        """The checksum of a part of the file, a chunk in memory at a time."""
        checksum = 0
        for at in range(start, start + length, _CHUNK):
            checksum = zlib.crc32(self.buffer[at : min(at + _CHUNK, start + length)], checksum)
        return checksum

    def array(
        self,
        dtype: np.dtype,
        shape: tuple[int, ...],
        *,
        start: int,
        length: int,
        offset: int = 0,
        strides: tuple[int, ...] | None = None,
        big_endian: bool = False,
    ) -> np.ndarray:
        """A tensor in `length` bytes of the file from `start`, as a read-only view of it.

        shape, strides (None: C order), offset: in elements, any values that a file may hold. A dtype of `FLOATS` that
        is big-endian is copied, as ml_dtypes has no such order. Raises LayoutError if any element would lie outside,
        or if there are more elements than bytes in the file (a stride of 0 repeats what is there).
        """
        strides = _c_order(shape) if strides is None else strides
        if len(shape) > 32 or len(strides) != len(shape) or min((offset, *shape, *strides), default=0) < 0:
            raise LayoutError(f"shape {shape} with strides {strides} from {offset} is no tensor's")
        if 0 in shape:
            return _empty(shape, dtype)
        steps = tuple(0 if side == 1 else stride for side, stride in zip(shape, strides, strict=True))
        last = offset + sum((side - 1) * step for side, step in zip(shape, steps, strict=True))
        if (last + 1) * dtype.itemsize > length or start + length > self.size:
            raise LayoutError(f"shape {shape} with strides {strides} from {offset} lies outside its {length} bytes")
        if _product(shape) * dtype.itemsize > self.size:
            raise LayoutError(f"shape {shape} with strides {strides} has more numbers than the file")
        swap, foreign = big_endian and dtype.itemsize > 1, dtype.name in FLOATS
        stored = dtype if not swap else np.dtype(f">u{dtype.itemsize}") if foreign else dtype.newbyteorder(">")
        view: np.ndarray = np.ndarray(
            shape,
            stored,
            buffer=self.buffer,
            offset=start + offset * dtype.itemsize,
            strides=tuple(step * dtype.itemsize for step in steps),
        )
        return view.astype(stored.newbyteorder("=")).view(dtype) if swap and foreign else view


def release(*arrays: np.ndarray) -> None:
    """Give back the memory of the files that arrays lie in, if they lie in some; the arrays stay usable."""
    files: dict[int, mmap.mmap] = {}
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            files[id(base)] = base
    for file in files.values():
        MappedFile(file).release()


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except ValueError as error:  # of sides whose product overflows
        raise LayoutError(f"shape {shape} is no tensor's") from error


def _c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_product(shape[axis + 1 :]) for axis in range(len(shape)))


def _product(sides: tuple[int, ...]) -> int:
    product = 1
    for side in sides:
        product *= side
    return product
