"""Editing: exact ends, what is known stays, and RePaint's algorithm written out in NumPy."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim import editing
from jddim.ddim import step_table
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


def jumps(length: int, times: int) -> list[int]:
    """The levels that RePaint visits, from the noisiest, S - 1, down to -1: up and down again at every stop."""
    levels = []
    for level in range(S - 1, -2, -1):
        levels.append(level)
        if 0 <= level < S - length and level % length == 0:
            up, down = range(level + 1, level + length + 1), range(level + length - 1, level - 1, -1)
            levels += (times - 1) * [*up, *down]
    return levels


def test_where_repaint_jumps() -> None:
    # S = 7 by jumps of 2: stops at 4, 2 and 0, each taken twice more from two steps up
    table = editing.repaint_table(TABLE, 2, 2)
    assert table.t.tolist() == TABLE.t[[0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6]].tolist()
    goes_back = np.flatnonzero(table.back_noise)
    assert goes_back.tolist() == [1, 5, 9]
    assert (np.delete(table.back_x, goes_back) == 1).all()
    # what is then in x: the image and the noise of where the next row starts
    starts = [0, 2, 4]
    np.testing.assert_allclose((table.back_x * table.alpha_prev)[goes_back], TABLE.alpha_t[starts], rtol=1e-6)
    variance = (table.back_x * table.sigma_prev) ** 2 + table.back_noise**2
    np.testing.assert_allclose(variance[goes_back], TABLE.sigma_t[starts] ** 2, rtol=1e-6)


@pytest.mark.parametrize(("length", "clip_range"), [(1, None), (1, (-1.0, 1.0)), (2, None), (3, (-1.0, 1.0))])
def test_repaint_is_its_algorithm(length: int, clip_range) -> None:
    times, eta = 3, 1.0
    levels = jumps(length, times)
    evaluations = sum(b < a for a, b in itertools.pairwise(levels))
    x_T, known = draw(5, NUM, *SHAPE), jnp.clip(draw(6, NUM, *SHAPE), -1, 1)
    noise = draw(7, evaluations, 2, NUM, *SHAPE)
    options = {"resample": times, "jump_length": length, "noise": noise, "eta": eta, "clip_range": clip_range}
    _, way = inpaint(x_T, known, KEEP, trajectory_every=1, **options)
    assert len(way.t) == evaluations

    x, n = np.asarray(x_T, np.float64), -1
    m, k = np.asarray(KEEP, np.float64), np.asarray(known, np.float64)
    bars = np.append(SCHEDULE.alpha_bar(TABLE.t)[::-1], 1.0)  # by level; -1 is the clean image
    for i, (level, to) in enumerate(itertools.pairwise(levels)):
        a, a_to = bars[level], bars[to]
        if to > level:  # back, of which only the first step of a jump is looked at: the rest is in the same draw
            if levels[i - 1] > level:
                a_to = bars[level + length]
                x = np.sqrt(a_to / a) * x + np.sqrt(1 - a_to / a) * np.asarray(noise[n, 1], np.float64)
        else:
            n += 1
            z = np.asarray(noise[n, 0], np.float64)
            t = TABLE.t[S - 1 - level]
            eps = np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full(NUM, t)), np.float64)
            x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
            x0 = x0 if clip_range is None else np.clip(x0, *clip_range)
            sigma = eta * np.sqrt((1 - a_to) / (1 - a) * (1 - a / a_to))
            x_prev = np.sqrt(a_to) * x0 + np.sqrt(np.maximum(1 - a_to - sigma**2, 0)) * eps + sigma * z
            x = m * (np.sqrt(a_to) * k + np.sqrt(1 - a_to) * z) + (1 - m) * x_prev
        if to < level and i + 2 < len(levels) and levels[i + 2] > to:
            continue  # the loop's row ends after the way back
        if to < level or levels[i - 1] > level:
            np.testing.assert_allclose(way.x_t[n], x, atol=2e-5)  # float32, one step from where the loop was
            x = np.asarray(way.x_t[n], np.float64)


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
    with pytest.raises(ValueError, match=r"jump_length lie in 1..6, below the 7 steps of this table, got 2 and 7"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=2, jump_length=7, key=KEY)
    with pytest.raises(ValueError, match="resample is of known pixels that are noised, so not beside clean_known"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=2, clean_known=True, key=KEY)
    with pytest.raises(ValueError, match="jump_length is of resampling: give resample too"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, jump_length=2)
    with pytest.raises(ValueError, match="give either key or noise"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=2)
    with pytest.raises(ValueError, match=r"expected \(13, 2, 3, 5, 7, 2\)"):
        editing.inpaint_loop(denoise, x_T, TABLE, x_T, KEEP, resample=2, noise=x_T)
