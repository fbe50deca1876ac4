"""The layers of the UNet. Images are NHWC; wherever torch and flax differ by default, the choice is spelled out.

`dtype` is the compute dtype. Parameters keep theirs (float32), and group norms and the softmax compute in float32
even when `dtype` is bfloat16 or float16.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


def timestep_embedding(t: Array, dim: int, dtype: DTypeLike = jnp.float32) -> Array:
    """Sinusoidal embedding of Ho et al.: t `(b,)` int or float -> `(b, dim)`, sines then cosines.

    The frequencies are 10000^(-i / (dim // 2 - 1)); OpenAI and diffusers' default divide by dim // 2 instead. Their
    exponents are rounded to `dtype` before exp, as torch does: at t = 1000 one unit in their last place already
    moves the sine by 6e-5. An odd `dim` ends in a zero. dim >= 4.
    """
    half = dim // 2
    exponents = np.arange(half, dtype=dtype) * np.asarray(-math.log(10000) / (half - 1), dtype)
    frequencies = np.exp(exponents.astype(np.float64)).astype(dtype)
    angles = t.astype(dtype)[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1), ((0, 0), (0, dim % 2)))


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The dtype of norms and softmaxes: float32, or float64 when computing in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def conv(channels_in: int, channels_out: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """A stride-1 convolution with torch's `padding=size // 2` on every side; kernel (size, size, in, out)."""
    return nnx.Conv(
        channels_in, channels_out, (size, size), padding=((size // 2, size // 2),) * 2, dtype=dtype, rngs=rngs
    )


def group_norm(channels: int, groups: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm with torch's two-pass variance (flax defaults to E[x^2] - E[x]^2) and an explicit epsilon."""
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=at_least_float32(dtype),
        rngs=rngs,
    )


class ResBlock(nnx.Module):
    """norm, swish, conv, + time, norm, swish, conv, + shortcut: `(b, h, w, in)`, `(b, 4 ch)` -> `(b, h, w, out)`."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        time_channels: int,
        groups: int,
        epsilon: float,
        conv_shortcut: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.norm1 = group_norm(channels_in, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = conv(channels_in, channels_out, 3, dtype=dtype, rngs=rngs)
        self.time_proj = nnx.Linear(time_channels, channels_out, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(channels_out, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels_out, channels_out, 3, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None
            if channels_in == channels_out
            else conv(channels_in, channels_out, 3 if conv_shortcut else 1, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: Array, time: Array) -> Array:
        h = self.conv1(jax.nn.swish(self.norm1(x)))
        h = h + self.time_proj(jax.nn.swish(time))[:, None, None, :]
        h = self.conv2(jax.nn.swish(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Single-head self-attention over the pixels, with a residual: `(b, h, w, c)` -> the same. Scale c^-1/2."""

    def __init__(self, channels: int, *, groups: int, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.norm = group_norm(channels, groups, epsilon, dtype=dtype, rngs=rngs)
        self.q = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        pixels = self.norm(x).reshape(b, h * w, c)
        q, k, v = self.q(pixels), self.k(pixels), self.v(pixels)
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=at_least_float32(self.dtype)) * c**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return x + self.out(jnp.einsum("bqk,bkc->bqc", weights, v)).reshape(b, h, w, c)


class Downsample(nnx.Module):
    """Halve height and width: `(b, h, w, c)` -> `(b, h/2, w/2, c)`."""

    def __init__(self, channels: int, *, with_conv: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        # One row and column of zeros below and to the right only: TensorFlow's SAME at stride 2, which Ho et al. had.
        self.conv = (
            nnx.Conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)
            if with_conv
            else None
        )

    def __call__(self, x: Array) -> Array:
        return nnx.avg_pool(x, (2, 2), strides=(2, 2)) if self.conv is None else self.conv(x)


class Upsample(nnx.Module):
    """Double height and width by nearest neighbour: `(b, h, w, c)` -> `(b, 2h, 2w, c)`, then a 3x3 conv if asked."""

    def __init__(self, channels: int, *, with_conv: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs) if with_conv else None

    def __call__(self, x: Array) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return x if self.conv is None else self.conv(x)
