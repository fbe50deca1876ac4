"""The maths of DDIM (Song et al., arXiv:2010.02502): pure functions of arrays. No loop, no random keys, no network.

Equation numbers are the paper's; its alpha_t is the DDPM papers' alpha_bar_t, the name used here. Coefficients
(`alpha_bar_t`, `alpha_bar_prev`, `eta`) are scalars or one value per sample, `(b,)`; images are `(b, ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.typing import ArrayLike

from jddim.config import PREDICTION_TYPES, SamplerConfig, did_you_mean
from jddim.schedule import NoiseSchedule
from jddim.timesteps import check_timesteps, counts_itself, make_timesteps, of_diffusers, previous_timesteps

Column = Array | np.ndarray


class StepTable(NamedTuple):
    """The sampler's steps, one row each, in the order taken; what `lax.scan` runs over.

    step: int32, the step's number from 0: which noise it uses.
    t, t_prev: int32, the timestep left and the timestep reached; the last t_prev is -1.
    alpha_bar_t, alpha_bar_prev: float in [0, 1], alpha_bar at the two; the last alpha_bar_prev is 1, unless
        set_alpha_to_one is False.
    Each `(S,)`; a slice of rows is again a table (`jax.tree.map(lambda c: c[i:j], table)`).
    """

    step: Column
    t: Column
    t_prev: Column
    alpha_bar_t: Column
    alpha_bar_prev: Column

    @property
    def num_steps(self) -> int:
        """S, the number of rows."""
        return self.t.shape[0]


def step_table(
    schedule: NoiseSchedule,
    timesteps: npt.ArrayLike,
    dtype: npt.DTypeLike = np.float32,
    *,
    timesteps_prev: npt.ArrayLike | None = None,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """The table of a schedule and a descending list of timesteps: float64 on the host, cast once to `dtype`.

    timesteps: `(S,)`, descending within 0..T-1; an entry may repeat (ermongroup's quad), and then steps to itself.
    timesteps_prev: `(S,)`, where each step ends, in -1..t (-1 is the clean image; see
    `jddim.timesteps.previous_timesteps`); None: at the next entry, the last at -1.
    set_alpha_to_one: alpha_bar at -1 is 1; False: it is alpha_bar_0 (diffusers' option of that name).

    Raises ValueError if `timesteps` does not descend within 0..T-1, or `timesteps_prev` does not precede it.
    """
    t = check_timesteps(timesteps, schedule.num_train_timesteps, repeats=True)
    t_prev = np.append(t[1:], -1) if timesteps_prev is None else np.asarray(timesteps_prev)
    if t_prev.shape != t.shape or (t_prev > t).any() or (t_prev < -1).any():
        raise ValueError(f"timesteps_prev must hold one entry in -1..t for each t of {t}, got {t_prev}")
    alpha_bar_prev = schedule.alpha_bar(t_prev)
    if not set_alpha_to_one:
        alpha_bar_prev = np.where(t_prev < 0, schedule.alpha_bar(0), alpha_bar_prev)
    return StepTable(
        step=np.arange(len(t), dtype=np.int32),
        t=t.astype(np.int32),
        t_prev=t_prev.astype(np.int32),
        alpha_bar_t=schedule.alpha_bar(t).astype(dtype),
        alpha_bar_prev=alpha_bar_prev.astype(dtype),
    )


def sampler_table(
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    num_steps: int | None = None,
    dtype: npt.DTypeLike = np.float32,
    spacing: str | Sequence[int] | np.ndarray | None = None,
) -> StepTable:
    """The step table of a source's conventions: its spacing, its rule for where a step ends, its last alpha_bar.

    num_steps, spacing: in place of the conventions' own; spacing may be an explicit list, which takes no num_steps.
    """
    spacing = sampler.spacing if spacing is None else spacing
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


def add_noise(x0: Array, noise: Array, alpha_bar_t: ArrayLike) -> Array:
    """A sample of q(x_t | x0), Eq. 4: sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, noise ~ N(0, I) like x0."""
    a = per_sample(alpha_bar_t, x0)
    return root(a) * x0 + root(1 - a) * noise


def predict_x0(x_t: Array, eps: Array, alpha_bar_t: ArrayLike) -> Array:
    """The clean image that x_t and its noise imply, Eq. 9: (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
    a = per_sample(alpha_bar_t, x_t)
    return (x_t - root(1 - a) * eps) / jnp.sqrt(a)


def predict_eps(x_t: Array, x0: Array, alpha_bar_t: ArrayLike) -> Array:
    """The noise that x_t and its clean image imply, Eq. 9 solved for eps; alpha_bar_t < 1."""
    a = per_sample(alpha_bar_t, x_t)
    return (x_t - root(a) * x0) / jnp.sqrt(1 - a)


def predict_both(
    output: Array, x_t: Array, alpha_bar_t: ArrayLike, prediction_type: str = "epsilon"
) -> tuple[Array, Array]:
    """(x0, eps) from a network's output, `(b, ...)` like x_t.

    prediction_type: "epsilon"; "sample", x0; or "v_prediction", v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0
    (Salimans and Ho, arXiv:2202.00512, appendix D), the one of the three that also serves at alpha_bar_t = 0 and 1.
    """
    match prediction_type:
        case "epsilon":
            return predict_x0(x_t, output, alpha_bar_t), output
        case "sample":
            return output, predict_eps(x_t, output, alpha_bar_t)
        case "v_prediction":
            a = per_sample(alpha_bar_t, x_t)
            return root(a) * x_t - root(1 - a) * output, root(a) * output + root(1 - a) * x_t
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


def ddim_sigma(alpha_bar_t: ArrayLike, alpha_bar_prev: ArrayLike, eta: ArrayLike) -> Array:
    """The standard deviation of the noise a step adds, Eq. 16. eta 0: none; eta 1: the DDPM posterior's."""
    a_t, a_prev = jnp.asarray(alpha_bar_t), jnp.asarray(alpha_bar_prev)
    return jnp.asarray(eta) * root((1 - a_prev) * _forgotten(a_t, a_prev))


def ddim_step(
    x_t: Array,
    x0: Array,
    eps: Array,
    noise: ArrayLike,
    *,
    alpha_bar_t: ArrayLike,
    alpha_bar_prev: ArrayLike,
    eta: ArrayLike,
) -> Array:
    """One DDIM update, Eq. 12 of arXiv:2010.02502, with sigma from Eq. 16.

    x_t, x0, eps, noise: `(b, ...)`; noise ~ N(0, I), unused where eta = 0 or alpha_bar_prev = 1.
    alpha_bar_t in [0, 1), alpha_bar_prev in [alpha_bar_t, 1], eta >= 0: scalars or `(b,)`.
    Returns x_prev, `(b, ...)`; NaN where eta is so large that sigma^2 > 1 - alpha_bar_prev (never for eta <= 1).

    >>> float(ddim_step(jnp.ones(1), jnp.zeros(1), jnp.ones(1), 0.0, alpha_bar_t=0.5, alpha_bar_prev=0.75, eta=0.0)[0])
    0.5
    """
    del x_t  # Eq. 12 is written in x_t through x0 and eps alone; the argument keeps every solver's signature alike
    a_t, a_prev, eta = (per_sample(value, x0) for value in (alpha_bar_t, alpha_bar_prev, eta))
    sigma = ddim_sigma(a_t, a_prev, eta)
    # 1 - alpha_bar_prev - sigma^2, factored: in float32 the plain difference rounds below 0 where alpha_bar_t is tiny.
    direction = root((1 - a_prev) * (1 - eta**2 * _forgotten(a_t, a_prev)))
    return root(a_prev) * x0 + direction * eps + sigma * noise


def ddpm_step(
    x_t: Array,
    x0: Array,
    noise: ArrayLike,
    *,
    alpha_bar_t: ArrayLike,
    alpha_bar_prev: ArrayLike,
    variance: str | Array = "fixed_small",
) -> Array:
    """One DDPM ancestral update: the posterior mean, Eq. 7 of arXiv:2006.11239, plus noise.

    variance: "fixed_small", the posterior's beta (1 - alpha_bar_prev) / (1 - alpha_bar_t), which is `ddim_step` at
    eta = 1; "fixed_large", beta itself (the DDIM paper's sigma-hat); or the network's v `(b, ...)`, about [-1, 1],
    which interpolates between the two in the logarithm (-1: small, 1: large; Eq. 15 of arXiv:2102.09672, OpenAI's
    LEARNED_RANGE). On a shortened table beta = 1 - alpha_bar_t / alpha_bar_prev. No noise is added on the step to the
    clean image (alpha_bar_prev = 1).
    """
    a_t, a_prev = per_sample(alpha_bar_t, x_t), per_sample(alpha_bar_prev, x_t)
    beta = 1 - a_t / a_prev
    mean = (root(a_prev) * beta * x0 + root(1 - beta) * (1 - a_prev) * x_t) / (1 - a_t)
    small, large = ddim_sigma(a_t, a_prev, 1.0), root(beta)
    inner = (a_prev < 1) & (a_prev > a_t)  # a step to the clean image, or from t to itself, adds none
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
    """The largest eta for which Eq. 12's direction sqrt(1 - alpha_bar_prev - sigma^2) is real at every step.

    At least 1, since eta = 1 is the DDPM posterior; infinite for a single step. Host only.
    """
    a_t, a_prev = (np.asarray(c, np.float64) for c in (table.alpha_bar_t, table.alpha_bar_prev))
    inner = (a_prev < 1) & (a_prev > a_t)  # the last step, and a repeated t, have sigma = 0 whatever eta
    with np.errstate(divide="ignore"):
        return float(np.min(np.sqrt((1 - a_t) / (1 - a_t / a_prev)), where=inner, initial=np.inf))


def per_sample(value: ArrayLike, x: Array) -> Array:
    """`value`, a scalar or `(b,)`, shaped to broadcast against x `(b, ...)`."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim == 1 else value


def root(u: ArrayLike) -> Array:
    """sqrt(u) with derivative 0, not infinity, at u = 0: where a step begins or ends at alpha_bar = 0 or 1."""
    u = jnp.asarray(u)
    zero = u == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, u)))


def _forgotten(a_t: ArrayLike, a_prev: ArrayLike) -> Array:
    """sigma^2 / (1 - alpha_bar_prev) at eta = 1: how much of the noise at alpha_bar_prev is drawn anew.

    In [0, 1], in floating point too: alpha_bar_t / alpha_bar_prev never rounds below alpha_bar_t.
    """
    return (1 - jnp.asarray(a_t) / a_prev) / (1 - a_t)
