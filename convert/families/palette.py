"""Palette: `N_Network.pth` and `N_Network_ema.pth` of Janspiry/Palette-Image-to-Image-Diffusion-Models.

The network is guided-diffusion's under the same names, given an image before x_t. What it embeds is no t but the noise
level, alpha_bar_t, so that it takes any schedule: the source trains by one and samples by another. Here each t of the
schedule to sample by has its noise level beside the weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.schedule import noise_schedule

from ..engine import ConversionError, refuse
from ..rules import Rules
from . import openai
from .base import Family, Plan, Source, Wording, check_sampler, checked
from .tensors import Tensors
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
    sections,
    settling,
    sides,
)


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names."""
    return {"input_blocks", "middle_block", "cond_embed"} <= {str(name).partition(".")[0] for name in state}


_NAMED = re.compile(r"(?P<step>0|[1-9]\d{0,11})_Network(?P<ema>_ema)?\.pth")


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """The newest file, an EMA's before a raw one; None if there is none."""
    return openai.newest(folder, _NAMED, weights) if variant is None else None


def placed(source: Source, file: Path, config: Mapping[str, Any] | None) -> Source:
    """The file's name says which weights they are; its number is an epoch's, not a step's."""
    named = _NAMED.fullmatch(file.name)
    if source.weights != "unstated" or named is None:
        return source
    return dataclasses.replace(source, weights="ema" if named["ema"] else "raw")


SETTINGS = {
    "image_size": "side of the training images in pixels, or HEIGHTxWIDTH",
    "in_channel": "channels of the condition and of x_t (checked against the tensors)",
    "out_channel": "channels of x_t (checked)",
    "inner_channel": "base width (checked)",
    "channel_mults": "list of width multipliers (checked)",
    "attn_res": "list of factors of downsampling with attention (checked)",
    "res_blocks": "residual blocks a level (checked)",
    "use_scale_shift_norm": "the noise level scales and shifts (checked)",
    "resblock_updown": "residual blocks resample (checked)",
    "num_heads": "heads of every attention",
    "num_head_channels": "width of every head, over num_heads; -1: by num_heads",
    "num_heads_upsample": "heads of the decoder's attention; -1: num_heads",
    "use_new_attention_order": "true: qkv's channels are [q, k, v][head], false: [head][q, k, v]",
    "norm_groups": "groups of every group norm; the source always uses 32",
    "schedule": "to sample by (beta_schedule.test): linear, quad or cosine",
    "n_timestep": "of that schedule, T",
    "linear_start": "of that schedule, the first beta",
    "linear_end": "of that schedule, the last beta",
}
# what tells the schedule -> how it is asked for
_SCHEDULE = {
    **{"schedule": "schedule=NAME", "n_timestep": "n_timestep=N"},
    **{"linear_start": "linear_start=BETA", "linear_end": "linear_end=BETA"},
}
_ENDS = ("linear_start", "linear_end")
_SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "cosine"}


def _count(value: Any) -> int | None:
    return None if value == -1 else integer(value)


_PARSERS = {
    "image_size": sides,
    **dict.fromkeys(("in_channel", "out_channel", "inner_channel", "res_blocks", "num_heads"), integer),
    **dict.fromkeys(("norm_groups", "n_timestep"), integer),
    **dict.fromkeys(("channel_mults", "attn_res"), integers),
    **dict.fromkeys(("use_scale_shift_norm", "resblock_updown", "use_new_attention_order"), boolean),
    **dict.fromkeys(("num_head_channels", "num_heads_upsample"), _count),
    "schedule": one_of(*_SCHEDULES),
    **dict.fromkeys(("linear_start", "linear_end"), number),
}


def _of_run(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A run's config as settings, of its network and of the schedule that it samples by. Any other as it is."""

    def at(found: Any, *keys: str) -> Mapping[str, Any]:
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
            found = found[0] if isinstance(found, list) and found else found
        return found if isinstance(found, Mapping) else {}

    network = at(config, "model", "which_networks", "args")
    return {**at(network, "unet"), **at(network, "beta_schedule", "test")} if network else config


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell, as `openai.infer` has it; in_channels: of x_t; condition_channels beside them.

    No classes: a label_emb is none of the source's.
    """
    found = openai.infer({re.sub(r"^cond_embed\.", "time_embed.", name): value for name, value in tensors.items()})
    both, x_t = found["in_channels"], found["out_channels"]
    return {**found, "in_channels": x_t, "condition_channels": both - x_t, "num_classes": None}


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the settings add, and what is assumed."""
    filed, unread, problems = sections(_of_run(config), SETTINGS)
    told, refused = parse({"config": filed, "--set": {name: literal(text) for name, text in given.items()}}, _PARSERS)
    refuse(problems + refused)
    found = infer(tensors)
    problems = _contradictions(told, found)
    own = _own_schedule(tensors)
    missing = {}
    if "image_size" not in told:
        missing["image_size=SIDE"] = "the image size: --set image_size=256 (most of the source's configs)"
    if "num_heads" not in told and told.get("num_head_channels") is None:
        missing["num_head_channels=N"] = (
            "how attention is split into heads: --set num_head_channels=32 (the source's configs)"
        )
    ends = () if told.get("schedule") == "cosine" else _ENDS
    used, instead = ("schedule", "n_timestep", *ends), ""
    if own is None or told.keys() & _SCHEDULE.keys():
        wanted = [name for name in used if name not in told]
        missing |= {_SCHEDULE[name]: f"{name} of the schedule to sample by" for name in wanted}
        if wanted and own is not None:
            instead = f", or leave {', '.join(_SCHEDULE)} out together: the file's gammas are a schedule too"
    asks = () if problems else missing
    if missing:
        untold = f"the tensors do not tell {'; nor '.join(missing.values())}"
        problems.append(f"{untold}; give the run's config.json by --config{instead}")
    refuse(problems, asks)

    assumed: list[str] = []
    settle = settling(told, assumed)
    model = openai.model_of(told, found, settle("norm_groups", 32, "fixed in the source"))
    new_order = told.get("use_new_attention_order", False)
    asked = []
    if any(count > 1 for count in openai.head_counts(model)):  # with one head, the orders are the same
        asked.append("use_new_attention_order")
        settle("use_new_attention_order", False, "the source's default")
    notes = [f"{end} is not used: the schedule is cosine" for end in _ENDS if end in told and end not in ends]
    if "schedule" in told:
        schedule = checked(
            ScheduleConfig(_SCHEDULES[told["schedule"]], told["n_timestep"], *(told[end] for end in ends))
        )
        if own is not None and not _same(own, schedule):
            notes.append(f"the file's gammas are another schedule's ({_said(own)}), such as the training's")
    else:
        assert own is not None
        schedule = own
        assumed.append(f"the schedule to sample by is that of the file's gammas ({_said(own)}: maybe the training's)")
    T = schedule.num_train_timesteps
    model = dataclasses.replace(model, condition_first=True, time_embedding="noise_level", num_timesteps=T)
    sampler = SamplerConfig(num_steps=T, eta=1.0, rederive_eps=True, clean_known=True)
    check_sampler(sampler, schedule)
    levels = noise_schedule(schedule).alphas_cumprod
    return Plan(
        model,
        schedule,
        sampler,
        rules(model, use_new_attention_order=new_order),
        dict.fromkeys(_BUFFERS & tensors.keys(), "no parameter; the noise schedule is taken from it"),
        tuple(assumed),
        (
            f"{model.condition_channels} channels in are an image's that the network is given beside x_t, before it",
            "the network is told the noise level in place of t: it is kept with the weights for each t of the schedule",
            "the source has the ancestral sampler alone, with all timesteps: that is DDIM's at eta 1, the default here",
            *notes,
            *not_read(unread),
        ),
        asks=asking(asked, told),
        unchecked=openai.unchecked(told, given, True),
        reference_options={"use_new_attention_order": new_order},
        wording=Wording({name: str(told[name]) for name in used if name in told} or {"gammas": _said(schedule)}),
        implied={"noise_level.weight": levels.astype(np.float32)[:, None]},
    )


def _contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Settings that say otherwise than the tensors, each with both values."""
    factors = [2**level for level in range(len(found["widths"]))]
    if "attn_res" in told:  # the source's own configs name 16 where the lowest level has 8
        told = {**told, "attn_res": tuple(factor for factor in factors if factor in told["attn_res"])}
    facts = {
        "in_channel": found["in_channels"] + found["condition_channels"],
        "out_channel": found["out_channels"],
        "inner_channel": found["num_channels"],
        "channel_mults": found["channel_mult"],
        "res_blocks": found["num_res_blocks"],
        "attn_res": tuple(factors[level] for level in found["attention_levels"]),
        "use_scale_shift_norm": found["use_scale_shift_norm"],
        **({"resblock_updown": found["resample"] == "resnet"} if len(factors) > 1 else {}),
    }
    problems = [
        f"{name} is {told[name]} by the settings, but {fact} by the tensors"
        for name, fact in facts.items()
        if name in told and told[name] != fact
    ]
    if found["condition_channels"] < 1:
        problems.append(
            f"the network has {facts['in_channel']} channels in and {facts['out_channel']} out; Palette's takes an "
            "image beside x_t, so more in than out"
        )
    return problems


_BUFFERS = frozenset({"sqrt_recipm1_gammas", "posterior_mean_coef1"})


def _own_schedule(tensors: Tensors) -> ScheduleConfig | None:
    """The schedule of the buffers that lie beside the weights: of the phase, train or test, in which they were saved.

    Of sqrt(1 / gamma - 1) and beta sqrt(gamma_prev) / (1 - gamma), which tell the betas to float32's last digits.
    """
    if not tensors.keys() >= _BUFFERS:
        return None
    ratio, factor = (np.asarray(tensors[name], np.float64) for name in ("sqrt_recipm1_gammas", "posterior_mean_coef1"))
    if ratio.ndim != 1 or ratio.shape != factor.shape:
        raise ConversionError(
            f"the buffers of the noise schedule are no lists of T numbers: {ratio.shape}, {factor.shape}"
        )
    with np.errstate(all="ignore"):  # what is no schedule is refused as such
        gammas = 1 / (1 + ratio**2)
        betas = factor * ratio**2 * gammas / np.sqrt(np.append(1, gammas[:-1]))
    return openai.schedule_of(betas)


def _same(a: ScheduleConfig, b: ScheduleConfig) -> bool:
    ours, theirs = (noise_schedule(config).betas for config in (a, b))
    return len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-5, atol=0)


def _said(schedule: ScheduleConfig) -> str:
    betas = noise_schedule(schedule).betas
    return f"T = {len(betas)}, beta {betas[0]:.4g} to {betas[-1]:.4g}"


def rules(config: UNetConfig, *, use_new_attention_order: bool) -> Rules:
    """guided-diffusion's rename table, but for what embeds the noise level."""
    table = openai.rules(config, use_new_attention_order=use_new_attention_order)
    return {re.sub(r"^time_embed\.", "cond_embed.", name): target for name, target in table.items()} | {
        "noise_level": "time_proj"
    }


reference = openai.reference
"""The PyTorch reference of a config: guided-diffusion's, whose table of noise levels is the plan's."""


def _published(size: int) -> dict[str, str]:
    """What the source's config of the published files says and no tensor tells."""
    schedule = {"schedule": "linear", "n_timestep": "1000", "linear_start": "1e-4", "linear_end": "0.09"}
    return {"image_size": str(size), "num_head_channels": "32", "use_new_attention_order": "false", **schedule}


FAMILY = Family(
    name="palette",
    title="Palette (Janspiry)",
    recognise=recognise,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    buffers=_BUFFERS,
    pointwise=openai.FAMILY.pointwise,
    presets={
        **dict.fromkeys(("inpainting_celebahq", "inpainting_places2", "uncropping_places2"), _published(256)),
        "colorization_mirflickr25k": _published(224),
    },
    locate=locate,
    config_files=lambda weights: [weights.parent / "config.json", weights.parent.parent / "config.json"],
    placed=placed,
)
