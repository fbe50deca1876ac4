"""The Ho et al. family: ermongroup/ddim's `ckpt.pth` and pesser/pytorch_diffusion's bare state dicts.

ermongroup's runner saves a list [model, optimizer, epoch, step, EMA shadow] beside a `config.yml`; the model's names
carry DataParallel's `module.`, the shadow's do not. pesser's `.ckpt` is the state dict alone, and its EMA weights
are a file of their own, named `ema_...`. Both name and wire the network alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jddim.checkpoint.metadata import Metadata
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig, levels_at_resolutions
from jddim.models.building import abstract_model, flat_params
from jddim.schedule import CONTINUOUS, LARGEST_T, noise_schedule, schedule_config_from_betas

from ..engine import ConversionError, cannot_hold, refuse, refusing
from ..rules import Rules, from_layout, source_of
from ..writers import save_torch, torch_tensors
from .base import Family, Plan, Source, Wording, check_sampler, checked, of_wiring, scaled_t
from .tensors import Tensors, common_size
from .values import (
    asking,
    boolean,
    integer,
    integers,
    literal,
    not_read,
    number,
    parse,
    positive,
    sections,
    settling,
    sides,
)

# -- the file ---------------------------------------------------------------------------------------------------------


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names, some of time among them: autoencoders have the others."""
    names = [
        name for name in map(str, state) if re.match(r"(temb\.dense|(down|up)\.\d+\.block|mid\.(block|attn)_)", name)
    ]
    return len(names) >= 4 and any("temb" in name for name in names)


def placed(source: Source, file: Path, config: Mapping[str, Any] | None) -> Source:
    """That weights are the EMA's stands in the name of pesser's file or folder: `ema_diffusion_x/model-790000.ckpt`."""
    if source.weights != "unstated":
        return source
    named = re.fullmatch(r"model-(\d{1,12})\.ckpt", file.name)
    average = file.name.startswith("ema_") or (named is not None and file.absolute().parent.name.startswith("ema_"))
    return dataclasses.replace(
        source,
        weights="ema" if average else source.weights,
        step=source.step if named is None else int(named[1]),
    )


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """A run's `ckpt.pth`, which holds raw and EMA weights both; there are no variants."""
    return file if variant is None and (file := folder / "ckpt.pth").is_file() else None


# -- what the tensors tell --------------------------------------------------------------------------------------------


def infer(tensors: Tensors, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every architectural fact that shapes and names hold, under ermongroup's config names.

    told: what the config says, which decides only where the tensors are of two minds about in_channels or out_ch.

    Facts are taken from several tensors each, by majority, so that one missing, misshapen or stray tensor is
    reported as such and not as a different network. None stands for a fact that no tensor tells.
    """

    def parts(pattern: str, tensors_each: int) -> dict[int, int]:
        """Level -> blocks or attentions there; one counts if at least half of its tensors are there."""
        found = Counter(tuple(map(int, m.groups())) for name in tensors if (m := re.match(pattern, name)))
        return Counter(level for (level, _), number in found.items() if 2 * number >= tensors_each)

    down, up = parts(r"down\.(\d+)\.block\.(\d+)\.", 10), parts(r"up\.(\d+)\.block\.(\d+)\.", 10)
    levels = sorted(set(down) | set(up))
    blocks = Counter(down.values()) + Counter(number - 1 for number in up.values())
    ch = common_size(
        tensors,
        r"temb\.dense\.[01]\.bias|mid\.block_[12]\.temb_proj\.weight|down\.\d+\.block\.\d+\.temb_proj\.weight",
        -1,
        4,
    )
    widths = [
        common_size(tensors, rf"(down|up)\.{level}\.block\.\d+\.(conv1|conv2|temb_proj)\.bias", 0) for level in levels
    ]
    if not ch or not levels or levels != list(range(len(levels))) or None in widths:
        raise ConversionError("too few tensors of the UNet are there to tell its shape; is the file whole?")
    odd = [width for width in widths if width % ch]  # type: ignore[operator]
    if odd:
        raise ConversionError(f"the levels' widths {widths} are not multiples of the time embedding's ch = {ch}")
    resamplings = sum(bool(re.match(r"(down|up)\.\d+\.(down|up)sample\.conv\.", name)) for name in tensors)
    shortcuts = Counter(kind for name in tensors for kind in ("conv_shortcut", "nin_shortcut") if f".{kind}." in name)
    return {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),  # type: ignore[operator]
        "num_res_blocks": blocks.most_common(1)[0][0],
        **_ends(tensors, told or {}),
        "attn_levels": tuple(
            sorted(set(parts(r"down\.(\d+)\.attn\.(\d+)\.", 10)) | set(parts(r"up\.(\d+)\.attn\.(\d+)\.", 10)))
        ),
        # A down- and an upsampling between two levels, a weight and a bias each. One level has none, so none can tell.
        "resamp_with_conv": None if len(levels) == 1 else resamplings >= 2 * (len(levels) - 1),
        "conv_shortcut": shortcuts["conv_shortcut"] > shortcuts["nin_shortcut"],
    }


def _ends(tensors: Tensors, told: Mapping[str, Any]) -> dict[str, int | None]:
    """in_channels and out_ch: what the config says, if a tensor agrees; else the majority of both ends' tensors.

    Both ends vote together because DDIM needs them equal; a network whose ends differ has to be told so.
    """
    sizes: dict[str, list[int]] = {"in_channels": [], "out_ch": []}
    for name, axis, key in (
        ("conv_out.weight", 0, "out_ch"),
        ("conv_out.bias", 0, "out_ch"),
        ("conv_in.weight", 1, "in_channels"),
    ):
        if name in tensors and tensors[name].ndim > axis:
            sizes[key].append(tensors[name].shape[axis])
    every = Counter(sizes["out_ch"] + sizes["in_channels"])
    common = every.most_common(1)[0][0] if every else None
    return {key: told[key] if told.get(key) in of_key else common for key, of_key in sizes.items()}


# -- what only the config or the user can tell ------------------------------------------------------------------------

SETTINGS = {
    "image_size": "side of the training images in pixels, or HEIGHTxWIDTH",
    "attn_resolutions": "list of resolutions with attention (checked against the tensors)",
    "ch": "base width (checked against the tensors)",
    "ch_mult": "list of width multipliers (checked against the tensors)",
    "num_res_blocks": "residual blocks per level (checked against the tensors)",
    "in_channels": "channels of x_t (checked against the tensors)",
    "out_ch": "channels of the output (checked against the tensors)",
    "resamp_with_conv": "convolutions in down- and upsampling (checked against the tensors)",
    "norm_groups": "groups of every group norm; the sources always use 32",
    "norm_eps": "epsilon of every group norm; the sources always use 1e-6",
    "beta_schedule": "linear, quad, const, sigmoid, or a name of jddim.schedule",
    "beta_start": "first beta",
    "beta_end": "last beta",
    "num_diffusion_timesteps": "T",
    "var_type": "fixedsmall or fixedlarge, the ancestral sampler's variance",
    "rescaled": "true: the model works on images in [-1, 1]",
    "spacing": "default timetable of the sampler: uniform, quad, linspace",
    "num_steps": "default number of steps",
    "eta": "default eta",
    "clip": "default for clamping x0 to [-1, 1]",
}


_ASKED = ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps", "rescaled")
_UNTOLD = ("image_size", "norm_groups", "norm_eps", *_ASKED)
"""The facts of the network and its training that no tensor tells; norms are alike in both sources."""


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "image_size": sides,
    **dict.fromkeys(("ch", "num_res_blocks", "in_channels", "out_ch", "norm_groups"), integer),
    **dict.fromkeys(("num_diffusion_timesteps", "num_steps"), integer),
    **dict.fromkeys(("beta_start", "beta_end", "eta"), number),
    "norm_eps": positive,
    **dict.fromkeys(("resamp_with_conv", "rescaled", "clip"), boolean),
    **dict.fromkeys(("attn_resolutions", "ch_mult"), integers),
    **dict.fromkeys(("beta_schedule", "var_type", "spacing"), str),
}


def read_settings(config: Mapping[str, Any] | None, given: Mapping[str, str]) -> dict[str, Any]:
    """The config file's and --set's values, parsed; --set wins. Raises ConversionError for unknown or bad ones.

    The config file's other entries (training, optimizer) do not concern sampling.
    """
    told, _, problems = sections(config, SETTINGS)
    for section in ("data", "model", "diffusion"):
        if not isinstance(entries := (config or {}).get(section, {}), Mapping):
            problems.append(f"config: section {section!r} must hold key: value lines, it holds {entries!r}")
    parsed, refused = parse({"config": told, "--set": {k: literal(v) for k, v in given.items()}}, _PARSERS)
    refuse(problems + refused)
    return parsed


_LINEAR = {"beta_schedule": "linear", "beta_start": "0.0001", "beta_end": "0.02", "num_diffusion_timesteps": "1000"}
_LINEAR |= {"rescaled": "true"}
_CIFAR10 = {"image_size": "32", "ch": "128", "ch_mult": "1,2,2,2", "num_res_blocks": "2", "attn_resolutions": "16"}
_256 = {"image_size": "256", "ch": "128", "ch_mult": "1,1,2,2,4,4", "num_res_blocks": "2", "attn_resolutions": "16"}
# The published checkpoints by pesser's names, and Ho et al.'s CelebA-HQ, whose variance their script does not say.
PRESETS: dict[str, dict[str, str]] = {
    "cifar10": {**_CIFAR10, **_LINEAR, "var_type": "fixedlarge"},
    **{name: {**_256, **_LINEAR, "var_type": "fixedsmall"} for name in ("lsun_bedroom", "lsun_cat", "lsun_church")},
    "celebahq": {**_256, **_LINEAR},
}


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what config and --set add, and what is assumed."""
    told = read_settings(config, given)
    inferred = infer(tensors, told)
    assumed: list[str] = []
    settle = settling(told, assumed)
    problems: list[str] = []

    def origin(key: str) -> str:
        return "--set" if key in given else "the config"

    image_size = told.get("image_size")
    levels = len(inferred["ch_mult"])
    if inferred["resamp_with_conv"] is None:
        inferred["resamp_with_conv"] = told.get("resamp_with_conv", True)  # of no effect: there is one level
    for key in ("ch", "ch_mult", "num_res_blocks", "in_channels", "out_ch", "resamp_with_conv"):
        if inferred[key] is None:
            inferred[key] = told.get(key)
            if inferred[key] is None:
                problems.append(f"the tensors that tell {key} are missing; --set {key}=... lets the rest be checked")
        elif key in told and told[key] != inferred[key]:
            problems.append(f"{key} is {told[key]} in {origin(key)}, but {inferred[key]} in the tensors")
    if image_size is not None and "attn_resolutions" in told:
        at = levels_at_resolutions(image_size[0], levels, told["attn_resolutions"])
        if at != inferred["attn_levels"]:
            sides = [image_size[0] // 2**level for level in inferred["attn_levels"]]
            problems.append(
                f"attn_resolutions is {list(told['attn_resolutions'])} at image size {image_size[0]} in "
                f"{origin('attn_resolutions')}, but the tensors have attention at {sides}"
            )
    if not settle("rescaled", True, "all published checkpoints"):
        problems.append(
            "the config says rescaled: false, a model of images in [0, 1]; jddim's images are [-1, 1], so its samples "
            "would be wrong by a shift (--set rescaled=true if the config is mistaken)"
        )
    source = "all checkpoints of this family"
    groups = settle("norm_groups", 32, source)
    missing = {}
    if image_size is None:
        missing["image_size=SIDE"] = (
            "the tensors do not tell the image size; give the source's config.yml by --config, or --set image_size=32"
        )
    widths = {inferred["ch"] * mult for mult in inferred["ch_mult"]}
    if "norm_groups" not in told and (odd := sorted(width for width in widths if width % groups)):
        missing["norm_groups=N"] = (
            f"the sources' group norms have 32 groups, which do not divide the widths {odd}; --set norm_groups=N, if "
            "the network was trained with N"
        )
    refuse([*problems, *missing.values()], () if problems else asking(_ASKED, told, missing))
    assert image_size is not None

    model_fields = {
        "image_size": image_size,
        "in_channels": inferred["in_channels"],
        "out_channels": inferred["out_ch"],
        "channels": inferred["ch"],
        "channel_mults": inferred["ch_mult"],
        "num_res_blocks": inferred["num_res_blocks"],
        "attention_levels": inferred["attn_levels"],
        "downsample": ("conv" if inferred["resamp_with_conv"] else "pool",),
        "upsample": ("conv" if inferred["resamp_with_conv"] else "pool",),
        "conv_shortcut": inferred["conv_shortcut"],
        "norm_groups": groups,
        "norm_epsilon": settle("norm_eps", 1e-6, source),
    }
    with refusing("the tensors and settings make no valid UNet"):
        model = UNetConfig(**model_fields)

    T = settle("num_diffusion_timesteps", 1000, "Ho et al.")
    betas = {
        "beta_schedule": settle("beta_schedule", "linear", "Ho et al."),
        "beta_start": settle("beta_start", 1e-4, "Ho et al."),
        "beta_end": settle("beta_end", 0.02, "Ho et al."),
    }
    schedule = _schedule(betas["beta_schedule"], T, betas["beta_start"], betas["beta_end"])
    logvar = tensors.get("logvar")
    if logvar is not None and logvar.shape != (T,):
        raise ConversionError(f"num_diffusion_timesteps is {T}, but the tensor logvar has shape {logvar.shape}")
    var_type = settle("var_type", "fixedlarge", "ermongroup; DDIM does not use it")
    if var_type not in ("fixedsmall", "fixedlarge"):
        raise ConversionError(f"var_type must be fixedsmall or fixedlarge, got {var_type!r}")
    sampler = _sampler(told, T, "fixed_small" if var_type == "fixedsmall" else "fixed_large")
    check_sampler(sampler, schedule)
    ignored = {"logvar": "the 'bayesian' model type's learned per-timestep variance; DDIM does not use it"}
    return Plan(
        model,
        schedule,
        sampler,
        rules(model),
        {k: v for k, v in ignored.items() if k in tensors},
        tuple(assumed),
        tuple(not_read(sections(config, SETTINGS)[1])),
        asks=asking(_ASKED, told),
        unchecked=tuple(key for key in given if key in _UNTOLD),
        wording=_wording({**betas, "num_diffusion_timesteps": T}, sampler, var_type),
    )


def _wording(schedule: Mapping[str, Any], sampler: SamplerConfig, var_type: str) -> Wording:
    """By config.yml's keys and the flags of ermongroup's main.py, which has no other spacings and never clips."""
    skip_type = {"skip_type": sampler.spacing} if sampler.spacing in ("uniform", "quad") else {}
    return Wording(
        {key: str(value) for key, value in schedule.items()},
        {**skip_type, "timesteps": str(sampler.num_steps), "eta": str(sampler.eta), "var_type": var_type},
        {"skip_type": "spacing", "timesteps": "num_steps"},
    )


def _sampler(told: Mapping[str, Any], T: int, variance: str) -> SamplerConfig:
    """Ermongroup's sampling (its column in docs/conventions.md): no clipping, eps as predicted."""
    return SamplerConfig(
        spacing=told.get("spacing", "uniform"),
        num_steps=told.get("num_steps", min(50, T)),
        eta=told.get("eta", 0.0),
        clip=told.get("clip", False),
        variance=variance,
    )


def _schedule(name: str, T: int, beta_start: float, beta_end: float) -> ScheduleConfig:
    """The schedule under the sources' names for it ("quad" is our scaled_linear), checked by building it."""
    with refusing("the noise schedule cannot be built"):
        if name == "const":
            if not 1 <= T <= LARGEST_T:  # before there is a list of so many
                raise ValueError(f"num_diffusion_timesteps must lie in 1..{LARGEST_T}, got {T}")
            return schedule_config_from_betas([beta_end] * T)
        if name == "jsd":
            raise ValueError(
                "beta_schedule jsd ends in beta = 1, where alpha_bar is 0 and x_0 cannot be had from a predicted eps"
            )
    known = {"quad": "scaled_linear"}.get(name, name)
    return checked(ScheduleConfig(known, T, *((None, None) if known == "cosine" else (beta_start, beta_end))))


# -- names ------------------------------------------------------------------------------------------------------------

_BLOCK = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_proj", "norm2": "norm2", "conv2": "conv2"}
_ATTENTION = {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}
_PLACES: Iterable[tuple[str, str, str]] = (
    ("block", "down.{i}.block.{j}", "down.{i}.blocks.{j}"),
    ("block", "mid.block_1", "mid.block_1"),
    ("block", "mid.block_2", "mid.block_2"),
    ("block", "up.{i}.block.{j}", "up.{i}.blocks.{j}"),
    ("attention", "down.{i}.attn.{j}", "down.{i}.attentions.{j}"),
    ("attention", "mid.attn_1", "mid.attention"),
    ("attention", "up.{i}.attn.{j}", "up.{i}.attentions.{j}"),
)


def source_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """The source's tensors, name -> shape, without building its network: for files that tests make up."""
    shapes = {}
    for leaf, abstract in flat_params(abstract_model(config)).items():
        name = source_of(leaf, rules(config))
        shape = from_layout(np.broadcast_to(np.float32(0), abstract.shape), leaf).shape
        one_by_one = len(shape) == 2 and (".attn" in name or "nin_shortcut" in name)  # convolutions there
        shapes[name] = (*shape, 1, 1) if one_by_one else shape
    return shapes


def rules(config: UNetConfig) -> Rules:
    """The rename table. The shortcut's source name depends on its kernel: nin_shortcut 1x1, conv_shortcut 3x3."""
    shortcut = {"conv_shortcut" if config.conv_shortcut else "nin_shortcut": "shortcut"}
    parts = {"block": _BLOCK | shortcut, "attention": _ATTENTION}
    return {
        "temb.dense.0": "time_embed.linear_1",
        "temb.dense.1": "time_embed.linear_2",
        "conv_in": "conv_in",
        "down.{i}.downsample.conv": "down.{i}.downsample.conv",
        "up.{i}.upsample.conv": "up.{i}.upsample.conv",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
        **{f"{a}.{x}": f"{b}.{y}" for kind, a, b in _PLACES for x, y in parts[kind].items()},
    }


def reference(config: UNetConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have the sources' names."""
    from ..reference.unet import ReferenceUNet

    return ReferenceUNet(
        ch=config.channels,
        ch_mult=[int(mult) for mult in config.channel_mults],
        num_res_blocks=config.num_res_blocks,
        attn_levels=config.attention_levels,
        in_channels=config.in_channels,
        out_ch=config.out_channels,
        resamp_with_conv=config.downsample == ("conv",),
        conv_shortcut=config.conv_shortcut,
        norm_groups=config.norm_groups,
        norm_eps=config.norm_epsilon,
    )


# -- back -------------------------------------------------------------------------------------------------------------


def write_ermongroup(metadata: Metadata, params: Tensors, path: Path) -> None:
    """A folder with `ckpt.pth` and `config.yml`, as ermongroup's runner saves and loads them.

    Raw and EMA weights in it are equal: a jddim checkpoint holds one set. The optimizer's state is empty.
    """
    network = of_wiring(metadata.model, UNetConfig)
    refuse(_wiring_problems(network) + _config_problems(metadata))
    config = _config_yml(network, metadata.schedule, metadata.sampler)
    state = torch_tensors(params, rules(network), lambda: reference(network))
    step = metadata.provenance.get("step") or 0
    path.mkdir()
    save_torch([{f"module.{name}": value for name, value in state.items()}, {}, 0, step, state], path / "ckpt.pth")
    (path / "config.yml").write_text(yaml.safe_dump(config))


def write_pesser(metadata: Metadata, params: Tensors, path: Path) -> None:
    """One file, the bare state dict that pesser's models load."""
    network = of_wiring(metadata.model, UNetConfig)
    refuse(_wiring_problems(network))
    save_torch(torch_tensors(params, rules(network), lambda: reference(network)), path)


def _wiring_problems(c: UNetConfig) -> list[str]:
    """Why this family's network cannot be a model."""
    problems = cannot_hold(c, _VARIES, {"up_attention_levels": c.up_attention_levels})
    if c.up_attention_levels not in (None, c.attention_levels):
        problems.append(f"attention is at levels {c.attention_levels} down and {c.up_attention_levels} up, there equal")
    if (c.downsample, c.upsample) not in ((("conv",), ("conv",)), (("pool",), ("pool",))):
        problems.append(f"resampling is {c.downsample} and {c.upsample}, there both conv or both pool")
    if any(mult != int(mult) for mult in c.channel_mults):
        problems.append(f"channel_mults is {c.channel_mults}, there integers")
    return problems


_VARIES = (
    *("image_size", "in_channels", "out_channels", "channels", "channel_mults", "num_res_blocks", "attention_levels"),
    *("downsample", "upsample", "conv_shortcut", "norm_groups", "norm_epsilon"),
    "divide_last",  # a matter of rounding
)


_SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "sigmoid": "sigmoid"}


def _config_problems(metadata: Metadata) -> list[str]:
    """Why ermongroup's config file and runner cannot say what the checkpoint says."""
    problems = []
    height, width = metadata.model.image_size
    if height != width:
        problems.append(f"image size is {height}x{width}, there square")
    if _source_schedule(metadata.schedule) is None:
        problems.append(f"the schedule is {metadata.schedule.name}, there linear, quad, const or sigmoid")
    sampler = metadata.sampler
    if sampler.prediction_type != "epsilon":
        problems.append(f"prediction_type is {sampler.prediction_type}, there epsilon")
    problems += scaled_t(sampler)
    if sampler.variance not in ("fixed_small", "fixed_large"):
        problems.append(f"variance is {sampler.variance}, there fixed_small or fixed_large")
    if sampler.self_condition:
        problems.append("self_condition is True, there always False")
    return problems


def _source_schedule(config: ScheduleConfig) -> tuple[str, float, float] | None:
    """The source's beta_schedule, beta_start and beta_end, or None if it has no such schedule."""
    if config.name in CONTINUOUS:
        return None
    betas = noise_schedule(config).betas
    if config.name == "betas" and np.all(betas == betas[0]):
        return "const", float(betas[0]), float(betas[0])
    if config.name not in _SCHEDULES or config.zero_terminal_snr:
        return None
    ends = [float(betas[0]), float(betas[-1])]  # a sigmoid's betas do not reach its ends, so those must be told
    told = (config.beta_start, config.beta_end)
    start, end = (there if asked is None else asked for asked, there in zip(told, ends, strict=True))
    return _SCHEDULES[config.name], start, end


def _config_yml(c: UNetConfig, schedule: ScheduleConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """The config that ermongroup's runner needs to build the network and its schedule, and our sampler's defaults."""
    found = _source_schedule(schedule)
    assert found is not None
    name, start, end = found
    defaults = _sampler({}, schedule.num_train_timesteps, sampler.variance)
    ours = {"spacing": sampler.spacing, "num_steps": sampler.num_steps, "eta": sampler.eta, "clip": sampler.clip}
    return {
        "data": {"image_size": c.image_size[0], "channels": c.in_channels, "rescaled": True},
        "model": {
            "type": "simple",
            "in_channels": c.in_channels,
            "out_ch": c.out_channels,
            "ch": c.channels,
            "ch_mult": [int(mult) for mult in c.channel_mults],
            "num_res_blocks": c.num_res_blocks,
            "attn_resolutions": [c.image_size[0] // 2**level for level in c.attention_levels],
            "dropout": 0.0,
            "resamp_with_conv": c.downsample == ("conv",),
            "var_type": sampler.variance.replace("_", ""),
            "ema": True,
            "ema_rate": 0.9999,
            "norm_groups": c.norm_groups,
            "norm_eps": c.norm_epsilon,
        },
        "diffusion": {
            "beta_schedule": name,
            "beta_start": start,
            "beta_end": end,
            "num_diffusion_timesteps": schedule.num_train_timesteps,
            **{key: value for key, value in ours.items() if value != getattr(defaults, key)},
        },
    }


FAMILY = Family(
    name="ho",
    title="Ho et al. (ermongroup/ddim, pesser/pytorch_diffusion)",
    recognise=recognise,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    pointwise=dict.fromkeys(_ATTENTION, 2),
    presets=PRESETS,
    formats={"ermongroup": write_ermongroup, "pesser": write_pesser},
    locate=locate,
    placed=placed,
)
