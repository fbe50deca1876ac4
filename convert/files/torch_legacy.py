"""PyTorch's format before 1.6 without PyTorch: five pickles, then the storages, one after the other.

The pickles are read as the newer format's is (`convert.files.torch_zip`), so that both hold and refuse the same. The
storages lie behind the pickle that refers to them: it is read once for their sizes, and again with their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .mapped import MappedFile, UnreadableError
from .pickles import PickleError, load, plain, printable
from .torch_zip import DamagedFileError, Kind, Storage, bounded_leaf, known_globals, numpy_dtype, parse_storage

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class NotTorchError(UnreadableError):
    """A pickle that `torch.save` did not write."""


def read(path: Path) -> Any:
    """The contents: plain containers, and read-only arrays that lie in the file, or copies of those not aligned there.

    Raises NotTorchError, PickleError (RefusedGlobalError among them), LayoutError, DamagedFileError or NotNumbersError.
    """
    file = MappedFile.open(path)
    stream = file.buffer
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        found = parse_storage(identity)
        if storages.setdefault(found.key, found) != found:
            raise DamagedFileError("one of its storages has two sizes")
        return found

    known = known_globals(lambda *_: None)
    big_endian = header(stream, known)
    at = stream.tell()
    load(stream, known, storage)
    length = stream.tell() - at
    keys = load(stream, {}, no_storage)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise DamagedFileError("its storages are not those that its tensors lie in")
    starts: dict[str, int] = {}
    for key in keys:  # each is preceded by its number of elements
        found = storages[key]
        numel = int.from_bytes(stream.read(8), "little")
        if numel != found.numel or stream.tell() + found.nbytes > len(stream):
            raise DamagedFileError(
                f"storage {printable(key, 40)} should have {found.numel} numbers; it has {numel}, "
                f"in a file of {len(stream)} bytes"
            )
        starts[key] = stream.tell()
        stream.seek(found.nbytes, 1)

    def array(source: Storage, offset: int, shape: Any, strides: Any, kind: Kind | None = None) -> np.ndarray:
        return file.array(
            source.dtype if kind is None else numpy_dtype(kind),
            shape,
            start=starts[source.key],
            length=source.nbytes,
            offset=offset,
            strides=strides,
            big_endian=big_endian,
        )

    bounded = bounded_leaf(file.size)

    def leaf(value: Any) -> Any:
        value = bounded(value)
        return np.require(value, requirements="A") if isinstance(value, np.ndarray) else value

    stream.seek(at)
    return plain(load(stream, known_globals(array), storage), leaf, 4 * length + 1000)


def header(stream: Any, known: Mapping[str, Any]) -> bool:
    """Whether the numbers are big-endian, of the stream's first three pickles. Raises NotTorchError if it is another's.

    known: as of `load`, for a first pickle that is another's.
    """
    if load(stream, known, no_storage) != _MAGIC:
        raise NotTorchError
    if load(stream, {}, no_storage) != _PROTOCOL:
        raise DamagedFileError("it has an unknown protocol")
    machine = load(stream, {}, no_storage)
    return type(machine) is dict and machine.get("little_endian") is False


def no_storage(identity: Any) -> Any:
    """For `load`, where no persistent id may be."""
    raise PickleError("it refers to a storage where there are none")
