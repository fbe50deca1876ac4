"""Each solver equals diffusers' scheduler of that kind at every step, through a stand-in network, in float64.

Theirs say torch.float32 and np.float32 here and there. In their modules those two names mean float64 below, so that all
of theirs, from the betas on, is as exact as ours.
"""

from __future__ import annotations

import itertools
import re
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from jddim.config import ScheduleConfig
from jddim.ddim import StepTable, step_table
from jddim.schedule import NoiseSchedule, make_schedule, zero_terminal_snr
from jddim.solvers import (
    SOLVERS,
    Solver,
    SolverTable,
    ddim_plan,
    deis_plan,
    dpm_plan,
    dpm_singlestep_plan,
    find,
    lms_plan,
    memory_of,
    solver_update,
    unipc_plan,
)

torch = pytest.importorskip("torch", reason="diffusers is in torch")
diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")

# Theirs: NumPy 2 on tensors of torch 2.13, and "dpmsolver", which is deprecated there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning"),
]

T, SHAPE = 1000, (3, 5, 7, 2)
CONFIG = ScheduleConfig("scaled_linear", T, 0.00085, 0.012)
SCHEDULE = make_schedule(CONFIG)
BETAS = {"num_train_timesteps": T, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class InFloat64:
    """A library, but its float32 is float64."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.float32 = library.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch):
    names = "dpmsolver_multistep dpmsolver_singlestep unipc_multistep deis_multistep lms_discrete pndm heun_discrete"
    for name in (*names.split(), "euler_ancestral_discrete"):
        module = getattr(diffusers.schedulers, f"scheduling_{name}")
        monkeypatch.setattr(module, "torch", InFloat64(torch))
        monkeypatch.setattr(module, "np", InFloat64(np))
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def network(x: Any, t: Any, sin: Any) -> Any:
    """A stand-in that is not linear, and another at every t."""
    return 0.8 * sin(1.3 * x + t / 90) + 0.1 * x


@cache
def update(history: str, prediction_type: str, **limits: tuple[float, float]) -> Any:
    """A step of ours, which tables of as many remembered predictions share."""
    return jax.jit(solver_update(Solver(ddim_plan, history), prediction_type=prediction_type, **limits))


def ours(x_T, table: StepTable, solver: str | Solver, prediction_type: str = "epsilon", noise=None, **limits):
    """The samples after each row of the solver's plan."""
    solver = find(solver)
    plan = solver.rows(table, SCHEDULE)
    step, memory = update(solver.history, prediction_type, **limits), memory_of(plan, x_T)
    x, xs = x_T, []
    for i, row in enumerate(SolverTable(*columns) for columns in zip(*plan, strict=True)):
        z = np.zeros(()) if noise is None else noise[i]
        x, _, memory = step(x, network(np.asarray(x), row.t, np.sin), z, row, memory)
        xs.append(np.asarray(x))
    return np.array(xs)


def theirs(scheduler, x_T, S: int, noise=None) -> tuple[np.ndarray, list[float]]:
    """The samples after each of the scheduler's evaluations, and the timesteps it asked at."""
    scheduler.set_timesteps(S)
    x = nchw(x_T)
    xs = []
    for i, t in enumerate(scheduler.timesteps):
        z = {} if noise is None else {"variance_noise": nchw(noise[i])}
        x = scheduler.step(network(x, t.double(), torch.sin), t, x, **z).prev_sample
        xs.append(x.numpy().transpose(0, 2, 3, 1))
    return np.array(xs), [float(t) for t in scheduler.timesteps]


def nchw(x: np.ndarray) -> Any:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def table_at(timesteps, **options) -> StepTable:
    return step_table(SCHEDULE, np.int64(np.round(timesteps)), np.float64, **options)


def draws(rows: int):
    rng = np.random.default_rng(3)
    return rng.standard_normal(SHAPE), rng.standard_normal((rows, *SHAPE))


def assert_close(actual, expected, rtol: float = 1e-11) -> None:
    # of each step's own scale
    error = np.abs(actual - expected).max(axis=(1, 2, 3, 4)) / np.abs(expected).max(axis=(1, 2, 3, 4))
    assert error.max() <= rtol, error


# -- DPM-Solver -----------------------------------------------------------------------------------------------------

HISTORY = {"dpmsolver++": "x0", "dpmsolver": "eps", "sde-dpmsolver++": "x0", "sde-dpmsolver": "eps"}
ENDS = ("zero", "sigma_min")


def both_ends(algorithm: str) -> tuple[str, ...]:
    return ENDS if HISTORY[algorithm] == "x0" else ENDS[1:]  # of eps theirs has no step to the clean image


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("S", [1, 2, 7, 30])
def test_dpm_plus_plus_2m(S: int, prediction_type: str) -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type=prediction_type)
    expected, timesteps = theirs(scheduler, x_T, S)
    assert_close(ours(x_T, table_at(timesteps), "dpm++2m", prediction_type), expected)


def test_dpm_plus_plus_2m_with_thresholding() -> None:
    x_T, _ = draws(0)
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.4}
    expected, timesteps = theirs(diffusers.DPMSolverMultistepScheduler(**BETAS, **options), x_T, 7)
    assert_close(ours(x_T, table_at(timesteps), "dpm++2m", threshold=(0.9, 1.4)), expected)


@pytest.mark.parametrize("S", [1, 2, 5, 17])
@pytest.mark.parametrize("algorithm", HISTORY)
def test_multistep(algorithm: str, S: int) -> None:
    sde = algorithm.startswith("sde")
    x_T, noise = draws(S)
    options = itertools.product((1, 2) if sde else (1, 2, 3), ("midpoint", "heun"), (True, False), (True, False))
    for (order, kind, falls, euler), end in itertools.product(options, both_ends(algorithm)):
        given = {"solver_type": kind, "lower_order_final": falls, "euler_at_final": euler}
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **BETAS, algorithm_type=algorithm, solver_order=order, final_sigmas_type=end, **given
        )
        expected, timesteps = theirs(scheduler, x_T, S, noise if sde else None)
        plan = partial(dpm_plan, order=order, history=HISTORY[algorithm], sde=sde, **given)
        solver = Solver(plan, HISTORY[algorithm], stochastic=sde)
        table = table_at(timesteps, set_alpha_to_one=end == "zero")
        assert_close(ours(x_T, table, solver, noise=noise if sde else None), expected)


@pytest.mark.parametrize("S", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_singlestep(algorithm: str, S: int) -> None:
    x_T, _ = draws(0)
    options = itertools.product((1, 2, 3), ("midpoint", "heun"), (True, False), both_ends(algorithm))
    for order, kind, falls, end in options:
        if not falls and (S % order or end == "zero"):
            continue  # theirs goes on with lower_order_final
        given = {"solver_type": kind, "lower_order_final": falls}
        scheduler = diffusers.DPMSolverSinglestepScheduler(
            **BETAS, algorithm_type=algorithm, solver_order=order, final_sigmas_type=end, **given
        )
        expected, timesteps = theirs(scheduler, x_T, S)
        plan = partial(dpm_singlestep_plan, order=order, history=HISTORY[algorithm], **given)
        table = table_at(timesteps, set_alpha_to_one=end == "zero")
        assert_close(ours(x_T, table, Solver(plan, HISTORY[algorithm])), expected)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name.startswith("dpm")])
def test_the_names_of_dpm_solver(name: str) -> None:
    plus, order, kind, sde = re.fullmatch(r"dpm(\+\+)?(\d)([ms])(-sde)?", name).groups()
    x_T, noise = draws(20)
    scheduler_class = diffusers.DPMSolverMultistepScheduler if kind == "m" else diffusers.DPMSolverSinglestepScheduler
    algorithm = f"{'sde-' if sde else ''}dpmsolver{plus or ''}"
    options = {"algorithm_type": algorithm, "solver_order": int(order), "final_sigmas_type": "sigma_min"}
    scheduler = scheduler_class(**BETAS, lower_order_final=True, **options)
    z = noise if sde else None
    expected, timesteps = theirs(scheduler, x_T, 20, z)
    assert_close(ours(x_T, table_at(timesteps, set_alpha_to_one=False), name, noise=z), expected)


# -- UniPC, DEIS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", ["unipc", "unipc-bh1"])
def test_unipc(name: str, prediction_type: str) -> None:
    x_T, _ = draws(0)
    bh1 = name.endswith("bh1")  # of which theirs has no step to the clean image
    options = {"solver_type": "bh1" if bh1 else "bh2", "final_sigmas_type": "sigma_min" if bh1 else "zero"}
    for S in (1, 2, 3, 7, 30):
        scheduler = diffusers.UniPCMultistepScheduler(**BETAS, prediction_type=prediction_type, **options)
        expected, timesteps = theirs(scheduler, x_T, S)
        assert_close(ours(x_T, table_at(timesteps, set_alpha_to_one=not bh1), name, prediction_type), expected)


@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_unipc_of_each_order(order: int, kind: str) -> None:
    x_T, _ = draws(0)
    for falls, S in itertools.product((True, False), (1, 2, 3, 11)):
        given = {"solver_type": kind, "lower_order_final": falls}
        scheduler = diffusers.UniPCMultistepScheduler(
            **BETAS, solver_order=order, final_sigmas_type="sigma_min", **given
        )
        expected, timesteps = theirs(scheduler, x_T, S)
        table = table_at(timesteps, set_alpha_to_one=False)
        assert_close(ours(x_T, table, Solver(partial(unipc_plan, order=order, **given))), expected, 1e-10)


def test_unipc_with_a_last_step_of_no_length() -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, use_karras_sigmas=True, final_sigmas_type="sigma_min")
    expected, timesteps = theirs(scheduler, x_T, 9)
    s = scheduler.sigmas.numpy()
    assert s[-2] == s[-1] > 0
    alpha = 1 / np.sqrt(1 + s**2)
    ends = {"alpha_t": alpha[:-1], "sigma_t": (s * alpha)[:-1], "alpha_prev": alpha[1:], "sigma_prev": (s * alpha)[1:]}
    table = table_at(timesteps)._replace(t=np.array(timesteps), **ends)
    assert_close(ours(x_T, table, "unipc"), expected)


@pytest.mark.parametrize("S", [1, 2, 7, 14, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int, S: int) -> None:
    x_T, _ = draws(0)
    for falls, prediction_type in itertools.product((True, False), PREDICTIONS):
        options = {"solver_order": order, "lower_order_final": falls, "prediction_type": prediction_type}
        expected, timesteps = theirs(diffusers.DEISMultistepScheduler(**BETAS, **options), x_T, S)
        solver = Solver(partial(deis_plan, order=order, lower_order_final=falls), history="eps")
        table = table_at(timesteps, set_alpha_to_one=False)
        assert_close(ours(x_T, table, "deis" if order == 2 and falls else solver, prediction_type), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_as_diffusers_has_it(prediction_type: str) -> None:
    # Its solvers' alpha_bar ends at 2^-24, not at 0 as its DDIMScheduler's and ours.
    x_T, _ = draws(0)
    zero = zero_terminal_snr(SCHEDULE)
    schedule = NoiseSchedule(zero.betas, np.append(zero.alphas_cumprod[:-1], 2.0**-24))
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind, name in (("DPMSolverMultistep", "dpm++2m"), ("UniPCMultistep", "unipc")):
        expected, timesteps = theirs(getattr(diffusers, f"{kind}Scheduler")(**BETAS, **options), x_T, 8)
        assert timesteps[0] == T - 1
        assert_close(ours(x_T, step_table(schedule, np.int64(timesteps), np.float64), name, prediction_type), expected)


# -- PNDM -----------------------------------------------------------------------------------------------------------


def pndm_table(timesteps, S: int, to_one: bool) -> StepTable:
    previous = np.int64(timesteps) - T // S  # diffusers' rule
    return table_at(timesteps, timesteps_prev=np.where(previous < 0, -1, previous), set_alpha_to_one=to_one)


@pytest.mark.parametrize("S", [2, 3, 5, 30])
@pytest.mark.parametrize("to_one", [True, False])
def test_plms(S: int, to_one: bool) -> None:
    # Of a network of eps: of one of v, theirs sums v of different t and turns the sum into eps, ours remembers eps.
    x_T, _ = draws(0)
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=to_one)
    expected, timesteps = theirs(scheduler, x_T, S)
    assert_close(ours(x_T, pndm_table(np.unique(timesteps)[::-1], S, to_one), "plms"), expected)


# Theirs does not reach the image in fewer; where T // S is odd, its tries lead to one t and ask at the next.
@pytest.mark.parametrize("S", [4, 5, 7, 50])
@pytest.mark.parametrize("to_one", [True, False])
def test_pndm(S: int, to_one: bool) -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.PNDMScheduler(**BETAS, set_alpha_to_one=to_one)
    expected, timesteps = theirs(scheduler, x_T, S)
    table = pndm_table(np.arange(S)[::-1] * (T // S), S, to_one)
    assert SOLVERS["pndm"].rows(table, SCHEDULE).t.tolist() == timesteps
    assert_close(ours(x_T, table, "pndm"), expected)


# -- in sigma / alpha: at S whose linspace(0, 999, S) are integers --------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("S", [2, 4, 10, 28])
def test_heun(S: int, prediction_type: str) -> None:
    x_T, _ = draws(0)
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, prediction_type=prediction_type, timestep_spacing="linspace")
    expected, timesteps = in_sigmas(scheduler, x_T, S)
    assert_close(ours(x_T, table_at(np.unique(timesteps)[::-1]), "heun", prediction_type), expected)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("S", [2, 4, 10, 28])
def test_lms(S: int, prediction_type: str) -> None:
    x_T, _ = draws(0)
    for order in (1, 2, 4):
        scheduler = diffusers.LMSDiscreteScheduler(**BETAS, prediction_type=prediction_type)
        expected, timesteps = in_sigmas(scheduler, x_T, S, order=order)
        solver = "lms" if order == 4 else Solver(partial(lms_plan, order=order), history="eps")
        assert_close(ours(x_T, table_at(timesteps), solver, prediction_type), expected)


@pytest.mark.parametrize("S", [2, 4, 10, 28])
def test_euler_ancestral(S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_T, noise = draws(S)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    given = iter(nchw(z) for z in noise)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(given))
    expected, timesteps = in_sigmas(scheduler, x_T, S)
    assert_close(ours(x_T, table_at(timesteps), "euler-a", noise=noise), expected)


def in_sigmas(scheduler, x_T, S: int, **options) -> tuple[np.ndarray, list[float]]:
    """Schedulers whose sample is x_t / sqrt(alpha_bar_t): turned into ours on the way in and out."""
    scheduler.set_timesteps(S)
    sigmas = scheduler.sigmas
    x = nchw(x_T) * torch.sqrt(sigmas[0] ** 2 + 1)
    xs = []
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t.double(), torch.sin)
        x = scheduler.step(output, t, x, **options).prev_sample
        xs.append((x / torch.sqrt(sigmas[i + 1] ** 2 + 1)).numpy().transpose(0, 2, 3, 1))
    return np.array(xs), [float(t) for t in scheduler.timesteps]


def test_every_solver_has_a_case_here() -> None:
    others = {"ddim", "unipc", "unipc-bh1", "deis", "lms", "heun", "plms", "pndm", "euler-a"}
    others.add("heun-flow")  # tests/test_paths.py has its ODE
    assert {name for name in SOLVERS if not name.startswith("dpm")} == others
