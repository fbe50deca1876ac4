"""What differs between two checkpoints, settings or sets of samples: one table, so that "mine differs" is a paste.

Nothing is sampled. Files: a checkpoint folder, a `.json` of settings, `.npy` or `.npz` samples, a picture of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jddim.checkpoint.folder import load_params, load_recorded
from jddim.files import read_arrays, read_json
from jddim.images import SHEETS, open_picture, read_metadata


class Difference(NamedTuple):
    """One row: what (a dotted name), and its value in A and in B."""

    name: str
    a: str
    b: str


ABSENT = "(absent)"


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> list[Difference]:
    """The rows in which A and B differ; none if they are equal. Both must be of one kind.

    Checkpoints: metadata entry by entry, then the largest difference of each block's parameters over the largest
    magnitude in A. Samples: shape and dtype, how many are equal, the largest and mean difference. Settings: entries;
    of two pictures, the pixels as well.
    Raises ValueError if the kinds differ or a file is of none; `CheckpointError` for a damaged checkpoint.
    """
    paths = Path(a), Path(b)
    kinds = tuple(_kind(path) for path in paths)
    if kinds[0] != kinds[1]:
        raise ValueError(f"{a} is {kinds[0]}, {b} is {kinds[1]}; compare two of one kind")
    if kinds[0] == CHECKPOINT:
        return _diff_checkpoints(*paths)
    if kinds[0] == SAMPLES:
        return _diff_samples(*(_arrays(path) for path in paths))
    rows = diff_mappings(*(_settings(path) for path in paths))
    if all(path.suffix.lower() in SHEETS for path in paths):
        rows += _diff_samples(*({"pixels": _pixels(path)} for path in paths))
    return rows


CHECKPOINT, SAMPLES, SETTINGS = "a checkpoint", "a set of samples", "a file of settings"


def _kind(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if path.is_dir():
        return CHECKPOINT  # reading it says so if it is none
    match path.suffix.lower():
        case ".npy" | ".npz":
            return SAMPLES
        case suffix if suffix in (".json", *SHEETS):
            return SETTINGS
    settings = ", ".join(SHEETS)
    raise ValueError(f"{path}: compare checkpoint folders, .npy or .npz samples, or settings in .json, {settings}")


def diff_mappings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Entry by entry, nested ones by dotted name, in A's order and then B's."""
    flat_a, flat_b = _flat(a), _flat(b)
    return [
        Difference(name, _shown(flat_a.get(name, ABSENT)), _shown(flat_b.get(name, ABSENT)))
        for name in {**flat_a, **flat_b}
        if flat_a.get(name, ABSENT) != flat_b.get(name, ABSENT)
    ]


def _diff_checkpoints(a: Path, b: Path) -> list[Difference]:
    metadata = [load_recorded(path) for path in (a, b)]
    rows = diff_mappings(*(m.to_json() for m in metadata))
    # Rounding, and what schedule and sampler say already.
    skipped = ("provenance.verification.blocks.", "provenance.wording.")
    rows = [row for row in rows if not row.name.startswith(skipped)]
    if metadata[0].params_sha256 == metadata[1].params_sha256:
        return rows
    params = [load_params(path, m) for path, m in zip((a, b), metadata, strict=True)]
    blocks: dict[str, list[str]] = {}
    for name in {**params[0], **params[1]}:
        blocks.setdefault(name.rpartition(".")[0], []).append(name)
    for block, names in blocks.items():
        shapes = [{n: p[n].shape for n in names if n in p} for p in params]
        if shapes[0] != shapes[1]:
            sides = [_shown({n.rpartition(".")[2]: shape for n, shape in s.items()}) if s else ABSENT for s in shapes]
            rows.append(Difference(f"weights.{block}", *sides))
        elif worst := max(np.abs(params[0][n] - params[1][n]).max(initial=0) for n in names):
            scale = max(np.abs(params[0][n]).max(initial=0) for n in names) or 1
            rows.append(Difference(f"weights.{block}", "", f"differs by {worst / scale:.1e} of A's scale"))
    return rows


def _diff_samples(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[Difference]:
    rows = []
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            rows.append(Difference(name, *(ABSENT if v is None else f"{v.dtype} {v.shape}" for v in (x, y))))
        elif np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
            continue
        elif x.ndim == 0 or x.dtype.kind not in "biuf":
            rows.append(Difference(name, _shown(str(x)), _shown(str(y))))
        else:
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
            same = (x == y).reshape(len(x), -1).all(axis=1).sum()
            rows.append(
                Difference(
                    name, f"{same} of {len(x)} equal", f"differ by {apart.max():.3g}, {apart.mean():.3g} on average"
                )
            )
    return rows


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        contents = read_arrays(path, text=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no arrays of numbers ({error})") from error
    return contents if isinstance(contents, dict) else {"samples": contents}


def _pixels(path: Path) -> np.ndarray:
    with open_picture(path) as image:
        return np.asarray(image.convert("RGB"))[None]  # WebP has no grey


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path) if path.suffix.lower() == ".json" else read_metadata(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no settings ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: expected a JSON object")
    return settings


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _shown(value: Any, width: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def table(rows: list[Difference]) -> str:
    """The rows as aligned text."""
    widths = [max(len(row[i]) for row in [*rows, Difference("", "A", "B")]) for i in range(2)]
    return "\n".join(f"{n:<{widths[0]}}  {a:<{widths[1]}}  {b}".rstrip() for n, a, b in [("", "A", "B"), *rows])
