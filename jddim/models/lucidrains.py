"""The UNet of lucidrains' denoising-diffusion-pytorch 2.x: another wiring than Ho et al.'s.

Norms come after the convolutions and are RMS norms over the channels of each pixel; every level ends in an attention,
linear or full, with learned memory keys and values; both of a level's skips are of its own resolution, and the stem's
output is concatenated once more at the end. NHWC, like everything here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import LucidrainsConfig, size_problems
from jddim.models.layers import at_least_float32, attend, conv, linear, nearest, per_sample, timestep_embedding


class RMSNorm(nnx.Module):
    """Each pixel's channels divided by their root mean square, times g: `(b, h, w, c)` -> the same.

    x / max(|x|, 1e-12) sqrt(c) g, with the Euclidean norm of the c channels. Computed in float32 at least.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike):
        self.dtype = dtype
        self.g = nnx.Param(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Array) -> Array:
        x = x.astype(at_least_float32(self.dtype))
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        # The floor is inside the root, where its square is the same number and the root's slope stays finite at x = 0.
        unit = x / jnp.sqrt(jnp.maximum(square, 1e-24))
        g = self.g[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (unit * g * np.asarray(x.shape[-1] ** 0.5, x.dtype)).astype(self.dtype)


class LearnedFeatures(nnx.Module):
    """t itself, then sines and cosines of 2 pi t times learned or random frequencies: `(b,)` -> `(b, features + 1)`."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.weights = nnx.Param(jax.random.normal(rngs.params(), (features // 2,), jnp.float32))

    def __call__(self, t: Array, dtype: DTypeLike) -> Array:
        t = t.astype(dtype)[:, None]
        angles = t * self.weights[...].astype(dtype)[None] * 2 * np.asarray(math.pi, dtype)
        return jnp.concatenate([t, jnp.sin(angles), jnp.cos(angles)], axis=1)


class TimeMLP(nnx.Module):
    """Linear, exact (erf) gelu, linear: `(b, in)` -> `(b, out)`."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = linear(channels_in, channels_out, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(channels_out, channels_out, dtype=dtype, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(features), approximate=False))


class Block(nnx.Module):
    """conv, norm, scale and shift by time, silu; conv, norm, silu; + shortcut: `(b, h, w, in)` -> `(b, h, w, out)`."""

    def __init__(self, channels_in: int, channels_out: int, *, time_channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = conv(channels_in, channels_out, 3, dtype=dtype, rngs=rngs)
        self.norm1 = RMSNorm(channels_out, dtype=dtype)
        self.time_proj = linear(time_channels, 2 * channels_out, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels_out, channels_out, 3, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(channels_out, dtype=dtype)
        self.shortcut = (
            None if channels_in == channels_out else linear(channels_in, channels_out, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: Array, time: Array) -> Array:
        scale, shift = jnp.split(self.time_proj(jax.nn.silu(time))[:, None, None, :], 2, axis=-1)
        h = jax.nn.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        h = jax.nn.silu(self.norm2(self.conv2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Self-attention over the pixels and `memory` learned keys and values, which come first: `(b, h, w, c)` -> same.

    Without the residual, which is the network's. Scale head_channels^-1/2. mem_kv: `(2, heads, memory, head_channels)`,
    keys then values.
    """

    def __init__(self, channels: int, *, heads: int, head_channels: int, memory: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype, self.heads = dtype, heads
        self.norm = RMSNorm(channels, dtype=dtype)
        self.mem_kv = _memory((2, heads, memory, head_channels), rngs)
        self.qkv = linear(channels, 3 * heads * head_channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = linear(heads * head_channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, h * w, c))
        q, k, v = (part.reshape(b, h * w, self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        if self.mem_kv is not None:
            memory = self.mem_kv[...].astype(self.dtype).transpose(0, 2, 1, 3)  # (2, memory, heads, width)
            k, v = (_prepend(memory[i], pixels) for i, pixels in enumerate((k, v)))
        return self.out(attend(q, k, v).reshape(b, h * w, -1)).reshape(b, h, w, c)


class LinearAttention(nnx.Module):
    """Attention that is linear in the number of pixels: `(b, h, w, c)` -> the same, without the residual.

    softmax(q) over a head's channels, times head_channels^-1/2; softmax(k) over the positions, the memory's included.
    mem_kv: `(2, heads, head_channels, memory)`. Between the projections it computes in float32 at least.
    """

    def __init__(self, channels: int, *, heads: int, head_channels: int, memory: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype, self.heads = dtype, heads
        self.norm = RMSNorm(channels, dtype=dtype)
        self.mem_kv = _memory((2, heads, head_channels, memory), rngs)
        self.qkv = linear(channels, 3 * heads * head_channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.out_proj = linear(heads * head_channels, channels, dtype=dtype, rngs=rngs)
        self.out_norm = RMSNorm(channels, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        b, h, w, _ = x.shape
        dtype = at_least_float32(self.dtype)
        qkv = self.qkv(self.norm(x)).astype(dtype).reshape(b, h * w, -1)
        q, k, v = (part.reshape(b, h * w, self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        heads, width = q.shape[2:]
        if self.mem_kv is not None:
            memory = self.mem_kv[...].astype(dtype).transpose(0, 3, 1, 2)  # (2, memory, heads, width)
            k, v = (_prepend(memory[i], pixels) for i, pixels in enumerate((k, v)))
        q = jax.nn.softmax(q, axis=-1) * width**-0.5
        context = jnp.einsum("bknd,bkne->bnde", jax.nn.softmax(k, axis=1), v)
        mixed = jnp.einsum("bnde,bqnd->bqne", context, q).reshape(b, h * w, heads * width)
        return self.out_norm(self.out_proj(mixed.reshape(b, h, w, heads * width).astype(self.dtype)))


class Downsample(nnx.Module):
    """Each 2x2 square's pixels side by side in the channels, then a 1x1: `(b, h, w, in)` -> `(b, h/2, w/2, out)`."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = linear(4 * channels_in, channels_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        squares = x.reshape(b, h // 2, 2, w, c).reshape(b, h // 2, 2, w // 2, 2, c)  # one axis at a time, for sharding
        squares = squares.transpose(0, 1, 3, 5, 2, 4)  # channel, then row, then column
        return self.proj(squares.reshape(b, h // 2, w // 2, 4 * c))


class Upsample(nnx.Module):
    """Nearest neighbour, then a 3x3: `(b, h, w, in)` -> `(b, 2h, 2w, out)`."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(channels_in, channels_out, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(nearest(x))


class Level(nnx.Module):
    """One resolution of the encoder or decoder: two blocks, an attention, and the way to the next level."""

    def __init__(
        self,
        block_1: Block,
        block_2: Block,
        attention: Attention | LinearAttention,
        resample: Downsample | Upsample | nnx.Conv,
    ):
        self.block_1 = block_1
        self.block_2 = block_2
        self.attention = attention
        self.resample = resample


class Middle(nnx.Module):
    """The bottom: block, full attention, block."""

    def __init__(self, block_1: Block, attention: Attention, block_2: Block):
        self.block_1 = block_1
        self.attention = attention
        self.block_2 = block_2


class LucidrainsUNet(nnx.Module):
    """The network: `unet(x_t, t)`, x_t `(b, h, w, input_channels)` float, t `(b,)` int or float.

    A self-conditioned one takes the last step's x0 (zeros before the first) and x_t, concatenated in this order along
    the channels, so input_channels is twice the image's. labels: `(b,)` int, or one for all; needed by a network with
    classes, refused by one without (ValueError).

    Returns `(b, h, w, out_channels)` in x_t's dtype. h and w need not be the config's, but must be multiples of
    2^(levels - 1); others raise ValueError. dtype: the compute dtype; norms and softmaxes are never below float32.
    """

    def __init__(self, config: LucidrainsConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        labelled = config.num_classes is not None
        block = partial(Block, time_channels=config.time_width * (1 + labelled), dtype=dtype, rngs=rngs)

        def attention(level: int, channels: int, *, full: bool) -> Attention | LinearAttention:
            return (Attention if full else LinearAttention)(
                channels,
                heads=config.num_heads[level],
                head_channels=config.head_channels[level],
                memory=config.memory,
                dtype=dtype,
                rngs=rngs,
            )

        learned = config.time_embedding == "learned"
        self.time_features = LearnedFeatures(config.time_features, rngs=rngs) if learned else None
        features = config.time_features + 1 if learned else config.channels
        self.time_embed = TimeMLP(features, config.time_width, dtype=dtype, rngs=rngs)
        normal = nnx.initializers.normal(1.0)
        self.class_embed = (
            nnx.Embed(config.num_classes, config.channels, embedding_init=normal, dtype=dtype, rngs=rngs)
            if config.num_classes is not None
            else None
        )
        self.class_mlp = TimeMLP(config.channels, config.time_width, dtype=dtype, rngs=rngs) if labelled else None
        self.conv_in = conv(config.input_channels, config.stem, 7, dtype=dtype, rngs=rngs)

        widths = (config.stem, *config.widths)
        last = len(config.widths) - 1
        conv3 = partial(conv, size=3, dtype=dtype, rngs=rngs)
        down, up = [], []
        for level, (width, deeper) in enumerate(pairwise(widths)):
            mixer = attention(level, width, full=config.full_attention[level])
            halve: Downsample | nnx.Conv
            if level == last:
                halve = conv3(width, deeper)
            elif config.strided:
                halve = conv(width, deeper, 4, strides=2, padding=(1, 1), dtype=dtype, rngs=rngs)
            else:
                halve = Downsample(width, deeper, dtype=dtype, rngs=rngs)
            down.append(Level(block(width, width), block(width, width), mixer, halve))
        for level, (above, width) in reversed(list(enumerate(pairwise(widths)))):
            both = width + above  # the skips have the encoder's width at this resolution
            mixer = attention(level, width, full=config.full_attention[level])
            double = conv3(width, above) if level == 0 else Upsample(width, above, dtype=dtype, rngs=rngs)
            up.append(Level(block(both, width), block(both, width), mixer, double))
        self.down = nnx.List(down)
        deepest = widths[-1]
        middle = attention(last, deepest, full=True)
        assert isinstance(middle, Attention)
        self.mid = Middle(block(deepest, deepest), middle, block(deepest, deepest))
        self.up = nnx.List(up)  # in the order computed, as in the source: up[0] is the lowest resolution
        self.block_out = block(2 * config.stem, config.stem)
        self.conv_out = linear(config.stem, config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Array:
        *_, (_, output) = self.activations(x_t, t, labels)
        return output.astype(x_t.dtype)

    def activations(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per module of the source, under its name there, in the order computed.

        The attentions' are without the residual. The last is the network's output.
        """
        config = self.config
        if (labels is None) != (self.class_embed is None):
            wanted = "needs labels" if labels is None else "takes no labels: it has no classes"
            raise ValueError(f"LucidrainsUNet: this model {wanted}")
        if x_t.ndim != 4 or x_t.shape[3] != config.input_channels:
            parts = ", self-conditioning and x_t" if config.self_condition else ""
            raise ValueError(f"LucidrainsUNet: x_t must be (b, h, w, {config.input_channels}{parts}), got {x_t.shape}")
        if problems := size_problems(config, (x_t.shape[1], x_t.shape[2])):
            raise ValueError(f"LucidrainsUNet: {problems[0]}")

        h = stem = self.conv_in(x_t)
        yield "init_conv", h
        time = self.time_embed(self._features(per_sample(t, x_t)))
        yield "time_mlp", time
        if labels is not None and self.class_embed is not None and self.class_mlp is not None:
            told = self.class_mlp(self.class_embed(per_sample(labels, x_t)))
            yield "classes_mlp", told
            time = jnp.concatenate([time, told], axis=-1)
        skips = []
        for i, level in enumerate(self.down):
            h = level.block_1(h, time)
            yield f"downs.{i}.0", h
            skips.append(h)
            h = level.block_2(h, time)
            yield f"downs.{i}.1", h
            mixed = level.attention(h)
            yield f"downs.{i}.2", mixed
            h = mixed + h
            skips.append(h)
            h = level.resample(h)
            yield f"downs.{i}.3", h

        h = self.mid.block_1(h, time)
        yield "mid_block1", h
        mixed = self.mid.attention(h)
        yield "mid_attn", mixed
        h = self.mid.block_2(mixed + h, time)
        yield "mid_block2", h

        for i, level in enumerate(self.up):
            h = level.block_1(jnp.concatenate([h, skips.pop()], axis=-1), time)
            yield f"ups.{i}.0", h
            h = level.block_2(jnp.concatenate([h, skips.pop()], axis=-1), time)
            yield f"ups.{i}.1", h
            mixed = level.attention(h)
            yield f"ups.{i}.2", mixed
            h = level.resample(mixed + h)
            yield f"ups.{i}.3", h

        h = self.block_out(jnp.concatenate([h, stem], axis=-1), time)
        yield "final_res_block", h
        yield "final_conv", self.conv_out(h)

    def _features(self, t: Array) -> Array:
        dtype = at_least_float32(self.dtype)  # t reaches 1000, where bfloat16 resolves only 4
        if self.time_features is not None:
            return self.time_features(t, dtype)
        return timestep_embedding(t, self.config.channels, dtype, theta=self.config.theta)


def _memory(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param[Array] | None:
    """Learned keys and values of this shape; None if there are none of them."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32)) if 0 not in shape else None


def _prepend(memory: Array, pixels: Array) -> Array:
    """Memory `(m, heads, width)`, the same for every image, before pixels `(b, n, heads, width)`: `(b, m + n, ...)`."""
    return jax.vmap(lambda of_one: jnp.concatenate([memory, of_one]))(pixels)
