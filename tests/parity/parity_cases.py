"""What the parity tests compare: the same networks, noise and sampler settings on both sides. NHWC at every boundary.

Imported by the float32 tests in pytest's own process and by `float64_checks.py` in a process with JAX_ENABLE_X64=1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.engine import fill
from convert.families.ho import reference, rules
from jddim.config import UNetConfig
from jddim.ddim import StepTable, step_table
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.models.unet import UNet
from jddim.sampling import Trajectory, ancestral_loop, sample_loop
from jddim.schedule import NoiseSchedule, cosine_schedule, linear_schedule
from jddim.timesteps import linspace_timesteps

torch = pytest.importorskip("torch", reason="parity is with PyTorch; the golden test compares without it")

from convert.reference import ddim as torch_ddim  # noqa: E402 - they import torch
from convert.reference.unet import redraw_  # noqa: E402

# -- arrays between the two sides -------------------------------------------------------------------------------------


def to_torch(x: np.ndarray) -> Any:
    """An image or noise array `(..., h, w, c)` as a tensor `(..., c, h, w)`."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3)))


def to_numpy(x: Any) -> np.ndarray:
    """A tensor `(..., c, h, w)` as an array `(..., h, w, c)`."""
    return np.moveaxis(x.detach().numpy(), -3, -1)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute error over the largest expected magnitude; infinite if anything is not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = float(np.abs(actual - expected).max() / np.abs(expected).max())
    return error if np.isfinite(error) else float("inf")


# -- the UNets --------------------------------------------------------------------------------------------------------


class UNetCase(NamedTuple):
    config: UNetConfig
    size: tuple[int, int]  # (height, width) of the input, not always the config's
    t: tuple[float, ...]  # one per sample; floats are given to both sides as floats


def _case(size: tuple[int, int], t: tuple[float, ...] = (0, 499, 999), **fields: Any) -> UNetCase:
    return UNetCase(UNetConfig(**({"image_size": size, "norm_groups": 5, "channels": 5} | fields)), size, t)


# Prime widths (norm_groups = channels = a prime), heights and widths a prime times 2^(levels - 1), batches of 2 or 3.
# Every field takes every kind of value at least twice; `test_every_option_is_covered_twice` counts.
UNET_CASES: dict[str, UNetCase] = {
    "one level, prime sides": _case((7, 11), channel_mults=(1,), num_res_blocks=3, attention_levels=()),
    "one level, wider": _case(
        (13, 3),
        (0, 0.5, 998.25),
        channel_mults=(2,),
        num_res_blocks=3,
        attention_levels=(0,),
        in_channels=2,
        out_channels=5,
    ),
    "two levels, pooled": _case(
        (10, 6),
        (999, 731),
        channel_mults=(2, 1),
        num_res_blocks=2,
        attention_levels=(1,),
        downsample=("pool",),
        upsample=("pool",),
        in_channels=1,
        out_channels=1,
    ),
    "two levels, 3x3 shortcuts, odd width": _case(
        (6, 14),
        channels=15,
        norm_groups=3,
        channel_mults=(1, 3),
        num_res_blocks=2,
        attention_levels=(0, 1),
        conv_shortcut=True,
        norm_epsilon=1e-5,
    ),
    "three levels, all attention": _case(
        (12, 20),
        (0.25, 999),
        channels=7,
        norm_groups=7,
        channel_mults=(1, 2, 3),
        num_res_blocks=1,
        attention_levels=(0, 1, 2),
        in_channels=5,
        out_channels=2,
    ),
    "three levels, pooled, 3x3 shortcuts": _case(
        (20, 12),
        channels=11,
        norm_groups=11,
        channel_mults=(1, 1, 2),
        num_res_blocks=1,
        attention_levels=(),
        downsample=("pool",),
        upsample=("pool",),
        conv_shortcut=True,
        norm_epsilon=1e-3,
    ),
    "four levels": _case(
        (16, 24),
        (1, 500),
        channels=8,
        norm_groups=4,
        channel_mults=(1, 2, 2, 4),
        num_res_blocks=1,
        attention_levels=(1, 3),
        norm_epsilon=1e-5,
    ),
    "four levels, not the config's size": _case(
        (24, 40),
        (999, 0),
        image_size=(16, 16),
        channels=4,
        norm_groups=1,
        channel_mults=(1, 2, 1, 3),
        num_res_blocks=1,
        attention_levels=(0, 2),
        in_channels=1,
        out_channels=1,
        norm_epsilon=1e-3,
    ),
}
SAMPLER_CONFIG = UNetConfig(
    (6, 10), 3, 3, channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_levels=(1,), norm_groups=1
)


def reference_unet(config: UNetConfig, seed: int) -> Any:
    """The PyTorch UNet with every parameter redrawn, float32.

    conv_in is then scaled by 1/50. With all layers at order 1 no norm sees a small variance, and an epsilon of 1e-5
    for 1e-6 would hide in the rounding (5e-6 of a norm's output); at variance 4e-4 it shows. The mutation test holds
    us to it.
    """
    model = reference(config).eval().requires_grad_(False)
    redraw_(model, seed)
    for parameter in model.conv_in.parameters():
        parameter.mul_(0.02)
    return model


def flax_params(config: UNetConfig, model: Any) -> dict[str, np.ndarray]:
    """What the converter makes of a float32 reference's state dict."""
    source = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return fill(source, {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}, rules(config))


def both(config: UNetConfig, model: Any, dtype: Any) -> tuple[Any, UNet]:
    """A float32 reference and the jddim UNet with the same weights, both computing in dtype."""
    params = {name: value.astype(dtype) for name, value in flax_params(config, model).items()}
    return model.to(torch.float64 if dtype == np.float64 else torch.float32), build_model(config, params, dtype)


def unet_inputs(case: UNetCase, seed: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """x_t `(b, h, w, c)` in dtype, the float32 numbers in either, and t `(b,)`, int32 unless any is fractional."""
    x = np.random.default_rng(seed).standard_normal((len(case.t), *case.size, case.config.in_channels), np.float32)
    fractional = any(t != int(t) for t in case.t)
    return x.astype(dtype), np.array(case.t, dtype if fractional else np.int32)


apply = jax.jit(lambda model, x_t, t: model(x_t, t))


def unet_error(name: str, dtype: Any, seed: int = 3) -> float:
    """Largest error of jddim's output over the reference's largest output, for a case of `UNET_CASES`."""
    case = UNET_CASES[name]
    model, unet = both(case.config, reference_unet(case.config, seed), dtype)
    x_t, t = unet_inputs(case, seed, dtype)
    return relative_error(apply(unet, x_t, t), to_numpy(model(to_torch(x_t), torch.tensor(t))))


# -- the sampler ------------------------------------------------------------------------------------------------------

CLIPS: dict[str, tuple[float, float] | None] = {"clip": (-1.0, 1.0), "no clip": None}
ETAS = (0.0, 0.3, 1.0)


class SamplerCase(NamedTuple):
    T: int
    S: int
    eta: float
    clip: str  # a key of CLIPS
    rederive_eps: bool
    schedule: str = "linear"

    @property
    def id(self) -> str:
        parts = [f"T {self.T}", f"S {self.S}", f"eta {self.eta:g}", self.clip]
        return ", ".join(parts + ["rederive"] * self.rederive_eps + ([self.schedule] * (self.schedule != "linear")))


def _ids(cases: Iterable[SamplerCase]) -> dict[str, SamplerCase]:
    return {case.id: case for case in cases}


def _grid(Ts: Iterable[int], Ss: Iterable[int], *modes: tuple[str, bool]) -> Iterator[SamplerCase]:
    return (SamplerCase(T, min(S, T), eta, *mode) for T in Ts for S in Ss for eta in ETAS for mode in modes)


# min(S, T) makes the 1000 of these lists "all T steps". Re-deriving without clipping changes nothing but rounding.
SAMPLER_CASES = _ids(
    [
        *_grid((1000, 300), (1, 7, 30, 1000), ("clip", False), ("clip", True), ("no clip", False)),
        *_grid((1000, 300), (7,), ("no clip", True)),
    ]
)
UNET_SAMPLER_CASES = _ids(
    [
        *_grid((1000, 300), (1,), ("no clip", False)),
        *_grid((1000, 300), (7,), ("clip", True)),
        *_grid((1000, 300), (30,), ("clip", False), ("no clip", False)),
        SamplerCase(300, 300, 1.0, "clip", False),
    ]
)
# T is data, which the sampler's cases vary in float64: of the network's, those of one T are enough there.
FLOAT64_NETWORK_CASES = {name: case for name, case in UNET_SAMPLER_CASES.items() if case.T == 300 and case.S < 300}
# alpha_bar begins at 2.4e-9 here, so float32 knows the first x0_hat only to 20 000 roundings, on either side.
COSINE_CASES = _ids(SamplerCase(1000, S, eta, clip, False, "cosine") for S in (3, 30) for eta in ETAS for clip in CLIPS)


class AncestralCase(NamedTuple):
    T: int
    S: int
    variance: str
    clip: str

    @property
    def id(self) -> str:
        return f"T {self.T}, S {self.S}, {self.variance}, {self.clip}"


ANCESTRAL_CASES: dict[str, AncestralCase] = {
    case.id: case
    for case in (
        AncestralCase(T, S, variance, clip)
        for T in (1000, 300)
        for S in (1, 7, T)
        for variance in ("fixed_small", "fixed_large")
        for clip in CLIPS
    )
}


def schedule_of(name: str, T: int) -> NoiseSchedule:
    return {"linear": linear_schedule, "cosine": cosine_schedule}[name](T)


def stand_in(xp: Any, x: Any, t: Any, flipped: Any, other_channel: Any) -> Any:
    """A network's stand-in: non-linear, depends on t, mixes pixels and channels; xp is jax.numpy or torch.

    It increases in x, as a noise predictor does, and by at most 0.95 (in the largest norm). A steeper one is chaotic:
    where x0 is clipped, x_s is sqrt(1 - alpha_bar_s) eps(x_t) plus a constant, so 1000 steps through a slope of 1.2
    part two float64 runs of the same code altogether, and nothing could be learnt from comparing them.
    """
    return 0.7 * xp.tanh(x) + 0.15 * xp.sin(flipped + 0.01 * t) + 0.1 * other_channel


def jax_denoise(x: jax.Array, t: jax.Array) -> jax.Array:
    t = t.astype(x.dtype)[:, None, None, None]
    return stand_in(jnp, x, t, x[:, :, ::-1], jnp.roll(x, 1, axis=3))


def torch_denoise(x: Any, t: Any) -> Any:
    t = t.to(x.dtype)[:, None, None, None]
    return stand_in(torch, x, t, x.flip(3), x.roll(1, 1))


def sampler_inputs(S: int, shape: tuple[int, ...], dtype: Any, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """x_T `shape` and noise `(S, *shape)`, standard normal, the float32 numbers in either dtype."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(s, np.float32).astype(dtype) for s in (shape, (S, *shape)))  # type: ignore[return-value]


@partial(jax.jit, static_argnames=("denoise", "clip", "rederive_eps"))
def _sample(
    denoise: Callable[[Any], Callable[..., jax.Array]],
    model: Any,
    x_T: jax.Array,
    table: StepTable,
    eta: jax.Array,
    noise: jax.Array,
    *,
    clip: str,
    rederive_eps: bool,
) -> Trajectory:
    _, trajectory = sample_loop(
        denoise(model),
        x_T,
        table,
        eta=eta,
        noise=noise,
        clip_range=CLIPS[clip],
        rederive_eps=rederive_eps,
        trajectory_every=1,
    )
    return trajectory


@partial(jax.jit, static_argnames=("variance", "clip"))
def _ancestral(x_T: jax.Array, table: StepTable, noise: jax.Array, *, variance: str, clip: str) -> Trajectory:
    _, trajectory = ancestral_loop(
        jax_denoise, x_T, table, noise=noise, variance=variance, clip_range=CLIPS[clip], trajectory_every=1
    )
    return trajectory


def _the_stand_in(model: None) -> Callable[..., jax.Array]:
    return jax_denoise


def _the_network(model: UNet) -> Callable[..., jax.Array]:
    return model


def trajectory_error(trajectory: Trajectory, expected: tuple[list[Any], list[Any]], *, x0_too: bool = True) -> float:
    """Largest error of any step's x_t or x0_hat over the largest magnitude of the reference's trajectory of both.

    expected: the reference sampler's two lists of NCHW tensors. Infinite if anything is not finite.
    """
    x_t, x0_hat = (np.stack([to_numpy(x) for x in part]) for part in expected)
    errors = [np.abs(np.asarray(trajectory.x_t) - x_t).max()]
    if x0_too:
        errors.append(np.abs(np.asarray(trajectory.x0_hat) - x0_hat).max())
    error = float(np.max(errors) / max(np.abs(x_t).max(), np.abs(x0_hat).max()))
    return error if np.isfinite(error) else float("inf")


def sampler_error(
    case: SamplerCase,
    dtype: Any,
    unet: tuple[Any, UNet] | None = None,
    shape: tuple[int, ...] = (2, 3, 5, 3),
    *,
    x0_too: bool = True,
) -> float:
    """jddim's scan against the reference loop, through the stand-in or a pair (reference, jddim UNet)."""
    schedule = schedule_of(case.schedule, case.T)
    x_T, noise = sampler_inputs(case.S, shape, dtype)
    expected = torch_ddim.ddim_sample(
        torch_denoise if unet is None else unet[0],
        to_torch(x_T),
        schedule.alphas_cumprod,
        torch_ddim.linspace_timesteps(case.T, case.S),
        eta=case.eta,
        noise=to_torch(noise),
        clip=CLIPS[case.clip],
        rederive_eps=case.rederive_eps,
    )
    trajectory = _sample(
        _the_stand_in if unet is None else _the_network,
        None if unet is None else unet[1],
        jnp.asarray(x_T),
        step_table(schedule, linspace_timesteps(case.T, case.S), dtype),
        jnp.asarray(case.eta, dtype),
        jnp.asarray(noise),
        clip=case.clip,
        rederive_eps=case.rederive_eps,
    )
    assert trajectory.x_t.dtype == dtype
    assert trajectory.x_t.shape == noise.shape  # every step is compared
    return trajectory_error(trajectory, expected, x0_too=x0_too)


def ancestral_error(case: AncestralCase, dtype: Any, shape: tuple[int, ...] = (2, 3, 5, 3)) -> float:
    """jddim's ancestral sampler against the reference's, through the stand-in."""
    schedule = linear_schedule(case.T)
    x_T, noise = sampler_inputs(case.S, shape, dtype)
    timesteps = linspace_timesteps(case.T, case.S)
    expected = torch_ddim.ddpm_sample(
        torch_denoise,
        to_torch(x_T),
        schedule.alphas_cumprod,
        timesteps.tolist(),
        variance=case.variance,
        noise=to_torch(noise),
        clip=CLIPS[case.clip],
    )
    table = step_table(schedule, timesteps, dtype)
    trajectory = _ancestral(jnp.asarray(x_T), table, jnp.asarray(noise), variance=case.variance, clip=case.clip)
    return trajectory_error(trajectory, expected)


def eta_one_is_ancestral_error(T: int, dtype: Any) -> float:
    """eta = 1 with all T steps against fixed-small ancestral sampling, both jddim's, same noise, no clipping."""
    x_T, noise = (jnp.asarray(a) for a in sampler_inputs(T, (2, 3, 5, 3), dtype))
    table = step_table(linear_schedule(T), linspace_timesteps(T, T), dtype)
    assert table.num_steps == T
    ddim = _sample(_the_stand_in, None, x_T, table, jnp.asarray(1.0, dtype), noise, clip="no clip", rederive_eps=False)
    ddpm = _ancestral(x_T, table, noise, variance="fixed_small", clip="no clip")
    return max(relative_error(ddim.x_t, ddpm.x_t), relative_error(ddim.x0_hat, ddpm.x0_hat))


@cache
def sampler_unet_pair(dtype: Any) -> tuple[Any, UNet]:
    """The network of the sampler tests: redrawn, then made a map of slope below 1, like `stand_in` and for its reason.

    A group norm divides by the size of what comes in, so an untrained network's slope grows as 1 / |x|, and 30 steps
    of that would multiply rounding by thousands. Biases of conv_in that outweigh x, with one group, bound the divisor:
    the Jacobian's largest singular value is 0.3 both at |x| = 1 and 0.2 (without, 3 and 17), its output 0.3.
    """
    model = reference_unet(SAMPLER_CONFIG, seed=17)
    model.conv_in.bias.mul_(20)
    for parameter in model.conv_out.parameters():
        parameter.mul_(0.5)
    return both(SAMPLER_CONFIG, model, dtype)


def unet_sampler_error(case: SamplerCase, dtype: Any) -> float:
    """jddim's scan against the reference loop, through a redrawn network."""
    return sampler_error(case, dtype, sampler_unet_pair(dtype), (2, *SAMPLER_CONFIG.image_size, 3))
