"""What a file is that no family takes: asked last, so that nothing is called foreign that could be converted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .files.pickles import printable

_DEPTH = 4

# A pattern of a tensor's name with the keys that lead to it -> what the file then is; the first that fits.
_MARKS = {
    r"cond_embed\.": "has a cond_embed as Palette's networks have, but not also input_blocks and middle_block",
    r"noise_level_mlp\.": (
        "is an SR3 network: it takes the noise level in place of t (noise_level_mlp) and an image beside x_t; this "
        "family is not supported"
    ),
    r"adaLN_modulation\.|transformer_blocks\.\d+\.norm1\.emb\.": (
        "is a diffusion transformer, but not one of the two that jddim reads, facebookresearch's DiT (x_embedder, "
        "t_embedder, blocks.N.adaLN_modulation) and diffusers' (transformer_blocks.N.norm1.emb, proj_out_1)"
    ),
    r"controlnet_": "is a ControlNet, which goes with another network",
    r"(^|\.)conv_in\.conv\.": (
        "is a network of MONAI's, but no whole DiffusionModelUNet (down_blocks, middle_block, time_embed)"
    ),
    r"(^|\.)map_layer0\.": (
        "has map_layer0 as EDM's networks have (SongUNet, DhariwalUNet), but not also enc.NxN_ and dec.NxN_"
    ),
    r"(^|\.)all_modules\.": ("has all_modules as score_sde's networks have, but not the blocks of its ddpm or ncsnpp"),
    r"timembedding\.": "has a timembedding as w86763777/pytorch-ddpm's networks have, but too few of their blocks",
    r"down_blocks[._].*transformer_blocks[._]": (
        "is a diffusers model with cross-attention to text; jddim's take class labels or nothing"
    ),
    r"(^|\.)(encoder\.down|decoder\.up)|first_stage_model\.": (
        "is a first stage that jddim does not read; it reads AutoencoderKL and VQModel"
    ),
    r"down_blocks\.": (
        "has down_blocks as diffusers' networks have, but too few names of a UNet2DModel, the class that jddim reads "
        "(down_blocks.N.resnets, time_embedding, conv_norm_out)"
    ),
    r"input_blocks\.": (
        "has input_blocks as OpenAI's UNets have (guided- and improved-diffusion), but not also middle_block and "
        "time_embed"
    ),
    r"downs\.0\.": "has downs as lucidrains' networks have, but not the blocks of one of 2.x's image Unets",
    r"text_model\.": "is a text encoder, not a diffusion model",
    r"lora_": "is a LoRA adapter, not a whole model",
    r"(^|\.)shadow_params\.": (
        "holds an EMA as a list in the order of its model's parameters (shadow_params), without their names, and not "
        "the model; save the model's state_dict() with the EMA copied into it"
    ),
}


def what_it_is(raw: Any) -> str:
    """What a file's contents are, as the end of a sentence that begins with the file's name."""
    if not isinstance(raw, (Mapping, list)):
        return f"is no checkpoint that jddim knows: it holds a value of type {type(raw).__name__}, not named tensors"
    if isinstance(raw, Mapping) and "param_groups" in raw and "state" in raw:
        return "is an optimizer's state, not a model; the model's weights are in another file of the same run"
    names = list(_names(raw))
    for mark, what in _MARKS.items():
        if any(re.search(mark, name) for name in names):
            return what
    shown = ", ".join(printable(name) for name in names[:4]) if names else "nothing"
    return f"is no checkpoint that jddim knows: it holds {shown}{', ...' if len(names) > 4 else ''}"


def _names(node: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """The names of all leaves, with the keys that lead to them; what lies deeper counts as a leaf."""
    inner = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if not inner or depth > _DEPTH:
        if path:
            yield path
        return
    for key, value in inner:
        yield from _names(value, f"{path}.{key}" if path else str(key), depth + 1)
