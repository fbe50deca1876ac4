"""diffusers' UNet2DModel: pipeline folders, `unet/` and `unet_ema/` folders, bare weights beside a `config.json`.

The network is told by `config.json`, the sampling by `scheduler_config.json` (`convert.families.diffusers_config` reads
both); the tensors are checked against it. Without `config.json` the tensors tell what they can. Older files name
attention's tensors otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jddim.checkpoint.metadata import Metadata
from jddim.config import ModelConfig, UNetConfig, did_you_mean
from jddim.models.building import abstract_model, flat_params

from ..engine import ConversionError, refuse, shortened
from ..files.shards import INDEX
from ..rules import Rules, source_of, target_leaves, targets_of
from ..writers import save_safetensors, torch_tensors
from . import diffusers_config as configs
from .base import FIRST_STAGES, Family, Plan, Source, of_wiring
from .tensors import Tensors, check_tensors, common_size

# -- the files --------------------------------------------------------------------------------------------------------

_WEIGHTS = "diffusion_pytorch_model"
_SUFFIXES = (".safetensors", ".bin")  # in diffusers' order of preference
_FILE = re.compile(rf"{_WEIGHTS}(?:\.(?P<variant>[\w.-]+?))?(?:\.safetensors|\.bin)")
_INDEX_FILE = re.compile(rf"{_WEIGHTS}(?:\.safetensors|\.bin)\.index(?:\.(?P<variant>[\w.-]+?))?\.json")


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """The weights file, or index of shards, in a pipeline's or network's folder; None if there is none.

    The EMA's `unet_ema` before `unet`, unless `weights` says otherwise; safetensors before bin; a variant (fp16, ...)
    only if asked for, or if it is all there is. Raises ConversionError where the wish has no file, or several fit.
    """
    ema, raw = folder / "unet_ema", folder / "unet"
    places = [*{"ema": [ema], "raw": [raw]}.get(weights or "", [ema, raw]), folder]
    here = next((place for place in places if _weights_in(place)), None)
    if weights == "ema" and here != ema and folder.name != ema.name and (here or _weights_in(raw)):
        raise ConversionError(f"{folder} holds no unet_ema folder, so no --weights ema; leave the option out")
    if here is None:
        return _newest_checkpoint(folder, weights, variant)
    found = _weights_in(here)
    if variant is None and None not in found and len(found) > 1:
        raise ConversionError(f"{here} holds the variants {', '.join(map(str, found))} alone; --variant names one")
    chosen = variant if variant is not None or None in found else next(iter(found))
    if chosen not in found:
        names = [str(name) for name in found if name is not None] or ["none"]
        raise ConversionError(f"{here} holds no variant {variant!r}{did_you_mean(str(variant), names)}")
    return found[chosen]


def _newest_checkpoint(run: Path, weights: str | None, variant: str | None) -> Path | None:
    """The weights in the last `checkpoint-N` of a training run that has not finished, None if there is none."""
    numbered = [path for path in run.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if path.is_dir() and (file := locate(path, weights, variant)) is not None:
            return file
    return None


_NETWORKS = ("unet_ema", "unet", "transformer")
_CHECKPOINT = re.compile(r"checkpoint-\d{1,12}")


def _weights_in(folder: Path) -> dict[str | None, Path]:
    """Variant (None: the plain weights) -> its file or index, the preferred one where it is there in several forms."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name
        if (match := _INDEX_FILE.fullmatch(name) or _FILE.fullmatch(name)) and "-of-" not in name:
            found.setdefault(match["variant"], []).append(path)
    return {
        variant: min(paths, key=lambda path: (_SUFFIXES[0] not in path.name, INDEX.search(path.name) is not None))
        for variant, paths in found.items()
    }


def config_files(weights: Path) -> Iterator[Path]:
    """Where the configs of a weights file lie: beside it, in its pipeline's folder, and in that of its run."""
    folder = weights.absolute().parent
    yield folder / "config.json"
    places = [folder, *([folder.parent] if folder.name in _NETWORKS else [])]
    if _CHECKPOINT.fullmatch(places[-1].name):
        places.append(places[-1].parent)
        yield places[-1] / "unet" / "config.json"
    for place in places:
        yield place / "scheduler_config.json"
        yield place / "scheduler" / "scheduler_config.json"
        yield place / "model_index.json"


def beside(weights: Path) -> Path | None:
    """The folder of the first stage in the pipeline of a weights file, None if it has none."""
    folder = weights.absolute().parent
    pipeline = folder.parent if folder.name in (*_NETWORKS, "transformer") else folder
    return next((pipeline / name for name in ("vqvae", "vae") if _weights_in(pipeline / name)), None)


def hub_files(variant: str | None) -> Sequence[Sequence[str]]:
    """What to download of a hub repository: file patterns, tried in turn until `locate` finds weights."""
    places = ("", "unet/", "vqvae/", "vae/")
    small = ["model_index.json", *(f"{place}*config.json" for place in (*places, "scheduler/"))]
    infix = "" if variant is None else f".{variant}"
    plain = [
        [f"{place}{_WEIGHTS}{pattern}" for place in places for pattern in _patterns(suffix, infix)]
        for suffix in _SUFFIXES
    ]
    return [small, *plain, [f"{place}{_WEIGHTS}*" for place in places]]


def _patterns(suffix: str, infix: str) -> list[str]:
    shard = "-?????-of-?????"
    return [f"{infix}{suffix}", f"{infix}{shard}{suffix}", f"{shard}{infix}{suffix}", f"{suffix}.index{infix}.json"]


# -- the tensors ------------------------------------------------------------------------------------------------------

_TELLING = r"(down_blocks|up_blocks)\.\d+\.resnets\.\d+\.|time_embedding\.linear_[12]\.|conv_norm_out\."
# Names of other networks: MONAI's, a text-conditioned UNet, an autoencoder, a ControlNet, a motion module.
_NOT_OURS = (
    r"conv_in\.conv\.|transformer_blocks[._]|(encoder|decoder|quant_conv)\.|controlnet_|temporal|temp_|add_embedding\."
)
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with UNet2DModel's names, some of time among them: autoencoders have the others."""
    telling = [name for name in map(str, state) if re.match(_TELLING, name)]
    if len(telling) < 4 or not any("time_emb" in name for name in telling):
        return False
    return not any(re.search(_NOT_OURS, str(name)) for name in state)


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors, attention's under diffusers' present names."""
    check_tensors(state, file_name)
    tensors, note = present_names(state, file_name)
    return Source(tensors, note=note)


def present_names(state: Mapping[Any, Any], file_name: str) -> tuple[dict[str, Any], str]:
    """A state dict with attention's tensors under diffusers' present names, and a note if it had old ones."""
    names = {name: _present_name(str(name)) for name in state}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ConversionError(f"{file_name} holds, under an old and the present name, {shortened(twice)}")
    legacy = sum(old != new for old, new in names.items())
    note = f"{legacy} tensors under the names of diffusers before 0.15" if legacy else ""
    return {names[name]: value for name, value in state.items()}, note


def _present_name(name: str) -> str:
    found = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
    return f"{found[1]}{_LEGACY[found[2]]}{found[3]}" if found else name


def placed(source: Source, file: Path, config: Mapping[str, Any] | None) -> Source:
    """What a file's place says of its weights: `unet_ema` holds the EMA's, whose step its config has."""
    weights = {"unet_ema": "ema", "unet": "raw"}.get(file.parent.name, "unstated")
    if weights == "raw" and not (file.parent.parent / "unet_ema").is_dir():
        weights = "unstated"  # a finished pipeline's `unet`, which holds whichever were saved
    step = ((config or {}).get("unet") or {}).get("optimization_step")
    return dataclasses.replace(
        source,
        weights=weights if source.weights == "unstated" else source.weights,
        step=step if isinstance(step, int) else source.step,
    )


def infer(tensors: Tensors) -> dict[str, Any]:
    """What names and shapes tell of a network, under `config.json`'s keys.

    Facts are taken from several tensors each where there are several, so that a missing or misshapen one is reported as
    such and not as another network. Raises ConversionError where the blocks do not add up.
    """
    found: dict[str, dict[int, Counter[str]]] = {"down": {}, "up": {}}
    modules = {name.rpartition(".")[0] for name in tensors}
    for name in modules:
        if at := re.fullmatch(
            r"(down|up)_blocks\.(\d{1,4})\.(resnets|attentions|\w+samplers)\.\d{1,4}\.(\w+)(\.0)?", name
        ):
            way, block, part, leaf, _ = at.groups()
            found[way].setdefault(int(block), Counter())[f"{part}.{leaf}"] += 1
    down, up = ([blocks[i] for i in sorted(blocks)] for blocks in found.values())
    layers = Counter(block["resnets.conv1"] for block in down).most_common(1)[0][0] if down else 0
    if not layers or len(down) != len(up) or any(sorted(blocks) != list(range(len(down))) for blocks in found.values()):
        raise ConversionError(
            f"the blocks do not add up to a UNet2DModel: {len(down)} down_blocks and {len(up)} up_blocks; is the file "
            "whole?"
        )

    def width(i: int) -> int | None:
        places = rf"(down_blocks\.{i}|up_blocks\.{len(down) - 1 - i})"
        return common_size(tensors, rf"{places}\.resnets\.\d+\.(conv1|conv2|norm2)\.bias", 0)

    def kind(block: Counter[str], count: int, word: str) -> str:
        if 2 * block["attentions.to_q"] >= count:
            return f"Attn{word}Block2D"
        return f"Resnet{word}sampleBlock2D" if block[f"{word.lower()}samplers.conv1"] else f"{word}Block2D"

    ends = common_size(tensors, r"conv_in\.weight", 1), common_size(tensors, r"conv_out\.(weight|bias)", 0)
    widths = tuple(map(width, range(len(down))))
    time = common_size(tensors, r"time_embedding\.linear_[12]\.(weight|bias)", 0)
    if not all((*ends, *widths, time)):
        raise ConversionError("too few tensors of the UNet2DModel are there to tell its shape; is the file whole?")
    ratios = Counter(
        tensors[name].size // max(tensors[conv].size, 1)
        for name in tensors
        if name.endswith("time_emb_proj.bias") and (conv := name.replace("time_emb_proj", "conv1")) in tensors
    )
    shift = bool(ratios) and ratios.most_common(1)[0][0] == 2
    resampled = {
        way: any(block["attentions.to_q"] and block[f"{way}samplers.conv1"] for block in blocks)
        for way, blocks in (("down", down), ("up", up))
    }
    proj, classes = tensors.get("time_proj.weight"), tensors.get("class_embedding.weight")
    embedding = "positional" if proj is None else "learned" if proj.ndim == 2 else "fourier"
    middle = any(name.startswith("mid_block.") for name in modules)
    facts = {
        "in_channels": ends[0],
        "out_channels": ends[1],
        "time_embedding_type": embedding,
        "time_embedding_dim": None if time == 4 * (widths[0] or 0) else time,
        "down_block_types": tuple(kind(block, layers, "Down") for block in down),
        "mid_block_type": "UNetMidBlock2D" if middle else None,
        "up_block_types": tuple(kind(block, layers + 1, "Up") for block in up),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "downsample_type": "resnet" if resampled["down"] else "conv",
        "upsample_type": "resnet" if resampled["up"] else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "num_class_embeds": classes.shape[0] or None if classes is not None and classes.ndim == 2 else None,
    }
    if middle:
        facts["add_attention"] = "mid_block.attentions.0.to_q" in modules
    if shift and "mid_block.attentions.0.group_norm" not in modules:
        facts["attn_norm_num_groups"] = None
    if "class_embedding.linear_1" in modules:
        facts["class_embed_type"] = "timestep"
    if proj is not None and embedding == "learned":
        facts["num_train_timesteps"] = proj.shape[0] or None
    return facts


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of the config files, or of the tensors, with --set over them."""
    told = configs.read_configs(config, given, None if (config or {}).get("unet") else infer(tensors))
    model = configs.unet_config(told)
    beside = (
        f"{model.condition_channels} channels in are an image's that the network is given beside x_t, "
        f"{'before' if model.condition_first else 'after'} x_t's, as --set condition_first says",
    )
    schedule = configs.schedule_config(told.scheduler)
    sampler = configs.sampler_config(told, model, schedule)
    return Plan(
        *(model, schedule, sampler, rules(model), {}),
        assumed=told.defaulted,
        notes=told.notes + (beside if model.condition_channels else ()),
        asks=told.asks,
        unchecked=tuple(key for key in given if key in configs.UNTOLD),
        warnings=told.warnings,
        wording=configs.wording(told),
        latent=bool(configs.parts_of((config or {}).get("pipeline") or {}) & FIRST_STAGES),
    )


# -- names ------------------------------------------------------------------------------------------------------------

_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    **{"time_emb_proj": "time_proj", "conv_shortcut": "shortcut"},
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
MIDDLE = ("mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0")


def rules(config: UNetConfig) -> Rules:
    """The rename table. The decoder's blocks are counted from the lowest resolution up, ours are levels."""
    table = {
        "time_proj": "time_proj",
        "time_embedding.linear_1": "time_embed.linear_1",
        "time_embedding.linear_2": "time_embed.linear_2",
        "class_embedding": "class_embed",
        "class_embedding.linear_1": "class_embed.linear_1",
        "class_embedding.linear_2": "class_embed.linear_2",
        "conv_in": "conv_in",
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    places = [
        (names, theirs, f"mid.{ours}")
        for names, theirs, ours in zip(
            (_RESNET, _RESNET, ATTENTION), MIDDLE, ("block_1", "block_2", "attention"), strict=True
        )
    ]
    last = len(config.channel_mults) - 1
    for level in range(last + 1):
        for theirs, ours, sampler, resample in (
            (f"down_blocks.{level}", f"down.{level}", "downsamplers", "downsample"),
            (f"up_blocks.{last - level}", f"up.{level}", "upsamplers", "upsample"),
        ):
            places += [
                (_RESNET, f"{theirs}.resnets.{{j}}", f"{ours}.blocks.{{j}}"),
                (ATTENTION, f"{theirs}.attentions.{{j}}", f"{ours}.attentions.{{j}}"),
                (_RESNET | {"conv": "conv"}, f"{theirs}.{sampler}.0", f"{ours}.{resample}"),
            ]
    return table | {f"{a}.{x}": f"{b}.{y}" for names, a, b in places for x, y in names.items()}


def reference(config: UNetConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have diffusers' names."""
    from ..reference.diffusers_unet import ReferenceUNet2D

    skipped = ("_class_name", "sample_size", "dropout")
    return ReferenceUNet2D(**{key: value for key, value in configs.unet_json(config).items() if key not in skipped})


def reference_by(config: UNetConfig, table: Rules) -> Any:
    """The same, to be loaded under the names that another source of this wiring has, by that source's rename table."""
    return loaded_by(reference(config), config, rules(config), table)


def loaded_by(module: Any, config: ModelConfig, own: Rules, table: Rules) -> Any:
    """A torch module whose own names have the rename table `own`, to be loaded under the names of another's."""
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    leaves = flat_params(abstract_model(config))

    def renamed(module: Any, state: dict[str, Any], *of_torch: Any) -> None:
        tensors = {}
        for theirs in list(state):
            value, (source, _, kind) = state.pop(theirs), theirs.rpartition(".")
            for target in targets_of(source, table):
                pieces = [value] if isinstance(target, str) else target.split(value)
                for leaf, piece in zip(target_leaves(target, kind, leaves), pieces, strict=False):
                    name = source_of(leaf, own)
                    tensors[name] = piece.reshape(shapes[name])
        state.update(tensors)

    module.register_load_state_dict_pre_hook(renamed)
    return module


# -- back -------------------------------------------------------------------------------------------------------------


def write_pipeline(metadata: Metadata, params: Tensors, path: Path) -> None:
    """A folder that `DDIMPipeline.from_pretrained` loads: model_index.json, unet/, scheduler/.

    Or DDPMPipeline's, where DDIMScheduler has not what the checkpoint has (`scheduler_json`).
    """
    config = of_wiring(metadata.model, UNetConfig)
    problems, parts = [], {}
    for name, make in (
        ("unet", lambda: configs.unet_json(config)),
        ("scheduler", lambda: configs.scheduler_json(metadata)),
    ):
        try:
            parts[name] = make()
        except ConversionError as error:
            problems.append(str(error))
    refuse(problems)
    tensors = torch_tensors(params, rules(config), lambda: reference(config))
    scheduler = parts["scheduler"]["_class_name"]
    index = {
        "_class_name": scheduler.replace("Scheduler", "Pipeline"),
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for folder in (path, path / "unet", path / "scheduler"):
        folder.mkdir()
    _write_json(index, path / "model_index.json")
    _write_json(parts["unet"], path / "unet" / "config.json")
    _write_json(parts["scheduler"], path / "scheduler" / "scheduler_config.json")
    save_safetensors(tensors, path / "unet" / f"{_WEIGHTS}.safetensors")


def _write_json(contents: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")


FAMILY = Family(
    name="diffusers",
    title="diffusers UNet2DModel",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=configs.SETTINGS,
    formats={"diffusers": write_pipeline},
    locate=locate,
    config_files=config_files,
    config_section=configs.section,
    placed=placed,
    hub_files=hub_files,
    beside=beside,
)
