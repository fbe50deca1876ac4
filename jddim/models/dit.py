"""The diffusion transformer of Peebles and Xie (arXiv:2212.09748): DiT, and SiT, which is the same network.

x_t is cut into patches, each of which becomes a token. What every block is told of t and of the label shifts, scales
and gates its two halves (adaLN-zero). NHWC, as all networks here; tokens are `(b, n, channels)`, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import DiTConfig, size_problems
from jddim.models.layers import at_least_float32, attend, per_sample, timestep_embedding

ZEROS = nnx.initializers.zeros
SMALL = nnx.initializers.normal(0.02)


class TimeMLP(nnx.Module):
    """Linear, silu, linear: `(b, in)` -> `(b, out)`."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = _linear(channels_in, channels_out, SMALL, dtype=dtype, rngs=rngs)
        self.linear_2 = _linear(channels_out, channels_out, SMALL, dtype=dtype, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class Attention(nnx.Module):
    """Self-attention of the tokens: `(b, n, c)` -> the same, without the residual. Scale (c / heads)^-1/2."""

    def __init__(self, channels: int, *, heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        self.q = _linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = _linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = _linear(channels, channels, dtype=dtype, rngs=rngs)
        self.out = _linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, n, c = x.shape
        q, k, v = (project(x).reshape(b, n, self.heads, c // self.heads) for project in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).reshape(b, n, c))


class MLP(nnx.Module):
    """Linear, gelu by tanh, linear: `(..., c)` -> the same."""

    def __init__(self, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = _linear(channels, width, dtype=dtype, rngs=rngs)
        self.linear_2 = _linear(width, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class Block(nnx.Module):
    """Attention, then an MLP: `(b, n, c)`, condition `(b, c)` -> `(b, n, c)`.

    What each is given is shifted and scaled, what it returns is gated. All six are a linear function of
    silu(condition), which is 0 at first: a fresh block changes nothing.
    """

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels = config.channels
        norm = partial(_layer_norm, channels, dtype=dtype, rngs=rngs)
        self.modulation = _linear(channels, 6 * channels, ZEROS, dtype=dtype, rngs=rngs)
        self.norm1 = norm(config.norm_epsilon)
        self.attention = Attention(channels, heads=config.num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = norm(config.mlp_norm_epsilon)
        self.mlp = MLP(channels, config.mlp_width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, condition: Array) -> Array:
        each = jnp.split(self.modulation(jax.nn.silu(condition))[:, None], 6, axis=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = each
        x = x + gate_1 * self.attention(_modulated(self.norm1(x), shift_1, scale_1))
        return x + gate_2 * self.mlp(_modulated(self.norm2(x), shift_2, scale_2))


class DiT(nnx.Module):
    """The network: `dit(x_t, t, labels)`, x_t `(b, h, w, in_channels)` float, t int or float, `(b,)` or one for all.

    labels: int in 0..num_classes-1, `(b,)` or one for all; needed by a model with classes, refused by one without
    (ValueError).

    Returns `(b, h, w, out_channels)` in x_t's dtype: eps, then with a learned variance what it is made of. h and w
    need not be the config's, but must be multiples of a patch's side; others raise ValueError. At another size the
    rows and columns are counted on, which the sources do not do.

    dtype: the compute dtype; norms and softmax are never below float32. Fresh parameters are distributed as
    facebookresearch's: its last layer, and what moves and gates each block, is 0.
    """

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        channels, side = config.channels, config.patch_size
        patch_init = nnx.initializers.variance_scaling(1, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3)
        self.patch_embed = nnx.Conv(
            config.in_channels,
            channels,
            (side, side),
            strides=side,
            padding="VALID",
            kernel_init=patch_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.time_embed = TimeMLP(config.time_features, channels, dtype=dtype, rngs=rngs)
        self.class_embed = (
            None
            if config.num_classes is None
            else nnx.Embed(config.num_classes, channels, embedding_init=SMALL, dtype=dtype, rngs=rngs)
        )
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.modulation_out = _linear(channels, 2 * channels, ZEROS, dtype=dtype, rngs=rngs)
        self.norm_out = _layer_norm(channels, config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.out = _linear(channels, side * side * config.out_channels, ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Array:
        *_, (_, output) = self.activations(x_t, t, labels)
        return output.astype(x_t.dtype)

    def activations(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per block in the order computed; the last is the network's output.

        `jddim verify` compares these one by one; the names are those of the PyTorch reference's blocks.
        """
        c = self.config
        if x_t.ndim != 4 or x_t.shape[3] != c.in_channels:
            raise ValueError(f"DiT: x_t must be (b, h, w, {c.in_channels}), got {x_t.shape}")
        if problems := size_problems(c, (x_t.shape[1], x_t.shape[2])):
            raise ValueError(f"DiT: {problems[0]}")
        condition = self._embedding(per_sample(t, x_t), None if labels is None else per_sample(labels, x_t))
        yield "condition", condition

        h = self.patch_embed(x_t)
        b, rows, columns, channels = h.shape
        h = (h + jnp.asarray(positions(rows, columns, channels), h.dtype)).reshape(b, rows * columns, channels)
        yield "patch_embed", h
        for i, block in enumerate(self.blocks):
            h = block(h, condition)
            yield f"block.{i}", h

        shift, scale = jnp.split(self.modulation_out(jax.nn.silu(condition))[:, None], 2, axis=-1)
        h = self.out(_modulated(self.norm_out(h), shift, scale))
        side = c.patch_size
        patches = h.reshape(b, rows, columns, side, side, c.out_channels)
        yield "output", patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * side, columns * side, c.out_channels)

    def _embedding(self, t: Array, labels: Array | None) -> Array:
        """What every block is told: the time MLP's output, plus the label's embedding, `(b, channels)`."""
        c = self.config
        if (self.class_embed is None) != (labels is None):
            wanted = "takes no labels: it has no classes" if self.class_embed is None else "needs labels"
            raise ValueError(f"DiT: this model {wanted}")
        # Never below float32: the sinusoid's argument reaches 1000, where bfloat16 resolves only 4.
        features = timestep_embedding(
            t,
            c.time_features,
            at_least_float32(self.dtype),
            cosine_first=True,
            shift=c.frequency_shift,
            divide_last=True,
        )
        time = self.time_embed(features)
        return time if self.class_embed is None or labels is None else time + self.class_embed(labels)


def positions(rows: int, columns: int, channels: int) -> np.ndarray:
    """Where each patch is, float32 `(rows, columns, channels)`: the first half tells its column, the second its row.

    Sines, then cosines, of the place times 10000^(-i / (channels / 4)); computed in float64, and rounded once, as in
    the sources.
    """
    frequencies = 10000.0 ** -(np.arange(channels // 4) / (channels // 4))

    def along(count: int) -> np.ndarray:
        angles = np.arange(count)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    shape = (rows, columns, channels // 2)
    halves = (np.broadcast_to(of, shape) for of in (along(columns)[None], along(rows)[:, None]))
    return np.concatenate(list(halves), axis=2).astype(np.float32)


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale) + shift


def _linear(
    channels_in: int,
    channels_out: int,
    initial: Callable[..., Array] | None = None,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A product with a matrix, kernel (in, out), of the last axis. initial: None: Xavier's uniform one."""
    return nnx.Linear(
        channels_in,
        channels_out,
        kernel_init=initial or nnx.initializers.xavier_uniform(),
        dtype=dtype,
        rngs=rngs,
    )


def _layer_norm(channels: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm without parameters, of torch's two-pass variance unless `dtype` is a half-precision one."""
    return nnx.LayerNorm(
        channels,
        epsilon=epsilon,
        use_bias=False,
        use_scale=False,
        use_fast_variance=jnp.finfo(dtype).bits < 32,
        dtype=at_least_float32(dtype),
        rngs=rngs,
    )
