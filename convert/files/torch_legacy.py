"""PyTorch's format before 1.6: five pickles, then the storages. Checked here; read by `torch.load(weights_only=True)`.

`convert.files.pickles` goes through the pickles before PyTorch sees them, so that both formats refuse the same files
with the same words, and a size in the file is compared with the file before PyTorch allocates it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .mapped import MappedFile, UnreadableError
from .pickles import PickleError, load, printable
from .torch_zip import DamagedFileError, Storage, known_globals, parse_storage

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class NotTorchError(UnreadableError):
    """A pickle that `torch.save` did not write."""


def check(path: Path) -> None:
    """Raise unless the file has this format, holds tensors and plain values only, and is as long as it says.

    Raises NotTorchError, PickleError (RefusedGlobalError among them), DamagedFileError or NotNumbersError.
    """
    stream = MappedFile.open(path).buffer
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        found = parse_storage(identity)
        if storages.setdefault(found.key, found) != found:
            raise DamagedFileError("one of its storages has two sizes")
        return found

    known = known_globals(lambda *_: None)
    if load(stream, known, storage) != _MAGIC:
        raise NotTorchError
    if load(stream, {}, _no_storage) != _PROTOCOL:
        raise DamagedFileError("it has an unknown protocol")
    load(stream, {}, _no_storage)  # what machine wrote it
    load(stream, known, storage)
    keys = load(stream, {}, _no_storage)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise DamagedFileError("its storages are not those that its tensors lie in")
    for key in keys:  # each is preceded by its number of elements; PyTorch believes that one, whatever the tensor says
        found = storages[key]
        numel = int.from_bytes(stream.read(8), "little")
        if numel != found.numel or stream.tell() + found.nbytes > len(stream):
            raise DamagedFileError(
                f"storage {printable(key, 40)} should have {found.numel} numbers; it has {numel}, "
                f"in a file of {len(stream)} bytes"
            )
        stream.seek(found.nbytes, 1)


def _no_storage(identity: Any) -> Any:
    raise PickleError("it refers to a storage where there are none")
