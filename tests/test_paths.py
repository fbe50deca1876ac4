"""One step on every Gaussian path x_t = alpha_t x_0 + sigma_t eps: discrete VP, continuous VP, flow and EDM."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from tiny import random_model, small_config

import jddim
from jddim.config import SamplerConfig, ScheduleConfig, from_json, to_json
from jddim.ddim import StepTable, path_rows, predict_both, sampler_table, step_table, vp_rows
from jddim.denoisers import with_edm
from jddim.inversion import invert_loop
from jddim.run.request import RequestError
from jddim.sampling import sample_loop
from jddim.schedule import EDMSchedule, FlowSchedule, Schedule, VPSchedule, linear_schedule, make_schedule
from jddim.solvers import churned_heun, solver_loop
from jddim.timetables import traps

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

# Each with its schedule and a spacing of it.
PATHS: dict[str, tuple[ScheduleConfig, str]] = {
    "linear betas": (ScheduleConfig("linear"), "linspace"),
    "between timesteps": (ScheduleConfig("linear"), "karras"),
    "flow": (ScheduleConfig("flow"), "even"),
    "edm": (ScheduleConfig("edm"), "karras"),
    "vp": (ScheduleConfig("vp"), "even"),
}


def along(name: str, steps: int, **conventions: Any) -> tuple[Schedule, StepTable]:
    config, spacing = PATHS[name]
    schedule = make_schedule(config)
    return schedule, sampler_table(schedule, SamplerConfig(spacing, steps, **conventions), dtype=np.float64)


def known(table: StepTable, of: Any) -> Any:
    """A denoiser by the velocity, which knows alpha and sigma of the table's t; of: (x_t, alpha, sigma) -> x0."""
    t, alpha, sigma = (jnp.asarray(c)[::-1] for c in (table.t, table.alpha_t, table.sigma_t))

    def denoise(x_t: jax.Array, told: jax.Array) -> jax.Array:
        i = jnp.searchsorted(t, told)
        a, s = (c[i].reshape(-1, *[1] * (x_t.ndim - 1)) for c in (alpha, sigma))
        x0 = of(x_t, a, s)
        return (x_t - a * x0) / s - x0

    return denoise


# -- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", PATHS)
def test_the_marginals_are_right_at_every_step_at_any_eta(name: str, eta: float) -> None:
    """Data: one known image. 40,000 samples leave 0.4% of a deviation and 0.5% of one on a mean: five of them."""
    x_0, (_, table) = 0.37, along(name, 11)
    with jax.enable_x64(True):
        denoise = known(table, lambda x_t, a, s: jnp.full_like(x_t, x_0))
        z = jax.random.normal(jax.random.key(5), (40_000, 1), jnp.float64)
        start = table.alpha_t[0] * x_0 + table.sigma_t[0] * z
        run = jax.jit(
            lambda x, key: (
                sample_loop(denoise, x, table, eta=eta, key=key, prediction_type="velocity", trajectory_every=1)[1].x_t
            )
        )
        for alpha, sigma, x in zip(table.alpha_prev, table.sigma_prev, run(start, jax.random.key(6)), strict=True):
            assert float(x.std()) == pytest.approx(sigma, rel=0.02, abs=1e-9)
            assert abs(float(x.mean()) - alpha * x_0) <= 0.03 * sigma + 1e-9


# A mixture of two Gaussians on a line: the way of the ODE keeps each sample's quantile.
MEANS, DEVIATION, SHARE = np.array([-0.7, 0.5]), 0.1, np.array([0.3, 0.7])


def posterior_mean(x_t: jax.Array, a: jax.Array, s: jax.Array) -> jax.Array:
    v = a**2 * DEVIATION**2 + s**2
    logits = jnp.log(SHARE) - (x_t - a * MEANS) ** 2 / (2 * v)
    each = MEANS + a * DEVIATION**2 / v * (x_t - a * MEANS)
    return (jax.nn.softmax(logits) * each).sum(axis=-1, keepdims=True)


def quantiles_of(x: np.ndarray, a: float, s: float) -> np.ndarray:
    return (SHARE * norm.cdf(x, a * MEANS, math.sqrt(a**2 * DEVIATION**2 + s**2))).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", PATHS)
def test_ddims_error_falls_with_its_first_order(name: str) -> None:
    errors = []
    for steps in (40, 160):
        _, table = along(name, steps)
        a, s = table.alpha_t[0], table.sigma_t[0]
        z = np.linspace(-2, 2, 13)[:, None]
        start = a * 0.14 + math.sqrt(s**2 + a**2 * 0.3) * z  # about where x_T is
        with jax.enable_x64(True):
            run = jax.jit(lambda x: sample_loop(known(table, posterior_mean), x, table, prediction_type="velocity"))  # noqa: B023
            reached = np.asarray(run(jnp.asarray(start)))
        errors.append(np.abs(quantiles_of(reached, 1.0, 0.0) - quantiles_of(start, a, s)).max())
    assert errors[0] < 0.2, errors
    assert errors[1] < errors[0] / 3, errors  # 4 where the order is 1 exactly


@pytest.mark.parametrize("name", PATHS)
def test_with_noise_the_distribution_comes_as_the_steps_grow(name: str) -> None:
    """At eta 1, by the two shares and the deviation within the right one; 10,000 samples know a share to 0.005."""
    found = []
    for steps in (20, 120):
        schedule, table = along(name, steps)
        with jax.enable_x64(True):
            z = jax.random.normal(jax.random.key(7), (10_000, 1), jnp.float64)
            start = z * schedule.prior_scale(float(table.t[0]))
            run = jax.jit(
                lambda x: sample_loop(
                    known(table, posterior_mean),  # noqa: B023
                    x,
                    table,  # noqa: B023
                    eta=1.0,
                    key=jax.random.key(8),
                    prediction_type="velocity",
                )
            )
            x = np.asarray(run(start))
        right = x[x > 0]
        found.append((abs(len(right) / len(x) - SHARE[1]), abs(right.std() / DEVIATION - 1)))
    assert found[1][0] < 0.02, found
    assert found[1][1] < 0.2, found
    assert found[1][1] < 0.65 * found[0][1], found


def test_the_rows_of_any_path_are_vps_where_it_is_vp() -> None:
    rng = np.random.default_rng(0)
    a_t = rng.uniform(1e-4, 0.9, 31)
    a_prev = a_t + (1 - a_t) * rng.uniform(0.05, 1, 31)
    expected = vp_rows(a_t, a_prev)
    given = (expected[name] for name in ("alpha_t", "sigma_t", "alpha_prev", "sigma_prev"))
    for name, column in path_rows(*given).items():
        np.testing.assert_allclose(column, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7), (1.0, 80.0), (0.8, 0.6)])
def test_the_velocity_is_eps_less_x0(alpha: float, sigma: float) -> None:
    x0, eps = (jax.random.normal(jax.random.key(i), (3, 5, 7, 2)) for i in (1, 2))
    found = predict_both(eps - x0, alpha * x0 + sigma * eps, alpha, sigma, "velocity")
    for each, expected in zip(found, (x0, eps), strict=True):
        np.testing.assert_allclose(each, expected, atol=2e-6)  # roundings of numbers up to 4, or 300 over 80


# -- EDM's preconditioning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_free", [0.0, 0.002])
def test_edms_preconditioning_is_its_table_1(t_free: float) -> None:
    def F(x: jax.Array, told: jax.Array) -> jax.Array:
        return jnp.sin(x + told[:, None, None, None])

    with jax.enable_x64(True):
        t = jnp.array([0.002, 0.3, 80.0])
        x_t = jax.random.normal(jax.random.key(0), (3, 5, 7, 2), jnp.float64) * t[:, None, None, None]
        sigma, data = t[:, None, None, None], 0.7
        skip = data**2 / ((sigma - t_free) ** 2 + data**2)
        out = (sigma - t_free) * data / jnp.sqrt(sigma**2 + data**2)
        x0 = skip * x_t + out * F(x_t / jnp.sqrt(sigma**2 + data**2), 0.25 * jnp.log(t))
        velocity = with_edm(F, data, 0.25, t_free)(x_t, t)
        found, eps = predict_both(velocity, x_t, jnp.ones(3), t, "velocity")
        np.testing.assert_allclose(found, x0, atol=1e-12)
        np.testing.assert_allclose(eps, (x_t - x0) / sigma, rtol=1e-9, atol=1e-10)
        if t_free:
            np.testing.assert_allclose(found[0], x_t[0], rtol=1e-15)


# -- solvers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flow", "edm", "vp"])
@pytest.mark.parametrize("solver", ["dpm++2m", "unipc", "dpm2m", "heun", "heun-flow", "pndm", "lms"])
def test_solvers_reach_the_mixture_along_each_path(name: str, solver: str) -> None:
    """At 60 steps DDIM is 0.014 to 0.04 of a quantile off; those that ask in between are told the schedule's own t."""
    config, _ = PATHS[name]
    schedule = make_schedule(config)
    table = sampler_table(schedule, SamplerConfig({"vp": "karras"}.get(name, PATHS[name][1]), 60), dtype=np.float64)
    a, s = table.alpha_t[0], table.sigma_t[0]
    start = a * 0.14 + math.sqrt(s**2 + a**2 * 0.3) * np.linspace(-2, 2, 13)[:, None]

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        if name == "vp":
            decay = t**2 * 19.9 / 4 + t * 0.1 / 2
            alpha, sigma = jnp.exp(-decay), jnp.sqrt(-jnp.expm1(-2 * decay))
        else:
            alpha, sigma = (jnp.ones_like(t) if name == "edm" else 1 - t), t
        x0 = posterior_mean(x_t, alpha[:, None], sigma[:, None])
        return (x_t - alpha[:, None] * x0) / sigma[:, None] - x0

    with jax.enable_x64(True):
        run = partial(solver_loop, denoise, table=table, solver=solver, prediction_type="velocity", schedule=schedule)
        if name == "flow" and solver not in ("dpm++2m", "unipc", "heun-flow"):
            with pytest.raises(ValueError, match=r"no step from alpha_t = 0 \(a flow's start, or zero terminal SNR\)"):
                run(jnp.asarray(start))
            return
        reached = np.asarray(jax.jit(run)(jnp.asarray(start)))
    assert np.abs(quantiles_of(reached, 1.0, 0.0) - quantiles_of(start, a, s)).max() < 5e-3


def test_heun_of_a_flow_is_heuns_method_of_its_ode() -> None:
    def velocity(x: Any, t: Any, sin: Any) -> Any:
        return 0.8 * sin(1.3 * x + 4 * t) + 0.1 * x

    table = sampler_table(FlowSchedule(), SamplerConfig("even"), 6, np.float64)
    x_T = np.random.default_rng(2).standard_normal((3, 5))
    x = x_T
    for t, s in zip(table.t, table.t_prev, strict=True):
        first = velocity(x, t, np.sin)
        tried = x + (s - t) * first
        x = tried if s == 0 else x + (s - t) * (first + velocity(tried, s, np.sin)) / 2
    with jax.enable_x64(True):
        made = solver_loop(
            lambda x_t, t: velocity(x_t, t[:, None], jnp.sin),
            jnp.asarray(x_T),
            table,
            "heun-flow",
            prediction_type="velocity",
        )
    np.testing.assert_allclose(made, x, rtol=1e-12)


# -- tables -------------------------------------------------------------------------------------------------------


def test_spacings_of_continuous_schedules() -> None:
    flow = FlowSchedule()
    shifted = sampler_table(flow, SamplerConfig("even", shift=3.0), 4, np.float64)
    np.testing.assert_allclose(shifted.t, [1, 0.9, 0.75, 0.5])  # 3 t / (1 + 2 t)
    np.testing.assert_allclose(shifted.t_prev, [0.9, 0.75, 0.5, 0])
    np.testing.assert_array_equal(shifted.alpha_t, 1 - shifted.t)
    edm = sampler_table(EDMSchedule(), SamplerConfig("karras"), 5)
    assert (edm.t[0], edm.t[-1], edm.t_prev[-1], edm.t.dtype) == (80, np.float32(0.002), 0, np.float32)
    assert repr(edm) == "StepTable(5 steps: t = 80, 17.5278, 2.51522, 0.169753, 0.002; ends at t = 0, sigma 0)"
    listed = sampler_table(VPSchedule(), SamplerConfig(), spacing=[0.9, 0.5, 0.01])
    np.testing.assert_allclose(listed.alpha_t**2 + listed.sigma_t**2, 1, rtol=1e-6)
    assert sampler_table(linear_schedule(1000), SamplerConfig("karras"), 9).t.dtype == np.float32
    rounded = sampler_table(linear_schedule(1000), SamplerConfig("karras_rounded"), 9)
    assert rounded.t.dtype == np.int32
    assert (rounded.t[0], rounded.t[-1], rounded.t_prev[-1]) == (999, 0, -1)


@pytest.mark.parametrize(
    ("config", "spacing", "steps", "told"),
    [
        ("flow", "linspace", 5, "spacing 'linspace' is not of continuous schedules.*even"),
        ("flow", "karras", 5, r"needs sigma / alpha within \(0, inf\); this schedule's goes from inf to 0"),
        ("flow", [0.9, 1.0], None, "timesteps must strictly descend within 0..1, above 0, got 0.9, 1"),
        ("flow", [1.0, 0.0], None, "timesteps must strictly descend within 0..1, above 0"),
        ("flow", [0.5, 0.4], 3, "an explicit list of 2 timesteps does not take num_steps=3"),
        ("edm", [80.5, 1.0], None, r"within 0.002..80, above 0, got 80.5, 1"),
        ("edm", "even", 0, "num_steps .* must lie in 1..1000000, got 0"),
        ("linear", "even", 5, "'even' is of continuous schedules; with T whole timesteps take 'linspace'"),
        ("linear", "karass", 5, "unknown spacing 'karass'.*did you mean 'karras'"),
    ],
)
def test_spacings_that_cannot_be(config: str, spacing: Any, steps: int | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sampler_table(make_schedule(ScheduleConfig(config)), SamplerConfig(), steps, spacing=spacing)


def test_a_shift_is_of_a_flow() -> None:
    for unused in (SamplerConfig("even", steps_offset=1), SamplerConfig("even", set_alpha_to_one=False)):
        with pytest.raises(ValueError, match="steps_offset and set_alpha_to_one are of schedules with T timesteps"):
            sampler_table(FlowSchedule(), unused, 4)
    with pytest.raises(ValueError, match=r"shift is of a t in 0..1, as a flow has; this schedule's goes to 80"):
        sampler_table(EDMSchedule(), SamplerConfig("even", shift=3.0), 4)
    with pytest.raises(ValueError, match=r"shift must be a number in 0.001..1000, got 0"):
        sampler_table(FlowSchedule(), SamplerConfig("even", shift=0.0), 4)
    with pytest.raises(ValueError, match=r"rho must be a number in 0.1..100, got nan"):
        sampler_table(EDMSchedule(), SamplerConfig("karras", rho=math.nan), 4)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ScheduleConfig("flow", 300), "schedule 'flow' is continuous: it takes no num_train_timesteps"),
        (ScheduleConfig("edm", beta_start=0.1, zero_terminal_snr=True), "takes no beta_start or zero_terminal_snr"),
        (ScheduleConfig("flow", t_max=1.5), "the flow's t_max is at most 1"),
        (ScheduleConfig("edm", t_min=0.0), "edm's t_min, the least sigma, must be above 0"),
        (ScheduleConfig("vp", t_min=2.0), "t_max above it, at most 1e6; got 2.0, 1.0"),
        (ScheduleConfig("vp", beta_start=30.0), "0 < beta_start < beta_end"),
        (ScheduleConfig("edm", t_max=1e39), "at most 1e6; got 0.002, 1e\\+39"),
        (ScheduleConfig("flow", t_min=1e-50), "t_min must be 0, or 1e-6 or more"),
        (ScheduleConfig("linear", t_min=0.1), "schedule 'linear' takes no t_min"),
        (ScheduleConfig("flwo"), "did you mean 'flow'"),
    ],
)
def test_schedules_that_cannot_be(config: ScheduleConfig, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_schedule(config)


def test_continuous_schedules_are_json_and_invert_their_ratios() -> None:
    for config in (ScheduleConfig("flow"), ScheduleConfig("edm", t_max=50.0), ScheduleConfig("vp", beta_end=12.0)):
        assert from_json(ScheduleConfig, to_json(config)) == config
        schedule = make_schedule(config)
        assert not isinstance(schedule, jddim.NoiseSchedule)
        t = np.linspace(schedule.t_min + 1e-3, schedule.t_max - 1e-3, 17)
        np.testing.assert_allclose(schedule.time_of(schedule.sigma(t) / schedule.alpha(t)), t, rtol=1e-12)
    linear = linear_schedule(100)
    np.testing.assert_allclose(linear.time_of(linear.sigma([0, 7, 99]) / linear.alpha([0, 7, 99])), [0, 7, 99])


def test_a_run_starts_at_the_noise_of_its_first_t() -> None:
    assert [FlowSchedule(t_max=0.5).prior_scale(0.5), FlowSchedule().prior_scale(1.0)] == [0.5, 1.0]
    assert [EDMSchedule().prior_scale(20.0), VPSchedule().prior_scale(0.5)] == [20.0, 1.0]


def test_traps_of_a_continuous_schedule() -> None:
    edm = EDMSchedule()
    assert traps(step_table(edm, [80.0, 1.0]), edm) == []
    assert traps(step_table(edm, [40.0, 1.0]), edm) == ["the first step is at t = 40, not at the noisiest, 80"]
    linear = linear_schedule(1000)
    assert traps(sampler_table(linear, SamplerConfig("karras"), 9), linear) == []


# -- doors --------------------------------------------------------------------------------------------------------

SIZE = (6, 10)
EDM = SamplerConfig("karras", 7, clip=False, prediction_type="edm", timestep_scale=0.25)


def ddim_of(schedule: Schedule, sampler: SamplerConfig) -> jddim.DDIM:
    return jddim.DDIM(random_model(small_config(image_size=SIZE)), schedule, sampler)


def test_x_T_is_standard_normal_at_every_door() -> None:
    ddim, key = ddim_of(EDMSchedule(), EDM), jax.random.key(3)
    x_T = jddim.initial_noise(jddim.sample_keys(key, 2), (*SIZE, 1))
    made = ddim.sample(key, 2)
    np.testing.assert_array_equal(made, ddim.sample(x_T=x_T))
    table = ddim.table()
    by_hand = sample_loop(ddim.denoiser(), x_T * 80, table, **ddim.conventions())
    np.testing.assert_allclose(made, by_hand, atol=1e-5 * float(jnp.abs(by_hand).max()))
    images = jax.random.uniform(key, (2, *SIZE, 1), minval=-1)
    back = ddim.invert(images, refine=12)
    assert 0.5 < float(back.std()) < 8  # not 80
    np.testing.assert_allclose(ddim.sample(x_T=back), images, atol=0.1)  # as far as the refinement has come
    _, way = ddim.sample(key, 2, trajectory_every=3)
    np.testing.assert_allclose(way.t, table.t_prev[[2, 5, 6]])
    half = ddim.edit(images, key, strength=0.5)
    assert half.shape == images.shape
    assert not np.allclose(half, made)


def test_shift_and_rho_are_options() -> None:
    key = jax.random.key(5)
    flow = ddim_of(FlowSchedule(), SamplerConfig("even", 5, prediction_type="velocity", timestep_scale=9.0))
    shifted = flow.sample(key, 2, shift=3.0)
    np.testing.assert_array_equal(shifted, flow.with_sampler(shift=3.0).sample(key, 2))
    assert not np.allclose(shifted, flow.sample(key, 2))
    edm = ddim_of(EDMSchedule(), EDM)
    np.testing.assert_array_equal(edm.sample(key, 2, rho=3.0), edm.with_sampler(rho=3.0).sample(key, 2))
    with pytest.raises(RequestError, match="shift is of the spacing even, this run's is karras"):
        edm.sample(key, 2, shift=3.0)
    with pytest.raises(RequestError, match="rho is of the spacing karras, this run's is even"):
        flow.sample(key, 2, rho=3.0)
    with pytest.raises(RequestError, match=r"shift must be a number in 0\.001\.\.1000, got 0"):
        flow.sample(key, 2, shift=0.0)


@pytest.mark.parametrize("churn", [(40.0, 0.05, 50.0, 1.003), (3.0, 0.0, np.inf, 1.0), (0.0, 0.0, np.inf, 1.0)])
def test_heun_with_churn_is_algorithm_2(churn: tuple[float, float, float, float]) -> None:
    """Of arXiv:2206.00364, in NumPy, noise by noise; the first step's is part of x_T."""
    S, shape = 7, (3, 5, 2)
    s_churn, s_tmin, s_tmax, s_noise = churn
    sampler = SamplerConfig("karras", S, prediction_type="edm")
    table = sampler_table(EDMSchedule(), sampler, S, np.float64)
    solver = churned_heun(*churn)
    rng = np.random.default_rng(3)
    n, z = rng.standard_normal((4, *shape)), rng.standard_normal((2 * S - 1, 4, *shape))

    def D(xp: Any, x: Any, sigma: Any) -> Any:
        return xp.tanh(0.7 * x / (1 + sigma)) * 0.5

    sigmas = np.append(np.asarray(table.sigma_t), 0.0)
    x, start = None, None
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / S, np.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (1 + gamma)
        if i == 0:
            x = start = n * hat
        else:
            x = x + np.sqrt(hat**2 - sigma**2) * s_noise * z[2 * i - 1]
        d = (x - D(np, x, hat)) / hat
        x_next = x + (following - hat) * d
        if following > 0:
            x_next = x + (following - hat) * (d + (x_next - D(np, x_next, following)) / following) / 2
        x = x_next

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return D(jnp, x_t, t.reshape(-1, 1, 1, 1))

    x_0 = solver_loop(
        denoise,
        jnp.asarray(start, jnp.float32),
        table,
        solver,
        noise=jnp.asarray(z, jnp.float32),
        prediction_type="sample",
    )
    np.testing.assert_allclose(x_0, x, atol=1e-4)  # float32, from a start of 300


def test_churn_is_an_option() -> None:
    ddim, key = ddim_of(EDMSchedule(), EDM), jax.random.key(3)
    run = partial(ddim.sample, key, 3, method="heun", steps=5)
    churned = run(s_churn=3.0)
    assert not np.allclose(churned, run())
    np.testing.assert_array_equal(churned, run(s_churn=3.0, on_segment=lambda preview: None))
    np.testing.assert_allclose(churned, run(s_churn=3.0, s_tmax=np.inf), atol=2e-4)
    np.testing.assert_allclose(run(s_churn=0.0), run(), atol=2e-4)
    for told, options in (
        ("s_churn is of method heun, not of 'ddim'", {"s_churn": 3.0, "method": "ddim"}),
        ("s_noise is of s_churn: give s_churn too", {"s_noise": 1.0}),
        ("s_tmin at most s_tmax; got s_churn 3, s_noise 1, s_tmin 2", {"s_churn": 3.0, "s_tmin": 2.0, "s_tmax": 1.0}),
    ):
        with pytest.raises(RequestError, match=told):
            run(**options)
    discrete = ddim_of(linear_schedule(50), SamplerConfig(num_steps=5))
    with pytest.raises(RequestError, match="s_churn is of EDM's path"):
        discrete.sample(key, 2, method="heun", s_churn=3.0)


@pytest.mark.parametrize("name", ["flow", "edm", "vp"])
def test_every_segment_is_the_same_program(name: str) -> None:
    """A run watched is equal to the bit; eta above 0 draws the same noise whatever the batch."""
    config, spacing = PATHS[name]
    kind = {"edm": "edm", "flow": "velocity", "vp": "epsilon"}[name]
    sampler = SamplerConfig(spacing, 6, eta=0.4, prediction_type=kind, timestep_scale=9.0)
    ddim, seen = ddim_of(make_schedule(config), sampler), []
    whole = ddim.sample(jax.random.key(1), 3, on_segment=lambda preview: seen.append(preview.done))
    np.testing.assert_array_equal(whole, ddim.sample(jax.random.key(1), 3))
    # two images at once are another program to XLA: rounding, as in test_pipeline_bits.py
    np.testing.assert_allclose(whole[1:], ddim.sample(jax.random.key(1), 2, start=1), atol=2e-4)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("schedule", "changes", "told"),
    [
        (linear_schedule(50), {"prediction_type": "edm"}, "prediction_type edm is of the schedule edm"),
        (EDMSchedule(), {"prediction_type": "v_prediction"}, "v is of paths with alpha_t"),
        (EDMSchedule(), {"sigma_data": 0.0}, "sigma_data must be a number in 1e-6..1e6, got 0"),
        (EDMSchedule(), {"timestep_scale": 0.0}, "timestep_scale must be a number in 1e-6..1e6, got 0"),
        (EDMSchedule(), {"prediction_type": "velocity", "boundary": True}, "boundary is of prediction_type edm"),
        (
            EDMSchedule(),
            {"reversed_time": True},
            "reversed_time is of the schedule flow and the prediction_type velocity",
        ),
    ],
)
def test_conventions_that_do_not_fit(schedule: Schedule, changes: dict[str, Any], told: str) -> None:
    spacing = "linspace" if isinstance(schedule, jddim.NoiseSchedule) else "karras"
    with pytest.raises(RequestError, match=told):
        ddim_of(schedule, dataclasses.replace(EDM, spacing=spacing, **changes)).sample(0, 1)


def test_a_flow_of_eps_has_no_first_step() -> None:
    with pytest.raises(RequestError, match="a predicted eps tells nothing of x0 at alpha_t = 0"):
        ddim_of(FlowSchedule(), SamplerConfig("even")).sample(0, 1, steps=3)
    with pytest.raises(ValueError, match="the convention 'openai' is of whole timesteps"):
        ddim_of(FlowSchedule(), SamplerConfig("even", prediction_type="velocity")).invert(
            jnp.zeros((1, *SIZE, 1)), steps=3, convention="openai"
        )


@pytest.mark.parametrize("convention", ["paper", "diffusers"])
def test_inversion_asks_at_times_that_the_network_was_trained_at(convention: str) -> None:
    _, table = along("edm", 5)
    asked: list[float] = []

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: asked.append(float(t[0])), t)
        return 0.1 * x_t

    invert_loop(denoise, jnp.ones((1, 3)), table, convention=convention, prediction_type="velocity")
    up = table.t[::-1]
    np.testing.assert_allclose(asked, up if convention == "diffusers" else [up[0], *up[:-1]], rtol=1e-6)


def test_the_repr_says_what_t_is(tmp_path: Path) -> None:
    ddim = ddim_of(EDMSchedule(), EDM)
    assert "t in 0.002..80; karras, 7 steps, predicts edm" in repr(ddim)
    assert "<svg" not in ddim._repr_html_()
