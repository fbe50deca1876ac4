"""Checkpoint families, one file each (`convert.families.base` says what it provides), named in FAMILIES."""

from __future__ import annotations

from typing import Any

from ..engine import ConversionError
from . import diffusers, ho, lucidrains, openai
from .base import Family, Plan, Source

FAMILIES: dict[str, Family] = {
    family.name: family for family in (ho.FAMILY, diffusers.FAMILY, openai.FAMILY, lucidrains.FAMILY)
}

__all__ = ["FAMILIES", "Family", "Plan", "Source", "recognise"]


def recognise(raw: Any, path: str) -> Family:
    """The family that a file's contents belong to, or ConversionError saying what the file is instead."""
    for family in FAMILIES.values():
        if family.recognise(raw):
            return family
    raise ConversionError(f"{path} {_what_it_is(raw)}")


# Marks of files that people pass by mistake or that jddim does not convert yet: a substring of a tensor's name, what
# the file then is.
_OTHERS = {
    "model.diffusion_model.": "is a latent-diffusion model (Stable Diffusion and its like); jddim's are in pixel space",
    "transformer_blocks.": "is a diffusers model with cross-attention to text; jddim's take class labels or nothing",
    "encoder.down_blocks.": "is a diffusers autoencoder, not a diffusion model in pixel space",
    "down_blocks.": "is a diffusers model, but not the whole weights of a UNet2DModel, the class that jddim reads",
    "input_blocks.": "has names of OpenAI's UNets (guided- and improved-diffusion), but no middle_block or time_embed",
    "downs.0.": "is like a lucidrains denoising-diffusion-pytorch model, but not one of 2.x's image Unets",
    "all_modules.": "is a score_sde model; this family is not supported",
    "model.enc.": "is an EDM model; this family is not supported",
    "first_stage_model.": "is a latent-diffusion autoencoder, not a diffusion model in pixel space",
    "text_model.": "is a text encoder, not a diffusion model",
    "lora_": "is a LoRA adapter, not a whole model",
}


def _what_it_is(raw: Any) -> str:
    if not isinstance(raw, dict):
        return f"is no checkpoint that jddim knows: it holds a value of type {type(raw).__name__}, not named tensors"
    if "param_groups" in raw and "state" in raw:
        return "is an optimizer's state, not a model; the model's weights are in another file of the same run"
    if "ema" in raw and "model" in raw and "opt" in raw:
        return f"is a lucidrains Trainer's file (step {raw.get('step')}), but holds no image Unet of 2.x"
    if what := _other(raw):
        return what
    for key, inner in raw.items():
        if isinstance(inner, dict) and (what := _other(inner)):
            return f"{what} (under {key!r})"
    for key, inner in raw.items():
        if any(family.recognise(inner) for family in FAMILIES.values()):
            return (
                f"wraps its weights in {key!r}; save that entry alone to convert it: "
                f"torch.save(torch.load(FILE, weights_only=True)[{key!r}], NEW_FILE)"
            )
    if "pytorch-lightning_version" in raw:
        return "is a PyTorch Lightning checkpoint; save the network's own state_dict() to convert it"
    names = [str(name) for name in raw]
    shown = ", ".join(names[:4]) if names else "nothing"
    return f"is no checkpoint that jddim knows: it holds {shown}{', ...' if len(names) > 4 else ''}"


def _other(names: Any) -> str | None:
    return next((what for mark, what in _OTHERS.items() if any(mark in str(name) for name in names)), None)
