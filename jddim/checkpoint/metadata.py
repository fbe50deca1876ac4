"""What a checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypedDict

from jddim.config import (
    AutoencoderConfig,
    ClassifierConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    did_you_mean,
    from_json,
    image_shape,
    misfits,
    to_json,
)
from jddim.models import MODELS, PARTS, wiring_of

FORMAT_VERSION = 1


class Source(TypedDict, total=False):
    """Where the weights lay. sha256, commit: in hexadecimal."""

    file: str
    sha256: str
    variant: str | None
    hub_id: str | None
    commit: str | None


class Wording(TypedDict, total=False):
    """Schedule and sampler in the source's words, and which of these were told."""

    schedule: dict[str, Any]
    sampler: dict[str, Any]
    told: dict[str, str]


class Training(TypedDict, total=False):
    """What is read of how `jddim train` made it."""

    null_label: int | None


class Parent(TypedDict, total=False):
    """What a training began from."""

    family: str | None
    sha256: str


class Provenance(TypedDict, total=False):
    """What readers of a checkpoint's provenance rely on. There is more in it, which is only printed."""

    family: str
    source: Source
    preset: str | None
    set: dict[str, str]
    weights: str
    step: int | None
    wording: Wording
    reference_options: dict[str, Any]
    verification: dict[str, Any]
    training: Training
    parent: Parent
    null_label: int | None
    label_names: dict[str, int]


class Recorded:
    """What the metadata of all kinds of checkpoints have."""

    @property
    def networks(self) -> dict[str, ModelConfig]:
        """Every network in the checkpoint, by what its parameters' names begin with."""
        return {"": self.model}

    model: ModelConfig
    provenance: dict[str, Any]
    params_sha256: str

    @property
    def sha256(self) -> str:
        """The checkpoint's identity: a digest of all metadata and, through `params_sha256`, all parameters."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def null_label(self) -> int | None:
        """The label that meant none in training, by `jddim train` or by the source; None where none is known to."""
        return (self.provenance.get("training") or self.provenance).get("null_label")

    @property
    def label_names(self) -> dict[str, int]:
        """The source's name of a class -> its label; empty where none are recorded."""
        return self.provenance.get("label_names") or {}

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "format": "jddim",
            "format_version": FORMAT_VERSION,
            "model": {"type": wiring_of(self.model), **to_json(self.model)},
            **self.conventions(),
            "provenance": dict(self.provenance),
            "params_sha256": self.params_sha256,
        }

    def conventions(self) -> dict[str, Any]:
        """How it is sampled, as JSON holds it; empty for what is not."""
        return {}

    def written(self) -> dict[str, Any]:
        """As stored in the `metadata` item: `to_json`, and `sha256` over it."""
        return {**self.to_json(), "sha256": self.sha256}


@dataclasses.dataclass(frozen=True)
class Metadata(Recorded):
    """What a checkpoint says of itself, beside its parameters.

    autoencoder: the first stage whose latents the network samples; its parameters' names begin with "autoencoder.".
    provenance: JSON of the converter's (`Provenance`): source file and SHA-256, family, EMA or raw and its step,
    versions, what was assumed, the verification figure. params_sha256 covers every parameter's name, shape and bytes.
    """

    model: ModelConfig
    schedule: ScheduleConfig
    sampler: SamplerConfig
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    params_sha256: str = ""
    autoencoder: AutoencoderConfig | None = None

    @property
    def networks(self) -> dict[str, ModelConfig]:
        """The network, and the first stage where there is one."""
        return super().networks | ({} if self.autoencoder is None else {FIRST_STAGE: self.autoencoder})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that `sample` makes."""
        return image_shape(self.model, self.autoencoder)

    def sampled_size(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) of x_t for images of this size, or of the checkpoint's."""
        if image_size is None:
            return self.model.image_size
        return image_size if self.autoencoder is None else self.autoencoder.latent_size(image_size)

    def conventions(self) -> dict[str, Any]:
        """Schedule and sampler, and the first stage where there is one."""
        stage = {} if self.autoencoder is None else {"autoencoder": to_json(self.autoencoder)}
        return {"schedule": to_json(self.schedule), "sampler": to_json(self.sampler), **stage}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Metadata:
        """The inverse of `to_json` and `written`. Raises ValueError for what is missing or of another type."""
        model = _checked(data, "schedule", "sampler")
        if (wiring := model.pop("type", None)) not in list(MODELS):
            raise ValueError(f"unknown model type {str(wiring)[:60]!r}{did_you_mean(str(wiring)[:60], MODELS)}")
        return Metadata(
            model=from_json(MODELS[wiring][0], model),
            schedule=from_json(ScheduleConfig, data["schedule"]),
            sampler=from_json(SamplerConfig, data["sampler"]),
            provenance=data["provenance"],
            params_sha256=data["params_sha256"],
            autoencoder=from_json(AutoencoderConfig, data["autoencoder"]) if "autoencoder" in data else None,
        )


FIRST_STAGE = "autoencoder."
"""What the names of a first stage's parameters begin with, beside a network's."""


@dataclasses.dataclass(frozen=True)
class PartMetadata(Recorded):
    """What the checkpoint of a classifier or a first stage says of itself. It has neither schedule nor sampler."""

    model: ClassifierConfig | AutoencoderConfig
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    params_sha256: str = ""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PartMetadata:
        """As `Metadata.from_json`, for data that `is_part`."""
        model = _checked(data)
        kind = PARTS[model.pop("type")][0]
        return PartMetadata(from_json(kind, model), data["provenance"], data["params_sha256"])


def is_part(data: Mapping[str, Any]) -> bool:
    """Whether the JSON of metadata is of a network that is not sampled."""
    model = data.get("model")
    return isinstance(model, dict) and model.get("type") in [*PARTS]


def _checked(data: Mapping[str, Any], *sections: str) -> dict[str, Any]:
    """The section model, if it, `sections` and the rest are there and of their types. Raises ValueError if not."""
    parts: dict[str, type] = {**dict.fromkeys(("model", *sections, "provenance"), dict), "params_sha256": str}
    parts |= {"autoencoder": dict} if sections and "autoencoder" in data else {}
    problems = [
        f"{name} is missing or no {kind.__name__}" for name, kind in parts.items() if type(data.get(name)) is not kind
    ]
    problems += [] if problems else misfits(data["provenance"], Provenance, "provenance.")
    if problems:
        raise ValueError("; ".join(problems))
    return dict(data["model"])
