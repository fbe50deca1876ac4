"""Timetables: which of the T training timesteps a sampler visits, as descending int64 arrays.

The last visited t is followed by t = -1, the clean image, which is not in the table. Between two entries a step goes
from each to the next, but for diffusers' spacings, which have a rule of their own (`previous_timesteps`).

At the end of the file are the spacings off the grid: of t itself where it is continuous, or of sigma / alpha
(`RATIOS`), which is between two whole timesteps where there are T.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jddim.config import did_you_mean

Timesteps = NDArray[np.int64]
Times = NDArray[np.float64]


def linspace_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """The walk-through's (and lucidrains') table: linspace(-1, T-1, S+1) in float32, truncated, reversed.

    num_steps: S in 1..T. Returns S timesteps, from T-1 down; the one before the first pair's end, -1, is dropped.

    The arithmetic is torch.linspace's on CPU: one float32 step, counted up from the start in the first half
    and down from the end in the second, each entry rounded once (its vector code uses fused multiply-add).
    A float64 linspace gives other integers for 139 of the S in 1..1000 at T = 1000.

    >>> linspace_timesteps(1000, 4)
    array([999, 749, 499, 249])
    """
    T, S = _check(num_train_timesteps, num_steps)
    step = np.float64((np.float32(T - 1) - np.float32(-1)) / np.float32(S))
    i = np.arange(S + 1)
    # float64 holds the product exactly, so the cast to float32 is the single rounding of a fused multiply-add.
    values = np.where(i < (S + 1) // 2, -1 + step * i, (T - 1) - step * (S - i)).astype(np.float32)
    return check_timesteps(values.astype(np.int64)[:0:-1], T)


def uniform_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """Ermongroup's "uniform": range(0, T, T // S), reversed.

    num_steps: S in 1..T. The stride is an integer, so there are S entries only if it fits: T = 1000 gives 31 at
    S = 30 and 1000 at S = 600, as in the source. The first t is T-1 only where T // S divides it; at S = 30 it is 990.

    >>> uniform_timesteps(1000, 4)
    array([750, 500, 250,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    return check_timesteps(np.arange(0, T, T // S)[::-1], T)


def quad_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """Ermongroup's "quad": int(linspace(0, sqrt(0.8 T), S) ** 2), reversed.

    num_steps: S in 1..T, and always S entries: as in the source, small t repeat at larger S (T = 1000: from S = 30 on,
    four zeros at S = 100). A repeated t is a step from t to itself, which changes nothing but costs an evaluation.

    >>> quad_timesteps(1000, 4)
    array([800, 355,  88,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    return check_timesteps((np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64)[::-1], T, repeats=True)


def leading_timesteps(num_train_timesteps: int, num_steps: int, steps_offset: int = 0) -> Timesteps:
    """Diffusers' "leading": the first S multiples of T // S, plus `steps_offset`, reversed.

    num_steps: S in 1..T. Raises where the offset takes the first t beyond T-1 (diffusers fails in its first step).

    >>> leading_timesteps(1000, 3, steps_offset=1)
    array([667, 334,   1])
    """
    T, S = _check(num_train_timesteps, num_steps)
    if not -T < steps_offset < T:
        raise ValueError(f"steps_offset must lie between -{T} and {T}, got {steps_offset}")
    return check_timesteps((np.arange(S) * (T // S))[::-1] + steps_offset, T)


def trailing_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """Diffusers' "trailing": round(arange(T, 0, -T / S)) - 1 in float64.

    num_steps: S in 1..T. For some S (T = 1000: 61, 103, 121 and 59 more) float64 adds an entry, -1, for which diffusers
    asks its network at t = -1 and its schedule at T-1; that is refused here, naming S.

    >>> trailing_timesteps(1000, 3)
    array([999, 666, 332])
    """
    T, S = _check(num_train_timesteps, num_steps)
    table = np.round(np.arange(T, 0, -T / S)).astype(np.int64) - 1
    if table[-1] < 0:
        raise ValueError(
            f"trailing spacing of T = {T} at num_steps = {S} rounds to {len(table)} entries that end in t = -1, where "
            "diffusers' result is not defined; take another num_steps, or the spacing 'linspace'"
        )
    return check_timesteps(table, T)


def linspace_diffusers_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """Diffusers' "linspace": round(linspace(0, T-1, S)) in float64, reversed.

    num_steps: S in 1..T; S = 1 is t = 0 alone, as there.

    >>> linspace_diffusers_timesteps(1000, 4)
    array([999, 666, 333,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    return check_timesteps(np.linspace(0, T - 1, S).round().astype(np.int64)[::-1], T)


def ddim_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """OpenAI's "ddimN": range(0, T, stride) with the smallest integer stride that gives exactly N entries, reversed.

    Raises ValueError where no stride below T does, as the source does (T = 1000: 1, 60, 75, 80, ...).

    >>> ddim_timesteps(1000, 3)
    array([668, 334,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    for stride in range(1, T):
        if len(range(0, T, stride)) == S:
            return check_timesteps(np.arange(0, T, stride)[::-1], T)
    fits = sorted({len(range(0, T, stride)) for stride in range(1, T)}, key=lambda n: abs(n - S))
    raise ValueError(f"no integer stride makes {S} timesteps of {T} (OpenAI's ddimN); the nearest that fit: {fits[:3]}")


def section_timesteps(num_train_timesteps: int, counts: Sequence[int]) -> Timesteps:
    """OpenAI's sections, "10,15,20": T in len(counts) equal parts, from t = 0 up, each visited evenly so many times.

    counts: at least 1 each, and at most the length of its part; one count is OpenAI's plain `timestep_respacing`.
    The entries are rounded from a running sum of float64 strides, half to even, as in the source.

    >>> section_timesteps(300, [2, 3])
    array([299, 224, 150, 149,   0])
    """
    T = num_train_timesteps
    size, longer = divmod(T, max(len(counts), 1))
    sizes = [size + (i < longer) for i in range(len(counts))]
    if not counts or any(not 1 <= count <= size for count, size in zip(counts, sizes, strict=True)):
        raise ValueError(
            f"sections {','.join(map(str, counts)) or '(none)'} of T = {T}: each count must lie in 1..its section's "
            f"length {sizes} (a list of timesteps is for Python: spacing=[999, 500, 0])"
        )
    table: list[int] = []
    start = 0
    for count, size in zip(counts, sizes, strict=True):
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            table.append(start + round(position))
            position += stride
        start += size
    return check_timesteps(table[::-1], T)


def openai_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """OpenAI's plain respacing to S steps: one section (`section_timesteps`). From T-1 to 0 for S > 1.

    >>> openai_timesteps(1000, 4)
    array([999, 666, 333,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    return section_timesteps(T, [S])


def openai_ddim_timesteps(num_train_timesteps: int, num_steps: int) -> Timesteps:
    """OpenAI's DDIM in S steps, as its documentation asks for them: of `openai_respacing`.

    >>> openai_ddim_timesteps(1000, 4)
    array([750, 500, 250,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    return make_timesteps(openai_respacing(T, S), T)


def openai_respacing(num_train_timesteps: int, num_steps: int) -> str:
    """The timestep_respacing of OpenAI's DDIM for S steps: "ddimS" where a stride makes it, else "S", one section.

    >>> openai_respacing(1000, 25), openai_respacing(1000, 60)
    ('ddim25', '60')
    """
    fits = any(len(range(0, num_train_timesteps, stride)) == num_steps for stride in range(1, num_train_timesteps))
    return f"ddim{num_steps}" if fits else str(num_steps)


SPACINGS: dict[str, Callable[[int, int], Timesteps]] = {
    "linspace": linspace_timesteps,
    "uniform": uniform_timesteps,
    "quad": quad_timesteps,
    "leading": leading_timesteps,
    "trailing": trailing_timesteps,
    "linspace_diffusers": linspace_diffusers_timesteps,
    "openai": openai_timesteps,
    "openai_ddim": openai_ddim_timesteps,
}


def make_timesteps(
    spacing: str | Sequence[float] | NDArray[np.integer],
    num_train_timesteps: int,
    num_steps: int | None = None,
    steps_offset: int = 0,
) -> Timesteps:
    """The table that a spacing's name and S make, or an explicit descending list, checked (then S is not needed).

    spacing: a key of `SPACINGS`; OpenAI's "ddim25" or "10,15,20", which say their own S; or the timesteps themselves.
    steps_offset: for "leading" alone.
    """
    T = num_train_timesteps
    if not isinstance(spacing, str):
        table = check_timesteps(spacing, T)
    elif counts_itself(spacing):
        numbers = [int(number) for number in re.findall(r"\d+", spacing)]
        table = ddim_timesteps(T, numbers[0]) if spacing.startswith("ddim") else section_timesteps(T, numbers)
    elif spacing == "even":
        raise ValueError("spacing 'even' is of continuous schedules; with T whole timesteps take 'linspace'")
    elif spacing not in SPACINGS:
        raise ValueError(
            f"unknown spacing {spacing!r}{did_you_mean(spacing, [*SPACINGS, *RATIOS, 'ddimN', 'N,N,...'])}"
        )
    elif num_steps is None:
        raise ValueError(f"spacing {spacing!r} needs num_steps")
    else:
        make = partial(leading_timesteps, steps_offset=steps_offset) if spacing == "leading" else SPACINGS[spacing]
        return make(T, num_steps)
    if num_steps is not None and num_steps != len(table):
        what = f"spacing {spacing!r}" if isinstance(spacing, str) else "an explicit list"
        raise ValueError(f"{what} of {len(table)} timesteps does not take num_steps={num_steps}")
    return table


def counts_itself(spacing: str) -> bool:
    """Whether a spacing's name says its own S: OpenAI's "ddim25" and "10,15,20"."""
    return re.fullmatch(r"ddim\d+|\d+(,\d+)*", spacing) is not None


def of_diffusers(spacing: object) -> bool:
    """Whether steps go from t to t - T // S, whatever the next entry is (diffusers' DDIMScheduler.step)."""
    return isinstance(spacing, str) and spacing in ("leading", "trailing", "linspace_diffusers")


def previous_timesteps(timesteps: Timesteps, spacing: object, num_train_timesteps: int) -> Timesteps:
    """Where the step from each t ends, `(S,)` int64 in -1..T-1; -1 is the clean image.

    The next entry of the list, and -1 after the last. diffusers' spacings: t - T // S, or -1 below 0, which is the
    next entry only where S divides T; "linspace" and "trailing" there step short of or past it, and the last step
    may end at -1 from afar.

    >>> previous_timesteps(trailing_timesteps(1000, 3), "trailing", 1000)
    array([666, 333,  -1])
    """
    if of_diffusers(spacing):
        return np.maximum(timesteps - num_train_timesteps // len(timesteps), -1)
    return np.append(timesteps[1:], -1)


def check_timesteps(timesteps: ArrayLike, num_train_timesteps: int, *, repeats: bool = False) -> Timesteps:
    """`timesteps` as int64, or ValueError: integers, not empty, all within 0..T-1, descending.

    Strictly, unless `repeats` (ermongroup's quad).
    """
    table = np.asarray(timesteps)
    if table.ndim != 1 or table.size == 0:
        raise ValueError(f"timesteps must be a non-empty list, got an array of shape {table.shape}")
    if not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"timesteps must be integers, got {table.dtype}")
    rises = np.flatnonzero(np.diff(table) > (0 if repeats else -1))
    if rises.size:
        i = int(rises[0])
        raise ValueError(f"timesteps must strictly descend: entry {i} is {table[i]}, entry {i + 1} is {table[i + 1]}")
    if table[0] >= num_train_timesteps or table[-1] < 0:
        raise ValueError(f"timesteps must lie in 0..{num_train_timesteps - 1}, got {table[-1]}..{table[0]}")
    return np.array(table, dtype=np.int64)  # a contiguous copy that owns its memory


def _check(num_train_timesteps: int, num_steps: int) -> tuple[int, int]:
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"num_steps (--steps) must lie in 1..{num_train_timesteps} (the training timesteps), got {num_steps}"
        )
    return num_train_timesteps, num_steps


def even_times(t_min: float, t_max: float, num_steps: int, shift: float = 1.0) -> Times:
    """Even in t, from t_max down: to t_min, or where that is 0, the clean image, to the last before it.

    shift: in 0.001..1000; each t becomes shift t / (1 + (shift - 1) t) (arXiv:2403.03206, Eq. 23), for t in 0..1.

    >>> even_times(0.0, 1.0, 4)
    array([1.  , 0.75, 0.5 , 0.25])
    """
    S = _check_steps(num_steps)
    if not 1e-3 <= shift <= 1e3:
        raise ValueError(f"shift must be a number in 0.001..1000, got {shift}")
    if shift != 1 and t_max > 1:
        raise ValueError(f"shift is of a t in 0..1, as a flow has; this schedule's goes to {t_max:g}")
    t = np.linspace(t_max, 0, S + 1)[:-1] if t_min == 0 else np.linspace(t_max, t_min, S)
    return np.asarray(shift * t / (1 + (shift - 1) * t))


def _karras(u: Times, least: float, largest: float, rho: float) -> Times:
    """Even in ratio^(1 / rho) (arXiv:2206.00364, Eq. 5)."""
    high, low = largest ** (1 / rho), least ** (1 / rho)
    return np.asarray((high + u * (low - high)) ** rho)


def _exponential(u: Times, least: float, largest: float, rho: float) -> Times:
    """Even in log ratio, DPM-Solver's lambda (arXiv:2206.00927): diffusers' use_exponential_sigmas, use_lu_lambdas."""
    del rho
    return np.exp(math.log(largest) + u * math.log(least / largest))


def _beta(u: Times, least: float, largest: float, rho: float) -> Times:
    """Quantiles of the distribution Beta(0.6, 0.6) (arXiv:2407.12173): diffusers' use_beta_sigmas."""
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    del rho
    return np.asarray(least + (largest - least) * betaincinv(0.6, 0.6, 1 - u))


RATIOS: dict[str, Callable[[Times, float, float, float], Times]] = {
    "karras": _karras,
    "exponential": _exponential,
    "beta": _beta,
}
"""Spacings of sigma / alpha: (u, even in 0..1; the least and the largest ratio; rho) -> the ratios, descending.

With T whole timesteps the network is told t between them (k-diffusion; diffusers' Euler), or, of a name with "_rounded"
behind it, the nearest whole one (diffusers' DPMSolverMultistepScheduler with use_karras_sigmas or use_lu_lambdas; of
its exponential and beta sigmas it cuts t off).
"""


def of_ratios(spacing: str) -> bool:
    """Whether a spacing's name is one of `RATIOS`, rounded or not."""
    return spacing.removesuffix("_rounded") in RATIOS


def spaced_ratios(spacing: str, least: float, largest: float, num_steps: int, rho: float = 7.0) -> Times:
    """`num_steps` of sigma / alpha, from the largest to the least, both in (0, inf), of a spacing of `RATIOS`.

    rho: of "karras", in 0.1..100.
    """
    S = _check_steps(num_steps)
    if not of_ratios(spacing):
        raise ValueError(
            f"spacing {spacing!r} is not of continuous schedules{did_you_mean(spacing, ['even', *RATIOS, 'T,T,...'])}"
        )
    if not 0 < least < largest < np.inf:
        told = f"spacing {spacing!r} needs sigma / alpha within (0, inf); this schedule's goes from {largest:g} to "
        raise ValueError(f"{told}{least:g}: take the spacing 'even'")
    if not 0.1 <= rho <= 100:
        raise ValueError(f"rho must be a number in 0.1..100, got {rho}")
    made = RATIOS[spacing.removesuffix("_rounded")](np.linspace(0, 1, S), least, largest, rho)
    made[0] = largest  # to the bit, whatever the powers round to
    made[1:][-1:] = least
    return made


def listed_times(spacing: str) -> str | list[float]:
    """The t of a continuous schedule that a spacing lists, "80,0.66", or the spacing itself if it is a name."""
    try:
        return [float(part) for part in spacing.split(",")]
    except ValueError:
        return spacing


def check_times(times: ArrayLike, t_min: float, t_max: float) -> Times:
    """`times` as float64, or ValueError: real numbers, not empty, descending, all above 0 and within t_min..t_max."""
    table = np.array(times, np.float64)
    if table.ndim != 1 or table.size == 0:
        raise ValueError(f"timesteps must be a non-empty list, got an array of shape {table.shape}")
    slack = 1e-9 * t_max  # of powers and roots
    if (
        not (np.diff(table) < 0).all()
        or not table[-1] > 0
        or not t_min - slack <= table[-1] <= table[0] <= t_max + slack
    ):
        told = f"timesteps must strictly descend within {t_min:g}..{t_max:g}, above 0"
        raise ValueError(f"{told}, got {', '.join(f'{t:g}' for t in table[:5])}{', ...' if len(table) > 5 else ''}")
    return table


def _check_steps(num_steps: int) -> int:
    if not 1 <= num_steps <= LARGEST_S:
        raise ValueError(f"num_steps (--steps) must lie in 1..{LARGEST_S}, got {num_steps}")
    return num_steps


LARGEST_S = 1_000_000
"""Of a spacing off the grid; more is a damaged number."""
