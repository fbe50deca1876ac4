"""Networks of sources whose own code cannot be installed here, and what golden/NAME.npz keeps of each.

A file holds, for each case, the names and shapes of the source's state dict (`CASE/shapes`, JSON; `CASE/fixed`: the
tensors that are not drawn) and the output of the source's own network (`CASE/eps`); runs of its own sampler
(`CASE/RUN`). Weights and inputs are drawn here, by name, and are not in the file. `make_source_golden.py` writes it,
`test_source_golden.py` holds jddim to it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.engine import fill
from convert.families import FAMILIES, Family, Plan
from jddim.models.building import abstract_model, flat_params

STEPS, ETA = 7, 0.6  # of the runs by DDIM
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
CFG_SCALE = 1.5  # of DiT's guided runs
VISITED = (0, 2, 5, 6)  # of a consistency model's STEPS noise levels, the last of which ends the run
INPAINTER = "residual resampling"
UPSAMPLER = "guided-diffusion's SuperResModel"
GOLDEN = Path(__file__).parent / "golden"


class SourceCase(NamedTuple):
    network: dict[str, Any]  # of the source's class
    settings: dict[str, str]  # what its tensors do not tell
    size: tuple[int, int]
    channels: int
    t: tuple[float, ...]
    labels: tuple[int, ...] | None = None


SMALL: dict[str, Any] = {
    **{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "norm_num_groups": 4},
    "num_class_embeds": 3,
}
TRANSFORMER: dict[str, Any] = {
    **{"input_size": 10, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5},
}
OF_SDE: dict[str, Any] = {
    **{"image_size": 12, "num_channels": 3, "num_res_blocks": 1, "ch_mult": (1, 2), "attn_resolutions": (6,)},
    **{"skip_rescale": True, "resblock_type": "biggan", "progressive_input": "none", "fir": False},
}
SDE = {"image_size": "8x12", "sde": "vpsde"}
SDE_TIMES = (19, 13, 9, 4, 0)  # of "ddpm"'s runs by DDIM
OF_EDM: dict[str, Any] = {"img_resolution": 8, "img_channels": 3, "model_channels": 128, "num_blocks": 1}
SOURCES: dict[str, dict[str, SourceCase]] = {
    "dit": {
        "DiT": SourceCase(
            {**TRANSFORMER, "patch_size": 2},
            {"input_size": "10", "num_heads": "3", "num_sampling_steps": str(STEPS)},
            (10, 10),
            4,
            (0, 500, 999),
            (2, 5, 0),
        ),
        "SiT": SourceCase(
            {**TRANSFORMER, "patch_size": 5, "in_channels": 4, "mlp_ratio": 3.0},
            {"input_size": "10", "num_heads": "3", "model": "SiT", "num_sampling_steps": str(STEPS)},
            (10, 10),
            4,
            (0.0, 0.37, 1.0),
            (2, 5, 0),
        ),
    },
    "pytorch_ddpm": {
        "one block": SourceCase(
            {"T": 20, "ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1, "dropout": 0.1},
            {"img_size": "6x10", "beta_1": "0.001", "beta_T": "0.3"},
            (6, 10),
            3,
            (0, 7, 19),
        ),
        "three levels": SourceCase(
            {"T": 1000, "ch": 32, "ch_mult": [2, 1, 2], "attn": [0, 2], "num_res_blocks": 2, "dropout": 0.0},
            {"img_size": "8x12"},
            (8, 12),
            3,
            (999, 500),
        ),
    },
    "openai": {
        "latent-diffusion": SourceCase(
            {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": (1, 2)}
            | {"num_res_blocks": 1, "attention_resolutions": [2], "num_head_channels": 32},
            {"image_size": "6x10", "num_head_channels": "32"},
            (6, 10),
            3,
            (0, 7, 999),
        ),
        UPSAMPLER: SourceCase(
            {"image_size": 8, "in_channels": 3, "out_channels": 6, "model_channels": 32, "channel_mult": (1, 2)}
            | {"num_res_blocks": 1, "attention_resolutions": [2], "num_head_channels": 32, "num_classes": 5}
            | {"use_scale_shift_norm": True, "resblock_updown": True},
            {"large_size": "6x10", "small_size": "3x5", "num_head_channels": "32", "rescale_timesteps": "False"}
            | {"diffusion_steps": "40", "noise_schedule": "linear", "timestep_respacing": "ddim8"},
            (6, 10),
            6,
            (0, 39),
            (4, 0),
        ),
    },
    "consistency": {
        "edm": SourceCase(
            {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": (1, 2)}
            | {"num_res_blocks": 1, "attention_resolutions": (2,), "num_head_channels": 16, "num_classes": 5}
            | {"use_scale_shift_norm": True, "resblock_updown": True},
            {"image_size": "6x10", "num_head_channels": "16", "training_mode": "edm"},
            (6, 10),
            3,
            (-1553.652, 0.0, 1095.5067),  # 250 times the logarithms of 0.002, 1 and 80
            (4, 0, 2),
        ),
        "consistency": SourceCase(
            {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": (1, 1, 2)}
            | {"num_res_blocks": 2, "attention_resolutions": (1,), "num_heads": 2, "resblock_updown": True},
            {"image_size": "8x12", "num_heads": "2", "training_mode": "consistency_training", "sigma_min": "0.02"}
            | {"sigma_max": "20"},
            (8, 12),
            3,
            (-100.0, 748.9331),
        ),
    },
    "edm": {
        "DDPM++": SourceCase(
            OF_EDM
            | {"model_type": "SongUNet", "label_dim": 5, "augment_dim": 9, "channel_mult": [1, 2]}
            | {"attn_resolutions": [4]},
            {"class_name": "EDMPrecond"},
            (8, 12),
            3,
            (-1.5536520, 0.0, 1.0955067),  # a quarter of the logarithms of 0.002, 1 and 80
            (4, 0, 2),
        ),
        "NCSN++": SourceCase(
            OF_EDM
            | {"model_type": "SongUNet", "channel_mult": [1, 1, 1], "attn_resolutions": [8, 2], "sigma_data": 0.7}
            | {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
            | {"resample_filter": [1, 3, 3, 1]},
            {"class_name": "EDMPrecond", "sigma_data": "0.7"},
            (8, 12),
            3,
            (-1.5536520, 1.0955067),
        ),
        "ADM": SourceCase(
            OF_EDM | {"model_type": "DhariwalUNet", "label_dim": 5, "channel_mult": [1, 2], "attn_resolutions": [4]},
            {"class_name": "EDMPrecond"},
            (8, 12),
            3,
            (-1.5536520, 1.0955067),
            (4, 0),
        ),
    },
    "score_sde": {
        "ddpm": SourceCase(
            {**OF_SDE, "name": "ddpm", "nf": 32, "num_scales": 20, "num_res_blocks": 2, "attn_resolutions": (12, 6)}
            | {"continuous": False, "beta_max": 6.0},
            {**SDE, "continuous": "false", "beta_max": "6"},
            (8, 12),
            3,
            (0, 7, 19),
        ),
        "DDPM++": SourceCase(
            {**OF_SDE, "name": "ncsnpp", "nf": 128, "continuous": True},
            {**SDE, "continuous": "true", "skip_rescale": "true", "fir": "false"},
            (8, 12),
            3,
            (0.999, 413.7, 999.0),
        ),
        "NCSN++": SourceCase(
            {**OF_SDE, "name": "ncsnpp", "nf": 128, "ch_mult": (1, 1, 1), "attn_resolutions": (12, 3)}
            | {"continuous": True, "fir": True, "progressive_input": "residual"},
            {**SDE, "continuous": "true", "skip_rescale": "true"},
            (8, 12),
            3,
            (0.999, 999.0),
        ),
        "blocks of ddpm, rescaled": SourceCase(
            {**OF_SDE, "name": "ncsnpp", "nf": 128, "ch_mult": (1,), "attn_resolutions": ()}
            | {"continuous": True, "resblock_type": "ddpm"},
            {**SDE, "continuous": "true", "name": "ncsnpp", "skip_rescale": "true"},
            (4, 6),
            3,
            (0.999, 999.0),
        ),
    },
    "lucidrains": {
        "classifier-free": SourceCase(
            {"dim": 8, "num_classes": 3, "dim_mults": (1, 2), "init_dim": 6},
            {"image_size": "6x10", "sampling_timesteps": str(STEPS), "timesteps": "40"},
            (6, 10),
            3,
            (0, 7, 39),
            (2, 0, 3),
        ),
    },
    "palette": {
        INPAINTER: SourceCase(
            {"image_size": 8, "in_channel": 6, "out_channel": 3, "inner_channel": 32, "channel_mults": [1, 2]}
            | {"res_blocks": 1, "attn_res": [2, 16], "num_head_channels": 16},
            {"image_size": "6x10", "num_head_channels": "16", "schedule": "linear"}
            | {"n_timestep": "11", "linear_start": "1e-3", "linear_end": "0.5"},
            (6, 10),
            6,
            (0, 4, 10),
        ),
        "convolutions, new order": SourceCase(
            {"image_size": 8, "in_channel": 4, "out_channel": 2, "inner_channel": 32, "channel_mults": [1, 1, 2]}
            | {"res_blocks": 2, "attn_res": [1], "num_heads": 2, "use_new_attention_order": True}
            | {"use_scale_shift_norm": False, "resblock_updown": False},
            {"image_size": "8x12", "num_heads": "2", "use_new_attention_order": "true", "schedule": "quad"}
            | {"n_timestep": "9", "linear_start": "1e-3", "linear_end": "0.6"},
            (8, 12),
            4,
            (8, 3),
        ),
    },
    "openai_classifier": {
        "attention, blocks resample": SourceCase(
            {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 7, "num_res_blocks": 2}
            | {"attention_resolutions": (2,), "channel_mult": (1, 2), "num_head_channels": 16}
            | {"use_scale_shift_norm": True, "resblock_updown": True, "pool": "attention"},
            {"num_head_channels": "16"},
            (8, 8),
            3,
            (0, 7, 999),
        ),
        "adaptive, convolutions, three levels": SourceCase(
            {"image_size": 8, "in_channels": 1, "model_channels": 64, "out_channels": 5, "num_res_blocks": 1}
            | {"attention_resolutions": (1, 4), "channel_mult": (0.5, 1, 0.5), "num_head_channels": 32},
            {"num_head_channels": "32", "image_size": "8x12"},
            (8, 12),
            1,
            (999, 500),
        ),
    },
    "monai": {
        "core": SourceCase(
            SMALL | {"channels": (8, 16), "attention_levels": (False, True), "num_head_channels": (0, 4)},
            {"image_size": "6x10", "num_head_channels": "8,4", "norm_num_groups": "4"}
            | {"num_train_timesteps": "50", "schedule": "scaled_linear_beta", "beta_end": "0.2"}
            | {"prediction_type": "v_prediction", "clip_sample_min": "0"},
            (6, 10),
            1,
            (0, 7, 999),
            (2, 0, 1),
        ),
        "core, combined, without projections, resampling blocks": SourceCase(
            {**SMALL, "num_res_blocks": 2, "num_class_embeds": None, "channels": (4, 4, 8)}
            | {"attention_levels": (True, False, False), "num_head_channels": (4, 0, 8)}
            | {"resblock_updown": True, "include_fc": False, "use_combined_linear": True},
            {"image_size": "8x12", "num_head_channels": "4,1,8", "norm_num_groups": "4"},
            (8, 12),
            1,
            (999, 500),
        ),
        "Generative": SourceCase(
            SMALL | {"num_channels": (8, 16), "attention_levels": (False, True), "num_head_channels": 4},
            {"image_size": "6x10", "num_head_channels": "4", "norm_num_groups": "4"}
            | {"num_train_timesteps": "200", "beta_end": "0.1", "set_alpha_to_one": "false", "steps_offset": "1"},
            (6, 10),
            1,
            (0, 7, 999),
            (2, 0, 1),
        ),
    },
}


# What "attention, blocks resample" guides: arguments of UNetModel, of create_gaussian_diffusion, and both for --set.
GUIDED: dict[str, Any] = {
    **{"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1},
    **{"attention_resolutions": (2,), "channel_mult": (1, 2), "use_scale_shift_norm": True},
}
DIFFUSION: dict[str, Any] = {
    **{"steps": 400, "noise_schedule": "cosine", "learn_sigma": True, "rescale_timesteps": True},
    "timestep_respacing": "ddim8",
}
GUIDED_SETTINGS = {
    **{"image_size": "8", "num_heads": "1", "diffusion_steps": "400", "noise_schedule": "cosine"},
    **{"rescale_timesteps": "True", "timestep_respacing": "ddim8"},
}
CLASSES, SCALE = (0, 6, 2), 30.0


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's random numbers: norms' scales about 1, biases about 0, all others as large as keeps their input so."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        return (name.endswith("weight") + 0.2 * draw).astype(np.float32)
    return (draw * np.prod(shape[1:]) ** -0.5).astype(np.float32)


def images(case: SourceCase, *leading: int, seed: int) -> np.ndarray:
    """Standard normal numbers `(*leading, h, w, c)`."""
    return np.random.default_rng(seed).standard_normal((*leading, *case.size, case.channels), np.float32)


def mask_of(case: SourceCase) -> np.ndarray:
    """Zeros and ones `(h, w, 1)`, 1 where an image is made anew."""
    return (np.random.default_rng(4).random((*case.size, 1)) < 0.5).astype(np.float32)


def golden(source: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{source}.npz") as file:
        return dict(file)


def source_tensors(source: str, name: str) -> dict[str, np.ndarray]:
    """A case's state dict."""
    kept = golden(source)
    shapes = json.loads(str(kept[f"{name}/shapes"]))
    fixed = json.loads(str(kept.get(f"{name}/fixed", "{}")))
    tensors = {tensor: drawn(tensor, tuple(shape)) for tensor, shape in shapes.items()}
    return tensors | {tensor: np.array(value, np.float32) for tensor, value in fixed.items()}


def converted(source: str, name: str) -> tuple[Plan, dict[str, np.ndarray]]:
    """What jddim makes of it: the plan and the parameters."""
    return filled(FAMILIES[source], source_tensors(source, name), SOURCES[source][name].settings)


def filled(
    family: Family, state: dict[str, np.ndarray], settings: dict[str, str]
) -> tuple[Plan, dict[str, np.ndarray]]:
    """What jddim makes of a state dict: the plan and the parameters."""
    tensors = family.open_source(state, "file").tensors
    plan = family.plan(tensors, None, settings)
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(plan.model)).items()}
    return plan, fill({**tensors, **plan.implied}, expected, plan.rules, plan.ignored, family.pointwise)
