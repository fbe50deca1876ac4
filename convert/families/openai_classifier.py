"""guided-diffusion's classifiers of noisy images, `*_classifier.pt`: half of its UNet (EncoderUNetModel), then logits.

The tensors tell nearly all; what they do not is fixed in the source's create_classifier, and assumed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jddim.config import ClassifierConfig

from ..engine import ConversionError, refuse, refusing
from ..rules import Fused, Rules
from . import openai
from .base import Family, Plan, Source
from .tensors import Tensors, check_tensors, common_size
from .values import integer, literal, not_read, parse, sections, settling, sides, whole

# -- the file ---------------------------------------------------------------------------------------------------------


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with the names of the UNet's first half, and none of its second."""
    return openai.recognise(state) and not any(str(name).startswith("output_blocks.") for name in state)


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors."""
    check_tensors(state, file_name)
    tensors = {str(name): value for name, value in state.items()}
    if "out.2.positional_embedding" not in tensors and "out.3.weight" not in tensors:
        first = tensors.get("out.0.weight")
        raise ConversionError(
            f"{file_name} is a classifier that pools every block's mean (spatial, spatial_v2); jddim has attention, "
            "which the published ones have, and adaptive"
            if first is not None and first.ndim == 2
            else f"{file_name} has the first half of OpenAI's UNet (no output_blocks) and no classifier's pooling in "
            "out; is the file whole?"
        )
    return Source(tensors)


# -- what the tensors tell --------------------------------------------------------------------------------------------

SETTINGS = {
    "image_size": "side of the training images in pixels (or HEIGHTxWIDTH); checked where the pooling is attention",
    "classifier_depth": "residual blocks a level, where the tensors leave it open (checked)",
    "num_head_channels": "width of every head; 64 in the source, for forks",
    "norm_groups": "groups of every group norm; 32 in the source, for forks",
}
_PARSERS = {**dict.fromkeys(SETTINGS, integer), "image_size": sides}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A way in which the numbered blocks fall into levels. depth: blocks a level; size: of the images, where known."""

    depth: int
    widths: tuple[int, ...]
    attended: tuple[int, ...]
    resample: str
    size: tuple[int, int] | None = None


def _layouts(tensors: Tensors) -> Iterator[_Layout]:
    """Those that the names allow. A block that resamples looks like any other, so there may be several.

    A level's blocks have one width, and attention all or none; what stands between two levels resamples, all in one way
    and without attention.
    """
    parts: dict[int, set[str]] = {}
    sizes: dict[int, Counter[int]] = {}
    for name, value in tensors.items():
        if match := re.match(r"input_blocks\.(\d{1,6})\.(\d{1,6}\.[a-z_]+)", name):
            parts.setdefault(int(match[1]), set()).add(match[2])
            if re.search(r"\.0\.(in_layers\.2|out_layers\.[03])\.bias$", name):
                sizes.setdefault(int(match[1]), Counter())[value.size] += 1
    count = 1 + max(parts, default=-1)
    width = {n: found.most_common(1)[0][0] for n, found in sizes.items()}  # of most of them

    def attention(n: int) -> bool:
        return "1.qkv" in parts.get(n, ())

    def kind(n: int) -> str:  # a mean has no tensors
        return "resnet" if n in width else "conv" if "0.op" in parts.get(n, ()) else "pool" if n not in parts else "?"

    for each in range(2, count + 1) if count <= 2 * len(parts) else ():  # a number alone makes no blocks
        if count % each:
            continue
        levels = [range(first + 1, first + each) for first in range(0, count, each)]
        between = range(each, count, each)
        kinds = {kind(n) for n in between} or {"conv"}
        alike = all(len({(width.get(n), attention(n)) for n in level}) == 1 for level in levels)
        widths = tuple(width.get(level[0], 0) for level in levels)
        keep = all(width.get(n, below) == below for n, below in zip(between, widths, strict=False))
        if alike and keep and all(widths) and len(kinds) == 1 and not any(map(attention, between)) and "?" not in kinds:
            attended = tuple(i for i, level in enumerate(levels) if attention(level[0]))
            yield _Layout(each - 1, widths, attended, kinds.pop())


def _layout(tensors: Tensors, told: Mapping[str, Any]) -> _Layout:
    """The one that goes with the positions of the pooling and with what is told."""
    positions = tensors.get("out.2.positional_embedding")
    fitting = []
    for layout in _layouts(tensors):
        factor = 2 ** (len(layout.widths) - 1)
        size = told.get("image_size")
        if positions is not None:
            pixels = positions.shape[-1] - 1 if positions.ndim else 0
            side = math.isqrt(max(pixels, 0))
            size = size or (side * factor, side * factor)
            if (size[0] // factor) * (size[1] // factor) != pixels:
                continue
        if told.get("classifier_depth", layout.depth) == layout.depth:
            fitting.append(dataclasses.replace(layout, size=size))
    if not fitting:
        said = " and ".join(f"{key} {told[key]}" for key in ("image_size", "classifier_depth") if key in told)
        raise ConversionError(
            f"the blocks{' and positions' * (positions is not None)} do not add up to half of OpenAI's UNet"
            f"{f' with {said}' if said else ''}; is the file whole?"
        )
    missing = {}
    if len(fitting) > 1:
        depths = " or ".join(str(layout.depth) for layout in fitting)
        missing["classifier_depth=N"] = f"how many blocks a level has: --set classifier_depth={depths}"
    if fitting[0].size is None:
        missing["image_size=SIDE"] = "the image size: --set image_size=SIDE"
    refuse([f"the tensors do not tell {'; nor '.join(missing.values())}"] if missing else [], missing)
    return fitting[0]


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The classifier of these tensors, and what is assumed. It has no schedule: that is the guided network's."""
    filed, unread, problems = sections(config, SETTINGS)
    spelled = {key: literal(value) for key, value in given.items()}
    told, refused = parse({"config": filed, "--set": spelled}, _PARSERS)
    refuse(problems + refused)
    layout = _layout(tensors, told)
    attention = "out.2.positional_embedding" in tensors
    channels = common_size(tensors, r"time_embed\.[02]\.(bias|weight)", 0, 4)
    channels_in = common_size(tensors, r"input_blocks\.0\.0\.weight", 1)
    classes = common_size(tensors, rf"out\.{'2.c_proj' if attention else 3}\.(bias|weight)", 0)
    scale = common_size(tensors, r"input_blocks\.1\.0\.emb_layers\.1\.(bias|weight)", 0, layout.widths[0])
    if not channels or channels_in is None or classes is None or scale is None:
        raise ConversionError("too few tensors of the classifier are there to tell its shape; is the file whole?")
    assumed: list[str] = []
    settle = settling(told, assumed)
    with refusing("the tensors and settings make no valid classifier"):
        model = ClassifierConfig(
            image_size=layout.size,  # type: ignore[arg-type]  # `_layout` asks for it
            num_classes=classes,
            in_channels=channels_in,
            channels=channels,
            channel_mults=tuple(whole(width / channels) for width in layout.widths),
            num_res_blocks=layout.depth,
            attention_levels=layout.attended,
            head_channels=settle("num_head_channels", 64, "fixed in the source"),
            resample=layout.resample,
            scale_shift=scale == 2,
            norm_groups=settle("norm_groups", 32, "fixed in the source"),
            pool="attention" if attention else "adaptive",
        )
    untold = ("num_head_channels", "norm_groups", *(() if attention else ("image_size",)))
    unchecked = tuple(key for key in given if key in untold)
    notes = tuple(not_read(unread))
    return Plan(model, None, None, rules(model), {}, tuple(assumed), notes, unchecked=unchecked)


# -- names ------------------------------------------------------------------------------------------------------------


def rules(config: ClassifierConfig) -> Rules:
    """The rename table."""
    table = {
        **openai.encoder_rules(config.encoder, use_new_attention_order=False, at="encoder."),
        "out.0": "norm_out",
    }
    if config.pool == "adaptive":
        return {**table, "out.3": "pool"}
    return {
        **table,
        "out.2": "pool",
        "out.2.qkv_proj": Fused(("pool.q", "pool.k", "pool.v")),
        "out.2.c_proj": "pool.out",
    }


def reference(config: ClassifierConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have the source's names."""
    from ..reference.openai_unet import OpenAIClassifier

    half = config.encoder
    return OpenAIClassifier(
        classes=config.num_classes,
        positions=config.positions if config.pool == "attention" else None,
        in_channels=config.in_channels,
        model_channels=config.channels,
        widths=half.widths,
        num_res_blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        heads=[half.heads(width) for width in half.widths],
        resample=config.resample,
        scale_shift=config.scale_shift,
        groups=config.norm_groups,
    )


FAMILY = Family(
    name="openai_classifier",
    title="OpenAI (a classifier of guided-diffusion)",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    pointwise={"qkv": 1, "proj_out": 1, "qkv_proj": 1, "c_proj": 1, "out.3": 2},
    placed=openai.placed,
)
