"""diffusers' DiTTransformer2DModel: pipeline folders of DiTPipeline, `transformer/` folders, bare weights.

On the same weights it is not the function that facebookresearch's DiT is: the sinusoid of t has a frequency shift of 1,
there 0, and the norm before each MLP has an epsilon of 1e-5, there 1e-6. A pipeline's files were made for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jddim.config import DiTConfig, did_you_mean

from ..engine import ConversionError, refuse, refusing, shortened
from ..files.pickles import printable
from ..rules import Rules
from . import diffusers
from . import diffusers_config as configs
from .base import FIRST_STAGES, Family, Plan, Source
from .diffusers_config import Option
from .tensors import Tensors, check_tensors, common_size
from .values import asking, boolean, integer, number, positive

FOLDER = "transformer"
_COPIED = r"transformer_blocks\.(\d{1,6})(\.norm1\.emb\.(?:timestep_embedder|class_embedder)\..+)"


def locate(folder: Path, weights: str | None, variant: str | None) -> Path | None:
    """The weights file in a pipeline's `transformer`; None if there is none."""
    within = folder / FOLDER
    return diffusers.locate(within, weights, variant) if within.is_dir() else None


def hub_files(variant: str | None) -> Sequence[Sequence[str]]:
    """What to download of a hub repository. One file alone: pipelines with shards have larger transformers than DiT."""
    infix = "" if variant is None else f".{variant}"
    weights = [f"{place}/diffusion_pytorch_model{infix}" for place in (FOLDER, "vae")]
    configs = [f"{place}/config.json" for place in (FOLDER, "vae")]
    return [[*configs, *(f"{file}.safetensors" for file in weights)], [f"{file}.bin" for file in weights]]


def recognise(state: Mapping[Any, Any]) -> bool:
    """A state dict with the names of this network, whose blocks embed a label: PixArt's do not."""
    names = [str(name) for name in state]
    return any(re.fullmatch(_COPIED, name) for name in names) and any(n.startswith("proj_out_") for n in names)


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The tensors, those that each block repeats once. ConversionError that names every copy that is not equal."""
    check_tensors(state, file_name)
    tensors = {str(name): value for name, value in state.items()}
    found = {name: match for name in tensors if (match := re.fullmatch(_COPIED, name))}
    blocks = {match[1] for name in tensors if (match := re.match(r"transformer_blocks\.(\d{1,6})\.", name))}
    problems = []
    for part in {match[2] for match in found.values()}:
        first = f"transformer_blocks.0{part}"
        for name in (f"transformer_blocks.{block}{part}" for block in blocks):
            if name not in tensors:
                problems.append(f"{name} is missing")
            elif first in tensors and not _same(tensors[name], tensors[first]):
                problems.append(f"{name} is not equal to {first}")
    if problems:
        raise ConversionError(
            f"{file_name}: each block repeats what embeds t and the label, and diffusers reads its block's own; jddim "
            f"keeps one for all, but {shortened(sorted(problems))}"
        )
    kept = {name: value for name, value in tensors.items() if name not in found or found[name][1] == "0"}
    copies = len(tensors) - len(kept)
    return Source(kept, note=f"{copies} tensors that the blocks repeat are equal to the first's" if copies else "")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, so that a NaN is reported as one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    ours, theirs = (np.ascontiguousarray(value).reshape(-1).view(np.uint8) for value in (a, b))
    return np.array_equal(ours, theirs)


def _always(allowed: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value != allowed:
            raise ValueError(f"{configs.shown(allowed)}, the one kind that jddim has")
        return value

    return read


def _count(value: Any) -> int:
    if (found := integer(value)) < 1:
        raise ValueError("an integer of at least 1")
    return found


def _count_or_none(value: Any) -> int | None:
    return None if value is None else _count(value)


TRANSFORMER: Mapping[str, Option] = {
    "sample_size": Option(32, _count, "side of x_t, which are latents mostly"),
    "patch_size": Option(2, _count, "side of a patch"),
    "in_channels": Option(4, _count, "channels of x_t"),
    "out_channels": Option(None, _count_or_none, "channels of the output; null: in_channels"),
    "num_layers": Option(28, _count, "blocks"),
    "num_attention_heads": Option(16, _count, "heads of each attention"),
    "attention_head_dim": Option(72, _count, "channels of a head"),
    "num_embeds_ada_norm": Option(1000, _count, "number of classes"),
    "norm_eps": Option(1e-5, positive, "epsilon of the norms before the MLPs"),
    "norm_type": Option("ada_norm_zero", _always("ada_norm_zero"), "ada_norm_zero"),
    "activation_fn": Option("gelu-approximate", _always("gelu-approximate"), "gelu-approximate"),
    "attention_bias": Option(True, _always(True), "true"),
    "norm_elementwise_affine": Option(False, _always(False), "false"),
    "upcast_attention": Option(False, boolean, "without effect here: the softmax is in float32"),
    "norm_num_groups": Option(32, integer, "without effect"),
    "dropout": Option(0.0, number, "of training only"),
}
CALL = {key: option for key, option in configs.CALL.items() if key != "condition_first"}
_INERT = ("upcast_attention", "norm_num_groups", "dropout", "out_channels")
SETTINGS = {k: option.meaning for part in (TRANSFORMER, CALL, configs.SCHEDULER) for k, option in part.items()}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""The second is what diffusers called it first, together with others."""


def section(contents: Mapping[str, Any]) -> str:
    """Which of the files this is: "scheduler", "transformer", or "pipeline", which is model_index.json."""
    return FOLDER if (kind := configs.section(contents)) == "unet" else kind


def infer(tensors: Tensors) -> dict[str, Any]:
    """What shapes tell, under `config.json`'s keys, and inner_dim. ConversionError if too little is there to tell."""
    blocks = {m[1] for name in tensors if (m := re.match(r"transformer_blocks\.(\d{1,6})\.(attn1|ff)\.", name))}
    width = common_size(tensors, r"transformer_blocks\.\d+\.attn1\.\w+(\.0)?\.bias|pos_embed\.proj\.bias", 0)
    patch = common_size(tensors, r"pos_embed\.proj\.weight", 2)
    channels = common_size(tensors, r"pos_embed\.proj\.weight", 1)
    outputs = common_size(tensors, r"proj_out_2\.(bias|weight)", 0)
    rows = common_size(tensors, r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.weight", 0)
    if not (blocks and width and patch and channels and outputs and rows):
        raise ConversionError("too few tensors of the transformer are there to tell its shape; is the file whole?")
    return {
        **{"in_channels": channels, "out_channels": outputs // patch**2, "patch_size": patch},
        **{"num_layers": len(blocks), "num_embeds_ada_norm": rows - 1, "inner_dim": width},
    }


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of the config files, or of the tensors, with --set over them."""
    files = {name: dict((config or {}).get(name) or {}) for name in (FOLDER, "scheduler", "pipeline")}
    problems, notes = configs.class_problems({**files, "unet": files[FOLDER]}, CLASSES)
    refuse(problems)  # the keys are another class's
    problems += [f"unknown --set key {key!r}{did_you_mean(key, SETTINGS)}" for key in given if key not in SETTINGS]
    scheduler, obsolete = configs.without_obsolete(files["scheduler"])
    parts = {}
    for name, file, options, contents in (
        (FOLDER, "config.json", TRANSFORMER, files[FOLDER]),
        ("scheduler", "scheduler_config.json", configs.SCHEDULER, scheduler),
        ("call", "", CALL, {}),
    ):
        mine = {key: text for key, text in given.items() if key in options}
        parts[name], wrong, unread = configs.read_part(file, options, contents, mine)
        problems += wrong
        notes += unread
    refuse(problems)
    found, network, missing = {}, parts[FOLDER], {}
    if not files[FOLDER]:
        found = infer(tensors)
        width = found.pop("inner_dim")
        if "sample_size" not in network:
            missing["sample_size=SIDE"] = "the side of the latents: --set sample_size=32 (of 256x256 pictures)"
        if "num_attention_heads" not in network:
            missing["num_attention_heads=N"] = "the heads: --set num_attention_heads=16 (DiT-XL's)"
        network = {"attention_head_dim": width // network.get("num_attention_heads", 1), **found, **network}
    if missing:
        problems.append(
            f"without a config.json, the tensors do not tell {'; nor '.join(missing.values())}; --config config.json "
            "says all of it"
        )
    refuse(problems, asking(() if scheduler else configs.TRAINED, given, missing))
    defaults = {key: option.default for key, option in TRANSFORMER.items()}
    network = defaults | network
    network["out_channels"] = network["out_channels"] or network["in_channels"]
    model = model_of(network)
    learned = {"variance_type": "learned_range"} if model.out_channels == 2 * model.in_channels else {}
    asked = {key: option.default for key, option in CALL.items()} | parts["call"]
    process = {key: option.default for key, option in configs.SCHEDULER.items()} | parts["scheduler"] | learned
    unclipped = not scheduler and "clip_sample" not in given
    process |= {"clip_sample": False} if unclipped else {}
    told = configs.Told(network, process, asked, (), (), (), ())
    unsaid, warnings = configs.scheduler_defaults(scheduler, {**given, "clip_sample": ""} if unclipped else given)
    if unclipped:
        unsaid = (*unsaid, "clip_sample = false (latents are not clipped, in DiTPipeline's own files)")
    if absent := configs.defaulted(TRANSFORMER, {*files[FOLDER], *given, *found, "attention_head_dim"}, _INERT):
        unsaid = (*unsaid, f"{absent} (DiTTransformer2DModel's defaults in diffusers: its config does not name them)")
    schedule = configs.schedule_config(process)
    if learned:
        notes.append(
            "the second half of the output is a learned variance, which the pipeline drops; method ddpm reads it"
        )
    null_label = network["num_embeds_ada_norm"]
    if null_label != 1000:
        notes.append(f"the null label is the last, {null_label}; the pipeline itself takes 1000 always")
    return Plan(
        *(model, schedule, configs.sampler_config(told, model, schedule), rules(model), {}),
        assumed=(*obsolete, *unsaid),
        notes=tuple(notes),
        asks=asking(() if scheduler else configs.TRAINED, given),
        unchecked=tuple(
            key for key in given if key in ("sample_size", "num_attention_heads", "norm_eps", *configs.UNTOLD)
        ),
        warnings=warnings,
        wording=configs.wording(told),
        null_label=null_label,
        label_names=label_names(files["pipeline"].get("id2label"), null_label),
        latent=bool(configs.parts_of(files["pipeline"]) & FIRST_STAGES),
    )


def label_names(told: Any, classes: int) -> dict[str, int]:
    """A pipeline's id2label, number -> names with commas between, as name -> number, and all of them as one name.

    Of a name twice, the last.

    ConversionError if it is something else.
    """
    names: dict[str, int] = {}
    for label, text in told.items() if isinstance(told, Mapping) else ():
        fits = re.fullmatch(r"\d{1,7}", str(label)) and int(label) < classes
        if not fits or not isinstance(text, str) or not text.isprintable() or len(text) > 1000:
            said = printable(f"{label!r}: {text!r}")
            raise ConversionError(f"model_index.json: id2label must have the names of 0..{classes - 1}, it has {said}")
        own = [name.strip() for name in text.split(",") if name.strip()]
        names |= dict.fromkeys([*own, ", ".join(own)] if own else [], int(label))
    return names


def model_of(c: Mapping[str, Any]) -> DiTConfig:
    """The network of a config's values. ConversionError if there is none."""
    with refusing("config.json makes no valid DiT"):
        return DiTConfig(
            image_size=(c["sample_size"], c["sample_size"]),
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            patch_size=c["patch_size"],
            channels=c["num_attention_heads"] * c["attention_head_dim"],
            depth=c["num_layers"],
            num_heads=c["num_attention_heads"],
            num_classes=c["num_embeds_ada_norm"] + 1,
            frequency_shift=1.0,
            mlp_norm_epsilon=c["norm_eps"],
        )


_BLOCK = {
    **{"norm1.linear": "modulation", "ff.net.0.proj": "mlp.linear_1", "ff.net.2": "mlp.linear_2"},
    **{"attn1.to_q": "attention.q", "attn1.to_k": "attention.k", "attn1.to_v": "attention.v"},
    "attn1.to_out.0": "attention.out",
}


def rules(config: DiTConfig) -> Rules:
    """The rename table. What embeds t and the label is the first block's."""
    return {
        "pos_embed.proj": "patch_embed",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "time_embed.linear_1",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "time_embed.linear_2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "class_embed",
        **{f"transformer_blocks.{{i}}.{theirs}": f"blocks.{{i}}.{ours}" for theirs, ours in _BLOCK.items()},
        "proj_out_1": "modulation_out",
        "proj_out_2": "out",
    }


def reference(config: DiTConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have diffusers' names."""
    from ..reference.dit import ReferenceDiT

    assert config.num_classes is not None
    return ReferenceDiT(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch_size=config.patch_size,
        channels=config.channels,
        depth=config.depth,
        heads=config.num_heads,
        mlp_channels=config.mlp_width,
        classes=config.num_classes,
        time_features=config.time_features,
        frequency_shift=config.frequency_shift,
        epsilon=config.norm_epsilon,
        mlp_epsilon=config.mlp_norm_epsilon,
    )


FAMILY = Family(
    name="diffusers_dit",
    title="diffusers DiTTransformer2DModel",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    locate=locate,
    config_files=diffusers.config_files,
    config_section=section,
    hub_files=hub_files,
    beside=diffusers.beside,
)
