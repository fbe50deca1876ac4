"""Files -> nested Python containers of NumPy arrays. Nothing in a file is ever executed.

PyTorch files are read by `torch.load(weights_only=True)`, which builds tensors and plain containers only; this is
the conversion path's one import of torch. `.safetensors` files need no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickletools
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from convert.engine import ConversionError


def read(path: str | os.PathLike[str]) -> Any:
    """The contents of a `.safetensors` or PyTorch file, tensors as NumPy arrays (bfloat16, float8 as float32).

    Raises ConversionError, saying what the file is, if it is not a whole checkpoint or its pickle would run code.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: Path) -> str:
    """By the file's name, first bytes and structure: "safetensors" or "torch"; ConversionError if neither."""
    if not path.exists():
        raise ConversionError(f"no such file: {path}")
    if path.is_dir():
        raise ConversionError(f"{path} is a folder; name the checkpoint file in it")
    size = path.stat().st_size
    if size == 0:
        raise ConversionError(f"{path} is empty (0 bytes); copy or download it again")
    with open(path, "rb") as file:
        head = file.read(16)
    if path.suffix == ".safetensors":
        return "safetensors"
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise ConversionError(f"{path} is truncated: it begins like a PyTorch file but has no end ({size} bytes)")
        _check_zip(path)
        return "torch"
    if head.startswith(b"\x80"):
        return "torch"  # a bare pickle: PyTorch's format before 1.6
    if head.startswith(b"version https://"):
        raise ConversionError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ConversionError(f"{path} is a web page, not a checkpoint; download the file itself")
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
            # torch.load does not compare the checksums, and a damaged weight is still a number. A checksum of 0 is
            # that of a file written under torch.serialization.set_crc32_options(False): none.
            for entry in archive.infolist():
                if entry.CRC:
                    with archive.open(entry) as stream:
                        while stream.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise ConversionError(f"{path} is damaged: {error}; copy or download it again") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is not a whole .safetensors file: {error}") from error
    except TypeError:  # NumPy has no bfloat16; torch widens it
        _torch()
        from safetensors.torch import load_file

        return _to_numpy(load_file(path))
    # Once jax is imported, NumPy does have bfloat16 and float8, as dtypes of kind V.
    return {name: value.astype(np.float32) if value.dtype.kind == "V" else value for name, value in tensors.items()}


def _read_torch(path: Path) -> Any:
    torch = _torch()
    try:
        with warnings.catch_warnings():  # of pickle protocols: what cannot be read is an error below
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError ... for broken files
        if name := _refused_global(path, str(error)):
            raise ConversionError(
                f"{path} refused: its pickle calls {name} when loaded, and jddim never runs code from a checkpoint; "
                "if you trust it, load it where it was made and save only tensors: torch.save(model.state_dict(), FILE)"
            ) from error
        if "Unsupported operand" in str(error) and _pickle_protocol(path) > 2:
            raise ConversionError(
                f"{path} is a pickle, but not one that torch.save wrote (its default protocol is 2); load it where it "
                "was made and save it with torch.save(model.state_dict(), FILE)"
            ) from error
        raise ConversionError(
            f"{path} is damaged or truncated: PyTorch cannot read it ({_reason(error)}); copy or download it again"
        ) from error
    try:
        return _to_numpy(contents)
    except (TypeError, RuntimeError) as error:
        raise ConversionError(
            f"{path} holds a tensor that is not a plain array of numbers: {_reason(error)}"
        ) from error


def _refused_global(path: Path, message: str) -> str | None:
    """The function or class that `weights_only` refused to call, by PyTorch's message or the pickle itself."""
    if found := re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class)[:\s]+(?:GLOBAL )?([\w.]+)", message):
        return found.group(1) or found.group(2)
    if "Unsupported operand" not in message:
        return None
    # Protocol 4 and up, where PyTorch stops before it comes to the call. genops reads opcodes and executes none.
    strings: list[str] = []
    with open(path, "rb") as file, contextlib.suppress(ValueError, MemoryError, OverflowError):  # of a broken pickle
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STACK_GLOBAL" and not (name := ".".join(strings[-2:])).startswith("collections."):
                return name
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _pickle_protocol(path: Path) -> int:
    with open(path, "rb") as file:
        head = file.read(2)
    return head[1] if len(head) == 2 and head[0] == 0x80 else 0


def _reason(error: Exception) -> str:
    """What PyTorch found wrong, without its advice (which is to switch `weights_only` off, or to report a bug)."""
    message = str(error)
    if "WeightsUnpickler error:" in message:
        message = message.partition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0].partition(" (Could this error")[0][:160] if lines else type(error).__name__


def _to_numpy(value: Any) -> Any:
    torch = _torch()
    if isinstance(value, torch.Tensor):
        value = value.detach()
        known = (torch.float16, torch.float32, torch.float64)
        return (value.float() if value.is_floating_point() and value.dtype not in known else value).numpy()
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_numpy(item) for item in value]
    return value


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError("reading PyTorch checkpoints needs PyTorch: pip install 'jddim[convert]'") from error
    return torch
