"""Small checkpoints of the lucidrains family, every layer redrawn. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert.families.lucidrains import buffers, reference
from convert.writers import save_torch, state_shapes
from jddim.config import LucidrainsConfig, ScheduleConfig

SIZE = (6, 10)  # height and width differ from each other and from every width, so no axis can stand in for another
SETTINGS = {"image_size": "6x10"}
STEP = 3000
COSINE = ScheduleConfig("cosine", 100)


def small_config(**changes: Any) -> LucidrainsConfig:
    """Two levels, linear attention above and full below. changes: fields, over these."""
    fields: dict[str, Any] = {
        "image_size": SIZE,
        "full_attention": (False, True),
        "num_heads": (2, 2),
        "head_channels": (3, 3),
        "in_channels": 1,
        "out_channels": 1,
        "channels": 4,
        "channel_mults": (1, 2),
        "stem_channels": 4,
    }
    return LucidrainsConfig(**(fields | changes))


def draw(config: LucidrainsConfig, seed: int) -> dict[str, np.ndarray]:
    """A Unet's state dict: convolutions and linears N(0, 1 / fan_in), norms near 1, memory N(0, 1), biases N(0, 0.04).

    The output is made small, so that an untrained network samples without multiplying rounding.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in state_shapes(lambda: reference(config)).items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith(".g"):
            value = 1 + 0.2 * value
        elif value.ndim == 1:
            value = 0.2 * value
        elif not name.endswith("mem_kv"):
            value = value * np.prod(shape[1:]) ** -0.5
        tensors[name] = (0.3 * value if name.startswith("final_conv") else value).astype(np.float32)
    return tensors


def diffusion(unet: dict[str, np.ndarray], schedule: ScheduleConfig, objective: str) -> dict[str, np.ndarray]:
    """A GaussianDiffusion's state dict around a Unet's."""
    return buffers(schedule, objective) | {f"model.{name}": value for name, value in unet.items()}


def trainer(config: LucidrainsConfig, schedule: ScheduleConfig = COSINE, objective: str = "pred_v") -> dict[str, Any]:
    """What the Trainer saves, as NumPy arrays: EMA weights of seed 1, raw ones of seed 2."""
    ema, raw = (diffusion(draw(config, seed), schedule, objective) for seed in (1, 2))
    shadow = {"initted": np.array(True), "step": np.array(STEP)}
    shadow |= {f"online_model.{name}": value for name, value in raw.items()}
    shadow |= {f"ema_model.{name}": value for name, value in ema.items()}
    optimizer = {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    contents = {"step": STEP, "model": raw, "opt": optimizer, "ema": shadow, "scaler": None}
    return {**contents, "version": "2.3.1"}


def write(path: Path, contents: Any) -> Path:
    """Write nested containers of NumPy arrays as torch.save does."""
    save_torch(contents, path)
    return path
