"""First stages: diffusers' AutoencoderKL and VQModel, and CompVis' of the same names, which are the same networks.

The tensors tell the network; a config tells what they do not, above all how z is scaled.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jddim.checkpoint.metadata import Metadata, PartMetadata
from jddim.config import AutoencoderConfig

from ..engine import ConversionError, refuse, refusing, source_shapes, source_tensors
from ..rules import Rules, parts_of, targets_of
from ..writers import save_safetensors
from . import diffusers
from .base import Family, Plan, Source
from .tensors import Tensors, check_tensors, common_size
from .values import (
    asking,
    boolean,
    integer,
    integers,
    is_integer,
    literal,
    misspelt,
    not_read,
    number,
    one_of,
    parse,
    positive,
    section,
    settling,
    sides,
    whole,
)

# -- the file ---------------------------------------------------------------------------------------------------------

_DIFFUSERS = r"(encoder\.down|decoder\.up)_blocks\.\d+\.(resnets|attentions|\w+samplers)\.\d+\."
_COMPVIS = r"(encoder\.down|decoder\.up)\.\d+\.(block|attn|\w+sample)\."


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with the names of either source; a half too, for `open_source` to refuse."""
    telling = re.compile(f"{_DIFFUSERS}|{_COMPVIS}")
    return sum(bool(telling.match(str(name))) for name in state) >= 4


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors; attention's under diffusers' present names."""
    check_tensors(state, file_name)
    names = {str(name) for name in state}
    if halves := [half for half in ("encoder", "decoder") if not any(name.startswith(f"{half}.") for name in names)]:
        raise ConversionError(f"{file_name} has a first stage's names, but no {halves[0]}; is the file whole?")
    if five := [str(name) for name, value in state.items() if value.ndim == 5]:
        raise ConversionError(
            f"{file_name} is a first stage of video: {five[0]} has 3-D kernels; jddim's are of images"
        )
    tensors, note = diffusers.present_names(state, file_name)
    return Source(tensors, note=note)


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """The weights in the folder of a first stage of diffusers; None if there are none, or the folder is another's."""
    if weights is not None or not any(_class_in(folder / "config.json")):
        return None
    return diffusers.locate(folder, None, variant)


def _class_in(config: Path) -> list[str]:
    """The first stages that a config file names, by its text: it is parsed where it is used."""
    if not config.is_file() or config.stat().st_size > 1_000_000:
        return []
    return re.findall(r'"_class_name"\s*:\s*"(AutoencoderKL|VQModel)"', config.read_text(errors="replace"))


# -- what the tensors tell --------------------------------------------------------------------------------------------


def _levels(tensors: Tensors) -> tuple[int, bool]:
    """How many levels there are, and whether the names are CompVis'."""
    compvis = any(re.match(_COMPVIS, name) for name in tensors)
    pattern = (
        r"(encoder\.down|decoder\.up)\.(\d{1,4})\." if compvis else r"(encoder\.down|decoder\.up)_blocks\.(\d{1,4})\."
    )
    found: dict[str, set[int]] = {}
    for name in tensors:
        if at := re.match(pattern, name):
            found.setdefault(at[1], set()).add(int(at[2]))
    down, up = (found.get(side, set()) for side in ("encoder.down", "decoder.up"))
    if down != up or down != set(range(len(down))):
        raise ConversionError(
            f"the levels do not add up to a first stage: the encoder has {sorted(down)}, the decoder {sorted(up)}; is "
            "the file whole?"
        )
    return len(down), compvis


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell, under diffusers' argument names; compvis, levels: of the names.

    Facts are taken from several tensors where there are several, so that a missing or misshapen one is reported as such
    and not as another network.
    """
    levels, compvis = _levels(tensors)
    table = _table(levels, compvis=compvis)
    own: dict[str, Any] = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        for target in targets_of(module, table):
            own[f"{parts_of(target)[0]}.{kind}"] = value

    def size(pattern: str, axis: int = 0) -> int | None:
        return common_size(own, pattern, axis)

    def count(level: int, part: str) -> int:
        """How many blocks or attentions a level of the encoder has; the decoder has one more."""
        found = [
            Counter(m[1] for name in own if (m := re.match(rf"{half}\.levels\.{level}\.{part}\.(\d{{1,4}})\.", name)))
            for half in ("encoder", "decoder")
        ]
        down, up = (sum(number >= 3 for number in numbers.values()) for numbers in found)
        return max(down, up - 1)

    widths = [size(rf"(en|de)coder\.levels\.{i}\.blocks\.\d+\.(conv[12]|norm2)\.bias") for i in range(levels)]
    blocks = [count(i, "blocks") for i in range(levels)]
    attended = [count(i, "attentions") for i in range(levels)]
    codes = own.get("codes.weight")
    moments = 1 if codes is not None else 2
    hidden = size(r"decoder\.conv_in\.weight", 1) or (size(r"encoder\.conv_out\.bias") or 0) // moments
    latent = size(r"post_quant_conv\.weight", 1) or (size(r"quant_conv\.bias") or moments * hidden) // moments
    ends = (
        size(r"encoder\.conv_in\.weight", 1),
        size(r"decoder\.conv_out\.(weight|bias)"),
        size(r"encoder\.conv_in\.(weight|bias)"),
    )
    if not levels or not all((*widths, *ends, hidden, latent, min(blocks))):
        raise ConversionError("too few tensors of the first stage are there to tell its shape; is the file whole?")
    return {
        "compvis": compvis,
        "levels": levels,
        "in_channels": ends[0],
        "out_channels": ends[1],
        "stem": ends[2],
        "block_out_channels": tuple(widths),
        "layers_per_block": max(blocks),
        "attention_levels": tuple(i for i in range(levels) if 2 * attended[i] >= blocks[i]),
        "mid_block_add_attention": any(name.startswith("encoder.mid.attention.") for name in own),
        "latent_channels": hidden,
        "vq_embed_dim": latent,
        "num_vq_embeddings": None if codes is None or codes.ndim != 2 else codes.shape[0],
        "use_quant_conv": any(name.startswith("quant_conv.") for name in own),
        "use_post_quant_conv": any(name.startswith("post_quant_conv.") for name in own),
    }


SETTINGS = {
    "sample_size": "side of the training images in pixels, or HEIGHTxWIDTH",
    "scaling_factor": "what z is multiplied by for the network of latents",
    "shift_factor": "what is taken from z before that",
    "norm_num_groups": "groups of every group norm",
    "block_out_channels": "list of the levels' widths (checked against the tensors)",
    "layers_per_block": "residual blocks a level (checked)",
    "in_channels": "channels of the images (checked)",
    "out_channels": "channels of the decoded images (checked)",
    "latent_channels": "channels of the decoder's input (checked)",
    "vq_embed_dim": "channels of z, of a VQModel (checked)",
    "num_vq_embeddings": "vectors of the codebook, of a VQModel (checked)",
    "mid_block_add_attention": "attention in the middle (checked)",
    "use_quant_conv": "a 1x1 convolution follows the encoder (checked)",
    "use_post_quant_conv": "a 1x1 convolution comes before the decoder (checked)",
    "act_fn": "silu",
    "norm_type": "group",
}
_PARSERS = {
    "sample_size": sides,
    **dict.fromkeys(("scaling_factor",), positive),
    "shift_factor": lambda value: 0.0 if value is None else number(value),
    **dict.fromkeys(("norm_num_groups", "layers_per_block", "in_channels", "out_channels"), integer),
    **dict.fromkeys(("latent_channels", "num_vq_embeddings"), integer),
    "vq_embed_dim": lambda value: None if value is None else integer(value),
    "block_out_channels": integers,
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), boolean),
    "act_fn": one_of("silu"),
    "norm_type": one_of("group"),
}
_CHECKED = tuple(key for key, told in SETTINGS.items() if "checked" in told)
_UNTOLD = ("scaling_factor", "shift_factor", "norm_num_groups", "sample_size")
_KINDS = ("AutoencoderKL", "VQModel")
_PLAIN = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
_NO_MATTER = ("force_upcast", "lookup_from_codebook", "dropout", *_PLAIN)


def _filed(config: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str], list[str]]:
    """The settings of diffusers' `config.json` or CompVis' YAML; the keys that are not read; what is refused."""
    entries: Mapping[str, Any] = config or {}
    if params := section(entries, "model", "params"):
        return _of_compvis(params), [], []
    problems = []
    kind = entries.get("_class_name")
    if kind is not None and str(kind).removeprefix("Flax") not in _KINDS:
        problems.append(f"config: _class_name is {kind!r}; jddim has {' and '.join(_KINDS)}")
    for key, known in _PLAIN.items():
        types = entries.get(key, ())
        if odd := [each for each in (types if isinstance(types, list) else [types]) if each not in known and types]:
            problems.append(f"config: {key} has {odd[0]!r}; jddim has {' and '.join(known)}")
    for key in ("latents_mean", "latents_std"):
        if entries.get(key) is not None:
            problems.append(f"config: {key}: z is scaled channel by channel, for which jddim has one scaling_factor")
    told = {key: value for key, value in entries.items() if key in SETTINGS}
    read = (*SETTINGS, *_NO_MATTER, "latents_mean", "latents_std")
    unread = [key for key in entries if key not in read and not key.startswith("_")]
    if kind is not None:
        wrong, unread = misspelt(unread, read, "config")
        problems += wrong
    return told, unread, problems


def _of_compvis(params: Mapping[str, Any]) -> dict[str, Any]:
    """A first stage's own config, or what one of the whole model says of it, under diffusers' names."""
    whole_model = "first_stage_config" in params
    own = section(params, "first_stage_config", "params") if whole_model else params
    shape = section(own, "ddconfig")
    names = {"resolution": "sample_size", "num_res_blocks": "layers_per_block", "out_ch": "out_channels"}
    names |= {"in_channels": "in_channels", "z_channels": "latent_channels"}
    told = {ours: shape[theirs] for theirs, ours in names.items() if theirs in shape}
    mults, width = shape.get("ch_mult"), shape.get("ch")
    if isinstance(mults, list) and all(map(is_integer, [*mults, width])):
        told["block_out_channels"] = [width * mult for mult in mults]
    if "embed_dim" in own:
        told["vq_embed_dim"] = own["embed_dim"]
    if "n_embed" in own:
        told["num_vq_embeddings"] = own["n_embed"]
    if whole_model and not params.get("scale_by_std"):
        told["scaling_factor"] = params.get("scale_factor", 1.0)  # LatentDiffusion's default
    return told


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The first stage of these tensors, and what is assumed. It has no schedule: that is the sampled network's."""
    filed, unread, problems = _filed(config)
    told, refused = parse({"config": filed, "--set": {k: literal(v) for k, v in given.items()}}, _PARSERS)
    refuse(problems + refused)
    found = infer(tensors)
    codes = found["num_vq_embeddings"]
    if "scale_factor" in tensors:  # what scale_by_std measured
        told.setdefault("scaling_factor", float(tensors["scale_factor"]))
    facts = found if codes is not None or found["compvis"] else found | {"vq_embed_dim": None}
    problems = [
        f"{key} is {told[key]} by the settings, but {facts[key]} by the tensors"
        for key in _CHECKED
        if told.get(key) is not None and facts[key] is not None and told[key] != facts[key]
    ]
    if codes is None and told.get("num_vq_embeddings") is not None:
        problems.append("num_vq_embeddings is of a VQModel, and the tensors have no codebook")
    if codes is None and not found["compvis"] and told.get("vq_embed_dim") is not None:
        problems.append("vq_embed_dim is of a VQModel, and the tensors have no codebook")
    assumed: list[str] = []
    settle = settling(told, assumed)
    groups = settle("norm_num_groups", 32, "the source's default")
    widths, factor = found["block_out_channels"], 1 << (found["levels"] - 1)
    missing = {}
    if "norm_num_groups" not in told and (odd := sorted({w for w in widths if w % groups})):
        missing["norm_num_groups=N"] = f"32 groups of a norm, the source's default, do not divide the widths {odd}"
    if "scaling_factor" not in told and codes is None:
        missing["scaling_factor=NUMBER"] = (
            "the tensors do not tell how z is scaled; --set scaling_factor=0.18215 (Stable Diffusion 1 and 2, DiT), "
            "0.13025 (SDXL), or as the network of latents was trained"
        )
    untold = () if problems else asking(_UNTOLD, told, missing)
    refuse([*problems, *missing.values()], untold if missing else ())
    scaling = settle(
        "scaling_factor", 1.0, "a VQModel's z is not scaled (arXiv:2112.10752), whatever diffusers' default"
    )
    with refusing("the tensors and settings make no valid first stage"):
        model = AutoencoderConfig(
            image_size=settle(
                "sample_size", (32 * factor, 32 * factor), "that of 32x32 latents; any multiple is taken"
            ),
            in_channels=found["in_channels"],
            out_channels=found["out_channels"],
            latent_channels=found["vq_embed_dim"],
            hidden_channels=None if found["latent_channels"] == found["vq_embed_dim"] else found["latent_channels"],
            channels=found["stem"],
            channel_mults=tuple(whole(width / found["stem"]) for width in widths),
            num_res_blocks=found["layers_per_block"],
            attention_levels=found["attention_levels"],
            mid_attention=found["mid_block_add_attention"],
            norm_groups=groups,
            num_codes=codes,
            quant_conv=found["use_quant_conv"],
            post_quant_conv=found["use_post_quant_conv"],
            scaling_factor=scaling,
            shift_factor=told.get("shift_factor", 0.0),
        )
    ignored = {"scale_factor": "how z is scaled"} if "scale_factor" in tensors else {}
    for prefix, why in (
        ("loss.", "of training: the loss and its discriminator"),
        ("model_ema.", "of training: an EMA"),
    ):
        ignored |= {name: why for name in tensors if name.startswith(prefix)}
    return Plan(
        *(model, None, None, rules(model, compvis=found["compvis"]), ignored),
        tuple(assumed),
        tuple(not_read(unread)),
        asks=asking(("norm_num_groups",), told),
        unchecked=tuple(key for key in given if key in _UNTOLD),
        reference_options={"compvis": found["compvis"]},
    )


# -- names ------------------------------------------------------------------------------------------------------------

_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}


def rules(config: AutoencoderConfig, *, compvis: bool) -> Rules:
    """The rename table."""
    return _table(len(config.channel_mults), compvis=compvis)


def _table(levels: int, *, compvis: bool) -> Rules:
    """The rename table. diffusers counts the decoder's levels from the lowest resolution up."""
    table = {name: name for name in ("quant_conv", "post_quant_conv")} | {"quantize.embedding": "codes"}
    resnet = _RESNET | {"nin_shortcut" if compvis else "conv_shortcut": "shortcut"}
    attention = {"q": "q", "k": "k", "v": "v", "norm": "norm", "proj_out": "out"} if compvis else diffusers.ATTENTION
    places = []
    for half, side in (("encoder", "down"), ("decoder", "up")):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.{'norm_out' if compvis else 'conv_norm_out'}"] = f"{half}.norm_out"
        middle = ("mid.block_1", "mid.block_2", "mid.attn_1") if compvis else diffusers.MIDDLE
        for theirs, ours in zip(middle, ("block_1", "block_2", "attention"), strict=True):
            places.append((attention if ours == "attention" else resnet, f"{half}.{theirs}", f"{half}.mid.{ours}"))
        for level in range(levels):
            ours = f"{half}.levels.{level}"
            if compvis:
                theirs, blocks, attentions, sampler = f"{half}.{side}.{level}", "block", "attn", f"{side}sample"
            else:
                at = level if side == "down" else levels - 1 - level
                theirs, blocks, attentions, sampler = (
                    f"{half}.{side}_blocks.{at}", "resnets", "attentions", f"{side}samplers.0"
                )  # fmt: skip
            places += [
                (resnet, f"{theirs}.{blocks}.{{j}}", f"{ours}.blocks.{{j}}"),
                (attention, f"{theirs}.{attentions}.{{j}}", f"{ours}.attentions.{{j}}"),
                ({"conv": "conv"}, f"{theirs}.{sampler}", f"{ours}.{side}sample"),
            ]
    return table | {f"{a}.{x}": f"{b}.{y}" for names, a, b in places for x, y in names.items()}


def reference(config: AutoencoderConfig, *, compvis: bool) -> Any:
    """The PyTorch reference, whose parameters have the source's names."""
    from ..reference.autoencoder import ReferenceAutoencoder

    module = ReferenceAutoencoder(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        hidden=config.hidden,
        channels=config.channels,
        widths=config.widths,
        num_res_blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        mid_attention=config.mid_attention,
        groups=config.norm_groups,
        eps=config.norm_epsilon,
        num_codes=config.num_codes,
        quant_conv=config.quant_conv,
        post_quant_conv=config.post_quant_conv,
    )
    if compvis:
        return module
    return diffusers.loaded_by(module, config, rules(config, compvis=True), rules(config, compvis=False))


# -- back -------------------------------------------------------------------------------------------------------------


def write(metadata: Metadata | PartMetadata, params: Tensors, path: Path) -> None:
    """A folder that diffusers' `AutoencoderKL.from_pretrained` or `VQModel.from_pretrained` loads."""
    stage = metadata.model if isinstance(metadata, PartMetadata) else metadata.autoencoder
    assert isinstance(stage, AutoencoderConfig)
    contents, table = config_json(stage), rules(stage, compvis=False)
    tensors = source_tensors(params, table, source_shapes(params, table, {"quant_conv": 2, "post_quant_conv": 2}))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(contents, indent=2) + "\n")
    save_safetensors(tensors, path / "diffusion_pytorch_model.safetensors")


def write_beside(metadata: Metadata, params: Tensors, path: Path) -> None:
    """The first stage of a network that is written as a pipeline, which becomes diffusers' `LDMPipeline`."""
    assert metadata.autoencoder is not None
    index = json.loads((path / "model_index.json").read_text())
    if metadata.autoencoder.shift_factor:
        raise ConversionError("its first stage has a shift_factor, which LDMPipeline does not read")
    if index["_class_name"] != "DDIMPipeline":
        raise ConversionError("LDMPipeline takes DDIMScheduler's conventions alone")
    write(metadata, params, path / "vqvae")
    kind = json.loads((path / "vqvae" / "config.json").read_text())["_class_name"]
    index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", kind]}
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def config_json(config: AutoencoderConfig) -> dict[str, Any]:
    """Diffusers' `config.json` of it. Raises ConversionError with all that diffusers' classes cannot hold."""
    vq = config.num_codes is not None
    problems = [
        told
        for wrong, told in (
            (config.channels != config.widths[0], "its first convolution has another width than its first level"),
            (config.norm_epsilon != 1e-6, f"norm_epsilon is {config.norm_epsilon:g}, there always 1e-06"),
            (config.image_size[0] != config.image_size[1], "image_size is no square"),
            (not vq and config.hidden != config.latent_channels, "z has another number of channels than the decoder"),
            (vq and not (config.quant_conv and config.post_quant_conv), "a VQModel has both 1x1 convolutions"),
            (vq and config.shift_factor != 0, "a VQModel has no shift_factor"),
        )
        if wrong
    ]
    refuse(problems)
    attended = [level in config.attention_levels for level in range(len(config.widths))]
    own: dict[str, Any] = (
        {"num_vq_embeddings": config.num_codes, "vq_embed_dim": config.latent_channels}
        if vq
        else {
            "shift_factor": config.shift_factor or None,
            "use_quant_conv": config.quant_conv,
            "use_post_quant_conv": config.post_quant_conv,
        }
    )
    return {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{'Attn' * there}DownEncoderBlock2D" for there in attended],
        "up_block_types": [f"{'Attn' * there}UpDecoderBlock2D" for there in reversed(attended)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.hidden,
        "norm_num_groups": config.norm_groups,
        "sample_size": config.image_size[0],
        "scaling_factor": config.scaling_factor,
        "mid_block_add_attention": config.mid_attention,
        **own,
    }


FAMILY = Family(
    name="autoencoder",
    title="a first stage (AutoencoderKL or VQModel)",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    formats={"diffusers": write},
    buffers=frozenset({"scale_factor"}),
    pointwise={"quant_conv": 2, "post_quant_conv": 2, "q": 2, "k": 2, "v": 2, "proj_out": 2},
    locate=locate,
    first_stage=True,
    config_files=lambda weights: [weights.parent / "config.json", *sorted(weights.parent.glob("*.yaml"))[:1]],
)
