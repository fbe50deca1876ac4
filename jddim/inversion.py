"""DDIM inversion: x_0 encoded as the x_T that the deterministic sampler takes back to it (arXiv:2010.02502, 4.3).

Eq. 13 is a step of Euler's method for the ODE of Eq. 14; read upwards it leads from a sample to a noisier one,

    x_next / sqrt(alpha_bar_next) = x_t / sqrt(alpha_bar_t) + (sigma_next - sigma_t) eps,
    sigma = sqrt((1 - alpha_bar) / alpha_bar),

which is Eq. 12 at eta = 0 towards a smaller alpha_bar: the x0 that x_t and eps imply, noised by the same eps. What
differs between sources is where eps is asked for, and at which alpha_bar the way begins and ends (`inversion_table`).
Only where eps is that of x_next, at its own t, is this the inverse of the sampler's step; to refine is to solve for
that x_next. As in `jddim.sampling`, the loops are traceable and hold no jit of their own.
"""

from __future__ import annotations

from typing import Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jddim import ddim
from jddim.config import did_you_mean
from jddim.ddim import StepTable
from jddim.sampling import (
    Conventions,
    Denoiser,
    Limits,
    State,
    Trajectory,
    check_prediction,
    init_state,
    limiter,
    result,
    update_steps,
)

CONVENTIONS = ("paper", "diffusers", "openai")


class InvertOptions(Conventions, total=False):
    """The keyword arguments of `invert_loop`, but trajectory_every."""

    convention: str
    refine: int
    rederive_eps: bool


def inversion_table(table: StepTable, convention: str = "diffusers") -> StepTable:
    """The rows of inversion, from x_0 up to x_T, for the sampler's `table`, whose timesteps are on the host.

    convention: "paper", the sampler's steps taken backwards, each asking the network at the t it leaves (Eq. 13; t = 0
    for the clean image, whose eps no network is trained for); "diffusers" (DDIMInverseScheduler), the same steps,
    asking at the t they reach; "openai" (ddim_reverse_sample), from each t to the next above it, asking at the t it
    leaves: x_0 is taken for the sample at the least t, and the last step ends at alpha_bar = 0, beyond the largest.

    Returns as many rows as `table` has. t: what the network is asked; t_prev, alpha_bar_prev: the timestep reached,
    which is the noisier one, and its alpha_bar; alpha_bar_t: that of the sample left, 1 for the clean image. "openai"
    ends at t_prev = t + 1.

    >>> from jddim.schedule import linear_schedule
    >>> rows = inversion_table(ddim.step_table(linear_schedule(1000), [800, 400, 9]), "paper")
    >>> rows.t.tolist(), rows.t_prev.tolist()
    ([0, 9, 400], [9, 400, 800])
    """
    up = StepTable(*(column[::-1] for column in table))
    step = up.step[::-1]
    match convention:
        case "paper":
            return StepTable(step, np.maximum(up.t_prev, 0), up.t, up.alpha_bar_prev, up.alpha_bar_t)
        case "diffusers":
            return StepTable(step, up.t, up.t, up.alpha_bar_prev, up.alpha_bar_t)
        case "openai":
            t_next = np.append(up.t[1:], up.t[-1:] + 1)
            concatenate = np.concatenate if isinstance(up.alpha_bar_t, np.ndarray) else jnp.concatenate
            alpha_bar_next = concatenate([up.alpha_bar_t[1:], np.zeros(1, up.alpha_bar_t.dtype)])
            return StepTable(step, up.t, t_next, up.alpha_bar_t, alpha_bar_next)
    raise ValueError(f"unknown convention {convention!r}{did_you_mean(convention, CONVENTIONS)}")


def invert_step(x0: Array, eps: Array, *, alpha_bar_next: ArrayLike) -> Array:
    """Eq. 12 at eta = 0, to any alpha_bar: x0 noised by eps. x0, eps: `(b, ...)`; alpha_bar_next in [0, 1].

    With the x0 of `jddim.ddim.predict_x0` this is Eq. 13; like it, it goes either way.
    """
    a = ddim.per_sample(alpha_bar_next, x0)
    return ddim.root(a) * x0 + ddim.root(1 - a) * eps


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
    state = invert_steps(
        denoise,
        init_state(x_0, table, trajectory_every),
        inversion_table(table, convention),
        refine=refine,
        prediction_type=prediction_type,
        clip_range=clip_range,
        threshold=threshold,
        rederive_eps=rederive_eps,
        trajectory_every=trajectory_every,
    )
    return result(state)


def invert_steps(
    denoise: Denoiser,
    state: State,
    table: StepTable,
    *,
    refine: int = 0,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
    trajectory_every: int | None = None,
) -> State:
    """The rows of an `inversion_table`, which may be a segment of it, from `state`. Arguments as in `invert_loop`."""
    limit = limiter(clip_range, threshold)

    def predict(output: Array, x: Array, alpha_bar: ArrayLike) -> tuple[Array, Array]:
        """(x0, eps) as the sampler has them at x."""
        x0, eps = ddim.predict_both(output, x, alpha_bar, prediction_type)
        if limit is not None:
            x0 = limit(x0)
            if rederive_eps:  # of the clean image, alpha_bar = 1, nothing is left to re-derive eps from
                clean = jnp.asarray(alpha_bar) == 1
                eps = jnp.where(clean, eps, ddim.predict_eps(x, x0, jnp.where(clean, 0.0, alpha_bar)))
        return x0, eps

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        del noise
        x0, eps = predict(output, x_t, row.alpha_bar_t)
        t_next = jnp.broadcast_to(row.t_prev, x_t.shape[:1])

        def again(_k: int, x_next: Array) -> Array:
            _, eps = predict(denoise(x_next, t_next).astype(x_t.dtype), x_next, row.alpha_bar_prev)
            return invert_step(ddim.predict_x0(x_t, eps, row.alpha_bar_t), eps, alpha_bar_next=row.alpha_bar_prev)

        x_next = invert_step(x0, eps, alpha_bar_next=row.alpha_bar_prev)
        return lax.fori_loop(0, refine, again, x_next), x0

    return update_steps(denoise, update, state, table, deterministic=True, trajectory_every=trajectory_every)


def check_inversion(table: StepTable, convention: str, refine: int, prediction_type: str) -> None:
    """Raise ValueError, with all that is wrong, if the sampler's `table` cannot be inverted so.

    Of alpha_bar, only what is on the host is looked at.
    """
    problems = []
    try:
        start = inversion_table(table, convention).alpha_bar_t[0]
        from_clean = not isinstance(start, Array) and start == 1
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
            "a predicted x0 tells nothing of eps at alpha_bar = 1, the clean image, where this way begins: take the "
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
