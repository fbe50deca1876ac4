"""Checkpoint families, one file each (`convert.families.base` says what it provides), named in FAMILIES."""

from __future__ import annotations

from typing import Any

from convert.engine import ConversionError
from convert.families import ho
from convert.families.base import Family, Plan, Source

FAMILIES: dict[str, Family] = {"ho": ho.FAMILY}

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
    "down_blocks.": "is a diffusers model; this family is not supported yet",
    "input_blocks.": "is an OpenAI guided-diffusion or improved-diffusion model; this family is not supported yet",
    "downs.0.": "is a lucidrains denoising-diffusion-pytorch model; this family is not supported yet",
    "all_modules.": "is a score_sde model; this family is not supported",
    "model.enc.": "is an EDM model; this family is not supported",
    "first_stage_model.": "is a latent-diffusion autoencoder, not a diffusion model in pixel space",
    "text_model.": "is a text encoder, not a diffusion model",
    "lora_": "is a LoRA adapter, not a whole model",
}


def _what_it_is(raw: Any) -> str:
    if isinstance(raw, dict):
        if "param_groups" in raw and "state" in raw:
            return "is an optimizer's state, not a model; the model's weights are in another file of the same run"
        if "ema" in raw and "model" in raw and "opt" in raw:
            return f"is a lucidrains Trainer's file (step {raw.get('step')}); this family is not supported yet"
        if "pytorch-lightning_version" in raw:
            return "is a PyTorch Lightning checkpoint; save the network's own state_dict() to convert it"
        if "state_dict" in raw:
            return "wraps its weights in 'state_dict'; save that entry alone to convert it"
        names = [str(name) for name in raw]
        for mark, what in _OTHERS.items():
            if any(mark in name for name in names):
                return what
        shown = ", ".join(names[:4]) if names else "nothing"
        return f"is no checkpoint that jddim knows: it holds {shown}{', ...' if len(names) > 4 else ''}"
    return f"is no checkpoint that jddim knows: it holds a {type(raw).__name__}, not named tensors"
