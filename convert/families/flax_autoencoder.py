"""diffusers' FlaxAutoencoderKL, whose weights `diffusion_flax_model.msgpack` holds: AutoencoderKL in flax's layouts.

Names and kernels become PyTorch's where the file is opened; the rest is `convert.families.autoencoder`'s.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..engine import ConversionError
from . import autoencoder
from .base import Source
from .tensors import check_tensors

_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def recognise(state: Mapping[Any, Any]) -> bool:
    """The first stage's names with flax's numbers, `down_blocks_0`, and kernels."""
    telling = re.compile(r"(encoder\.down|decoder\.up)_blocks_\d+\.(resnets|\w+samplers)_\d+\..*kernel")
    return sum(bool(telling.fullmatch(str(name))) for name in state) >= 2


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors under PyTorch's names, in PyTorch's layouts; a name that is none of flax's stays, to be reported."""
    check_tensors(state, file_name)
    tensors: dict[str, np.ndarray] = {}
    for name, value in state.items():
        module, _, kind = str(name).rpartition(".")
        place = re.sub(r"_(\d+)(?=\.|$)", r".\1", module)
        laid_out = value.transpose(_AXES[value.ndim]) if kind == "kernel" and value.ndim in _AXES else value
        tensors[f"{place}.{_KINDS.get(kind, kind)}"] = laid_out
    if len(tensors) < len(state):
        raise ConversionError(f"{file_name} holds, under names that PyTorch would have as one, several tensors")
    return dataclasses.replace(autoencoder.open_source(tensors, file_name), note="")


FAMILY = dataclasses.replace(
    autoencoder.FAMILY,
    name="flax_autoencoder",
    title="a first stage of diffusers' Flax (FlaxAutoencoderKL)",
    recognise=recognise,
    open_source=open_source,
    locate=None,
)
