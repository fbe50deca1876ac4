"""Configuration: frozen dataclasses that round-trip through JSON. Unknown and missing keys raise."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Which noise schedule a checkpoint was trained with; `jddim.schedule.make_schedule` builds it.

    name: a key of `jddim.schedule.SCHEDULES`, or "betas" for the explicit list in `betas`.
    beta_start, beta_end: for the schedules that take them; None means the schedule's own default.
    """

    name: str = "linear"
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    betas: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """A source's sampling conventions (the defaults of `DDIM.sample`; every one can be overridden).

    spacing: a key of `jddim.timesteps.SPACINGS`.
    clip: clamp x0 to `clip_range`. rederive_eps: recompute eps from the clipped x0 for the direction term.
    variance: "fixed_small" or "fixed_large", the ancestral sampler's variance.
    """

    spacing: str = "linspace"
    num_steps: int = 50
    eta: float = 0.0
    clip: bool = True
    clip_range: tuple[float, float] = (-1.0, 1.0)
    rederive_eps: bool = False
    prediction_type: str = "epsilon"
    variance: str = "fixed_small"


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The UNet of Ho et al. (arXiv:2006.11239, appendix B) and what varies between its descendants.

    image_size: (height, width) in pixels that the checkpoint was trained at.
    channels: width of the first level; channel_mults: one multiplier per level, full resolution first.
    attention_levels: levels (0 is full resolution) whose residual blocks are each followed by attention.
    resample_with_conv: True: strided 3x3 convolution down (padded below and to the right only), nearest +
        3x3 convolution up; False: 2x2 average pool down, nearest up.
    conv_shortcut: a 3x3 instead of a 1x1 convolution where a residual block changes its width.
    norm_epsilon: 1e-6 in this family (torch's own default is 1e-5).
    """

    image_size: tuple[int, int]
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    resample_with_conv: bool = True
    conv_shortcut: bool = False
    norm_groups: int = 32
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong, and what would be right."""
        problems: list[str] = []
        for name in ("in_channels", "out_channels", "num_res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        if self.channels < 4:
            problems.append(f"channels={self.channels} must be at least 4 (the time embedding needs two of each)")
        if not self.channel_mults or min(self.channel_mults) < 1:
            problems.append(f"channel_mults={self.channel_mults} must hold one positive integer per level")
        levels = len(self.channel_mults)
        outside = [level for level in self.attention_levels if not 0 <= level < levels]
        if outside:
            problems.append(f"attention_levels={self.attention_levels} must lie in 0..{levels - 1}")
        if len(set(self.attention_levels)) != len(self.attention_levels):
            problems.append(f"attention_levels={self.attention_levels} repeats a level")
        if not problems and any(self.channels * m % self.norm_groups for m in (1, *self.channel_mults)):
            problems.append(
                f"every level's width must be a multiple of norm_groups={self.norm_groups}: channels={self.channels} "
                f"with channel_mults={self.channel_mults} gives {[self.channels * m for m in (1, *self.channel_mults)]}"
                f"; take channels from {self.norm_groups}, {2 * self.norm_groups}, {3 * self.norm_groups}, ..."
            )
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            problems.append(f"image_size={self.image_size} must be (height, width), both at least 1")
        elif self.channel_mults:
            problems += size_problems(self, self.image_size)
        if problems:
            raise ValueError("UNetConfig: " + "; ".join(problems))


def size_problems(config: UNetConfig, image_size: tuple[int, int]) -> list[str]:
    """What is wrong with (height, width) for this UNet: [] or one sentence that says which sizes divide."""
    factor = 2 ** (len(config.channel_mults) - 1)
    if all(side >= factor and side % factor == 0 for side in image_size):
        return []
    lower = [max(side // factor, 1) * factor for side in image_size]
    upper = [-(-side // factor) * factor for side in image_size]
    return [
        f"image size {image_size[0]}x{image_size[1]} does not divide: {len(config.channel_mults)} levels halve it "
        f"{len(config.channel_mults) - 1} times, so height and width must be multiples of {factor} "
        f"(nearest: {lower[0]}x{lower[1]} or {upper[0]}x{upper[1]})"
    ]


def levels_at_resolutions(image_size: int, num_levels: int, resolutions: Iterable[int]) -> tuple[int, ...]:
    """The levels whose resolution (image_size halved `level` times, rounded down) is in `resolutions`.

    Ho et al. and their ports name attention by resolution; the UNet here names it by level.
    """
    wanted = set(resolutions)
    return tuple(level for level in range(num_levels) if image_size // 2**level in wanted)


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as a dict of JSON types (tuples become lists)."""
    return {
        field.name: list(value) if isinstance(value := getattr(config, field.name), tuple) else value
        for field in dataclasses.fields(config)
    }


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of `to_json`. Raises ValueError on unknown keys (naming the nearest) or missing ones."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [f"unknown key {key!r}{did_you_mean(key, fields)}" for key in data if key not in fields]
    problems += [
        f"missing key {name!r}"
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING
    ]
    if problems:
        raise ValueError(f"{cls.__name__}: " + "; ".join(problems))
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` when something allowed is near, else the list of what is allowed."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (allowed: {', '.join(allowed)})"
