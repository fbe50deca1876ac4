"""Files -> nested Python containers of NumPy arrays. Nothing in a file is ever executed.

Both of PyTorch's formats and `.safetensors` are read without PyTorch, straight to arrays that lie in the mapped file;
flax's `.msgpack` to arrays in memory.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

from ..engine import ConversionError
from . import flax_msgpack, persistence, safetensors_file, torch_legacy, torch_zip
from .mapped import UnreadableError
from .pickles import RefusedGlobalError, printable


def read(path: str | os.PathLike[str]) -> Any:
    """The contents of a `.safetensors`, PyTorch or flax file, tensors as NumPy arrays of their own dtype.

    Arrays may be read-only views of the file, mapped into memory: it must not change while they are in use. bfloat16
    and float8 are dtypes of `ml_dtypes` (`convert.files.mapped.FLOATS`: NumPy does not call them floating).
    Raises ConversionError, saying what the file is, if it is not a whole checkpoint or its pickle would run code.
    """
    path = Path(path)
    kind = _kind(path)
    try:
        if kind == "safetensors":
            return safetensors_file.read(path)
        if kind == "msgpack":
            return flax_msgpack.read(path)
        if kind == "zip":
            return torch_zip.read(path)
        try:
            return torch_legacy.read(path)
        except RefusedGlobalError as error:
            if not error.name.startswith(persistence.NAME):
                raise
            return persistence.read(path)
    except UnreadableError as error:
        raise _refusal(path, error) from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: Path) -> str:
    """By the file's name, first bytes and structure: "safetensors", "msgpack", "zip", "legacy"; or ConversionError."""
    if not path.exists():
        raise ConversionError(f"no such file: {path}")
    if path.is_dir():
        raise ConversionError(f"{path} is a folder; name the checkpoint file in it")
    size = path.stat().st_size
    if size == 0:
        raise ConversionError(f"{path} is empty (0 bytes); copy or download it again")
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"version https://"):
        raise ConversionError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ConversionError(f"{path} is a web page, not a checkpoint; download the file itself")
    if path.suffix in (".safetensors", ".msgpack"):
        return path.suffix[1:]
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise ConversionError(f"{path} is truncated: it begins like a PyTorch file but has no end ({size} bytes)")
        _check_zip(path)
        return "zip"
    if head.startswith(b"\x80"):
        return "legacy"  # a bare pickle: PyTorch's format before 1.6
    raise ConversionError(
        f"{path} is not a PyTorch checkpoint: it begins with {head[:8]!r}; expected a file written by torch.save, or "
        ".safetensors"
    )


def _check_zip(path: Path) -> None:
    """Raise ConversionError unless a zip is a PyTorch checkpoint and its bytes have their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
                raise ConversionError(
                    f"{path} is a TorchScript program, not a checkpoint; save its state_dict() instead"
                )
            if not any(name.endswith("/data.pkl") for name in names):
                raise ConversionError(
                    f"{path} is a zip archive, but not a PyTorch checkpoint (holds {', '.join(names[:3]) or 'nothing'})"
                )
        torch_zip.check(path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path} is damaged: {printable(str(error))}; copy or download it again") from error


def _refusal(path: Path, error: Exception) -> ConversionError:
    """What is wrong with a file, in the same words for both of PyTorch's formats."""
    told = printable(str(error), 300)  # it may quote a shape of many large numbers
    if path.suffix in (".safetensors", ".msgpack"):
        return ConversionError(f"{path} is not a whole {path.suffix} file: {told}")
    match error:
        case RefusedGlobalError() if error.name.startswith(persistence.NAME):
            return ConversionError(
                f"{path} is a file of torch.save with NVIDIA's networks in it, which hold their source code to be run, "
                "and jddim never runs code from a checkpoint; of these networks it reads the .pkl snapshots"
            )
        case RefusedGlobalError():
            return ConversionError(
                f"{path} refused: its pickle calls {error.name} when loaded, and jddim never runs code from a "
                "checkpoint; if you trust it, load it where it was made and save only tensors: "
                "torch.save(model.state_dict(), FILE)"
            )
        case torch_legacy.NotTorchError():
            return ConversionError(
                f"{path} is a pickle, but not one that torch.save wrote; load it where it was made and save it with "
                "torch.save(model.state_dict(), FILE)"
            )
        case torch_zip.NotNumbersError():
            return ConversionError(f"{path} holds a tensor that is not a plain array of numbers: {told}")
        case _:
            return ConversionError(f"{path} is damaged or truncated: {told}; copy or download it again")
