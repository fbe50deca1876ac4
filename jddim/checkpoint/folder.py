"""jddim's checkpoints: an Orbax folder of parameters with JSON metadata beside them.

The folder holds two Orbax items, `params` (a nested dict of float32 arrays) and `metadata` (JSON: model config,
schedule, sampler defaults, where the weights came from; classifiers and first stages have no schedule and no sampler),
a model card (`README.md`: the metadata for people, never read back), and whatever reports are put beside them
(`verify.json`).
It is written under another name and renamed when whole, and it carries digests of its own contents, so a folder
that loads is the folder that was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jddim.checkpoint.card import NAME, card
from jddim.checkpoint.metadata import FIRST_STAGE, FORMAT_VERSION, Metadata, PartMetadata, is_part
from jddim.checkpoint.orbax import is_full_disk, orbax, quiet_orbax
from jddim.config import AutoencoderConfig, ClassifierConfig
from jddim.files import check_regular, open_regular, parse_json, read_json, recover, replacing
from jddim.models.building import Params, abstract_model, check_fit, flat_params

_METADATA = Path("metadata", "metadata")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or written, with what to do about it."""


T = TypeVar("T")
M = TypeVar("M", Metadata, PartMetadata)


def save_checkpoint(path: str | os.PathLike[str], params: Params, metadata: M, *, overwrite: bool = False) -> M:
    """Write a checkpoint folder; returns the metadata as written, digests filled in.

    Atomic: until the last rename nothing exists at `path` (or, with `overwrite`, the old checkpoint does).
    Raises CheckpointError if `path` exists and `overwrite` is False, or is something else than a checkpoint.
    """
    target = Path(path).absolute()
    check_destination(target, overwrite=overwrite)
    metadata = dataclasses.replace(metadata, params_sha256=_digest(params))
    for begins, config in metadata.networks.items():
        check_fit(config, part_of(params, begins))  # raises if they would not load again
    try:
        type(metadata).from_json(parse_json(json.dumps(metadata.written())))
    except ValueError as error:
        raise CheckpointError(f"{path} would not load again, so it is not written: {error}") from error
    ocp = orbax()
    try:
        with replacing(target, _is_ours if overwrite else None) as new:
            # Trained weights hardly compress; trying takes longer than writing them, and twice their memory. A copy of
            # them would guard against changes meanwhile, and nothing changes them: Checkpointer returns when all is
            # written.
            arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
            kinds = (np.ndarray, arrays), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
            registry = ocp.type_handlers.create_type_handler_registry(*kinds)
            handler = ocp.CompositeCheckpointHandler(
                params=ocp.PyTreeCheckpointHandler(
                    use_zarr3=True, use_compression=False, type_handler_registry=registry
                ),
                metadata=ocp.JsonCheckpointHandler(),
            )
            with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(
                    new,
                    args=ocp.args.Composite(
                        params=ocp.args.PyTreeSave(_nested(params)), metadata=ocp.args.JsonSave(metadata.written())
                    ),
                )
            for done in new.rglob("commit_success.txt"):  # Orbax says in it where on this machine it wrote
                done.write_text("Checkpoint commit was successful")
            (new / NAME).write_text(card(metadata, sum(value.size for value in params.values())), encoding="utf-8")
    except FileExistsError as error:
        raise CheckpointError(
            f"{path} appeared while the checkpoint was written, and was left as it is; choose another name"
            + ("" if overwrite else ", or pass --overwrite (overwrite=True)")
        ) from error
    except Exception as error:
        if is_full_disk(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    return metadata


def check_destination(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise CheckpointError if a checkpoint may not be written to `path`; call it before the long work."""
    target = Path(path).absolute()
    recover(target)
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
        with open_regular(target / _METADATA) as file:
            return file.read(100).startswith(b'{"format": "jddim"')
    except OSError:
        return False


def load_metadata(path: str | os.PathLike[str], named: object = None) -> Metadata:
    """The metadata of the checkpoint folder of a network to sample, without its parameters.

    Raises CheckpointError if the folder is absent, incomplete, edited, or written by a newer jddim, or a classifier's.
    named: what the folder was made from, which the user knows it by.
    """
    metadata = load_recorded(path)
    if isinstance(metadata, Metadata):
        return metadata
    if isinstance(metadata.model, ClassifierConfig):
        told = (
            "a classifier, which is not sampled but guides: jddim sample CKPT OUT --labels LABELS "
            f"--classifier {named or path} --classifier-scale 1 (jddim.load_classifier)"
        )
    else:
        told = (
            "a first stage, which is not sampled but decodes what is: convert the network of its latents with "
            f"--autoencoder {named or path} (jddim.load_autoencoder)"
        )
    raise CheckpointError(f"{named or path} is {told}")


def load_classifier_metadata(path: str | os.PathLike[str], named: object = None) -> PartMetadata:
    """As `load_metadata`, of a classifier, and only of one."""
    return _of_part(path, named, ClassifierConfig, "classifier")


def load_autoencoder_metadata(path: str | os.PathLike[str], named: object = None) -> Metadata | PartMetadata:
    """As `load_metadata`, of a first stage, or of a network that has one beside it."""
    metadata = load_recorded(path)
    if isinstance(metadata, Metadata) and metadata.autoencoder is not None:
        return metadata
    return _of_part(path, named, AutoencoderConfig, "first stage")


def _of_part(path: str | os.PathLike[str], named: object, kind: type, noun: str) -> PartMetadata:
    metadata = load_recorded(path)
    if not isinstance(metadata.model, kind):
        used = "but a network to sample: " if isinstance(metadata, Metadata) else "but "
        raise CheckpointError(f"{named or path} is no {noun}, {used}{metadata.model.summary}")
    assert isinstance(metadata, PartMetadata)
    return metadata


def load_recorded(path: str | os.PathLike[str]) -> Metadata | PartMetadata:
    """As `load_metadata`, of a checkpoint folder of any kind."""
    target = Path(path).absolute()
    if not target.exists():
        recover(target)
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
    try:
        data = read_json(target / _METADATA)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: metadata cannot be read ({_first_line(error)}); convert the checkpoint again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != "jddim":
        raise CheckpointError(f"{path} is not a jddim checkpoint: its metadata does not say so")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {str(version)[:20]}, this jddim reads {FORMAT_VERSION}; "
            + ("upgrade jddim" if isinstance(version, int) and version > FORMAT_VERSION else "convert it again")
        )
    try:
        metadata = PartMetadata.from_json(data) if is_part(data) else Metadata.from_json(data)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: metadata is damaged or edited ({_first_line(error)}); convert the checkpoint again"
        ) from error
    if data.get("sha256") != metadata.sha256:
        raise CheckpointError(
            f"{path}: metadata was edited after it was written (its SHA-256 does not match); to change settings, "
            "convert again with --set KEY=VALUE, or pass them to sample"
        )
    return metadata


def load_params(path: str | os.PathLike[str], metadata: Metadata | PartMetadata) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint folder, on the host, checked against their digest.

    They are restored onto a tree built from the config, so it does not matter on how many or which devices they
    were saved. Raises CheckpointError if any is missing, damaged or edited.
    """
    target = Path(path).absolute()
    expected = shapes_of(metadata)
    ocp = orbax()
    try:
        check_regular(target)
        with quiet_orbax():
            stored = ocp.PyTreeCheckpointHandler().metadata(target / "params").tree
            _check_stored(_flat(stored), expected, sum(file.stat().st_size for file in (target / "params").rglob("*")))
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                empty = _nested({name: np.empty(leaf.shape, leaf.dtype) for name, leaf in expected.items()})
                restored = checkpointer.restore(target, args=ocp.args.Composite(params=ocp.args.StandardRestore(empty)))
        params = {name: np.asarray(value) for name, value in _flat(restored["params"]).items()}
    except Exception as error:  # Orbax raises many kinds; whichever, the folder is not the one that was written
        raise CheckpointError(
            f"{path}: parameters are incomplete or damaged ({_first_line(error)}); convert the checkpoint again"
        ) from error
    if _digest(params) != metadata.params_sha256:
        raise CheckpointError(
            f"{path}: parameters are not those that were written (SHA-256 mismatch); convert the checkpoint again"
        )
    return params


def shapes_of(metadata: Metadata | PartMetadata) -> dict[str, Any]:
    """Every parameter of a checkpoint, name -> shape and dtype."""
    return {
        begins + name: leaf
        for begins, config in metadata.networks.items()
        for name, leaf in flat_params(abstract_model(config)).items()
    }


def part_of(params: Mapping[str, T], begins: str) -> dict[str, T]:
    """The parameters of one of a checkpoint's networks (`Recorded.networks`), under that network's own names."""
    if not begins:
        return {name: value for name, value in params.items() if not name.startswith(FIRST_STAGE)}
    return {name.removeprefix(begins): value for name, value in params.items() if name.startswith(begins)}


def _check_stored(stored: Mapping[str, Any], expected: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless the arrays that are stored are the config's, before memory is taken for them.

    size: the bytes of all files. A file can say of an array, and of its chunks, that they are as large as it likes.
    """
    if strange := sorted(stored.keys() ^ expected.keys()):
        raise ValueError(f"{len(strange)} arrays are stored or the config's alone, among them {strange[0][:100]}")
    for name, leaf in expected.items():
        found = stored[name]
        if tuple(found.shape) != leaf.shape:
            raise ValueError(f"{name} is stored as {str(found.shape)[:60]}, the config's is {leaf.shape}")
        chunk = (found.storage and found.storage.chunk_shape) or ()
        if any(part > max(side, 1) for part, side in zip(chunk, leaf.shape, strict=True)):
            raise ValueError(f"{name} is stored in chunks of {str(chunk)[:60]}, larger than it is, {leaf.shape}")
    if (total := sum(leaf.size * leaf.dtype.itemsize for leaf in expected.values())) > 8 * size + 2**20:
        raise ValueError(f"the config's parameters have {total} bytes, the files {size}")


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
