"""What a checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from jddim.config import ModelConfig, SamplerConfig, ScheduleConfig, to_json
from jddim.models import wiring_of

FORMAT_VERSION = 1


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
