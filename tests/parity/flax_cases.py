"""What golden/flax.npz holds: diffusers' Flax schedulers and first stage, called in one way for theirs and for jddim's.

`module` is `diffusers` 0.39 or `jddim.compat.diffusers_flax`.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "flax.npz"
SHAPE = (3, 2, 1, 5)
DTYPES = ("float32", "float64")
BETAS = [0.01, 0.02, 0.05, 0.1, 0.11, 0.15, 0.2, 0.3, 0.31, 0.33, 0.4]
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 101, "prediction_type": "v_prediction"}
GIVEN = {"trained_betas": BETAS, "num_train_timesteps": len(BETAS), "prediction_type": "sample"}
DDIM: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 7),
    "latents": ({"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, **LATENT}, 5),
    "cosine, v": ({"clip_sample_range": 0.7, **COSINE}, 6),
    "given betas, x0": (GIVEN, 3),
    "given betas, x0, to t = 0": ({"set_alpha_to_one": False, **GIVEN}, 5),
}
DDPM: dict[str, dict[str, Any]] = {
    "plain": {},
    "large, unclipped": {"variance_type": "fixed_large", "clip_sample": False, **LATENT},
    "cosine, v": COSINE,
    "given betas, x0": {"variance_type": "fixed_large", **GIVEN},
}
STAGE: dict[str, Any] = {
    **{"block_out_channels": (8, 12), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 3},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    **{"sample_size": 14, "scaling_factor": 0.6},
}


def normal(seed: int, *shape: int, dtype: str = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def ddim(module: Any, name: str, dtype: str) -> dict[str, np.ndarray]:
    """A run at eta 0, the prediction of each step drawn; and what training uses."""
    settings, steps = DDIM[name]
    scheduler = module.FlaxDDIMScheduler(**settings, dtype=jnp.dtype(dtype))
    state = scheduler.create_state()
    found = common(scheduler, state, dtype)
    state = scheduler.set_timesteps(state, steps, SHAPE)
    x, run = normal(0, *SHAPE, dtype=dtype), []
    for i, t in enumerate(state.timesteps):
        x = scheduler.scale_model_input(state, x, t)
        x = scheduler.step(state, normal(1 + i, *SHAPE, dtype=dtype), t, x).prev_sample
        run.append(x)
    return found | {"timesteps": np.asarray(state.timesteps), "run": np.asarray(run)}


def ddpm(module: Any, name: str, dtype: str) -> dict[str, np.ndarray]:
    """Four steps with a key, each from an x_t of its own; and what training uses."""
    scheduler = module.FlaxDDPMScheduler(**DDPM[name], dtype=jnp.dtype(dtype))
    state = scheduler.create_state()
    found = common(scheduler, state, dtype)
    state = scheduler.set_timesteps(state, 5, SHAPE)
    T = scheduler.config.num_train_timesteps
    run = [
        scheduler.step(
            *(state, normal(i, *SHAPE, dtype=dtype), t, normal(9 + i, *SHAPE, dtype=dtype)),
            *(jax.random.key(i), False),
        )[0]
        for i, t in enumerate((T - 1, T // 2, 1, 0))
    ]
    return found | {"timesteps": np.asarray(state.timesteps), "run": np.asarray(run)}


def common(scheduler: Any, state: Any, dtype: str) -> dict[str, np.ndarray]:
    t = jnp.array([0, len(scheduler) // 2, len(scheduler) - 1])
    x, noise = normal(20, *SHAPE, dtype=dtype), normal(21, *SHAPE, dtype=dtype)
    return {
        "alphas_cumprod": np.asarray(state.common.alphas_cumprod)[:: max(1, len(scheduler) // 10)],
        "ends": np.asarray([state.final_alpha_cumprod if hasattr(state, "final_alpha_cumprod") else 1.0]),
        "noisy": np.asarray(scheduler.add_noise(state, x, noise, t)),
        "velocity": np.asarray(scheduler.get_velocity(state, x, noise, t)),
    }


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter's random numbers: norms' scales about 1, biases about 0, kernels as large as keeps their input so."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    scale = 0.2 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5
    return (name.endswith("scale") + scale * draw).astype(np.float32)


def first_stage(model: Any, params: Any) -> dict[str, np.ndarray]:
    images, z = normal(30, 2, 3, 10, 14), normal(31, 2, 3, 5, 7)
    variables = {"params": params}
    gaussian = model.apply(variables, images, deterministic=True, method=model.encode).latent_dist
    return {
        "mean": np.asarray(gaussian.mode()),
        "logvar": np.asarray(gaussian.logvar),
        "sample": np.asarray(gaussian.sample(jax.random.key(3))),
        "decoded": np.asarray(model.apply(variables, z, method=model.decode).sample),
        "decoded, channels last": np.asarray(
            model.apply(variables, gaussian.mean, True, False, method=model.decode)[0]
        ),
        "there and back": np.asarray(model.apply(variables, images, deterministic=True).sample),
    }
