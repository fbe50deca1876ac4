"""A large set of images as numbered shards, each with a receipt that tells whether it is whole. NumPy and Pillow only.

Shard k holds images k * size .. (k + 1) * size - 1 of the set, the last one what is left. It is a file, or a folder,
and beside it lies its receipt `shard-00003.json`: which images, of which run, how many bytes with which SHA-256. A
shard is written under another name and renamed, then its receipt is; so whatever stops a run, a shard is either
attested by a receipt that fits to the bit, or it is not there. Nothing relies on the order in which a disk writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim.config import did_you_mean
from jddim.files import atomic, parse_json, read_arrays, read_regular
from jddim.files import remove as clear
from jddim.images import encode_png, open_picture, settings_of

FORMATS = {
    "npz": "arr_0 uint8 NHWC, and arr_1 labels",
    "png": "a folder of numbered PNGs, which say how they were made",
    "tar": "WebDataset: N.png, N.json, and N.cls with labels",
}


MOST_SHARDS = 100_000
"""Their numbers have five digits."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `num` images are cut into shards of `size`, in one of `FORMATS`."""

    num: int
    size: int
    format: str = "npz"

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be."""
        problems = [
            f"{name} must be at least 1, got {value}"
            for name, value in (("num", self.num), ("the shards' size", self.size))
            if value < 1
        ]
        if not problems and self.count > MOST_SHARDS:
            problems.append(f"{self.num} images make {self.count} shards of {self.size}, more than {MOST_SHARDS}")
        if self.format not in FORMATS:
            problems.append(f"unknown format {self.format!r}{did_you_mean(self.format, FORMATS)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-self.num // self.size)

    def images(self, k: int) -> range:
        """The numbers of shard k's images."""
        return range(k * self.size, min((k + 1) * self.size, self.num))

    def path(self, folder: Path, k: int) -> Path:
        """Shard k: a file, or a folder for png."""
        return folder / (f"shard-{k:05d}" + ("" if self.format == "png" else f".{self.format}"))

    def receipt(self, folder: Path, k: int) -> Path:
        """The receipt of shard k."""
        return folder / f"shard-{k:05d}.json"


def encode(
    layout: Layout, k: int, images: NDArray[np.uint8], labels: NDArray[np.int32] | None, metadata: Mapping[str, Any]
) -> dict[str, bytes]:
    """Shard k as its files: their names in the folder, or "" for the one file, and their bytes.

    images: `(n, h, w, c)`. The same arguments give the same bytes. Pictures hold metadata, their number and label.
    """
    numbers = layout.images(k)
    if len(images) != len(numbers) or (labels is not None and len(labels) != len(numbers)):
        raise ValueError(f"shard {k} has {len(numbers)} images, got {len(images)}")
    if layout.format == "npz":
        packed = io.BytesIO()
        arrays: dict[str, Any] = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})
        np.savez(packed, **arrays)
        return {"": packed.getvalue()}
    files: dict[str, bytes] = {}
    for place, i in enumerate(numbers):
        said = {"index": i} | ({} if labels is None else {"label": int(labels[place])})
        files[f"{i:08d}.png"] = encode_png(images[place], {**metadata, **said})
        if layout.format == "tar":
            files[f"{i:08d}.json"] = json.dumps(said).encode()
            if labels is not None:
                files[f"{i:08d}.cls"] = str(labels[place]).encode()
    if layout.format == "png":
        return files
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)  # its time is 0, its owner nobody
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return {"": packed.getvalue()}


def write(folder: Path, layout: Layout, k: int, files: Mapping[str, bytes], run: str) -> None:
    """Write shard k's files, then its receipt. run: the identity of the run, which the receipt names.

    Raises OSError if the disk is full or does not let itself be written to; then nothing of the shard is left.
    """
    with atomic(layout.path(folder, k)) as staging:
        if layout.format == "png":
            staging.mkdir()
        for name, content in files.items():
            (staging / name if name else staging).write_bytes(content)
    with atomic(layout.receipt(folder, k)) as staging:
        staging.write_text(_receipt(layout, k, run, *_digest(files)))


def problem(folder: Path, layout: Layout, k: int, run: str) -> str | None:
    """None if shard k is there and whole, of this run; else what is wrong, as a sentence that names it.

    Raises `OtherRunError` if it is whole but another run's. Reads all of it.
    """
    path, receipt = layout.path(folder, k), layout.receipt(folder, k)
    try:
        said = read_regular(receipt, _MOST_RECEIPT)
    except FileNotFoundError:
        return f"{path.name} is missing" if not path.exists() else f"{path.name} was not finished"
    except (OSError, ValueError):
        return f"{receipt.name} is damaged"
    try:
        files = _files(path, layout)
    except FileNotFoundError:
        return f"{path.name} is missing, its receipt is there"
    except NotADirectoryError:
        return f"{path.name} is no folder"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    found = _digest(files)
    if said == _receipt(layout, k, run, *found).encode():
        return None
    try:
        match parse_json(said):
            case {"run": str(other), "bytes": int(size), "sha256": str(sha256)}:
                pass
            case _:
                return f"{receipt.name} is damaged"
    except ValueError:
        return f"{receipt.name} is damaged"
    if said == _receipt(layout, k, other, *found).encode():
        raise OtherRunError(f"{path} was made by a run with other settings; remove it, or name a new folder")
    if size != found[0]:
        return f"{path.name} has {found[0]} bytes, {size} were written"
    if sha256 != found[1]:
        return f"{path.name} is damaged: its SHA-256 is not what was written"
    return f"{receipt.name} is damaged"


_MOST_RECEIPT = 10_000
"""Bytes; one of ours has a few hundred."""


class OtherRunError(ValueError):
    """A shard that is whole, and of a run with other settings."""


def remove(folder: Path, layout: Layout, k: int) -> None:
    """Remove shard k, its receipt first, and what a stopped run left of it under other names."""
    layout.receipt(folder, k).unlink(missing_ok=True)
    for path in (layout.path(folder, k), *folder.glob(f".shard-{k:05d}.*")):
        clear(path)


def read(folder: Path, layout: Layout, k: int) -> tuple[NDArray[np.uint8], NDArray[np.int32] | None]:
    """Shard k's images `(n, h, w, c)` and labels `(n,)`, if it has any. Raises ValueError if it holds other ones."""
    path, numbers = layout.path(folder, k), layout.images(k)
    labels: Any = None
    try:
        if layout.format == "npz":
            held = read_arrays(path, ["arr_0", "arr_1"])
            if not isinstance(held, dict):
                raise ValueError("it is no archive")
            images, labels = held["arr_0"], held.get("arr_1")
        elif layout.format == "png":
            said = [decode(read_regular(path / f"{i:08d}.png")) for i in numbers]
            images = np.stack([image for image, _ in said])
            if "label" in said[0][1]:
                labels = [metadata["label"] for _, metadata in said]
        else:
            # in memory, where asking for more than there is takes nothing
            with tarfile.open(fileobj=io.BytesIO(read_regular(path)), mode="r:") as archive:
                content = {m.name: archive.extractfile(m).read() for m in archive if m.isreg() and not m.issparse()}  # type: ignore[union-attr]
            images = np.stack([decode(content[f"{i:08d}.png"])[0] for i in numbers])
            if f"{numbers[0]:08d}.cls" in content:
                labels = [parse_json(content[f"{i:08d}.cls"]) for i in numbers]
        if isinstance(labels, list):
            if any(type(label) is not int for label in labels):
                raise ValueError("a label is no whole number")
            labels = np.array(labels, np.int32)
    except (OSError, KeyError, ValueError, OverflowError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(numbers):
        raise ValueError(f"{path} holds {images.dtype} {images.shape}, not {len(numbers)} uint8 images")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(numbers),)):
        raise ValueError(f"{path} holds labels of {labels.dtype} {labels.shape}, not {len(numbers)} whole numbers")
    return images, labels


def decode(content: bytes) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """A PNG of `encode`'s: the picture `(h, w, c)`, and what it says of itself. Raises ValueError if it is none."""
    with open_picture(content) as image:
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1), settings_of(image)


def _files(path: Path, layout: Layout) -> dict[str, bytes]:
    """What `encode` gave, as it lies there. What is in a folder and is no file has no bytes."""
    if layout.format == "png":
        return {file.name: file.read_bytes() if file.is_file() else b"" for file in path.iterdir()}
    return {"": b"" if path.is_dir() else read_regular(path)}


def _digest(files: Mapping[str, bytes]) -> tuple[int, str]:
    """Bytes in all, and the SHA-256 of the one file, or of the lines `name size sha256` of a folder's, by name."""
    each = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    total = sum(map(len, files.values()))
    if "" in each:
        return total, each[""]
    lines = "".join(f"{name} {len(files[name])} {each[name]}\n" for name in sorted(each))
    return total, hashlib.sha256(lines.encode()).hexdigest()


def _receipt(layout: Layout, k: int, run: str, size: int, sha256: str) -> str:
    """A receipt's text. It is compared whole, so that no byte of it can change unnoticed."""
    numbers = layout.images(k)
    said = {"shard": k, "first": numbers.start, "num": len(numbers), "bytes": size, "sha256": sha256, "run": run}
    return json.dumps({**said, "format": layout.format}) + "\n"
