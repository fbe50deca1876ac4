"""The step, against scalar arithmetic, the paper's marginals, and the walk-through's wrong snippet."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import (
    StepTable,
    add_noise,
    coefficients,
    ddim_sigma,
    ddim_step,
    ddpm_step,
    largest_eta,
    predict_eps,
    predict_x0,
    step_table,
    vp_rows,
)
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import cosine_schedule, linear_schedule, zero_terminal_snr
from jddim.timesteps import linspace_timesteps, quad_timesteps, uniform_timesteps

pytestmark = pytest.mark.quick

SHAPE = (5, 7, 3, 2)


def normals(*names: int, shape: tuple[int, ...] = SHAPE) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(name), shape) for name in names]


def between(alpha_t: float, sigma_t: float, alpha_prev: float, sigma_prev: float) -> dict[str, float]:
    """The coefficients of a step on any Gaussian path."""
    q = alpha_t / alpha_prev * sigma_prev / sigma_t
    ends = {"alpha_t": alpha_t, "sigma_t": sigma_t, "alpha_prev": alpha_prev, "sigma_prev": sigma_prev}
    return {**ends, "fresh": math.sqrt(1 - q**2)}


def ends(a_t: float, a_prev: float) -> dict[str, float]:
    """The same from alpha_bar at its two ends."""
    return between(*map(math.sqrt, (a_t, 1 - a_t, a_prev, 1 - a_prev)))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_by_hand(eta: float) -> None:
    """One pixel, every quantity by `math`: Eq. 9, 16 and 12."""
    a_t, a_prev, x_t, eps, z = 0.37, 0.81, 0.6, -1.3, 0.9
    x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a_t)) * math.sqrt(1 - a_t / a_prev)
    expected = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma**2) * eps + sigma * z
    one = jnp.ones((1, 1, 1, 1))
    at = (math.sqrt(a_t), math.sqrt(1 - a_t))
    actual_x0 = predict_x0(x_t * one, eps * one, *at)
    actual = ddim_step(actual_x0, eps * one, z * one, **ends(a_t, a_prev), eta=eta)
    # float32: a few roundings of numbers of order 1
    np.testing.assert_allclose(actual_x0.item(), x0, rtol=1e-6)
    np.testing.assert_allclose(add_noise(actual_x0, eps * one, *at).item(), x_t, rtol=1e-6)
    np.testing.assert_allclose(actual.item(), expected, rtol=1e-6)
    np.testing.assert_allclose(predict_eps(x_t * one, actual_x0, *at).item(), eps, rtol=1e-6)


def test_the_walkthroughs_snippet_is_another_update_when_eta_is_positive() -> None:
    """Its code has sqrt(1 - alpha_bar_prev) where its equation has sqrt(1 - alpha_bar_prev - sigma^2).

    The snippet's x_prev has sigma^2 too much variance. At eta = 1 in a 30-step table that is up to 0.06 of the pixels'
    unit variance, at every step.
    """
    table = step_table(linear_schedule(1000), linspace_timesteps(1000, 30), np.float64)
    x0, eps, noise = normals(1, 2, 3, shape=(1000, 1))
    excess = []
    for a_t, a_prev in zip(table.alpha_bar_t[:-1], table.alpha_bar_prev[:-1], strict=True):
        for eta in (0.0, 1.0):
            sigma = ddim_sigma(sigma_prev=math.sqrt(1 - a_prev), fresh=ends(a_t, a_prev)["fresh"], eta=eta)
            right = ddim_step(x0, eps, noise, **ends(a_t, a_prev), eta=eta)
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
    alpha, sigma = (jnp.asarray(of(range(1000)), jnp.float32) for of in (schedule.alpha, schedule.sigma))

    def denoise(x_t, t):
        return predict_eps(x_t, jnp.full_like(x_t, x_0), alpha[t], sigma[t])

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
    step = jax.tree_util.Partial(ddpm_step, x_t, x0, **ends(a_t, a_prev))
    for variance, expected in (("fixed_large", 1 - a_t / a_prev), ("fixed_small", (1 - a_t / a_prev) * 0.5 / 0.6)):
        added = step(noise, variance=variance) - step(zero, variance=variance)
        np.testing.assert_allclose(added, math.sqrt(expected) * noise, atol=1e-6)
        end = [ddpm_step(x_t, x0, z, **ends(a_t, 1.0), variance=variance) for z in (noise, zero)]
        chex.assert_trees_all_equal(*end)
        np.testing.assert_allclose(end[0], x0, atol=1e-6)
    with pytest.raises(ValueError, match="fixed_small, fixed_large"):
        step(noise, variance="learned")


def test_coefficients_may_be_given_per_sample() -> None:
    x_t, x0, eps, noise = normals(0, 1, 2, 3)
    etas = jnp.linspace(0, 1, 5)
    of_each = vp_rows(jnp.linspace(0.3, 0.4, 5), jnp.linspace(0.6, 0.8, 5))
    together = ddim_step(x0, eps, noise, **of_each, eta=etas)
    ancestral = ddpm_step(x_t, x0, noise, **of_each)
    for i, eta in enumerate(etas):
        mine = {name: value[i] for name, value in of_each.items()}
        chex.assert_trees_all_close(together[i], ddim_step(x0[i], eps[i], noise[i], **mine, eta=eta), atol=1e-6)
        chex.assert_trees_all_close(ancestral[i], ddpm_step(x_t[i], x0[i], noise[i], **mine), atol=1e-6)


def test_the_last_step_returns_x0_and_has_a_gradient_in_eta() -> None:
    x0, eps, noise = normals(1, 2, 3)

    def last(eta):
        return ddim_step(x0, eps, noise, **ends(0.9, 1.0), eta=eta)

    chex.assert_trees_all_equal(last(0.7), x0)
    for eta in (0.7, 1.0):  # at eta 1 the direction is sqrt(0) there: its derivative must be 0, not 0 * inf
        chex.assert_trees_all_equal(jax.jacobian(last)(eta), jnp.zeros(SHAPE))


@pytest.mark.parametrize("spacing", [linspace_timesteps, uniform_timesteps])
def test_largest_eta_is_where_the_direction_vanishes(spacing) -> None:
    table = step_table(linear_schedule(1000), spacing(1000, 7), np.float64)
    limit = largest_eta(table)
    assert limit >= 1
    rest = [
        1 - a_prev - float(ddim_sigma(sigma_prev=math.sqrt(1 - a_prev), fresh=fresh, eta=limit)) ** 2
        for a_prev, fresh in zip(table.alpha_bar_prev, table.fresh, strict=True)
    ]
    assert min(rest[:-1]) == pytest.approx(0, abs=1e-5)  # a millionth short of it, and ddim_sigma is float32 here
    assert largest_eta(step_table(linear_schedule(10), [9])) == math.inf


def test_the_table_is_cast_once_from_float64() -> None:
    schedule = linear_schedule(1000)
    table = step_table(schedule, [999, 20, 0])
    a = schedule.alphas_cumprod[[999, 20, 0]]
    np.testing.assert_array_equal(table.alpha_t, np.sqrt(a).astype(np.float32))
    np.testing.assert_array_equal(table.sigma_t, np.sqrt(1 - a).astype(np.float32))
    np.testing.assert_array_equal(table.alpha_prev, np.float32([*np.sqrt(a[1:]), 1]))
    np.testing.assert_array_equal(table.sigma_prev, np.float32([*np.sqrt(1 - a[1:]), 0]))
    np.testing.assert_allclose(table.alpha_bar_t, a, rtol=2e-7)
    np.testing.assert_allclose(table.alpha_bar_prev, [*a[1:], 1], rtol=2e-7)
    assert table.t_prev.tolist() == [20, 0, -1]
    assert table.step.tolist() == [0, 1, 2]
    assert (table.num_steps, table.t.dtype, table.sigma_t.dtype) == (3, np.int32, np.float32)
    assert step_table(schedule, [3], np.float64).sigma_t[0] == math.sqrt(1 - schedule.alphas_cumprod[3])
    with pytest.raises(ValueError, match="strictly descend"):
        step_table(schedule, [3, 20])


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_a_step_is_eulers_on_other_gaussian_paths(path: str) -> None:
    """At eta 0, of x_t = alpha_t x_0 + sigma_t eps whatever alpha and sigma are.

    Flow matching, alpha = 1 - t, sigma = t: x + (s - t) v, v = eps - x_0. EDM, alpha = 1: x + (s - t) eps.
    """
    x0, eps, noise = normals(1, 2, 3)
    for t, s in ((0.9, 0.7), (0.4, 0.1), (0.3, 0.0), (0.5, 0.5)):
        alphas = (1 - t, 1 - s) if path == "flow" else (1.0, 1.0)
        x_t = add_noise(x0, eps, alphas[0], t)
        slope = eps - x0 if path == "flow" else eps
        row = between(alphas[0], t, alphas[1], s)
        chex.assert_trees_all_close(ddim_step(x0, eps, noise, **row, eta=0.0), x_t + (s - t) * slope, atol=1e-6)


@pytest.mark.parametrize("path", ["vp", "flow", "edm"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_step_keeps_the_marginal_on_any_path(path: str, eta: float) -> None:
    """From x_t with variance sigma_t^2 of noise to x_prev with sigma_prev^2 of it: old noise and new, uncorrelated."""
    zero, one = jnp.zeros(1), jnp.ones(1)
    for t, s in ((0.9, 0.7), (0.4, 0.1), (0.3, 0.0), (0.5, 0.5)):
        alphas = {"vp": [math.sqrt(1 - v**2) for v in (t, s)], "flow": [1 - t, 1 - s], "edm": [1.0, 1.0]}[path]
        row = between(alphas[0], t, alphas[1], s)
        old, new = (float(ddim_step(zero, e, z, **row, eta=eta)[0]) for e, z in ((one, 0.0), (zero, 1.0)))
        assert old**2 + new**2 == pytest.approx(s**2, abs=1e-6)
        assert float(ddim_step(one, zero, 0.0, **row, eta=eta)[0]) == pytest.approx(alphas[1])
        if t == s:
            assert new == 0  # exactly: a step from t to itself draws nothing
        if eta == 1:  # the posterior of q, however the path is made
            x_t, x0, z = jnp.float32([1.3]), jnp.float32([-0.4]), jnp.float32([0.7])
            eps = predict_eps(x_t, x0, alphas[0], t)
            chex.assert_trees_all_close(ddpm_step(x_t, x0, z, **row), ddim_step(x0, eps, z, **row, eta=1.0), atol=1e-6)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_an_eta_above_one_reaches_the_clean_image(part: float) -> None:
    """Up to `largest_eta`, where a step adds all the noise that x_prev has; beyond it nothing is real."""
    table = step_table(linear_schedule(1000), [999, *range(899, 0, -100)])
    limit = largest_eta(table)
    assert limit > 1.05
    (x_T,) = normals(0)
    noise = jax.random.normal(jax.random.key(1), (10, *SHAPE))

    def run(eta):
        return sample_loop(lambda x_t, t: 0.5 * jnp.tanh(x_t), x_T, table, eta=eta, noise=noise)

    eta = 1 + part * (limit - 1)
    chex.assert_tree_all_finite([run(eta), jax.jit(run)(jnp.float32(eta))])
    assert jnp.isnan(run(1.01 * limit)).any()


def test_a_step_takes_no_other_keyword() -> None:
    x_t, x0, eps = normals(0, 1, 2)
    with pytest.raises(TypeError, match="alpha_bar_t"):
        ddim_step(x0, eps, 0.0, alpha_bar_t=0.5, alpha_bar_prev=0.7, eta=0.0)
    with pytest.raises(TypeError, match="varience"):
        ddpm_step(x_t, x0, 0.0, **ends(0.3, 0.6), varience="fixed_large")


def test_from_no_image_to_no_image_nothing_is_drawn() -> None:
    table = step_table(zero_terminal_snr(linear_schedule(1000)), [999, 999, 500])
    assert table.fresh.tolist()[:2] == [0, pytest.approx(1)]


def test_fresh_never_leaves_0_to_1() -> None:
    """Over steps from every t to itself, to its neighbour and to one far away: 0 exactly for the first, 1 to x_0."""
    for schedule in (linear_schedule(1000), cosine_schedule(1000), linear_schedule(100_000, 1e-6, 2e-4)):
        T = schedule.num_train_timesteps
        for t_prev in (np.arange(T), np.arange(-1, T - 1), np.arange(T) // 2):
            table = step_table(schedule, np.arange(T)[::-1], timesteps_prev=t_prev[::-1])
            rows = vp_rows(*(jnp.float32(schedule.alpha_bar(t)) for t in (table.t, table.t_prev)))
            for fresh in (table.fresh, rows["fresh"]):
                assert ((fresh >= 0) & (fresh <= 1)).all()
                assert (fresh == 0).all() == (t_prev[-1] == T - 1)
                assert (fresh[-1] == 1) == (t_prev[0] == -1)


def test_vp_rows_are_the_tables_and_have_finite_derivatives() -> None:
    schedule = linear_schedule(1000)
    table = step_table(schedule, [999, 500, 20, 0])
    rows = vp_rows(*(jnp.float32(schedule.alpha_bar(t)) for t in (table.t, table.t_prev)))
    host = vp_rows(*(schedule.alpha_bar(t) for t in (table.t, table.t_prev)))
    for name, value in coefficients(table).items():
        np.testing.assert_allclose(rows[name], value, rtol=1e-4)  # float32 of 1 - alpha_bar at t = 0
        np.testing.assert_array_equal(np.asarray(host[name], np.float32), value)
    at = jnp.float32([0.0, 0.37]), jnp.float32([0.25, 1.0])
    slopes = jax.jit(jax.jacfwd(vp_rows, argnums=(0, 1)))(*at)
    chex.assert_tree_all_finite(slopes)
    half = [0.5 / math.sqrt(0.37), -0.5 / math.sqrt(0.63)]
    np.testing.assert_allclose(slopes["alpha_t"][0].diagonal(), [0, half[0]], rtol=1e-6)
    np.testing.assert_allclose(slopes["sigma_t"][0].diagonal(), [-0.5, half[1]], rtol=1e-6)
    np.testing.assert_allclose(slopes["sigma_prev"][1].diagonal(), [-0.5 / math.sqrt(0.75), 0], rtol=1e-6)


def test_a_table_prints_as_one_line() -> None:
    schedule = linear_schedule(1000)
    table = step_table(schedule, np.arange(999, -1, -1))
    assert repr(table) == "StepTable(1000 steps: t = 999, 998, 997, 996, ..., 2, 1, 0; ends at t = -1, sigma 0)"
    assert repr(step_table(schedule, [999, 7], set_alpha_to_one=False)).endswith(
        "t = 999, 7; ends at t = -1, sigma 0.01)"
    )
    assert repr(jax.tree.map(lambda column: column[0], table)).startswith("StepTable(np.int32(0), np.int32(999), ")
    assert repr(schedule) == "NoiseSchedule(T = 1,000; beta 0.0001 to 0.02, alpha_bar 0.9999 to 4.036e-05)"
    seen = []
    jax.jit(lambda a: seen.append(repr(table._replace(**vp_rows(a, a)))) or a)(jnp.full(1000, 0.5))
    assert repr(step_table(schedule, [5])._replace(t=np.zeros(0, np.int32))).startswith("StepTable(array(")
    assert "Tracer" in seen[0]


def test_coefficients_are_the_columns_of_a_step() -> None:
    row = StepTable(*range(8))
    assert coefficients(row) == {name: getattr(row, name) for name in StepTable._fields[3:]}
