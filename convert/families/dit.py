"""facebookresearch's DiT: bare state dicts, and what its train.py saves: `model`, `ema`, `opt` and `args`.

willisma's SiT has the same network under the same names, trained along the straight path of flow matching.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jddim.checkpoint.metadata import Metadata
from jddim.config import DiTConfig, SamplerConfig, ScheduleConfig
from jddim.models.dit import positions

from ..engine import ConversionError, cannot_hold, refuse, refusing, source_shapes, source_tensors
from ..rules import Fused, Rules
from ..writers import save_torch
from . import diffusers, diffusers_dit
from .base import Family, Plan, Wording, check_sampler, checked, of_wiring
from .tensors import Tensors, common_size
from .values import asking, boolean, integer, literal, not_read, one_of, parse, sections, settling, sides

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""The source's letter -> depth, width and heads."""
MODELS = {
    f"{kind}-{letter}/{patch}": (*SIZES[letter], patch)
    for kind in ("DiT", "SiT")
    for letter in SIZES
    for patch in (2, 4, 8)
}


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names: SD3 calls its blocks otherwise, and PixArt's have no adaLN_modulation."""
    names = [str(name) for name in state]
    return all(
        any(re.match(pattern, name) for name in names)
        for pattern in (r"x_embedder\.proj\.", r"t_embedder\.mlp\.", r"blocks\.\d+\.adaLN_modulation\.1\.")
    )


SETTINGS = {
    "model": "DiT, or the source's name such as DiT-XL/2, whose depth, width and patches are checked; or a SiT",
    "image_size": "side of the pictures, 8 times that of x_t, or HEIGHTxWIDTH (checked where the file has positions)",
    "input_size": "side of x_t itself, or HEIGHTxWIDTH, in place of image_size",
    "num_heads": "heads of each attention, of a width that is none of the source's",
    "num_classes": "classes, without the null label (checked)",
    "diffusion_steps": "T; 1000 in the source",
    "noise_schedule": "linear or squaredcos_cap_v2; linear in the source's train.py",
    "predict_xstart": "true: the network predicts x_0; false in the source's train.py",
    "num_sampling_steps": "default number of steps; 250 in the source",
    "path_type": "of a SiT: Linear, the source's default; its other paths are not taken",
    "prediction": "of a SiT: velocity, the source's default; its others are not taken",
}
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_PARSERS = {
    "model": one_of("DiT", "SiT", *MODELS),
    **dict.fromkeys(("image_size", "input_size"), sides),
    **dict.fromkeys(("num_heads", "num_classes", "diffusion_steps", "num_sampling_steps"), integer),
    "noise_schedule": one_of(*_SCHEDULES),
    "predict_xstart": boolean,
    "path_type": one_of("Linear", "GVP", "VP"),
    "prediction": one_of("velocity", "score", "noise"),
}
_OF_DIFFUSION = ("diffusion_steps", "noise_schedule", "predict_xstart")
_OF_FLOW = {"path_type": "Linear", "prediction": "velocity"}


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell of the network. ConversionError if too little of it is there.

    Most are taken from several tensors, so that one that is missing or misshapen is reported as such.
    """
    of_blocks = Counter(m[1] for name in tensors if (m := re.match(r"blocks\.(\d{1,6})\.(attn|mlp|adaLN)", name)))
    found = {
        "hidden_size": common_size(
            tensors, r"(x_embedder\.proj|t_embedder\.mlp\.[02]|blocks\.\d+\.attn\.proj)\.bias", 0
        ),
        "mlp": common_size(tensors, r"blocks\.\d+\.mlp\.fc1\.(bias|weight)", 0),
        "patch_size": common_size(tensors, r"x_embedder\.proj\.weight", 2),
        "in_channels": common_size(tensors, r"x_embedder\.proj\.weight", 1),
        "time_features": common_size(tensors, r"t_embedder\.mlp\.0\.weight", 1),
        "rows": common_size(tensors, r"y_embedder\.embedding_table\.weight", 0),
        "outputs": common_size(tensors, r"final_layer\.linear\.(bias|weight)", 0),
        "depth": sum(count > 4 for count in of_blocks.values()),  # a stray tensor makes no block
    }
    if not all(found.values()):
        raise ConversionError("too few tensors of the transformer are there to tell its shape; is the file whole?")
    return found


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the settings add, and what is assumed."""
    filed, unread, problems = sections(config, SETTINGS)
    filed = {key: value for key, value in filed.items() if key not in given}
    told, refused = parse({"config": filed, "--set": {key: literal(text) for key, text in given.items()}}, _PARSERS)
    problems += refused
    refuse(problems)
    found = infer(tensors)
    width, patch, rows = found["hidden_size"], found["patch_size"], found["rows"]
    size, problems = _size(told, tensors.get("pos_embed"), patch)
    problems += _contradictions(told, found)
    flow = str(told.get("model")).startswith("SiT")
    what = "a DiT, and this is a SiT: leave it out" if flow else "a SiT: give model=SiT too, or leave it out"
    problems += [f"{key} is of {what}" for key in (_OF_DIFFUSION if flow else _OF_FLOW) if key in told]
    problems += [
        f"{key} {told[key]} is not taken: jddim samples a SiT of {key} {own}"
        for key, own in _OF_FLOW.items()
        if flow and told.get(key, own) != own
    ]
    of_width = {width: heads for _, width, heads in SIZES.values()}
    missing = {}
    if size is None and not problems:
        missing["image_size=SIDE"] = "the image size: --set image_size=256, or input_size, which is x_t's own"
    if "num_heads" not in told and width not in of_width:
        missing["num_heads=N"] = f"how attention is split into heads, at a width of {width}: --set num_heads=N"
    asks = () if problems else asking(("model",), told, missing)
    if missing:
        problems.append(f"the tensors do not tell {'; nor '.join(missing.values())}")
    refuse(problems, asks)

    assumed: list[str] = []
    settle = settling(told, assumed)
    if "model" not in told:
        assumed.append("a DiT, trained by diffusion (a SiT's files, trained by flow matching, have the same names)")
    if told.get("model") in MODELS:
        heads = told.get("num_heads", of_width[width])
    else:
        heads = settle("num_heads", of_width.get(width), "the source's at this width")
    with refusing("the tensors and settings make no valid DiT"):
        model = DiTConfig(
            image_size=size,  # type: ignore[arg-type]  # asked for above
            in_channels=found["in_channels"],
            out_channels=found["outputs"] // patch**2,
            patch_size=patch,
            channels=width,
            depth=found["depth"],
            num_heads=heads,
            mlp_channels=None if found["mlp"] == 4 * width else found["mlp"],
            num_classes=rows,
            time_features=found["time_features"],
        )
    channels = model.in_channels
    if model.out_channels not in (channels, 2 * channels):
        raise ConversionError(
            f"the network maps {channels} channels to {model.out_channels}: DDIM needs both equal, or twice as many "
            "out, the second half of a learned variance"
        )
    schedule, sampler, wording = (_flow if flow else _diffusion)(told, settle, twice=model.out_channels > channels)
    if channels > 3:
        sampler = dataclasses.replace(sampler, guidance_channels=3)
    check_sampler(sampler, schedule)
    null_label = None if told.get("num_classes") == rows else rows - 1
    ignored = {}
    if "pos_embed" in tensors:
        ignored["pos_embed"] = "no parameter: sines and cosines of each patch's place, as jddim computes them"
        refuse(_of_positions(tensors["pos_embed"], model))
    return Plan(
        *(model, schedule, sampler, rules(model), ignored, tuple(assumed)),
        notes=(
            "x_t are latents; the first stage that makes images of them is a file of its own (--autoencoder)",
            *(
                ["guidance changes the first 3 channels alone, as in the source's forward_with_cfg"]
                if channels > 3
                else []
            ),
            *not_read(unread),
        ),
        asks=asking(("model",), told),
        unchecked=tuple(key for key in given if _unchecked(key, tensors)),
        wording=wording,
        null_label=null_label,
    )


Sampled = tuple[ScheduleConfig, SamplerConfig, Wording]


def _diffusion(told: Mapping[str, Any], settle: Callable[[str, Any, str], Any], *, twice: bool) -> Sampled:
    """How a DiT is sampled, and the source's words for it. twice: it has twice x_t's channels out."""
    T = settle("diffusion_steps", 1000, "train.py's")
    name = _SCHEDULES[settle("noise_schedule", "linear", "train.py's")]
    ends = (0.1 / T, 20 / T) if name == "linear" and T > 0 else ()
    with refusing("the noise schedule cannot be built"):
        schedule = checked(ScheduleConfig(name, T, *ends))
    predict_x0 = settle("predict_xstart", False, "train.py's")
    sampler = SamplerConfig(
        spacing="openai",
        num_steps=min(told.get("num_sampling_steps", 250), T),
        clip=False,
        rederive_eps=True,
        prediction_type="sample" if predict_x0 else "epsilon",
        variance="learned_range" if twice else "fixed_large",
    )
    words = {
        "num_sampling_steps": str(sampler.num_steps),
        "clip_denoised": "False",
        "predict_xstart": str(predict_x0),
        "learn_sigma": str(twice),
    }
    of_schedule = {"diffusion_steps": str(T), "noise_schedule": told.get("noise_schedule", "linear")}
    return schedule, sampler, Wording(of_schedule, words)


def _flow(told: Mapping[str, Any], settle: Callable[[str, Any, str], Any], *, twice: bool) -> Sampled:
    """How a SiT is sampled: its ODE from noise at its t = 0 to the image at 1, evenly (integrators.py)."""
    words = {key: settle(key, own, "train_utils.py's") for key, own in _OF_FLOW.items()}
    sampler = SamplerConfig(
        spacing="even",
        num_steps=told.get("num_sampling_steps", 250),
        clip=False,
        prediction_type="velocity",
        reversed_time=True,
        variance="unused" if twice else "fixed_small",
    )
    told_steps = {"num_sampling_steps": str(sampler.num_steps), "learn_sigma": str(twice)}
    return ScheduleConfig("flow"), sampler, Wording({"path_type": words["path_type"]}, told_steps | words)


def _size(told: Mapping[str, Any], table: np.ndarray | None, patch: int) -> tuple[tuple[int, int] | None, list[str]]:
    """(height, width) of x_t, as it is told, or as the positions have it if these are a square's; what contradicts."""
    size, problems = told.get("input_size"), []
    if (pictures := told.get("image_size")) is not None:
        latents = (pictures[0] // 8, pictures[1] // 8)
        if any(side % 8 for side in pictures):
            problems.append(f"image_size {pictures[0]}x{pictures[1]} is no multiple of 8; input_size is x_t's own")
        elif size is not None and size != latents:
            problems.append(f"image_size and input_size contradict each other: {pictures} is {latents}, not {size}")
        size = size or latents
    if table is None or table.ndim != 3:
        return size, problems
    count = table.shape[1]
    if size is None:
        side = math.isqrt(count)
        return ((side * patch, side * patch) if side * side == count else None), problems
    patches = (size[0] // patch) * (size[1] // patch)
    if not problems and patches != count:
        problems.append(f"x_t of {size[0]}x{size[1]} has {patches} patches, pos_embed {count} places")
    return size, problems


def _of_positions(table: np.ndarray, model: DiTConfig) -> list[str]:
    """What is wrong with a file's positions, which are no parameters: they must be the fixed ones."""
    rows, columns = (side // model.patch_size for side in model.image_size)
    own = positions(rows, columns, model.channels).reshape(1, rows * columns, model.channels)
    if table.shape != own.shape:
        return [f"pos_embed has shape {table.shape}, expected {own.shape}"]
    off = np.abs(table.astype(np.float32) - own).max()
    if not off <= max(float(jnp.finfo(table.dtype).eps), 2.0**-23):  # a half-precision file's are rounded
        return [
            f"pos_embed is not the table of sines and cosines that the source computes (off by up to {off:.2g}): "
            "jddim's DiT has no learned positions"
        ]
    return []


def _contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Settings that say otherwise than the tensors, each with both values."""
    problems = []
    if (name := told.get("model")) in MODELS:
        depth, width, heads, patch = MODELS[name]
        facts = (("depth", depth), ("hidden_size", width), ("patch_size", patch))
        problems += [
            f"{name} has {key} {value}, the tensors {found[key]}" for key, value in facts if found[key] != value
        ]
        if told.get("num_heads", heads) != heads:
            problems.append(f"{name} has {heads} heads, num_heads is {told['num_heads']}")
    rows = found["rows"]
    if "num_classes" in told and rows - told["num_classes"] not in (0, 1):
        problems.append(
            f"num_classes is {told['num_classes']} by the settings, and the tensors have a table of {rows} labels"
        )
    return problems


def _unchecked(key: str, tensors: Tensors) -> bool:
    """Whether the tensors would not contradict a wrong value of this setting."""
    of_size = key in ("image_size", "input_size") and "pos_embed" not in tensors
    return of_size or key in ("num_heads", *_OF_DIFFUSION, *_OF_FLOW)


_BLOCK = {
    **{"adaLN_modulation.1": "modulation", "mlp.fc1": "mlp.linear_1", "mlp.fc2": "mlp.linear_2"},
    "attn.proj": "attention.out",
}


def rules(config: DiTConfig) -> Rules:
    """The rename table."""
    return {
        "x_embedder.proj": "patch_embed",
        "t_embedder.mlp.0": "time_embed.linear_1",
        "t_embedder.mlp.2": "time_embed.linear_2",
        "y_embedder.embedding_table": "class_embed",
        **{f"blocks.{{i}}.{theirs}": f"blocks.{{i}}.{ours}" for theirs, ours in _BLOCK.items()},
        "blocks.{i}.attn.qkv": Fused(tuple(f"blocks.{{i}}.attention.{part}" for part in "qkv")),
        "final_layer.adaLN_modulation.1": "modulation_out",
        "final_layer.linear": "out",
    }


def reference(config: DiTConfig) -> Any:
    """The PyTorch reference of this config, which loads the source's names."""
    return diffusers.loaded_by(diffusers_dit.reference(config), config, diffusers_dit.rules(config), rules(config))


_VARIES = (
    *("image_size", "in_channels", "out_channels", "patch_size", "channels", "depth", "num_heads", "num_classes"),
)


def write(metadata: Metadata, params: Tensors, path: Path) -> None:
    """A `.pt` state dict that the source's `DiT` loads, its table of positions with it.

    It does not say the number of heads, nor how it is sampled: those are the source's scripts'.
    """
    config = of_wiring(metadata.model, DiTConfig)
    problems = cannot_hold(config, _VARIES)
    if config.image_size[0] != config.image_size[1]:
        problems.append("image_size is no square")
    if config.num_classes is None:
        problems.append("num_classes is None, there always a number")
    refuse(problems)
    table, side = rules(config), config.image_size[0] // config.patch_size
    fixed = positions(side, side, config.channels).reshape(1, side * side, config.channels)
    save_torch({"pos_embed": fixed, **source_tensors(params, table, source_shapes(params, table))}, path)


_PUBLISHED = {
    "DiT": {"diffusion_steps": "1000", "noise_schedule": "linear", "predict_xstart": "false"},
    "SiT": dict(_OF_FLOW),
}

FAMILY = Family(
    name="dit",
    title="DiT (facebookresearch)",
    recognise=recognise,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    formats={"dit": write},
    entry="args",
    presets={
        **{name: {"model": name} for name in MODELS},
        **{
            f"{kind}-XL/2-{side}": {"model": f"{kind}-XL/2", "image_size": str(side), "num_classes": "1000", **told}
            for kind, told in _PUBLISHED.items()
            for side in (256, 512)
        },
    },
)
