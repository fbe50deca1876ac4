"""Noise schedules, in float64 on the host: how much image and how much noise x_t = alpha_t x_0 + sigma_t eps holds.

A schedule is what the network was trained with: T discrete timesteps (`NoiseSchedule`, of betas), or a t that is
continuous (`ContinuousSchedule`: flow, EDM, continuous VP). Nothing is cast to float32 until a step table is built
(`jddim.ddim.step_table`).
"""

from __future__ import annotations

import abc
import dataclasses
import html
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jddim.config import ScheduleConfig, did_you_mean
from jddim.curve import alpha_bar_curve
from jddim.timesteps import LARGEST_S


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

    @property
    def summary(self) -> str:
        """In a few words, for people."""
        return f"T = {self.num_train_timesteps}"

    @property
    def most_steps(self) -> int:
        """The most steps that a spacing takes: T."""
        return self.num_train_timesteps

    def shown_times(self, num: int = 200) -> NDArray[np.int64]:
        """At most `num` timesteps from 0 to T-1, to draw the schedule at."""
        return np.unique(np.linspace(0, self.num_train_timesteps - 1, num).round().astype(np.int64))

    def alpha(self, timesteps: ArrayLike) -> NDArray[np.float64]:
        """sqrt(alpha_bar) at integer timesteps in -1..T-1: how much of the image is in x_t."""
        return np.sqrt(self.alpha_bar(timesteps))

    def sigma(self, timesteps: ArrayLike) -> NDArray[np.float64]:
        """sqrt(1 - alpha_bar) at integer timesteps in -1..T-1: how much noise is in x_t."""
        return np.sqrt(1 - self.alpha_bar(timesteps))

    def time_of(self, ratio: ArrayLike) -> NDArray[np.float64]:
        """The t in 0..T-1, between whole ones too, where sigma / alpha is `ratio`: log sigma / alpha is linear between.

        As k-diffusion and diffusers have it; a ratio beyond the ends has theirs.
        """
        every_t = np.arange(self.num_train_timesteps)
        with np.errstate(divide="ignore"):  # at zero terminal SNR the last is infinite
            logs = np.log(self.sigma(every_t) / self.alpha(every_t))
        return np.asarray(np.interp(np.log(ratio), logs, every_t))

    def prior_scale(self, t: float) -> float:
        """1: a run starts from N(0, I) at any t."""
        del t
        return 1.0


@dataclasses.dataclass(frozen=True)
class ContinuousSchedule(abc.ABC):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) eps for every real t in t_min..t_max; t = 0 is the clean image.

    t_min: the least t that the network was trained at, above 0 where it cannot be asked at less; 0 <= t_min < t_max.
    """

    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        """Raise ValueError for other bounds."""
        if not 0 <= self.t_min < self.t_max <= 1e6 or 0 < self.t_min < 1e-6:
            told = "t_min must be 0, or 1e-6 or more, and t_max above it, at most 1e6"
            raise ValueError(f"{told}; got {self.t_min}, {self.t_max}")

    @property
    def summary(self) -> str:
        """In a few words, for people."""
        return f"t in {self.t_min:g}..{self.t_max:g}"

    @property
    def most_steps(self) -> int:
        """The most steps that a spacing takes."""
        return LARGEST_S

    def shown_times(self, num: int = 200) -> NDArray[np.float64]:
        """`num` times from t_min to t_max, to draw the schedule at."""
        return np.linspace(self.t_min, self.t_max, num)

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> NDArray[np.float64]:
        """How much of the image is in x_t, for t in 0..t_max."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> NDArray[np.float64]:
        """How much noise is in x_t, for t in 0..t_max."""

    @abc.abstractmethod
    def time_of(self, ratio: ArrayLike) -> NDArray[np.float64]:
        """The t where sigma / alpha is `ratio`, >= 0."""

    def prior_scale(self, t: float) -> float:
        """What a standard normal x_T is multiplied by, to be x_t at the t where a run starts."""
        del t
        return 1.0


@dataclasses.dataclass(frozen=True)
class FlowSchedule(ContinuousSchedule):
    """Flow matching's straight path, alpha = 1 - t, sigma = t (Liu et al., arXiv:2209.03003; SiT, arXiv:2401.08740).

    A shifted flow (arXiv:2403.03206, Eq. 23) is this path at other t: the sampler's `shift`.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for other bounds."""
        super().__post_init__()
        if self.t_max > 1:
            raise ValueError(f"the flow's t_max is at most 1, pure noise, got {self.t_max}")

    def alpha(self, t: ArrayLike) -> NDArray[np.float64]:
        """1 - t."""
        return 1 - np.asarray(t, np.float64)

    def sigma(self, t: ArrayLike) -> NDArray[np.float64]:
        """The t itself."""
        return np.array(t, np.float64)

    def prior_scale(self, t: float) -> float:
        """The t itself, 1 where noise is all there is."""
        return float(t)

    def time_of(self, ratio: ArrayLike) -> NDArray[np.float64]:
        """Ratio / (1 + ratio)."""
        r = np.asarray(ratio, np.float64)
        return r / (1 + r)


@dataclasses.dataclass(frozen=True)
class EDMSchedule(ContinuousSchedule):
    """Karras et al.'s variance-exploding path, alpha = 1, sigma = t (arXiv:2206.00364, section 3): t is sigma.

    The image is not scaled down, so a run starts from noise of standard deviation t.
    """

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        """Raise ValueError for other bounds."""
        super().__post_init__()
        if self.t_min == 0:
            raise ValueError("edm's t_min, the least sigma, must be above 0: the network is told its logarithm")

    def alpha(self, t: ArrayLike) -> NDArray[np.float64]:
        """1."""
        return np.ones_like(np.asarray(t, np.float64))

    def sigma(self, t: ArrayLike) -> NDArray[np.float64]:
        """The t itself."""
        return np.array(t, np.float64)

    def time_of(self, ratio: ArrayLike) -> NDArray[np.float64]:
        """The ratio itself."""
        return np.array(ratio, np.float64)

    def prior_scale(self, t: float) -> float:
        """The t itself."""
        return float(t)


@dataclasses.dataclass(frozen=True)
class VPSchedule(ContinuousSchedule):
    """The continuous variance-preserving SDE of linear beta(t) (Song et al., arXiv:2011.13456, appendix B, Eq. 29).

    alpha = exp(-t^2 (beta_end - beta_start) / 4 - t beta_start / 2), sigma = sqrt(1 - alpha^2).
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    beta_start: float = 0.1
    beta_end: float = 20.0

    def __post_init__(self) -> None:
        """Raise ValueError for other bounds."""
        super().__post_init__()
        if not 0 < self.beta_start < self.beta_end <= 1e4:
            told = f"got {self.beta_start}, {self.beta_end}"
            raise ValueError(
                f"vp's beta_start and beta_end must be numbers with 0 < beta_start < beta_end <= 1e4, {told}"
            )

    def alpha(self, t: ArrayLike) -> NDArray[np.float64]:
        """See the class."""
        return np.exp(-self._decay(t))

    def sigma(self, t: ArrayLike) -> NDArray[np.float64]:
        """See the class; without the difference, which would lose digits at small t."""
        return np.sqrt(-np.expm1(-2 * self._decay(t)))

    def time_of(self, ratio: ArrayLike) -> NDArray[np.float64]:
        """Where -2 log alpha is log(1 + ratio^2), the root of a quadratic."""
        twice = np.log1p(np.square(np.asarray(ratio, np.float64)))
        rise = self.beta_end - self.beta_start
        return 2 * twice / (self.beta_start + np.sqrt(self.beta_start**2 + 2 * rise * twice))

    def _decay(self, t: ArrayLike) -> NDArray[np.float64]:
        t = np.asarray(t, np.float64)
        return t**2 * (self.beta_end - self.beta_start) / 4 + t * self.beta_start / 2


Schedule = NoiseSchedule | ContinuousSchedule


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


CONTINUOUS: dict[str, Callable[..., ContinuousSchedule]] = {"flow": FlowSchedule, "edm": EDMSchedule, "vp": VPSchedule}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that `config` names. Raises ValueError on an unknown name or a field it does not take."""
    if config.name not in CONTINUOUS:
        return noise_schedule(config)
    taken = ("t_min", "t_max", "beta_start", "beta_end") if config.name == "vp" else ("t_min", "t_max")
    given = _given(config, "t_min", "t_max", "beta_start", "beta_end")
    unused = [name for name in given if name not in taken]
    unused += ["num_train_timesteps"] if config.num_train_timesteps != ScheduleConfig.num_train_timesteps else []
    unused += [name for name in ("betas", "zero_terminal_snr") if getattr(config, name)]
    if unused:
        raise ValueError(f"schedule {config.name!r} is continuous: it takes no {' or '.join(unused)}")
    return CONTINUOUS[config.name](**given)


def noise_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The schedule of T discrete timesteps that `config` names. Raises as `make_schedule`, and on a continuous one."""
    schedule = _named(config)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def _given(config: ScheduleConfig, *names: str) -> dict[str, float]:
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def _named(config: ScheduleConfig) -> NoiseSchedule:
    given = _given(config, "beta_start", "beta_end")
    if config.name in CONTINUOUS:
        raise ValueError(f"schedule {config.name!r} is continuous, and has no T timesteps")
    if bounds := _given(config, "t_min", "t_max"):
        raise ValueError(f"schedule {config.name!r} takes no {' or '.join(bounds)}: its t are 0..T-1")
    if config.name == "betas":
        if config.betas is None or len(config.betas) != config.num_train_timesteps or given:
            raise ValueError(
                "schedule 'betas' takes a list `betas` of num_train_timesteps numbers, and no beta_start or beta_end"
            )
        return from_betas(config.betas)
    if config.name not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {config.name!r}{did_you_mean(config.name, [*SCHEDULES, 'betas', *CONTINUOUS])}"
        )
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
