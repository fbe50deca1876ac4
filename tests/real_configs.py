"""Networks that people have, by the configs and flags that their sources publish: names, shapes and facts, no values.

Facts are the sources' own, named in each row: a repository and a file in it, or a hub id and a file there. What the
sources' scripts make of their flags (`create_model`, `UNet2DModel`) is written out in `guided` and `unet2d`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.families import FAMILIES, consistency, ho, lucidrains
from convert.families import diffusers_config as configs
from convert.writers import state_shapes
from jddim.config import LucidrainsConfig, ModelConfig, ScheduleConfig, UNetConfig

Files = Mapping[str, Mapping[str, Any]]
LINEAR, COSINE = ScheduleConfig("linear", 1000, 1e-4, 0.02), ScheduleConfig("cosine", 1000)


@dataclasses.dataclass(frozen=True)
class Row:
    """A published network. source: where its facts stand. told: those that --set takes, under the source's names.

    network, schedule, sampler: what it then is; of the sampler those facts that are not a plain DDPM's. said: the
    settings on the network and its training that the source spells out, where they are not all of `told`. preset: one
    that holds these, if there is one. files: configs as the source has them beside the weights, by their place in the
    folder, with the keys that concern the network, its training and sampling. sampling: the sampler's facts that they
    alone tell. asked: what `told` has to add to them. refused: why they are. alone: whether the weights can be had
    without them. wrong: a setting that the tensors contradict. prefix, beside: of the names in the file, and what else
    is there. millions: of parameters, where the source's model card, file name or file size says about how many.
    """

    source: str
    family: str
    network: ModelConfig
    told: Mapping[str, str]
    schedule: ScheduleConfig = LINEAR
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    said: frozenset[str] | None = None
    preset: str | None = None
    files: Files = dataclasses.field(default_factory=dict)
    weights: str = "weights.safetensors"
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    asked: tuple[str, ...] = ()
    refused: str = ""
    alone: bool = True
    wrong: tuple[str, str] = ("", "")
    prefix: str = ""
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    millions: float | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the source's own state dict."""
        options = {"use_new_attention_order": False} if self.family == "openai" else {}
        return state_shapes(lambda: FAMILIES[self.family].reference(self.network, **options))

    def write(self, folder: Path) -> Path:
        """The source's files, the weights among them without values: a hole in the file. Returns the weights' path."""
        for name, contents in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(contents))  # YAML too
        path = folder / (self.weights if self.files else "weights.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        return hollow(path, {self.prefix + name: shape for name, shape in self.shapes().items()} | dict(self.beside))


def hollow(path: Path, tensors: Mapping[str, Any]) -> Path:
    """A .safetensors file of float32 arrays; of those that are only shapes the numbers are a hole, which reads as 0."""
    header, values, at = {}, {}, 0
    for name, value in tensors.items():
        shape = value if isinstance(value, tuple) else value.shape
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        values |= {at: value} if isinstance(value, np.ndarray) else {}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start, value in values.items():
            file.seek(8 + len(text) + start)
            file.write(value.astype("<f4").tobytes())
        file.truncate(8 + len(text) + at)
    return path


# -- diffusers --------------------------------------------------------------------------------------------------------


def unet2d(config: Mapping[str, Any]) -> UNetConfig:
    """The network that diffusers makes of a config.json; that it is, the parity tests compare."""
    return configs.unet_config(configs.read_configs({"unet": config}, {}))


def spelled(config: Mapping[str, Any]) -> dict[str, str]:
    """A config.json or scheduler_config.json, its class's defaults among it, as --set takes it."""
    keys = {key: option.default for part in (configs.UNET, configs.SCHEDULER) for key, option in part.items()}
    values = {key: config.get(key, default) for key, default in keys.items()}
    return {key: _set(value) for key, value in values.items()}


def _set(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "None" if value is None else str(value)


CLASS = {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "layers_per_block": 2}
OF_HO = CLASS | {
    **{"act_fn": "silu", "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0},
    **{"flip_sin_to_cos": False, "freq_shift": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6},
    **{"norm_num_groups": 32, "time_embedding_type": "positional"},
}
OF_LEVELS = {
    4: {
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    6: {
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    },
}
BUTTERFLIES = {
    "block_out_channels": [64, 128, 128, 256],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}
DIGITS = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
LATENT = {
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    **{"sample_size": 64, "attention_head_dim": 32},
}
CONSISTENCY = {
    "block_out_channels": [192, 384, 576, 768],
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    **{"attention_head_dim": 64, "attn_norm_num_groups": 32, "downsample_type": "resnet", "upsample_type": "resnet"},
    **{"layers_per_block": 3, "num_class_embeds": 1000, "resnet_time_scale_shift": "scale_shift", "sample_size": 64},
}
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
DDPM |= {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True, "variance_type": "fixed_small"}
FLAT = ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
FOLDERS = ("unet/config.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors")


def of_diffusers(
    source: str,
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any] = DDPM,
    places: tuple[str, str, str] = FOLDERS,
    index: Files | None = None,
    **fields: Any,
) -> Row:
    """A pipeline's folder; and its weights alone, of which --set tells what the two configs do."""
    files = {places[0]: network, places[1]: scheduler, **(index or {})}
    told = spelled({**network, **scheduler}) | {"condition_first": "false"}
    trained = {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end"}
    fields = {"sampler": {"spacing": "leading"}, "wrong": ("layers_per_block", "1")} | fields
    fields |= {"said": frozenset(network.keys() | trained), "weights": places[2], "files": files}
    fields.setdefault("sampling", {"variance": scheduler.get("variance_type")})
    return Row(source, "diffusers", unet2d(network), told, **fields)


_256 = OF_HO | OF_LEVELS[6] | {"sample_size": 256}
DIFFUSERS = {
    "ddpm-cifar10-32": of_diffusers(
        "google/ddpm-cifar10-32, config.json and scheduler_config.json",
        OF_HO | OF_LEVELS[4] | {"sample_size": 32},
        DDPM | {"variance_type": "fixed_large"},
        FLAT,
        millions=35.7,  # Ho et al. 2020, appendix B
    ),
    **{
        name: of_diffusers(f"google/{name}, config.json and scheduler_config.json", _256, DDPM, FLAT, millions=113.7)
        for name in ("ddpm-cat-256", "ddpm-celebahq-256", "ddpm-ema-church-256")  # their files have 455 MB
    },
    "the training script": of_diffusers(
        "huggingface/diffusers, examples/unconditional_image_generation/train_unconditional.py",
        CLASS | OF_LEVELS[6] | {"sample_size": 64},
    ),
    "the course's butterflies": of_diffusers(
        "huggingface/diffusion-models-class, unit1/01_introduction_to_diffusers.ipynb",
        CLASS | BUTTERFLIES | {"sample_size": 32},
    ),
    "the course's digits by class": dataclasses.replace(
        of_diffusers(
            "huggingface/diffusion-models-class, unit2/02_class_conditioned_diffusion_model_example.ipynb",
            CLASS | DIGITS | {"sample_size": 28, "in_channels": 1 + 4, "out_channels": 1},
            DDPM | {"beta_schedule": "squaredcos_cap_v2"},
            schedule=COSINE,
            prefix="model.",
            beside={"class_emb.weight": (10, 4)},  # whose rows are the four channels beside x_t, after it
        ),
        files={},  # a module of the notebook's own, so a bare state dict
    ),
    "ldm-celebahq-256": of_diffusers(
        "CompVis/latent-diffusion, models/ldm/celeba256/config.yaml; CompVis/ldm-celebahq-256, model_index.json",
        CLASS | LATENT,
        DDPM
        | {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
        | {"clip_sample": False},
        index={
            "model_index.json": {
                **{"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]},
                **{"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]},
            }
        },
        refused="a network of latents, and its first stage does not lie with it",
        alone=False,
    ),
    "diffusers-cd": of_diffusers(
        "openai/diffusers-cd_imagenet64_l2, unet/config.json and scheduler/scheduler_config.json",
        CLASS | CONSISTENCY,
        {
            **{"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40, "sigma_min": 0.002},
            **{"sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "s_noise": 1.0, "clip_denoised": True},
        },
        refused="a CMStochasticIterativeScheduler's: its process is a consistency model's, not DDIM's",
        alone=False,
    ),
    "audio that is not square": of_diffusers(
        "teticio/audio-diffusion, scripts/train_unet.py, of spectrograms of 64x256",
        CLASS | OF_LEVELS[6] | {"sample_size": [64, 256], "in_channels": 1, "out_channels": 1},
    ),
}

# -- Ho et al.'s ------------------------------------------------------------------------------------------------------


def of_ermongroup(side: int, ch_mult: tuple[int, ...], var_type: str) -> dict[str, Any]:
    """A config.yml as ermongroup's, in which the sides, the multipliers and the variance differ."""
    return {
        "data": {"image_size": side, "channels": 3, "random_flip": True, "rescaled": True},
        "model": {
            **{"type": "simple", "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": list(ch_mult)},
            **{"num_res_blocks": 2, "attn_resolutions": [16], "resamp_with_conv": True, "var_type": var_type},
        },
        "diffusion": {
            **{"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000}
        },
    }


def of_ho(
    source: str, side: int, ch_mult: tuple[int, ...], var_type: str, preset: str | None, millions: float | None = None
) -> Row:
    config = of_ermongroup(side, ch_mult, var_type)
    told = {key: _set(value) for part in config.values() for key, value in part.items() if key in ho.SETTINGS}
    levels = tuple(level for level in range(len(ch_mult)) if side // 2**level == 16)
    network = UNetConfig(
        (side, side), 3, 3, channels=128, channel_mults=ch_mult, num_res_blocks=2, attention_levels=levels
    )
    return Row(
        *(source, "ho", network, told, LINEAR, {"spacing": "uniform", "clip": False}),
        said=frozenset(told.keys() - {"var_type"}),
        preset=preset,
        files={"config.yml": config},
        sampling={"variance": var_type.replace("fixed", "fixed_")},
        wrong=("ch", "64"),
        millions=millions,
    )


_SIX = (1, 1, 2, 2, 4, 4)
HO = {
    "ermongroup's CIFAR-10": of_ho(
        "ermongroup/ddim, configs/cifar10.yml", 32, (1, 2, 2, 2), "fixedlarge", "cifar10", 35.7
    ),
    "ermongroup's CelebA": of_ho("ermongroup/ddim, configs/celeba.yml", 64, (1, 2, 2, 2, 4), "fixedlarge", None),
    "ermongroup's LSUN bedroom": of_ho(
        "ermongroup/ddim, configs/bedroom.yml", 256, _SIX, "fixedsmall", "lsun_bedroom", 113.7
    ),
    "ermongroup's LSUN church": of_ho("ermongroup/ddim, configs/church.yml", 256, _SIX, "fixedsmall", "lsun_church"),
    "SDEdit's CelebA-HQ": of_ho("ermongroup/SDEdit, configs/celeba.yml", 256, _SIX, "fixedsmall", "celebahq"),
    "DiffusionCLIP's CelebA-HQ": of_ho(
        "gwang-kim/DiffusionCLIP, configs/celeba.yml", 256, _SIX, "fixedsmall", "celebahq"
    ),
}

# -- OpenAI's and their forks -----------------------------------------------------------------------------------------

_MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
_MULTIPLIERS |= {32: (1, 2, 2, 2)}


def guided(flags: Mapping[str, str]) -> UNetConfig:
    """The network that `create_model`, or `sr_create_model` for a small_size, makes of flags, in both repositories."""
    side, channels = int(flags.get("large_size") or flags["image_size"]), int(flags["num_channels"])
    upsampler = "small_size" in flags
    mults = _MULTIPLIERS[256 if upsampler and side == 512 else side]
    factors = [side // int(resolution) for resolution in flags["attention_resolutions"].split(",")]
    head_width = int(flags["num_head_channels"])
    classes = 1000 if flags["class_cond"] == "True" else None
    resample = ("resnet" if flags["resblock_updown"] == "True" else "conv",)
    return UNetConfig(
        image_size=(side, side),
        in_channels=3,
        out_channels=6 if flags["learn_sigma"] == "True" else 3,
        condition_channels=3 if upsampler else 0,
        channels=channels,
        channel_mults=mults,
        stem_channels=None if mults[0] == 1 else int(mults[0] * channels),
        num_res_blocks=int(flags["num_res_blocks"]),
        attention_levels=tuple(level for level in range(len(mults)) if 2**level in factors),
        num_heads=int(flags["num_heads"]) if head_width == -1 else 1,
        head_channels=None if head_width == -1 else head_width,
        downsample=resample,
        upsample=resample,
        scale_shift=flags["use_scale_shift_norm"] == "True",
        class_embedding=None if classes is None else "learned",
        num_classes=classes,
        symmetric_padding=True,
        norm_epsilon=1e-5,
        cosine_first=True,
        frequency_shift=0.0,
        divide_last=True,
    )


# script_util.py: model_and_diffusion_defaults of each
_DEFAULTS = {
    **{"num_res_blocks": "2", "num_heads": "4", "num_heads_upsample": "-1", "num_head_channels": "-1"},
    **{"attention_resolutions": "16,8", "channel_mult": "", "dropout": "0.0", "class_cond": "False"},
    **{"use_checkpoint": "False", "use_scale_shift_norm": "True", "use_fp16": "False", "num_channels": "128"},
    **{"learn_sigma": "False", "diffusion_steps": "1000", "noise_schedule": "linear", "timestep_respacing": ""},
    **{"use_kl": "False", "predict_xstart": "False", "rescale_timesteps": "False", "rescale_learned_sigmas": "False"},
    **{"resblock_updown": "False", "use_new_attention_order": "False"},
}
_IMPROVED = _DEFAULTS | {"rescale_timesteps": "True", "rescale_learned_sigmas": "True"}


def of_openai(source: str, defaults: Mapping[str, str], flags: str, preset: str | None = None, **fields: Any) -> Row:
    """flags: as on the command line, `--name value` each."""
    words = flags.split()
    told = {**defaults, **dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))}
    told = {"image_size": told.get("large_size", ""), **told}  # by which sr_create_model's large_size goes
    T, learned = int(told["diffusion_steps"]), told["learn_sigma"] == "True"
    schedule = ScheduleConfig("cosine", T)
    if told["noise_schedule"] == "linear":
        schedule = ScheduleConfig("linear", T, 0.1 / T, 20 / T)
    rescaled = told["rescale_timesteps"] == "True"
    sampler = {"spacing": "openai_ddim", "rederive_eps": True, "timestep_scale": 1000 / T if rescaled else 1.0}
    sampler |= {"variance": "learned_range" if learned else "fixed_large"}
    fields = {"wrong": ("class_cond", "no" if told["class_cond"] == "True" else "yes")} | fields
    return Row(source, "openai", guided(told), told, schedule, sampler, preset=preset, **fields)


GUIDED = "openai/guided-diffusion, README.md and guided_diffusion/script_util.py"
IMPROVED = "openai/improved-diffusion, README.md and improved_diffusion/script_util.py"
_ADM = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --num_channels 256 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True --noise_schedule linear "
)
_64_WIDE = "--num_head_channels 64 "
_FFHQ = (
    "--attention_resolutions 16 --class_cond False --diffusion_steps 1000 --dropout 0.0 --image_size 256 --learn_sigma "
    "True --noise_schedule linear --num_channels 128 --num_res_blocks 1 --num_head_channels 64 --resblock_updown True "
    "--use_fp16 False --use_scale_shift_norm True "
)
_COSINE_4000 = (
    "--num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine "
)
_PLAIN = "--rescale_learned_sigmas False --rescale_timesteps False "
_ADM_64 = (
    "--class_cond True --image_size 64 --noise_schedule cosine --num_channels 192 --num_res_blocks 3 --dropout 0.1 "
    "--use_new_attention_order True "
)
_SR = "--class_cond True --num_channels 192 --use_fp16 True "
_SR_256 = "--large_size 256 --small_size 64 "
_SR_512 = "--large_size 512 --small_size 128 --attention_resolutions 32,16 "
_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True --use_scale_shift_norm "
    "False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
)
_256_UNCOND = _ADM + _64_WIDE + "--class_cond False --image_size 256 --use_fp16 True "


def _yaml(names: str, told: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Flags as a YAML file has them: numbers and booleans as such."""
    plain = {"True": True, "False": False}
    values = {name: plain.get(told[name], told[name]) for name in names.split()}
    return {key: int(value) if str(value).isdigit() else value for key, value in values.items()} | more


_NETWORK = (
    "image_size num_channels num_res_blocks learn_sigma class_cond attention_resolutions num_heads num_head_channels "
    "num_heads_upsample use_scale_shift_norm dropout resblock_updown use_fp16 use_new_attention_order"
)
_DIFFUSION = ("diffusion_steps", "noise_schedule", "rescale_timesteps", "predict_xstart")


def _with(row: Row, contents: Mapping[str, Any], **fields: Any) -> Row:
    return dataclasses.replace(row, files={"config.yml": contents}, **fields)


def _openai() -> dict[str, Row]:
    rows = {
        "guided-64": of_openai(GUIDED, _DEFAULTS, _ADM + _64_WIDE + _ADM_64, "guided-64", millions=295.9),
        "guided-128": of_openai(GUIDED, _DEFAULTS, _ADM + "--class_cond True --image_size 128", "guided-128"),
        "guided-256": of_openai(
            GUIDED, _DEFAULTS, _ADM + _64_WIDE + "--class_cond True --image_size 256", "guided-256", millions=553.8
        ),
        "guided-256-uncond": of_openai(GUIDED, _DEFAULTS, _256_UNCOND, "guided-256-uncond", millions=552.8),
        "guided-512": of_openai(
            GUIDED, _DEFAULTS, _ADM + _64_WIDE + "--class_cond True --image_size 512", "guided-512", millions=559.0
        ),
        "guided's LSUN": of_openai(GUIDED, _DEFAULTS, _256_UNCOND + "--dropout 0.1", "guided-lsun"),
        "guided's upsampler to 256": of_openai(GUIDED, _DEFAULTS, _ADM + _SR + _SR_256, "guided-64-256-upsampler"),
        "guided's upsampler to 512": of_openai(
            GUIDED, _DEFAULTS, _ADM + _64_WIDE + _SR + _SR_512, "guided-128-512-upsampler"
        ),
        "improved's CIFAR-10": of_openai(
            IMPROVED, _IMPROVED, _COSINE_4000 + "--image_size 32 --dropout 0.3", "improved-cifar10", millions=52.5
        ),
        "improved's CIFAR-10 by L_vlb": of_openai(
            IMPROVED, _IMPROVED, _COSINE_4000 + "--image_size 32 --dropout 0.3 --use_kl True", "improved-cifar10-vlb"
        ),
        "improved's ImageNet-64": of_openai(
            IMPROVED, _IMPROVED, _COSINE_4000 + "--image_size 64", "improved-imagenet64-uncond", millions=121.1
        ),
        "improved's ImageNet-64 by L_vlb": of_openai(
            IMPROVED, _IMPROVED, _COSINE_4000 + "--image_size 64 --use_kl True", "improved-imagenet64-uncond-vlb"
        ),
        "improved's ImageNet-64 by class": of_openai(
            IMPROVED,
            _IMPROVED,
            _COSINE_4000 + _PLAIN + "--image_size 64 --num_channels 192 --class_cond True",
            "improved-imagenet64-cond",
            millions=273.0,
        ),
        "improved's LSUN": of_openai(IMPROVED, _IMPROVED, _LSUN + _PLAIN, "improved-lsun-bedroom", millions=113.7),
        "improved's upsampler": of_openai(
            IMPROVED,
            _IMPROVED,
            "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True --diffusion_steps 4000 "
            "--noise_schedule linear --large_size 256 --small_size 64 " + _PLAIN,
        ),
        "P2's FFHQ": of_openai("jychoi118/P2-weighting, README.md", _DEFAULTS, _FFHQ, millions=93.6),
    }
    ffhq = of_openai(
        "DPS2022/diffusion-posterior-sampling, configs/model_config.yaml and configs/diffusion_config.yaml",
        _DEFAULTS,
        _FFHQ,
    )
    afhq = "gwang-kim/DiffusionCLIP, models/improved_ddpm/script_util.py and configs/"
    clip = of_openai(afhq + "afhq.yml", _DEFAULTS, _FFHQ)
    celeba = of_openai(
        "andreas128/RePaint, confs/test_c256_thick.yml",
        _DEFAULTS,
        _256_UNCOND + "--use_fp16 False",
        "guided-256-uncond",
    )
    ddrm = of_openai("bahjat-kawar/ddrm, configs/imagenet_256.yml", _DEFAULTS, _256_UNCOND, "guided-256-uncond")
    imagenet = of_openai(
        afhq + "imagenet.yml", _DEFAULTS, _ADM + _64_WIDE + "--class_cond True --image_size 512", "guided-512"
    )
    of_ddrm = {
        "data": {"dataset": "ImageNet", "image_size": 256, "channels": 3, "rescaled": True},
        "model": {"type": "openai", "in_channels": 3, "out_channels": 3, "resamp_with_conv": True}
        | _yaml(_NETWORK, ddrm.told),
        "diffusion": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
        "sampling": {"batch_size": 8, "last_only": True},
    }
    return rows | {
        "DPS's FFHQ": _with(ffhq, _yaml(_NETWORK, ffhq.told, channel_mult=""), asked=_DIFFUSION),
        "RePaint's CelebA-HQ": _with(
            celeba,
            _yaml(
                f"{_NETWORK} diffusion_steps noise_schedule predict_xstart rescale_timesteps rescale_learned_sigmas",
                celeba.told,
                timestep_respacing="250",
                data={"eval": {"lama_c256_thick_n100_test": {"image_size": 256, "class_cond": False}}},
            ),
            sampling={"spacing": "openai", "num_steps": 250},
        ),
        "DDRM's ImageNet": _with(ddrm, of_ddrm, asked=_DIFFUSION),
        # This source's YAML files are of Ho et al.'s network, whatever the weights are of.
        "DiffusionCLIP's AFHQ": _with(
            clip,
            of_ermongroup(256, _SIX, "fixedsmall"),
            refused="num_res_blocks is 2 by the flags, but 1",
        ),
        "DiffusionCLIP's ImageNet": _with(imagenet, of_ermongroup(512, _SIX, "fixedsmall")),
    }


# -- OpenAI's consistency models --------------------------------------------------------------------------------------


def of_consistency(flags: str, mode: str, preset: str, **fields: Any) -> Row:
    """flags: of scripts/launch.sh, over the defaults of cm/script_util.py."""
    words = flags.split()
    own = {"attention_resolutions": "32,16,8", "sigma_min": "0.002", "sigma_max": "80.0", "weight_schedule": "karras"}
    taken = {key: value for key, value in (_DEFAULTS | own).items() if key in consistency.SETTINGS}
    taken |= dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    sampler = {"spacing": "karras", "rederive_eps": True, "prediction_type": "edm", "timestep_scale": 250.0}
    return Row(
        "openai/consistency_models, scripts/launch.sh and cm/script_util.py",
        *(
            "consistency",
            guided(taken),
            taken | {"training_mode": mode},
            ScheduleConfig("edm", t_min=0.002, t_max=80.0),
        ),
        sampler | {"boundary": mode != "edm", "num_steps": 40 if mode == "edm" else 1},
        preset=preset,
        wrong=("class_cond", "no" if taken["class_cond"] == "True" else "yes"),
        **fields,
    )


_CM_64 = (
    "--class_cond True --use_scale_shift_norm True --image_size 64 --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 3 --resblock_updown True --use_fp16 True "
)
_CM_256 = (
    "--class_cond False --use_scale_shift_norm False --image_size 256 --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True "
)
CONSISTENCY_MODELS = {
    f"{prefix} of {data}": of_consistency(flags, mode, f"{prefix}_{data}")
    for prefix, mode in (("edm", "edm"), ("cd", "consistency_distillation"), ("ct", "consistency_training"))
    for data, flags in (("imagenet64", _CM_64), ("lsun256", _CM_256))
}


# -- lucidrains' ------------------------------------------------------------------------------------------------------


def of_lucidrains(source: str, channels: int, mults: tuple[int, ...], side: int) -> Row:
    """A GaussianDiffusion around a Unet, whose arguments else are the classes' defaults, with its buffers."""
    levels = len(mults)
    network = LucidrainsConfig(
        image_size=(side, side),
        in_channels=channels,
        out_channels=channels,
        channels=64,
        channel_mults=mults,
        stem_channels=64,
        full_attention=(*[False] * (levels - 1), True),
        num_heads=(4,) * levels,
        head_channels=(32,) * levels,
    )
    schedule = ScheduleConfig("sigmoid_alpha_bar", 1000)
    told = {"image_size": str(side), "auto_normalize": "True", "sinusoidal_pos_emb_theta": "10000"}
    sampler = {"spacing": "linspace", "num_steps": 250, "rederive_eps": True, "prediction_type": "v_prediction"}
    beside = lucidrains.buffers(schedule, "pred_v")
    return Row(
        *(source, "lucidrains", network, told, schedule, sampler),
        said=frozenset({"image_size"}),
        wrong=("dim", "32"),
        prefix="model.",
        beside=beside,
    )


LUCIDRAINS = {
    "lucidrains' README": of_lucidrains("lucidrains/denoising-diffusion-pytorch, README.md", 3, (1, 2, 4, 8), 128),
    "lucidrains' MNIST": of_lucidrains("SeungyounShin/gp-diffusion, train_mnist.py", 1, (1, 2, 4), 28),
}

ROWS: dict[str, Row] = DIFFUSERS | _openai() | CONSISTENCY_MODELS | HO | LUCIDRAINS
