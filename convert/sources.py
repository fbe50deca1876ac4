"""Where a source's files are: a weights file, a folder that a family knows, an index of shards, a hub id."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from jddim.converting import hub_id, near, not_asked
from jddim.known import published

from . import hub
from .engine import ConversionError, shortened
from .families import FAMILIES
from .files.shards import digest, files_of


@dataclasses.dataclass(frozen=True)
class Origin:
    """A source found. file: the weights, or their index. variant, hub_id, commit: None unless asked for.

    folder: where the file was chosen, None if it was named itself.
    """

    file: Path
    variant: str | None = None
    hub_id: str | None = None
    commit: str | None = None
    folder: Path | None = None

    @property
    def choice(self) -> str:
        """The file, and what else there is in its folder, where it was chosen; "" where it was named."""
        if self.folder is None:
            return ""
        rest = [entry.name for entry in _weights_in(self.file.parent) if entry != self.file]
        return f"{self.file}" + (f", chosen among {shortened(rest, 8)}" if rest else "")

    def sha256(self) -> str:
        """The digest of the weights (`convert.files.shards.digest`)."""
        return digest(self.file)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's provenance."""
        facts: dict[str, Any] = {"file": self.file.name, "sha256": self.sha256()}
        if len(files := files_of(self.file)) > 1:
            facts["shards"] = [file.name for file in files[1:]]
        place = "" if self.folder is None else self.file.relative_to(self.folder).as_posix()
        told = {"variant": self.variant, "hub_id": self.hub_id, "commit": self.commit}
        told["place"] = place if "/" in place else None
        return facts | {name: value for name, value in told.items() if value is not None}


def find(
    src: str | os.PathLike[str], weights: str | None = None, variant: str | None = None, revision: str | None = None
) -> Origin:
    """The weights that `src` names: a file, a folder in which a family finds them, or a hub id.

    A hub id may end in @REVISION. weights: "ema", "raw" or None, variant: such as "fp16": which of a folder's files;
    other weights are a place in a file. revision: of a hub id.
    Raises ConversionError if there are none, or an option does not go with what `src` is.
    """
    path, named, commit = Path(src), None, None
    why = "" if path.exists() else not_asked(os.fspath(src)) or near(os.fspath(src))
    weights = weights if weights in ("ema", "raw") else None
    if not path.exists() and (known := published(os.fspath(src))) is not None and known.advice:
        raise ConversionError(known.advice)
    if not path.exists() and (named := hub_id(os.fspath(src))) is not None:
        if revision is not None and named[1] is not None:
            raise ConversionError(f"{src} says a revision, so no --revision {revision}")
        revision = named[1] if revision is None else revision
        patterns = [wanted for family in FAMILIES.values() if family.hub_files for wanted in family.hub_files(variant)]

        def whole(folder: Path) -> bool:
            with contextlib.suppress(ConversionError):  # the variant asked for is not there yet
                return _in(folder, weights, variant) is not None
            return False

        path, commit = hub.snapshot(named[0], revision, patterns, whole)
    elif revision is not None:
        raise ConversionError(f"--revision {revision} goes with a hub id, OWNER/NAME; {src} is none{why}")
    if not path.exists():
        raise ConversionError(f"no such file: {src}{why}")
    if (path / "metadata").is_dir() or (path / "params").is_dir():
        raise ConversionError(f"{src} is converted already: jddim sample {src} out.png")
    if path.is_dir():
        if (file := _in(path, weights, variant)) is None:
            there = shortened([entry.name for entry in _weights_in(path)]) or "there is none"
            raise ConversionError(f"{src} is a folder that no family knows; name the checkpoint file in it: {there}")
        return Origin(file, variant, named and named[0], commit, path)
    if path.suffix in (".json", ".yml", ".yaml") and not path.name.endswith(".index.json"):
        raise ConversionError(f"{src} holds settings, not weights; name the folder or the weights, and it by --config")
    if variant is not None:
        raise ConversionError(f"--variant {variant} chooses a file in a folder; {src} is a file")
    return Origin(path)


def files_read(origin: Origin) -> list[Path]:
    """Every file that its conversion may read: the weights, and the configs that any family looks for beside them.

    And the same of the first stage that lies with them.
    """
    beside = (file for family in FAMILIES.values() for file in family.config_files(origin.file))
    files = [*files_of(origin.file), *dict.fromkeys(file for file in beside if file.is_file())]
    stage = first_stage_of(origin.file)
    return files if stage is None else [*files, *files_read(find(stage))]


def first_stage_of(weights: Path) -> Path | None:
    """The folder of the first stage that belongs to a weights file, where a family has one there."""
    return next((folder for family in FAMILIES.values() if (folder := family.beside(weights)) is not None), None)


def _in(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """The weights that the first family to know the folder finds there, or accelerate's, of whatever family."""
    found = (family.locate(folder, weights, variant) for family in FAMILIES.values() if family.locate is not None)
    if (file := next((file for file in found if file is not None), None)) is not None or variant is not None:
        return file
    models = [entry for entry in _weights_in(folder) if _ACCELERATE.fullmatch(entry.name)]
    if len(models) > 1:
        raise ConversionError(f"{folder} holds several models: {shortened([m.name for m in models])}; name the file")
    return next(iter(models), None)


_ACCELERATE = re.compile(r"(pytorch_)?model(_\d+)?\.(safetensors|bin)(\.index\.json)?")
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".msgpack", ".index.json")


def _weights_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES) and entry.is_file())
