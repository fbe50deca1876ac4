"""Sharded weights: a JSON index that says which file beside it holds which tensor, as diffusers and transformers write.

A plain weights file counts as its own only shard, so that callers need not ask.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from jddim.files import read_json

from ..engine import ConversionError, shortened
from .pickles import printable
from .readers import read, sha256

INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
"""The end of an index's name: `NAME.safetensors.index.json`, `NAME.bin.index.fp16.json`."""


def read_weights(path: Path) -> Any:
    """The contents of a weights file, or all tensors of an index's shards.

    Raises ConversionError if the index is damaged, names a file elsewhere than beside it, or disagrees with the files.
    """
    if not INDEX.search(path.name):
        return read(path)
    tensors: dict[str, Any] = {}
    problems = []
    for name, expected in _shards(path).items():
        contents = read(path.parent / name)
        if not isinstance(contents, dict):
            raise ConversionError(f"{path.parent / name} holds a value of type {type(contents).__name__}, not tensors")
        problems += [f"{key} is not in {name}" for key in expected if key not in contents]
        problems += [f"{key} in {name} is not in the index" for key in contents if key not in expected]
        tensors |= contents
    if problems:
        raise ConversionError(f"{path} and its files disagree: {shortened(problems)}")
    return tensors


def files_of(path: Path) -> list[Path]:
    """The file itself, or the index and its shards."""
    return [path, *(path.parent / name for name in _shards(path))] if INDEX.search(path.name) else [path]


def digest(path: Path) -> str:
    """The SHA-256 of a weights file; of an index, that of the names and SHA-256s of it and its shards, a line each."""
    files = files_of(path)
    if len(files) == 1:
        return sha256(path)
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def _shards(index: Path) -> dict[str, set[str]]:
    """File name -> the tensors in it."""
    try:
        contents = read_json(index)
    except FileNotFoundError as error:
        raise ConversionError(f"no such file: {index}") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{index} is not JSON: {str(error)[:200]}; copy or download it again") from error
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} is no index of shards: it has no weight_map of tensors to files")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(name if isinstance(name, str) else repr(name), set()).add(tensor)
    plain_name = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
    if odd := [printable(repr(name)) for name in shards if not plain_name.fullmatch(name)]:
        raise ConversionError(
            f"{index} refused: it names files that do not lie beside it, or are no file names: {shortened(odd)}"
        )
    if absent := [name for name in shards if not (index.parent / name).is_file()]:
        raise ConversionError(f"{index} names files that are not there: {shortened(absent)}; copy or download them")
    return shards
