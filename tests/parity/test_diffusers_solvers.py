"""Each solver equals diffusers' scheduler of that kind at every step, through a stand-in network.

Theirs are stepped in float64 where they can be, since their float32 coefficients are themselves 1e-5 off.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.config import ScheduleConfig
from jddim.ddim import StepTable, step_table
from jddim.schedule import make_schedule
from jddim.solvers import SOLVERS, solver_loop

torch = pytest.importorskip("torch", reason="diffusers is in torch")
diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")

# Theirs, inside set_timesteps: torch 2.13 and NumPy 2 on a copy of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

T, SHAPE = 1000, (3, 5, 7, 2)
CONFIG = ScheduleConfig("scaled_linear", T, 0.00085, 0.012)
BETAS = {"num_train_timesteps": T, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def network(x: Any, t: Any, sin: Any) -> Any:
    """A stand-in that is not linear, and another at every t."""
    return 0.8 * sin(1.3 * x + t / 90) + 0.1 * x


def ours(x_T, table: StepTable, solver: str, prediction_type: str, noise=None, **options):
    def denoise(x_t, t):
        return network(x_t, t.astype(x_t.dtype)[:, None, None, None], jnp.sin)

    run = jax.jit(
        lambda x_T: solver_loop(
            denoise, x_T, table, solver, prediction_type=prediction_type, noise=noise, trajectory_every=1, **options
        )
    )
    return np.asarray(run(x_T)[1].x_t)


def theirs(scheduler, x_T, S: int, noise=None) -> tuple[np.ndarray, list[float]]:
    """The samples after each of the scheduler's evaluations, and the timesteps it asked at."""
    scheduler.set_timesteps(S)
    for name in ("sigmas", "alpha_t", "sigma_t", "lambda_t", "alphas_cumprod"):
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    x = nchw(x_T)
    xs = []
    for i, t in enumerate(scheduler.timesteps):
        z = {} if noise is None else {"variance_noise": nchw(noise[i])}
        x = scheduler.step(network(x, t.double(), torch.sin), t, x, **z).prev_sample
        xs.append(x.numpy().transpose(0, 2, 3, 1))
    return np.array(xs), [float(t) for t in scheduler.timesteps]


def nchw(x: np.ndarray) -> Any:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).double()


def table_at(timesteps, **options) -> StepTable:
    return step_table(make_schedule(CONFIG), timesteps, np.float64, **options)


def draws(rows: int):
    rng = np.random.default_rng(3)
    return rng.standard_normal(SHAPE, dtype=np.float32), rng.standard_normal((rows, *SHAPE), dtype=np.float32)


def assert_close(actual, expected) -> None:
    # float32, against float64 from float32 alphas; of each step's own scale
    error = np.abs(actual - expected).max(axis=(1, 2, 3, 4)) / np.abs(expected).max(axis=(1, 2, 3, 4))
    assert error.max() <= 1e-4, error


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("S", [1, 2, 7, 30])
def test_dpm_plus_plus_2m(S: int, prediction_type: str) -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type=prediction_type)
    expected, timesteps = theirs(scheduler, x_T, S)
    assert_close(ours(x_T, table_at(np.int64(timesteps)), "dpm++2m", prediction_type), expected)


@pytest.mark.parametrize("S", [1, 7, 30])
def test_dpm_plus_plus_2m_sde(S: int) -> None:
    x_T, noise = draws(S)
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++")
    expected, timesteps = theirs(scheduler, x_T, S, noise)
    assert_close(ours(x_T, table_at(np.int64(timesteps)), "dpm++2m-sde", "epsilon", noise), expected)


def test_dpm_plus_plus_2m_with_thresholding() -> None:
    x_T, _ = draws(0)
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.4}
    expected, timesteps = theirs(diffusers.DPMSolverMultistepScheduler(**BETAS, **options), x_T, 7)
    assert_close(ours(x_T, table_at(np.int64(timesteps)), "dpm++2m", "epsilon", threshold=(0.9, 1.4)), expected)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("S", [1, 2, 3, 7, 30])
def test_unipc(S: int, prediction_type: str) -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, prediction_type=prediction_type, final_sigmas_type="zero")
    expected, timesteps = theirs(scheduler, x_T, S)
    assert_close(ours(x_T, table_at(np.int64(timesteps)), "unipc", prediction_type), expected)


def test_unipc_of_third_order() -> None:
    from jddim.solvers import Solver, unipc_plan

    x_T, _ = draws(0)
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, solver_order=3, final_sigmas_type="zero")
    expected, timesteps = theirs(scheduler, x_T, 11)
    solver = Solver(lambda table: unipc_plan(table, order=3))
    assert_close(ours(x_T, table_at(np.int64(timesteps)), solver, "epsilon"), expected)


@pytest.mark.parametrize("S", [2, 3, 5, 30])
@pytest.mark.parametrize("to_one", [True, False])
def test_plms(S: int, to_one: bool) -> None:
    # Of a network of eps: of one of v, theirs sums v of different t and turns the sum into eps, ours remembers eps.
    x_T, _ = draws(0)
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=to_one)
    expected, timesteps = theirs(scheduler, x_T, S)
    visited = np.unique(np.int64(timesteps))[::-1]
    previous = visited - T // S  # diffusers' rule
    table = table_at(visited, timesteps_prev=np.where(previous < 0, -1, previous), set_alpha_to_one=to_one)
    assert_close(ours(x_T, table, "plms", "epsilon"), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("S", [2, 4, 10, 28])  # whose linspace(0, 999, S) are integers
def test_heun(S: int, prediction_type: str) -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, prediction_type=prediction_type, timestep_spacing="linspace")
    expected, timesteps = in_sigmas(scheduler, x_T, S)
    visited = np.unique(np.int64(np.round(timesteps)))[::-1]
    assert_close(ours(x_T, table_at(visited), "heun", prediction_type), expected)


@pytest.mark.parametrize("S", [2, 4, 10, 28])
def test_euler_ancestral(S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_T, noise = draws(S)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    given = iter(nchw(z) for z in noise)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(given))
    expected, timesteps = in_sigmas(scheduler, x_T, S)
    table = table_at(np.int64(np.round(timesteps)))
    assert_close(ours(x_T, table, "euler-a", "epsilon", noise), expected)


def in_sigmas(scheduler, x_T, S: int) -> tuple[np.ndarray, list[float]]:
    """Schedulers whose sample is x_t / sqrt(alpha_bar_t): turned into ours on the way in and out."""
    scheduler.set_timesteps(S)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = scheduler.sigmas
    x = nchw(x_T) * torch.sqrt(sigmas[0] ** 2 + 1)
    xs = []
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t.double(), torch.sin)
        x = scheduler.step(output, t, x).prev_sample
        xs.append((x / torch.sqrt(sigmas[i + 1] ** 2 + 1)).numpy().transpose(0, 2, 3, 1))
    return np.array(xs), [float(t) for t in scheduler.timesteps]


def test_every_solver_has_a_case_here() -> None:
    assert set(SOLVERS) == {"ddim", "dpm++2m", "dpm++2m-sde", "unipc", "plms", "heun", "euler-a"}
