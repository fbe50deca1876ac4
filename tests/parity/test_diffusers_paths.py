"""diffusers' schedulers off the grid and of other paths, step by step, through a stand-in network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.config import SamplerConfig, ScheduleConfig
from jddim.ddim import StepTable, sampler_table
from jddim.denoisers import with_edm
from jddim.sampling import sample_loop
from jddim.schedule import make_schedule
from jddim.solvers import solver_loop

torch = pytest.importorskip("torch", reason="diffusers is in torch")
diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")

pytestmark = [
    pytest.mark.quick,
    # Theirs, inside set_timesteps: torch 2.13 and NumPy 2 on a copy of a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

T, S, SHAPE = 1000, 9, (3, 5, 7, 2)
CONFIG = ScheduleConfig("scaled_linear", T, 0.00085, 0.012)
BETAS = {"num_train_timesteps": T, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
USES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}


def network(x: Any, t: Any, sin: Any) -> Any:
    """A stand-in that is not linear, and another at every t."""
    return 0.8 * sin(1.3 * x + t / 90) + 0.1 * x


def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return network(x_t, t.astype(x_t.dtype)[:, None, None, None], jnp.sin)


def table_of(config: ScheduleConfig, spacing: str, steps: int = S, **conventions: Any) -> StepTable:
    return sampler_table(make_schedule(config), SamplerConfig(spacing, steps, **conventions), dtype=np.float64)


def drawn(scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(0).standard_normal(SHAPE)


def assert_close(actual: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    assert float(np.abs(np.asarray(actual) - expected).max()) <= tolerance * float(np.abs(expected).max())


@pytest.mark.parametrize("spacing", USES)
def test_euler_off_the_grid(spacing: str) -> None:
    """Told t between whole timesteps. Theirs are x_t / alpha_t, by sigmas of float32 alpha_bar: at t = 0 1e-5 off."""
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", **{USES[spacing]: True})
    scheduler.set_timesteps(S)
    table = table_of(CONFIG, spacing)
    np.testing.assert_allclose(table.t, scheduler.timesteps.numpy(), atol=2e-3)  # theirs by logarithms in float32
    sigmas = scheduler.sigmas = scheduler.sigmas.double()
    np.testing.assert_allclose(table.sigma_t / table.alpha_t, sigmas[:-1].numpy(), rtol=2e-5)
    x = torch.tensor(drawn()) * torch.sqrt(sigmas[0] ** 2 + 1)
    xs = []
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t.double(), torch.sin)
        x = scheduler.step(output, t, x).prev_sample
        xs.append((x / torch.sqrt(sigmas[i + 1] ** 2 + 1)).numpy())
    with jax.enable_x64(True):
        way = jax.jit(lambda x: sample_loop(denoise, x, table, trajectory_every=1)[1].x_t)(jnp.asarray(drawn()))
    assert_close(way, np.array(xs), 2e-5)


@pytest.mark.parametrize(("spacing", "use"), [("karras", "use_karras_sigmas"), ("exponential", "use_lu_lambdas")])
def test_dpm_solver_off_the_grid_told_whole_timesteps(spacing: str, use: str) -> None:
    """Its exponential and beta sigmas tell the network t cut off to whole ones, not rounded: those are not here."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing="linspace", **{use: True})
    scheduler.set_timesteps(S)
    table = table_of(CONFIG, f"{spacing}_rounded")
    assert table.t.tolist() == scheduler.timesteps.tolist()
    scheduler.sigmas = scheduler.sigmas.double()
    x, xs = torch.tensor(drawn()), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double(), torch.sin), t, x).prev_sample
        xs.append(x.numpy())
    with jax.enable_x64(True):
        way = jax.jit(lambda x: solver_loop(denoise, x, table, "dpm++2m", trajectory_every=1)[1].x_t)(
            jnp.asarray(drawn())
        )
    assert_close(way, np.array(xs), 2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matchings_euler(shift: float) -> None:
    """Its sigmas go from 1 to 1 / T before the shift, and it tells the network 1000 t."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / T, S).tolist())
    table = table_of(ScheduleConfig("flow", t_min=1 / T), "even", shift=shift)
    np.testing.assert_allclose(table.t, scheduler.sigmas[:-1].numpy(), rtol=1e-6)
    scheduler.sigmas = scheduler.sigmas.double()
    x, xs = torch.tensor(drawn()), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double(), torch.sin), t, x).prev_sample
        xs.append(x.numpy())

    def told(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return denoise(x_t, 1000 * t)

    with jax.enable_x64(True):
        run = jax.jit(lambda x: sample_loop(told, x, table, prediction_type="velocity", trajectory_every=1)[1].x_t)
        way = run(jnp.asarray(drawn()))
    assert_close(way, np.array(xs), 2e-5)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edms_preconditioning(kind: str) -> None:
    """Its network is told log(sigma) / 4, and x_T is N(0, sigma_max^2 + sigma_data^2) there, N(0, sigma_max^2) here."""
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(S)
    table = table_of(ScheduleConfig("edm"), "karras")
    np.testing.assert_allclose(table.t, scheduler.sigmas[:-1].numpy(), rtol=1e-5)
    scheduler.sigmas = scheduler.sigmas.double()
    x, xs = torch.tensor(drawn(80.0)), []
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), 40 * t.double(), torch.sin)
        x = scheduler.step(output, t, x).prev_sample
        xs.append(x.numpy())

    def F(x: jax.Array, told: jax.Array) -> jax.Array:
        return denoise(x, 40 * told)

    solver = "ddim" if kind == "EDMEulerScheduler" else "dpm++2m"
    with jax.enable_x64(True):
        run = jax.jit(
            lambda x: solver_loop(with_edm(F), x, table, solver, prediction_type="velocity", trajectory_every=1)[1].x_t
        )
        way = run(jnp.asarray(drawn(80.0)))
    assert_close(way, np.array(xs), 2e-5)
