"""A padded table's rows are the runs that they stand for."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import step_table
from jddim.sampling import sample_loop
from jddim.scale.padding import padded, padded_loop
from jddim.schedule import linear_schedule, zero_terminal_snr
from jddim.timesteps import linspace_timesteps, quad_timesteps

pytestmark = pytest.mark.unoptimised

T, SHAPE = 300, (3, 5, 2)
SCHEDULE = linear_schedule(T)
TABLES = [
    step_table(SCHEDULE, linspace_timesteps(T, 7)),
    step_table(SCHEDULE, quad_timesteps(T, 11)),
    step_table(SCHEDULE, [170, 40, 40]),  # a step to itself is a step, and with x0 clipped no identity
    step_table(SCHEDULE, [250]),
]
KEYS = jax.random.split(jax.random.key(1), 2)
X_T = jax.random.normal(jax.random.key(0), (2, *SHAPE))


def denoise(x_t, t):
    return 0.8 * jnp.sin(x_t + t.astype(x_t.dtype)[:, None, None, None] / 50) + 0.1 * x_t


def conditioned(x_t, t, x0_hat):
    return denoise(x_t, t) + 0.1 * x0_hat


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (denoise, {}),
        (denoise, {"eta": 0.7, "key": KEYS, "clip_range": (-1.0, 1.0)}),
        (conditioned, {"eta": jnp.array([0.0, 1.0]), "key": KEYS, "self_condition": True}),
    ],
)
def test_each_is_its_own_run(network, options: dict) -> None:
    made = jax.jit(lambda x: padded_loop(network, x, padded(TABLES), **options))(X_T)
    for table, x_0 in zip(TABLES, made, strict=True):
        chex.assert_trees_all_close(x_0, sample_loop(network, X_T, table, **options), atol=2e-5)


def test_a_gradient_through_rows_that_only_fill_up() -> None:
    gradient = jax.jit(jax.grad(lambda x: padded_loop(denoise, x, padded(TABLES[::3]))[1].sum()))(X_T)
    chex.assert_trees_all_close(gradient, jax.grad(lambda x: sample_loop(denoise, x, TABLES[3]).sum())(X_T), rtol=1e-4)


def test_the_table() -> None:
    table = padded(TABLES)
    assert table.num_steps == 11
    assert table.live.sum(axis=1).tolist() == [7, 11, 3, 1]
    np.testing.assert_array_equal(table.t[2], [170, 40, 40] + 8 * [40])
    np.testing.assert_array_equal(table.step[0], [*range(7), 6, 6, 6, 6])
    with pytest.raises(ValueError, match="at least one table"):
        padded([])
    with pytest.raises(ValueError, match="nothing of x0 at alpha_t = 0"):
        padded_loop(denoise, X_T, padded([step_table(zero_terminal_snr(SCHEDULE), [T - 1, 5])]))
    with pytest.raises(ValueError, match="give either key or noise"):
        padded_loop(denoise, X_T, padded(TABLES), eta=0.5)
