"""MONAI's DiffusionModelUNet on 2-D images: core's (1.4 and later), and MONAI Generative's, which was its beginning.

The network is diffusers' with other names and epsilon; the files are state dicts. The two differ in names, and in one
thing that no tensor shows: MONAI Generative, from 0.2.0 on, has a projection behind each attention (`proj_attn`) that
it never applies (https://github.com/Project-MONAI/MONAI/issues/7991).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

from ..engine import ConversionError, refuse, refusing
from ..rules import Fused, Rules, Target, source_of
from . import diffusers
from .base import Family, Plan, Source, Wording, check_sampler, checked
from .tensors import Tensors, check_tensors, common_size
from .values import (
    asking,
    boolean,
    integer,
    integers,
    literal,
    not_read,
    number,
    one_of,
    parse,
    positive,
    sections,
    settling,
    sides,
    whole,
)


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names; encoders and 3-D networks too, for `open_source` to refuse."""
    telling = r"(down|up)_blocks\.\d+\.resnets\.\d+\.|middle_block\.resnet_[12]\."
    names = [str(name) for name in state]
    return (
        sum(bool(re.match(telling, name)) for name in names) >= 4
        and any(re.match(r"time_embed\.\d|middle_block\.resnet_", name) for name in names)
        and not any("controlnet_" in name for name in names)
    )


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors."""
    check_tensors(state, file_name)
    tensors = {str(name): value for name, value in state.items()}
    dims = {value.ndim - 2 for name, value in tensors.items() if name.endswith(".conv.weight")}
    if any(".transformer_blocks." in name for name in tensors):
        reason = "has cross-attention to a context (with_conditioning); jddim's networks take class labels or nothing"
    elif dims and 2 not in dims:
        reason = f"is a {dims.pop()}-D network, by the kernels of its convolutions; jddim's are of 2-D images"
    elif not any(name.startswith("up_blocks.") for name in tensors):
        reason = "is an encoder (no up_blocks), such as a classifier; it predicts no noise, so cannot be sampled"
    else:
        return Source(tensors)
    raise ConversionError(f"{file_name} {reason}")


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell, under the source's argument names; num_res_blocks of each level.

    core, combined: of the names, as in `rules`. projected: whether core's attentions have a projection.
    """

    def blocks(side: str, kind: str, level: int) -> int:
        """How many there are, by three tensors at least of each."""
        pattern = rf"{side}_blocks\.{level}\.{kind}\.(\d{{1,6}})\."
        counts = Counter(m[1] for name in tensors if (m := re.match(pattern, name)))
        return sum(count >= 3 for count in counts.values())

    numbers = [re.match(r"(down|up)_blocks\.(\d{1,6})\.", name) for name in tensors]
    found = {int(m[2]) for m in numbers if m}
    last = max(found, default=-1)
    widths = [
        common_size(
            tensors,
            rf"(down_blocks\.{level}|up_blocks\.{last - level})\.resnets\.\d+\.(conv[12]\.conv|time_emb_proj)\.bias",
            0,
        )
        for level in range(last + 1 if len(found) == last + 1 else 0)
    ]
    ends = [common_size(tensors, r"conv_in\.conv\.weight", 1), common_size(tensors, r"out\.2\.conv\.(weight|bias)", 0)]
    if not widths or not all(widths) or ends == [None, None]:
        raise ConversionError("too few tensors of the UNet are there to tell its shape; is the file whole?")
    levels = range(last + 1)
    each = [max(blocks("down", "resnets", level), blocks("up", "resnets", last - level) - 1) for level in levels]
    attended = [
        max(blocks("down", "attentions", level), blocks("up", "attentions", last - level) - 1) for level in levels
    ]
    return {
        "num_channels": tuple(widths),
        "num_res_blocks": tuple(each),
        "attention_levels": tuple(2 * count > each[level] for level, count in enumerate(attended)),
        "in_channels": ends[0] or ends[1],
        "out_channels": ends[1] or ends[0],
        "num_class_embeds": common_size(tensors, r"class_embedding\.weight", 0),
        "resblock_updown": any(re.match(r".*\.(down|up)sampler\.norm1\.", name) for name in tensors),
        "core": any(".attn." in name for name in tensors),
        "combined": any(".attn.qkv." in name for name in tensors),
        "projected": any(".attn.out_proj." in name for name in tensors),
    }


SETTINGS = {
    "image_size": "side of the training images in pixels, or HEIGHTxWIDTH",
    "num_head_channels": "channels of each attention's heads, one number or one for each level",
    "norm_num_groups": "groups of every group norm",
    "norm_eps": "epsilon of every group norm",
    "include_fc": "a projection follows each attention (checked in core's files)",
    "num_channels": "list of the levels' widths (checked against the tensors)",
    "channels": "core's name of num_channels",
    "num_res_blocks": "residual blocks a level (checked)",
    "attention_levels": "list of booleans (checked)",
    "in_channels": "channels of x_t (checked)",
    "out_channels": "channels of the output (checked)",
    "num_class_embeds": "number of classes (checked)",
    "resblock_updown": "residual blocks resample (checked)",
    "num_train_timesteps": "T",
    "schedule": "linear_beta, scaled_linear_beta, sigmoid_beta or cosine",
    "beta_start": "first beta",
    "beta_end": "last beta",
    "prediction_type": "epsilon, sample or v_prediction",
    "clip_sample": "clamp x0 at each step",
    "clip_sample_min": "to this",
    "clip_sample_max": "and this",
    "set_alpha_to_one": "false: the last step ends at alpha_bar_0",
    "steps_offset": "added to every t",
    "variance_type": "fixed_small or fixed_large, the ancestral sampler's",
}
_SCHEDULES = {"linear_beta": "linear", "scaled_linear_beta": "scaled_linear", "sigmoid_beta": "sigmoid"}
_UNTOLD = (
    *("image_size", "num_head_channels", "norm_num_groups", "norm_eps", "num_train_timesteps", "schedule"),
    *("beta_start", "beta_end", "prediction_type"),
)
_CHECKED = ("num_channels", "attention_levels", "in_channels", "out_channels", "num_class_embeds", "resblock_updown")


def _booleans(value: Any) -> tuple[bool, ...]:
    if isinstance(value, str):  # --set attention_levels=false,true
        value = [literal(part) for part in value.split(",")]
    return tuple(map(boolean, value if isinstance(value, list) else [value]))


_PARSERS = {
    "image_size": sides,
    **dict.fromkeys(("num_head_channels", "num_channels", "channels", "num_res_blocks"), integers),
    **dict.fromkeys(("norm_num_groups", "in_channels", "out_channels", "num_class_embeds"), integer),
    **dict.fromkeys(("num_train_timesteps", "steps_offset"), integer),
    **dict.fromkeys(("include_fc", "resblock_updown", "clip_sample", "set_alpha_to_one"), boolean),
    **dict.fromkeys(("beta_start", "beta_end", "clip_sample_min", "clip_sample_max"), number),
    "norm_eps": positive,
    "attention_levels": _booleans,
    "schedule": one_of(*_SCHEDULES, "cosine"),
    "prediction_type": one_of("epsilon", "sample", "v_prediction"),
    "variance_type": one_of("fixed_small", "fixed_large"),
}


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the settings add, and what is assumed."""
    filed, unread, problems = sections(config, SETTINGS)
    told, refused = parse({"config": filed, "--set": {k: literal(v) for k, v in given.items()}}, _PARSERS)
    refuse(problems + refused)
    found = infer(tensors)
    assumed: list[str] = []
    settle = settling(told, assumed)
    groups = settle("norm_num_groups", 32, "the source's default")
    heads, problems = _heads(told, found)
    problems += _contradictions(told, found)
    missing = {}
    if "image_size" not in told:
        missing["image_size=SIDE"] = "the tensors do not tell the image size; --set image_size=64, or HEIGHTxWIDTH"
    if "num_head_channels" not in told:
        missing["num_head_channels=N"] = (
            "the tensors do not tell how attention is split into heads; --set num_head_channels=8 (the source's "
            "default), or a number for each level"
        )
    if "norm_num_groups" not in told and (odd := sorted({w for w in found["num_channels"] if w % groups})):
        missing["norm_num_groups=N"] = f"32 groups of a norm, the source's default, do not divide the widths {odd}"
    untold = _UNTOLD if found["core"] else (*_UNTOLD, "include_fc")
    refuse([*problems, *missing.values()], () if problems else asking(untold, told, missing))

    widths = found["num_channels"]
    kind = "resnet" if found["resblock_updown"] else "conv"
    with refusing("the tensors and settings make no valid UNet"):
        model = UNetConfig(
            image_size=told["image_size"],
            in_channels=found["in_channels"],
            out_channels=found["out_channels"],
            channels=widths[0],
            channel_mults=tuple(whole(width / widths[0]) for width in widths),
            num_res_blocks=found["num_res_blocks"][0],
            attention_levels=tuple(level for level, there in enumerate(found["attention_levels"]) if there),
            **heads,
            downsample=(kind,),
            upsample=(kind,),
            symmetric_padding=True,
            norm_groups=groups,
            norm_epsilon=settle("norm_eps", 1e-6, "the source's default"),
            cosine_first=True,
            frequency_shift=0.0,
            divide_last=True,
            class_embedding=None if found["num_class_embeds"] is None else "learned",
            num_classes=found["num_class_embeds"],
        )
    names = {"core": found["core"], "combined": found["combined"]}
    include_fc = found["projected"] if found["core"] else settle(
        "include_fc", False, "MONAI Generative since 0.2.0 has the tensors proj_attn and does not apply them"
    )  # fmt: skip
    schedule, sampler, words = _conventions(settle)
    check_sampler(sampler, schedule)
    return Plan(
        model,
        schedule,
        sampler,
        rules(model, **names),
        {},
        tuple(assumed),
        (
            "the range of the images is not told: MONAI's tutorials train on [0, 1]; jddim's pictures show -1 as black "
            "and 1 as white, and its .npy files have the numbers",
            *not_read(unread),
        ),
        asks=asking(untold, told),
        unchecked=tuple(key for key in given if key in untold),
        reference_options=names,
        wording=words,
        implied={} if include_fc else _identities(model, **names),
    )


def _heads(told: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """UNetConfig's fields on heads, and why there are none: the heads of all attentions are alike, or one each."""
    widths, sizes = found["num_channels"], told.get("num_head_channels", (1,))
    if len(sizes) not in (1, len(widths)):
        return {}, [f"num_head_channels has {len(sizes)} numbers, the network {len(widths)} levels"]
    sizes = sizes if len(sizes) == len(widths) else sizes * len(widths)
    there = [*found["attention_levels"][:-1], True]  # the middle has the last level's
    used = {(width, size) for width, size, attended in zip(widths, sizes, there, strict=True) if attended}
    if odd := sorted((width, size) for width, size in used if size < 1 or width % size):
        return {}, [
            f"num_head_channels {size} does not divide the width {width} of an attention" for width, size in odd
        ]
    if all(width == size for width, size in used):
        return {"num_heads": 1}, []
    if len({size for _, size in used}) > 1:
        return {}, [
            f"num_head_channels is {sizes}: jddim's attentions have heads of one width in all levels, or one head each"
        ]
    return {"head_channels": used.pop()[1]}, []


def _contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What the settings say otherwise than the tensors, with both values; and what jddim cannot hold."""
    told = {"num_channels": told["channels"], **told} if "channels" in told else told
    blocks = found["num_res_blocks"]
    facts = {key: found[key] for key in _CHECKED}
    facts["num_res_blocks"] = blocks if len(told.get("num_res_blocks", ())) > 1 else blocks[:1]
    if found["core"]:
        facts["include_fc"] = found["projected"]
    problems = [
        f"{key} is {told[key]} by the settings, but {fact} by the tensors"
        for key, fact in facts.items()
        if key in told and told[key] != fact
    ]
    if len(set(blocks)) > 1:
        problems.append(f"the levels have {blocks} residual blocks; jddim's network has as many on each")
    if found["in_channels"] != found["out_channels"]:
        problems.append(
            f"the network has {found['in_channels']} channels in and {found['out_channels']} out; x_t needs as many out"
        )
    if told.get("schedule") == "cosine" and not found["core"]:
        problems.append("MONAI Generative's cosine schedule begins at alpha_bar 1, from which eps cannot be had")
    return problems


def _conventions(settle: Any) -> tuple[ScheduleConfig, SamplerConfig, Wording]:
    """The schedule and sampler of MONAI's DDIMScheduler, which is diffusers' with leading timesteps."""
    default = "the source's default"
    T = settle("num_train_timesteps", 1000, default)
    name = settle("schedule", "linear_beta", default)
    ends = {} if name == "cosine" else {
        "beta_start": settle("beta_start", 1e-4, default), "beta_end": settle("beta_end", 0.02, default)
    }  # fmt: skip
    schedule = checked(ScheduleConfig(_SCHEDULES.get(name, name), T, **ends))
    c = {
        "prediction_type": settle("prediction_type", "epsilon", default),
        "clip_sample": settle("clip_sample", True, default),
        "clip_sample_min": settle("clip_sample_min", -1.0, default),
        "clip_sample_max": settle("clip_sample_max", 1.0, default),
        "set_alpha_to_one": settle("set_alpha_to_one", True, default),
        "steps_offset": settle("steps_offset", 0, default),
        "variance_type": settle("variance_type", "fixed_small", f"{default}; DDIM does not use it"),
    }
    if c["clip_sample_min"] >= c["clip_sample_max"]:
        raise ConversionError(f"clip_sample_min {c['clip_sample_min']} is not below {c['clip_sample_max']}")
    sampler = SamplerConfig(
        spacing="leading",
        num_steps=min(50, T),
        steps_offset=c["steps_offset"],
        set_alpha_to_one=c["set_alpha_to_one"],
        clip=c["clip_sample"],
        clip_range=(c["clip_sample_min"], c["clip_sample_max"]),
        prediction_type=c["prediction_type"],
        variance=c["variance_type"],
    )
    betas = {"schedule": name, "num_train_timesteps": T, **ends}
    words = ({key: str(value) for key, value in part.items()} for part in (betas, c))
    return schedule, sampler, Wording(*words)


# -- names ------------------------------------------------------------------------------------------------------------

_RESNET = {
    **{"norm1": "norm1", "conv1.conv": "conv1", "time_emb_proj": "time_proj", "norm2": "norm2", "conv2.conv": "conv2"},
    "skip_connection.conv": "shortcut",
}


def rules(config: UNetConfig, *, core: bool, combined: bool) -> Rules:
    """The rename table. core: core's names, not MONAI Generative's; combined: q, k and v are one tensor there."""
    table: dict[str, Target] = {
        "time_embed.0": "time_embed.linear_1",
        "time_embed.2": "time_embed.linear_2",
        "class_embedding": "class_embed",
        "conv_in.conv": "conv_in",
        "out.0": "norm_out",
        "out.2.conv": "conv_out",
    }

    def block(source: str, target: str) -> None:
        table.update({f"{source}.{theirs}": f"{target}.{ours}" for theirs, ours in _RESNET.items()})

    def attention(source: str, target: str) -> None:
        table[f"{source}.norm"] = f"{target}.norm"
        inner = f"{source}.attn" if core else source
        table[f"{inner}.{'out_proj' if core else 'proj_attn'}"] = f"{target}.out"
        parts = {f"{inner}.to_{part}": f"{target}.{part}" for part in "qkv"}
        table.update({f"{inner}.qkv": Fused(tuple(parts.values()))} if combined else parts)

    block("middle_block.resnet_1", "mid.block_1")
    block("middle_block.resnet_2", "mid.block_2")
    attention("middle_block.attention", "mid.attention")
    last = len(config.widths) - 1
    for level in range(last + 1):
        for theirs, ours, sampler, resample, conv in (
            (f"down_blocks.{level}", f"down.{level}", "downsampler", "downsample", "op"),
            (f"up_blocks.{last - level}", f"up.{level}", "upsampler", "upsample", "postconv" if core else "conv"),
        ):
            block(f"{theirs}.resnets.{{j}}", f"{ours}.blocks.{{j}}")
            attention(f"{theirs}.attentions.{{j}}", f"{ours}.attentions.{{j}}")
            block(f"{theirs}.{sampler}", f"{ours}.{resample}")
            table[f"{theirs}.{sampler}.{conv}.conv"] = f"{ours}.{resample}.conv"
    return table


def _identities(config: UNetConfig, **names: bool) -> dict[str, np.ndarray]:
    """Projections behind the attentions that change nothing, under the source's names."""
    table = rules(config, **names)
    leaves = {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}
    return {
        source_of(name, table): np.eye(*shape, dtype=np.float32) if len(shape) == 2 else np.zeros(shape, np.float32)
        for name, shape in leaves.items()
        if re.search(r"attentions?(\.\d+)?\.out\.", name)
    }


def reference(config: UNetConfig, **names: bool) -> Any:
    """The PyTorch reference: diffusers', of the same wiring, under the source's names."""
    return diffusers.reference_by(config, rules(config, **names))


FAMILY = Family(
    name="monai",
    title="MONAI DiffusionModelUNet",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
)
