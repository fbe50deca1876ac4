"""yang-song/score_sde_pytorch's VP models: `ddpm` and `ncsnpp` (DDPM++, NCSN++), of `checkpoint_N.pth`.

A checkpoint is {optimizer, model, ema, step}: names with DataParallel's `module.`, and the EMA as a list in the order
of the model's parameters. The modules are numbered in the order that they run, so that their kinds tell the network.
What a run's config alone says, --set or a preset tells, which has the name of a config of the source.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig

from ..engine import ConversionError, refuse, refusing
from ..rules import Nin, Rules, Target
from .base import Family, Plan, Wording, check_sampler, checked
from .tensors import Tensors, common_size
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

_PART = re.compile(r"all_modules\.(\d{1,5})\.((?:(?:Conv|Conv2d|NIN|GroupNorm|Dense)_\d)?)")
"""(number, part) of a tensor's name; the part is empty where the module is a layer itself."""
BUFFERS = frozenset({"sigmas"})
_TAPS = (1.0, 3.0, 3.0, 1.0)


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names."""
    found = (_PART.match(str(name)) for name in state)
    return sum(bool(match and match[2]) for match in found) >= 4


_TOLD_BY_TENSORS = ("embedding_type", "progressive", "progressive_input", "progressive_combine", "resblock_type")
_IDLE: tuple[str, ...] = (
    *("dropout", "ema_rate", "normalization", "nonlinearity", "attention_type", "init_scale", "fourier_scale"),
    *("conv_size", "resamp_with_conv", "sigma_min", "sigma_max", *_TOLD_BY_TENSORS),
)
SETTINGS = {
    "name": "ncsnpp or ddpm, the network's class; blocks that resample are ncsnpp's (checked)",
    "image_size": "side of the training images in pixels, or HEIGHTxWIDTH",
    "sde": "vpsde; vesde and subvpsde are not taken",
    "continuous": "true: trained at every t of 0..1; false: at num_scales timesteps",
    "num_scales": "N timesteps (checked against the buffer sigmas)",
    "beta_min": "beta at t = 0; 0.1 in the source",
    "beta_max": "beta at t = 1; 20 in the source",
    "centered": "true: the model works on images in [-1, 1]",
    "scale_by_sigma": "false: the output is not divided by sigmas",
    "conditional": "true: the network is told t (checked)",
    "nf": "base width (checked)",
    "ch_mult": "list of width multipliers (checked)",
    "num_res_blocks": "residual blocks a level (checked)",
    "attn_resolutions": "sides with attention (checked)",
    "num_channels": "channels of the images (checked)",
    "skip_rescale": "whether ncsnpp's blocks divide their sum with the residual by sqrt(2)",
    "fir": "whether ncsnpp's blocks resample by fir_kernel (checked where the input comes in again)",
    "fir_kernel": "its taps; 1,3,3,1 in the source",
    **dict.fromkeys(_IDLE, "told by the tensors, or without effect on sampling"),
}
_PARSERS = {
    "name": one_of("ncsnpp", "ddpm"),
    "image_size": sides,
    "sde": one_of("vpsde", "subvpsde", "vesde"),
    **dict.fromkeys(("continuous", "centered", "scale_by_sigma", "conditional", "skip_rescale", "fir"), boolean),
    **dict.fromkeys(("num_scales", "nf", "num_res_blocks", "num_channels"), integer),
    **dict.fromkeys(("ch_mult", "attn_resolutions", "fir_kernel"), integers),
    **{"beta_min": positive, "beta_max": number},
    **dict.fromkeys(_IDLE, lambda value: value),
}
_ASKED = ("name", "beta_min", "beta_max", "centered", "skip_rescale", "fir", "fir_kernel")
_UNCHECKED = ("image_size", "sde", "continuous", "beta_min", "beta_max", "centered", "scale_by_sigma", "skip_rescale")


# -- what the tensors tell --------------------------------------------------------------------------------------------


def _kinds(tensors: Tensors) -> list[str]:
    """What each module is, in their order. ConversionError if one is missing altogether."""
    parts: dict[int, set[str]] = {}
    for name in tensors:
        if found := _PART.match(name):
            parts.setdefault(int(found[1]), set()).add(found[2])
    if gaps := [str(i) for i in range(max(parts, default=0) + 1) if i not in parts]:
        raise ConversionError(
            f"no tensor of all_modules.{gaps[0]} is there, so the rest has no place: the file is damaged, or the "
            "network resamples without convolutions (resamp_with_conv=False), which jddim does not read"
        )
    return [_kind(tensors, number, parts[number]) for number in sorted(parts)]


def _kind(tensors: Tensors, number: int, parts: set[str]) -> str:
    if parts & {"Conv_1", "GroupNorm_1", "Dense_0"}:
        resamples = "Conv_2" in parts and _width(tensors, number, "in") == _width(tensors, number, "out")
        return "resampling block" if resamples else "block"
    for part, kind in (("NIN_0", "attention"), ("Conv2d_0", "fir"), ("Conv_0", "resampling")):
        if part in parts:
            return kind
    if f"all_modules.{number}.W" in tensors:
        return "frequencies"
    weight = tensors.get(f"all_modules.{number}.weight")
    return "" if weight is None else {1: "norm", 2: "linear", 4: "conv"}.get(weight.ndim, "")


def _width(tensors: Tensors, number: int, end: str) -> int | None:
    """The channels that a block takes ("in") or gives ("out")."""
    parts = r"GroupNorm_0\.(weight|bias)" if end == "in" else r"(GroupNorm_1\.(weight|bias)|Conv_[01]\.bias)"
    return common_size(tensors, rf"all_modules\.{number}\.{parts}", 0)


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell, under the source's names where it has one. ConversionError if too little is there."""
    kinds = _kinds(tensors)
    refuse(_another(kinds, tensors))
    steps = [i for i, kind in enumerate(kinds) if kind.startswith("resampling")]
    levels = len(steps) // 2 + 1
    counts = [Counter(kinds[a + 1 : b]) for a, b in itertools.pairwise([-1, *steps, len(kinds)])][:levels]
    blocks = counts[0]["block"] if levels > 1 else (counts[0]["block"] - 3) // 2
    starts = [next((i for i in range(a, len(kinds)) if kinds[i] == "block"), 0) for a in (0, *steps[: levels - 1])]
    widths = [_width(tensors, start, "out") for start in starts]
    nf = common_size(tensors, r"all_modules\.[01]\.bias", 0, 4)
    last = rf"all_modules\.{len(kinds) - 1}\.(weight|bias)"
    stem = common_size(tensors, r"all_modules\.2\.weight", 1) or common_size(tensors, last, 0)
    if len(steps) % 2 or blocks < 1 or not nf or not stem or not all(widths):
        raise ConversionError("too few tensors of the network are there to tell its shape; is the file whole?")
    sigmas = tensors.get("sigmas")
    return {
        "name": "ncsnpp" if "resampling block" in kinds else None,
        "nf": nf,
        "ch_mult": tuple(whole(width / nf) for width in widths if width),
        "num_res_blocks": blocks,
        "num_channels": stem,
        "levels": tuple(i for i, count in enumerate(counts) if count["attention"] > (i == levels - 1)),
        "pyramid": "fir" in kinds,
        "num_scales": sigmas.shape[0] if sigmas is not None and sigmas.ndim == 1 else None,
        "norms": min((v.size for key, v in tensors.items() if re.search(r"GroupNorm_\d\.weight$", key)), default=0),
    }


def _another(kinds: list[str], tensors: Tensors) -> list[str]:
    """Which of the source's other networks this is, and why it is not converted."""
    of_ve = "no published VP model has it, and jddim does not read it"
    if kinds[0] == "frequencies":
        return [f"the network is told the logarithm of sigma (embedding_type fourier): {_VE}"]
    if not any(".Dense_0." in name for name in tensors):
        return ["the network is not told t (conditional=False), as jddim's all are"]
    if kinds.count("norm") > 1:
        return [f"its output is summed over levels (progressive): {of_ve}"]
    combined = any(
        kind == "resampling" and np.shape(tensors.get(f"all_modules.{i}.Conv_0.weight", 0))[2:] == (1, 1)
        for i, kind in enumerate(kinds)
    )
    if combined or len({kind for kind in kinds if kind.startswith("resampling")}) > 1:
        return [f"its input comes in again without a filter (progressive_input): {of_ve}"]
    if "fir" in kinds and "resampling block" not in kinds:
        return [f"it resamples by filtered convolutions (fir, resblock_type ddpm): {of_ve}"]
    return []


_VE = (
    "vesde's models predict the score of images in [0, 1] under noise, which is none of jddim's predictions; "
    "jddim reads vpsde's"
)
_SDES = {
    "vesde": _VE,
    "subvpsde": "a subvpsde's noise is not sqrt(1 - alpha^2), and jddim has no such schedule; it reads vpsde's",
}


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what config and --set add, and what is assumed."""
    config = {**(config or {}), **_of_training(config)}
    filed, unread, problems = sections(config, SETTINGS)
    filed = {key: value for key, value in filed.items() if key not in given}
    told, refused = parse({"config": filed, "--set": {key: literal(text) for key, text in given.items()}}, _PARSERS)
    refuse(problems + refused)
    found = infer(tensors)
    problems = _contradictions(told, found)
    problems += [_SDES[told["sde"]]] if told.get("sde", "vpsde") != "vpsde" else []
    if told.get("centered") is False:
        problems.append("centered is false, a model of images in [0, 1]; jddim's images are [-1, 1]")
    if told.get("scale_by_sigma"):
        problems.append("scale_by_sigma is true: its output is divided by sigmas, which no published VP model does")
    blocks_resample = found["name"] == "ncsnpp"
    song = blocks_resample or told.get("name") == "ncsnpp"
    if song and found["norms"] < 128:
        problems.append(
            f"a norm of {found['norms']} channels has fewer than 32 groups there, and jddim's all have as many"
        )
    missing = {
        f"{key}={what}": f"{why}: --set {key}={what}, or --preset"
        for key, what, why in (
            ("image_size", "SIDE", "the image size"),
            ("sde", "vpsde", "the path of its training (vpsde and subvpsde have the same networks)"),
            ("continuous", "BOOLEAN", "whether t was continuous in training"),
        )
        if key not in told
    }
    asked = [key for key in _ASKED if song or key not in ("skip_rescale", "fir", "fir_kernel")]
    if not (found["pyramid"] or told.get("fir")):
        asked = [key for key in asked if key != "fir_kernel"]
    asks = () if problems else asking(asked, told, missing)
    refuse([*problems, *(f"the tensors do not tell {what}" for what in missing.values())], asks)

    assumed: list[str] = []
    settle = settling(told, assumed)
    if not blocks_resample:
        settle("name", "ddpm", "the published networks whose blocks do not resample")
    settle("centered", True, "all published VP models")
    rescaled = song and settle("skip_rescale", True, "all published ncsnpp models")
    fir = blocks_resample and (
        found["pyramid"] or settle("fir", False, "the published models whose input does not come in again")
    )
    taps = settle("fir_kernel", _TAPS, "all published models") if fir else ()
    kind = "resnet" if blocks_resample else "conv"
    with refusing("the tensors and settings make no valid UNet"):
        model = UNetConfig(
            image_size=told["image_size"],
            in_channels=found["num_channels"],
            out_channels=found["num_channels"],
            channels=found["nf"],
            channel_mults=found["ch_mult"],
            num_res_blocks=found["num_res_blocks"],
            attention_levels=found["levels"],
            downsample=(kind,),
            upsample=(kind,),
            mid_scale=math.sqrt(2) if rescaled else 1.0,
            block_scale=math.sqrt(2) if rescaled else 1.0,
            resample_shortcut=blocks_resample,
            resample_filter=tuple(float(tap) for tap in taps),
            up_attention_last=True,
            input_pyramid=found["pyramid"],
        )
    if found["pyramid"] and not rescaled:
        raise ConversionError("skip_rescale is false, and its input comes in again, which jddim divides by sqrt(2)")
    beta_min = settle("beta_min", 0.1, "the source's configs")
    beta_max = settle("beta_max", 20.0, "the source's configs")
    T = found["num_scales"] or settle("num_scales", 1000, "the source's configs")
    if told["continuous"]:
        schedule = checked(ScheduleConfig("vp", t_min=1e-3, t_max=1.0, beta_start=beta_min, beta_end=beta_max))
        sampler = SamplerConfig(spacing="even", clip=False, timestep_scale=999.0)
    else:
        with refusing("the noise schedule cannot be built"):
            schedule = checked(ScheduleConfig("linear", T, beta_min / T, beta_max / T))
        sampler = SamplerConfig(num_steps=min(50, T), clip=False, variance="fixed_large")
    check_sampler(sampler, schedule)
    return Plan(
        model,
        schedule,
        sampler,
        rules(model),
        {"sigmas": "the noise levels of vesde, which a VP model does not use"} if "sigmas" in tensors else {},
        tuple(assumed),
        tuple(not_read(unread)),
        asks=asking(asked, told),
        unchecked=tuple(key for key in given if key in _UNCHECKED or (key == "fir" and not found["pyramid"])),
        wording=Wording(
            {
                "sde": "vpsde",
                "beta_min": f"{beta_min:g}",
                "beta_max": f"{beta_max:g}",
                **({} if told["continuous"] else {"num_scales": str(T)}),
            },
            {"continuous": str(told["continuous"])},
        ),
    )


def _of_training(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The two settings of a config's section `training`, which is otherwise not on the network."""
    training = (config or {}).get("training")
    return {key: training[key] for key in ("sde", "continuous") if isinstance(training, Mapping) and key in training}


def _contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Settings that say otherwise than the tensors, each with both values."""
    if found["pyramid"]:
        found = {**found, "fir": True}
    problems = [
        f"{key} is {told[key]} by the settings, but {found[key]} by the tensors"
        for key in ("name", "nf", "ch_mult", "num_res_blocks", "num_channels", "num_scales", "fir")
        if key in told and found.get(key) not in (None, told[key])
    ]
    if "image_size" in told and "attn_resolutions" in told:
        wide = [told["image_size"][1] >> level for level in range(len(found["ch_mult"]))]
        at = tuple(level for level, side in enumerate(wide) if side in told["attn_resolutions"])
        if at != found["levels"]:
            own = [wide[level] for level in found["levels"]]
            problems.append(
                f"attn_resolutions is {list(told['attn_resolutions'])} by the settings, but {own} by the tensors"
            )
    if told.get("conditional") is False:
        problems.append("conditional is false by the settings, but the tensors have an embedding of t")
    return problems


# -- the names --------------------------------------------------------------------------------------------------------

_BLOCK = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "time_proj", "GroupNorm_1": "norm2", "Conv_1": "conv2"}


def rules(config: UNetConfig) -> Rules:
    """The rename table, spelled out: the source's numbers run through the whole network."""
    blocks_resample = config.downsample == ("resnet",)
    names = (f"all_modules.{i}" for i in itertools.count())
    table: dict[str, Target] = {next(names): f"time_embed.linear_{i}" for i in (1, 2)}
    table[next(names)] = "conv_in"

    def block(target: str) -> None:
        name = next(names)
        table.update({f"{name}.{theirs}": f"{target}.{ours}" for theirs, ours in _BLOCK.items()})
        if blocks_resample:
            table[f"{name}.Conv_2"] = f"{target}.shortcut"
        else:
            table[f"{name}.NIN_0"] = Nin((f"{target}.shortcut",))

    def attention(target: str) -> None:
        name = next(names)
        table[f"{name}.GroupNorm_0"] = f"{target}.norm"
        table.update({f"{name}.NIN_{i}": Nin((f"{target}.{part}",)) for i, part in enumerate(("q", "k", "v", "out"))})

    def resampling(target: str) -> None:
        if blocks_resample:
            block(target)
        else:
            table[f"{next(names)}.Conv_0"] = f"{target}.conv"

    last = len(config.widths) - 1
    for level in range(last + 1):
        for i in range(config.num_res_blocks):
            block(f"down.{level}.blocks.{i}")
            if level in config.attention_levels:
                attention(f"down.{level}.attentions.{i}")
        if level < last:
            resampling(f"down.{level}.downsample")
            if config.input_pyramid:
                table[f"{next(names)}.Conv2d_0"] = f"pyramid.{level}"
    block("mid.block_1")
    attention("mid.attention")
    block("mid.block_2")
    for level in reversed(range(last + 1)):
        for i in range(config.num_res_blocks + 1):
            block(f"up.{level}.blocks.{i}")
        if level in config.attention_levels:
            attention(f"up.{level}.attentions.0")
        if level:
            resampling(f"up.{level}.upsample")
    table[next(names)] = "norm_out"
    table[next(names)] = "conv_out"
    return table


def reference(config: UNetConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have the source's names."""
    from ..reference.score_sde_unet import ScoreUNet

    return ScoreUNet(
        images=config.in_channels,
        nf=config.channels,
        widths=config.widths,
        blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        biggan=config.resample_shortcut,
        scale=config.block_scale,
        taps=config.resample_filter or (1.0, 1.0),
        pyramid=config.input_pyramid,
    )


_CIFAR10 = {"sde": "vpsde", "image_size": "32", "nf": "128", "ch_mult": "1,2,2,2", "attn_resolutions": "16"}
_256 = {**_CIFAR10, "image_size": "256", "ch_mult": "1,1,2,2,4,4"}
_EVERY = {"centered": "true", "beta_min": "0.1", "beta_max": "20", "num_scales": "1000"}
_DDPM = {"name": "ddpm", "num_res_blocks": "2", **_EVERY}
_SONG = {"name": "ncsnpp", "skip_rescale": "true", **_EVERY}
PRESETS: dict[str, dict[str, str]] = {
    "vp/ddpm/cifar10": {**_CIFAR10, **_DDPM, "continuous": "false"},
    "vp/ddpm/cifar10_continuous": {**_CIFAR10, **_DDPM, "continuous": "true"},
    **{f"vp/ddpm/{name}": {**_256, **_DDPM, "continuous": "false"} for name in ("bedroom", "celebahq", "church")},
    **{
        f"vp/cifar10_{name}{ending}": {
            **_CIFAR10,
            **_SONG,
            "fir": "false" if name == "ddpmpp" else "true",
            **({} if name == "ddpmpp" else {"fir_kernel": "1,3,3,1"}),
            "num_res_blocks": "8" if "deep" in ending else "4",
            "continuous": str("continuous" in ending).lower(),
        }
        for name in ("ddpmpp", "ncsnpp")
        for ending in ("", "_continuous", "_deep_continuous")
    },
}

FAMILY = Family(
    name="score_sde",
    title="score_sde_pytorch, VP",
    recognise=recognise,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    buffers=BUFFERS,
    presets=PRESETS,
    config_files=lambda weights: [],  # a run's config is Python code
)
