"""What a set of images is, and the file in its folder that says so: a run that asks for another is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from jddim.bulk.shards import Layout
from jddim.config import METHODS, SamplerConfig, did_you_mean, from_json, misfits, to_json, type_problems
from jddim.files import MOST_JSON, parse_json, read_regular
from jddim.run.request import ALWAYS_SAID, Request, options

FORMAT_VERSION = 1


class BulkError(ValueError):
    """A folder of shards that cannot be used as asked, with what to do about it."""


@dataclasses.dataclass(frozen=True)
class BulkConfig:
    """What a set is: how many images, what is asked of the sampler for them, and how they are kept.

    request: its steps, eta, spacing and conventions are the `DDIM`'s, and stand beside this in the manifest
    (`Request.settled`). shard_size: images a shard, a multiple of batch_size; None: the one nearest below 1024, or one
    batch. condition_sha256: of the images that the network is given beside x_t, None without.
    """

    num: int
    request: Request = Request()  # noqa: RUF009  # frozen
    batch_size: int = 64
    shard_size: int | None = None
    format: str = "npz"
    condition_sha256: str | None = None

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong; fill in shard_size."""
        problems = type_problems(self.request)
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        elif self.shard_size is None:
            object.__setattr__(self, "shard_size", max(1024 // self.batch_size, 1) * self.batch_size)
        elif self.shard_size % self.batch_size:
            problems.append(
                f"shard_size must be a multiple of the batch size {self.batch_size}, so that every batch is whole; "
                f"got {self.shard_size}"
            )
        if self.batch_size > 2**20:
            problems.append(f"batch_size must be at most {2**20}, got {self.batch_size}")
        if not 0 <= self.request.seed < 2**32:
            problems.append(f"seed must lie in 0..{2**32 - 1}, got {self.request.seed}")
        if "," in (self.request.labels or ""):
            problems.append(f"labels are balanced, one number, or a range such as 0:10; got {self.request.labels!r}")
        if self.request.method not in METHODS:
            problems.append(f"unknown method {self.request.method!r}{did_you_mean(self.request.method, METHODS)}")
        try:
            Layout(self.num, 1 if self.shard_size is None else self.shard_size, self.format)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """The set and its request side by side, as JSON: ALWAYS_SAID, and what differs from the defaults."""
        asked = {name: getattr(self.request, name) for name in ALWAYS_SAID}
        kept = {"batch_size": self.batch_size, "shard_size": self.shard_size, "format": self.format}
        more = {name: value for name, value in self.request.to_json().items() if name not in ALWAYS_SAID}
        if self.condition_sha256 is not None:
            more["condition_sha256"] = self.condition_sha256
        return {"num": self.num, **asked, **kept, **more}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BulkConfig:
        """The inverse of `to_json`. Raises ValueError on what is unknown, missing or of another type."""
        names = {o.name for o in options()}
        asked = {name: value for name, value in data.items() if name in names}
        rest = {name: value for name, value in data.items() if name not in names}
        return from_json(BulkConfig, {**rest, "request": Request.from_json(asked)})

    @property
    def layout(self) -> Layout:
        """How the set is cut into shards."""
        assert self.shard_size is not None
        return Layout(self.num, self.shard_size, self.format)


class _Settings(TypedDict):
    checkpoint_sha256: str
    bulk: dict[str, Any]
    sampler: dict[str, Any]
    versions: dict[str, str | None]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards says of itself.

    checkpoint, condition: where they were, seen from the folder; they may move, and identify no run.
    checkpoint_sha256: `Metadata.sha256`. sampler: the conventions used. versions: of what the images' bits depend on.
    """

    checkpoint: str
    checkpoint_sha256: str
    bulk: BulkConfig
    sampler: SamplerConfig
    versions: dict[str, Any]
    condition: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that identifies the run, as JSON; every picture says it too."""
        return {
            "checkpoint_sha256": self.checkpoint_sha256,
            "bulk": self.bulk.to_json(),
            "sampler": to_json(self.sampler),
            "versions": self.versions,
        }

    @property
    def run(self) -> str:
        """The run's identity: a digest of `settings`."""
        return _sha256(self.settings)

    def text(self) -> str:
        """The file's contents, whose last entry is a digest of the rest."""
        data = {"format": "jddim-bulk", "format_version": FORMAT_VERSION, "checkpoint": self.checkpoint}
        data |= ({} if self.condition is None else {"condition": self.condition}) | self.settings
        return json.dumps({**data, "sha256": _sha256(data)}, indent=2) + "\n"

    @staticmethod
    def of(settings: Mapping[str, Any], checkpoint: str = "", condition: str | None = None) -> Manifest:
        """The manifest with these `settings`. Raises ValueError if they are none."""
        problems = [f"{name} is missing" for name in _Settings.__annotations__ if name not in settings]
        if problems := problems + misfits(settings, _Settings):
            raise ValueError("; ".join(problems))
        return Manifest(
            checkpoint,
            settings["checkpoint_sha256"],
            BulkConfig.from_json(settings["bulk"]),
            from_json(SamplerConfig, settings["sampler"]),
            dict(settings["versions"]),
            condition,
        )


def manifest_path(folder: Path) -> Path:
    """Where a folder's manifest is."""
    return folder / "manifest.json"


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest. Raises BulkError if there is none, or a byte of it is not what was written."""
    path = manifest_path(folder)
    try:
        said = read_regular(path, MOST_JSON)
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_file():
            raise BulkError(f"{folder} is a file: name the folder that jddim bulk wrote") from None
        raise BulkError(f"{folder} has no manifest.json: it is no folder that jddim bulk wrote") from None
    except ValueError as error:
        raise BulkError(f"{path} is no manifest: {error}") from error
    again = "remove it, and the jddim bulk command that the shards were made with writes it anew and keeps them"
    try:
        data = parse_json(said)
        if not isinstance(data, dict) or type(data.get("checkpoint")) is not str:
            raise ValueError("it names no checkpoint")
        if type(data.get("condition", "")) is not str:
            raise ValueError("its condition is no path")
        if (version := data.get("format_version")) != FORMAT_VERSION and data.get("sha256") == _sha256(data):
            raise BulkError(f"{path} has format {str(version)[:20]}, this jddim reads {FORMAT_VERSION}")
        manifest = Manifest.of(data, data["checkpoint"], data.get("condition"))
    except BulkError:
        raise
    except ValueError as error:
        raise BulkError(f"{path} is damaged ({str(error)[:300]}): {again}") from error
    if said != manifest.text().encode():
        raise BulkError(f"{path} was damaged or edited after it was written: {again}")
    return manifest


def _sha256(data: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_settings(folder: Path, asked: Manifest) -> None:
    """Raise BulkError, with what differs, unless the folder's manifest says what is asked."""
    there = read_manifest(folder)
    if there.run != asked.run:
        from jddim.checkpoint.diff import diff_mappings

        rows = diff_mappings(there.settings, asked.settings)
        raise BulkError(
            f"{folder} was begun with other settings: "
            + "; ".join(f"{row.name.removeprefix('bulk.')} is {row.a} there, {row.b} here" for row in rows)
            + ". Ask for what it was begun with, or name a new folder"
        )


def check_folder(folder: Path) -> None:
    """Raise BulkError if `folder`, which has no manifest, holds what is not of a set of shards."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BulkError(f"{folder} is a file; name a folder")
    strange = [p.name for p in folder.iterdir() if not p.name.startswith(("shard-", ".shard-", ".lock", ".manifest."))]
    if strange:
        raise BulkError(f"{folder} holds other things ({', '.join(sorted(strange)[:3])}); name a new folder")
