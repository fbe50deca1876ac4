"""Solvers: what they equal, and their orders of convergence for a denoiser whose ODE has a solution in closed form."""

from __future__ import annotations

import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SOLVER_KINDS, random_model, small_config

import jddim
from jddim.config import METHODS, SamplerConfig
from jddim.ddim import StepTable, step_table
from jddim.sampling import sample_loop
from jddim.schedule import from_betas, linear_schedule
from jddim.solvers import (
    SOLVERS,
    Solver,
    SolverTable,
    ddim_plan,
    deis_plan,
    dpm_plan,
    dpm_singlestep_plan,
    lms_plan,
    solver_loop,
    unipc_plan,
)
from jddim.timesteps import linspace_timesteps, quad_timesteps

pytestmark = pytest.mark.unoptimised

T, S, SHAPE, NUM = 300, 7, (3, 5, 2), 4
SCHEDULE = linear_schedule(T)
TABLE = step_table(SCHEDULE, quad_timesteps(T, S), np.float64)
KEY = jax.random.key(1)
X_T = jax.random.normal(KEY, (NUM, *SHAPE))


def denoise(x_t, t):
    return 0.8 * jnp.sin(x_t + t.astype(x_t.dtype)[:, None, None, None] / 50) + 0.1 * x_t


@pytest.mark.parametrize("clip_range", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_first_order_is_ddim_at_eta_0(prediction_type: str, clip_range) -> None:
    options = {"prediction_type": prediction_type, "clip_range": clip_range}
    ddim = sample_loop(denoise, X_T, TABLE, rederive_eps=True, **options)
    # remembering x0 means that a clipped x0 moves eps too
    chex.assert_trees_all_close(solver_loop(denoise, X_T, TABLE, "ddim", **options), ddim, atol=2e-5, rtol=2e-5)
    first = Solver(lambda table: unipc_plan(table, order=1))
    corrected = solver_loop(denoise, X_T, TABLE, first, **options)
    assert np.abs(np.asarray(corrected - ddim)).max() > 1e-3  # UniC alone corrects


def test_each_of_first_order_is_ddim() -> None:
    expected = ddim_plan(TABLE)
    eps = ddim_plan(
        TABLE._replace(
            alpha_t=TABLE.sigma_t, sigma_t=TABLE.alpha_t, alpha_prev=TABLE.sigma_prev, sigma_prev=TABLE.alpha_prev
        )
    )
    for plan in (dpm_plan, dpm_singlestep_plan):
        assert_plans_equal(plan(TABLE, order=1), expected)
        assert_plans_equal(plan(TABLE, order=1, history="eps"), eps)
    for plan in (deis_plan, lms_plan):
        assert_plans_equal(plan(TABLE, order=1), eps)
    noisy = SOLVERS["dpm2m-sde"].rows(TABLE)
    assert noisy.noise[-2] > noisy.noise[-1] == 0  # to the clean image
    np.testing.assert_allclose([noisy.step_x[-1], *noisy.step_history[-1]], [eps.step_x[-1], *eps.step_history[-1], 0])


def assert_plans_equal(plan: SolverTable, expected: SolverTable) -> None:
    for name in ("base_x", "base_last", "base_history", "step_x", "step_history", "noise"):
        np.testing.assert_allclose(getattr(plan, name), getattr(expected, name), atol=1e-14, err_msg=name)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_two_that_are_ddim_at_eta_1(prediction_type: str) -> None:
    options = {"key": KEY, "prediction_type": prediction_type}
    expected = sample_loop(denoise, X_T, TABLE, eta=1.0, **options)
    for solver in ("euler-a", Solver(partial(dpm_plan, order=1, sde=True), stochastic=True)):
        chex.assert_trees_all_close(solver_loop(denoise, X_T, TABLE, solver, **options), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++2m-sde", "unipc"])
def test_of_two_steps_none_has_a_past(solver: str) -> None:
    table = step_table(SCHEDULE, [170], np.float64)
    one = solver_loop(denoise, X_T, table, solver, key=KEY)
    chex.assert_trees_all_close(one, sample_loop(denoise, X_T, table), atol=1e-5)


# -- a Gaussian, in closed form ------------------------------------------------------------------------------------
#
# For data N(0, c^2) each coordinate of the probability-flow ODE stays at the same quantile:
# x_t = x_T sqrt(v_t / v_T), v_t = alpha_bar_t c^2 + 1 - alpha_bar_t.

DEVIATION = 0.35
FINE = from_betas(np.full(2000, 1 - 0.02 ** (1 / 2000)))  # lambda from 3.5 down to -2; alpha_bar_T = 0.02


def variance(alpha_bar):
    return alpha_bar * DEVIATION**2 + 1 - alpha_bar


def perfect(x_t, t):
    a = jnp.asarray(FINE.alphas_cumprod, x_t.dtype)[t][:, None, None, None]
    return jnp.sqrt(1 - a) * x_t / variance(a)


def down_to(low: int, steps: int) -> StepTable:
    """`steps` steps even in t, from T - 1 to `low`, not on to the clean image: that step is of first order for all."""
    timesteps = np.linspace(1999, low, steps + 1).round().astype(int)
    table = step_table(FINE, timesteps, np.float64)
    return StepTable(*(column[:-1] for column in table))


def error(solver: str | Solver, steps: int) -> float:
    table = down_to(199, steps)
    with jax.enable_x64(True):
        x = jnp.asarray(np.linspace(-2, 2, 30).reshape(1, *SHAPE), jnp.float64)
        made = jax.jit(lambda x: solver_loop(perfect, x, table, solver, schedule=FINE))(x)
        exact = x * math.sqrt(variance(table.alpha_bar_prev[-1]) / variance(table.alpha_bar_t[0]))
        return float(jnp.abs(made - exact).max())


WHOLE = partial(dpm_singlestep_plan, lower_order_final=False)

# From a quarter below the first number to the second: of one that starts or ends at a lower order than it has between,
# the error falls at a rate in between. Heun's and PNDM's is by steps, of several evaluations, singlestep's by rows.
ORDERS = {
    "ddim": (1, 1.3),
    **dict.fromkeys(["dpm++2m", "dpm++3m", "dpm2m", "dpm3m", "deis", "heun", "heun-flow"], (2, 2.3)),
    **dict.fromkeys(["unipc", "plms", "pndm", "lms"], (2, 3.6)),
}
OTHERS = {
    "singlestep": (Solver(WHOLE), (2, 2.3)),
    "singlestep of eps": (Solver(partial(WHOLE, history="eps"), "eps"), (2, 2.3)),
    "singlestep of order 3": (Solver(partial(WHOLE, order=3)), (3, 3.4)),
    "DEIS of order 3": (Solver(partial(deis_plan, order=3), "eps"), (2.7, 3.3)),
    "UniPC that does not fall": (Solver(partial(unipc_plan, lower_order_final=False)), (2.7, 3.3)),
}


@pytest.mark.parametrize("name", [*ORDERS, *OTHERS])
def test_the_error_falls_with_the_order(name: str) -> None:
    solver, (lowest, highest) = OTHERS[name] if name in OTHERS else (name, ORDERS[name])
    errors = [error(solver, steps) for steps in (60, 120)]
    assert lowest - 0.25 < math.log2(errors[0] / errors[1]) < highest, errors


def test_higher_orders_are_closer_at_few_steps() -> None:
    first = error("ddim", 20)
    for solver in ("dpm++2m", "heun", "plms"):
        assert error(solver, 20) < first / 4, solver
    assert error("unipc", 20) < first / 2  # its last step is of first order


@pytest.mark.parametrize("solver", ["dpm++2m-sde", "euler-a"])
def test_stochastic_solvers_draw_from_the_data(solver: str) -> None:
    errors = []
    for steps in (100, 400):
        table = step_table(FINE, linspace_timesteps(2000, steps), np.float64)
        # x_T at alpha_bar_T = 0.02 is N(0, v_T), not quite N(0, 1)
        x_T = jax.random.normal(jax.random.key(5), (1000, *SHAPE)) * math.sqrt(variance(table.alpha_bar_t[0]))
        x_0 = np.asarray(jax.jit(lambda x, table=table: solver_loop(perfect, x, table, solver, key=KEY))(x_T))
        errors.append(abs(x_0.std() - DEVIATION))
        assert np.corrcoef(x_0[:, 0, 0, 0], x_T[:, 0, 0, 0])[0, 1] < 0.3  # the noise, not x_T, has decided
    # 30,000 values: their deviation is known to 0.4 %. The last step alone, from t = 0, takes 1 % off.
    assert errors[1] < 0.1 * DEVIATION
    assert errors[1] < 0.6 * errors[0]


# -- use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_repeated_timestep(solver: str) -> None:
    again = step_table(SCHEDULE, [250, 120, 120, 120, 40, 9], np.float64)
    x_0 = solver_loop(denoise, X_T, again, solver, key=KEY, schedule=SCHEDULE)
    chex.assert_tree_all_finite(x_0)
    if solver in ("ddim", "heun"):  # without a past, or noise: as if it were not there
        once = step_table(SCHEDULE, [250, 120, 40, 9], np.float64)
        chex.assert_trees_all_close(x_0, solver_loop(denoise, X_T, once, solver), atol=2e-5)


def test_a_solver_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    halved = Solver(lambda table: (p := ddim_plan(table))._replace(step_history=p.step_history / 2))
    given = solver_loop(denoise, X_T, TABLE, halved)
    assert np.abs(np.asarray(given - solver_loop(denoise, X_T, TABLE, "ddim"))).max() > 0.1
    monkeypatch.setitem(SOLVERS, "halved", halved)
    chex.assert_trees_all_equal(solver_loop(denoise, X_T, TABLE, "halved"), given)


def starting_at(alpha: float) -> StepTable:
    """TABLE from noise with so much of an image."""
    first = {"alpha_t": alpha, "sigma_t": math.sqrt(1 - alpha**2)}
    return TABLE._replace(**{name: np.append(value, getattr(TABLE, name)[1:]) for name, value in first.items()})


def test_what_solvers_refuse() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'dpm\+\+4m' \(did you mean 'dpm\+\+3m'\?\)"):
        solver_loop(denoise, X_T, TABLE, "dpm++4m")
    with pytest.raises(ValueError, match=r"unknown method 'ddpm' \(did you mean 'ddim'\?\)"):
        solver_loop(denoise, X_T, TABLE, "ddpm")  # it has a loop of its own
    with pytest.raises(ValueError, match="give either key or noise"):
        solver_loop(denoise, X_T, TABLE, "euler-a")
    with pytest.raises(ValueError, match=r"expected \(13, 4, 3, 5, 2\) for 13 steps"):
        solver_loop(denoise, X_T, TABLE, "heun", noise=X_T)
    zero = starting_at(0.0)
    for name in set(SOLVERS) - set(FROM_NOISE):
        with pytest.raises(ValueError, match=r"from alpha_t = 0 \(a flow's start, or zero terminal SNR\)"):
            SOLVERS[name].rows(zero, SCHEDULE)
    with pytest.raises(ValueError, match="asks between the table's timesteps: give it the schedule"):
        solver_loop(denoise, X_T, TABLE, "pndm")
    for plan, wrong, said in (
        (dpm_plan, {"order": 4}, "orders 1, 2 and, without noise, 3; got order 4"),
        (dpm_plan, {"order": 3, "sde": True}, "orders 1, 2 and, without noise, 3; got order 3"),
        (dpm_plan, {"history": "v"}, "remembers 'x0' or 'eps' and is 'midpoint' or 'heun'; got 'v' and 'midpoint'"),
        (dpm_singlestep_plan, {"order": 0}, "orders 1, 2 and 3; got order 0"),
        (dpm_singlestep_plan, {"solver_type": "bh2"}, "got 'x0' and 'bh2'"),
        (dpm_singlestep_plan, {"lower_order_final": False}, "a multiple of 2 steps, .* got 7, to the clean image"),
        (deis_plan, {"order": 0}, "from 1 on; got order 0"),
        (lms_plan, {"order": 0}, "from 1 on; got order 0"),
        (unipc_plan, {"solver_type": "bh3"}, "'bh1' or 'bh2', of order 1 and more; got 'bh3', order 2"),
    ):
        with pytest.raises(ValueError, match=said):
            plan(TABLE, **wrong)


FROM_NOISE = ("ddim", "dpm++2m", "dpm++3m", "dpm++2m-sde", "unipc", "heun-flow")


@pytest.mark.parametrize("solver", FROM_NOISE)
def test_zero_terminal_snr(solver: str) -> None:
    zero, tiny = starting_at(0.0), starting_at(1e-150)
    options = {"key": KEY if solver == "dpm++2m-sde" else None, "prediction_type": "v_prediction"}
    exact, near = (solver_loop(denoise, X_T, table, solver, **options) for table in (zero, tiny))
    chex.assert_tree_all_finite(exact)
    chex.assert_trees_all_close(exact, near, atol=0.02)  # lambda = -345: of second order's term 1/345 of h is left


@pytest.mark.parametrize("method", SOLVER_KINDS)
def test_sample_by_a_method(method: str) -> None:
    model = random_model(small_config(class_embedding="learned", num_classes=3))
    ddim = jddim.DDIM(model, SCHEDULE, SamplerConfig(num_steps=8, clip=True, eta=0.4))
    x_T = np.asarray(jax.random.normal(KEY, (3, 6, 10, 1)))
    labels = jnp.array([0, 2, 1])
    key = KEY if SOLVERS[method].stochastic else None
    sample = partial(ddim.sample, key, x_T=x_T, labels=labels, method=method)
    images, way = sample(trajectory_every=1)
    table = ddim.table(dtype=np.float64)
    by_hand = solver_loop(ddim.denoiser(labels), x_T, table, method, key=key, clip_range=(-1.0, 1.0), schedule=SCHEDULE)
    chex.assert_trees_all_close(images, by_hand, atol=1e-4)
    chex.assert_trees_all_equal(sample(progress=True, trajectory_every=1), (images, way))  # memory crosses segments
    if key is None:
        with pytest.raises(ValueError, match=f"eta is DDIM's; method '{re.escape(method)}' takes none"):
            sample(eta=0.5)
    else:
        with pytest.raises(ValueError, match="a key is needed"):
            ddim.sample(x_T=x_T, labels=labels, method=method)


@pytest.mark.parametrize("solver", ["heun", "dpm2m"])
def test_a_predicted_x0_near_the_clean_image_keeps_its_digits(solver: str) -> None:
    # eps is (x_t - alpha x0) / sigma, of a difference that float32 rounds and a sigma of 0.01
    made = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            x_T = jnp.asarray(X_T, dtype)
            table = step_table(linear_schedule(1000), np.arange(1000)[::-111], np.float64)
            made.append(solver_loop(lambda x, t: 0.9 * jnp.sin(x), x_T, table, solver, prediction_type="sample"))
    chex.assert_trees_all_close(made[0], np.float32(made[1]), atol=5e-6)


def test_the_command_knows_them_all() -> None:
    assert ("ddim", "ddpm", "consistency", *(name for name in SOLVERS if name != "ddim")) == METHODS
