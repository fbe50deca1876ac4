"""w86763777/pytorch-ddpm: the `ckpt.pt` of its runs, beside `flagfile.txt`.

The network is Ho et al.'s with torch's own epsilon and padding, its blocks numbered through all levels. What embeds t
is a table with a row for each, frozen in training and averaged like the rest: float32 rounding moves the EMA's by up
to 2e-4 from the sinusoids that it was filled with, so the file's own rows are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig

from ..engine import ConversionError, refuse, refusing
from ..rules import Rules
from . import diffusers
from .base import Family, Plan, Wording, check_sampler, checked
from .tensors import Tensors, common_size
from .values import (
    asking,
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
    whole,
)

_TIME = "time_embedding.timembedding"


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with this family's names."""
    telling = rf"{re.escape(_TIME)}\.|(down|middle|up)blocks\.\d+\.(block[12]|temb_proj)\."
    names = [name for name in map(str, state) if re.match(telling, name)]
    return len(names) >= 4 and any(name.startswith(_TIME) for name in names)


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """A run's `ckpt.pt`, beside the flags that the source writes there."""
    file = folder / "ckpt.pt"
    return file if variant is None and file.is_file() and (folder / "flagfile.txt").is_file() else None


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell, under the source's flag names; channels: of the image. T: None if the table is gone.

    The decoder has one block more on each level than the encoder, and both have as many resamplings.
    """
    found = [re.match(r"(down|up)blocks\.(\d{1,6})\.", name) for name in tensors]
    numbers = {side: {int(m[2]) for m in found if m and m[1] == side} for side in ("down", "up")}
    down, up = (1 + max(numbers[side], default=-1) for side in ("down", "up"))
    levels = 1 + len({name.split(".")[1] for name in tensors if re.match(r"downblocks\.\d+\.main\.", name)})
    # A number alone makes no blocks: most of them must be there.
    few = 2 * sum(map(len, numbers.values())) < down + up
    if few or up - down != levels or (down + 1) % levels or down < 2 * levels - 1:
        raise ConversionError(
            f"the blocks do not add up to a UNet: {down} downblocks, of which {levels - 1} downsample, and {up} "
            "upblocks; is the file whole?"
        )
    each = (down + 1) // levels  # blocks of a level on the way up; on the way down the last of them is the downsampling
    places = [
        [f"downblocks.{level * each + i}" for i in range(each - 1)]
        + [f"upblocks.{(levels - 1 - level) * (each + 1) + i}" for i in range(each)]
        for level in range(levels)
    ]
    biases = r"\.(block1\.2|block2\.3|temb_proj\.1)\.bias"
    widths = [common_size(tensors, f"({'|'.join(map(re.escape, level))}){biases}", 0) for level in places]
    ch = common_size(tensors, rf"{re.escape(_TIME)}\.[13]\.bias|.*\.temb_proj\.1\.weight", -1, 4)
    ends = [common_size(tensors, r"head\.weight", 1), common_size(tensors, r"tail\.2\.bias", 0)]
    if not ch or None in widths or ends == [None, None]:
        raise ConversionError("too few tensors of the UNet are there to tell its shape; is the file whole?")
    attended = [sum(f"{place}.attn.proj_q.weight" in tensors for place in level) for level in places]
    return {
        "ch": ch,
        "ch_mult": tuple(whole(width / ch) for width in widths),  # type: ignore[operator]
        "num_res_blocks": each - 1,
        "attn": tuple(level for level, count in enumerate(attended) if 2 * count >= 2 * each - 1),
        "channels": tuple(end or ends[1 - i] for i, end in enumerate(ends)),
        "T": common_size(tensors, rf"{re.escape(_TIME)}\.0\.weight", 0),
    }


SETTINGS = {
    "img_size": "side of the training images in pixels, or HEIGHTxWIDTH",
    "ch": "base width (checked against the tensors)",
    "ch_mult": "list of width multipliers (checked)",
    "attn": "list of levels with attention (checked)",
    "num_res_blocks": "residual blocks a level (checked)",
    "T": "number of timesteps (checked)",
    "beta_1": "first beta",
    "beta_T": "last beta",
    "mean_type": "what the network predicts: epsilon or xstart",
    "var_type": "fixedlarge or fixedsmall, the ancestral sampler's variance",
    "norm_groups": "groups of every group norm; the source always uses 32",
}
_ASKED = ("beta_1", "beta_T", "mean_type")
_UNTOLD = ("img_size", "norm_groups", *_ASKED)
_MEANS = {"epsilon": "epsilon", "xstart": "sample"}
_PARSERS = {
    "img_size": sides,
    **dict.fromkeys(("ch", "num_res_blocks", "T", "norm_groups"), integer),
    **dict.fromkeys(("ch_mult", "attn"), integers),
    **dict.fromkeys(("beta_1", "beta_T"), number),
    "mean_type": one_of(*_MEANS, "xprev"),
    "var_type": one_of("fixedlarge", "fixedsmall"),
}


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what the flags add, and what is assumed."""
    filed, unread, problems = sections(config, SETTINGS)
    sources = {"flags": filed, "--set": given}
    told, refused = parse({k: {n: _value(v) for n, v in items.items()} for k, items in sources.items()}, _PARSERS)
    refuse(problems + refused)
    found = infer(tensors)
    problems = [
        f"{key} is {told[key]} by the flags, but {found[key]} by the tensors"
        for key in ("ch", "ch_mult", "attn", "num_res_blocks", "T")
        if key in told and found[key] is not None and told[key] != found[key]
    ]
    channels_in, channels_out = found["channels"]
    if channels_in != channels_out:
        problems.append(f"the network has {channels_in} channels in and {channels_out} out; x_t needs as many out")
    if told.get("mean_type") == "xprev":
        problems.append("mean_type is xprev: jddim has no sampler for networks that predict x_(t-1)")
    missing = {}
    if "img_size" not in told:
        missing["img_size=SIDE"] = (
            "the tensors do not tell the image size; give the run's flagfile.txt by --config, or --set img_size=32 "
            "(the source's default)"
        )
    assumed: list[str] = []
    settle = settling(told, assumed)
    groups = settle("norm_groups", 32, "fixed in the source")
    if "norm_groups" not in told and (odd := [mult for mult in found["ch_mult"] if found["ch"] * mult % groups]):
        missing["norm_groups=N"] = f"32 groups of a norm, fixed in the source, do not divide {found['ch']} times {odd}"
    refuse([*problems, *missing.values()], () if problems else asking(_ASKED, told, missing))

    default = "the source's default"
    T = found["T"] or settle("T", 1000, default)
    with refusing("the tensors and flags make no valid UNet"):
        model = UNetConfig(
            image_size=told["img_size"],
            in_channels=channels_in,
            out_channels=channels_out,
            channels=found["ch"],
            channel_mults=found["ch_mult"],
            num_res_blocks=found["num_res_blocks"],
            attention_levels=found["attn"],
            symmetric_padding=True,
            norm_groups=groups,
            norm_epsilon=1e-5,
            time_embedding="learned",
            num_timesteps=T,
        )
    beta_1, beta_T = settle("beta_1", 1e-4, default), settle("beta_T", 0.02, default)
    mean_type = settle("mean_type", "epsilon", default)
    var_type = settle("var_type", "fixedlarge", f"{default}; DDIM does not use it")
    schedule = checked(ScheduleConfig("linear", T, beta_1, beta_T))
    sampler = SamplerConfig(
        num_steps=min(50, T),
        clip=False,
        prediction_type=_MEANS[mean_type],
        variance="fixed_large" if var_type == "fixedlarge" else "fixed_small",
    )
    check_sampler(sampler, schedule)
    return Plan(
        model,
        schedule,
        sampler,
        rules(model),
        {},
        tuple(assumed),
        (
            "the source has the ancestral sampler alone (--method ddpm --steps T); DDIM's timesteps are jddim's own",
            *not_read(unread),
        ),
        asks=asking(_ASKED, told),
        unchecked=tuple(key for key in given if key in _UNTOLD),
        wording=Wording(
            {"beta_1": str(beta_1), "beta_T": str(beta_T), "T": str(T)}, {"mean_type": mean_type, "var_type": var_type}
        ),
    )


def _value(value: Any) -> Any:
    """A flag's or --set's text as its YAML value; a repeated flag has a list of texts."""
    if isinstance(value, list):
        return [_value(item) for item in value]
    return literal(value) if isinstance(value, str) else value


_BLOCK = {
    **{"block1.0": "norm1", "block1.2": "conv1", "temb_proj.1": "time_proj", "block2.0": "norm2", "block2.3": "conv2"},
    "shortcut": "shortcut",
}
_ATTENTION = {"group_norm": "norm", "proj_q": "q", "proj_k": "k", "proj_v": "v", "proj": "out"}


def rules(config: UNetConfig) -> Rules:
    """The rename table, spelled out: the source numbers the blocks through all levels."""
    table = {
        f"{_TIME}.0": "time_proj",
        f"{_TIME}.1": "time_embed.linear_1",
        f"{_TIME}.3": "time_embed.linear_2",
        "head": "conv_in",
        "tail.0": "norm_out",
        "tail.2": "conv_out",
    }

    def block(source: str, target: str, attention: str | None) -> None:
        table.update({f"{source}.{theirs}": f"{target}.{ours}" for theirs, ours in _BLOCK.items()})
        if attention is not None:
            table.update({f"{source}.attn.{theirs}": f"{attention}.{ours}" for theirs, ours in _ATTENTION.items()})

    down = up = 0
    levels = len(config.widths)
    for level in range(levels):
        for i in range(config.num_res_blocks):
            block(f"downblocks.{down}", f"down.{level}.blocks.{i}", f"down.{level}.attentions.{i}")
            down += 1
        if level < levels - 1:
            table[f"downblocks.{down}.main"] = f"down.{level}.downsample.conv"
            down += 1
    block("middleblocks.0", "mid.block_1", "mid.attention")
    block("middleblocks.1", "mid.block_2", None)
    for level in reversed(range(levels)):
        for i in range(config.num_res_blocks + 1):
            block(f"upblocks.{up}", f"up.{level}.blocks.{i}", f"up.{level}.attentions.{i}")
            up += 1
        if level > 0:
            table[f"upblocks.{up}.main"] = f"up.{level}.upsample.conv"
            up += 1
    return table


def reference(config: UNetConfig) -> Any:
    """The PyTorch reference: diffusers', of the same wiring, under the source's names."""
    return diffusers.reference_by(config, rules(config))


FAMILY = Family(
    name="pytorch_ddpm",
    title="w86763777/pytorch-ddpm",
    recognise=recognise,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    pointwise=dict.fromkeys(_ATTENTION, 2),
    locate=locate,
    config_files=lambda weights: [weights.parent / "flagfile.txt"],
)
