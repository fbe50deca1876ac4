"""Editing: exact ends, what is known stays, and RePaint's algorithm written out in NumPy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim import editing
from jddim.ddim import add_noise, step_table
from jddim.sampling import sample_loop
from jddim.schedule import linear_schedule
from jddim.timesteps import linspace_timesteps

pytestmark = pytest.mark.unoptimised

T, S, SHAPE, NUM = 300, 7, (5, 7, 2), 3
SCHEDULE = linear_schedule(T)
TABLE = step_table(SCHEDULE, linspace_timesteps(T, S))
KEY = jax.random.key(3)
KEEP = (jax.random.uniform(jax.random.key(9), (NUM, 5, 7, 1)) < 0.5).astype(jnp.float32)


def denoise(x_t, t):
    return 0.8 * jnp.sin(x_t + t.astype(x_t.dtype)[:, None, None, None] / 50) + 0.1 * jnp.roll(x_t, 1, axis=2)


def draw(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def test_slerp_has_exact_ends_and_keeps_the_norm() -> None:
    a, b = draw(0, NUM, *SHAPE), draw(1, NUM, *SHAPE)
    chex.assert_trees_all_equal(editing.slerp(a, b, 0.0), a)
    chex.assert_trees_all_equal(editing.slerp(a, b, 1.0), b)
    fractions = jnp.array([0.1, 0.5, 0.8])
    between = np.asarray(editing.slerp(a, b, fractions), np.float64)
    for i, f in enumerate(fractions):
        u, v = (np.asarray(x[i], np.float64).ravel() for x in (a, b))
        theta = np.arccos(u @ v / np.sqrt((u @ u) * (v @ v)))
        expected = (np.sin((1 - f) * theta) * u + np.sin(f * theta) * v) / np.sin(theta)
        np.testing.assert_allclose(between[i].ravel(), expected, atol=2e-6)
    unit = [x / jnp.linalg.norm(x.reshape(NUM, -1), axis=1)[:, None, None, None] for x in (a, b)]
    halfway = editing.slerp(*unit, 0.5)
    np.testing.assert_allclose(jnp.linalg.norm(halfway.reshape(NUM, -1), axis=1), 1, rtol=1e-5)


def test_slerp_where_no_arc_is_determined_is_the_line() -> None:
    a = draw(0, NUM, *SHAPE)
    for b in (2 * a, a, -a):
        chex.assert_trees_all_close(editing.slerp(a, b, 0.25), 0.75 * a + 0.25 * b, atol=1e-6)
    gradient = jax.grad(lambda a: editing.slerp(a, 2 * a, 0.3).sum())(a)
    chex.assert_tree_all_finite(gradient)


def test_a_grid_between_four() -> None:
    corners = draw(2, 2, 2, *SHAPE)
    grid = editing.slerp_grid(corners, 3, 5)
    chex.assert_shape(grid, (3, 5, *SHAPE))
    chex.assert_trees_all_equal(grid[::2, ::4], corners)
    chex.assert_trees_all_close(grid[0, 2], editing.slerp(corners[0, 0], corners[0, 1], 0.5), atol=1e-6)
    chex.assert_trees_all_close(grid[1, 0], editing.slerp(corners[0, 0], corners[1, 0], 0.5), atol=1e-6)


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 7), (0.6, 4), (0.3, 2), (0.01, 1)])
def test_strength(strength: float, kept: int) -> None:
    rest = editing.tail(TABLE, strength)
    assert rest.t.tolist() == TABLE.t.tolist()[S - kept :]
    assert rest.t_prev[-1] == -1
    assert rest.step.tolist() == list(range(S - kept, S))


def test_strength_follows_the_whole_run_from_where_it_starts() -> None:
    x_T = draw(4, NUM, *SHAPE)
    x_0, way = sample_loop(denoise, x_T, TABLE, eta=0.6, key=KEY, trajectory_every=1)
    rest = editing.tail(TABLE, 0.6)
    # the very noise of the whole run, since the steps keep their numbers
    again = sample_loop(denoise, way.x_t[S - 5], rest, eta=0.6, key=KEY)
    chex.assert_trees_all_close(again, x_0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_a_strength_that_is_none(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\]"):
        editing.tail(TABLE, strength)


def inpaint(x_T, known, keep, **options):
    return jax.jit(lambda x, k, m: editing.inpaint_loop(denoise, x, TABLE, k, m, **options))(x_T, known, keep)


@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "key": KEY}, {"resample": 3, "key": KEY, "eta": 1.0}])
def test_what_is_known_stays_to_the_bit(options: dict) -> None:
    x_T, known = draw(5, NUM, *SHAPE), jnp.clip(draw(6, NUM, *SHAPE), -1, 1)
    chex.assert_trees_all_equal(inpaint(x_T, known, jnp.ones((5, 7, 1)), **options), known)
    filled = inpaint(x_T, known, KEEP, **options)
    where = np.broadcast_to(np.asarray(KEEP, bool), filled.shape)
    np.testing.assert_array_equal(np.asarray(filled)[where], np.asarray(known)[where])
    assert np.abs(np.asarray(filled - known)[~where]).mean() > 0.1


def test_nothing_known_is_plain_sampling() -> None:
    x_T, known = draw(5, NUM, *SHAPE), draw(6, NUM, *SHAPE)
    free = inpaint(x_T, known, jnp.zeros((5, 7, 1)), eta=0.7, key=KEY)
    chex.assert_trees_all_close(free, sample_loop(denoise, x_T, TABLE, eta=0.7, key=KEY), atol=1e-5)


@pytest.mark.parametrize("clip_range", [None, (-1.0, 1.0)])
def test_repaint_is_its_algorithm(clip_range) -> None:
    times, eta = 3, 1.0
    x_T, known = draw(5, NUM, *SHAPE), jnp.clip(draw(6, NUM, *SHAPE), -1, 1)
    noise = draw(7, (S - 1) * times + 1, 2, NUM, *SHAPE)
    options = {"resample": times, "noise": noise, "eta": eta, "clip_range": clip_range, "trajectory_every": 1}
    _, way = inpaint(x_T, known, KEEP, **options)
    assert len(way.t) == (S - 1) * times + 1

    x, n = np.asarray(x_T, np.float64), 0
    m, k = np.asarray(KEEP, np.float64), np.asarray(known, np.float64)
    for i, t in enumerate(TABLE.t):
        a, a_prev = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(TABLE.t_prev[i])
        for u in range(times if i < S - 1 else 1):
            z, back = np.asarray(noise[n], np.float64)
            eps = np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full(NUM, t)), np.float64)
            x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
            x0 = x0 if clip_range is None else np.clip(x0, *clip_range)
            sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
            x_prev = np.sqrt(a_prev) * x0 + np.sqrt(np.maximum(1 - a_prev - sigma**2, 0)) * eps + sigma * z
            x_prev = m * (np.sqrt(a_prev) * k + np.sqrt(1 - a_prev) * z) + (1 - m) * x_prev
            goes_back = i < S - 1 and u < times - 1
            x = np.sqrt(a / a_prev) * x_prev + np.sqrt(1 - a / a_prev) * back if goes_back else x_prev
            np.testing.assert_allclose(way.x_t[n], x, atol=2e-5)  # float32, one step from where the loop was
            x, n = np.asarray(way.x_t[n], np.float64), n + 1


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"eta": 1.0, "resample": 2, "key": KEY}])
def test_a_self_conditioned_network(options: dict) -> None:
    x_T, known = draw(5, NUM, *SHAPE), draw(6, NUM, *SHAPE)

    def paint(gain: float):
        conditioned = lambda x_t, t, x0_hat: denoise(x_t, t) + gain * x0_hat  # noqa: E731
        return editing.inpaint_loop(conditioned, x_T, TABLE, known, KEEP, self_condition=True, **options)

    chex.assert_trees_all_close(paint(0.0), inpaint(x_T, known, KEEP, **options), atol=1e-5)
    assert np.abs(np.asarray(paint(0.1) - paint(0.0))).max() > 0.01


def test_what_inpainting_refuses() -> None:
    x_T = draw(5, NUM, *SHAPE)
    with pytest.raises(ValueError, match=r"known must have x_T's shape \(3, 5, 7, 2\), got \(3, 5, 7, 1\)"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T[..., :1], KEEP)
    with pytest.raises(
        ValueError, match=r"keep must broadcast to the images \(3, 5, 7, 2\), e.g. \(5, 7, 1\); got \(4, 1\)"
    ):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="resample must be at least 1, got 0"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=0)
    with pytest.raises(ValueError, match="give either key or noise"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=2)
    with pytest.raises(ValueError, match=r"expected \(13, 2, 3, 5, 7, 2\)"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=2, noise=x_T)


def test_editing_under_transformations() -> None:
    x_T, known = draw(5, NUM, *SHAPE), draw(6, NUM, *SHAPE)
    of_known = jax.grad(lambda k: editing.inpaint_loop(denoise, x_T, TABLE, k, KEEP).sum())(known)
    chex.assert_tree_all_finite(of_known)
    assert jnp.abs(of_known).max() > 0
    both = jax.vmap(lambda k: editing.inpaint_loop(denoise, x_T, TABLE, k, KEEP))(jnp.stack([known, -known]))
    chex.assert_trees_all_close(both[0], editing.inpaint_loop(denoise, x_T, TABLE, known, KEEP), atol=1e-5)
    a = np.float32(SCHEDULE.alphas_cumprod[100])
    chex.assert_trees_all_close(add_noise(known, x_T, a), np.sqrt(a) * known + np.sqrt(1 - a) * x_T, atol=1e-6)
