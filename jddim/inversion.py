"""DDIM inversion: x_0 encoded as the x_T that the deterministic sampler takes back to it (arXiv:2010.02502, 4.3).

Eq. 13 is a step of Euler's method for the ODE of Eq. 14; read upwards it leads from a sample to a noisier one,

    x_next / alpha_next = x_t / alpha_t + (sigma_next / alpha_next - sigma_t / alpha_t) eps,

which is Eq. 12 at eta = 0 towards more noise: the x0 that x_t and eps imply, noised by the same eps. What differs
between sources is where eps is asked for, and at how much noise the way begins and ends (`inversion_table`).
Only where eps is that of x_next, at its own t, is this the inverse of the sampler's step; to refine is to solve for
that x_next. As in `jddim.sampling`, the loops are traceable and hold no jit of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jddim import ddim
from jddim.config import did_you_mean
from jddim.ddim import Column, StepTable
from jddim.sampling import Conventions, Denoiser, Limits, Trajectory, check_prediction, limiter, update_loop

CONVENTIONS = ("paper", "diffusers", "openai")


class InvertOptions(Conventions, total=False):
    """The keyword arguments of `invert_loop`, but trajectory_every."""

    convention: str
    refine: int
    rederive_eps: bool


def inversion_table(table: StepTable, convention: str = "diffusers") -> StepTable:
    """The rows of inversion, from x_0 up to x_T, for the sampler's `table`, whose timesteps are on the host.

    convention: "paper", the sampler's steps taken backwards, each asking the network at the t it leaves (Eq. 13; t = 0
    for the clean image, whose eps no network is trained for; where t is no whole number, the least t); "diffusers"
    (DDIMInverseScheduler), the same steps, asking at the t they reach; "openai" (ddim_reverse_sample), from each t to
    the next above it, asking at the t it leaves: x_0 is taken for the sample at the least t, and the last step ends at
    noise alone, beyond the largest.

    Returns as many rows as `table` has. t: what the network is asked; t_prev, alpha_prev, sigma_prev: the timestep
    reached, which is the noisier one, and its image and noise; alpha_t, sigma_t: those of the sample left, 1 and 0 for
    the clean image; fresh: 0. "openai" ends at t_prev = t + 1.

    >>> from jddim.schedule import linear_schedule
    >>> rows = inversion_table(ddim.step_table(linear_schedule(1000), [800, 400, 9]), "paper")
    >>> rows.t.tolist(), rows.t_prev.tolist()
    ([0, 9, 400], [9, 400, 800])
    """
    t, t_prev, alpha, sigma, alpha_prev, sigma_prev = (column[::-1] for column in table[1:7])
    step, fresh = table.step, 0 * table.fresh
    match convention:
        case "paper":
            from_clean = np.maximum(t_prev, 0) if np.issubdtype(t.dtype, np.integer) else np.append(t[:1], t_prev[1:])
            return StepTable(step, from_clean, t, alpha_prev, sigma_prev, alpha, sigma, fresh)
        case "diffusers":
            return StepTable(step, t, t, alpha_prev, sigma_prev, alpha, sigma, fresh)
        case "openai":
            if not np.issubdtype(t.dtype, np.integer):
                raise ValueError("the convention 'openai' is of whole timesteps: take 'paper' or 'diffusers'")
            t_next = np.append(t[1:], t[-1:] + 1)
            return StepTable(step, t, t_next, alpha, sigma, _then(alpha[1:], 0.0), _then(sigma[1:], 1.0), fresh)
    raise ValueError(f"unknown convention {convention!r}{did_you_mean(convention, CONVENTIONS)}")


def _then(column: Column, last: float) -> Column:
    """The column with one more number."""
    return (np.append if isinstance(column, np.ndarray) else jnp.append)(column, np.full(1, last, column.dtype))


def invert_step(x0: Array, eps: Array, *, alpha_next: ArrayLike, sigma_next: ArrayLike) -> Array:
    """Eq. 12 at eta = 0, to any noise: x0 noised by eps. x0, eps: `(b, ...)`.

    With the x0 of `jddim.ddim.predict_x0` this is Eq. 13; like it, it goes either way.
    """
    return ddim.add_noise(x0, eps, alpha_next, sigma_next)


@overload
def invert_loop(
    denoise: Denoiser, x_0: Array, table: StepTable, *, trajectory_every: None = None, **options: Unpack[InvertOptions]
) -> Array: ...
@overload
def invert_loop(
    denoise: Denoiser, x_0: Array, table: StepTable, *, trajectory_every: int, **options: Unpack[InvertOptions]
) -> tuple[Array, Trajectory]: ...
def invert_loop(
    denoise: Denoiser,
    x_0: Array,
    table: StepTable,
    *,
    convention: str = "diffusers",
    refine: int = 0,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """DDIM inversion from x_0 to x_T, along the sampler's `table`. Traceable; deterministic, so without eta and noise.

    denoise: as for `jddim.sampling.sample_loop`. x_0: `(b, ...)` float, clean images. table: the one to sample x_T
    with, its timesteps on the host. convention: see `inversion_table`.
    refine: k more evaluations a step, each asking for eps at the x_next found last and finding another x_next with it.
    Where that settles, the sampler's step from x_next, with the same arguments, returns x_t, and the way back at
    eta = 0 leads to x_0 up to rounding. With x0 limited but eps not re-derived, it can only if no x0 leaves the limits.
    prediction_type, clip_range, threshold, rederive_eps: as in `sample_loop`, and best the same.
    trajectory_every: also return the `Trajectory` kept every so many steps; its t ascends.

    Returns x_T `(b, ...)`, in x_0's dtype, or (x_T, trajectory). Raises ValueError on what `check_inversion` finds, and
    where `sample_loop` would of the table.
    """
    check_prediction(table, prediction_type)
    check_inversion(table, convention, refine, prediction_type)
    update = invert_update(
        denoise,
        refine=refine,
        prediction_type=prediction_type,
        clip_range=clip_range,
        threshold=threshold,
        rederive_eps=rederive_eps,
    )
    rows = inversion_table(table, convention)
    return update_loop(denoise, update, x_0, rows, deterministic=True, trajectory_every=trajectory_every)


def invert_update(
    denoise: Denoiser,
    *,
    refine: int = 0,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
) -> Callable[..., tuple[Array, Array]]:
    """`invert_loop`'s step, for an `inversion_table`; what the arguments mean is said there. It uses no noise."""
    limit = limiter(clip_range, threshold)

    def predict(output: Array, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
        """(x0, eps) as the sampler has them at x."""
        x0, eps = ddim.predict_both(output, x, alpha, sigma, prediction_type)
        if limit is not None:
            x0 = limit(x0)
            if rederive_eps:
                eps = ddim.rederive_eps(x, x0, eps, alpha, sigma)
        return x0, eps

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        del noise
        x0, eps = predict(output, x_t, row.alpha_t, row.sigma_t)
        t_next = jnp.broadcast_to(row.t_prev, x_t.shape[:1])

        def noised(x0: Array, eps: Array) -> Array:
            return invert_step(x0, eps, alpha_next=row.alpha_prev, sigma_next=row.sigma_prev)

        def again(_k: int, x_next: Array) -> Array:
            x0, eps = predict(denoise(x_next, t_next).astype(x_t.dtype), x_next, row.alpha_prev, row.sigma_prev)
            by_eps = noised(ddim.predict_x0(x_t, eps, row.alpha_t, row.sigma_t), eps)
            # At alpha_next = 0 eps is x_next itself, whatever that is; eps - x0 tells something of x_t there too.
            a, s, a_next, s_next = (jnp.asarray(c) for c in (row.alpha_t, row.sigma_t, row.alpha_prev, row.sigma_prev))
            by_velocity = ((a_next + s_next) * x_t + (a * s_next - s * a_next) * (eps - x0)) / (a + s)
            return by_velocity if prediction_type == "velocity" else jnp.where(a_next > 0, by_eps, by_velocity)

        x_next = noised(x0, eps)
        return lax.fori_loop(0, refine, again, x_next), x0

    return update


def check_inversion(table: StepTable, convention: str, refine: int, prediction_type: str) -> None:
    """Raise ValueError, with all that is wrong, if the sampler's `table` cannot be inverted so.

    Of sigma, only what is on the host is looked at.
    """
    problems = []
    try:
        start = inversion_table(table, convention).sigma_t[0]
        from_clean = not isinstance(start, Array) and start == 0
    except ValueError as error:
        problems.append(str(error))
        from_clean = False
    if refine < 0:
        problems.append(f"refine must be at least 0, got {refine}")
    if refine > 0 and convention == "openai":
        problems.append(
            "refine solves the sampler's own steps, which the convention 'openai' does not take: leave it out, or "
            "take 'paper' or 'diffusers'"
        )
    if prediction_type == "sample" and from_clean:
        problems.append(
            "a predicted x0 tells nothing of eps at sigma = 0, the clean image, where this way begins: take the "
            "convention 'openai', or set_alpha_to_one=False with a spacing of diffusers"
        )
    if problems:
        raise ValueError("; ".join(problems))


def reconstruction_error(x_0: ArrayLike, again: ArrayLike) -> Array:
    """The mean squared error of each image `(b,)`, of values scaled from [-1, 1] to [0, 1], as in the paper's Table 2.

    x_0, again: `(b, ...)`.
    """
    difference = (jnp.asarray(again) - jnp.asarray(x_0)) / 2
    return jnp.mean(difference.reshape(difference.shape[0], -1) ** 2, axis=1)
