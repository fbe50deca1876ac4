"""A sweep's rows are `sample`'s, whatever shares a call."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, small_config

import jddim
from jddim.config import SamplerConfig
from jddim.scale.sweeping import sweep
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.unoptimised

KEY = jax.random.key(7)
ETAS = [0.0, 0.3, 0.65, 0.9, 1.0]


@pytest.fixture(scope="module")
def ddim() -> jddim.DDIM:
    model = random_model(small_config(class_embedding="learned", num_classes=3))
    return jddim.DDIM(model, linear_schedule(300), SamplerConfig(num_steps=5))


@pytest.fixture(scope="module")
def rows(ddim: jddim.DDIM):
    return sweep(ddim, KEY, 3, ETAS, labels=[0, 2, 1])


def test_each_row_is_a_sample(ddim: jddim.DDIM, rows) -> None:
    chex.assert_shape(rows, (5, 3, 6, 10, 1))
    for eta, row in zip(ETAS, rows, strict=True):
        # a batch of another size has other kernels: rounding, through five steps of a random network
        chex.assert_trees_all_close(row, ddim.sample(KEY, 3, eta=eta, labels=[0, 2, 1]), atol=1e-3, rtol=1e-3)
    assert np.abs(np.asarray(rows[4] - rows[0])).mean() > 0.05


@pytest.mark.parametrize("rows_at_once", [2, 9])
def test_rows_at_once(ddim: jddim.DDIM, rows, rows_at_once: int) -> None:
    again = sweep(ddim, KEY, 3, ETAS, labels=[0, 2, 1], rows_at_once=rows_at_once)
    chex.assert_trees_all_close(again, rows, atol=1e-3, rtol=1e-3)


def test_rows_at_once_share_one_program(ddim: jddim.DDIM) -> None:
    traced = []

    @jax.tree_util.register_static
    class Counted:
        config = small_config()
        dtype = jnp.float32

        def __call__(self, x_t, t):
            traced.append(x_t.shape)
            return 0.5 * x_t

    counted = jddim.DDIM(Counted(), ddim.schedule, ddim.sampler)
    sweep(counted, KEY, 3, ETAS, rows_at_once=2)
    assert len(traced) == 1


def test_what_a_sweep_refuses(ddim: jddim.DDIM) -> None:
    labels = [0, 2, 1]
    with pytest.raises(ValueError, match=r"sweep: eta must be a finite number >= 0, got -0.1"):
        sweep(ddim, KEY, 3, [0.0, -0.1], labels=labels)
    with pytest.raises(ValueError, match="eta 9 is too large for this table"):
        sweep(ddim, KEY, 3, [0.0, 9.0], labels=labels)
    with pytest.raises(ValueError, match="etas must be a list"):
        sweep(ddim, KEY, 3, 0.5, labels=labels)
    with pytest.raises(ValueError, match="rows_at_once must be at least 1, got 0"):
        sweep(ddim, KEY, 3, ETAS, labels=labels, rows_at_once=0)
    with pytest.raises(ValueError, match="keeps no trajectory"):
        sweep(ddim, KEY, 3, ETAS, labels=labels, trajectory_every=1)
    with pytest.raises(ValueError, match="sweep: this network is class-conditional"):
        sweep(ddim, KEY, 3, ETAS)


def test_a_nan_names_the_eta(ddim: jddim.DDIM) -> None:
    @jax.tree_util.register_static
    class Breaks:
        config = small_config()
        dtype = jnp.float32

        def __call__(self, x_t, t):
            return jnp.where(jnp.abs(x_t) > 50, jnp.nan, 0.1 * x_t)

    broken = jddim.DDIM(Breaks(), ddim.schedule, ddim.sampler)
    x_T = np.zeros((3, 6, 10, 1), np.float32)
    noise = np.full((5, 3, 6, 10, 1), 1e3, np.float32)
    with pytest.raises(
        FloatingPointError,
        match=r"of 3 images at each eta of \[0.0, 0.3, 1.0\], a NaN or infinity appeared in image 3 at step 2",
    ):
        sweep(broken, None, None, [0.0, 0.3, 1.0], x_T=x_T, noise=noise)
