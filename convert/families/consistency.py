"""openai/consistency_models' `.pt` files: EDM's networks, and consistency models distilled from them or trained alone.

guided-diffusion's UNet under its names, whose attention is by 2-D convolutions. Around it is EDM's preconditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jddim.checkpoint.metadata import Metadata
from jddim.config import EDM, SamplerConfig, ScheduleConfig, UNetConfig

from ..engine import refuse
from ..rules import Rules
from ..writers import save_torch, torch_tensors
from . import openai
from .base import Family, Plan, Source, Wording, check_sampler, checked, of_wiring
from .tensors import Tensors
from .values import asking, not_read, one_of, positive, sections, settling

SIGMA_DATA = 0.5
"""Fixed in the source."""
TIME_SCALE = 250.0
"""Of log sigma: the network is told 1000 times its quarter."""


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with guided-diffusion's names, in which most projections of attention are 2-D convolutions."""
    sides = [getattr(value, "ndim", 0) for name, value in state.items() if str(name).endswith(".qkv.weight")]
    return openai.recognise(state) and 2 * sides.count(4) > len(sides)


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors."""
    return openai.open_source(state, file_name)


_NETWORK = (
    *("image_size", "num_channels", "num_res_blocks", "channel_mult", "num_heads", "num_head_channels"),
    *("num_heads_upsample", "attention_resolutions", "use_scale_shift_norm", "resblock_updown", "class_cond"),
    *("clip_denoised", "use_fp16", "dropout", "use_checkpoint", "norm_groups"),
)
_MODES = ("edm", "consistency_distillation", "consistency_training")
SETTINGS = {
    **{key: openai.SETTINGS[key] for key in _NETWORK},
    "training_mode": f"what it was trained by: {', '.join(_MODES)}; the last two are sampled alike",
    "sigma_min": "the least noise, 0.002 in the source; there a consistency model returns x_t itself",
    "sigma_max": "the most noise, 80 in the source",
    "use_new_attention_order": "no effect in this source, whose channels are always [q, k, v][head]",
    "learn_sigma": "False; a network that predicts its variance too does not run in this source",
    "weight_schedule": "of training; no effect on sampling",
}


def _never(text: str) -> bool:
    if text.lower() not in ("no", "false", "f", "n", "0"):
        raise ValueError("False")
    return False


_OWN: dict[str, Callable[[str], Any]] = {
    "training_mode": one_of(*_MODES),
    **dict.fromkeys(("sigma_min", "sigma_max"), positive),
    "learn_sigma": _never,
    "weight_schedule": str,
}


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the flags add, and what is assumed."""
    told = openai.read_settings(config, given, SETTINGS, _OWN)
    found = {**openai.infer(tensors), "condition_channels": 0}
    problems = openai.contradictions(told, found)
    if found["out_channels"] == 2 * found["in_channels"]:
        problems.append("twice as many channels come out as go in, for a variance; this source's networks have none")
    missing = openai.untold(told, found)
    if "training_mode" not in told:
        missing["training_mode=MODE"] = (
            f"what the network was trained by: --set training_mode={_MODES[0]} (edm_ files), {_MODES[1]} (cd_) or "
            f"{_MODES[2]} (ct_)"
        )
    by_width = told.get("num_head_channels") is not None
    asked = [] if by_width else ["num_head_channels", "num_heads_upsample"]
    asked += ["sigma_min", "sigma_max"]
    asks = () if problems else asking(asked, told, missing)
    if missing:
        untold = "; nor ".join(missing.values())
        problems.append(f"the tensors do not tell {untold}; --preset NAME says all of it for a published model")
    refuse(problems, asks)

    assumed: list[str] = []
    settle = settling(told, assumed)
    model = openai.model_of(told, found, settle("norm_groups", 32, "fixed in the source"))
    if not by_width:
        settle("num_head_channels", -1, "the source's default: by num_heads")
        settle("num_heads_upsample", -1, "the source's default: num_heads")
    ends = {key: settle(key, own, "the source's default") for key, own in (("sigma_min", 0.002), ("sigma_max", 80.0))}
    schedule = checked(ScheduleConfig("edm", t_min=ends["sigma_min"], t_max=ends["sigma_max"]))
    consistent = told["training_mode"] != _MODES[0]
    sampler = SamplerConfig(
        spacing="karras",
        num_steps=1 if consistent else 40,
        clip=told.get("clip_denoised", True),
        rederive_eps=True,
        prediction_type=EDM,
        timestep_scale=TIME_SCALE,
        sigma_data=SIGMA_DATA,
        boundary=consistent,
    )
    check_sampler(sampler, schedule)
    idle = [key for key in ("use_new_attention_order", "weight_schedule") if key in told]
    notes = [f"{', '.join(idle)}: without effect on this source's sampling"] if idle else []
    if consistent:
        notes.append("one step by default; several are --method consistency, at t of your own (--spacing 80,0.66)")
    notes.append("the source's attention computes in float16, its other layers in float16 with use_fp16")
    return Plan(
        model,
        schedule,
        sampler,
        rules(model),
        {},
        tuple(assumed),
        (*openai.notes_on(told), *notes, *not_read(sections(config, SETTINGS)[1])),
        asks=asking(asked, told),
        unchecked=tuple(key for key in given if key in (*openai.unchecked(told, given, True), "training_mode", *ends)),
        wording=Wording(
            {key: f"{value:g}" for key, value in ends.items()},
            {"training_mode": told["training_mode"], "clip_denoised": str(sampler.clip)},
        ),
    )


def rules(config: UNetConfig) -> Rules:
    """guided-diffusion's rename table, of its new attention order."""
    return openai.rules(config, use_new_attention_order=True)


def reference(config: UNetConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have the source's names."""
    return openai.reference(config, use_new_attention_order=True, flat=False)


def write(metadata: Metadata, params: Tensors, path: Path) -> None:
    """A `.pt` state dict that the source's UNetModel loads. It tells neither heads nor the rest: they are flags."""
    config = of_wiring(metadata.model, UNetConfig)
    sampler = metadata.sampler
    there = {"prediction_type": EDM, "timestep_scale": TIME_SCALE, "sigma_data": SIGMA_DATA}
    problems = openai.wiring_problems(config)
    problems += [f"the schedule is {metadata.schedule.name}, there edm"] if metadata.schedule.name != EDM else []
    problems += [
        f"{name} is {getattr(sampler, name)!r}, there {own!r}"
        for name, own in there.items()
        if getattr(sampler, name) != own
    ]
    problems += [
        f"{name} is {getattr(config, name)}, there {own}"
        for name, own in (("condition_channels", 0), ("out_channels", config.in_channels))
        if getattr(config, name) != own
    ]
    refuse(problems)
    save_torch(torch_tensors(params, rules(config), lambda: reference(config)), path)


# The flags of the source's scripts/launch.sh for its published files, over its defaults.
_PUBLISHED = {
    "num_heads": "4",
    "num_heads_upsample": "-1",
    "num_head_channels": "64",
    "attention_resolutions": "32,16,8",
    "channel_mult": "",
    "resblock_updown": "True",
    "sigma_min": "0.002",
    "sigma_max": "80",
}
_FILES = {
    "imagenet64": {"image_size": "64", "num_channels": "192", "num_res_blocks": "3"}
    | {"class_cond": "True", "use_scale_shift_norm": "True"},
    "lsun256": {"image_size": "256", "num_channels": "256", "num_res_blocks": "2"}
    | {"class_cond": "False", "use_scale_shift_norm": "False"},
}
PRESETS = {
    f"{prefix}_{data}": {**_PUBLISHED, **flags, "training_mode": mode}
    for prefix, mode in zip(("edm", "cd", "ct"), _MODES, strict=True)
    for data, flags in _FILES.items()
}


FAMILY = Family(
    name="consistency",
    title="OpenAI's consistency models, and their EDM networks",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    pointwise={"qkv": 2, "proj_out": 2},
    presets=PRESETS,
    formats={"consistency": write},
    placed=openai.placed,
)
