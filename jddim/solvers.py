"""The solvers that DDIM is compared with, on the same tables and denoisers: each is a table of coefficients.

A step of any linear multistep solver is a sum: of where it starts, of the network's last few predictions m_0, m_1, ...
(newest first, as x0 or as eps), and of noise,

    base   = base_x x_t + base_last last + sum_j base_history[j] m_j,     last <- base
    x_prev = step_x base + sum_j step_history[j] m_j + noise z,           z ~ N(0, I).

For most, base is x_t. A corrector (UniPC) replaces the x_t that the network has just seen by a better one, from the
base of the row before; a solver of several evaluations a step (Heun, PLMS at its start) takes the step from the old
base again. So a solver is a function of the table alone, computed in float64 on the host, and one loop runs them all.

Below, x_t = alpha x_0 + sigma eps and lambda = log(alpha / sigma). Adding a solver from outside:
make a `Solver` and pass it, or name it in `SOLVERS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jddim import ddim
from jddim.config import did_you_mean
from jddim.ddim import Column, StepTable
from jddim.sampling import (
    Conventions,
    Denoiser,
    Draws,
    Limits,
    Table,
    Trajectory,
    Update,
    check_prediction,
    limiter,
    update_loop,
)

Floats = NDArray[np.float64]


class SolverTable(NamedTuple):
    """A `StepTable` of N evaluations with the coefficients of the module's two equations.

    base_x, base_last, step_x, noise: `(N,)`. base_history, step_history: `(N, K)`, K the predictions remembered.
    """

    step: Column
    t: Column
    t_prev: Column
    alpha_t: Column
    sigma_t: Column
    alpha_prev: Column
    sigma_prev: Column
    fresh: Column
    base_x: Column
    base_last: Column
    base_history: Column
    step_x: Column
    step_history: Column
    noise: Column

    @property
    def num_steps(self) -> int:
        """The number of evaluations."""
        return self.t.shape[0]


@dataclasses.dataclass(frozen=True)
class Solver:
    """A linear multistep solver.

    plan: a float64 step table on the host -> its `SolverTable`. history: "x0" or "eps", what it remembers.
    stochastic: whether it adds noise.
    """

    plan: Callable[[StepTable], SolverTable]
    history: str = "x0"
    stochastic: bool = False


class SolverOptions(Draws, Conventions, total=False):
    """The keyword arguments of `solver_loop`, but trajectory_every."""

    self_condition: bool


@overload
def solver_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    solver: str | Solver = "dpm++2m",
    *,
    trajectory_every: None = None,
    **options: Unpack[SolverOptions],
) -> Array: ...
@overload
def solver_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    solver: str | Solver = "dpm++2m",
    *,
    trajectory_every: int,
    **options: Unpack[SolverOptions],
) -> tuple[Array, Trajectory]: ...
def solver_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    solver: str | Solver = "dpm++2m",
    *,
    key: Array | None = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """x_T to x_0 by a solver of SOLVERS, or any `Solver`. Traceable.

    table: `jddim.ddim.step_table`, on the host; best in float64, since the coefficients are made from it.
    key or noise: for stochastic solvers; noise has one row an evaluation, `(N, b, ...)`, N that of the solver's plan.
    clip_range, threshold: limit the x0 of solvers that remember x0; those that remember eps take the network's.
    The other arguments and the result are `jddim.sampling.sample_loop`'s. Raises ValueError for an unknown solver.
    """
    solver = find(solver)
    check_prediction(table, prediction_type)
    plan = cast(solver.plan(table), x_T.dtype)
    update = solver_update(solver, prediction_type=prediction_type, clip_range=clip_range, threshold=threshold)
    return update_loop(
        denoise,
        update,
        x_T,
        plan,
        key=key,
        noise=noise,
        deterministic=not solver.stochastic,
        memory=memory_of(plan, x_T),
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )


def solver_update(
    solver: Solver,
    *,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
) -> Update:
    """The module's two equations, as the step of a loop with `memory_of` its table."""
    limit = limiter(clip_range, threshold)

    def update(
        x_t: Array, output: Array, noise: Array, row: SolverTable, memory: tuple[Array, Array]
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        last, older = memory
        x0, eps = ddim.predict_both(output, x_t, row.alpha_t, row.sigma_t, prediction_type)
        x0 = x0 if limit is None else limit(x0)
        history = jnp.concatenate([(x0 if solver.history == "x0" else eps)[None], older])
        base = x_t * row.base_x + last * row.base_last + _sum(row.base_history, history)
        x_prev = base * row.step_x + _sum(row.step_history, history) + noise * row.noise
        return x_prev, x0, (base, history[:-1])

    return update


def _sum(weights: Column, history: Array) -> Array:
    """Of K predictions by K weights; not by a matrix product, which a GPU would do in TF32."""
    return (weights.reshape(-1, *[1] * (history.ndim - 1)) * history).sum(axis=0)


def memory_of(table: SolverTable, x_T: Array) -> tuple[Array, Array]:
    """What a solver remembers at first: (the last base, the older predictions `(K - 1, b, ...)`), zeros."""
    zero = jnp.zeros_like(x_T)
    return zero, jnp.broadcast_to(zero, (table.step_history.shape[1] - 1, *x_T.shape))


def find(solver: str | Solver) -> Solver:
    """The solver of that name, or the one given. Raises ValueError for another."""
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"unknown method {solver!r}{did_you_mean(solver, SOLVERS)}")
    return SOLVERS[solver]


def cast(table: Table, dtype: DTypeLike) -> Table:
    """A table, of steps or of a solver, with its floating-point columns in `dtype`."""
    return type(table)(*(c if c.dtype == np.int32 else c.astype(dtype) for c in table))


# -- the solvers ------------------------------------------------------------------------------------------------------


def ddim_plan(table: StepTable) -> SolverTable:
    """DDIM at eta 0 (arXiv:2010.02502, Eq. 12); also DPM-Solver-1 and DPM-Solver++ of first order."""
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    ratio = sigma_prev / sigma
    return _plan(table, step_x=ratio, step_history=(alpha_prev - ratio * alpha)[:, None])


def dpm_plus_plus_2m_plan(table: StepTable) -> SolverTable:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, Algorithm 2): second order from the last two x0.

    The first step is of first order, and so is one that ends at the clean image, where lambda is infinite: diffusers'
    DPMSolverMultistepScheduler.
    """
    _, sigma, alpha_prev, sigma_prev = _alphas(table)
    h, h_last = _lambda_steps(table)
    weight = -alpha_prev * np.expm1(-h)
    return _plan(table, step_x=sigma_prev / sigma, step_history=_extrapolated(weight, h, h_last))


def dpm_plus_plus_2m_sde_plan(table: StepTable) -> SolverTable:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, appendix): of the diffusion SDE in place of its ODE, so with noise."""
    _, sigma, alpha_prev, sigma_prev = _alphas(table)
    h, h_last = _lambda_steps(table)
    weight = -alpha_prev * np.expm1(-2 * h)
    return _plan(
        table,
        step_x=sigma_prev / sigma * np.exp(-h),
        step_history=_extrapolated(weight, h, h_last),
        noise=sigma_prev * np.sqrt(-np.expm1(-2 * h)),
    )


def unipc_plan(table: StepTable, order: int = 2) -> SolverTable:
    """UniPC with B(h) = e^h - 1 (Zhao et al., arXiv:2302.04867, Algorithms 1 and 2, "bh2"), of x0.

    Each evaluation first corrects the x_t that it was made at (UniC), then predicts from it (UniP). The order grows
    from 1 at the start and falls to 1 at the end: diffusers' UniPCMultistepScheduler.
    """
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    h, h_last = _lambda_steps(table)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    if (h == 0).any():
        raise ValueError(
            "unipc has no step from a t to itself, which this spacing repeats: take another spacing or solver"
        )
    S = table.num_steps
    orders = [min(order, i + 1, S - i) for i in range(S)]
    step_history, base_history = np.zeros((S, order + 1)), np.zeros((S, order + 1))
    base_x, base_last = np.zeros(S), np.zeros(S)
    base_x[0] = 1
    for i, p in enumerate(orders):
        points = [(lam[i - k] - lam[i]) / h[i] for k in range(1, p)]  # of m_1, m_2, ..., in steps
        weight = -alpha_prev[i] * math.expm1(-h[i])
        step_history[i, 0] = weight
        for k, (rho, r) in enumerate(zip(_uni_weights(h[i], points), points, strict=True), 1):
            step_history[i, [k, 0]] += weight * rho / r * np.array([1, -1])
        if i == 0:
            continue
        # The corrector, over the step that led here and with its order: m_1 is of its start, m_0 of its end.
        points = [(lam[i - 1 - k] - lam[i - 1]) / h_last[i] for k in range(1, orders[i - 1])]
        weight = -alpha[i] * math.expm1(-h_last[i])
        base_last[i] = sigma[i] / sigma[i - 1]
        base_history[i, 1] = weight
        *rhos, rho_end = _uni_weights(h_last[i], [*points, 1.0])
        base_history[i, [0, 1]] += weight * rho_end * np.array([1, -1])
        for k, (rho, r) in enumerate(zip(rhos, points, strict=True), 2):
            base_history[i, [k, 1]] += weight * rho / r * np.array([1, -1])
    plan = _plan(table, step_x=sigma_prev / sigma, step_history=step_history)
    return plan._replace(base_x=base_x, base_last=base_last, base_history=base_history)


def heun_plan(table: StepTable) -> SolverTable:
    """Heun's method in sigma / alpha (Karras et al., arXiv:2206.00364, Algorithm 1 without churn): 2 S - 1 evaluations.

    Each step is taken twice, to where eps is asked again and then by the mean of both, but one to the clean image.
    """
    rows = np.repeat(np.arange(table.num_steps), np.where(np.asarray(table.sigma_prev) == 0, 1, 2))
    return _eps_plan(table, rows, [[1.0]] * len(rows))


def plms_plan(table: StepTable) -> SolverTable:
    """PLMS: Adams and Bashforth's rules over the last four eps (Liu et al., arXiv:2202.09778): S + 1 evaluations.

    Its start is latent diffusion's: the first step is taken twice, as Heun's, and the second eps not remembered
    (diffusers' PNDMScheduler with skip_prk_steps).
    """
    rules = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    rows = np.append(0, np.arange(table.num_steps)) if table.num_steps > 1 else np.arange(1)
    weights: list[list[float]] = []
    for i in range(len(rows)):
        remembered = [j for j in range(i, -1, -1) if j != 1][:4]  # newest first
        by_age = [0.0] * 5
        for j, weight in zip(remembered, rules[len(remembered) - 1], strict=True):
            by_age[i - j] = weight
        weights.append(by_age)
    return _eps_plan(table, rows, weights)


def euler_ancestral_plan(table: StepTable) -> SolverTable:
    """Euler's method in sigma / alpha with ancestral noise (k-diffusion's sample_euler_ancestral): DDIM at eta 1."""
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    _check_signal(alpha)
    s, s_prev = sigma / alpha, sigma_prev / alpha_prev
    up = np.minimum(s_prev, s_prev * np.sqrt(s**2 - s_prev**2) / s)
    down = np.sqrt(s_prev**2 - up**2)  # x / alpha goes to x / alpha + (down - s) eps + up z
    return _plan(
        table, step_x=alpha_prev / alpha, step_history=(alpha_prev * (down - s))[:, None], noise=alpha_prev * up
    )


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim_plan),
    "dpm++2m": Solver(dpm_plus_plus_2m_plan),
    "dpm++2m-sde": Solver(dpm_plus_plus_2m_sde_plan, stochastic=True),
    "unipc": Solver(unipc_plan),
    "heun": Solver(heun_plan, history="eps"),
    "plms": Solver(plms_plan, history="eps"),
    "euler-a": Solver(euler_ancestral_plan, history="eps", stochastic=True),
}


# -- what they share --------------------------------------------------------------------------------------------------


def _alphas(table: StepTable) -> tuple[Floats, Floats, Floats, Floats]:
    """alpha, sigma where each step starts, and where it ends, in float64."""
    alpha, sigma, alpha_prev, sigma_prev = (np.asarray(column, np.float64) for column in table[3:7])
    return alpha, sigma, alpha_prev, sigma_prev


def _check_signal(alpha: Floats) -> None:
    if (alpha == 0).any():
        raise ValueError(
            "a solver in sigma / alpha has no step from alpha_t = 0 (zero terminal SNR): leave that timestep out, "
            "or take dpm++2m or unipc"
        )


def _lambda_steps(table: StepTable) -> tuple[Floats, Floats]:
    """By how much lambda grows in each step, infinite to the clean image; and in the step before, infinite at first."""
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    with np.errstate(divide="ignore"):
        lam, lam_prev = np.log(alpha / sigma), np.log(alpha_prev / sigma_prev)
    return lam_prev - lam, np.append(np.inf, np.diff(lam))


def _extrapolated(weight: Floats, h: Floats, h_last: Floats) -> Floats:
    """Coefficients of weight (m_0 + (m_0 - m_1) / (2 r)), r = h_last / h.

    Of weight m_0 where r is none: one of the two is infinite, or the step before led from a t to itself.
    """
    second = np.isfinite(h) & np.isfinite(h_last) & (h_last > 0)
    extra = weight * np.where(second, h, 0) / np.where(second, 2 * h_last, 1)
    return np.stack([weight + extra, -extra], axis=1)


def _uni_weights(h: float, points: list[float]) -> list[float]:
    """UniPC's rho at these points: what matches the exact integral's Taylor series (Eq. 10); 1/2 for a single one."""
    if len(points) < 2:
        return [0.5] * len(points)
    phi, factorial, b = math.expm1(-h) / -h - 1, 1, []
    for k in range(1, len(points) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return list(np.linalg.solve(np.vander(points, increasing=True).T, b))


def _plan(table: StepTable, *, step_x: Floats, step_history: Floats, noise: Floats | None = None) -> SolverTable:
    """A plan without correction: the base is x_t. Raises ValueError where a coefficient is none."""
    S = table.num_steps
    if not all(np.isfinite(column).all() for column in (step_x, step_history)):
        raise ValueError("this solver has no step from alpha_t = 0 (zero terminal SNR): leave its first timestep out")
    return SolverTable(
        **{name: np.asarray(column) for name, column in table._asdict().items()},
        base_x=np.ones(S),
        base_last=np.zeros(S),
        base_history=np.zeros_like(step_history),
        step_x=step_x,
        step_history=step_history,
        noise=np.zeros(S) if noise is None else noise,
    )


def _eps_plan(table: StepTable, rows: NDArray[np.int64], weights: list[list[float]]) -> SolverTable:
    """DDIM's steps `rows` of the table, each by a weighted sum of the eps so far. A step that comes again is taken anew
    from where it started, by the mean of its own eps and the one asked where the first try led.
    """
    again = np.append(False, np.diff(rows) == 0)
    asked = StepTable(*(np.asarray(column)[rows] for column in table))
    alpha, sigma, alpha_prev, sigma_prev = _alphas(asked)
    _check_signal(alpha)
    ratio = alpha_prev / alpha
    by_age = np.asarray(weights, float)
    if again.any():
        by_age = np.pad(by_age, ((0, 0), (0, max(2 - by_age.shape[1], 0))))
        by_age[again] = np.eye(by_age.shape[1])[:2].mean(axis=0)
    asked = asked._replace(
        step=np.arange(len(rows), dtype=np.int32),
        t=np.where(again, np.maximum(asked.t_prev, 0), asked.t),
        alpha_t=np.where(again, asked.alpha_prev, asked.alpha_t),
        sigma_t=np.where(again, asked.sigma_prev, asked.sigma_t),
        fresh=np.where(again, 0.0, asked.fresh),
    )
    plan = _plan(asked, step_x=ratio, step_history=(sigma_prev - ratio * sigma)[:, None] * by_age)
    return plan._replace(base_x=np.where(again, 0.0, 1.0), base_last=np.where(again, 1.0, 0.0))
