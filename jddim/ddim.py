"""The maths of DDIM (Song et al., arXiv:2010.02502): pure functions of arrays. No loop, no random keys, no network.

A noisy image is x_t = alpha_t x_0 + sigma_t eps. The paper's are alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 -
alpha_bar_t); its steps hold on every such path (flow: 1 - t and t; EDM: 1 and sigma). Equation numbers are the paper's,
which writes alpha_t for alpha_bar_t and sigma for the noise that a step adds (`ddim_sigma`).
Coefficients (`Coefficients`, `eta`) are scalars or one value per sample, `(b,)`; images are `(b, ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, TypeVar

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.typing import ArrayLike

from jddim.config import PREDICTION_TYPES, SamplerConfig, did_you_mean
from jddim.schedule import ContinuousSchedule, NoiseSchedule, Schedule
from jddim.timesteps import (
    check_times,
    check_timesteps,
    counts_itself,
    even_times,
    listed_times,
    make_timesteps,
    of_diffusers,
    of_ratios,
    previous_timesteps,
    spaced_ratios,
)

Column = Array | np.ndarray

Float64 = npt.NDArray[np.float64]

Floats = TypeVar("Floats", Array, Float64)


class StepTable(NamedTuple):
    """The sampler's steps, one row each, in the order taken; what `lax.scan` runs over.

    step: int32, the step's number from 0: which noise it uses.
    t, t_prev: the timestep left and the timestep reached, int32; float between whole timesteps and on continuous
        schedules. The last t_prev is the clean image's, -1, of continuous schedules 0.
    alpha_t, sigma_t, alpha_prev, sigma_prev, fresh: float, the steps' `Coefficients`. The last alpha_prev and
        sigma_prev are 1 and 0, unless set_alpha_to_one is False.
    Each `(S,)`; a slice of rows is again a table (`jax.tree.map(lambda c: c[i:j], table)`).
    """

    step: Column
    t: Column
    t_prev: Column
    alpha_t: Column
    sigma_t: Column
    alpha_prev: Column
    sigma_prev: Column
    fresh: Column

    def __repr__(self) -> str:
        """One line of a table on the host; the columns of a row, or of a table that is elsewhere or traced."""
        if not all(isinstance(column, np.ndarray) and column.ndim == 1 and column.size for column in self):
            return f"StepTable{tuple(self)!r}"
        named = [f"{t:g}" for t in self.t]
        t = ", ".join(named if self.num_steps <= 8 else [*named[:4], "...", *named[-3:]])
        ends = f"ends at t = {self.t_prev[-1]:g}, sigma {self.sigma_prev[-1]:g}"
        return f"StepTable({self.num_steps} steps: t = {t}; {ends})"

    @property
    def num_steps(self) -> int:
        """S, the number of rows."""
        return self.t.shape[0]

    @property
    def alpha_bar_t(self) -> Column:
        """alpha_t squared, `(S,)`."""
        return self.alpha_t**2

    @property
    def alpha_bar_prev(self) -> Column:
        """alpha_prev squared, `(S,)`."""
        return self.alpha_prev**2


class Coefficients(TypedDict):
    """What a step needs to know of its two ends.

    alpha_t, sigma_t, alpha_prev, sigma_prev: how much image and how much noise are in x_t and in x_prev. fresh: in
    [0, 1], of the noise in x_prev, the part that a step at eta = 1 draws anew, as a ratio of standard deviations: 0
    from a t to itself, 1 to the clean image. With q = (alpha_t / alpha_prev) (sigma_prev / sigma_t), the correlation of
    the noise in x_t with that in x_prev, fresh^2 = 1 - q^2: a difference that float32 would blur in a short step.
    """

    alpha_t: ArrayLike
    sigma_t: ArrayLike
    alpha_prev: ArrayLike
    sigma_prev: ArrayLike
    fresh: ArrayLike


def step_table(
    schedule: Schedule,
    timesteps: npt.ArrayLike,
    dtype: npt.DTypeLike = np.float32,
    *,
    timesteps_prev: npt.ArrayLike | None = None,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """The table of a schedule and a descending list of timesteps: float64 on the host, cast once to `dtype`.

    timesteps: `(S,)`, descending within 0..T-1; an entry may repeat (ermongroup's quad), and then steps to itself. Of a
        continuous schedule real numbers in t_min..t_max, above 0, each ending at the next and the last at 0; it takes
        no timesteps_prev and no set_alpha_to_one.
    timesteps_prev: `(S,)`, where each step ends, in -1..t (-1 is the clean image; see
    `jddim.timesteps.previous_timesteps`); None: at the next entry, the last at -1.
    set_alpha_to_one: the last step ends at the clean image; False: at t = 0 (diffusers' option of that name).

    Raises ValueError if `timesteps` does not descend within its bounds, or `timesteps_prev` does not precede it.
    """
    if isinstance(schedule, ContinuousSchedule):
        if timesteps_prev is not None or not set_alpha_to_one:
            raise ValueError("timesteps_prev and set_alpha_to_one are of schedules with T timesteps: leave them out")
        times = check_times(timesteps, schedule.t_min, schedule.t_max)
        return _path_table(times, schedule.alpha(times), schedule.sigma(times), 0, dtype)
    t = check_timesteps(timesteps, schedule.num_train_timesteps, repeats=True)
    t_prev = np.append(t[1:], -1) if timesteps_prev is None else np.asarray(timesteps_prev)
    if t_prev.shape != t.shape or (t_prev > t).any() or (t_prev < -1).any():
        raise ValueError(f"timesteps_prev must hold one entry in -1..t for each t of {t}, got {t_prev}")
    a_t, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev if set_alpha_to_one else np.maximum(t_prev, 0))
    rows = vp_rows(a_t, a_prev)
    rows["fresh"] = np.where(t == t_prev, 0.0, rows["fresh"])  # also where it is 0 / 0, at alpha_bar 0
    integers = (column.astype(np.int32) for column in (np.arange(len(t)), t, t_prev))
    return StepTable(*integers, **{name: np.asarray(column).astype(dtype) for name, column in rows.items()})


def _path_table(t: np.ndarray, alpha: Float64, sigma: Float64, clean: int, dtype: npt.DTypeLike) -> StepTable:
    """The table of a run along these points, `(S,)`, each step to the next, the last to the clean image, t = clean."""
    ends = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    ends_at = np.append(t[1:], np.array(clean, t.dtype))
    columns = (c if c.dtype == np.int32 else c.astype(dtype) for c in (t, ends_at))
    rows = {name: np.asarray(c).astype(dtype) for name, c in path_rows(alpha, sigma, *ends).items()}
    return StepTable(np.arange(len(t), dtype=np.int32), *columns, **rows)


def sampler_table(
    schedule: Schedule,
    sampler: SamplerConfig,
    num_steps: int | None = None,
    dtype: npt.DTypeLike = np.float32,
    spacing: str | Sequence[float] | np.ndarray | None = None,
) -> StepTable:
    """The step table of a source's conventions: its spacing, its rule for where a step ends, and the last one's end.

    num_steps, spacing: in place of the conventions' own; spacing may be an explicit list, which takes no num_steps.
    """
    spacing = sampler.spacing if spacing is None else spacing
    if isinstance(schedule, ContinuousSchedule):
        return _continuous_table(schedule, sampler, num_steps, dtype, spacing)
    if isinstance(spacing, str) and of_ratios(spacing):
        return _off_grid_table(schedule, sampler, sampler.num_steps if num_steps is None else num_steps, dtype, spacing)
    if num_steps is None and isinstance(spacing, str) and not counts_itself(spacing):
        num_steps = sampler.num_steps
    T = schedule.num_train_timesteps
    timesteps = make_timesteps(spacing, T, num_steps, sampler.steps_offset)
    return step_table(
        schedule,
        timesteps,
        dtype,
        timesteps_prev=previous_timesteps(timesteps, spacing, T),
        set_alpha_to_one=sampler.set_alpha_to_one or not of_diffusers(spacing),
    )


def _continuous_table(
    schedule: ContinuousSchedule,
    sampler: SamplerConfig,
    num_steps: int | None,
    dtype: npt.DTypeLike,
    spacing: str | Sequence[float] | np.ndarray,
) -> StepTable:
    """`sampler_table` where t is continuous: even in t, or in some measure of sigma / alpha, or a list of t."""
    if sampler.steps_offset or not sampler.set_alpha_to_one:
        raise ValueError("steps_offset and set_alpha_to_one are of schedules with T timesteps: leave them out")
    steps, ends = sampler.num_steps if num_steps is None else num_steps, (schedule.t_min, schedule.t_max)
    if isinstance(spacing, str):
        spacing = listed_times(spacing)
    if not isinstance(spacing, str):
        if num_steps not in (None, len(spacing)):
            raise ValueError(f"an explicit list of {len(spacing)} timesteps does not take num_steps={num_steps}")
        t: npt.ArrayLike = spacing
    elif spacing == "even":
        t = even_times(*ends, steps, sampler.shift)
    else:
        with np.errstate(divide="ignore"):
            least, largest = schedule.sigma(ends) / schedule.alpha(ends)
        t = schedule.time_of(spaced_ratios(spacing, least, largest, steps, sampler.rho))
    return step_table(schedule, t, dtype)


def _off_grid_table(
    schedule: NoiseSchedule, sampler: SamplerConfig, num_steps: int, dtype: npt.DTypeLike, spacing: str
) -> StepTable:
    """`sampler_table` between T - 1 and 0 by sigma / alpha, whatever whole timesteps there are."""
    ends = [0, schedule.num_train_timesteps - 1]
    with np.errstate(divide="ignore"):
        least, largest = schedule.sigma(ends) / schedule.alpha(ends)
    ratios = spaced_ratios(spacing, least, largest, num_steps, sampler.rho)
    t = schedule.time_of(ratios)
    t = t.round().astype(np.int32) if spacing.endswith("_rounded") else t
    alpha = 1 / np.sqrt(1 + ratios**2)
    return _path_table(t, alpha, alpha * ratios, -1, dtype)


def path_rows(
    alpha_t: npt.ArrayLike, sigma_t: npt.ArrayLike, alpha_prev: npt.ArrayLike, sigma_prev: npt.ArrayLike
) -> Coefficients:
    """The coefficients of steps between any two points of a Gaussian path, the second with less noise: host, float64.

    sigma_t, alpha_prev > 0. For alpha^2 + sigma^2 = 1 they are `vp_rows`'s.
    """
    alpha, sigma, alpha_prev, sigma_prev = (
        np.asarray(c, np.float64) for c in (alpha_t, sigma_t, alpha_prev, sigma_prev)
    )
    q = (alpha / alpha_prev) * (sigma_prev / sigma)
    return Coefficients(
        alpha_t=alpha,
        sigma_t=sigma,
        alpha_prev=alpha_prev,
        sigma_prev=sigma_prev,
        fresh=np.sqrt((1 - q) * (1 + q)),
    )


def vp_rows(alpha_bar_t: ArrayLike, alpha_bar_prev: ArrayLike) -> Coefficients:
    """The coefficients of steps between these alpha_bar, in [0, 1), and in [alpha_bar_t, 1]. Traceable.

    For schedules that are learned, `table._replace(**vp_rows(...))`, and for steps by hand. Of numbers on the host they
    are NumPy's, float64; of jax arrays they have their dtype, in which short steps lose digits of `fresh` (with 1000
    float32 ones, 1e-4 of it). At alpha_bar 0 and 1 the square roots' derivatives are 0, not infinite.
    """
    if isinstance(alpha_bar_t, Array) or isinstance(alpha_bar_prev, Array):
        return _rows(jnp.asarray(alpha_bar_t), jnp.asarray(alpha_bar_prev), root)
    with np.errstate(invalid="ignore"):  # 0 / 0, from alpha_bar 0 to itself
        return _rows(np.asarray(alpha_bar_t, np.float64), np.asarray(alpha_bar_prev, np.float64), np.sqrt)


def coefficients(row: StepTable) -> Coefficients:
    """The coefficients of a table, or of one of its rows, as `ddim_step` and `ddpm_step` take them."""
    return Coefficients(
        alpha_t=row.alpha_t,
        sigma_t=row.sigma_t,
        alpha_prev=row.alpha_prev,
        sigma_prev=row.sigma_prev,
        fresh=row.fresh,
    )


def add_noise(x0: Array, noise: ArrayLike, alpha_t: ArrayLike, sigma_t: ArrayLike) -> Array:
    """A sample of q(x_t | x0), Eq. 4: alpha_t x0 + sigma_t noise, noise ~ N(0, I) like x0."""
    return per_sample(alpha_t, x0) * x0 + per_sample(sigma_t, x0) * noise


def predict_x0(x_t: Array, eps: Array, alpha_t: ArrayLike, sigma_t: ArrayLike) -> Array:
    """The clean image that x_t and its noise imply, Eq. 9: (x_t - sigma_t eps) / alpha_t; alpha_t > 0."""
    return (x_t - per_sample(sigma_t, x_t) * eps) / per_sample(alpha_t, x_t)


def predict_eps(x_t: Array, x0: Array, alpha_t: ArrayLike, sigma_t: ArrayLike) -> Array:
    """The noise that x_t and its clean image imply, Eq. 9 solved for eps; sigma_t > 0."""
    return (x_t - per_sample(alpha_t, x_t) * x0) / per_sample(sigma_t, x_t)


def rederive_eps(x_t: Array, x0: Array, eps: Array, alpha_t: ArrayLike, sigma_t: ArrayLike) -> Array:
    """`predict_eps` of scalars, and eps as it is where sigma_t = 0, the clean image, which implies none."""
    clean = jnp.asarray(sigma_t) == 0
    return jnp.where(clean, eps, predict_eps(x_t, x0, alpha_t, jnp.where(clean, 1, sigma_t)))


def predict_both(
    output: Array, x_t: Array, alpha_t: ArrayLike, sigma_t: ArrayLike, prediction_type: str = "epsilon"
) -> tuple[Array, Array]:
    """(x0, eps) from a network's output, `(b, ...)` like x_t.

    prediction_type: "epsilon"; "sample", x0; "v_prediction", v = alpha_t eps - sigma_t x0 where alpha_t^2 + sigma_t^2 =
    1 (Salimans and Ho, arXiv:2202.00512, appendix D); or "velocity", eps - x0, which on the straight path is the
    derivative of x_t by t (flow matching, arXiv:2209.03003). The last two also serve at alpha_t = 0 and at sigma_t = 0.
    """
    match prediction_type:
        case "epsilon":
            return predict_x0(x_t, output, alpha_t, sigma_t), output
        case "sample":
            return output, predict_eps(x_t, output, alpha_t, sigma_t)
        case "v_prediction":
            alpha, sigma = per_sample(alpha_t, x_t), per_sample(sigma_t, x_t)
            return alpha * x_t - sigma * output, alpha * output + sigma * x_t
        case "velocity":
            alpha, sigma = per_sample(alpha_t, x_t), per_sample(sigma_t, x_t)
            return (x_t - sigma * output) / (alpha + sigma), (x_t + alpha * output) / (alpha + sigma)
    raise ValueError(f"unknown prediction_type {prediction_type!r}{did_you_mean(prediction_type, PREDICTION_TYPES)}")


def dynamic_threshold(x0: Array, ratio: ArrayLike = 0.995, largest: ArrayLike = 1.0) -> Array:
    """Imagen's dynamic thresholding (arXiv:2205.11487, section 2.3) of x0 `(b, ...)`: clamp to [-s, s], divide by s.

    s: each sample's `ratio` quantile of abs(x0), held between 1 and `largest` (diffusers' `sample_max_value`; its
    default 1 makes this the clamp to [-1, 1]).
    """
    ratio = jnp.asarray(ratio, jnp.result_type(ratio, x0))  # 1 as well as 1.0
    s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], math.prod(x0.shape[1:])), ratio, axis=1)
    s = per_sample(jnp.clip(s, 1, largest), x0)
    return jnp.clip(x0, -s, s) / s


def ddim_sigma(*, sigma_prev: ArrayLike, fresh: ArrayLike, eta: ArrayLike) -> Array:
    """The standard deviation of the noise that a step adds, Eq. 16. eta 0: none; eta 1: the DDPM posterior's."""
    return jnp.asarray(eta) * sigma_prev * fresh


def ddim_step(
    x0: Array,
    eps: Array,
    noise: ArrayLike,
    *,
    alpha_t: ArrayLike,
    sigma_t: ArrayLike,
    alpha_prev: ArrayLike,
    sigma_prev: ArrayLike,
    fresh: ArrayLike,
    eta: ArrayLike,
) -> Array:
    """One DDIM update, Eq. 12 of arXiv:2010.02502, with sigma from Eq. 16.

    x0, eps, noise: `(b, ...)`, x0 and eps those of x_t; noise ~ N(0, I), unused where eta = 0 or sigma_prev = 0.
    alpha_t ... fresh: `Coefficients`, such as `coefficients` of a table's row; sigma_t > 0. eta >= 0.
    Returns x_prev, `(b, ...)`; NaN where eta is so large that more noise would be added than x_prev has (never for
    eta <= 1).

    >>> float(ddim_step(jnp.zeros(1), jnp.ones(1), 0.0, **vp_rows(0.5, 0.75), eta=0.0)[0])
    0.5
    """
    alpha_t, sigma_t, alpha_prev, sigma_prev, fresh, eta = (
        per_sample(value, x0) for value in (alpha_t, sigma_t, alpha_prev, sigma_prev, fresh, eta)
    )
    kept = _kept(alpha_t, sigma_t, alpha_prev, sigma_prev)
    # sqrt(sigma_prev^2 - sigma^2), without a difference of squares, which float32 may round below 0
    share = jnp.where(sigma_prev > 0, (1 - eta) * (1 + eta) + eta**2 * kept**2, 0)
    direction = sigma_prev * root(share)
    sigma = ddim_sigma(sigma_prev=sigma_prev, fresh=fresh, eta=eta)
    # In this order XLA fuses the sum alike for one device and for many: a test compares their bits.
    return direction * eps + alpha_prev * x0 + sigma * noise


def ddpm_step(
    x_t: Array,
    x0: Array,
    noise: ArrayLike,
    *,
    alpha_t: ArrayLike,
    sigma_t: ArrayLike,
    alpha_prev: ArrayLike,
    sigma_prev: ArrayLike,
    fresh: ArrayLike,
    variance: str | Array = "fixed_small",
) -> Array:
    """One DDPM ancestral update: the posterior mean, Eq. 7 of arXiv:2006.11239, plus noise.

    alpha_t ... fresh: as in `ddim_step`. beta = sigma_t^2 fresh^2; with alpha^2 + sigma^2 = 1, 1 - (alpha_t /
    alpha_prev)^2.
    variance: "fixed_small", the posterior's, which is `ddim_step` at eta = 1; "fixed_large", beta (the DDIM paper's
    sigma-hat); or the network's v `(b, ...)`, about [-1, 1], which interpolates between the two in the logarithm (-1:
    small, 1: large; Eq. 15 of arXiv:2102.09672, OpenAI's LEARNED_RANGE). No noise is added on the step to the clean
    image (sigma_prev = 0).
    """
    alpha_t, sigma_t, alpha_prev, sigma_prev, fresh = (
        per_sample(value, x_t) for value in (alpha_t, sigma_t, alpha_prev, sigma_prev, fresh)
    )
    kept = _kept(alpha_t, sigma_t, alpha_prev, sigma_prev)
    mean = alpha_prev * fresh**2 * x0 + kept * (sigma_prev / sigma_t) * x_t
    small, large = sigma_prev * fresh, sigma_t * fresh
    inner = (sigma_prev > 0) & (fresh > 0)  # a step to the clean image, or from t to itself, adds none
    if not isinstance(variance, str):
        fraction = (variance + 1) / 2
        small, large = jnp.where(inner, small, 1), jnp.where(inner, large, 1)
        sigma = jnp.where(inner, large**fraction * small ** (1 - fraction), 0)
    elif variance == "fixed_small":
        sigma = small
    elif variance == "fixed_large":
        sigma = jnp.where(inner, large, 0)
    else:
        raise ValueError(f"unknown variance {variance!r} (allowed: fixed_small, fixed_large, or the network's v)")
    return mean + sigma * noise


def largest_eta(table: StepTable) -> float:
    """The largest eta for which Eq. 12's direction is real at every step: the least 1 / fresh, less float32's rounding.

    At least 1, since eta = 1 is the DDPM posterior; infinite for a single step. Host only.
    """
    sigma_prev, fresh = (np.asarray(column, np.float64) for column in (table.sigma_prev, table.fresh))
    adds = (sigma_prev > 0) & (fresh > 0)  # the last step, and one from a t to itself, add no noise whatever eta
    return max(1.0, float(np.min((1 - 1e-6) / fresh[adds], initial=np.inf)))


def per_sample(value: ArrayLike, x: Array) -> Array:
    """`value`, a scalar or `(b,)`, shaped to broadcast against x `(b, ...)`."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim == 1 else value


def root(u: ArrayLike) -> Array:
    """sqrt(u) with derivative 0, not infinity, at u = 0: where a step adds no noise, or alpha_bar is 0 or 1."""
    u = jnp.asarray(u)
    zero = u == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, u)))


def _kept(alpha_t: Array, sigma_t: Array, alpha_prev: Array, sigma_prev: Array) -> Array:
    """The q of `Coefficients`: what a step at eta = 1 keeps of the noise."""
    return (alpha_t / alpha_prev) * (sigma_prev / sigma_t)


def _rows(a_t: Floats, a_prev: Floats, sqrt: Callable[[Floats], Floats]) -> Coefficients:
    """fresh^2 = 1 - q^2 is (1 - alpha_bar_t / alpha_bar_prev) / (1 - alpha_bar_t).

    In [0, 1], in floating point too: alpha_bar_t / alpha_bar_prev never rounds below alpha_bar_t.
    """
    return Coefficients(
        alpha_t=sqrt(a_t),
        sigma_t=sqrt(1 - a_t),
        alpha_prev=sqrt(a_prev),
        sigma_prev=sqrt(1 - a_prev),
        fresh=sqrt((1 - a_t / a_prev) / (1 - a_t)),
    )
