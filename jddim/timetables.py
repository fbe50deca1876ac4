"""Timetables made for a schedule or a network, and what to know of any. For named spacings see `jddim.timesteps`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jddim.ddim import StepTable
from jddim.schedule import ContinuousSchedule, NoiseSchedule, Schedule
from jddim.timesteps import Timesteps, check_timesteps

Floats = NDArray[np.float64]


def karras_timesteps(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0) -> Timesteps:
    """Even steps in r^(1 / rho), r = sigma_t / alpha_t, between t = T-1 and 0 (arXiv:2206.00364, Eq. 5, its sigma).

    Each is the t whose log r is nearest. Raises ValueError where two steps would fall on one t: fewer steps, then,
    or another rho. num_steps >= 2.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, the two ends, got {num_steps}")
    if schedule.alphas_cumprod[-1] == 0:
        raise ValueError("sigma_t / alpha_t is infinite at t = T-1 (zero terminal SNR): no even steps lead there")
    every_t = np.arange(schedule.num_train_timesteps)
    r = schedule.sigma(every_t) / schedule.alpha(every_t)
    largest, least = r[[-1, 0]] ** (1 / rho)
    wanted = np.linspace(largest, least, num_steps) ** rho
    t = np.abs(np.log(r)[None] - np.log(wanted)[:, None]).argmin(axis=1)
    if (np.diff(t) >= 0).any():
        raise ValueError(
            f"{num_steps} Karras steps with rho {rho:g} fall {num_steps - len(np.unique(t))} times on a t already "
            "taken: take fewer, or a smaller rho"
        )
    return check_timesteps(t, schedule.num_train_timesteps)


def whole_steps(num_steps: int, every: int, center: int | None = None, power: float = 1.2) -> tuple[int, ...]:
    """The steps at which a network is asked as a whole, where those between reuse its deep half: 0, every, 2 every, ...

    center: as many, but denser around this step: evenly in the power's root of the distance from it, whole numbers, as
    DeepCache's code has it (arXiv:2312.00858; its power is 1.2, taken less where two steps fall on one).

    Raises ValueError unless num_steps and every are at least 1, the power too, and the center is in 0..num_steps.
    """
    if power < 1:
        raise ValueError(f"power must be at least 1, which spaces the steps evenly; got {power:g}")
    if num_steps < 1 or every < 1:
        raise ValueError(f"num_steps and every must be at least 1, got {num_steps} and {every}")
    if center is None:
        return tuple(range(0, num_steps, every))
    if not 0 <= center <= num_steps:
        raise ValueError(f"center must be a step in 0..{num_steps}, got {center}")
    count = -(-num_steps // every)
    while True:
        # Left of the center the powers are complex, of which the source's code takes the real part.
        roots = np.linspace(complex(-center) ** (1 / power), (num_steps - center) ** (1 / power), count + 1)
        steps = [0, *(center + np.unique((roots**power).real.astype(np.int32))[1:-1]).tolist()]
        power -= 0.02
        if len(steps) == count or power <= 1:
            return tuple(sorted(set(steps)))


def elbo_costs(schedule: NoiseSchedule, mean_squared_errors: ArrayLike, *, data_sigma: float = 1 / 255) -> Floats:
    """What each step t -> s costs the variational bound: (SNR(s) - SNR(t)) / 2 times E |x0 - x0_hat(x_t)|^2, in nats.

    mean_squared_errors: `(T,)`, the network's, summed over an image, averaged over images. Returns `(T, T + 1)`: row t,
    column s + 1 (column 0 is the clean image, whose SNR is that of data known to `data_sigma`); infinite where s >= t.
    Watson et al., arXiv:2106.03802, Eq. 9, for DDPM's posterior at any pair of timesteps.
    """
    errors = np.asarray(mean_squared_errors, np.float64)
    T = schedule.num_train_timesteps
    if errors.shape != (T,) or not (errors >= 0).all():
        raise ValueError(f"mean_squared_errors must be {T} numbers >= 0, one a timestep, got shape {errors.shape}")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    reached = np.append(data_sigma**-2, snr)
    costs = (reached[None] - snr[:, None]) / 2 * errors[:, None]
    return np.where(np.arange(-1, T)[None] < np.arange(T)[:, None], costs, np.inf)


def search_timesteps(costs: ArrayLike, num_steps: int, start: int | None = None) -> Timesteps:
    """The `num_steps` timesteps, from `start` (default T-1) to the clean image, of the least total cost.

    costs: `(T, T + 1)`, of the step from t to s in row t and column s + 1, such as `elbo_costs` or any loss of your own
    that adds up over steps. Dynamic programming (arXiv:2106.03802, Algorithm 1): T^2 S operations.
    Raises ValueError if no such way has a finite cost.
    """
    cost = np.asarray(costs, np.float64)
    T = len(cost)
    if cost.shape != (T, T + 1):
        raise ValueError(f"costs must be (T, T + 1), got {cost.shape}")
    start = T - 1 if start is None else start
    if not 1 <= num_steps <= start + 1 <= T:
        raise ValueError(f"num_steps must lie in 1..start + 1 = {start + 1}, and start in 0..{T - 1}; got {num_steps}")
    best = np.full(T + 1, np.inf)  # least cost from s to the clean image in so many steps
    best[0] = 0
    through: list[NDArray[np.int64]] = []
    for _ in range(num_steps):
        ways = cost + best[None]
        through.append(ways.argmin(axis=1))
        best = np.append(np.inf, ways.min(axis=1))
    if not np.isfinite(best[start + 1]):
        raise ValueError(f"no way of {num_steps} steps from t = {start} has a finite cost")
    t, timesteps = start, []
    for step in reversed(through):
        timesteps.append(t)
        t = int(step[t]) - 1
    return check_timesteps(timesteps, T)


def traps(table: StepTable, schedule: Schedule, prediction_type: str = "epsilon") -> list[str]:
    """What is known to go wrong with such a table, as sentences; none for most."""
    t, t_prev = np.asarray(table.t), np.asarray(table.t_prev)
    if isinstance(schedule, ContinuousSchedule):
        if t[0] < (1 - 1e-6) * schedule.t_max:
            return [f"the first step is at t = {t[0]:g}, not at the noisiest, {schedule.t_max:g}"]
        return []
    T, found = schedule.num_train_timesteps, []
    if t[0] < T - 1:
        first, last = table.alpha_bar_t[0], schedule.alphas_cumprod[-1]
        found.append(
            f"the first step is at t = {t[0]}, not at the noisiest, T-1 = {T - 1}: it takes pure noise for less noise "
            f"than it is (alpha_bar {first:.2g}; at T-1 {last:.2g})"
        )
    terminal = schedule.alphas_cumprod[-1]
    if prediction_type == "v_prediction" and terminal > 0:
        found.append(
            f"training did not end in pure noise (alpha_bar at T-1 is {terminal:.2g}, not 0), as that of networks that "
            "predict v often does: zero terminal SNR (diffusers' rescale_betas_zero_snr, arXiv:2305.08891)"
        )
    if terminal > 0.01:
        found.append(f"training never saw pure noise (alpha_bar at T-1 is {terminal:.2g}), and sampling starts from it")
    if t_prev[-1] >= 0:
        found.append(f"the last step ends at t = {t_prev[-1]}, short of the clean image")
    if table.sigma_prev[-1] > 0:
        left = f"sigma {table.sigma_prev[-1]:.3g}, not 0: set_alpha_to_one=False"
        found.append(f"the last step leaves a little noise in the image ({left})")
    lengths = t - t_prev
    if repeats := int((lengths == 0).sum()):
        found.append(f"{repeats} steps go from a t to itself: they cost time and change nothing")
    even = len(t) > 2 and np.ptp(lengths[:-1]) <= 1  # give or take the rounding to integers
    if even and not lengths[:-1].min() - 1 <= lengths[-1] <= lengths[:-1].max() + 1:
        found.append(f"the last step goes over {lengths[-1]} timesteps, each of the others over {lengths[0]}")
    return found
