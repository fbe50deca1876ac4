"""The step, against scalar arithmetic, the paper's marginals, and the walk-through's wrong snippet."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import ddim_sigma, ddim_step, ddpm_step, largest_eta, predict_eps, predict_x0, step_table
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import cosine_schedule, linear_schedule
from jddim.timesteps import linspace_timesteps, quad_timesteps, uniform_timesteps

pytestmark = pytest.mark.quick

SHAPE = (5, 7, 3, 2)


def normals(*names: int, shape: tuple[int, ...] = SHAPE) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(name), shape) for name in names]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_by_hand(eta: float) -> None:
    """One pixel, every quantity by `math`: Eq. 9, 16 and 12."""
    a_t, a_prev, x_t, eps, z = 0.37, 0.81, 0.6, -1.3, 0.9
    x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a_t)) * math.sqrt(1 - a_t / a_prev)
    expected = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma**2) * eps + sigma * z
    one = jnp.ones((1, 1, 1, 1))
    actual_x0 = predict_x0(x_t * one, eps * one, a_t)
    actual = ddim_step(x_t * one, actual_x0, eps * one, z * one, alpha_bar_t=a_t, alpha_bar_prev=a_prev, eta=eta)
    # float32: a few roundings of numbers of order 1
    np.testing.assert_allclose(actual_x0.item(), x0, rtol=1e-6)
    np.testing.assert_allclose(actual.item(), expected, rtol=1e-6)
    np.testing.assert_allclose(predict_eps(x_t * one, actual_x0, a_t).item(), eps, rtol=1e-6)


def test_the_walkthroughs_snippet_is_another_update_when_eta_is_positive() -> None:
    """Its code has sqrt(1 - alpha_bar_prev) where its equation has sqrt(1 - alpha_bar_prev - sigma^2).

    The snippet's x_prev has sigma^2 too much variance. At eta = 1 in a 30-step table that is up to 0.06 of the pixels'
    unit variance, at every step.
    """
    table = step_table(linear_schedule(1000), linspace_timesteps(1000, 30), np.float64)
    x_t, x0, eps, noise = normals(0, 1, 2, 3, shape=(1000, 1))
    excess = []
    for a_t, a_prev in zip(table.alpha_bar_t[:-1], table.alpha_bar_prev[:-1], strict=True):
        for eta in (0.0, 1.0):
            sigma = ddim_sigma(a_t, a_prev, eta)
            right = ddim_step(x_t, x0, eps, noise, alpha_bar_t=a_t, alpha_bar_prev=a_prev, eta=eta)
            snippet = jnp.sqrt(a_prev) * x0 + jnp.sqrt(1 - a_prev) * eps + sigma * noise
            if eta == 0:
                chex.assert_trees_all_close(snippet, right, atol=1e-6)
            else:
                difference = jnp.abs(snippet - right).max()
                # direction coefficients differ by sqrt(v) - sqrt(v - sigma^2), times eps of up to 3 or 4 sigmas
                assert difference > 0.9 * jnp.abs(eps).max() * (
                    math.sqrt(1 - a_prev) - math.sqrt(1 - a_prev - float(sigma) ** 2)
                )
                excess.append(float(sigma) ** 2)
    assert 0.3 < max(excess) < 0.6
    assert min(excess) > 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", [linspace_timesteps, quad_timesteps])
def test_the_marginal_variance_is_right_at_every_step(eta: float, spacing) -> None:
    """Under a perfect denoiser, x_t ~ N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) at every t, whatever eta: Lemma 1.

    Data: one known image. The perfect denoiser knows it, so eps is exact. 40,000 samples of one pixel leave a standard
    error of 0.7% on a variance and 0.5% of a deviation on a mean; 4% and 3% are five of them.
    """
    schedule = cosine_schedule(1000)
    table = step_table(schedule, spacing(1000, 11))
    x_0, n = 0.37, 40_000
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def denoise(x_t, t):
        return predict_eps(x_t, jnp.full_like(x_t, x_0), alphas_cumprod[t])

    a_T = schedule.alphas_cumprod[table.t[0]]
    x_T = math.sqrt(a_T) * x_0 + math.sqrt(1 - a_T) * jax.random.normal(jax.random.key(5), (n, 1))
    _, trajectory = sample_loop(denoise, x_T, table, eta=eta, key=jax.random.key(6), trajectory_every=1)
    for t_prev, a_prev, x in zip(table.t_prev, table.alpha_bar_prev, np.asarray(trajectory.x_t), strict=True):
        if t_prev == -1:
            # the last step returns x_0 itself; its float32 error is eps' over sqrt(alpha_bar)
            np.testing.assert_allclose(x, x_0, atol=1e-4)
            continue
        assert x.var() == pytest.approx(1 - a_prev, rel=0.04), t_prev
        assert abs(x.mean() - math.sqrt(a_prev) * x_0) < 0.03 * math.sqrt(1 - a_prev), t_prev


def test_eta_one_with_all_steps_is_ddpm_ancestral_sampling() -> None:
    T = 300
    table = step_table(linear_schedule(T), linspace_timesteps(T, T))
    assert table.t.tolist() == list(range(T))[::-1]
    (x_T,) = normals(0)
    noise = jax.random.normal(jax.random.key(1), (T, *SHAPE))

    def denoise(x_t, t):
        return 0.7 * jnp.tanh(x_t + t[:, None, None, None] / T)

    ddim = sample_loop(denoise, x_T, table, eta=1.0, noise=noise, trajectory_every=1)
    ddpm = ancestral_loop(denoise, x_T, table, variance="fixed_small", noise=noise, clip_range=None, trajectory_every=1)
    scale = jnp.abs(ddim[1].x_t).max()
    # the two write the same step differently; 300 float32 steps of it
    chex.assert_trees_all_close(ddim[1].x_t / scale, ddpm[1].x_t / scale, atol=1e-4)


def test_fixed_large_is_beta_and_has_no_noise_at_the_end() -> None:
    a_t, a_prev = 0.4, 0.5
    x_t, x0, noise = normals(0, 1, 2)
    zero = jnp.zeros(SHAPE)
    step = jax.tree_util.Partial(ddpm_step, x_t, x0, alpha_bar_t=a_t, alpha_bar_prev=a_prev)
    for variance, expected in (("fixed_large", 1 - a_t / a_prev), ("fixed_small", (1 - a_t / a_prev) * 0.5 / 0.6)):
        added = step(noise, variance=variance) - step(zero, variance=variance)
        np.testing.assert_allclose(added, math.sqrt(expected) * noise, atol=1e-6)
        end = [ddpm_step(x_t, x0, z, alpha_bar_t=a_t, alpha_bar_prev=1.0, variance=variance) for z in (noise, zero)]
        chex.assert_trees_all_equal(*end)
        np.testing.assert_allclose(end[0], x0, atol=1e-6)
    with pytest.raises(ValueError, match="fixed_small, fixed_large"):
        step(noise, variance="learned")


def test_coefficients_may_be_given_per_sample() -> None:
    x_t, x0, eps, noise = normals(0, 1, 2, 3)
    etas = jnp.linspace(0, 1, 5)
    together = ddim_step(x_t, x0, eps, noise, alpha_bar_t=0.3, alpha_bar_prev=0.6, eta=etas)
    for i, eta in enumerate(etas):
        alone = ddim_step(x_t[i], x0[i], eps[i], noise[i], alpha_bar_t=0.3, alpha_bar_prev=0.6, eta=eta)
        chex.assert_trees_all_close(together[i], alone, atol=1e-6)


def test_the_last_step_returns_x0_and_has_a_gradient_in_eta() -> None:
    x_t, x0, eps, noise = normals(0, 1, 2, 3)

    def last(eta):
        return ddim_step(x_t, x0, eps, noise, alpha_bar_t=0.9, alpha_bar_prev=1.0, eta=eta)

    chex.assert_trees_all_equal(last(0.7), x0)
    # sqrt(1 - alpha_bar_prev - sigma^2) is sqrt(0) there: its derivative must be 0, not 0 * inf
    chex.assert_trees_all_equal(jax.jacobian(last)(0.7), jnp.zeros(SHAPE))


@pytest.mark.parametrize("spacing", [linspace_timesteps, uniform_timesteps])
def test_largest_eta_is_where_the_direction_vanishes(spacing) -> None:
    table = step_table(linear_schedule(1000), spacing(1000, 7), np.float64)
    limit = largest_eta(table)
    assert limit >= 1
    rest = [
        1 - a_prev - float(ddim_sigma(np.float64(a_t), np.float64(a_prev), limit)) ** 2
        for a_t, a_prev in zip(table.alpha_bar_t, table.alpha_bar_prev, strict=True)
    ]
    assert min(rest[:-1]) == pytest.approx(0, abs=1e-6)  # ddim_sigma computes in float32 here
    assert largest_eta(step_table(linear_schedule(10), [9])) == math.inf


def test_the_table_is_cast_once_from_float64() -> None:
    schedule = linear_schedule(1000)
    table = step_table(schedule, [999, 20, 0])
    np.testing.assert_array_equal(table.alpha_bar_t, schedule.alphas_cumprod[[999, 20, 0]].astype(np.float32))
    np.testing.assert_array_equal(table.alpha_bar_prev, np.float32([*schedule.alphas_cumprod[[20, 0]], 1]))
    assert table.t_prev.tolist() == [20, 0, -1]
    assert table.step.tolist() == [0, 1, 2]
    assert (table.num_steps, table.t.dtype, table.alpha_bar_t.dtype) == (3, np.int32, np.float32)
    assert step_table(schedule, [3], np.float64).alpha_bar_t[0] == schedule.alphas_cumprod[3]
    with pytest.raises(ValueError, match="strictly descend"):
        step_table(schedule, [3, 20])
