"""OpenAI's `.pt` files: guided-diffusion's and improved-diffusion's state dicts.

Both repositories save bare state dicts, `model{step}.pt` and `ema_{rate}_{step}.pt`; what the tensors do not tell they
read from command-line flags, whose names and spellings `--set` takes. guided-diffusion's network is the other's with
options added, under the same names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jddim.checkpoint.metadata import Metadata
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.schedule import CONTINUOUS, noise_schedule, schedule_config_from_betas
from jddim.timesteps import make_timesteps

from ..engine import ConversionError, cannot_hold, refuse, refusing
from ..files.pickles import printable
from ..rules import Fused, Rules, Target
from ..writers import save_torch, torch_tensors
from .base import Family, Plan, Source, Wording, checked, of_wiring
from .tensors import Tensors, check_tensors, common_size
from .values import asking, is_integer, not_read, number, parse, section, sections, settling, whole

# -- the file ---------------------------------------------------------------------------------------------------------


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names."""
    parts = {str(name).partition(".")[0] for name in state}
    return {"input_blocks", "middle_block", "time_embed"} <= parts


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors."""
    check_tensors(state, file_name)
    tensors = {str(name): value for name, value in state.items()}
    if reason := _refusal(tensors):
        raise ConversionError(f"{file_name} {reason}")
    return Source(tensors)


_NAMED = re.compile(r"(?:ema_(?P<ema>[\d.]+)_|model)(?P<step>\d{1,12})\.pt")


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """The trainers' newest file, an EMA's before a raw one; None if there is none."""
    return newest(folder, _NAMED, weights) if variant is None else None


def newest(folder: Path, pattern: re.Pattern[str], weights: str | None) -> Path | None:
    """The file of the last step, an EMA's before a raw one; None if there is none. pattern: has `ema` and `step`.

    Raises ConversionError where there is none of the kind asked for, or EMAs of several rates.
    """
    found: dict[str, dict[int, list[Path]]] = {"ema": {}, "raw": {}}
    for path in sorted(folder.iterdir()):
        if named := pattern.fullmatch(path.name):
            found["ema" if named["ema"] else "raw"].setdefault(int(named["step"]), []).append(path)
    if not any(found.values()):
        return None
    kind = weights or ("ema" if found["ema"] else "raw")
    if not found[kind]:
        raise ConversionError(f"{folder} holds no {kind} weights, so no --weights {kind}; leave the option out")
    last = found[kind][max(found[kind])]
    if len(last) > 1:
        raise ConversionError(f"{folder} holds averages of several rates; name one: {', '.join(p.name for p in last)}")
    return last[0]


def placed(source: Source, file: Path, config: Mapping[str, Any] | None) -> Source:
    """The trainers' file names say which weights they are, and of which step."""
    named = _NAMED.fullmatch(file.name)
    if source.weights != "unstated" or named is None:
        return source
    return dataclasses.replace(source, weights="ema" if named["ema"] else "raw", step=int(named["step"]))


def _refusal(tensors: Tensors) -> str | None:
    """What a file with this family's names is, where it is no network that predicts noise from x_t and t alone."""
    if any(".transformer_blocks." in name for name in tensors):
        return (
            "is a latent-diffusion UNet with cross-attention to a context (Stable Diffusion's text, cin256's one token "
            "for a class); jddim's networks take class labels or nothing"
        )
    return None


# -- what the tensors tell --------------------------------------------------------------------------------------------


def infer(tensors: Tensors) -> dict[str, Any]:
    """Every fact that names and shapes hold, under the source's flag names where it has one.

    channel_mult and widths by level, attention_levels, resample ("conv", "resnet", "pool"), in_channels, out_channels,
    num_classes (None without classes). Facts are taken from several tensors each where there are several, so that a
    missing or misshapen one is reported as such and not as another network.
    """
    layers: dict[str, dict[int, Counter[tuple[int, str]]]] = {"input": {}, "output": {}}
    for name in tensors:
        if found := re.match(r"(input|output)_blocks\.(\d{1,6})\.(\d{1,6})\.([a-z_]+)", name):
            side, n, layer, kind = found.groups()
            layers[side].setdefault(int(n), Counter())[int(layer), kind] += 1
    entries, exits = layers["input"], layers["output"]

    convs = sum((0, "op") in found for found in entries.values())
    convs = max(convs, sum(any(kind == "conv" for _, kind in found) for found in exits.values()))
    blocks = sum(any(layer and kind == "in_layers" for layer, kind in found) for found in exits.values())
    pools = 1 + max(entries, default=-1) - len(entries)  # numbers without a tensor
    resample = "resnet" if blocks > convs else "conv" if convs else "pool"
    levels = 1 + {"resnet": blocks, "conv": convs, "pool": pools}[resample]
    count = 1 + max(exits, default=-1)
    each = count // levels  # blocks of a level on the way up; on the way down the last of them is the downsampling
    # A number alone makes no blocks: most of them must be there.
    if count % levels or each < 2 or 1 + max(entries, default=-1) != count or 2 * len(exits) < count:
        raise ConversionError(
            f"the blocks do not add up to a UNet: input_blocks up to {max(entries, default='none')}, "
            f"output_blocks up to {max(exits, default='none')}, {levels - 1} upsamplings; is the file whole?"
        )

    def at(level: int) -> list[str]:
        entry = [f"input_blocks.{1 + level * each + j}" for j in range(each - 1)]
        return entry + [f"output_blocks.{(levels - 1 - level) * each + j}" for j in range(each)]

    places = [at(level) for level in range(levels)]
    every = [f"{place}.0" for level in places for place in level] + ["middle_block.0", "middle_block.2"]
    biases = r"\.0\.(in_layers\.2|out_layers\.[03])\.bias"
    widths = [common_size(tensors, f"({'|'.join(map(re.escape, level))}){biases}", 0) for level in places]
    channels = common_size(tensors, r"time_embed\.[02]\.(bias|weight)", 0, 4)
    ends = _ends(tensors)
    if not channels or None in widths or None in ends:
        raise ConversionError("too few tensors of the UNet are there to tell its shape; is the file whole?")
    ratios = Counter(
        tensors[f"{place}.emb_layers.1.bias"].size / tensors[f"{place}.out_layers.3.bias"].size
        for place in every
        if f"{place}.emb_layers.1.bias" in tensors and tensors.get(f"{place}.out_layers.3.bias", np.empty(0)).size
    )
    attended = [sum(f"{place}.1.qkv.weight" in tensors for place in level) for level in places]
    labels = tensors.get("label_emb.weight")
    return {
        "num_channels": channels,
        "widths": widths,
        "channel_mult": tuple(whole(width / channels) for width in widths),  # type: ignore[operator]
        "num_res_blocks": each - 1,
        "attention_levels": tuple(level for level, found in enumerate(attended) if 2 * found >= 2 * each - 1),
        "in_channels": ends[0],
        "out_channels": ends[1],
        "resample": resample if levels > 1 else "conv",
        "use_scale_shift_norm": ratios.most_common(1)[0][0] == 2 if ratios else True,
        "num_classes": labels.shape[0] or None if labels is not None and labels.ndim == 2 else None,
    }


def _ends(tensors: Tensors) -> tuple[int | None, int | None]:
    """The network's channels in and out."""
    first, last = tensors.get("input_blocks.0.0.weight"), tensors.get("out.2.bias", tensors.get("out.2.weight"))
    return (
        first.shape[1] if first is not None and first.ndim == 4 else None,
        last.shape[0] if last is not None and last.ndim else None,
    )


# -- what only flags can tell -----------------------------------------------------------------------------------------

SETTINGS = {
    "image_size": "side of the training images in pixels (or HEIGHTxWIDTH)",
    "large_size": "of an upsampler, its image_size",
    "small_size": "of an upsampler (SuperResModel), the side of the small image that it is given beside x_t",
    "num_channels": "base width (checked against the tensors)",
    "num_res_blocks": "residual blocks a level (checked)",
    "channel_mult": "list of width multipliers; empty: the source's for image_size (checked)",
    "num_heads": "heads of every attention; the sources' default is 4",
    "num_head_channels": "width of every head, over num_heads; -1: by num_heads",
    "num_heads_upsample": "heads of the decoder's attention; -1: num_heads",
    "attention_resolutions": "list of resolutions with attention (checked)",
    "use_new_attention_order": "True: qkv's channels are [q, k, v][head], False: [head][q, k, v]",
    "use_scale_shift_norm": "time scales and shifts (checked)",
    "resblock_updown": "residual blocks resample (checked)",
    "class_cond": "the network takes labels (checked)",
    "learn_sigma": "the network predicts its variance too (checked)",
    "sigma_small": "without learn_sigma, the ancestral sampler's variance is the posterior's",
    "diffusion_steps": "T",
    "noise_schedule": "linear or cosine",
    "rescale_timesteps": "the network is given 1000 t / T",
    "predict_xstart": "the network predicts x_0",
    "timestep_respacing": 'the sampler\'s default timesteps: "250", "ddim25", "10,15,20"',
    "clip_denoised": "x_0 is clamped to [-1, 1] at each step; the sources' default is True",
    "use_fp16": "half-precision torso; jddim computes in float32 (or sample --dtype)",
    "dropout": "of training; no effect on sampling",
    "use_checkpoint": "of training; no effect on sampling",
    "use_kl": "of training; no effect on sampling",
    "rescale_learned_sigmas": "of training; no effect on sampling",
    "norm_groups": "groups of every group norm; 32 in both sources, for forks",
}
_UNTOLD = (
    *("image_size", "num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order", "norm_groups"),
    *("large_size", "small_size", "diffusion_steps", "noise_schedule", "rescale_timesteps", "predict_xstart"),
)
TRAINING_ONLY = ("dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas")

# The multipliers that the sources' create_model takes for each image size, where channel_mult is not given.
_MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def _boolean(text: str) -> bool:
    if (word := text.lower()) in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("True or False")


def _positive(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError("an integer above 0")
    return int(text)


def _count(text: str) -> int | None:
    return None if text == "-1" else _positive(text)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(whole(float(part)) for part in text.split(",") if text)
    except (ValueError, OverflowError):
        raise ValueError("a list of numbers (1,2,3)") from None


def _schedule_name(text: str) -> str:
    if text not in ("linear", "cosine"):
        raise ValueError("linear or cosine")
    return text


def _respacing(text: str) -> str:
    if not re.fullmatch(r"|ddim[1-9]\d*|\d+(,\d+)*", text):
        raise ValueError('a number of steps, "ddimN" or a list of numbers, one for each section of the timesteps')
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(SETTINGS, _boolean),  # all but those that follow
    **dict.fromkeys(("image_size", "large_size", "small_size"), _size),
    **dict.fromkeys(("num_channels", "num_res_blocks", "num_heads", "diffusion_steps", "norm_groups"), _positive),
    **dict.fromkeys(("num_head_channels", "num_heads_upsample"), _count),
    **dict.fromkeys(("channel_mult", "attention_resolutions"), _numbers),
    "noise_schedule": _schedule_name,
    "timestep_respacing": _respacing,
    "dropout": number,
}


def read_settings(
    config: Mapping[str, Any] | None,
    given: Mapping[str, str],
    known: Iterable[str] = SETTINGS,
    more: Mapping[str, Callable[[str], Any]] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """The flags of a config file (flat, or in sections; other keys are not ours) and of --set, parsed; --set wins.

    known: which flags there are. more: the parsers of those that are not this family's.
    Raises ConversionError for unknown or bad ones, all in one message.
    """
    parsers = {key: {**_PARSERS, **more}[key] for key in known}
    found, _, problems = sections(_of_compvis(config), parsers)
    filed = {key: _spelled(value).strip() for key, value in found.items()}
    told, refused = parse({"config": filed, "--set": {k: v.strip() for k, v in given.items()}}, parsers)
    refuse(problems + refused)
    return told


def _of_compvis(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A latent-diffusion config as flags: other names, and attention by factors of downsampling. Any other as it is."""
    network, outer = section(config, "model", "params", "unet_config", "params"), section(config, "model", "params")
    if not network:
        return config
    if (predicted := outer.get("parameterization", "eps")) not in ("eps", "x0"):
        raise ConversionError(f"the config's parameterization must be eps or x0, got {printable(str(predicted), 60)}")
    flags = {key: value for key, value in network.items() if key in SETTINGS and key != "attention_resolutions"}
    side, factors = network.get("image_size"), network.get("attention_resolutions")
    if is_integer(side) and isinstance(factors, list) and all(is_integer(factor) and factor > 0 for factor in factors):
        flags["attention_resolutions"] = [side // factor for factor in factors]
    told = {"num_channels": network.get("model_channels"), "diffusion_steps": outer.get("timesteps")}
    flags |= {key: value for key, value in told.items() if value is not None}
    return flags | {"predict_xstart": predicted == "x0", "rescale_timesteps": False}


def _samples_latents(config: Mapping[str, Any] | None) -> bool:
    """Whether a latent-diffusion config names a first stage."""
    stage = section(config, "model", "params", "first_stage_config")
    return not str(stage.get("target", "IdentityFirstStage")).endswith("IdentityFirstStage")


def _spelled(value: Any) -> str:
    """A YAML value as one would write it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the flags add, and what is assumed."""
    told = read_settings(config, given)
    found = _with_condition(infer(tensors), told)
    if "large_size" in told:
        told = {"image_size": told["large_size"], **told}
    assumed: list[str] = []
    settle = settling(told, assumed)
    problems = contradictions(told, found)

    both = "the default of both sources"
    betas = tensors.get("betas")
    schedule = None if betas is None else schedule_of(betas)
    T = settle("diffusion_steps", 1000, both) if schedule is None else schedule.num_train_timesteps
    problems += _schedule_problems(told, schedule)
    if schedule is None and _of_compvis(config) is not config:
        problems.append("latent-diffusion's schedule is read from the betas beside the weights; there are none")
    rescale = told.get("rescale_timesteps", False)
    missing = untold(told, found)
    if T != 1000 and "rescale_timesteps" not in told:
        missing["rescale_timesteps=BOOLEAN"] = (
            f"whether the network is given t or 1000 t / {T}: --set rescale_timesteps=True (improved-diffusion's "
            "default) or False (guided-diffusion's)"
        )
    if found["in_channels"] == found["out_channels"] == 6 and "learn_sigma" not in told:
        missing["small_size=SIDE"] = (
            "whether 6 channels in and 6 out are an upsampler of 3 that learns its variance (SuperResModel, which is "
            "given a small image beside x_t: --set small_size=SIDE) or a network of 6-channel images (--set "
            "learn_sigma=False)"
        )
    asks = () if problems else asking(_asked(told, T, betas is not None, one_head=False), told, missing)
    if missing:
        unknown = "; nor ".join(missing.values())
        problems.append(f"the tensors do not tell {unknown}; --preset NAME says all of it for a published model")
    refuse(problems, asks)

    model = model_of(told, found, settle("norm_groups", 32, "fixed in both sources"))
    if told.get("num_head_channels") is None:
        settle("num_head_channels", -1, "guided-diffusion's default, and improved-diffusion's only way: by num_heads")
        settle("num_heads_upsample", -1, f"{both}: num_heads")
    one_head = all(count == 1 for count in head_counts(model))
    new_order = told.get("use_new_attention_order", False)
    if not one_head:  # with one, the orders are the same
        settle("use_new_attention_order", False, "the default of guided-diffusion, and improved-diffusion's only one")
    noise_schedule = schedule.name if schedule is not None else settle("noise_schedule", "linear", both)
    schedule = schedule or _schedule(noise_schedule, T)
    predict_xstart = settle("predict_xstart", False, both)
    learned = found["out_channels"] == 2 * found["in_channels"]
    small = not learned and settle("sigma_small", False, f"{both}; DDIM does not use it")
    with refusing("timestep_respacing"):
        spacing, num_steps = _spacing(told.get("timestep_respacing", ""), T)
        make_timesteps(spacing, T, num_steps)
    sampler = SamplerConfig(
        spacing=spacing,
        num_steps=num_steps,
        clip=told.get("clip_denoised", True),
        rederive_eps=True,
        prediction_type="sample" if predict_xstart else "epsilon",
        timestep_scale=1000 / T if rescale else 1.0,
        variance="learned_range" if learned else "fixed_small" if small else "fixed_large",
    )
    notes = notes_on(told)
    if latent := _samples_latents(config):  # its own DDIM: t + 1, to alpha_bar_0, nothing is clipped
        sampler = dataclasses.replace(
            sampler,
            spacing="leading",
            num_steps=min(50, T),
            steps_offset=1,
            set_alpha_to_one=False,
            clip=told.get("clip_denoised", False),
            rederive_eps=False,
            variance="fixed_small",
        )
        notes = (*notes, "steps as latent-diffusion's DDIM takes them, where S divides T; else it takes more than S")
    return Plan(
        model,
        schedule,
        sampler,
        rules(model, use_new_attention_order=new_order),
        {} if betas is None else {"betas": "no parameter; the noise schedule is taken from it"},
        tuple(assumed),
        (*notes, *not_read(sections(_of_compvis(config), SETTINGS)[1])),
        asks=asking(_asked(told, T, betas is not None, one_head=one_head), told),
        unchecked=unchecked(told, given, betas is not None),
        reference_options={"use_new_attention_order": new_order},
        wording=Wording(
            {"noise_schedule": noise_schedule, "diffusion_steps": str(T)},
            {
                "timestep_respacing": told.get("timestep_respacing", "") or '""',
                "clip_denoised": str(sampler.clip),
                "predict_xstart": str(predict_xstart),
                "learn_sigma": str(learned),
                **({} if learned else {"sigma_small": str(small)}),
                "rescale_timesteps": str(rescale),
            },
        ),
        latent=latent,
    )


def untold(told: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """What has to be told of the network and is not: KEY=WHAT -> a phrase on it."""
    missing = {}
    if "image_size" not in told:
        usual = next((side for side, mult in _MULTIPLIERS.items() if mult == found["channel_mult"]), None)
        hint = f", which is {usual} if channel_mult was left to the source" if usual else ""
        missing["image_size=SIDE"] = f"the image size{hint}: --set image_size={usual or 'SIDE'}"
    if told.get("num_head_channels") is None and "num_heads" not in told:
        missing["num_heads=N"] = (
            "how attention is split into heads: --set num_heads=4 (the source's default) or "
            "--set num_head_channels=64 (most published ones), which goes before num_heads unless it is -1"
        )
    return missing


def _asked(told: Mapping[str, Any], T: int, betas: bool, *, one_head: bool) -> list[str]:
    """Flags of the network and its training that no tensor tells. betas: these tell T and the schedule."""
    by_width = told.get("num_head_channels") is not None
    keys = [] if by_width else ["num_head_channels", "num_heads_upsample"]
    keys += [] if one_head else ["use_new_attention_order"]
    keys += [] if betas else ["diffusion_steps", "noise_schedule"]
    keys += [] if T == 1000 and (betas or "diffusion_steps" in told) else ["rescale_timesteps"]
    return [*keys, "predict_xstart"]


def unchecked(told: Mapping[str, Any], given: Mapping[str, str], betas: bool) -> tuple[str, ...]:
    """Flags among `given` that are facts of the network or its training and that no tensor tells. betas: these do."""
    idle = [key for key in ("num_head_channels", "num_heads_upsample") if told.get(key) is None]
    if "num_head_channels" in told and "num_head_channels" not in idle:
        idle += ["num_heads", "num_heads_upsample"]
    idle += ["diffusion_steps", "noise_schedule"] if betas else []
    return tuple(key for key in given if key in _UNTOLD and key not in idle)


def _with_condition(found: dict[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with x_t's channels apart from those of an upsampler's small image, as many again.

    The tensors tell an upsampler where half as many channels come out as go in; where as many do, small_size tells it.
    """
    channels_in, channels_out = found["in_channels"], found["out_channels"]
    half, odd = divmod(channels_in, 2)
    beside = half if not odd and (channels_out == half or ("small_size" in told and channels_out == 2 * half)) else 0
    return {**found, "in_channels": channels_in - beside, "condition_channels": beside}


def contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Flags that say otherwise than the tensors, each with both values."""
    channels_in, channels_out = found["in_channels"], found["out_channels"]
    facts = {
        **{key: found[key] for key in ("num_channels", "num_res_blocks", "use_scale_shift_norm")},
        "class_cond": found["num_classes"] is not None,
        "learn_sigma": channels_out == 2 * channels_in,
    }
    if len(found["widths"]) > 1:
        facts["resblock_updown"] = found["resample"] == "resnet"
    if told.get("channel_mult"):
        facts["channel_mult"] = found["channel_mult"]
    problems = [
        f"{key} is {_written(told[key])} by the flags, but {_written(fact)} by the tensors"
        for key, fact in facts.items()
        if key in told and told[key] != fact
    ]
    if channels_out not in (channels_in, 2 * channels_in):
        problems.append(
            f"the network has {channels_in} channels in and {channels_out} out; x_t needs as many out, or twice as "
            "many with learn_sigma"
        )
    if "large_size" in told and told["image_size"] != told["large_size"]:
        problems.append("large_size is an upsampler's name of image_size, but the two differ; give one")
    if "small_size" in told and not found["condition_channels"]:
        problems.append(
            f"small_size is of an upsampler, whose first layer takes twice its image's channels, but {channels_in} go "
            f"in and {channels_out} come out"
        )
    if "image_size" in told and "attention_resolutions" in told:
        side = told["image_size"][0]
        factors = {side // resolution for resolution in told["attention_resolutions"] if resolution}
        wanted = tuple(level for level in range(len(found["widths"])) if 2**level in factors)
        if wanted != found["attention_levels"]:
            sides = [side // 2**level for level in found["attention_levels"]]
            problems.append(
                f"attention_resolutions is {_written(told['attention_resolutions'])} at image size {side}, but the "
                f"tensors have attention at {_written(sides) or 'none'}"
            )
    return problems


def _written(value: Any) -> str:
    return ",".join(f"{part:g}" for part in value) if isinstance(value, (tuple, list)) else str(value)


def model_of(told: Mapping[str, Any], found: Mapping[str, Any], groups: int) -> UNetConfig:
    """The network of facts as `infer` has them, beside a condition's channels, and of what was told."""
    widths = found["widths"]
    fields = {
        "image_size": told["image_size"],
        "in_channels": found["in_channels"],
        "out_channels": found["out_channels"],
        "condition_channels": found["condition_channels"],
        "channels": found["num_channels"],
        "channel_mults": found["channel_mult"],
        "stem_channels": None if widths[0] == found["num_channels"] else widths[0],
        "num_res_blocks": found["num_res_blocks"],
        "attention_levels": found["attention_levels"],
        "num_heads": told.get("num_heads", 1) if told.get("num_head_channels") is None else 1,
        "num_heads_up": told.get("num_heads_upsample") if told.get("num_head_channels") is None else None,
        "head_channels": told.get("num_head_channels"),
        "downsample": (found["resample"],),
        "upsample": (found["resample"],),
        "scale_shift": found["use_scale_shift_norm"],
        "norm_groups": groups,
        "class_embedding": None if found["num_classes"] is None else "learned",
        "num_classes": found["num_classes"],
        **_FIXED,
    }
    with refusing("the tensors and flags make no valid UNet"):
        return UNetConfig(**fields)


_FIXED: dict[str, Any] = {
    "symmetric_padding": True,
    "norm_epsilon": 1e-5,
    "cosine_first": True,
    "frequency_shift": 0.0,
    "divide_last": True,
}
"""What both sources have, and Ho et al. otherwise."""


def head_counts(config: UNetConfig) -> list[int]:
    """Heads of every attention of the network."""
    attended = [(config.widths[level], up) for level in config.attention_levels for up in (False, True)]
    return [config.heads(width, up=up) for width, up in [*attended, (config.widths[-1], False)]]


def _schedule(name: str, T: int) -> ScheduleConfig:
    """Linear's ends are for T = 1000 and scale with its inverse, so that any T ends equally noisy."""
    scale = 1000 / T
    config = ScheduleConfig(name, T, *((scale * 1e-4, scale * 0.02) if name == "linear" else (None, None)))
    return checked(config)


def schedule_of(betas: np.ndarray) -> ScheduleConfig:
    """The schedule of betas that lie beside the weights, float32: one with a name if it has these, else themselves."""
    if betas.ndim != 1 or not betas.size or betas.dtype.kind != "f":
        raise ConversionError(f"the betas beside the weights are no list of T numbers, but {betas.dtype} {betas.shape}")
    T, start, end = len(betas), float(f"{betas[0]:.6g}"), float(f"{betas[-1]:.6g}")
    linear, scaled = (ScheduleConfig(name, T, start, end) for name in ("linear", "scaled_linear"))
    for config in (ScheduleConfig("cosine", T), linear, scaled):
        with contextlib.suppress(ValueError):  # ends that are none of this schedule's
            if np.allclose(noise_schedule(config).betas, betas, rtol=1e-5, atol=0):
                return config
    return checked(schedule_config_from_betas(betas.tolist()))


def _schedule_problems(told: Mapping[str, Any], schedule: ScheduleConfig | None) -> list[str]:
    """Flags that say otherwise than the betas beside the weights."""
    if schedule is None:
        return []
    T = schedule.num_train_timesteps
    name = told.get("noise_schedule")
    if told.get("diffusion_steps", T) != T:
        return [f"diffusion_steps is {told['diffusion_steps']} by the flags, but {T} by the betas in the file"]
    if name and not np.allclose(noise_schedule(_schedule(name, T)).betas, noise_schedule(schedule).betas):
        return [f"noise_schedule is {name} by the flags, but the betas in the file are others"]
    return []


def _spacing(respacing: str, T: int) -> tuple[str, int]:
    """Our spacing and S for the source's timestep_respacing; where it is empty, DDIM's, and the number is ours."""
    if respacing.startswith("ddim"):
        return respacing, int(respacing.removeprefix("ddim"))
    if "," in respacing:
        return respacing, sum(map(int, respacing.split(",")))
    return ("openai", int(respacing)) if respacing else ("openai_ddim", min(50, T))


def notes_on(told: Mapping[str, Any]) -> tuple[str, ...]:
    """What to know of flags that change nothing here."""
    notes = []
    if idle := [key for key in TRAINING_ONLY if key in told]:
        notes.append(f"{', '.join(idle)}: of training only, without effect on sampling")
    if told.get("use_fp16"):
        notes.append("use_fp16: the source computes most layers in float16; jddim in float32, unless sample --dtype")
    return tuple(notes)


# -- names ------------------------------------------------------------------------------------------------------------

_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "shortcut",
}


def rules(config: UNetConfig, *, use_new_attention_order: bool) -> Rules:
    """The rename table, spelled out: the sources number the blocks through all levels."""
    table: dict[str, Target] = {
        **encoder_rules(config, use_new_attention_order=use_new_attention_order),
        "out.0": "norm_out",
        "out.2": "conv_out",
    }
    each = config.num_res_blocks + 1
    last = len(config.widths) - 1
    for level, width in enumerate(config.widths):
        attended = config.has_attention(level, up=False)
        for i in range(each):
            source = f"output_blocks.{(last - level) * each + i}"
            table |= _block_rules(f"{source}.0", f"up.{level}.blocks.{i}")
            if attended:
                groups = 1 if use_new_attention_order else config.heads(width, up=True)
                table |= _attention_rules(f"{source}.1", f"up.{level}.attentions.{i}", groups)
        if level > 0:
            source, target = f"{source}.{1 + attended}", f"up.{level}.upsample"
            table |= _block_rules(source, target)
            table[f"{source}.conv"] = f"{target}.conv"
    return table


def encoder_rules(config: UNetConfig, *, use_new_attention_order: bool, at: str = "") -> dict[str, Target]:
    """The part of the table that is of the first half. at: what stands before its modules' names in the model."""
    table: dict[str, Target] = {
        "time_embed.0": f"{at}time_embed.linear_1",
        "time_embed.2": f"{at}time_embed.linear_2",
        "label_emb": f"{at}class_embed",
        "input_blocks.0.0": f"{at}conv_in",
    }

    def attention(source: str, target: str, width: int) -> None:
        groups = 1 if use_new_attention_order else config.heads(width)
        table.update(_attention_rules(source, f"{at}{target}", groups))

    each = config.num_res_blocks + 1
    for level, width in enumerate(config.widths):
        for i in range(each - 1):
            source = f"input_blocks.{1 + level * each + i}"
            table |= _block_rules(f"{source}.0", f"{at}down.{level}.blocks.{i}")
            if config.has_attention(level, up=False):
                attention(f"{source}.1", f"down.{level}.attentions.{i}", width)
        if level < len(config.widths) - 1:
            source, target = f"input_blocks.{(level + 1) * each}.0", f"{at}down.{level}.downsample"
            table |= _block_rules(source, target)  # one of the two is there, or neither, with pooling
            table[f"{source}.op"] = f"{target}.conv"
    table |= _block_rules("middle_block.0", f"{at}mid.block_1")
    attention("middle_block.1", "mid.attention", config.widths[-1])
    table |= _block_rules("middle_block.2", f"{at}mid.block_2")
    return table


def _block_rules(source: str, target: str) -> dict[str, Target]:
    return {f"{source}.{theirs}": f"{target}.{ours}" for theirs, ours in _BLOCK.items()}


def _attention_rules(source: str, target: str, groups: int) -> dict[str, Target]:
    return {
        f"{source}.norm": f"{target}.norm",
        f"{source}.qkv": Fused((f"{target}.q", f"{target}.k", f"{target}.v"), groups),
        f"{source}.proj_out": f"{target}.out",
    }


def reference(config: UNetConfig, *, use_new_attention_order: bool, flat: bool = True) -> Any:
    """The PyTorch reference of this config, whose parameters have the sources' names. flat: of its attention."""
    from ..reference.openai_unet import OpenAIUNet

    return OpenAIUNet(
        in_channels=config.input_channels,
        out_channels=config.out_channels,
        model_channels=config.channels,
        widths=config.widths,
        num_res_blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        heads=[config.heads(width) for width in config.widths],
        heads_up=[config.heads(width, up=True) for width in config.widths],
        resample=config.downsample[0],
        scale_shift=config.scale_shift,
        new_order=use_new_attention_order,
        flat=flat,
        num_classes=config.num_classes,
        groups=config.norm_groups,
        noise_levels=config.num_timesteps,
    )


# -- back -------------------------------------------------------------------------------------------------------------


def write_openai(metadata: Metadata, params: Tensors, path: Path) -> None:
    """A `.pt` state dict that the sources' UNetModel loads.

    The attention order is the one that the checkpoint came with; use_new_attention_order=True if it came from another
    family. A state dict does not say so, nor the heads, the schedule and the rest: they are flags in the source.
    """
    config = of_wiring(metadata.model, UNetConfig)
    refuse(wiring_problems(config) + _diffusion_problems(metadata))
    options = {"use_new_attention_order": True}
    if metadata.provenance.get("family") == FAMILY.name:
        options = dict(metadata.provenance["reference_options"])
    save_torch(torch_tensors(params, rules(config, **options), lambda: reference(config, **options)), path)


_VARIES = (
    *("image_size", "in_channels", "out_channels", "channels", "channel_mults", "stem_channels", "num_res_blocks"),
    *("attention_levels", "up_attention_levels", "num_heads", "num_heads_up", "head_channels", "downsample"),
    *("upsample", "scale_shift", "class_embedding", "num_classes", "time_channels", "mid_norm_groups"),
    "condition_channels",
    "divide_last",  # a matter of rounding
)


def wiring_problems(c: UNetConfig) -> list[str]:
    """Why this family's network cannot be a model."""
    problems = cannot_hold(c, _VARIES, _FIXED)
    if c.up_attention_levels not in (None, c.attention_levels):
        problems.append(f"attention is at levels {c.attention_levels} down and {c.up_attention_levels} up, there equal")
    if set(c.downsample) != set(c.upsample) or len(set(c.downsample)) != 1:
        problems.append(f"resampling is {c.downsample} and {c.upsample}, there one kind for all")
    if c.stem != c.widths[0]:
        problems.append(f"stem_channels is {c.stem_channels}, there the first level's width, {c.widths[0]}")
    if c.time_width != 4 * c.channels:
        problems.append(f"time_channels is {c.time_channels}, there 4 times channels, {4 * c.channels}")
    if c.mid_norm_groups not in (None, c.norm_groups):
        problems.append(f"mid_norm_groups is {c.mid_norm_groups}, there {c.norm_groups} as everywhere")
    if c.class_embedding not in (None, "learned"):
        problems.append(f"class_embedding is {c.class_embedding!r}, there None or 'learned'")
    if c.condition_channels not in (0, c.in_channels):
        problems.append(f"condition_channels is {c.condition_channels}, there 0, or in_channels, {c.in_channels}")
    if c.out_channels not in (c.in_channels, 2 * c.in_channels):
        problems.append(f"out_channels is {c.out_channels}, there {c.in_channels}, or twice that with learn_sigma")
    return problems


def _diffusion_problems(metadata: Metadata) -> list[str]:
    """Why the sources' diffusion cannot be a checkpoint's."""
    problems = []
    if metadata.schedule.name in CONTINUOUS:
        return [f"the schedule is {metadata.schedule.name}, of a continuous t, there linear or cosine"]
    T = metadata.schedule.num_train_timesteps
    betas = noise_schedule(metadata.schedule).betas
    # The sources' own formulas, ours, agree to the last digits of float64.
    if not any(np.allclose(betas, noise_schedule(_schedule(name, T)).betas, rtol=1e-9) for name in _schedules(T)):
        problems.append(f"the schedule is {metadata.schedule.name} (T = {T}), there linear from {0.1 / T:g} or cosine")
    if metadata.sampler.prediction_type not in ("epsilon", "sample"):
        problems.append(f"prediction_type is {metadata.sampler.prediction_type}, there epsilon or sample")
    if metadata.sampler.self_condition:
        problems.append("self_condition is True, there always False")
    if not any(np.isclose(metadata.sampler.timestep_scale, scale) for scale in (1, 1000 / T)):
        problems.append(f"timestep_scale is {metadata.sampler.timestep_scale}, there 1 or 1000 / T")
    return problems


def _schedules(T: int) -> tuple[str, ...]:
    """The sources' schedules that exist for T: linear's last beta is 20 / T."""
    return ("linear", "cosine") if T > 20 else ("cosine",)


# -- the published models ---------------------------------------------------------------------------------------------

# Each preset is the flags that the source's README gives for the file, over that source's defaults, so that nothing
# is left to assume.
_BOTH = {
    "num_heads_upsample": "-1",
    "dropout": "0.0",
    "use_kl": "False",
    "predict_xstart": "False",
    "use_checkpoint": "False",
    "timestep_respacing": "",
    "sigma_small": "False",
    "learn_sigma": "True",
}
_GUIDED = _BOTH | {
    "num_heads": "4",
    "num_channels": "256",
    "num_head_channels": "64",
    "num_res_blocks": "2",
    "channel_mult": "",
    "attention_resolutions": "32,16,8",
    "diffusion_steps": "1000",
    "noise_schedule": "linear",
    "class_cond": "True",
    "resblock_updown": "True",
    "use_scale_shift_norm": "True",
    "use_new_attention_order": "False",
    "use_fp16": "True",
    "rescale_timesteps": "False",
    "rescale_learned_sigmas": "False",
}
_IMPROVED = _BOTH | {
    "num_heads": "4",
    "num_head_channels": "-1",  # which it has not, as if it were this
    "num_channels": "128",
    "num_res_blocks": "3",
    "attention_resolutions": "16,8",
    "diffusion_steps": "4000",
    "noise_schedule": "cosine",
    "class_cond": "False",
    "use_scale_shift_norm": "True",
    "use_new_attention_order": "False",  # nor this: its one order is the other's default
    "rescale_timesteps": "True",
    "rescale_learned_sigmas": "True",
}
_UPSAMPLER = {"num_channels": "192", "num_head_channels": "-1"}
_PLAIN = {"rescale_timesteps": "False", "rescale_learned_sigmas": "False"}
PRESETS: dict[str, dict[str, str]] = {
    "guided-64": _GUIDED
    | {"image_size": "64", "num_channels": "192", "num_res_blocks": "3", "noise_schedule": "cosine", "dropout": "0.1"}
    | {"use_new_attention_order": "True"},
    "guided-128": _GUIDED | {"image_size": "128", "num_head_channels": "-1"},
    "guided-256": _GUIDED | {"image_size": "256"},
    "guided-256-uncond": _GUIDED | {"image_size": "256", "class_cond": "False"},
    "guided-512": _GUIDED | {"image_size": "512", "use_fp16": "False"},
    "guided-64-256-upsampler": _GUIDED | _UPSAMPLER | {"large_size": "256", "small_size": "64"},
    "guided-128-512-upsampler": _GUIDED
    | _UPSAMPLER
    | {"large_size": "512", "small_size": "128", "num_head_channels": "64", "attention_resolutions": "32,16"},
    "guided-lsun": _GUIDED | {"image_size": "256", "class_cond": "False", "dropout": "0.1"},
    "improved-cifar10": _IMPROVED | {"image_size": "32", "dropout": "0.3"},
    "improved-cifar10-vlb": _IMPROVED | {"image_size": "32", "dropout": "0.3", "use_kl": "True"},
    "improved-imagenet64-uncond": _IMPROVED | {"image_size": "64"},
    "improved-imagenet64-uncond-vlb": _IMPROVED | {"image_size": "64", "use_kl": "True"},
    "improved-imagenet64-cond": _IMPROVED | _PLAIN | {"image_size": "64", "num_channels": "192", "class_cond": "True"},
    "improved-lsun-bedroom": _IMPROVED
    | _PLAIN
    | {"image_size": "256", "num_res_blocks": "2", "num_heads": "1", "use_scale_shift_norm": "False"}
    | {"attention_resolutions": "16", "diffusion_steps": "1000", "noise_schedule": "linear"},
}


FAMILY = Family(
    name="openai",
    title="OpenAI (guided-diffusion, improved-diffusion)",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    pointwise={"qkv": 1, "proj_out": 1},
    buffers=frozenset({"betas"}),
    presets=PRESETS,
    formats={"openai": write_openai},
    locate=locate,
    placed=placed,
)
