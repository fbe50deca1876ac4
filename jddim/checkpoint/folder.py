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
import functools
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jddim import interrupt
from jddim.checkpoint.card import NAME, card
from jddim.config import ModelConfig, SamplerConfig, ScheduleConfig, did_you_mean, from_json, to_json
from jddim.models import MODELS, Network, build, wiring_of

FORMAT_VERSION = 1

Params = Mapping[str, np.ndarray]


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or written, with what to do about it."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says of itself, beside its parameters.

    provenance: JSON of the converter's: source file and SHA-256, family, EMA or raw and its step, versions, what was
    assumed, the verification figure. params_sha256 covers every parameter's name, shape and bytes.
    """

    model: ModelConfig
    schedule: ScheduleConfig
    sampler: SamplerConfig
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    params_sha256: str = ""

    @property
    def sha256(self) -> str:
        """The checkpoint's identity: a digest of all metadata and, through `params_sha256`, all parameters."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def null_label(self) -> int | None:
        """The label that meant none in `jddim train`; None where there was none, or another code trained."""
        return (self.provenance.get("training") or {}).get("null_label")

    def to_json(self) -> dict[str, Any]:
        """As stored in the `metadata` item (which adds `sha256` over this)."""
        return {
            "format": "jddim",
            "format_version": FORMAT_VERSION,
            "model": {"type": wiring_of(self.model), **to_json(self.model)},
            "schedule": to_json(self.schedule),
            "sampler": to_json(self.sampler),
            "provenance": dict(self.provenance),
            "params_sha256": self.params_sha256,
        }


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """A model's parameters by dotted path, `down.0.blocks.1.conv1.kernel`; arrays, or shapes of an abstract model."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract_model(config: ModelConfig, dtype: DTypeLike = np.float32) -> Any:
    """The model with shapes in place of parameters; nothing is allocated."""
    graph, leaves = _abstract(config, np.dtype(dtype))
    return _merged(graph, {path: leaf.get_value() for path, leaf in leaves.items()}, leaves)


def build_model(config: ModelConfig, params: Params | Mapping[str, Array], dtype: DTypeLike = np.float32) -> Network:
    """The model with these parameters. dtype: the compute dtype; parameters keep their own.

    Raises ValueError naming every parameter that is missing, not the model's, or of another shape (flax's own
    `merge` accepts all three).
    """
    graph, leaves = _abstract(config, np.dtype(dtype))
    _check_fit(config, params)
    # All at once: an `asarray` for each takes jax 20 times as long, since it compiles one for each shape.
    moved = jax.device_put({name: value for name, value in params.items() if not isinstance(value, jax.Array)})
    values = {**params, **moved}
    return _merged(graph, {path: values[".".join(map(str, path))] for path in leaves}, leaves)


def _check_fit(config: ModelConfig, params: Mapping[str, Any]) -> None:
    _, leaves = _abstract(config, np.dtype(np.float32))
    expected = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in leaves.items()}
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in params]
    problems += [f"unexpected {name} {params[name].shape}" for name in params if name not in expected]
    problems += [
        f"{name} has shape {params[name].shape}, the model's is {expected[name]}"
        for name in expected
        if name in params and params[name].shape != expected[name]
    ]
    if problems:
        raise ValueError(f"{len(problems)} parameters do not fit the model: " + "; ".join(problems[:8]))


class _OneKey:
    """Stands in for `nnx.Rngs` where parameters are only shapes.

    Rngs counts its draws in a traced variable, and writing to one takes flax time proportional to all that has been
    traced so far: 8 s for the CIFAR-10 network, against 1.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> Array:
        return self.key


@functools.lru_cache(maxsize=16)
def _abstract(config: ModelConfig, dtype: np.dtype) -> tuple[Any, Mapping[Any, Any]]:
    """A model's graph and its variables by path, shapes in place of values. Shared: never changed, only replaced."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=_OneKey())))
    return graph, dict(nnx.to_flat_state(state))


def _merged(graph: Any, values: Mapping[Any, Any], leaves: Mapping[Any, Any]) -> Any:
    return nnx.merge(graph, nnx.from_flat_state({path: leaves[path].replace(values[path]) for path in leaves}))


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
    _check_fit(metadata.model, params)  # raises if they would not load again
    ocp = _orbax()
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
        with ocp.Checkpointer(handler) as checkpointer:
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
        if isinstance(error, Exception) and _is_full_disk(error):
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
    ocp = _orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
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
    ocp = _orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
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


def _is_full_disk(error: Exception) -> bool:
    """Whether this, whatever Orbax made of it, is a disk's being full."""
    return os.strerror(errno.ENOSPC) in str(error)


def _orbax() -> Any:
    """Orbax, imported on first use (it takes half a second), without its notices: what fails in it is raised too."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint as ocp

    return ocp
