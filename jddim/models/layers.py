"""The layers of the UNet. Images are NHWC; wherever torch and flax differ by default, the choice is spelled out.

`dtype` is the compute dtype. Parameters keep theirs (float32), and group norms and the softmax compute in float32
even when `dtype` is bfloat16 or float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def timestep_embedding(
    t: Array,
    dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    cosine_first: bool = False,
    shift: float = 1.0,
    divide_last: bool = False,
    theta: float = 10000,
) -> Array:
    """Sinusoidal embedding: t `(b,)` int or float -> `(b, dim)`, sines then cosines, or the other way round.

    The frequencies are theta^(-i / (dim // 2 - shift)): shift 1 in Ho et al., 0 in OpenAI's and diffusers' default.
    Their exponents are rounded to `dtype` before exp, as torch does, and in the source's order (`divide_last`): at
    t = 1000 one unit in their last place already moves the sine by 6e-5. An odd `dim` ends in a zero. dim >= 4.
    """
    half = dim // 2
    i = np.arange(half, dtype=dtype)
    log, divisor = np.asarray(-math.log(theta), dtype), np.asarray(half - shift, dtype)
    exponents = i * log / divisor if divide_last else i * np.asarray(-math.log(theta) / (half - shift), dtype)
    frequencies = np.exp(exponents.astype(np.float64)).astype(dtype)
    angles = t.astype(dtype)[:, None] * frequencies[None]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(waves[::-1] if cosine_first else waves, axis=1), ((0, 0), (0, dim % 2)))


def per_sample(value: ArrayLike, x_t: Array) -> Array:
    """t, or labels, one a sample: `(b,)` of a scalar, for x_t `(b, ...)`; what is an array of more stays as it is."""
    value = jnp.asarray(value)
    return jnp.broadcast_to(value, x_t.shape[:1]) if value.ndim == 0 else value


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The dtype of norms and softmaxes: float32, or float64 when computing in float64."""
    return jnp.promote_types(dtype, jnp.float32)


Model = TypeVar("Model")


def cast_kernels(model: Model) -> Model:
    """`model` with its convolutions and products holding their parameters in their compute dtype, to the same result.

    Each casts them at every call; a sampling loop calls it once, before the scan. The model given is not changed. One
    that is no `nnx.Module`, a user's own, comes back as it is.
    """
    if not isinstance(model, nnx.Module):
        return model
    model = nnx.clone(model)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            for parameter in (layer.kernel, layer.bias):
                if parameter is not None:
                    parameter.set_value(parameter[...].astype(layer.dtype))
    return model


def conv(
    channels_in: int,
    channels_out: int,
    size: int,
    *,
    strides: int = 1,
    padding: tuple[int, int] | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution, kernel (size, size, in, out); padding: before, after; None: torch's `size // 2` on each side."""
    initial = _within((size * size * channels_in) ** -0.5)
    return nnx.Conv(
        channels_in,
        channels_out,
        (size, size),
        strides=strides,
        padding=((size // 2, size // 2) if padding is None else padding,) * 2,
        kernel_init=initial,
        bias_init=initial,
        dtype=dtype,
        rngs=rngs,
    )


def linear(
    channels_in: int, channels_out: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A product with a matrix, kernel (in, out), of the last axis."""
    initial = _within(channels_in**-0.5)
    return nnx.Linear(
        channels_in,
        channels_out,
        use_bias=use_bias,
        kernel_init=initial,
        bias_init=initial,
        dtype=dtype,
        rngs=rngs,
    )


def _within(bound: float) -> Callable[..., Array]:
    """PyTorch's initial kernels and biases: uniform, within fan_in^-1/2. Flax's kernels are 1.7 times as large."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def group_norm(channels: int, groups: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm with an explicit epsilon, and torch's two-pass variance unless `dtype` is a half-precision one.

    flax's default E[x^2] - E[x]^2 reads x once, not twice. In float32 it is worse than torch's; of values that come
    in 8 or 11 bits of mantissa it loses less than they have lost.
    """
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=epsilon,
        use_fast_variance=jnp.finfo(dtype).bits < 32,
        dtype=at_least_float32(dtype),
        rngs=rngs,
    )


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # torch's default; jax's is the tanh approximation
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
}


class FourierFeatures(nnx.Module):
    """Sines, then cosines, of 2 pi log t times fixed frequencies drawn at training: t `(b,)` -> `(b, 2 channels)`.

    diffusers' GaussianFourierProjection, score_sde's. t = 0 has no logarithm: NaN, as in the source. logarithm: False:
    of t itself (NVlabs/edm, which multiplies the frequencies by 2 pi first).
    """

    def __init__(self, channels: int, *, logarithm: bool = True, rngs: nnx.Rngs):
        self.logarithm = logarithm
        self.kernel = nnx.Param(16 * jax.random.normal(rngs.params(), (channels,), jnp.float32))

    def __call__(self, t: Array, dtype: DTypeLike = jnp.float32) -> Array:
        frequencies, turn = self.kernel[...].astype(dtype), np.asarray(2 * math.pi, dtype)
        if self.logarithm:
            angles = jnp.log(t.astype(dtype))[:, None] * frequencies[None] * turn
        else:
            angles = t.astype(dtype)[:, None] * (turn * frequencies)[None]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class TimeMLP(nnx.Module):
    """Linear, silu, linear: `(b, in)` -> `(b, out)`."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = linear(channels_in, channels_out, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(channels_out, channels_out, dtype=dtype, rngs=rngs)

    def __call__(self, embedding: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(embedding)))


class ResBlock(nnx.Module):
    """norm, act, conv, time, norm, act, conv, + shortcut: `(b, h, w, in)`, `(b, time)` -> `(b, h', w', out)`.

    Time is added before the second norm, or scales and shifts its output; time_channels None: no time comes in.
    resample: "down" halves and "up" doubles both branches after the first activation (h', w'); None keeps the size.
    taps: of the filter by which it does. resample_shortcut: the shortcut then has a convolution.
    scale: what the sum is divided by.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        time_channels: int | None,
        groups: int,
        epsilon: float,
        conv_shortcut: bool = False,
        scale_shift: bool = False,
        activation: str = "silu",
        resample: str | None = None,
        taps: tuple[float, ...] = (),
        resample_shortcut: bool = False,
        scale: float = 1.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.scale_shift = scale_shift
        self.activation = activation
        self.resample = resample
        self.taps = taps
        self.scale = scale
        self.norm1 = group_norm(channels_in, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = conv(channels_in, channels_out, 3, dtype=dtype, rngs=rngs)
        self.time_proj = (
            None
            if time_channels is None
            else linear(time_channels, (1 + scale_shift) * channels_out, dtype=dtype, rngs=rngs)
        )
        self.norm2 = group_norm(channels_out, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels_out, channels_out, 3, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None
            if channels_in == channels_out and not (resample and resample_shortcut)
            else conv(channels_in, channels_out, 3 if conv_shortcut else 1, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        act = ACTIVATIONS[self.activation]
        h = act(self.norm1(x))
        if self.resample is not None:
            resize = halved if self.resample == "down" else doubled
            h, x = resize(h, self.taps), resize(x, self.taps)
        h = self.conv1(h)
        assert (self.time_proj is None) == (time is None)
        if self.time_proj is None or time is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = jnp.split(self.time_proj(act(time))[:, None, None, :], 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.time_proj(act(time))[:, None, None, :])
        h = self.conv2(act(h))
        return _divided(h + (x if self.shortcut is None else self.shortcut(x)), self.scale)


class Attention(nnx.Module):
    """Self-attention over the pixels, with a residual: `(b, h, w, c)` -> the same. Scale (c / heads)^-1/2.

    groups 0: without a norm. scale: what the sum with the residual is divided by.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        epsilon: float,
        heads: int = 1,
        scale: float = 1.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.heads = heads
        self.scale = scale
        self.norm = group_norm(channels, groups, epsilon, dtype=dtype, rngs=rngs) if groups else None
        self.q = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.out = linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        pixels = (x if self.norm is None else self.norm(x)).reshape(b, h * w, c)
        q, k, v = (
            project(pixels).reshape(b, h * w, self.heads, c // self.heads) for project in (self.q, self.k, self.v)
        )
        mixed = self.out(attend(q, k, v).reshape(b, h * w, c))
        return _divided(x + mixed.reshape(b, h, w, c), self.scale)


def attend(q: Array, k: Array, v: Array) -> Array:
    """v, weighted by the softmax of q k over the keys; scale width^-1/2.

    q: `(b, n, heads, width)`; k, v: `(b, m, heads, width)`, of q's dtype. Returns q's shape and dtype. The softmax is
    float32's or, for float64, float64's; `jax.nn.dot_product_attention` has float32's there too.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=at_least_float32(q.dtype)) * q.shape[3] ** -0.5
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Divided by their sum after the second product, which has fewer values.
    mixed = jnp.einsum("bnqk,bnkd->bnqd", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)


class Downsample(nnx.Module):
    """Halve height and width: `(b, h, w, c)` -> `(b, h/2, w/2, c)`. The time embedding is not used."""

    def __init__(self, channels: int, *, with_conv: bool, symmetric: bool = False, dtype: DTypeLike, rngs: nnx.Rngs):
        # Not symmetric: zeros below and to the right only, TensorFlow's SAME at stride 2, which Ho et al. had.
        side = (1, 1) if symmetric else (0, 1)
        self.conv = conv(channels, channels, 3, strides=2, padding=side, dtype=dtype, rngs=rngs) if with_conv else None

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        return average_pool(x) if self.conv is None else self.conv(x)


class Upsample(nnx.Module):
    """Double height and width by nearest neighbour: `(b, h, w, c)` -> `(b, 2h, 2w, c)`, then a 3x3 conv if asked.

    The time embedding is not used.
    """

    def __init__(self, channels: int, *, with_conv: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs) if with_conv else None

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        x = nearest(x)
        return x if self.conv is None else self.conv(x)


def average_pool(x: Array) -> Array:
    """The mean of each 2x2 square: `(b, h, w, c)` -> `(b, h/2, w/2, c)`."""
    pooled: Array = nnx.avg_pool(x, (2, 2), strides=(2, 2))
    return pooled


def nearest(x: Array) -> Array:
    """Each pixel as a 2x2 square: `(b, h, w, c)` -> `(b, 2h, 2w, c)`."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def halved(x: Array, taps: tuple[float, ...] = (), padding: int | None = None) -> Array:
    """Every second pixel of x filtered by the taps in each direction: `(b, h, w, c)` -> `(b, h/2, w/2, c)`.

    taps: divided by their sum; none: the mean of each 2x2 square. padding: on each side; None: keeps h and w even.
    """
    if not taps:
        return average_pool(x)
    side = (len(taps) - 1) // 2 if padding is None else padding
    return _filtered(x, taps, side, stride=2)


def doubled(x: Array, taps: tuple[float, ...] = ()) -> Array:
    """Zeros between the pixels, filtered by twice the taps in each direction: `(b, h, w, c)` -> `(b, 2h, 2w, c)`.

    taps: divided by their sum; none: each pixel as a 2x2 square.
    """
    if not taps:
        return nearest(x)
    return 4 * _filtered(x, taps[::-1], len(taps) // 2, between=2)


def _filtered(x: Array, taps: tuple[float, ...], side: int, *, stride: int = 1, between: int = 1) -> Array:
    c = x.shape[3]
    kernel = jnp.asarray(np.outer(taps, taps) / sum(taps) ** 2, x.dtype)[:, :, None, None]
    filtered: Array = jax.lax.conv_general_dilated(
        x,
        jnp.broadcast_to(kernel, (*kernel.shape[:2], 1, c)),
        window_strides=(stride, stride),
        padding=((side, side), (side, side)),
        lhs_dilation=(between, between),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=c,
    )
    return filtered


def _divided(x: Array, scale: float) -> Array:
    return x if scale == 1 else x / scale
