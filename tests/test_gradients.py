"""Gradients through the sampler: right in float64, and with `jax.checkpoint` around the denoiser flat in S."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, small_config

import jddim
from jddim.config import SamplerConfig
from jddim.ddim import step_table
from jddim.sampling import sample_loop
from jddim.schedule import linear_schedule
from jddim.timesteps import linspace_timesteps

SCHEDULE = linear_schedule(300)
KEY = jax.random.key(2)
pytestmark = pytest.mark.unoptimised


def memory(ddim: jddim.DDIM, steps: int, *, remat: bool) -> int:
    """Bytes that the gradient with respect to x_T and the model needs beside its arguments and results."""
    table = ddim.table(steps)

    def loss(model, x_T):
        denoise = dataclasses.replace(ddim, model=model).denoiser()
        return sample_loop(jax.checkpoint(denoise) if remat else denoise, x_T, table).sum()

    x_T = jax.ShapeDtypeStruct((5, 14, 14, 1), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True)).lower(ddim.model, x_T).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimised
def test_memory_is_flat_in_the_number_of_steps() -> None:
    model = random_model(small_config(image_size=(14, 14), channels=16, channel_mults=(1,), attention_levels=()))
    ddim = jddim.DDIM(model, SCHEDULE, SamplerConfig())
    ten, hundred = (memory(ddim, steps, remat=True) for steps in (10, 100))
    assert hundred <= 1.3 * ten, (ten, hundred)
    without = memory(ddim, 100, remat=False)
    assert without > 3 * hundred, (without, hundred)  # so that it is the checkpoint that keeps it flat


@pytest.mark.parametrize("clip_range", [None, (-1.0, 1.0)])
def test_against_finite_differences(clip_range) -> None:
    table = step_table(SCHEDULE, linspace_timesteps(300, 7), np.float64)
    with jax.enable_x64(True):
        x_T = jax.random.normal(KEY, (2, 3, 5, 1), jnp.float64)
        noise = jax.random.normal(jax.random.key(3), (7, *x_T.shape), jnp.float64)
        weights = jax.random.normal(jax.random.key(4), x_T.shape, jnp.float64)

        def loss(x_T, eta, gain):
            def denoise(x_t, t):
                return gain * jnp.sin(x_t + t.astype(x_t.dtype)[:, None, None, None] / 50) + 0.1 * x_t

            return (weights * sample_loop(denoise, x_T, table, eta=eta, noise=noise, clip_range=clip_range)).sum()

        at = (x_T, jnp.float64(0.6), jnp.float64(0.8))
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)
        directions = (jax.random.normal(jax.random.key(5), x_T.shape, jnp.float64), jnp.float64(1), jnp.float64(1))
        for i, direction in enumerate(directions):
            h = 1e-6
            up, down = (loss(*(a + s * h * direction if i == j else a for j, a in enumerate(at))) for s in (1, -1))
            along = float((gradients[i] * direction).sum())
            assert along == pytest.approx(float(up - down) / (2 * h), rel=1e-6)  # h^2, and 1e-16 / h
            assert abs(along) > 1e-3


def test_checkpointing_changes_no_gradient() -> None:
    model = random_model(small_config())
    table = step_table(SCHEDULE, linspace_timesteps(300, 5))
    x_T = jax.random.normal(KEY, (3, 6, 10, 1))

    def gradient(wrap):
        return jax.jit(jax.grad(lambda x: sample_loop(wrap(model), x, table, eta=0.5, key=KEY).sum()))(x_T)

    chex.assert_trees_all_close(gradient(jax.checkpoint), gradient(lambda f: f), rtol=1e-4, atol=1e-4)
