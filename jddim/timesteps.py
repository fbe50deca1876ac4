"""Timetables: which of the T training timesteps a sampler visits, as descending int64 arrays.

The last visited t is followed by t = -1, the clean image (alpha_bar = 1), which is not in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jddim.config import did_you_mean


def linspace_timesteps(num_train_timesteps: int, num_steps: int) -> NDArray[np.int64]:
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


def uniform_timesteps(num_train_timesteps: int, num_steps: int) -> NDArray[np.int64]:
    """Ermongroup's "uniform": range(0, T, T // S), reversed.

    num_steps: S in 1..T. The stride is an integer, so there are S entries only if it fits: T = 1000 gives 31 at
    S = 30 and 1000 at S = 600, as in the source. The first t is below T-1 for every S < T.

    >>> uniform_timesteps(1000, 4)
    array([750, 500, 250,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    return check_timesteps(np.arange(0, T, T // S)[::-1], T)


def quad_timesteps(num_train_timesteps: int, num_steps: int) -> NDArray[np.int64]:
    """Ermongroup's "quad": int(linspace(0, sqrt(0.8 T), S) ** 2), reversed, each t once.

    num_steps: S in 1..T. The source repeats small t at larger S (T = 1000: from S = 30 on, four zeros at S = 100).
    A repeated t is a step from t to itself, which changes nothing (sigma is 0 and alpha_bar_prev is alpha_bar_t),
    so repeats are dropped and fewer than S entries remain: 96 at S = 100.

    >>> quad_timesteps(1000, 4)
    array([800, 355,  88,   0])
    """
    T, S = _check(num_train_timesteps, num_steps)
    table = (np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64)
    return check_timesteps(np.unique(table)[::-1], T)


SPACINGS: dict[str, Callable[[int, int], NDArray[np.int64]]] = {
    "linspace": linspace_timesteps,
    "uniform": uniform_timesteps,
    "quad": quad_timesteps,
}


def make_timesteps(
    spacing: str | Sequence[int] | NDArray[np.integer], num_train_timesteps: int, num_steps: int | None = None
) -> NDArray[np.int64]:
    """The table that a spacing's name and S make, or an explicit descending list, checked (then S is not needed)."""
    if not isinstance(spacing, str):
        table = check_timesteps(spacing, num_train_timesteps)
        if num_steps is not None and num_steps != len(table):
            raise ValueError(f"an explicit list of {len(table)} timesteps does not take num_steps={num_steps}")
        return table
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}{did_you_mean(spacing, SPACINGS)}")
    if num_steps is None:
        raise ValueError(f"spacing {spacing!r} needs num_steps")
    return SPACINGS[spacing](num_train_timesteps, num_steps)


def check_timesteps(timesteps: ArrayLike, num_train_timesteps: int) -> NDArray[np.int64]:
    """`timesteps` as int64, or ValueError: integers, not empty, strictly descending, all within 0..T-1."""
    table = np.asarray(timesteps)
    if table.ndim != 1 or table.size == 0:
        raise ValueError(f"timesteps must be a non-empty list, got an array of shape {table.shape}")
    if not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"timesteps must be integers, got {table.dtype}")
    rises = np.flatnonzero(np.diff(table) >= 0)
    if rises.size:
        i = int(rises[0])
        raise ValueError(f"timesteps must strictly descend: entry {i} is {table[i]}, entry {i + 1} is {table[i + 1]}")
    if table[0] >= num_train_timesteps or table[-1] < 0:
        raise ValueError(f"timesteps must lie in 0..{num_train_timesteps - 1}, got {table[-1]}..{table[0]}")
    return np.array(table, dtype=np.int64)  # a contiguous copy that owns its memory


def _check(num_train_timesteps: int, num_steps: int) -> tuple[int, int]:
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps must lie in 1..{num_train_timesteps} (the training timesteps), got {num_steps}")
    return num_train_timesteps, num_steps
