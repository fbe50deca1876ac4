"""NVlabs/edm's `.pkl` snapshots: DDPM++ and NCSN++ (SongUNet) and ADM (DhariwalUNet) inside EDM's preconditioning.

A snapshot holds the arguments that its network was made with, under which the names of `--set` go too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jddim.config import EDM, SamplerConfig, ScheduleConfig, UNetConfig

from ..engine import ConversionError, refuse, refusing
from ..files.persistence import ENTRY
from ..rules import Fused, Rules, Target
from .base import Family, Plan, Wording, check_sampler, checked
from .tensors import Tensors
from .values import (
    asking,
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
    whole,
)

_PLACE = re.compile(r"(enc|dec)\.(\d{1,5})x\2_([a-z_]+)(\d{0,4})\.")
"""(half of the network, side, what it is, number) of a tensor's name."""
PRECONDS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names."""
    names = [str(name) for name in state]
    halves = {found[1] for name in names if (found := _PLACE.match(name))}
    return halves == {"enc", "dec"} and any(name.startswith("map_layer0.") for name in names)


_TOLD_BY_TENSORS = ("embedding_type", "channel_mult_noise", "channel_mult_emb", "encoder_type", "decoder_type")
_IDLE = ("augment_dim", "dropout", "label_dropout", "use_fp16", "resample_filter", *_TOLD_BY_TENSORS)
SETTINGS = {
    "class_name": f"the preconditioning, EDMPrecond; {', '.join(PRECONDS[1:])} are not taken",
    "sigma_data": "standard deviation of the images; 0.5 in the source",
    "sigma_min": "the least noise that the network takes; sampling goes to 0.002 in the source, or to this",
    "sigma_max": "the most noise that the network takes; sampling begins at 80 in the source, or at this",
    "model_type": "SongUNet or DhariwalUNet (checked against the tensors)",
    "img_resolution": "side of the images in pixels (checked)",
    "img_channels": "channels of the images (checked)",
    "label_dim": "classes, 0: none (checked)",
    "model_channels": "base width (checked)",
    "channel_mult": "list of width multipliers (checked)",
    "num_blocks": "residual blocks a level (checked)",
    "attn_resolutions": "sides with attention (checked)",
    **dict.fromkeys(_IDLE, "told by the tensors, or without effect on sampling"),
}
_PARSERS = {
    "class_name": one_of(*PRECONDS),
    "sigma_data": positive,
    "sigma_min": number,
    "sigma_max": lambda value: value if value == math.inf else positive(value),
    "model_type": one_of("SongUNet", "DhariwalUNet"),
    **dict.fromkeys(("img_resolution", "img_channels", "label_dim", "model_channels", "num_blocks"), integer),
    **dict.fromkeys(("channel_mult", "attn_resolutions"), integers),
    **dict.fromkeys(_IDLE, lambda value: value),
}


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell, under the source's names where it has one. ConversionError if too little is there."""
    places: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for name in tensors:
        if found := _PLACE.match(name):
            half, side, kind, number = found.groups()
            places.setdefault((half, int(side)), set()).add((kind, number))
    sides = sorted({side for _, side in places}, reverse=True)
    counts = [sum(kind == "block" for kind, _ in places.get(("enc", side), ())) for side in sides]
    shapes: dict[Any, str] = {
        "stem": f"enc.{sides[0]}x{sides[0]}_conv.weight",
        "layer0": "map_layer0.weight",
        "affine": f"enc.{sides[0]}x{sides[0]}_block0.affine.weight",
        **{side: f"enc.{side}x{side}_block0.conv1.weight" for side in sides},
    }
    found_shapes = {key: np.shape(tensors.get(name, 0)) for key, name in shapes.items()}
    halved = all(side == sides[0] >> level > 0 for level, side in enumerate(sides))
    whole_shapes = all(len(shape) in (2, 4) and min(shape) > 0 for shape in found_shapes.values())
    if not halved or not whole_shapes or len(set(counts)) != 1 or found_shapes["layer0"][1] < 2:
        raise ConversionError("too few tensors of the network are there to tell its shape; is the file whole?")
    song = any(name.startswith("dec.") and "_aux_norm." in name for name in tensors)
    frequencies = "map_noise.freqs" in tensors
    features = found_shapes["layer0"][1]
    stem = found_shapes["stem"]
    channels = features // 2 if frequencies else features
    widths = [found_shapes[side][0] for side in sides]
    labels = tensors.get("map_label.weight")
    return {
        "model_type": "SongUNet" if song else "DhariwalUNet",
        "img_resolution": sides[0],
        "img_channels": stem[1],
        "label_dim": labels.shape[1] if labels is not None and labels.ndim == 2 else 0,
        "model_channels": channels,
        "channel_mult": tuple(whole(width / channels) for width in widths),
        "num_blocks": counts[0],
        "attn_resolutions": tuple(side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in tensors),
        "sides": sides,
        "widths": widths,
        "stem": stem[0],
        "time": found_shapes["layer0"][0],
        "frequencies": frequencies,
        "scale_shift": found_shapes["affine"][0] == 2 * widths[0],
        "pyramid": any("_aux_residual." in name for name in tensors),
    }


def _taps(tensors: Tensors) -> tuple[float, ...]:
    """The filter of the blocks that resample, from its buffers; () of [1, 1]: the UNet's own."""
    filters = [np.asarray(value, np.float64) for name, value in tensors.items() if name.endswith(".resample_filter")]
    if not filters:
        return ()
    first = filters[0]
    if any(each.shape != first.shape or not np.allclose(each, first) for each in filters):
        raise ConversionError("the network resamples by several filters; one is what it has in the source")
    taps = first[0, 0].sum(axis=1) if first.ndim == 4 and min(first.shape) > 0 else first.reshape(-1)
    if (
        first.shape != (1, 1, len(taps), len(taps))
        or taps[0] == 0
        or not np.allclose(first[0, 0], np.outer(taps, taps), atol=1e-6)
    ):
        raise ConversionError(f"resample_filter of shape {first.shape} is no product of taps with themselves")
    return () if len(taps) == 2 and taps[0] == taps[1] else tuple(float(f"{tap / taps[0]:.6g}") for tap in taps)


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the network was made with, and what is assumed."""
    filed, unread, problems = sections(config, SETTINGS)
    filed = {key: value for key, value in filed.items() if key not in given}
    told, refused = parse({"config": filed, "--set": {key: literal(text) for key, text in given.items()}}, _PARSERS)
    refuse(problems + refused)
    found = infer(tensors)
    problems = _contradictions(told, found)
    if (precond := told.get("class_name", PRECONDS[0])) != PRECONDS[0]:
        problems.append(
            f"its preconditioning is {precond}, of another network's training; jddim samples {PRECONDS[0]}'s"
        )
    if any("_aux_skip." in name for name in tensors):
        problems.append("its encoder is the source's 'skip', which no published network has; jddim has the others")
    narrow = min((value.size for name, value in tensors.items() if re.search(r"norm\d?\.weight$", name)), default=128)
    if narrow < 128:
        problems.append(f"a norm of {narrow} channels has fewer than 32 groups there, and jddim's all have as many")
    missing = {}
    if "class_name" not in told:
        missing["class_name=PRECOND"] = "its preconditioning, which a snapshot says: --set class_name=EDMPrecond"
    asks = () if problems else asking((), told, missing)
    refuse([*problems, *(f"the tensors do not tell {what}" for what in missing.values())], asks)

    assumed: list[str] = []
    settle = settling(told, assumed)
    song, classes = found["model_type"] == "SongUNet", found["label_dim"] or None
    with refusing("the tensors make no valid UNet"):
        model = UNetConfig(
            image_size=(found["img_resolution"],) * 2,
            in_channels=found["img_channels"],
            out_channels=found["img_channels"],
            channels=found["model_channels"],
            channel_mults=found["channel_mult"],
            stem_channels=None if found["stem"] == found["model_channels"] else found["stem"],
            num_res_blocks=found["num_blocks"],
            attention_levels=tuple(found["sides"].index(side) for side in found["attn_resolutions"]),
            num_heads=1,
            head_channels=None if song else 64,
            downsample=("resnet",),
            upsample=("resnet",),
            scale_shift=found["scale_shift"],
            mid_scale=math.sqrt(2) if song else 1.0,
            block_scale=math.sqrt(2) if song else 1.0,
            norm_epsilon=1e-6 if song else 1e-5,
            time_embedding="frequencies" if found["frequencies"] else "sinusoidal",
            time_channels=None if found["time"] == 4 * found["model_channels"] else found["time"],
            cosine_first=not song,
            frequency_shift=1.0 if song else 0.0,
            class_embedding=None if classes is None else "learned",
            num_classes=classes,
            early_class=song and classes is not None,
            resample_shortcut=song,
            resample_filter=_taps(tensors),
            up_attention_last=song,
            input_pyramid=found["pyramid"],
        )
    ends = max(0.002, told.get("sigma_min", 0)), min(80.0, told.get("sigma_max", math.inf))
    schedule = checked(ScheduleConfig("edm", t_min=ends[0], t_max=ends[1]))
    sampler = SamplerConfig(
        spacing="karras",
        num_steps=18,
        clip=False,
        prediction_type=EDM,
        timestep_scale=0.25,
        sigma_data=settle("sigma_data", 0.5, "the source's default"),
    )
    check_sampler(sampler, schedule)
    ignored = {name: "the filter of resampling" for name in tensors if name.endswith(".resample_filter")}
    if "map_augment.weight" in tensors:
        ignored["map_augment.weight"] = "of training's augmentations, of which an image that is sampled has none"
    implied: dict[str, np.ndarray] = {}
    if found["frequencies"]:
        ignored["map_noise.freqs"] = "kept as map_noise.weight"
        implied["map_noise.weight"] = np.asarray(tensors["map_noise.freqs"])
    if classes is not None:
        table = np.asarray(tensors["map_label.weight"], np.float32).T
        if song:  # the source's one-hot vectors are sqrt(classes) long
            ignored["map_label.bias"] = "added to each class's row"
            with refusing("map_label.bias is not of map_label.weight"):
                table = table * np.float32(math.sqrt(classes)) + np.float32(tensors.get("map_label.bias", 0))
        implied["map_label.weight"] = table
    return Plan(
        model,
        schedule,
        sampler,
        rules(model),
        ignored,
        tuple(assumed),
        (
            *(["augmentations: none, as the source samples"] if "map_augment.weight" in ignored else []),
            *not_read(unread),
        ),
        unchecked=tuple(key for key in given if key in ("class_name", "sigma_data", "sigma_min", "sigma_max")),
        wording=Wording(
            {"sigma_min": f"{ends[0]:g}", "sigma_max": f"{ends[1]:g}"},
            {"class_name": precond, "sigma_data": f"{sampler.sigma_data:g}"},
        ),
        implied=implied,
    )


def _contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Settings that say otherwise than the tensors, each with both values."""
    if "attn_resolutions" in told:  # which may name sides that the network has not
        sides = tuple(side for side in found["sides"] if side in told["attn_resolutions"])
        told = {**told, "attn_resolutions": sides}
    keys = ("model_type", "img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "num_blocks")
    return [
        f"{key} is {told[key]} by the settings, but {found[key]} by the tensors"
        for key in (*keys, "attn_resolutions")
        if key in told and told[key] != found[key]
    ]


_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "shortcut",
}


def rules(config: UNetConfig) -> Rules:
    """The rename table, spelled out: the source's names count pixels."""
    song = config.up_attention_last
    names = [f"{config.image_size[0] >> level}x{config.image_size[0] >> level}" for level in range(len(config.widths))]
    table: dict[str, Target] = {
        "map_noise": "time_proj",
        "map_label": "class_embed",
        "map_layer0": "time_embed.linear_1",
        "map_layer1": "time_embed.linear_2",
        f"enc.{names[0]}_conv": "conv_in",
        f"dec.{names[0]}_aux_norm" if song else "out_norm": "norm_out",
        f"dec.{names[0]}_aux_conv" if song else "out_conv": "conv_out",
    }

    def block(source: str, target: str, attention: str = "", width: int = 0) -> None:
        table.update({f"{source}.{theirs}": f"{target}.{ours}" for theirs, ours in _BLOCK.items()})
        if attention:  # each channel's q, k and v stand together
            table[f"{source}.norm2"], table[f"{source}.proj"] = f"{attention}.norm", f"{attention}.out"
            table[f"{source}.qkv"] = Fused(tuple(f"{attention}.{part}" for part in "qkv"), width)

    each, last = config.num_res_blocks, len(names) - 1
    for level, (name, width) in enumerate(zip(names, config.widths, strict=True)):
        attended = level in config.attention_levels
        for i in range(each):
            place = f"down.{level}.attentions.{i}" if attended else ""
            block(f"enc.{name}_block{i}", f"down.{level}.blocks.{i}", place, width)
        for i in range(each + 1):
            k = i - each if song else i
            place = f"up.{level}.attentions.{k}" if attended and k >= 0 else ""
            block(f"dec.{name}_block{i}", f"up.{level}.blocks.{i}", place, width)
        if level:
            block(f"enc.{name}_down", f"down.{level - 1}.downsample")
            table[f"enc.{name}_aux_residual"] = f"pyramid.{level - 1}"
        if level < last:
            block(f"dec.{name}_up", f"up.{level + 1}.upsample")
    block(f"dec.{names[-1]}_in0", "mid.block_1", "mid.attention", config.widths[-1])
    block(f"dec.{names[-1]}_in1", "mid.block_2")
    return table


def reference(config: UNetConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have the source's names."""
    from ..reference.edm_unet import EDMUNet

    return EDMUNet(
        side=config.image_size[0],
        images=config.in_channels,
        channels=config.channels,
        stem=config.stem,
        widths=config.widths,
        blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        heads=[config.heads(width) for width in config.widths],
        time=config.time_width,
        classes=config.num_classes,
        song=config.up_attention_last,
        doubled=config.scale_shift,
        frequencies=config.time_embedding == "frequencies",
        pyramid=config.input_pyramid,
        taps=config.resample_filter or (1.0, 1.0),
    )


FAMILY = Family(
    name="edm",
    title="EDM (NVlabs)",
    recognise=recognise,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    pointwise={"qkv": 2, "proj": 2},
    entry=ENTRY,
    config_files=lambda weights: [],  # a snapshot says what its network was made with
)
