"""Inversion against diffusers' DDIMInverseScheduler and OpenAI's ddim_reverse_sample: every step, either precision."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jddim.ddim import step_table
from jddim.inversion import invert_loop
from jddim.schedule import NoiseSchedule, linear_schedule, scaled_linear_schedule, zero_terminal_snr
from jddim.timesteps import make_timesteps, previous_timesteps

T = 200
SHAPE = (3, 5, 7, 2)  # b, h, w, c
RANGES = {"none": None, "clip": (-1.0, 1.0), "narrow": (-0.6, 0.6)}
# of T = 200, 5 steps divide, 7 and 30 do not
DIFFUSERS_CASES = {
    " ".join(map(str, case)): case
    for case in itertools.product(
        ("linear", "zero snr"),
        (("leading", 0), ("leading", 1), ("trailing", 0)),
        (True, False),
        ("epsilon", "sample", "v_prediction"),
        RANGES,
        (5, 7, 30),
    )
}
OPENAI_CASES = {
    f"{spacing} {limit} {kind}": (spacing, limit, kind)
    for spacing, limit, kind in itertools.product(("ddim10", "10,3,5"), ("clip", "narrow"), ("epsilon", "sample"))
}


def curved(x: Any, t: Any, sin: Any) -> Any:
    """A network that is not linear, and another at every t."""
    return 0.8 * sin(1.3 * x + t / 20) + 0.1 * x


def images(dtype: Any) -> np.ndarray:
    return np.random.default_rng(2).uniform(-1, 1, SHAPE).astype(dtype)


def inverted(
    schedule: NoiseSchedule, spacing: str, S: int | None, offset: int, *, to_one: bool, dtype: Any, **how: Any
):
    """jddim's x_t at every step `(S, *SHAPE)`."""
    t = make_timesteps(spacing, T, S, offset)
    t_prev = previous_timesteps(t, spacing, T)
    table = step_table(schedule, t, dtype, timesteps_prev=t_prev, set_alpha_to_one=to_one)
    return np.asarray(_invert(jnp.asarray(images(dtype)), table, **how))


def _invert(x_0: jax.Array, table: Any, **how: Any) -> jax.Array:
    def denoise(x_t, t):
        return curved(x_t, t.astype(x_t.dtype)[:, None, None, None], jnp.sin)

    return jax.jit(lambda x: invert_loop(denoise, x, table, trajectory_every=1, **how)[1].x_t)(x_0)


def divides_by_zero(case: tuple) -> bool:
    """Whether diffusers divides by 1 - alpha_bar = 0 (an x0 predicted of the clean image), or by alpha_bar = 0."""
    betas, (spacing, _), to_one, prediction_type, _, S = case
    from_clean = spacing == "leading" or T % S == 0
    return (prediction_type == "sample" and to_one and from_clean) or (
        prediction_type == "epsilon" and betas == "zero snr" and spacing == "trailing"
    )


def diffusers_error(case: tuple, dtype: Any) -> float:
    """The largest error of any step over the largest magnitude."""
    import diffusers
    import torch

    betas, (spacing, offset), to_one, prediction_type, limit, S = case
    schedule = linear_schedule(T) if betas == "linear" else zero_terminal_snr(linear_schedule(T))
    scheduler = diffusers.DDIMInverseScheduler(
        num_train_timesteps=T,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=limit != "none",
        clip_sample_range=0.6 if limit == "narrow" else 1.0,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=betas == "zero snr",
    )
    scheduler.set_timesteps(S)
    # Stepped in float64. Its own alphas_cumprod are multiplied up in float32, and 1 - alphas_cumprod[0] then is 3e-4 of
    # itself off, which an x0 predicted near the clean image shows; ours, float64, replace them.
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
    if not to_one:
        scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
    x_t = torch.from_numpy(images(dtype)).double()
    expected = []
    for t in scheduler.timesteps:
        x_t = scheduler.step(curved(x_t, int(t), torch.sin), t, x_t).prev_sample
        expected.append(x_t.numpy())
    actual = inverted(
        schedule,
        spacing,
        S,
        offset,
        to_one=to_one,
        dtype=dtype,
        convention="diffusers",
        prediction_type=prediction_type,
        clip_range=RANGES[limit],
    )
    return float(np.abs(actual - np.array(expected)).max() / np.abs(expected).max())


def openai_error(case: tuple, dtype: Any) -> float:
    """The same, of ddim_reverse_sample's semantics over SpacedDiffusion's steps, here in float64 NumPy.

    At index i of the kept timesteps: the network's x0, clipped; eps re-derived from it at alphas_cumprod[i]; the mean
    at alphas_cumprod_next[i], which is 0 after the last.
    """
    spacing, limit, prediction_type = case
    schedule = scaled_linear_schedule(T)
    kept = make_timesteps(spacing, T)[::-1]
    alphas_cumprod = schedule.alphas_cumprod[kept]
    alphas_cumprod_next = [*alphas_cumprod[1:], 0.0]
    low, high = RANGES[limit]
    x = images(dtype).astype(np.float64)
    expected = []
    for i, t in enumerate(kept):
        recip, recipm1 = np.sqrt(1 / alphas_cumprod[i]), np.sqrt(1 / alphas_cumprod[i] - 1)
        output = curved(x, t, np.sin)
        x0 = (output if prediction_type == "sample" else recip * x - recipm1 * output).clip(low, high)
        eps = (recip * x - x0) / recipm1
        x = x0 * np.sqrt(alphas_cumprod_next[i]) + np.sqrt(1 - alphas_cumprod_next[i]) * eps
        expected.append(x)
    actual = inverted(
        schedule,
        spacing,
        None,
        0,
        to_one=True,
        dtype=dtype,
        convention="openai",
        prediction_type=prediction_type,
        clip_range=(low, high),
        rederive_eps=True,
    )
    return float(np.abs(actual - np.array(expected)).max() / np.abs(expected).max())
