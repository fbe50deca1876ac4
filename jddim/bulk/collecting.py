"""A set that is there: is it whole, all of it as one file, one image of it made again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jddim.bulk import shards
from jddim.bulk.manifest import BulkConfig, BulkError, Manifest, check_settings, read_manifest
from jddim.config import first_few
from jddim.files import atomic

if TYPE_CHECKING:
    from jddim.bulk.run import Make


def problems(folder: str | os.PathLike[str]) -> list[str]:
    """What is missing or damaged in a set, by name; nothing if it is complete. Raises BulkError without a manifest."""
    out = Path(folder)
    manifest = read_manifest(out)
    layout, found = manifest.bulk.layout, []
    for k in range(layout.count):
        try:
            wrong = shards.problem(out, layout, k, manifest.run)
        except shards.OtherRunError as error:
            wrong = str(error)
        if wrong is not None:
            found.append(wrong)
    expected = {p.name for k in range(layout.count) for p in (layout.path(out, k), layout.receipt(out, k))}
    strange = sorted(p.name for p in out.glob("shard-*") if p.name not in expected)
    return found + [f"{name} is none of this set's {layout.count} shards" for name in strange]


def collect(folders: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str]) -> tuple[int, int]:
    """All images, in order, as the file that FID evaluators read: `arr_0` uint8 NHWC, and `arr_1` labels if any.

    folders: one, or what workers made into one each. Every shard is checked, and held one at a time. Returns (images,
    how many of them equal an earlier one in every pixel). Raises BulkError, naming them, if shards are missing, damaged
    or there twice, or the folders' settings differ; then nothing is written.
    """
    outs = [Path(folder) for folder in folders]
    manifest = read_manifest(outs[0])
    for other in outs[1:]:
        check_settings(other, manifest)
    layout, wrong, home = manifest.bulk.layout, [], {}
    for k in range(layout.count):
        states = {out: shards.problem(out, layout, k, manifest.run) for out in outs}
        whole = [out for out, state in states.items() if state is None]
        there = [out for out in outs if layout.path(out, k).exists() or layout.receipt(out, k).exists()]
        wrong += [f"{out}: {states[out]}" for out in there if states[out] is not None]
        if not there:
            wrong.append(f"{layout.path(outs[0], k).name} is missing")
        if len(whole) > 1:
            wrong.append(f"{layout.path(outs[0], k).name} is in {' and in '.join(map(str, whole))}")
        if whole:
            home[k] = whole[0]
    if wrong:
        raise BulkError(
            f"{len(wrong)} of {layout.count} shards: {first_few(wrong, 8)}. Run jddim bulk again, it makes them"
        )
    seen: set[bytes] = set()
    labels: list[NDArray[np.int32]] = []

    def images() -> Iterator[NDArray[np.uint8]]:
        for k in range(layout.count):
            held, own_labels = shards.read(home[k], layout, k)
            seen.update(hashlib.sha256(image.tobytes()).digest() for image in held)
            if own_labels is not None:
                labels.append(own_labels)
            yield held

    with atomic(Path(target)) as staging:
        _save_npz(staging, images(), layout.num, labels)
    return layout.num, layout.num - len(seen)


def _save_npz(path: Path, parts: Iterator[np.ndarray], num: int, labels: list[np.ndarray]) -> None:
    """What np.savez would write, with arr_0 given in parts; labels: filled as the parts are asked for."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        first = next(parts)
        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *first.shape[1:])}
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            entry.write(first.tobytes())
            for part in parts:
                entry.write(part.tobytes())
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.concatenate(labels))


class Comparison(NamedTuple):
    """An image made again beside the one that is kept: how many of its values differ, by how many of 255 at most."""

    number: int
    differing: int
    values: int
    largest: int

    def __str__(self) -> str:
        if not self.differing:
            return f"image {self.number}: identical"
        return f"image {self.number}: {self.differing} of {self.values} values differ, by at most {self.largest} of 255"


def compare(kept: NDArray[np.uint8], again: NDArray[np.uint8], index: int) -> Comparison:
    """How far `again` is from `kept`. Raises ValueError if their shapes differ."""
    if kept.shape != again.shape:
        raise ValueError(f"image {index} is kept as {kept.shape}, made again it is {again.shape}")
    apart = np.abs(kept.astype(int) - again.astype(int))
    return Comparison(index, int((apart > 0).sum()), apart.size, int(apart.max()))


def remake(make: Make, bulk: BulkConfig, index: int) -> NDArray[np.uint8]:
    """Image `index` of the set alone, `(h, w, c)`: at its place of its batch, the others of which are dropped.

    Computed alone or elsewhere in a batch it would be the same up to rounding: kernels are chosen by shape.
    """
    if not 0 <= index < bulk.num:
        raise ValueError(f"the set's images are 0..{bulk.num - 1}, got {index}")
    first = index - index % bulk.batch_size
    image: NDArray[np.uint8] = make(first)[index - first]
    return image


def kept(folder: Path, manifest: Manifest, index: int) -> NDArray[np.uint8]:
    """Image `index` as it lies in the folder, `(h, w, c)`. Raises BulkError if its shard is missing or damaged."""
    bulk = manifest.bulk
    if not 0 <= index < bulk.num:
        raise ValueError(f"the set's images are 0..{bulk.num - 1}, got {index}")
    k, place = divmod(index, bulk.layout.size)
    if (wrong := shards.problem(folder, bulk.layout, k, manifest.run)) is not None:
        raise BulkError(f"{folder}: {wrong}")
    image: NDArray[np.uint8] = shards.read(folder, bulk.layout, k)[0][place]
    return image
