"""Likelihoods against a Gaussian mixture's, whose density at every noise level is known."""

from __future__ import annotations

import itertools
import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import per_sample, step_table
from jddim.likelihood import bits_per_dim, dequantised, log_likelihood
from jddim.schedule import linear_schedule, zero_terminal_snr

pytestmark = pytest.mark.unoptimised

T, SHAPE, NUM = 1000, (3, 2, 1), 5
SIZE = math.prod(SHAPE)
SCHEDULE = linear_schedule(T)
MEANS = np.random.default_rng(0).uniform(-0.7, 0.7, (3, *SHAPE))
WEIGHTS = np.array([0.2, 0.5, 0.3])
VARIANCE = 0.04
X_0 = MEANS[[0, 1, 1, 2, 0]] + 0.2 * np.random.default_rng(1).standard_normal((NUM, *SHAPE))


def log_density(x_t, alpha_bar, means=MEANS, weights=WEIGHTS):
    """Of the noised mixture, `(b,)`."""
    v = alpha_bar * VARIANCE + 1 - alpha_bar
    squares = ((x_t[:, None] - per_sample(jnp.sqrt(alpha_bar), x_t)[:, None] * means) ** 2).sum((2, 3, 4))
    v = jnp.asarray(v)[..., None]
    return jax.nn.logsumexp(jnp.log(weights) - squares / (2 * v) - SIZE / 2 * jnp.log(2 * jnp.pi * v), axis=1)


def perfect(x_t, t, **of):
    """The eps of this mixture: -sqrt(1 - alpha_bar) times the score."""
    a = jnp.asarray(SCHEDULE.alphas_cumprod, x_t.dtype)[t]
    score = jax.grad(lambda x: log_density(x, a, **of).sum())(x_t)
    return -per_sample(jnp.sqrt(1 - a), x_t) * score


def gaussian(x_t, t):
    return perfect(x_t, t, means=MEANS[:1], weights=np.ones(1))


def table(steps: int):
    """S timesteps from T - 1 to 0, spaced as quad's squares: dense where sigma moves little."""
    return step_table(SCHEDULE, np.unique((np.linspace(0, 1, steps) ** 2 * (T - 1)).astype(int))[::-1], np.float64)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@partial(jax.jit, static_argnums=(0, 1), static_argnames="prediction_type")
def estimate(denoise, steps: int, probes=None, prediction_type="epsilon"):
    return log_likelihood(denoise, jnp.asarray(X_0), table(steps), probes=probes, prediction_type=prediction_type)


@cache
def by_axes():
    """By 25 steps."""
    return estimate(perfect, 25)


def test_converges_to_the_density_with_the_square_of_S() -> None:
    exact = np.asarray(log_density(jnp.asarray(X_0), jnp.full(NUM, SCHEDULE.alphas_cumprod[0])))
    # x_T is not quite normal: at alpha_bar_T = 4e-5 the mixture is N(0, I) to 0.03 in the logarithm, so correct for it
    errors = []
    for steps in (25, 50, 100):
        log_p, x_T = estimate(perfect, steps) if steps != 25 else by_axes()
        normal = -0.5 * (np.square(x_T).sum((1, 2, 3)) + SIZE * np.log(2 * np.pi))
        ends = np.asarray(log_density(x_T, jnp.full(NUM, SCHEDULE.alphas_cumprod[-1]))) - normal
        assert np.abs(ends).max() < 0.03
        errors.append(np.abs(np.asarray(log_p) + ends - exact).max())
    assert errors[-1] < 0.02, errors
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < math.log2(coarse / fine) < 2.4, errors


def test_hutchinson() -> None:
    probes = jax.random.rademacher(jax.random.key(3), (40, NUM, *SHAPE), jnp.float64)
    each = np.stack([estimate(perfect, 25, probes[i : i + 1]).log_p for i in range(3)])
    assert np.abs(each - by_axes().log_p).max() > 1e-3  # an estimate it is
    assert np.abs(each - by_axes().log_p).std() < 1
    together = estimate(perfect, 25, probes)
    np.testing.assert_allclose(together.x_T, by_axes().x_T, rtol=1e-12)
    np.testing.assert_allclose(together.log_p, by_axes().log_p, atol=4 / math.sqrt(40))
    # of one Gaussian the Jacobian is a multiple of 1, of which every v of +-1 tells the trace
    one, all_axes = (estimate(gaussian, 12, v) for v in (probes[:1], None))
    np.testing.assert_allclose(one.log_p, all_axes.log_p, rtol=1e-12)


def test_a_prediction_of_v_is_the_same_ode() -> None:
    def v(x_t, t):  # sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
        a = per_sample(jnp.asarray(SCHEDULE.alphas_cumprod)[t], x_t)
        eps = perfect(x_t, t)
        return jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * (x_t - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)

    chex.assert_trees_all_close(estimate(v, 25, prediction_type="v_prediction"), by_axes(), rtol=1e-9)


def test_its_gradient_is_the_score() -> None:
    gradient = jax.jit(jax.grad(lambda x: log_likelihood(gaussian, x, table(40)).log_p.sum()))(jnp.asarray(X_0))
    a = SCHEDULE.alphas_cumprod[0]
    score = -(X_0 - np.sqrt(a) * MEANS[0]) / (a * VARIANCE + 1 - a)
    np.testing.assert_allclose(gradient, score, rtol=0.02, atol=0.02)


def test_bytes() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (3, *SHAPE), np.uint8)
    uniform = np.random.default_rng(3).uniform(-0.5, 0.5, pixels.shape)
    back = (np.asarray(dequantised(pixels, uniform)) + 1) * 127.5
    np.testing.assert_allclose(back - pixels, uniform, atol=1e-4)
    # Every byte as likely: the density of the 256 intervals of 1 / 127.5, whose logarithm is this
    np.testing.assert_allclose(bits_per_dim(np.full(3, SIZE * np.log(127.5 / 256)), SIZE), 8, rtol=1e-6)


def test_what_it_refuses() -> None:
    x_0 = jnp.asarray(X_0)
    with pytest.raises(ValueError, match=r"probes must have shape \(n, 5, 3, 2, 1\), got \(5, 3, 2, 1\)"):
        log_likelihood(perfect, x_0, table(5), probes=x_0)
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        log_likelihood(perfect, x_0, step_table(SCHEDULE, [7]))
    with pytest.raises(ValueError, match="no end at alpha_t = 0"):
        log_likelihood(perfect, x_0, step_table(zero_terminal_snr(SCHEDULE), [T - 1, 0]))
    with pytest.raises(ValueError, match=r"denoise must return \(5, 3, 2, 1\)"):
        log_likelihood(lambda x, t: x.repeat(2, -1), x_0, table(5))
