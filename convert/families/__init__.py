"""Checkpoint families, one file each (`convert.families.base` says what it provides), named in FAMILIES."""

from __future__ import annotations

from . import (
    autoencoder,
    consistency,
    diffusers,
    diffusers_dit,
    dit,
    edm,
    flax_autoencoder,
    ho,
    lucidrains,
    monai,
    openai,
    openai_classifier,
    palette,
    pytorch_ddpm,
    score_sde,
)
from .base import Family, Plan, Source

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        *(autoencoder, ho, pytorch_ddpm, monai, diffusers, openai_classifier, consistency, openai, palette),
        *(lucidrains, dit, diffusers_dit, edm, score_sde, flax_autoencoder),
    )
}
"""In the order in which they are asked: diffusers would take MONAI's names for its own where a file is damaged, and
OpenAI's UNet a classifier's, which are those of its first half, and those of a consistency model."""

__all__ = ["FAMILIES", "Family", "Plan", "Source"]
