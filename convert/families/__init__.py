"""Checkpoint families, one file each (`convert.families.base` says what it provides), named in FAMILIES."""

from __future__ import annotations

from . import diffusers, ho, lucidrains, openai, pytorch_ddpm
from .base import Family, Plan, Source

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (ho.FAMILY, diffusers.FAMILY, openai.FAMILY, lucidrains.FAMILY, pytorch_ddpm.FAMILY)
}

__all__ = ["FAMILIES", "Family", "Plan", "Source"]
