"""Back to PyTorch: a jddim checkpoint in a source's own format, for the source's own loader.

A format is a function of a family's file, `(metadata, params, path) -> None`, named in its `Family.formats`. It writes
one file or folder, or raises ConversionError with every reason why its source cannot hold the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jddim.checkpoint.folder import load_params, load_recorded, part_of
from jddim.checkpoint.metadata import FIRST_STAGE, Metadata, PartMetadata
from jddim.config import ClassifierConfig, did_you_mean
from jddim.files import atomic

from .engine import ConversionError
from .families import FAMILIES, autoencoder


def formats() -> dict[str, Any]:
    """Every format's name and writer, of all families that are sampled."""
    families = (family for family in FAMILIES.values() if not family.first_stage)
    return {name: write for family in families for name, write in family.formats.items()}


def export(
    ckpt: str | os.PathLike[str], dst: str | os.PathLike[str], format: str | None = None, *, overwrite: bool = False
) -> str:
    """Write the checkpoint folder `ckpt` to `dst` in a source's format; returns the format's name.

    format: a key of `formats()`; None: the first of the family that the checkpoint came from. Parameters keep their
    bits, so that converting the result again gives the same `params_sha256`.

    Raises ConversionError if the format is unknown, cannot hold the model, or `dst` exists (without `overwrite`, which
    replaces a file, never a folder); nothing is then written.
    """
    metadata = load_recorded(ckpt)
    part = isinstance(metadata, PartMetadata)
    if part and isinstance(metadata.model, ClassifierConfig):
        raise ConversionError(f"{ckpt} is a classifier, which no format here holds: it is not written back to PyTorch")
    known: Mapping[str, Any] = autoencoder.FAMILY.formats if part else formats()
    if format is None:
        own = FAMILIES[metadata.provenance["family"]].formats if metadata.provenance.get("family") in FAMILIES else {}
        if not own:
            raise ConversionError(
                f"{ckpt} comes from no family that has a format to write; give --format, one of {', '.join(known)}"
            )
        format = next(iter(own))
    if format not in known:
        raise ConversionError(f"unknown format {format!r}{did_you_mean(format, known)}")
    target = Path(dst)
    if target.exists() and (not overwrite or target.is_dir()):
        hint = "it is a folder; choose another name" if target.is_dir() else "choose another name, or pass --overwrite"
        raise ConversionError(f"{dst} exists; {hint}")
    params = load_params(ckpt, metadata)
    try:
        with atomic(target, overwrite=overwrite) as staging:
            known[format](metadata, part_of(params, ""), staging)
            if isinstance(metadata, Metadata) and metadata.autoencoder is not None:
                if format not in autoencoder.FAMILY.formats:
                    raise ConversionError("it has a first stage, which this format does not hold")
                autoencoder.write_beside(metadata, part_of(params, FIRST_STAGE), staging)
    except ConversionError as error:
        others = ", ".join(name for name in known if name != format)
        raise ConversionError(f"{ckpt} cannot be written as {format}: {error} (other formats: {others})") from error
    except FileExistsError as error:
        raise ConversionError(f"{dst} appeared meanwhile, and was left as it is; choose another name") from error
    return format
