"""Pickles of NVIDIA's networks (torch_utils.persistence), whose classes lie in them as source code: only data is read.

Each object is its class's source, which nothing here looks at, and its attributes; a module's are its parameters, its
buffers and its parts, and the arguments that it was made with. A storage is a file of PyTorch's old format in itself.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np

from .mapped import MappedFile
from .pickles import MAX_DEPTH, Constructor, PickleError, Record, load, plain
from .torch_legacy import header, no_storage
from .torch_zip import DamagedFileError, Kind, Storage, bounded_leaf, known_globals, numpy_dtype, parse_storage

NAME = "torch_utils.persistence."
"""How the global of such an object begins."""
ENTRY = "network"
"""Beside a module's tensors: its class's name and the arguments that it was made with."""
_MOST = 100_000
"""Tensors and arguments: a hundred times a network's."""


@dataclasses.dataclass(frozen=True)
class _Held(Storage):
    memory: bytes
    big_endian: bool


def read(path: Path) -> Any:
    """The modules of a pickle, by their keys: each its tensors by dotted names, and ENTRY. Nothing else of it.

    Raises PickleError (RefusedGlobalError among them), LayoutError, DamagedFileError or NotNumbersError.
    """
    file = MappedFile.open(path)
    value = load(file.buffer, _known(), no_storage)
    entries = value if type(value) is dict else {"model": value}
    modules = {key: entry for key, entry in entries.items() if isinstance(entry, Record) and "_modules" in entry}
    if not modules:
        raise PickleError("none of its objects is a network")
    return plain({key: _flat(module) for key, module in modules.items()}, bounded_leaf(file.size), _MOST)


def _flat(module: Record) -> dict[str, Any]:
    """A module's tensors by dotted names, and what it was made with."""
    found: dict[str, Any] = {}
    left = _MOST

    def visit(part: Any, path: str, depth: int) -> None:
        nonlocal left
        left -= 1
        match part:
            case {"_parameters": dict(parameters), "_buffers": dict(buffers), "_modules": dict(parts)}:
                tensors = {f"{path}{name}": value for name, value in {**parameters, **buffers}.items()}
            case _:
                raise PickleError("one of its modules is none")
        if left < 0 or depth > MAX_DEPTH:
            raise PickleError("its modules lie in each other without end")
        found.update({name: value for name, value in tensors.items() if value is not None})
        for name, inner in parts.items():
            if inner is not None:
                visit(inner, f"{path}{name}.", depth + 1)

    visit(module, "", 0)
    made_with = module.get("_init_kwargs")
    return {**found, ENTRY: {"class_name": module.get("class_name"), **(made_with if type(made_with) is dict else {})}}


def _known() -> dict[str, Any]:
    def array(source: Storage, offset: int, shape: Any, strides: Any, kind: Kind | None = None) -> np.ndarray:
        if not isinstance(source, _Held):
            raise PickleError("it refers to a storage where there are none")
        return MappedFile(source.memory).array(
            source.dtype if kind is None else numpy_dtype(kind),
            shape,
            start=0,
            length=source.nbytes,
            offset=offset,
            strides=strides,
            big_endian=source.big_endian,
        )

    containers = ("ModuleDict", "ModuleList", "Sequential")
    return known_globals(array) | {
        f"{NAME}_reconstruct_persistent_obj": Constructor(_persistent),
        **dict.fromkeys((f"torch.nn.modules.container.{name}" for name in containers), Constructor(Record)),
        "torch.storage._load_from_bytes": Constructor(_storage),
        "dnnlib.util.EasyDict": Constructor(dict),
    }


def _persistent(meta: Any) -> Record:
    """An object's attributes, and the name of its class."""
    match meta:
        case {"type": "class", "class_name": str(name), "state": dict(state)}:
            made = Record(class_name=name)
            made.set_state(state)
            return made
    raise PickleError("it makes an object of something else than its attributes")


def _storage(data: Any) -> _Held:
    if type(data) is not bytes:
        raise PickleError("it makes a storage of something else than bytes")
    stream = io.BytesIO(data)
    known = known_globals(lambda *_: None)
    big_endian = header(stream, known)
    found = load(stream, known, parse_storage)
    keys = load(stream, {}, no_storage)
    if not isinstance(found, Storage) or keys != [found.key]:
        raise DamagedFileError("one of its storages is not one that torch.save writes")
    numel, memory = int.from_bytes(stream.read(8), "little"), stream.read()
    if numel != found.numel or len(memory) != found.nbytes:
        raise DamagedFileError(f"a storage of {found.numel} numbers has {numel}, in {len(memory)} bytes")
    return _Held(found.kind, found.key, found.numel, memory, big_endian)
