"""Inversion: Eq. 13 by hand, the exact ODE of Gaussian data, refinement to the sampler's inverse, JAX's transforms."""

from __future__ import annotations

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import predict_x0, step_table
from jddim.inversion import (
    CONVENTIONS,
    inversion_table,
    invert_loop,
    invert_step,
    invert_update,
    reconstruction_error,
)
from jddim.sampling import init_state, sample_loop, segments, update_loop, update_steps
from jddim.schedule import linear_schedule, zero_terminal_snr
from jddim.timesteps import linspace_timesteps, quad_timesteps

pytestmark = pytest.mark.unoptimised

T, S = 300, 13
SCHEDULE = linear_schedule(T)  # down to alpha_bar 0.05: the way back enlarges a rounding of x_T no more than five times
TABLE = step_table(SCHEDULE, linspace_timesteps(T, S))
SHAPE = (3, 5, 7, 2)  # b, h, w, c
X_0 = jax.random.uniform(jax.random.key(0), SHAPE, minval=-1)


def denoise(x_t, t):
    """Not linear, and another at every t."""
    return 0.8 * jnp.sin(x_t + t[:, None, None, None] / 50) + 0.1 * x_t


@partial(jax.jit, static_argnames=("convention", "refine", "clip", "rederive"))
def run(x_0, convention="diffusers", refine=0, clip=None, rederive=False):
    return invert_loop(
        denoise, x_0, TABLE, convention=convention, refine=refine, clip_range=clip, rederive_eps=rederive
    )


def test_a_step_by_hand() -> None:
    """One pixel: Eq. 13, upwards, as the paper writes it."""
    a_t, a_next, x_t, eps = 0.81, 0.37, 0.6, -1.3
    sigma, sigma_next = (math.sqrt((1 - a) / a) for a in (a_t, a_next))
    expected = math.sqrt(a_next) * (x_t / math.sqrt(a_t) + (sigma_next - sigma) * eps)
    one = jnp.ones((1, 1, 1, 1))
    x0 = predict_x0(x_t * one, eps * one, math.sqrt(a_t), math.sqrt(1 - a_t))
    actual = invert_step(x0, eps * one, alpha_next=math.sqrt(a_next), sigma_next=math.sqrt(1 - a_next))
    np.testing.assert_allclose(actual.item(), expected, rtol=1e-6)  # float32: a few roundings of numbers of order 1


def test_the_rows_of_each_convention() -> None:
    table = step_table(SCHEDULE, [250, 100, 3], np.float64)
    a = SCHEDULE.alphas_cumprod
    expected = {
        "paper": ([0, 3, 100], [3, 100, 250], [1, a[3], a[100]], [a[3], a[100], a[250]]),
        "diffusers": ([3, 100, 250], [3, 100, 250], [1, a[3], a[100]], [a[3], a[100], a[250]]),
        "openai": ([3, 100, 250], [100, 250, 251], [a[3], a[100], a[250]], [a[100], a[250], 0]),
    }
    assert set(expected) == set(CONVENTIONS)
    for convention, columns in expected.items():
        rows = inversion_table(table, convention)
        assert rows.step.tolist() == [0, 1, 2]
        *t, bar_t, bar_prev = columns
        ends = [np.sqrt(np.array(values)) for bar in (bar_t, bar_prev) for values in (bar, 1 - np.array(bar))]
        for actual, wanted in zip(rows[1:], [*t, *ends, [0, 0, 0]], strict=True):
            np.testing.assert_array_equal(actual, wanted)


SPREAD = 0.6


def gaussian(schedule):
    """The perfect eps for pixels from N(0, SPREAD^2), whose x_t have variance alpha_bar SPREAD^2 + 1 - alpha_bar."""
    a = jnp.asarray(schedule.alphas_cumprod)

    def eps(x_t, t):
        a_t = a[t][:, None, None, None]
        return jnp.sqrt(1 - a_t) * x_t / (a_t * SPREAD**2 + 1 - a_t)

    return eps


@pytest.mark.parametrize("convention", ["paper", "diffusers"])
def test_it_follows_the_ode_to_first_order(convention: str) -> None:
    """Eq. 14 for Gaussian data keeps each pixel's quantile: x_T = x_0 std(x_T) / SPREAD. Both ways err as 1 / S."""
    schedule = linear_schedule(4000, 1e-4 / 4, 0.02 / 4)
    a_T = schedule.alphas_cumprod[-1]
    exact = X_0 * math.sqrt(a_T * SPREAD**2 + 1 - a_T) / SPREAD
    errors, losses = [], []
    for steps in (40, 80, 160):
        table = step_table(schedule, linspace_timesteps(4000, steps))
        x_T = invert_loop(gaussian(schedule), X_0, table, convention=convention)
        errors.append(float(jnp.abs(x_T - exact).max()))
        x_0 = sample_loop(gaussian(schedule), x_T, table)
        losses.append(float(jnp.sqrt(reconstruction_error(X_0, x_0).mean())))
    for values in (errors, losses):
        ratios = [values[0] / values[1], values[1] / values[2]]
        # 2 in the limit; the next order is a tenth of the first at S = 80
        assert all(1.7 < ratio < 2.4 for ratio in ratios), (values, ratios)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("convention", ["paper", "diffusers"])
@pytest.mark.parametrize(("clip", "rederive"), [(None, False), ((-1.0, 1.0), True)])
def test_refined_it_is_the_samplers_inverse(convention: str, clip: tuple | None, rederive: bool) -> None:
    x_0 = X_0 * 0.9  # within the clip range, where a clipped sampler can lead
    errors = []
    for refine in (0, 1, 2, 4, 40):
        x_T = run(x_0, convention, refine, clip, rederive)
        again = sample_loop(denoise, x_T, TABLE, clip_range=clip, rederive_eps=rederive)
        errors.append(float(jnp.abs(again - x_0).max()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-5  # float32 through 13 steps either way


def test_refinement_has_one_end_whichever_convention_it_starts_from() -> None:
    chex.assert_trees_all_close(run(X_0, "paper", 40), run(X_0, "diffusers", 40), atol=1e-4)
    assert jnp.abs(run(X_0, "paper") - run(X_0, "diffusers")).max() > 1e-2


def test_a_repeated_t_changes_nothing() -> None:
    schedule = linear_schedule(1000)
    table = step_table(schedule, quad_timesteps(1000, 33))
    repeats = np.append(np.diff(table.t) == 0, False)
    assert repeats.sum() >= 1
    once = step_table(schedule, np.unique(table.t)[::-1])
    for refine in (0, 2):
        x_T = invert_loop(denoise, X_0, table, refine=refine)
        chex.assert_trees_all_close(x_T, invert_loop(denoise, X_0, once, refine=refine), atol=1e-5)


def test_predictions_of_v_and_x0_lead_where_those_of_eps_do() -> None:
    """The same network, told as eps, v or x0: only rounding differs."""
    table = step_table(SCHEDULE, TABLE.t, set_alpha_to_one=False)  # x0 needs a sigma above 0

    def as_x0(x_t, t, alpha, sigma):
        return predict_x0(x_t, denoise(x_t, t), alpha, sigma)

    def told(kind, alpha, sigma):
        if kind == "sample":
            return lambda x_t, t: as_x0(x_t, t, alpha, sigma)
        return lambda x_t, t: alpha * denoise(x_t, t) - sigma * as_x0(x_t, t, alpha, sigma)

    # row by row, since a prediction of x0 or v by this network depends on the noise in its x_t
    for kind in ("sample", "v_prediction"):
        x = y = X_0
        rows = inversion_table(table, "diffusers")
        for i in range(S):
            row = type(rows)(*(column[i : i + 1] for column in rows))
            x = update_loop(denoise, invert_update(denoise), x, row, deterministic=True)
            denoise_told = told(kind, float(row.alpha_t[0]), float(row.sigma_t[0]))
            update = invert_update(denoise_told, prediction_type=kind)
            y = update_loop(denoise_told, update, y, row, deterministic=True)
        chex.assert_trees_all_close(x, y, atol=1e-3 if kind == "sample" else 1e-4)


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("convention", ["paper", "diffusers"])
def test_segments_equal_the_whole_and_the_trajectory_ascends(convention: str, refine: int) -> None:
    table = step_table(SCHEDULE, linspace_timesteps(T, 16))
    rows = inversion_table(table, convention)

    @jax.jit
    def segment(state, rows):
        update = invert_update(denoise, refine=refine)
        return update_steps(denoise, update, state, rows, deterministic=True, trajectory_every=5)

    state = init_state(X_0, rows, 5)
    for part in segments(rows):
        state = segment(state, part)
    chex.assert_trees_all_equal(state, segment(init_state(X_0, rows, 5), rows))
    x_T, trajectory = invert_loop(denoise, X_0, table, convention=convention, refine=refine, trajectory_every=5)
    chex.assert_trees_all_close(x_T, state.x_t, atol=1e-5)  # another program
    assert trajectory.t.tolist() == table.t[::-1][[4, 9, 14, 15]].tolist()
    chex.assert_trees_all_equal(trajectory.x_t[-1], x_T)


def test_the_clean_image_is_not_divided_by_zero() -> None:
    """At sigma = 0 a clipped x0 leaves nothing to re-derive eps from: the network's is kept."""
    x_T = run(X_0, "diffusers", 0, (-1.0, 1.0), True)
    assert jnp.isfinite(x_T).all()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            {"convention": "openia"},
            ["unknown convention 'openia'", "did you mean 'openai'? allowed: diffusers, openai, paper"],
        ),
        ({"refine": -1}, ["refine must be at least 0, got -1"]),
        ({"refine": 2, "convention": "openai"}, ["refine solves the sampler's own steps"]),
        ({"prediction_type": "sample", "refine": -3}, ["tells nothing of eps at sigma = 0", "got -3"]),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments: dict, messages: list[str]) -> None:
    with pytest.raises(ValueError, match=r"convention|refine") as raised:
        invert_loop(denoise, X_0, TABLE, **arguments)
    for message in messages:
        assert message in str(raised.value)


def test_zero_terminal_snr_needs_a_network_that_predicts_v_or_x0() -> None:
    zero = step_table(zero_terminal_snr(SCHEDULE), linspace_timesteps(T, S))
    with pytest.raises(ValueError, match="eps tells nothing of x0 at alpha_t = 0"):
        invert_loop(denoise, X_0, zero)
    x_T = invert_loop(denoise, X_0, zero, prediction_type="v_prediction", refine=40)
    back = sample_loop(denoise, x_T, zero, prediction_type="v_prediction")
    np.testing.assert_allclose(back, X_0, atol=2e-4)  # from alpha 0, where eps is x_T whatever x_T is


def test_an_error_of_one_grey_level_in_two_of_four_pixels() -> None:
    again = X_0.at[1, :, :, 0].add(2 / 255)  # half of the second image's numbers
    np.testing.assert_allclose(reconstruction_error(X_0, again), [0, 0.5 / 255**2, 0], rtol=1e-4)
