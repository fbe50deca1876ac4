"""jddim's checkpoints: an Orbax folder of parameters with JSON metadata beside them.

The folder holds two Orbax items, `params` (a nested dict of float32 arrays) and `metadata` (JSON: model config,
schedule, sampler defaults, where the weights came from), a model card (`README.md`: the metadata for people, never read
back), and whatever reports are put beside them (`verify.json`).
It is written under another name and renamed when whole, and it carries digests of its own contents, so a folder
that loads is the folder that was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jddim import interrupt
from jddim.checkpoint.card import NAME, card
from jddim.checkpoint.metadata import FORMAT_VERSION, Metadata
from jddim.checkpoint.orbax import is_full_disk, orbax, quiet_orbax
from jddim.config import SamplerConfig, ScheduleConfig, did_you_mean, from_json
from jddim.models import MODELS
from jddim.models.building import Params, abstract_model, check_fit, flat_params


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or written, with what to do about it."""


def save_checkpoint(
    path: str | os.PathLike[str], params: Params, metadata: Metadata, *, overwrite: bool = False
) -> Metadata:
    """Write a checkpoint folder; returns the metadata as written, digests filled in.

    Atomic: until the last rename nothing exists at `path` (or, with `overwrite`, the old checkpoint does).
    Raises CheckpointError if `path` exists and `overwrite` is False, or is something else than a checkpoint.
    """
    target = Path(path).absolute()
    check_destination(target, overwrite=overwrite)
    metadata = dataclasses.replace(metadata, params_sha256=_digest(params))
    check_fit(metadata.model, params)  # raises if they would not load again
    ocp = orbax()
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    retired = staging.with_suffix(".old")
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        interrupt.unwind()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Trained weights hardly compress; trying takes longer than writing them, and twice their memory.
        handler = ocp.CompositeCheckpointHandler(
            params=ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False),
            metadata=ocp.JsonCheckpointHandler(),
        )
        with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                staging,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(_nested(params)),
                    metadata=ocp.args.JsonSave({**metadata.to_json(), "sha256": metadata.sha256}),
                ),
            )
        (staging / NAME).write_text(card(metadata, sum(value.size for value in params.values())), encoding="utf-8")
        if target.exists():
            target.rename(retired)
        staging.rename(target)
    except BaseException as error:
        if retired.exists() and not target.exists():
            retired.rename(target)
        _remove_all(staging)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, Exception) and is_full_disk(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)
    return metadata


def _remove_all(staging: Path) -> None:
    """Remove what Orbax has written: under a longer name at first, and its threads may go on for a moment."""
    quiet = 0
    while quiet < 30:
        leftovers = list(staging.parent.glob(f"{staging.name}*"))
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        quiet = 0 if leftovers else quiet + 1
        time.sleep(0.01)


def check_destination(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise CheckpointError if a checkpoint may not be written to `path`; call it before the long work."""
    target = Path(path).absolute()
    exists = False
    with contextlib.suppress(OSError):  # a name the file system does not take: trying it, below, says why
        exists = target.exists() or target.is_symlink()
    if exists:
        if not overwrite:
            raise CheckpointError(f"{path} exists; choose another name, or pass --overwrite (overwrite=True)")
        if not _is_ours(target):
            raise CheckpointError(
                f"{path} exists and is not a jddim checkpoint, so it is not overwritten; remove it first"
            )
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
        raise CheckpointError(f"cannot write {path}: {parent} is not a writable folder")
    # Only trying tells: permissions do not bind root, and file systems refuse for reasons of their own.
    probe = parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.mkdir()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot write {path}: {(error.strerror if isinstance(error, OSError) else None) or error} in {parent}"
        ) from error
    finally:  # after Ctrl-C too
        with contextlib.suppress(OSError, ValueError):
            probe.rmdir()


def _is_ours(target: Path) -> bool:
    """Whether a folder is a jddim checkpoint, damaged parameters and all: other tools' have a `metadata` folder too."""
    try:
        with open(target / "metadata" / "metadata", "rb") as file:
            return file.read(100).startswith(b'{"format": "jddim"')
    except OSError:
        return False


def load_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of a checkpoint folder, without its parameters.

    Raises CheckpointError if the folder is absent, incomplete, edited, or written by a newer jddim.
    """
    target = Path(path).absolute()
    if not target.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if not target.is_dir():
        raise CheckpointError(
            f"{path} is a file, not a jddim checkpoint folder; if it is a PyTorch checkpoint, convert it first: "
            f"jddim convert {path} DST"
        )
    if not (target / "metadata").is_dir():
        raise CheckpointError(
            f"{path} is not a jddim checkpoint: it has no metadata (an interrupted copy, or another tool's)"
        )
    ocp = orbax()
    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            data = checkpointer.restore(target, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    except Exception as error:  # Orbax raises many kinds for a damaged folder; each means the same to the caller
        raise CheckpointError(
            f"{path}: metadata cannot be read ({_first_line(error)}); convert the checkpoint again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != "jddim":
        raise CheckpointError(f"{path} is not a jddim checkpoint: its metadata does not say so")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this jddim reads {FORMAT_VERSION}; "
            + ("upgrade jddim" if isinstance(version, int) and version > FORMAT_VERSION else "convert it again")
        )
    try:
        model = dict(data["model"])
        if (wiring := model.pop("type")) not in MODELS:
            raise ValueError(f"unknown model type {wiring!r}{did_you_mean(str(wiring), MODELS)}")
        metadata = Metadata(
            model=from_json(MODELS[wiring][0], model),
            schedule=from_json(ScheduleConfig, data["schedule"]),
            sampler=from_json(SamplerConfig, data["sampler"]),
            provenance=data["provenance"],
            params_sha256=data["params_sha256"],
        )
        stored = data["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: metadata is damaged or edited ({_first_line(error)}); convert the checkpoint again"
        ) from error
    if stored != metadata.sha256:
        raise CheckpointError(
            f"{path}: metadata was edited after it was written (its SHA-256 does not match); to change settings, "
            "convert again with --set KEY=VALUE, or pass them to sample"
        )
    return metadata


def load_params(path: str | os.PathLike[str], metadata: Metadata) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint folder, on the host, checked against their digest.

    They are restored onto a tree built from the config, so it does not matter on how many or which devices they
    were saved. Raises CheckpointError if any is missing, damaged or edited.
    """
    expected = flat_params(abstract_model(metadata.model))
    target = _nested({name: np.empty(leaf.shape, leaf.dtype) for name, leaf in expected.items()})
    ocp = orbax()
    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                Path(path).absolute(), args=ocp.args.Composite(params=ocp.args.StandardRestore(target))
            )["params"]
        params = {name: np.asarray(value) for name, value in _flat(restored).items()}
    except Exception as error:  # as above: whatever Orbax raises, the folder is not the one that was written
        raise CheckpointError(
            f"{path}: parameters are incomplete or damaged ({_first_line(error)}); convert the checkpoint again"
        ) from error
    if _digest(params) != metadata.params_sha256:
        raise CheckpointError(
            f"{path}: parameters are not those that were written (SHA-256 mismatch); convert the checkpoint again"
        )
    return params


def _digest(params: Params) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
