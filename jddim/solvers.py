"""The solvers that DDIM is compared with, on the same tables and denoisers: each is a table of coefficients.

A step of any linear multistep solver is a sum: of where it starts, of the network's last few predictions m_0, m_1, ...
(newest first, as x0, eps or eps - x0), and of noise,

    base   = base_x x_t + base_last last + sum_j base_history[j] m_j,     last <- base
    x_prev = step_x base + sum_j step_history[j] m_j + noise z,           z ~ N(0, I).

For most, base is x_t. A corrector (UniPC) replaces the x_t that the network has just seen by a better one, from the
base of the row before; a solver of several evaluations a step (Heun, PNDM, singlestep DPM-Solver) takes the step from
the old base again. So a solver is a function of the table alone, computed in float64 on the host, and one loop runs
them all.

Below, x_t = alpha x_0 + sigma eps and lambda = log(alpha / sigma). Adding a solver from outside:
make a `Solver` and pass it, or name it in `SOLVERS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jddim import ddim
from jddim.config import did_you_mean
from jddim.ddim import Column, StepTable, step_table
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
from jddim.schedule import NoiseSchedule, Schedule

Floats = NDArray[np.float64]

Means = Callable[[float, int], Floats]
"""(a step's exponent, n) -> the means of u^0 .. u^(n - 1) over the step, u from 0 to 1."""


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

    plan: a float64 step table on the host -> its `SolverTable`. history: "x0", "eps" or "velocity" (eps - x0), what it
    remembers.
    stochastic: whether it adds noise. asks_between: it also asks at t that the table has not, and its plan takes the
    schedule after the table.
    """

    plan: Callable[..., SolverTable]
    history: str = "x0"
    stochastic: bool = False
    asks_between: bool = False

    def rows(self, table: StepTable, schedule: Schedule | None = None) -> SolverTable:
        """The plan of a table. Raises ValueError without the schedule, where it is needed."""
        if not self.asks_between:
            return self.plan(table)
        if schedule is None:
            raise ValueError("this solver asks between the table's timesteps: give it the schedule, schedule=...")
        return self.plan(table, schedule)


class SolverOptions(Draws, Conventions, total=False):
    """The keyword arguments of `solver_loop`, but trajectory_every."""

    self_condition: bool
    schedule: Schedule | None


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
    schedule: Schedule | None = None,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """x_T to x_0 by a solver of SOLVERS, or any `Solver`. Traceable.

    table: `jddim.ddim.step_table`, on the host; best in float64, since the coefficients are made from it.
    key or noise: for stochastic solvers; noise has one row an evaluation, `(N, b, ...)`, N that of the solver's plan.
    clip_range, threshold: limit the x0 of solvers that remember x0; those that remember eps take the network's.
    schedule: the table's, for a solver that asks between its timesteps ("pndm").
    The other arguments and the result are `jddim.sampling.sample_loop`'s. Raises ValueError for an unknown solver.
    """
    solver = find(solver)
    check_prediction(table, prediction_type)
    plan = cast(solver.rows(table, schedule), x_T.dtype)
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
        latest = {"x0": x0, "eps": eps, "velocity": eps - x0}[solver.history]
        history = jnp.concatenate([latest[None], older])
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
#
# Let m be what a solver remembers, x0 or eps, a its factor in x_t, and b that of the other of the two. Then
#
#     x_prev = (b_prev / b_t) x_t + (a_prev - a_t b_prev / b_t) mean(m)
#
# is exact, where mean(m) is that of the network's predictions on the way down: over log(a / b), which is lambda or
# -lambda, with the weight a / b (Eq. 8 of arXiv:2211.01095 for x0, Eq. 3.4 of arXiv:2206.00927 for eps); or, for eps,
# over sigma / alpha with the weight 1 (Eq. 14 of arXiv:2010.02502). A solver takes a polynomial's mean (`_through`).


def ddim_plan(table: StepTable) -> SolverTable:
    """DDIM at eta 0 (arXiv:2010.02502, Eq. 12): of first order, over either variable."""
    steps = _steps(table, "x0")
    return _plan(table, step_x=steps.ratio, step_history=steps.total[:, None])


def dpm_plan(
    table: StepTable,
    order: int = 2,
    *,
    history: str = "x0",
    sde: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> SolverTable:
    """Multistep DPM-Solver++ (Lu et al., arXiv:2211.01095, Algorithm 2); of eps DPM-Solver. Over lambda.

    sde: of the diffusion SDE, so with noise (ibid., appendix), of order 1 or 2. solver_type: of order 2, "heun" takes
    its line's mean, "midpoint" its middle. lower_order_final: of fewer than 15 steps the last two are of order 2 and 1.
    euler_at_final: the last is of order 1, as one to the clean image always is.

    diffusers' DPMSolverMultistepScheduler. Its order 3, the authors', takes half the second difference, so that the
    error falls with the square of the step. Of the SDE in eps the step to the clean image is DDIM's, without noise.
    """
    _check_form(history, solver_type)
    if not 1 <= order <= (2 if sde else 3):
        raise ValueError(f"DPM-Solver has orders 1, 2 and, without noise, 3; got order {order}")
    steps = _steps(table, history, sde=sde)
    orders = _orders(table.num_steps, order, falls=lower_order_final and table.num_steps < 15)
    if euler_at_final:
        orders[-1] = 1

    def means(exponent: float, p: int) -> Floats:
        if p == 2 and solver_type == "midpoint":
            return _halfway(exponent, p)
        return _exponential(exponent, p) * [1, 1, 1 / 2][:p]

    weights = _multistep(steps, orders, order, means)
    return _plan(table, step_x=steps.ratio, step_history=weights, noise=steps.noise)


def dpm_singlestep_plan(
    table: StepTable,
    order: int = 2,
    *,
    history: str = "x0",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> SolverTable:
    """Singlestep DPM-Solver++ (arXiv:2211.01095, Algorithm 1); of eps DPM-Solver (arXiv:2206.00927). Over lambda.

    A step is of `order` rows: each leads from the step's start, by the predictions since, to where the next is made.
    solver_type: as in `dpm_plan`; of order 3 "midpoint" leaves the second prediction out. lower_order_final: the last
    step is of the rows that S leaves, at most order - 1; without it S is a multiple of `order`.

    diffusers' DPMSolverSinglestepScheduler.
    """
    _check_form(history, solver_type)
    if order not in (1, 2, 3):
        raise ValueError(f"singlestep DPM-Solver has orders 1, 2 and 3; got order {order}")
    _check_signal(np.asarray(table.alpha_t))
    S, to_clean = table.num_steps, np.asarray(table.sigma_prev)[-1] == 0
    orders = [1 + i % order for i in range(S)]
    if not lower_order_final and (orders[-1] < order or (to_clean and order > 1)):
        raise ValueError(
            f"without lower_order_final, order {order} needs a multiple of {order} steps, which end before the clean "
            f"image; got {S}{', to the clean image' if to_clean else ''}"
        )
    if to_clean or (lower_order_final and orders[-1] == order):
        orders[-1] = 1
    starts = np.array([i + 1 - p for i, p in enumerate(orders)])
    steps = _steps(table, history, starts)
    weights, midpoint = np.zeros((S, order)), solver_type == "midpoint"
    for i, p in enumerate(orders):
        ages = [2, 0] if p == 3 and midpoint else list(range(p))[::-1]  # that of the step's start first
        means = _halfway if p == 2 and midpoint else _exponential
        points = _points(steps, [i - k for k in ages], steps.length[i])
        weights[i, ages] = steps.total[i] * _through(points, steps.exponent[i], means)
    return _plan(table, step_x=steps.ratio, step_history=weights, again=starts < np.arange(S))


def deis_plan(table: StepTable, order: int = 2, *, lower_order_final: bool = True) -> SolverTable:
    """DEIS (Zhang and Chen, arXiv:2204.13902, multistep, of log rho) of eps, of order 1 and more. Over -lambda.

    lower_order_final: as in `dpm_plan`. diffusers' DEISMultistepScheduler; its log rho is -lambda.
    """
    if order < 1:
        raise ValueError(f"DEIS has orders from 1 on; got order {order}")
    _check_signal(np.asarray(table.alpha_t))
    steps = _steps(table, "eps")
    orders = _orders(table.num_steps, order, falls=lower_order_final and table.num_steps < 15)
    return _plan(table, step_x=steps.ratio, step_history=_multistep(steps, orders, order, _exponential))


def lms_plan(table: StepTable, order: int = 4) -> SolverTable:
    """Linear multistep of eps, of order 1 and more. Over sigma / alpha.

    Adams and Bashforth's, on the table's uneven steps: k-diffusion's sample_lms and diffusers' LMSDiscreteScheduler, by
    the exact integrals of the polynomials that those two give to a numerical one.
    """
    if order < 1:
        raise ValueError(f"LMS has orders from 1 on; got order {order}")
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    _check_signal(alpha)
    steps = _steps(table, "eps")._replace(at=sigma / alpha, length=sigma_prev / alpha_prev - sigma / alpha)
    orders = _orders(table.num_steps, order)
    return _plan(table, step_x=steps.ratio, step_history=_multistep(steps, orders, order, _uniform))


def unipc_plan(
    table: StepTable,
    order: int = 2,
    *,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
) -> SolverTable:
    """UniPC (Zhao et al., arXiv:2302.04867, Algorithms 1 and 2) of x0. Over lambda.

    Each evaluation first corrects the x_t that it was made at (UniC), then predicts from it (UniP). solver_type: B(h),
    h for "bh1" and e^h - 1 for "bh2", which takes effect where a polynomial has one coefficient beside its start; of
    more, Eq. 10's solution is the polynomial's mean. lower_order_final: the order falls to 1 at the end.

    diffusers' UniPCMultistepScheduler.
    """
    if solver_type not in ("bh1", "bh2") or order < 1:
        raise ValueError(f"UniPC is 'bh1' or 'bh2', of order 1 and more; got {solver_type!r}, order {order}")

    def means(h: float, n: int) -> Floats:
        if n != 2:
            return _exponential(h, n)
        return np.array([1, (1 if solver_type == "bh2" else h / -math.expm1(-h)) / 2])

    alpha, sigma, _, _ = _alphas(table)
    steps = _steps(table, "x0")
    S = table.num_steps
    orders = _orders(S, order, falls=lower_order_final)
    plan = _plan(table, step_x=steps.ratio, step_history=_multistep(steps, orders, order + 1, means))
    base_x, base_last, base_history = np.ones(S), np.zeros(S), np.zeros((S, order + 1))
    for i in range(1, S):  # over the step that led here, with its order: m_1 is of its start, m_0 of its end
        h = steps.at[i] - steps.at[i - 1]
        if h > 0:
            base_x[i], base_last[i] = 0, sigma[i] / sigma[i - 1]
            ages = [1, 0, *range(2, orders[i - 1] + 1)]
            points = _points(steps, [i - 1, *(i - k for k in ages[2:])], h)
            points.insert(1, 1.0)
            base_history[i, ages] = (alpha[i] - base_last[i] * alpha[i - 1]) * _through(points, h, means)
    return _checked(plan._replace(base_x=base_x, base_last=base_last, base_history=base_history))


def heun_plan(table: StepTable) -> SolverTable:
    """Heun's method of eps (Karras et al., arXiv:2206.00364, Algorithm 1 without churn). Over sigma / alpha.

    Each step is taken twice, to where eps is asked again and then by the mean of both, but one to the clean image:
    2 S - 1 evaluations.
    """
    return _heun(table)


@functools.cache
def churned_heun(s_churn: float, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Solver:
    """Heun's method with churn, for EDM's path: Algorithm 2 of arXiv:2206.00364 and its defaults.

    s_churn: in a run of S steps each one's sigma grows by the factor 1 + min(s_churn / S, sqrt(2) - 1) first, by noise
    of the standard deviation s_noise. s_tmin, s_tmax: the sigmas at which it does. The noise before a step is drawn at
    the end of the one before it; before the first it is part of x_T, so a run starts at the grown sigma.

    Raises ValueError unless s_churn >= 0, 0 <= s_tmin <= s_tmax and s_noise > 0; its plan, for a path with another
    alpha than 1.
    """
    if not (0 <= s_churn < math.inf and 0 <= s_tmin <= s_tmax and 0 < s_noise < math.inf):
        raise ValueError(
            "s_churn must be at least 0, s_noise above 0, and s_tmin at most s_tmax; got "
            f"s_churn {s_churn:g}, s_noise {s_noise:g}, s_tmin {s_tmin:g} and s_tmax {s_tmax:g}"
        )
    return Solver(partial(_churned, churn=(s_churn, s_tmin, s_tmax, s_noise)), history="eps", stochastic=True)


def _churned(table: StepTable, churn: tuple[float, float, float, float]) -> SolverTable:
    s_churn, s_tmin, s_tmax, s_noise = churn
    alpha, sigma, _, _ = _alphas(table)
    if (alpha != 1).any():
        raise ValueError("s_churn is of EDM's path, where alpha_t is 1; this schedule's is not")
    grown = np.where((s_tmin <= sigma) & (sigma <= s_tmax), min(s_churn / table.num_steps, math.sqrt(2) - 1), 0.0)
    sigma_hat = sigma * (1 + grown)
    heun = _heun(table._replace(t=sigma_hat, sigma_t=sigma_hat))
    # The second evaluation of each step but the last adds what the next step's sigma grows by.
    noise = np.zeros(heun.num_steps)
    noise[1 : 2 * table.num_steps - 2 : 2] = s_noise * np.sqrt(sigma_hat**2 - sigma**2)[1:]
    return heun._replace(noise=noise)


def heun_flow_plan(table: StepTable) -> SolverTable:
    """Heun's method of the velocity eps - x0, in 2 S - 1 evaluations as `heun_plan`. Over sigma / (alpha + sigma).

    Of a flow that is t, and x_t / (alpha + sigma) x_t itself: Heun's method of its ODE, from pure noise on.
    """
    return _heun(table, velocity=True)


def plms_plan(table: StepTable) -> SolverTable:
    """PLMS: Adams and Bashforth's rules over the last four eps (Liu et al., arXiv:2202.09778), in S + 1 evaluations.

    Its start is latent diffusion's: the first step is taken twice, as Heun's, and the second eps not remembered
    (diffusers' PNDMScheduler with skip_prk_steps).
    """
    rows = np.append(0, np.arange(table.num_steps)) if table.num_steps > 1 else np.arange(1)
    weights = [_adams_bashforth([j for j in range(i, -1, -1) if j != 1], i) for i in range(len(rows))]
    if len(rows) > 1:
        weights[1] = [0.5, 0.5]
    return _tries_plan(table, rows, weights, asked=np.where(np.arange(len(rows)) == 1, 2, 0))


def pndm_plan(table: StepTable, schedule: Schedule) -> SolverTable:
    """PNDM (Liu et al., arXiv:2202.09778, Algorithm 2): PLMS after 3 Runge-Kutta steps, in S + 9 evaluations.

    A Runge-Kutta step asks four times, twice halfway, at a t that the schedule has and the table has not; its first
    eps is remembered. The last step is not one. diffusers' PNDMScheduler.
    """
    S = table.num_steps
    kutta = min(3, S - 1)
    rows = np.append(np.repeat(np.arange(kutta), 4), np.arange(kutta, S))
    asked = np.append(np.tile([0, 1, 1, 2], kutta), np.zeros(S - kutta, int))
    ends = np.append(np.tile([1, 1, 2, 2], kutta), np.full(S - kutta, 2))
    weights = [[1.0], [1.0], [1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]] * kutta
    first = np.flatnonzero(asked == 0)
    weights += [_adams_bashforth([int(j) for j in first[::-1] if j <= i], i) for i in range(4 * kutta, len(rows))]
    halfway = (np.asarray(table.t) + np.asarray(table.t_prev)) / 2
    if isinstance(schedule, NoiseSchedule):
        if table.t.dtype != np.int32:
            raise ValueError("pndm asks halfway between whole timesteps, which this table's t are not")
        halfway = np.maximum(np.floor(halfway), 0).astype(np.int32)
    else:
        halfway = np.maximum(halfway, schedule.t_min)  # the last step's, which is not asked
    middle = step_table(schedule, halfway, np.float64)
    return _tries_plan(table, rows, weights, asked=asked, ends=ends, middle=middle)


def euler_ancestral_plan(table: StepTable) -> SolverTable:
    """Euler's method of eps with ancestral noise (k-diffusion's sample_euler_ancestral): DDIM at eta 1."""
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    _check_signal(alpha)
    s, s_prev = sigma / alpha, sigma_prev / alpha_prev
    up = np.minimum(s_prev, s_prev * np.sqrt(s**2 - s_prev**2) / s)
    down = np.sqrt(s_prev**2 - up**2)  # x / alpha goes to x / alpha + (down - s) eps + up z
    return _plan(
        table, step_x=alpha_prev / alpha, step_history=(alpha_prev * (down - s))[:, None], noise=alpha_prev * up
    )


def _dpm(order: int, history: str = "x0", *, sde: bool = False) -> Solver:
    return Solver(partial(dpm_plan, order=order, history=history, sde=sde), history, stochastic=sde)


def _dpm_singlestep(order: int, history: str = "x0") -> Solver:
    return Solver(partial(dpm_singlestep_plan, order=order, history=history), history)


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim_plan),
    "dpm++2m": _dpm(2),
    "dpm++3m": _dpm(3),
    "dpm++2s": _dpm_singlestep(2),
    "dpm++3s": _dpm_singlestep(3),
    "dpm++2m-sde": _dpm(2, sde=True),
    "dpm2m": _dpm(2, "eps"),
    "dpm3m": _dpm(3, "eps"),
    "dpm2s": _dpm_singlestep(2, "eps"),
    "dpm3s": _dpm_singlestep(3, "eps"),
    "dpm2m-sde": _dpm(2, "eps", sde=True),
    "unipc": Solver(unipc_plan),
    "unipc-bh1": Solver(partial(unipc_plan, solver_type="bh1")),
    "deis": Solver(deis_plan, history="eps"),
    "lms": Solver(lms_plan, history="eps"),
    "heun": Solver(heun_plan, history="eps"),
    "heun-flow": Solver(heun_flow_plan, history="velocity"),
    "plms": Solver(plms_plan, history="eps"),
    "pndm": Solver(pndm_plan, history="eps", asks_between=True),
    "euler-a": Solver(euler_ancestral_plan, history="eps", stochastic=True),
}


# -- what they share --------------------------------------------------------------------------------------------------


def _alphas(table: StepTable) -> tuple[Floats, Floats, Floats, Floats]:
    """alpha, sigma where each step starts, and where it ends, in float64."""
    alpha, sigma, alpha_prev, sigma_prev = (np.asarray(column, np.float64) for column in table[3:7])
    return alpha, sigma, alpha_prev, sigma_prev


def _check_form(history: str, solver_type: str) -> None:
    if history not in ("x0", "eps") or solver_type not in ("midpoint", "heun"):
        raise ValueError(
            f"DPM-Solver remembers 'x0' or 'eps' and is 'midpoint' or 'heun'; got {history!r} and {solver_type!r}"
        )


NO_SIGNAL = (
    "this solver has no step from alpha_t = 0 (a flow's start, or zero terminal SNR): leave that timestep out, or take "
    "dpm++2m, unipc or heun-flow"
)


def _check_signal(alpha: Floats) -> None:
    if (alpha == 0).any():
        raise ValueError(NO_SIGNAL)


class _Steps(NamedTuple):
    """Steps as in the equation above, each `(S,)`.

    at: the variable at each row. length: of the step, in it. exponent: of the weight, which grows by e to this power.
    ratio, total: what x_t and mean(m) are multiplied by. noise: what is added, a standard deviation.
    """

    at: Floats
    length: Floats
    exponent: Floats
    ratio: Floats
    total: Floats
    noise: Floats


def _steps(table: StepTable, history: str, starts: NDArray[np.int64] | None = None, *, sde: bool = False) -> _Steps:
    """The steps over log(a / b), each from the row `starts` of it (None: from its own) to where its own row ends.

    Of the SDE, x0 has the weight (a / b)^2, and eps has twice the total.
    """
    alpha, sigma, alpha_prev, sigma_prev = _alphas(table)
    a, b, a_prev, b_prev = (
        (alpha, sigma, alpha_prev, sigma_prev) if history == "x0" else (sigma, alpha, sigma_prev, alpha_prev)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        at, end = np.log(a / b), np.log(a_prev / b_prev)
        if starts is not None:
            a, b = a[starts], b[starts]
        length = end - np.log(a / b)
        ratio = b_prev / b
        noise = np.zeros_like(at)
        exponent = length
        if sde and history == "x0":
            ratio, exponent, noise = ratio * np.exp(-length), 2 * length, b_prev * np.sqrt(-np.expm1(-2 * length))
        total = a_prev - ratio * a
        if sde and history == "eps":
            inner = a_prev > 0
            total = np.where(inner, 2, 1) * total
            noise = a_prev * np.sqrt(np.expm1(-2 * np.where(inner, length, 0)))
    return _Steps(at, length, exponent, ratio, total, noise)


def _orders(S: int, order: int, *, falls: bool = False) -> list[int]:
    """Each step's order: it grows from 1 at the start, and falls to 1 at the end."""
    return [min(order, i + 1, S - i if falls else order) for i in range(S)]


def _multistep(steps: _Steps, orders: list[int], width: int, means: Means) -> Floats:
    """What a step multiplies the last predictions by, the newest first: `(S, width)`."""
    weights = np.zeros((len(orders), width))
    for i, p in enumerate(orders):
        points = _points(steps, range(i, i - p, -1), steps.length[i])
        weights[i, :p] = steps.total[i] * _through(points, steps.exponent[i], means)
    return weights


def _points(steps: _Steps, rows: Sequence[int], length: float) -> list[float]:
    """Where the predictions of these rows were made, in lengths of the step that starts at the first of them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return [0.0, *((steps.at[row] - steps.at[rows[0]]) / length for row in rows[1:])]


def _through(points: Sequence[float], exponent: float, means: Means) -> Floats:
    """The weights of predictions in the mean over a step of the polynomial through them.

    points: where they were made, 0 the start of the step, which is the first, and 1 its end; a point that is repeated,
    or infinitely far, is left out. means: the means of the polynomial's powers.
    """
    used = [k for k, u in enumerate(points) if math.isfinite(u) and u not in points[:k]]
    weights = np.zeros(len(points))
    weights[0] = 1
    if len(used) > 1:
        powers = np.vander([points[k] for k in used], increasing=True).T
        weights[used] = np.linalg.solve(powers, means(exponent, len(points))[: len(used)])
    return weights


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _exponential(exponent: float, n: int) -> Floats:
    """The means of u^0 .. u^(n - 1) over 0..1 with a weight that grows by e^exponent: `(n,)`.

    By Gauss' rule, exact to rounding for exponents within -100..100; the closed forms cancel in short steps.
    """
    u = (1 + _NODES) / 2
    weight = _WEIGHTS * np.exp(exponent * u - max(exponent, 0))
    return np.array([(weight * u**k).sum() / weight.sum() for k in range(n)])


def _uniform(exponent: float, n: int) -> Floats:
    """The means of u^0 .. u^(n - 1) over 0..1."""
    return 1 / np.arange(1.0, n + 1)


def _halfway(exponent: float, n: int) -> Floats:
    """The values of 1 and u in the middle of 0..1, in place of their means."""
    return np.array([1, 1 / 2])


_ADAMS_BASHFORTH = (
    [1.0],
    [3 / 2, -1 / 2],
    [23 / 12, -16 / 12, 5 / 12],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
)


def _adams_bashforth(remembered: Sequence[int], i: int) -> list[float]:
    """The rule over the last four of the evaluations `remembered`, newest first: what it multiplies each by, by age."""
    last = remembered[:4]
    by_age = [0.0] * (1 + i - last[-1])
    for j, weight in zip(last, _ADAMS_BASHFORTH[len(last) - 1], strict=True):
        by_age[i - j] = weight
    return by_age


def _plan(
    table: StepTable,
    *,
    step_x: Floats,
    step_history: Floats,
    noise: Floats | None = None,
    again: NDArray[np.bool_] | None = None,
) -> SolverTable:
    """A plan whose base is x_t, or the base before where a step is taken again. Raises ValueError as `_checked`."""
    S = table.num_steps
    again = np.zeros(S, bool) if again is None else again
    return _checked(
        SolverTable(
            **{name: np.asarray(column) for name, column in table._asdict().items()},
            base_x=np.where(again, 0.0, 1.0),
            base_last=np.where(again, 1.0, 0.0),
            base_history=np.zeros_like(step_history),
            step_x=step_x,
            step_history=step_history,
            noise=np.zeros(S) if noise is None else noise,
        )
    )


def _checked(plan: SolverTable) -> SolverTable:
    """The plan, or ValueError where a coefficient is none."""
    if not all(np.isfinite(column).all() for column in plan[8:]):
        raise ValueError(NO_SIGNAL)
    return plan


def _heun(table: StepTable, *, velocity: bool = False) -> SolverTable:
    rows = np.repeat(np.arange(table.num_steps), np.where(np.asarray(table.sigma_prev) == 0, 1, 2))
    again = np.append(False, np.diff(rows) == 0)
    weights = [[0.5, 0.5] if second else [1.0, 0.0] for second in again]
    return _tries_plan(table, rows, weights, asked=np.where(again, 2, 0), velocity=velocity)


def _tries_plan(
    table: StepTable,
    rows: NDArray[np.int64],
    weights: list[list[float]],
    *,
    asked: NDArray[np.int64],
    ends: NDArray[np.int64] | None = None,
    middle: StepTable | None = None,
    velocity: bool = False,
) -> SolverTable:
    """DDIM's steps `rows` of the table, each by a weighted sum of the eps so far, by age, or of the velocities. The
    network is asked where the step starts (0), halfway, at its row of `middle` (1), or where it ends (2); so `ends`
    says where the row leads.
    """
    alpha, sigma, _, _ = _alphas(table)
    if not velocity:
        _check_signal(alpha)
    middle = table if middle is None else middle
    ends = np.full(len(rows), 2) if ends is None else ends
    t, alphas, sigmas = (
        np.stack([np.asarray(column) for column in columns])
        for columns in (
            (table.t, middle.t, table.t_prev),
            (table.alpha_t, middle.alpha_t, table.alpha_prev),
            (table.sigma_t, middle.sigma_t, table.sigma_prev),
        )
    )
    tries = StepTable(
        step=np.arange(len(rows), dtype=np.int32),
        t=np.maximum(t[asked, rows], 0),
        t_prev=t[ends, rows],
        alpha_t=alphas[asked, rows],
        sigma_t=sigmas[asked, rows],
        alpha_prev=alphas[ends, rows],
        sigma_prev=sigmas[ends, rows],
        fresh=np.where(asked == 0, np.asarray(table.fresh)[rows], 0.0),
    )
    _, _, alpha_prev, sigma_prev = _alphas(tries)
    # x_t / alpha goes by eps over sigma / alpha, x_t / (alpha + sigma) by the velocity over sigma / (alpha + sigma).
    scale, scale_prev = (alpha + sigma, alpha_prev + sigma_prev) if velocity else (alpha, alpha_prev)
    ratio = scale_prev / scale[rows]
    by_age = np.array([row + [0.0] * (max(map(len, weights)) - len(row)) for row in weights])
    total = sigma_prev - ratio * sigma[rows]
    return _plan(tries, step_x=ratio, step_history=total[:, None] * by_age, again=asked > 0)
