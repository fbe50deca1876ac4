"""Noise schedules: betas and alphas_cumprod, in float64 on the host.

A schedule is what the network was trained with. Every function here returns the whole `NoiseSchedule`;
nothing is cast to float32 until a step table is built (`jddim.ddim.step_table`).
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jddim.config import ScheduleConfig, did_you_mean
from jddim.curve import alpha_bar_curve


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), Eq. 4 of 2006.11239.

    betas, alphas_cumprod: float64 `(T,)`; alphas_cumprod falls strictly within (0, 1), or ends at 0 exactly
    (`zero_terminal_snr`), where only a network that predicts x0 or v can be sampled.
    """

    betas: NDArray[np.float64]
    alphas_cumprod: NDArray[np.float64]

    def __repr__(self) -> str:
        """One line."""
        ends = f"beta {self.betas[0]:.4g} to {self.betas[-1]:.4g}, alpha_bar {self.alphas_cumprod[0]:.4g} to "
        return f"NoiseSchedule(T = {self.num_train_timesteps:,}; {ends}{self.alphas_cumprod[-1]:.4g})"

    def _repr_html_(self) -> str:
        """The line, and alpha_bar over t, for a notebook."""
        return f"<div><code>{html.escape(repr(self))}</code><br/>{alpha_bar_curve(self.alphas_cumprod)}</div>"

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps the network was trained with; t runs over 0..T-1."""
        return len(self.betas)

    def alpha_bar(self, timesteps: ArrayLike) -> NDArray[np.float64]:
        """alpha_bar at integer timesteps in -1..T-1; t = -1 is the clean image, where alpha_bar = 1."""
        t: NDArray[np.int64] = np.asarray(timesteps)
        if t.size and (t.min() < -1 or t.max() >= self.num_train_timesteps):
            raise ValueError(f"timesteps must lie in -1..{self.num_train_timesteps - 1}, got {t.min()}..{t.max()}")
        return np.concatenate([self.alphas_cumprod, [1.0]])[t]  # index -1 is the appended 1

    def alpha(self, timesteps: ArrayLike) -> NDArray[np.float64]:
        """sqrt(alpha_bar) at integer timesteps in -1..T-1: how much of the image is in x_t."""
        return np.sqrt(self.alpha_bar(timesteps))

    def sigma(self, timesteps: ArrayLike) -> NDArray[np.float64]:
        """sqrt(1 - alpha_bar) at integer timesteps in -1..T-1: how much noise is in x_t."""
        return np.sqrt(1 - self.alpha_bar(timesteps))


def from_betas(betas: ArrayLike) -> NoiseSchedule:
    """The schedule of explicit betas `(T,)`, each in (0, 1).

    beta = 1 would make alpha_bar 0, where x_0 cannot be had from a predicted eps (it divides by
    sqrt(alpha_bar)), so it raises, as does anything not finite.
    """
    betas = np.array(betas, dtype=np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a non-empty list of T numbers, got an array of shape {betas.shape}")
    bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if bad.size:
        raise ValueError(
            f"betas must lie in (0, 1): {bad.size} of {betas.size} do not, first betas[{bad[0]}] = {betas[bad[0]]}"
        )
    alphas_cumprod: NDArray[np.float64] = np.cumprod(1.0 - betas, dtype=np.float64)
    if alphas_cumprod[-1] == 0:
        raise ValueError("alphas_cumprod underflows to 0 in float64: betas are too large for their number")
    betas.setflags(write=False)
    alphas_cumprod.setflags(write=False)
    return NoiseSchedule(betas, alphas_cumprod)


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule rescaled so that alpha_bar ends at 0, Algorithm 1 of arXiv:2305.08891.

    sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its start. diffusers' `rescale_betas_zero_snr`.
    """
    if schedule.num_train_timesteps < 2:
        raise ValueError("a schedule of one timestep cannot both keep its start and end at alpha_bar = 0")
    root = np.sqrt(schedule.alphas_cumprod)
    alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    betas.setflags(write=False)
    alphas_cumprod.setflags(write=False)
    return NoiseSchedule(betas, alphas_cumprod)


def linear_schedule(num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Betas linear in t: Ho et al. (2006.11239, section 4).

    Not rescaled by 1000/T; OpenAI and lucidrains multiply both ends by it, which the caller does here.
    """
    return from_betas(np.linspace(beta_start, beta_end, _check_T(num_train_timesteps), dtype=np.float64))


def scaled_linear_schedule(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> NoiseSchedule:
    """Betas whose square roots are linear in t: diffusers' "scaled_linear", ermongroup's and pesser's "quad"."""
    T = _check_T(num_train_timesteps)
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2)


def cosine_schedule(num_train_timesteps: int = 1000) -> NoiseSchedule:
    """Nichol and Dhariwal's cosine schedule, Eq. 17 of arXiv:2102.09672, with s = 0.008 and beta <= 0.999.

    OpenAI's "cosine", diffusers' "squaredcos_cap_v2", lucidrains' "cosine".
    """
    t = np.arange(_check_T(num_train_timesteps) + 1, dtype=np.float64) / num_train_timesteps
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def sigmoid_schedule(
    num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Betas sigmoid in t over [-6, 6]: ermongroup's and diffusers' "sigmoid".

    lucidrains' "sigmoid" is another schedule: `sigmoid_alpha_bar_schedule`.
    """
    x = np.linspace(-6.0, 6.0, _check_T(num_train_timesteps), dtype=np.float64)
    return from_betas(beta_start + (beta_end - beta_start) / (1 + np.exp(-x)))


def sigmoid_alpha_bar_schedule(
    num_train_timesteps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0
) -> NoiseSchedule:
    """alpha_bar sigmoid in t: Jabri et al. (arXiv:2212.11972, figure 8), lucidrains' default; beta <= 0.999.

    As in lucidrains' code, the sigmoid's two ends are rounded to float32 and nothing else is; at T = 1000 that moves
    the last alpha_bar by 3e-5 of itself.
    """

    def sigmoid(x: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return np.asarray(1 / (1 + np.exp(-np.asarray(x, np.float64) / tau)))

    first, last = (np.float64(np.float32(sigmoid(x))) for x in (start, end))
    t = np.arange(_check_T(num_train_timesteps) + 1, dtype=np.float64) / num_train_timesteps
    alpha_bar = (last - sigmoid(start + t * (end - start))) / (last - first)
    return from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
    "sigmoid": sigmoid_schedule,
    "sigmoid_alpha_bar": sigmoid_alpha_bar_schedule,
}

_WITHOUT_BETA_RANGE = ("cosine", "sigmoid_alpha_bar")


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The schedule that `config` names. Raises ValueError on an unknown name or a field it does not take."""
    schedule = _named(config)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def _named(config: ScheduleConfig) -> NoiseSchedule:
    given: dict[str, float] = {
        name: value for name in ("beta_start", "beta_end") if (value := getattr(config, name)) is not None
    }
    if config.name == "betas":
        if config.betas is None or len(config.betas) != config.num_train_timesteps or given:
            raise ValueError(
                "schedule 'betas' takes a list `betas` of num_train_timesteps numbers, and no beta_start or beta_end"
            )
        return from_betas(config.betas)
    if config.name not in SCHEDULES:
        raise ValueError(f"unknown schedule {config.name!r}{did_you_mean(config.name, [*SCHEDULES, 'betas'])}")
    if config.betas is not None:
        raise ValueError(f"schedule {config.name!r} takes no list of betas; name it 'betas' to use one")
    if given and config.name in _WITHOUT_BETA_RANGE:
        raise ValueError(f"schedule {config.name!r} takes no {' or '.join(given)}")
    return SCHEDULES[config.name](config.num_train_timesteps, **given)


def schedule_config_from_betas(betas: Sequence[float]) -> ScheduleConfig:
    """The config that stores `betas` themselves; float64 survives JSON exactly."""
    return ScheduleConfig(name="betas", num_train_timesteps=len(betas), betas=tuple(float(b) for b in betas))


LARGEST_T = 1_000_000
"""Of a schedule that is computed: a thousand times what networks are trained with; more is a damaged number."""


def _check_T(num_train_timesteps: int) -> int:
    if not 1 <= num_train_timesteps <= LARGEST_T:
        raise ValueError(f"num_train_timesteps must lie in 1..{LARGEST_T}, got {num_train_timesteps}")
    return num_train_timesteps
