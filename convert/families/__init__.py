"""Checkpoint families, one file each (`convert.families.base` says what it provides), named in FAMILIES."""

from __future__ import annotations

from . import diffusers, ho, lucidrains, monai, openai, palette, pytorch_ddpm
from .base import Family, Plan, Source

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (ho, pytorch_ddpm, monai, diffusers, openai, palette, lucidrains)
}
"""In the order in which they are asked: diffusers would take MONAI's names for its own where a file is damaged."""

__all__ = ["FAMILIES", "Family", "Plan", "Source"]
