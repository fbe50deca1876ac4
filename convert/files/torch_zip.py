"""PyTorch's zip files (1.6 and later) without PyTorch: tensors rebuilt as NumPy arrays that lie in the mapped file.

`torch.save` writes a zip of uncompressed entries: `NAME/data.pkl` describes the objects, `NAME/data/KEY` is the storage
of each tensor's numbers, `NAME/byteorder` their byte order. `convert.files.pickles` reads the pickle; the constructors
that it can choose from are in `known_globals`, and everything else is refused by name.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from .mapped import DTYPES, LayoutError, MappedFile, UnreadableError
from .pickles import Constructor, NumpyType, PickleError, Record, checked_key, load, plain, printable

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""Of a zip entry: signature, version, flags, method, time, date, CRC, sizes, lengths of name and extra field."""


class DamagedFileError(UnreadableError):
    """A zip that is not whole, or not one that `torch.save` wrote."""


class NotNumbersError(UnreadableError):
    """A tensor that is not a plain array of numbers: sparse, quantized, on no device."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An uncompressed zip entry: where in the file its bytes are."""

    start: int
    length: int
    crc: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of storages, or a dtype, named in a pickle. dtype: by torch's name; None for raw bytes."""

    dtype: str | None


@dataclasses.dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors."""

    kind: Kind
    key: str
    numel: int

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers; NotNumbersError if NumPy has none for them."""
        return numpy_dtype(self.kind, np.dtype(np.uint8))

    @property
    def nbytes(self) -> int:
        """As the pickle says, to be compared with what is there."""
        return self.numel * self.dtype.itemsize


def read(path: Path) -> Any:
    """The contents of a zip file that passes `check`: plain containers, and read-only arrays that lie in the file.

    Raises UnreadableError: PickleError, LayoutError, DamagedFileError or NotNumbersError.
    """
    file, entries, prefix = _open(path)
    order = entries.get(f"{prefix}byteorder")
    byteorder = b"little" if order is None else file.bytes(order.start, min(order.length, 16))
    if byteorder not in (b"little", b"big"):
        raise DamagedFileError(f"its byte order is {byteorder!r}, not little or big")

    def storage(identity: Any) -> Storage:
        found = parse_storage(identity)
        entry = entries.get(f"{prefix}data/{found.key}")
        if entry is None or entry.length != found.nbytes:
            there = "is missing" if entry is None else f"has {entry.length} bytes"
            raise DamagedFileError(f"its storage {printable(found.key)} of {found.nbytes} bytes {there}")
        return found

    def array(source: Storage, offset: int, shape: Any, strides: Any, kind: Kind | None = None) -> np.ndarray:
        entry = entries[f"{prefix}data/{source.key}"]
        return file.array(
            source.dtype if kind is None else numpy_dtype(kind),
            shape,
            start=entry.start,
            length=entry.length,
            offset=offset,
            strides=strides,
            big_endian=byteorder == b"big",
        )

    data = entries[f"{prefix}data.pkl"]
    value = load(io.BytesIO(file.bytes(data.start, data.length)), known_globals(array), storage)
    return plain(value, bounded_leaf(file.size), 4 * data.length + 1000)


def check(path: Path) -> None:
    """Raise DamagedFileError unless the file is a whole zip of `torch.save`'s whose bytes have their checksums.

    `torch.load` does not compare the checksums, and a damaged weight is still a number. A checksum of 0 is that of a
    file written under `torch.serialization.set_crc32_options(False)`: none.
    """
    file, entries, _ = _open(path)
    for name, entry in entries.items():
        if entry.crc and file.crc32(entry.start, entry.length) != entry.crc:
            raise DamagedFileError(f"Bad CRC-32 of {printable(name)}")
        file.release()


def known_globals(array: Callable[..., Any]) -> dict[str, Any]:
    """All that a checkpoint's pickle may name: constructors of ours, and names that stand for nothing but themselves.

    array: (storage, offset, shape, strides, dtype's Kind or None) -> what stands for the tensor.
    """

    def not_numbers(what: str) -> Constructor:
        def build(*_: Any) -> Any:
            raise NotNumbersError(what)

        return Constructor(build)

    def build_tensor(storage: Any, offset: Any, shape: Any, strides: Any, marks: Any, *kind: Kind) -> Any:
        if not isinstance(storage, Storage) or not _are_ints((offset,), shape, strides):
            raise PickleError("it rebuilds a tensor from something else than a storage and integers")
        if marks:
            raise NotNumbersError("a conjugated or negated view")
        return array(storage, offset, shape, strides, *kind)

    def tensor(
        storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, marks: Any = None
    ) -> Any:
        return build_tensor(storage, offset, shape, strides, marks)

    def tensor_v3(
        storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, kind: Any, marks: Any = None
    ) -> Any:
        if not isinstance(kind, Kind):
            raise PickleError("it rebuilds a tensor of no dtype")
        return build_tensor(storage, offset, shape, strides, marks, kind)

    def first(data: Any, *_: Any) -> Any:
        return data  # a Parameter is its data

    def from_type(build: Any, kind: Any, arguments: Any, _state: Any) -> Any:
        if not isinstance(build, Constructor) or kind not in (_TENSOR, _PARAMETER) or type(arguments) is not tuple:
            raise PickleError("it rebuilds a tensor of no known type")
        return build.build(*arguments)

    tensors: dict[str, Any] = {
        "torch._utils._rebuild_tensor": Constructor(tensor),
        "torch._utils._rebuild_tensor_v2": Constructor(tensor),
        "torch._utils._rebuild_tensor_v3": Constructor(tensor_v3),
        "torch._utils._rebuild_parameter": Constructor(first),
        "torch._utils._rebuild_parameter_with_state": Constructor(first),
        "torch._tensor._rebuild_from_type_v2": Constructor(from_type),
    }
    return _INERT | tensors | {f"torch._utils.{name}": not_numbers(what) for name, what in _NOT_NUMBERS.items()}


def parse_storage(identity: Any) -> Storage:
    """The storage that a persistent id names; PickleError if it names something else."""
    match identity:
        case ("storage", Kind() as kind, str(key), str(), int(numel), *view) if numel >= 0 and view in ([], [None]):
            return Storage(kind, key, numel)
    raise PickleError("it refers to something that is not a storage")


def numpy_dtype(kind: Kind, raw: np.dtype | None = None) -> np.dtype:
    """NumPy's dtype (or ml_dtypes') for torch's. raw: for bytes without one. NotNumbersError if there is none."""
    dtype = raw if kind.dtype is None else DTYPES.get(kind.dtype)
    if dtype is None:
        raise NotNumbersError(f"dtype {kind.dtype}")
    return dtype


def bounded_leaf(file_size: int) -> Callable[[Any], Any]:
    """For `plain`: arrays as they are, dtypes by name. PickleError once arrays hold far more bytes than the file.

    Tensors share storages (a model and its average before the first step), but not by the thousand.
    """
    limit = left = 8 * file_size + (1 << 20)

    def leaf(value: Any) -> Any:
        nonlocal left
        if isinstance(value, Kind):
            return f"torch.{value.dtype}"
        if isinstance(value, NumpyType):
            return f"numpy.{value.order}{printable(value.code)}"
        if isinstance(value, Storage):
            raise NotNumbersError("a storage without a tensor")
        if not isinstance(value, np.ndarray):
            raise PickleError(f"it holds a {type(value).__name__}")
        left -= value.nbytes
        if left < 0:
            raise LayoutError(f"its tensors show the same bytes until they are {limit} of them")
        return value

    return leaf


def _open(path: Path) -> tuple[MappedFile, Mapping[str, Entry], str]:
    """The mapped file, its entries by name, and the folder in it that holds `data.pkl`, with a slash."""
    try:
        file = MappedFile.open(path)
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        entries = {info.filename: _entry(file, info) for info in infos}
    except UnreadableError:
        raise
    except _BROKEN as error:
        raise DamagedFileError(printable(str(error) or type(error).__name__)) from error
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(entries) < len(infos):
        raise DamagedFileError("it holds entries of one name twice")
    if len(pickles) != 1:
        raise DamagedFileError(f"it holds {len(pickles)} files data.pkl, one is what torch.save writes")
    if sum(entry.length for entry in entries.values()) > file.size:
        raise DamagedFileError("its entries overlap")
    return file, entries, pickles[0].removesuffix("data.pkl")


_BROKEN = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    struct.error,
    zlib.error,
)


def _entry(file: MappedFile, info: zipfile.ZipInfo) -> Entry:
    name = printable(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise DamagedFileError(f"its entry {name} is compressed or encrypted, which torch.save never does; unpack it")
    header = file.bytes(info.header_offset, LOCAL_HEADER.size)
    if info.header_offset < 0 or len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise DamagedFileError(f"its entry {name} is not where the directory says")
    *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
    start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
    stored = file.bytes(info.header_offset + LOCAL_HEADER.size, name_length)
    if stored != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise DamagedFileError(f"its entry {name} has another name in the directory")
    if start + info.file_size > file.size:
        raise DamagedFileError(f"its entry {name} is cut off")
    return Entry(start, info.file_size, info.CRC)


def _are_ints(*groups: Any) -> bool:
    return all(type(group) is tuple and all(type(number) is int for number in group) for group in groups)


def _items(*arguments: Any) -> tuple[Any, ...]:
    """`torch.Size` and `set` of one sequence, or of nothing."""
    if len(arguments) > 1 or not all(type(argument) in (tuple, list) for argument in arguments):
        raise PickleError("it makes a sequence of something else")
    return tuple(arguments[0]) if arguments else ()


def _dict(*arguments: Any) -> dict[Any, Any]:
    """`OrderedDict` and `Counter`: empty (protocol 2 fills them afterwards), of a dict, or of pairs (Python 2)."""
    if not arguments:
        return {}
    if len(arguments) > 1 or type(arguments[0]) not in (dict, list):
        raise PickleError("it makes a dict of something else")
    if type(arguments[0]) is dict:
        return dict(arguments[0])
    pairs = arguments[0]
    if not all(type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) in (str, int) for pair in pairs):
        raise PickleError("it makes a dict of something else")
    return {checked_key(key): value for key, value in pairs}


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`, which is how protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise PickleError("it encodes something else than bytes")
    return text.encode("latin1")


def _default_dict(factory: Any = None, *arguments: Any) -> dict[Any, Any]:
    """A dict; what a `defaultdict` would make of an absent key is never asked for."""
    return _dict(*arguments)


def _record() -> Record:
    return Record()  # its attributes come afterwards


def _path(kind: type[PurePath]) -> Constructor:
    """A path's text, without any file system."""

    def build(*parts: Any) -> str:
        if not all(type(part) is str for part in parts):
            raise PickleError("it makes a path of something else than names")
        return str(kind(*parts))

    return Constructor(build)


def _numpy_type(code: Any, *_: Any) -> NumpyType:
    if type(code) is not str:
        raise PickleError("it makes a dtype of something else than its name")
    return NumpyType(code)


def _numpy_value(kind: Any, data: Any = b"") -> Any:
    if not isinstance(kind, NumpyType) or type(data) is not bytes:
        raise PickleError("it makes a NumPy value of something else than a dtype and bytes")
    return kind.read(data)


def _device(*arguments: Any) -> str:
    return ":".join(printable(str(argument)) for argument in arguments if type(argument) in (str, int))


_TENSOR, _PARAMETER = Kind("Tensor"), Kind("Parameter")
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "QUInt8": "quint8",
    "QInt8": "qint8",
    "QInt32": "qint32",
}
_NOT_NUMBERS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, without its numbers",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of a device of its own",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a device of its own",
}
_INERT: dict[str, Any] = {
    "collections.OrderedDict": Constructor(_dict),
    "collections.Counter": Constructor(_dict),
    "collections.defaultdict": Constructor(_default_dict),
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), Constructor(_record)),
    **{f"pathlib.{local}PosixPath": _path(PurePosixPath) for local in ("", "Pure", "_local.", "_local.Pure")},
    **{f"pathlib.{local}WindowsPath": _path(PureWindowsPath) for local in ("", "Pure", "_local.", "_local.Pure")},
    "numpy.dtype": Constructor(_numpy_type),
    **{f"numpy.{core}.multiarray.scalar": Constructor(_numpy_value) for core in ("core", "_core")},
    # what a defaultdict would call: text here, which nothing can
    **{f"builtins.{name}": name for name in ("bool", "dict", "float", "int", "list", "str", "tuple")},
    **{"builtins.long": "int", "builtins.unicode": "str"},  # as protocol 2 calls them
    "builtins.set": Constructor(_items),
    "_codecs.encode": Constructor(_bytes),
    "torch.Size": Constructor(_items),
    "torch.device": Constructor(_device),
    "torch.serialization._get_layout": Constructor(_device),
    "torch.Tensor": _TENSOR,
    "torch.nn.parameter.Parameter": _PARAMETER,
    "torch.storage.UntypedStorage": Kind(None),
    **{f"torch.{name}Storage": Kind(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": Kind(name) for name in (*DTYPES, "quint8", "qint8", "qint32")},
    **{
        f"torch.per_{part}_{kind}": Kind(f"per_{part}_{kind}")
        for part, kind in (
            ("tensor", "affine"),
            ("tensor", "symmetric"),
            ("channel", "affine"),
            ("channel", "symmetric"),
            ("channel", "affine_float_qparams"),
        )
    },
}
