"""Configuration: frozen dataclasses that round-trip through JSON. Unknown and missing keys raise."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


def later(default: T) -> T:
    """A field that files of the same format may lack: their digests hold, since its default is not written."""
    field: T = dataclasses.field(default=default, metadata={"later": True})
    return field


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Which noise schedule a checkpoint was trained with; `jddim.schedule.make_schedule` builds it.

    name: a key of `jddim.schedule.SCHEDULES`, or "betas" for the explicit list in `betas`.
    beta_start, beta_end: for the schedules that take them; None means the schedule's own default.
    zero_terminal_snr: the betas are rescaled so that alpha_bar ends at 0 (arXiv:2305.08891, Algorithm 1).
    t_min, t_max: of the continuous schedules "flow", "edm" and "vp", which have no T and take nothing else, but vp its
        beta_start and beta_end; None means the schedule's own default.
    """

    name: str = "linear"
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False
    t_min: float | None = later(None)
    t_max: float | None = later(None)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """A source's sampling conventions (the defaults of `DDIM.sample`; every one can be overridden).

    spacing: a key of `jddim.timesteps.SPACINGS`, or OpenAI's "ddimN" or "10,15,20", which say their own S; or of
        `jddim.timesteps.RATIOS`, off the grid; of a continuous schedule "even", one of RATIOS, or the t themselves,
        "80,0.66", which say their own S.
    steps_offset: added to every t of the spacing "leading". set_alpha_to_one: False: the last step of diffusers'
        spacings ends at alpha_bar_0, not at 1.
    clip: clamp x0 to `clip_range`. threshold_ratio: instead, dynamic thresholding (Imagen, arXiv:2205.11487): x0 is
        clamped to that quantile of its magnitude, between 1 and threshold_max, and divided by it.
    rederive_eps: recompute eps from the clipped x0 for the direction term.
    prediction_type: what the network predicts: "epsilon", "sample" (x0), "v_prediction", "velocity" (eps - x0, the
        derivative of a flow's x_t by t) or "edm" (EDM's F, whose input is scaled and whose t is log sigma).
    timestep_scale: the network is given t times this (OpenAI's rescale_timesteps: 1000 / T); with "edm", log t times
        this (1/4).
    reversed_time: the network is given 1 - t, and its velocity points to the image (SiT, whose t = 1 is clean).
    sigma_data: EDM's, the images' standard deviation. boundary: with "edm", x0 at t_min is x_t itself (consistency
        models, arXiv:2303.01469, appendix C).
    shift: of the flow's spacing "even": each t becomes shift t / (1 + (shift - 1) t). rho: of the spacing "karras".
    self_condition: the network also takes the last step's x0 (lucidrains).
    variance: "fixed_small", "fixed_large" or "learned_range", the ancestral sampler's variance. With "learned_range"
        the network has twice the channels, of which the second half interpolates the log-variance (Nichol, Eq. 15);
        DDIM drops it. With "unused" it has them too, but they were never trained (SiT): "fixed_small" without them.
    clean_known: what a mask keeps of an image is clean in every x_t, as in training (Palette), not as noisy as x_t.
    guidance_channels: guidance changes the first so many of x_t's channels alone, 3 of 4 in facebookresearch's DiT; the
        rest is the prediction with the label. None: all.
    """

    spacing: str = "linspace"
    num_steps: int = 50
    eta: float = 0.0
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip: bool = True
    clip_range: tuple[float, float] = (-1.0, 1.0)
    threshold_ratio: float | None = None
    threshold_max: float = 1.0
    rederive_eps: bool = False
    prediction_type: str = "epsilon"
    timestep_scale: float = 1.0
    self_condition: bool = False
    variance: str = "fixed_small"
    clean_known: bool = later(False)
    guidance_channels: int | None = later(None)
    reversed_time: bool = later(False)
    sigma_data: float = later(0.5)
    boundary: bool = later(False)
    shift: float = later(1.0)
    rho: float = later(7.0)


METHODS = (
    *("ddim", "ddpm", "consistency", "dpm++2m", "dpm++3m", "dpm++2s", "dpm++3s", "dpm++2m-sde"),
    *("dpm2m", "dpm3m", "dpm2s", "dpm3s", "dpm2m-sde", "unipc", "unipc-bh1", "deis", "lms"),
    *("heun", "heun-flow", "plms", "pndm", "euler-a"),
)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "velocity", EDM := "edm")
VARIANCES = ("fixed_small", "fixed_large", LEARNED := "learned_range", UNUSED := "unused")
TWICE = (LEARNED, UNUSED)
"""The variances of networks with twice x_t's channels out."""
DTYPES = ("float32", "bfloat16")
"""What a network may compute in when it samples."""


class ModelConfig(Protocol):
    """What sampling needs to know of a network, whatever its wiring. One frozen dataclass for each (`jddim.models`)."""

    def __hash__(self) -> int:
        """Frozen dataclasses have one."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was trained at."""

    @property
    def in_channels(self) -> int:
        """Channels of the image x_t."""

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: the image's, and those of what it is given beside it."""

    @property
    def condition_channels(self) -> int:
        """Channels of an image that it is given beside x_t; 0: none."""

    @property
    def condition_first(self) -> bool:
        """Whether the condition's channels come before x_t's."""

    @property
    def out_channels(self) -> int:
        """Channels of its output."""

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of it."""

    @property
    def up_blocks(self) -> int:
        """Blocks of a UNet's way up whose last ones can be asked alone (`jddim.models.unet`); 0: it is not made so."""

    @property
    def summary(self) -> str:
        """The network in one line, for people."""

    @property
    def class_embedding(self) -> str | None:
        """None if the network takes no labels."""

    @property
    def num_classes(self) -> int | None:
        """Integer labels lie in 0..num_classes-1; None if there are none, or they are not integers."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The UNet of Ho et al. (arXiv:2006.11239, appendix B) and what varies between its descendants.

    The defaults are Ho et al.'s. One wiring, three sources: ermongroup and pesser, diffusers' UNet2DModel, OpenAI.

    image_size: (height, width) in pixels that the checkpoint was trained at.
    channels: width of the embedding of t. channel_mults: each level's width as a multiple of it, full resolution
        first (`widths`; may be fractional). stem_channels: width after conv_in, None: `channels`.
    attention_levels: levels (0 is full resolution) whose residual blocks are each followed by attention, in the
        encoder; up_attention_levels: in the decoder, None: the same. mid_attention: in the middle.
    num_heads, or head_channels (their width; over num_heads): of every attention. num_heads_up: the decoder's, None:
        num_heads. mid_norm_groups: groups of the middle attention's norm, None: norm_groups, 0: no norm.
    downsample, upsample: how the step between levels i and i + 1 is taken, one entry for each, or one for all:
        "conv" (strided 3x3; nearest + 3x3), "pool" (2x2 average pool; nearest alone), "resnet" (a residual block
        that resamples after its first norm). symmetric_padding: the strided 3x3 pads 1 on each side, not 0 and 1.
    conv_shortcut: a 3x3 instead of a 1x1 convolution where a residual block changes its width.
    scale_shift: time enters a block as norm2(h) (1 + scale) + shift, not added before norm2.
    activation: "silu", "gelu" (exact), "mish" or "relu", in the blocks; the time MLP and the output have silu always.
    middle: False: nothing between encoder and decoder. mid_scale: the middle's blocks and attention divide their sum
        with the residual by it.
    norm_epsilon: 1e-6 in Ho et al.'s (torch's own default is 1e-5).
    time_embedding: "sinusoidal"; "fourier" (log t through fixed random frequencies; the output is divided by t),
        "learned" (a row for each of num_timesteps) or "noise_level" (the sinusoid of alpha_bar_t, which the network
        keeps for each of num_timesteps). time_channels: width of the time MLP, None: 4 `channels`.
    cosine_first, frequency_shift: of the sinusoid, whose frequencies are
        10000^(-i / (channels // 2 - frequency_shift)). divide_last: in their exponents the division comes last, as in
        diffusers and OpenAI; it changes the last float32 digit only, which t = 1000 magnifies to 1e-4.
    class_embedding: None, "learned" (num_classes rows), "timestep" (a number, embedded as t is) or "identity" (a
        vector of the time MLP's width), added to the time MLP's output.
    center_input: the network first maps x to 2 x - 1.
    Of EDM's networks (NVlabs/edm; Song et al.'s DDPM++, NCSN++): block_scale: each block and attention, but the
        middle's, divides its sum with the residual by it. resample_shortcut: a block that resamples has a 1x1
        convolution in its shortcut. resample_filter: blocks resample by these taps in each direction, in place of means
        and nearest neighbours. up_attention_last: in the decoder only a level's last block is followed by attention.
        early_class: the class is added to what the time MLP is given. input_pyramid: the input, halved again and again,
        comes into each level by a convolution. time_embedding "frequencies" is "fourier" of t itself, without division.
    condition_channels: of an image that it is given beside x_t, after x_t's channels, or before them with
        condition_first (image to image: a low resolution, a mask, a grey image, ...). in_channels counts x_t's alone.
    """

    image_size: tuple[int, int]
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    channel_mults: tuple[float, ...] = (1, 2, 2, 2)
    stem_channels: int | None = None
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    up_attention_levels: tuple[int, ...] | None = None
    middle: bool = True
    mid_attention: bool = True
    mid_norm_groups: int | None = None
    num_heads: int = 1
    num_heads_up: int | None = None
    head_channels: int | None = None
    downsample: tuple[str, ...] = ("conv",)
    upsample: tuple[str, ...] = ("conv",)
    symmetric_padding: bool = False
    conv_shortcut: bool = False
    scale_shift: bool = False
    activation: str = "silu"
    mid_scale: float = 1.0
    norm_groups: int = 32
    norm_epsilon: float = 1e-6
    time_embedding: str = "sinusoidal"
    time_channels: int | None = None
    cosine_first: bool = False
    frequency_shift: float = 1.0
    divide_last: bool = False
    num_timesteps: int | None = None
    class_embedding: str | None = None
    num_classes: int | None = None
    center_input: bool = False
    condition_channels: int = later(0)
    condition_first: bool = later(False)
    block_scale: float = later(1.0)
    resample_shortcut: bool = later(False)
    resample_filter: tuple[float, ...] = later(())
    up_attention_last: bool = later(False)
    early_class: bool = later(False)
    input_pyramid: bool = later(False)

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: x_t's and the condition's."""
        return self.in_channels + self.condition_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(round(self.channels * mult) for mult in self.channel_mults)

    @property
    def stem(self) -> int:
        """Channels after conv_in."""
        return self.channels if self.stem_channels is None else self.stem_channels

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of it: each level but the last halves them."""
        return 1 << (len(self.channel_mults) - 1)

    @property
    def summary(self) -> str:
        """The network in one line, for people."""
        beside = f", given an image of {self.condition_channels} channels" if self.condition_channels else ""
        return f"{_shape(self)}, {_labels(self)}{beside}"

    @property
    def time_width(self) -> int:
        """Channels of the time MLP's output."""
        return 4 * self.channels if self.time_channels is None else self.time_channels

    @property
    def time_features(self) -> int:
        """Channels of the time MLP's input."""
        return (2 if self.time_embedding in ("fourier", "frequencies") else 1) * self.channels

    @property
    def up_blocks(self) -> int:
        """Blocks of the way up, of all levels."""
        return len(self.channel_mults) * (self.num_res_blocks + 1)

    def up_block(self, blocks: int) -> tuple[int, int]:
        """(level, number in the level) of the first of the last `blocks` blocks of the way up."""
        before, j = divmod(self.up_blocks - blocks, self.num_res_blocks + 1)
        return len(self.channel_mults) - 1 - before, j

    def deep_shape(self, image_size: tuple[int, int], blocks: int) -> tuple[int, int, int]:
        """(height, width, channels) of what the last `blocks` blocks of the way up are given from below."""
        level, j = self.up_block(blocks)
        height, width = image_size
        return height >> level, width >> level, (*self.widths, self.widths[-1])[level if j else level + 1]

    def resampling(self, level: int) -> tuple[str, str]:
        """How levels `level` and `level` + 1 are joined: (down, up)."""
        down, up = (kinds[level] if len(kinds) > 1 else kinds[0] for kinds in (self.downsample, self.upsample))
        return down, up

    def has_attention(self, level: int, *, up: bool) -> bool:
        """Whether the encoder's or the decoder's blocks at `level` are followed by attention."""
        return level in (
            self.up_attention_levels if up and self.up_attention_levels is not None else self.attention_levels
        )

    def heads(self, width: int, *, up: bool = False) -> int:
        """How many heads an attention of `width` channels has."""
        if self.head_channels is not None:
            return width // self.head_channels
        return self.num_heads_up if up and self.num_heads_up is not None else self.num_heads

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong, and what would be right."""
        check_bounds(self)
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("in_channels", "out_channels", "num_res_blocks", "norm_groups", "num_heads")
            if getattr(self, name) < 1
        ]
        if self.channels < 4:
            problems.append(f"channels={self.channels} must be at least 4 (the time embedding needs two of each)")
        if not self.channel_mults or min(self.channel_mults) <= 0 or min(self.widths) < 1:
            problems.append(f"channel_mults={self.channel_mults} must hold one positive number per level")
        problems += self._level_problems() + self._choice_problems()
        if not problems:
            problems += self._width_problems()
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            problems.append(f"image_size={self.image_size} must be (height, width), both at least 1")
        elif self.channel_mults:
            problems += size_problems(self, self.image_size)
        if problems:
            raise ValueError("UNetConfig: " + "; ".join(problems))

    def _level_problems(self) -> list[str]:
        problems = []
        levels = len(self.channel_mults)
        for name in ("attention_levels", "up_attention_levels"):
            given = getattr(self, name) or ()
            if any(not 0 <= level < levels for level in given):
                problems.append(f"{name}={given} must lie in 0..{levels - 1}")
            if len(set(given)) != len(given):
                problems.append(f"{name}={given} repeats a level")
        for name in ("downsample", "upsample"):
            kinds = getattr(self, name)
            if len(kinds) not in (1, levels - 1):
                problems.append(f"{name}={kinds} must have one entry, or one for each of {levels - 1} steps")
            problems += [
                f"{name} {kind!r} is unknown{did_you_mean(kind, RESAMPLINGS)}"
                for kind in kinds
                if kind not in RESAMPLINGS
            ]
        return problems

    def _choice_problems(self) -> list[str]:
        problems = [
            f"{name} {value!r} is unknown{did_you_mean(str(value), allowed)}"
            for name, value, allowed in (
                ("activation", self.activation, ACTIVATIONS),
                ("time_embedding", self.time_embedding, TIME_EMBEDDINGS),
                ("class_embedding", self.class_embedding or CLASS_EMBEDDINGS[0], CLASS_EMBEDDINGS),
            )
            if value not in allowed
        ]
        if (self.class_embedding == "learned") != (self.num_classes is not None):
            problems.append(f"num_classes={self.num_classes} goes with class_embedding='learned', and only with it")
        if (self.time_embedding in BY_TABLE) != (self.num_timesteps is not None):
            told = f"num_timesteps={self.num_timesteps} goes with time_embedding={' or '.join(map(repr, BY_TABLE))}"
            problems.append(f"{told}, and only with them")
        problems += [f"{name} must not be 0" for name in ("mid_scale", "block_scale") if getattr(self, name) == 0]
        if len(self.resample_filter) % 2 or (self.resample_filter and sum(self.resample_filter) == 0):
            problems.append(f"resample_filter={self.resample_filter} must be an even number of taps whose sum is not 0")
        if self.early_class and self.class_embedding != "learned":
            problems.append("early_class goes with class_embedding='learned'")
        if self.condition_channels < 0:
            problems.append(f"condition_channels={self.condition_channels} must not be negative")
        if self.condition_first and not self.condition_channels:
            problems.append("condition_first is of a network with condition_channels, of which this has none")
        return problems

    def _width_problems(self) -> list[str]:
        problems = []
        widths = (self.stem, *self.widths)
        if any(width % self.norm_groups for width in widths):
            groups = self.norm_groups
            problems.append(
                f"every level's width must be a multiple of norm_groups={groups}: channels={self.channels} "
                f"with channel_mults={self.channel_mults} gives {list(widths)}"
                f"; take channels from {groups}, {2 * groups}, {3 * groups}, ..."
            )
        if self.middle and self.mid_attention and self.mid_norm_groups and self.widths[-1] % self.mid_norm_groups:
            problems.append(
                f"the middle's width {self.widths[-1]} must be a multiple of mid_norm_groups={self.mid_norm_groups}"
            )
        attended = [
            (width, up) for i, width in enumerate(self.widths) for up in (False, True) if self.has_attention(i, up=up)
        ]
        attended += [(self.widths[-1], False)] * (self.middle and self.mid_attention)
        for width, up in dict.fromkeys(attended):
            heads = self.heads(width, up=up)
            if heads < 1 or width % heads or (self.head_channels and width % self.head_channels):
                problems.append(
                    f"attention over {width} channels cannot be split into heads"
                    + (f" of head_channels={self.head_channels}" if self.head_channels else f": num_heads={heads}")
                )
        return problems


RESAMPLINGS = ("conv", "pool", "resnet")
ACTIVATIONS = ("silu", "gelu", "mish", "relu")
BY_TABLE = ("learned", "noise_level")
TIME_EMBEDDINGS = ("sinusoidal", "fourier", "frequencies", *BY_TABLE)
CLASS_EMBEDDINGS = ("learned", "timestep", "identity")


class _Whole:
    """Of a network that is asked as a whole alone."""

    @property
    def up_blocks(self) -> int:
        """0: it has no last blocks that can be asked alone."""
        return 0


class _NoCondition:
    """Of a network that is given no image beside x_t."""

    @property
    def condition_channels(self) -> int:
        """0: no image is given beside x_t."""
        return 0

    @property
    def condition_first(self) -> bool:
        """Whether a condition would come first."""
        return False


class _NoLabels:
    """Of a network that takes no labels."""

    @property
    def class_embedding(self) -> str | None:
        """None: it takes no labels."""
        return None

    @property
    def num_classes(self) -> int | None:
        """None: it takes no labels."""
        return None


@dataclasses.dataclass(frozen=True)
class LucidrainsConfig(_Whole, _NoCondition):
    """The UNet of lucidrains' denoising-diffusion-pytorch 2.x (`jddim.models.lucidrains`); its `Unet`'s arguments.

    image_size: (height, width) in pixels that the checkpoint was trained at. in_channels: the image's;
    self_condition: the network is given the last step's x0 before it, so takes twice as many. out_channels: twice
    in_channels with a learned variance.
    channels: width of the embedding of t ("dim"). channel_mults: each level's width as a multiple of it, the
    lowest resolution last. stem_channels: width of the 7x7 stem and of the first level's blocks ("init_dim").
    full_attention: for each level, whether its attention is full and not linear; num_heads and head_channels of each,
    the last level's also in the middle, which is always full. memory: learned keys and values of every attention.
    time_embedding: "sinusoidal", with frequencies theta^(-i / (channels / 2 - 1)), or "learned": t and time_features
    sines and cosines of learned or random frequencies.
    num_classes: labels that it takes, the null label's last (classifier_free_guidance.py); None: it takes none.
    strided: levels are joined by a convolution of stride 2, as there, in place of 2x2 squares side by side.
    """

    image_size: tuple[int, int]
    full_attention: tuple[bool, ...]
    num_heads: tuple[int, ...]
    head_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    self_condition: bool = False
    channels: int = 64
    channel_mults: tuple[int, ...] = (1, 2, 4, 8)
    stem_channels: int | None = None
    memory: int = 4
    time_embedding: str = "sinusoidal"
    time_features: int = 16
    theta: float = 10000.0
    num_classes: int | None = later(None)
    strided: bool = later(False)

    @property
    def class_embedding(self) -> str | None:
        """None if the network takes no labels."""
        return None if self.num_classes is None else "learned"

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: the self-conditioning's, then the image's."""
        return self.in_channels * (2 if self.self_condition else 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels that each level hands to the next, full resolution first."""
        return tuple(self.channels * mult for mult in self.channel_mults)

    @property
    def stem(self) -> int:
        """Channels after the stem."""
        return self.channels if self.stem_channels is None else self.stem_channels

    @property
    def time_width(self) -> int:
        """Channels of the time MLP's output."""
        return 4 * self.channels

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of it: each level but the last halves them."""
        return 1 << (len(self.channel_mults) - 1)

    @property
    def summary(self) -> str:
        """The network in one line, for people."""
        full = [level for level, full in enumerate(self.full_attention) if full]
        return (
            f"{self.image_size[0]}x{self.image_size[1]}x{self.in_channels}, ch {self.channels}, "
            f"mult {','.join(map(str, self.channel_mults))}, "
            f"full attention at {_resolutions(self.image_size, full)}, {_labels(self)}"
            + (", self-conditioned" if self.self_condition else "")
        )

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong, and what would be right."""
        check_bounds(self)
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("in_channels", "out_channels", "stem")
            if getattr(self, name) < 1
        ]
        if self.channels < 4 or self.channels % 2:
            problems.append(f"channels={self.channels} must be even and at least 4 (sines and cosines, two of each)")
        levels = len(self.channel_mults)
        if not levels or any(mult < 1 or mult != int(mult) for mult in self.channel_mults):
            problems.append(f"channel_mults={self.channel_mults} must hold one positive integer per level")
        for name in ("full_attention", "num_heads", "head_channels"):
            given = getattr(self, name)
            if len(given) != levels or any(value < (name != "full_attention") for value in given):
                problems.append(f"{name}={given} must hold one value for each of {levels} levels, numbers at least 1")
        if self.num_classes is not None and self.num_classes < 1:
            problems.append(f"num_classes={self.num_classes} must be at least 1, or None for a network without labels")
        if self.memory < 0:
            problems.append(f"memory={self.memory} must not be negative")
        if self.time_embedding not in LUCIDRAINS_TIME_EMBEDDINGS:
            hint = did_you_mean(self.time_embedding, LUCIDRAINS_TIME_EMBEDDINGS)
            problems.append(f"time_embedding {self.time_embedding!r} is unknown{hint}")
        if self.time_features < 2 or self.time_features % 2:
            problems.append(f"time_features={self.time_features} must be even and at least 2")
        if not self.theta > 1:
            problems.append(f"theta={self.theta} must be above 1")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            problems.append(f"image_size={self.image_size} must be (height, width), both at least 1")
        elif levels:
            problems += size_problems(self, self.image_size)
        if problems:
            raise ValueError("LucidrainsConfig: " + "; ".join(problems))


LUCIDRAINS_TIME_EMBEDDINGS = ("sinusoidal", "learned")


@dataclasses.dataclass(frozen=True)
class DiTConfig(_Whole, _NoCondition):
    """The diffusion transformer of Peebles and Xie (arXiv:2212.09748; `jddim.models.dit`): adaLN-zero blocks.

    One wiring, two sources: facebookresearch/DiT, whose names of sizes are in brackets, and diffusers'
    DiTTransformer2DModel, which on the same weights is another function: `frequency_shift` and `mlp_norm_epsilon`.

    image_size: (height, width) of x_t, latents mostly, that the checkpoint was trained at [input_size].
    in_channels: x_t's. out_channels: twice as many with a learned variance.
    patch_size: side of the square that becomes one token. channels: width of a token [hidden_size]; a multiple of 4,
        for sines and cosines of rows and of columns. depth: blocks. num_heads: of each attention. mlp_channels: width
        inside a block's MLP, None: 4 `channels`.
    num_classes: rows of the table of labels, the null label's included; None: the network takes no labels.
    time_features: width of the sinusoid of t, cosines first, whose frequencies are
        10000^(-i / (time_features // 2 - frequency_shift)): shift 0 in facebookresearch's, 1 in diffusers.
    norm_epsilon: of all layer norms but those before the MLPs, whose is mlp_norm_epsilon.
    """

    image_size: tuple[int, int]
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    channels: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_channels: int | None = None
    num_classes: int | None = None
    time_features: int = 256
    frequency_shift: float = 0.0
    norm_epsilon: float = 1e-6
    mlp_norm_epsilon: float = 1e-6

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: x_t's."""
        return self.in_channels

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of it: of a patch."""
        return self.patch_size

    @property
    def class_embedding(self) -> str | None:
        """None if the network takes no labels."""
        return None if self.num_classes is None else "learned"

    @property
    def mlp_width(self) -> int:
        """Channels inside a block's MLP."""
        return 4 * self.channels if self.mlp_channels is None else self.mlp_channels

    @property
    def summary(self) -> str:
        """The network in one line, for people."""
        return (
            f"a transformer: {self.image_size[0]}x{self.image_size[1]}x{self.in_channels} in patches of "
            f"{self.patch_size}x{self.patch_size}, {counted(self.depth, 'block')} of {self.channels} channels and "
            f"{counted(self.num_heads, 'head')}, {_labels(self)}"
        )

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong, and what would be right."""
        problems = number_problems(self)
        problems += [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("in_channels", "out_channels", "patch_size", "num_heads", "mlp_width")
            if getattr(self, name) < 1
        ]
        if not 1 <= self.depth <= MOST_BLOCKS:
            problems.append(f"depth={self.depth} must lie in 1..{MOST_BLOCKS}")
        if self.num_classes is not None and self.num_classes < 1:
            problems.append(f"num_classes={self.num_classes} must be at least 1, or None for a network without labels")
        if self.channels < 4 or self.channels % 4:
            problems.append(
                f"channels={self.channels} must be a multiple of 4 (sines and cosines, of rows and columns)"
            )
        elif self.num_heads >= 1 and self.channels % self.num_heads:
            problems.append(f"channels={self.channels} cannot be split into num_heads={self.num_heads}")
        if self.time_features < 4:
            problems.append(f"time_features={self.time_features} must be at least 4 (sines and cosines, two of each)")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            problems.append(f"image_size={self.image_size} must be (height, width), both at least 1")
        elif self.patch_size >= 1:
            problems += size_problems(self, self.image_size)
        if problems:
            raise ValueError("DiTConfig: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(_Whole, _NoCondition):
    """A classifier of noisy images, for guidance: guided-diffusion's EncoderUNetModel (`jddim.models.classifier`).

    Half of OpenAI's UNet, then logits. The fields are those of `UNetConfig` with the same names, and

    num_classes: that it tells apart. resample: how the step between levels is taken, one kind for all.
    pool: "attention", of the pixels' mean over all pixels, each with a learned position, so that height and width are
        image_size alone; or "adaptive", the pixels' mean.
    """

    image_size: tuple[int, int]
    num_classes: int
    in_channels: int = 3
    channels: int = 128
    channel_mults: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    head_channels: int = 64
    resample: str = "resnet"
    scale_shift: bool = True
    norm_groups: int = 32
    pool: str = "attention"

    @property
    def encoder(self) -> UNetConfig:
        """The UNet whose first half it has."""
        width = round(self.channels * self.channel_mults[0]) if self.channel_mults else None
        return UNetConfig(
            image_size=self.image_size,
            in_channels=self.in_channels,
            channels=self.channels,
            channel_mults=self.channel_mults,
            stem_channels=width,
            num_res_blocks=self.num_res_blocks,
            attention_levels=self.attention_levels,
            head_channels=self.head_channels,
            downsample=(self.resample,),
            symmetric_padding=True,
            scale_shift=self.scale_shift,
            norm_groups=self.norm_groups,
            norm_epsilon=1e-5,
            cosine_first=True,
            frequency_shift=0.0,
            divide_last=True,
        )

    @property
    def positions(self) -> int:
        """Pixels at the lowest resolution."""
        factor = self.size_factor
        return (self.image_size[0] // factor) * (self.image_size[1] // factor)

    @property
    def input_channels(self) -> int:
        """Channels of its input: the image's."""
        return self.in_channels

    @property
    def out_channels(self) -> int:
        """How many logits it returns."""
        return self.num_classes

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of it: each level but the last halves them."""
        return 1 << (len(self.channel_mults) - 1)

    @property
    def class_embedding(self) -> str | None:
        """None: it takes no labels, it tells them."""
        return None

    @property
    def summary(self) -> str:
        """The network in one line, for people."""
        return f"a classifier: {_shape(self)}, {self.pool} pooling, {_labels(self)}"

    def __post_init__(self) -> None:
        """Raise one ValueError that names what is wrong, and what would be right."""
        problems = []
        if not 1 <= self.num_classes <= MOST:
            problems.append(f"num_classes={self.num_classes} must lie in 1..{MOST:,}")
        if self.pool not in POOLS:
            problems.append(f"pool {self.pool!r} is unknown{did_you_mean(self.pool, POOLS)}")
        if self.head_channels < 1:
            problems.append(f"head_channels={self.head_channels} must be at least 1")
        if problems:
            raise ValueError("ClassifierConfig: " + "; ".join(problems))
        assert self.encoder  # which raises for the rest


POOLS = ("attention", "adaptive")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(_Whole, _NoCondition, _NoLabels):
    """A first stage (arXiv:2112.10752): images to latents z and back. `jddim.models.autoencoder`.

    image_size: (height, width) in pixels that it was trained at. in_channels, out_channels: of the images.
    latent_channels: of z. hidden_channels: of what the encoder ends with and the decoder begins with, per mean; None:
        latent_channels.
    channels, channel_mults, num_res_blocks, attention_levels, mid_attention, norm_groups, norm_epsilon: as in
        `UNetConfig`, of encoder and decoder alike; the decoder has one block a level more.
    num_codes: the vectors of a codebook, to the nearest of which z goes before it is decoded (VQ); None: z is drawn
        from a Gaussian, whose mean and log-variance the encoder returns (KL).
    quant_conv, post_quant_conv: whether a 1x1 convolution follows the encoder, and comes before the decoder.
    scaling_factor, shift_factor: the network of latents sees (z - shift_factor) * scaling_factor.
    """

    image_size: tuple[int, int]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    hidden_channels: int | None = None
    channels: int = 128
    channel_mults: tuple[float, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    norm_groups: int = 32
    norm_epsilon: float = 1e-6
    num_codes: int | None = None
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(round(self.channels * mult) for mult in self.channel_mults)

    @property
    def hidden(self) -> int:
        """Channels of the decoder's input."""
        return self.latent_channels if self.hidden_channels is None else self.hidden_channels

    @property
    def moments(self) -> int:
        """How many numbers the encoder returns for each of z: mean and log-variance, or z itself."""
        return 2 if self.num_codes is None else 1

    @property
    def input_channels(self) -> int:
        """Channels of its input: the image's."""
        return self.in_channels

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of it: each level but the last halves them."""
        return 1 << (len(self.channel_mults) - 1)

    @property
    def summary(self) -> str:
        """The network in one line, for people."""
        factor = self.size_factor
        height, width = (side // factor for side in self.image_size)
        kind = "a Gaussian" if self.num_codes is None else f"{self.num_codes:,} codes"
        return (
            f"a first stage: {self.image_size[0]}x{self.image_size[1]}x{self.in_channels} to "
            f"{height}x{width}x{self.latent_channels}, {kind}, ch {self.channels}, "
            f"mult {','.join(f'{mult:g}' for mult in self.channel_mults)}, scaled by {self.scaling_factor:g}"
        )

    def latent_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of z for images of (height, width)."""
        return image_size[0] // self.size_factor, image_size[1] // self.size_factor

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong, and what would be right."""
        check_bounds(self)
        counts = ("in_channels", "out_channels", "latent_channels", "hidden", "channels", "num_res_blocks")
        problems = [
            f"{name.replace('hidden', 'hidden_channels')}={getattr(self, name)} must be at least 1"
            for name in (*counts, "norm_groups")
            if getattr(self, name) < 1
        ]
        levels = len(self.channel_mults)
        if not levels or min(self.channel_mults) <= 0 or min(self.widths) < 1:
            problems.append(f"channel_mults={self.channel_mults} must hold one positive number per level")
        if any(not 0 <= level < levels for level in self.attention_levels):
            problems.append(f"attention_levels={self.attention_levels} must lie in 0..{levels - 1}")
        if self.num_codes is not None and self.num_codes < 1:
            problems.append(f"num_codes={self.num_codes} must be at least 1, or None")
        if not self.quant_conv and self.hidden != self.latent_channels:
            problems.append("hidden_channels must be latent_channels without a quant_conv between them")
        if not self.scaling_factor > 0:
            problems.append(f"scaling_factor={self.scaling_factor} must be above 0")
        if not problems and any(width % self.norm_groups for width in (self.channels, *self.widths)):
            problems.append(f"every width must be a multiple of norm_groups={self.norm_groups}, got {self.widths}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            problems.append(f"image_size={self.image_size} must be (height, width), both at least 1")
        elif levels:
            problems += size_problems(self, self.image_size)
        if problems:
            raise ValueError("AutoencoderConfig: " + "; ".join(problems))


def image_shape(config: ModelConfig, stage: AutoencoderConfig | None) -> tuple[int, int, int]:
    """(height, width, channels) of the images of a network, whose latents a first stage makes images of."""
    height, width = config.image_size
    if stage is None:
        return height, width, config.in_channels
    return height * stage.size_factor, width * stage.size_factor, stage.out_channels


def _shape(config: UNetConfig | ClassifierConfig) -> str:
    """A network's images, widths, blocks and attention, for people."""
    return (
        f"{config.image_size[0]}x{config.image_size[1]}x{config.in_channels}, ch {config.channels}, "
        f"mult {','.join(f'{mult:g}' for mult in config.channel_mults)}, "
        f"{counted(config.num_res_blocks, 'block')} a level, "
        f"attention at {_resolutions(config.image_size, config.attention_levels)}"
    )


def _resolutions(image_size: tuple[int, int], levels: Iterable[int]) -> str:
    """The sizes of levels, for people, who count them from 0 or from 1."""
    height, width = image_size
    return ",".join(f"{height >> level}x{width >> level}" for level in levels) or "no level"


def _labels(config: ModelConfig) -> str:
    """What labels a network takes, for people."""
    if config.num_classes is not None:
        return "1 class" if config.num_classes == 1 else f"{config.num_classes:,} classes"
    return {None: "no classes", "timestep": "labels are numbers"}.get(config.class_embedding, "labels are vectors")


MOST, MOST_LEVELS, MOST_BLOCKS = 1_000_000, 16, 100
"""Of any number in a network's config, of its levels, and of the residual blocks on the way down: far beyond what there
is, and no more than can be laid out in seconds."""


def check_bounds(config: Any) -> None:
    """Raise ValueError for numbers in a UNet's config that would take memory and time without end, and for NaN."""
    problems = number_problems(config)
    if not problems and max(config.widths, default=0) > MOST:
        problems.append(f"channels={config.channels} with channel_mults={config.channel_mults} is beyond {MOST:,}")
    if not problems and len(config.channel_mults) * getattr(config, "num_res_blocks", 1) > MOST_BLOCKS:
        problems.append(
            f"num_res_blocks={config.num_res_blocks} on {len(config.channel_mults)} levels: beyond {MOST_BLOCKS}"
        )
    if problems:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(problems))


def number_problems(config: Any) -> list[str]:
    """What is wrong with the sizes of a config's numbers and lists: [] or a sentence on each."""
    problems = []
    for name, value in vars(config).items():
        of = value if isinstance(value, tuple) else (value,)
        if len(of) > MOST_LEVELS:
            problems.append(f"{name} has {len(of)} entries, more than {MOST_LEVELS} levels")
        elif any(isinstance(each, (int, float)) and not abs(each) <= MOST for each in of):
            problems.append(f"{name}={value} is beyond {MOST:,}")
    return problems


def size_problems(config: ModelConfig, image_size: tuple[int, int], pixels: int = 1) -> list[str]:
    """What is wrong with (height, width) for this network: [] or one sentence that says which sizes divide.

    pixels: how many of them one of the network's is, along a side: of latents more than 1.
    """
    factor = config.size_factor * pixels
    if all(side >= factor and side % factor == 0 for side in image_size):
        return []
    lower = [max(side // factor, 1) * factor for side in image_size]
    upper = [-(-side // factor) * factor for side in image_size]
    return [
        f"image size {image_size[0]}x{image_size[1]} does not divide: height and width must be multiples of {factor} "
        f"(nearest: {' or '.join(dict.fromkeys(f'{side[0]}x{side[1]}' for side in (lower, upper)))})"
    ]


def levels_at_resolutions(image_size: int, num_levels: int, resolutions: Iterable[int]) -> tuple[int, ...]:
    """The levels whose resolution (image_size halved `level` times, rounded down) is in `resolutions`.

    Ho et al. and their ports name attention by resolution; the UNet here names it by level.
    """
    wanted = set(resolutions)
    return tuple(level for level in range(num_levels) if image_size // 2**level in wanted)


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as a dict of JSON types (tuples become lists), without what is `later` and at its default."""
    fields = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field, value in fields
        if not ("later" in field.metadata and value == field.default)
    }


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of `to_json`. Raises ValueError on unknown keys (naming the nearest), missing ones, other types."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [f"unknown key {key!r}{did_you_mean(key, fields)}" for key in data if key not in fields]
    problems += [
        f"missing key {name!r}"
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING
    ]
    if problems:
        raise ValueError(f"{cls.__name__}: " + "; ".join(problems))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if problems := misfits(values, cls):
        raise ValueError(f"{cls.__name__}: " + "; ".join(problems))
    return cls(**values)


def type_problems(config: Any) -> list[str]:
    """What is wrong with the types of a dataclass's values, as sentences that begin with the field's name."""
    return misfits(vars(config), type(config))


def misfits(data: Mapping[str, Any], kind: type, prefix: str = "") -> list[str]:
    """What is wrong with the types of these values for a dataclass's or a TypedDict's fields of these names.

    A sentence each, which begins with `prefix` and the name, dotted where TypedDicts hold each other. Whole numbers fit
    where numbers are asked for, truth values do not. Names that the kind does not know are not looked at.
    """
    problems = []
    for name, wanted in _hints(kind).items():
        if name not in data:
            continue
        value = data[name]
        if typing.is_typeddict(wanted) and isinstance(value, Mapping):
            problems += misfits(value, wanted, f"{prefix}{name}.")
        elif not _fits(value, wanted):
            got = repr(value)
            problems.append(
                f"{prefix}{name} must be {_said(wanted)}, got {got if len(got) <= 60 else got[:57] + '...'}"
            )
    return problems


@functools.cache
def _hints(of: type) -> dict[str, Any]:
    """A class's types, which take Python as long to find as a short call of `DDIM.sample`."""
    return typing.get_type_hints(of)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in kind.__args__)
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(each, of[1]) for each in value.values())
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        of = of[:1] * len(value) if of[-1] is Ellipsis else of
        return len(value) == len(of) and all(map(_fits, value, of))
    if kind in (int, float):  # NumPy's too
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return kind is Any or (not typing.is_typeddict(kind) and isinstance(value, kind))


def _said(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_said(each) for each in kind.__args__)
    if typing.is_typeddict(kind) or typing.get_origin(kind) is dict:
        return "an object"
    return "None" if kind is types.NoneType else kind.__name__ if type(kind) is type else str(kind)


def counted(number: int, noun: str) -> str:
    """`1 image`, `3 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_few(words: Sequence[str], most: int) -> str:
    """The first `most` of a list, and how many more there are, for a message of one line."""
    more = f"; and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more


def printable(line: str) -> str:
    """A line that quotes a file, without the control characters that would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something allowed is near; what is allowed where nothing is, or where it is short."""
    allowed = sorted(allowed)
    hints = [f"did you mean {near!r}?" for near in difflib.get_close_matches(word, allowed, n=1)]
    if not hints or len(allowed) <= 6:
        hints.append(f"allowed: {', '.join(allowed)}")
    return f" ({' '.join(hints)})"
