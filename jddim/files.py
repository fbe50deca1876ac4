"""Files: written whole or not at all, and read as data that anybody may have made. No jax, and NumPy on first use.

Nothing here replaces what it was not told to replace, waits for a pipe, or takes much more memory than the file has
bytes. What a reader finds wrong is a ValueError whose text says it without the file's name, or an OSError that has it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import gzip
import json
import math
import os
import shutil
import stat
import sys
import time
import tokenize
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from jddim import interrupt

if TYPE_CHECKING:
    import numpy as np

# -- renaming ---------------------------------------------------------------------------------------------------------

_NOREPLACE, _EXCHANGE = 1, 2  # of <linux/fs.h>
_CWD = -100  # AT_FDCWD of <fcntl.h>


@functools.cache
def _renameat2() -> Any:
    """The C library's function of that name, or None where it has none."""
    import ctypes

    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2. False, and nothing is changed, where the system or the file system does not know the flag."""
    function = _renameat2()
    if function is None:
        return False
    import ctypes

    sys.audit("os.rename", os.fspath(source), os.fspath(target), -1, -1)  # as Python's own renaming says of itself
    if function(_CWD, os.fsencode(source), _CWD, os.fsencode(target), flag) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has. Raises FileExistsError where something has it by now.

    On Linux the kernel sees to it (RENAME_NOREPLACE). Elsewhere, and on file systems that do not know it, a file gets
    its new name as a link, which never replaces, before it loses the old one; a folder is renamed, which replaces
    nothing but an empty folder.
    """
    if _rename(source, target, _NOREPLACE):
        return
    try:
        if source.is_dir() and not source.is_symlink():
            source.rename(target)
        else:
            os.link(source, target, follow_symlinks=False)
            source.unlink()
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


# -- writing ----------------------------------------------------------------------------------------------------------


def beside(target: Path) -> Path:
    """A name of the same suffix that nothing has, for what is not whole."""
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")


@contextlib.contextmanager
def atomic(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path beside `target` (same suffix) to write to; renamed to `target` on success, removed on any failure.

    A folder replaces nothing but an empty folder; a file replaces a file if `overwrite`. Raises FileExistsError, and
    leaves what is there, where something stands in the way.
    """
    staging = beside(target)
    with _parents(target):
        try:
            yield staging
            if staging.is_dir() and target.is_dir():
                target.rmdir()
            if overwrite and not staging.is_dir():
                staging.replace(target)
            else:
                rename_new(staging, target)
        except BaseException as error:
            remove(staging)
            # Of a full disk the system does not say where; of other failures it names what is not there any more.
            if isinstance(error, OSError) and error.errno and error.filename in (None, str(staging)):
                raise type(error)(error.errno, error.strerror, str(target)) from error
            raise


def check_free(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise FileExistsError if there is something at `path`, and it may not be overwritten."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another name, or pass --overwrite")


@contextlib.contextmanager
def replacing(target: Path, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A path for a new folder, which takes the place of `target` once it is whole; until then `target` is as it was.

    may_replace: says of what is at `target` whether the new folder may take its place; None: of nothing. Raises
    FileExistsError where it may not, and leaves what is there, whenever it came.

    On Linux what was there is exchanged for the new folder in one step (RENAME_EXCHANGE). Elsewhere it is moved aside
    first; what ends the process between the two renames, SIGKILL included, `recover` makes good.
    """
    occupied = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    with _parents(target), _own_folder(target) as own:
        new, old = own / _NEW, own / _OLD
        yield new
        if may_replace is None or not os.path.lexists(target):
            rename_new(new, target)
        elif not may_replace(target):
            raise occupied
        elif _rename(new, target, _EXCHANGE):
            if not _may(may_replace, new):  # it came since it was looked at
                _rename(new, target, _EXCHANGE)
                raise occupied
        else:
            target.rename(old)
            if not _may(may_replace, old):
                raise occupied  # and `_clear` puts it back
            rename_new(new, target)


def _may(may_replace: Callable[[Path], bool], moved: Path) -> bool:
    return moved.is_symlink() or may_replace(moved)  # a link holds nothing, and may not lead anywhere from here


def recover(target: Path) -> None:
    """Sweep what processes that were killed left of `replacing`; put back a folder that one of them moved aside.

    What a living process works on is locked and stays.
    """
    with contextlib.suppress(OSError, ValueError):  # of names that the file system does not take
        for own in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
            held = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if lock(held):
                    _clear(own, target)
            finally:
                os.close(held)


_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, locked while this process works in it, and gone afterwards."""
    own, held = _locked_folder(target)
    try:
        yield own
    except BaseException:
        _clear(own, target)
        for _ in range(30):  # Orbax's threads go on writing for a moment
            time.sleep(0.01)
            remove(own)
        raise
    else:
        _clear(own, target)
    finally:
        os.close(held)


def _locked_folder(target: Path) -> tuple[Path, int]:
    while True:
        own = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        own.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another swept it before it was locked
            held = os.open(own, os.O_RDONLY)
            with contextlib.suppress(OSError):  # where there are no locks, nobody takes this one for left behind
                if not lock(held):
                    os.close(held)
                    continue
            return own, held


def _clear(own: Path, target: Path) -> None:
    """Remove the folder of a `replacing`; what it moved aside goes back where nothing took its place."""
    old = own / _OLD
    if os.path.lexists(old) and not os.path.lexists(target):
        with contextlib.suppress(FileExistsError):
            rename_new(old, target)
    remove(own)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """The folders above `target`, made where they are missing; those go again if an error comes."""
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        interrupt.unwind()
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def write_array(path: Path, array: np.ndarray) -> None:
    """An .npy file. Unlike `numpy.save` it says of a full disk that it is full."""
    import numpy as np

    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


# -- locks ------------------------------------------------------------------------------------------------------------


def open_lock(path: Path) -> IO[str]:
    """A file to be locked, there from now on."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def lock(file: IO[str] | int, *, shared: bool = False) -> bool:
    """Whether the file is locked now, by this process alone or shared. False, at once, if another's lock forbids it.

    The lock is the kernel's (`flock`): it ends with the process however that ends, so none is ever stale. file: open,
    or the number of an open one; of a folder too.
    """
    import fcntl

    number = file if isinstance(file, int) else file.fileno()
    try:
        fcntl.flock(number, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        return False
    except OSError as error:
        name = getattr(file, "name", "a folder")
        raise OSError(f"cannot lock {name} ({error.strerror}): this file system has no locks") from error
    return os.fstat(number).st_nlink > 0  # whoever had it may have removed it at the end


# -- reading ----------------------------------------------------------------------------------------------------------

MOST_JSON = 32 * 2**20
"""Bytes of a JSON file."""

MAX_DEPTH = 100
"""Lists and objects within each other: far more than anything of ours has, far less than Python's recursion limit."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file (or a link to one) to read from. Raises OSError for all else; a pipe is not waited for."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A regular file's contents. most: bytes. Raises ValueError if it has more, OSError as `open_regular`."""
    with open_regular(path) as file:
        if most is not None and (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"it has {size} bytes, {most} are the most")
        return file.read()


def check_regular(folder: Path) -> None:
    """Raise OSError, which names it, if anything below a folder is neither a file nor a folder (links are followed)."""
    waiting, seen = [folder], set()
    while waiting:
        for path in waiting.pop().iterdir():
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    waiting.append(path)
            elif not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """What a JSON file says. Raises ValueError as `parse_json`, or if it has more bytes; OSError as `open_regular`."""
    return parse_json(read_regular(path, most))


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of anybody's says.

    Raises ValueError (UnicodeDecodeError for bytes that are no text) if it is none, if a name occurs twice in an
    object, for whole numbers beyond 64 bits, and for what lies deeper than MAX_DEPTH.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        data = json.loads(text, parse_int=whole_number, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        held = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))
        ]
        if not held:
            return data
        level = [value for values in held for value in values]
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"its lists and objects lie more than {MAX_DEPTH} deep in each other"


def whole_number(text: str) -> int:
    """The number that decimal digits are. Raises ValueError beyond 64 bits: it is no setting, and slow to print."""
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise ValueError(f"a whole number of {len(text)} digits, beyond 64 bits")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return table


def most_unpacked(size: int) -> int:
    """Bytes that a compressed file of `size` bytes may unpack to."""
    return 64 * (size + 2**20)


def read_gzip(path: Path) -> bytes:
    """What a gzip file unpacks to. Raises ValueError for damage and for more than `most_unpacked`; OSError likewise."""
    with open_regular(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
        most = most_unpacked(os.fstat(file.fileno()).st_size)
        try:
            content = unpacked.read(most + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"it is damaged ({error})") from error
    if len(content) > most:
        raise ValueError(f"it would unpack to more than {most} bytes")
    return content


def read_arrays(
    path: Path, wanted: Collection[str] | None = None, *, text: bool = False, mapped: bool = False
) -> np.ndarray | dict[str, np.ndarray]:
    """The array of an .npy file, or those of an .npz by name, told apart by their first bytes.

    wanted: which of an archive's, as far as it has them; None: all. text: arrays of text are taken too, otherwise only
    numbers and truth values. mapped: an .npy's stays in its file, read-only.

    Raises ValueError if it is no such file, a part of it is damaged, or an archive would unpack to more than
    `most_unpacked`; OSError as `open_regular`.
    """
    import numpy as np

    kinds = "biufcUS" if text else "biufc"
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            size = os.fstat(file.fileno()).st_size
            if not file.read(4).startswith(b"PK"):
                file.seek(0)
                header = _header(file, size, kinds)
                return np.lib.format.open_memmap(path, "r") if mapped else _numbers(file, *header)
            with zipfile.ZipFile(file) as archive:
                return _members(archive, most_unpacked(size), wanted, kinds)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


_BROKEN = (  # what NumPy, zipfile and what it unpacks with raise for damaged files
    *(
        OSError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ),
    *(RuntimeError, NotImplementedError, OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def _members(archive: zipfile.ZipFile, most: int, wanted: Collection[str] | None, kinds: str) -> dict[str, np.ndarray]:
    infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(infos) < len(archive.infolist()):
        raise ValueError("it holds two arrays of one name")
    chosen = {name: info for name, info in infos.items() if wanted is None or name in wanted}
    if (total := sum(info.file_size for info in chosen.values())) > most:
        raise ValueError(f"it would unpack to {total} bytes, {most} are the most of a file of its size")
    arrays = {}
    for name, info in chosen.items():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its array {name[:100]!r} is compressed in a way that NumPy does not write")
        with archive.open(info) as member:
            arrays[name] = _numbers(member, *_header(member, info.file_size, kinds))
            if member.read(1):  # which compares the checksum too
                raise ValueError(f"its array {name[:100]!r} is longer than it says")
    return arrays


def _header(stream: Any, size: int, kinds: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    """dtype, shape and whether the columns come first, of an .npy of `size` bytes; they fit them."""
    import numpy as np

    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its .npy is of version {'.'.join(map(str, version))}, which only names of fields need")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype.kind not in kinds or not dtype.itemsize:
        raise ValueError(f"it holds {str(dtype)[:60]}, not numbers")
    if len(shape) > 32 or any(not 0 <= side <= size for side in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its shape of {len(shape)} dimensions does not fit its {size} bytes")
    return dtype, shape, by_columns


def _numbers(stream: Any, dtype: np.dtype, shape: tuple[int, ...], by_columns: bool) -> np.ndarray:
    import numpy as np

    flat = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    if stream.readinto(flat.data) < flat.nbytes:
        raise ValueError("it is cut short")
    array = flat.view(dtype)
    return array.reshape(shape[::-1]).T if by_columns else array.reshape(shape)
