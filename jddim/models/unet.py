"""The UNet of Ho et al. (arXiv:2006.11239), as ermongroup/ddim and pesser/pytorch_diffusion wire it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jddim.config import UNetConfig, size_problems
from jddim.models.layers import (
    Attention,
    Downsample,
    ResBlock,
    Upsample,
    at_least_float32,
    conv,
    group_norm,
    timestep_embedding,
)


class Level(nnx.Module):
    """One resolution of the encoder or decoder: residual blocks, attention after each or none, a resampling."""

    def __init__(
        self,
        blocks: list[ResBlock],
        attentions: list[Attention],
        *,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ):
        self.blocks = nnx.List(blocks)
        self.attentions = nnx.List(attentions)
        self.downsample = downsample
        self.upsample = upsample


class Middle(nnx.Module):
    """The bottom of the UNet: block, attention, block at the lowest resolution."""

    def __init__(self, block_1: ResBlock, attention: Attention, block_2: ResBlock):
        self.block_1 = block_1
        self.attention = attention
        self.block_2 = block_2


class TimeEmbedding(nnx.Module):
    """Sinusoid, linear, swish, linear: t `(b,)` -> `(b, 4 ch)`."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.channels = channels
        self.dtype = dtype
        self.linear_1 = nnx.Linear(channels, 4 * channels, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(4 * channels, 4 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, t: Array) -> Array:
        # The sinusoid stays float32 under bfloat16: its argument reaches 1000, where bfloat16 resolves only 4.
        embedding = timestep_embedding(t, self.channels, at_least_float32(self.dtype))
        return self.linear_2(jax.nn.swish(self.linear_1(embedding)))


class UNet(nnx.Module):
    """Predicts eps: `unet(x_t, t)`, x_t `(b, h, w, in_channels)` float, t `(b,)` int or float in 0..T-1.

    Returns `(b, h, w, out_channels)` in x_t's dtype. Fully convolutional: h and w need not be the config's, but must
    be multiples of 2^(levels - 1); others raise ValueError.

    dtype: the compute dtype; norms and softmax are never below float32. Fresh parameters are flax's defaults, for
    training from scratch; `jddim.load` fills them from a checkpoint.
    """

    def __init__(self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        groups, epsilon = config.norm_groups, config.norm_epsilon
        conv3 = partial(conv, size=3, dtype=dtype, rngs=rngs)
        attention = partial(Attention, groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)
        block = partial(
            ResBlock,
            time_channels=4 * config.channels,
            groups=groups,
            epsilon=epsilon,
            conv_shortcut=config.conv_shortcut,
            dtype=dtype,
            rngs=rngs,
        )
        halve = partial(Downsample, with_conv=config.resample_with_conv, dtype=dtype, rngs=rngs)
        double = partial(Upsample, with_conv=config.resample_with_conv, dtype=dtype, rngs=rngs)

        def attentions(level: int, count: int, channels: int) -> list[Attention]:
            return [attention(channels) for _ in range(count if level in config.attention_levels else 0)]

        widths = [config.channels * mult for mult in config.channel_mults]
        last = len(widths) - 1
        self.time_embed = TimeEmbedding(config.channels, dtype=dtype, rngs=rngs)
        self.conv_in = conv3(config.in_channels, config.channels)

        skips = [config.channels]  # the widths that the decoder will pop, in the order the encoder pushes them
        down = []
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(config.num_res_blocks):
                blocks.append(block(skips[-1], width))
                skips.append(width)
            downsample = None
            if level < last:
                downsample = halve(width)
                skips.append(width)
            down.append(Level(blocks, attentions(level, config.num_res_blocks, width), downsample=downsample))
        self.down = nnx.List(down)

        width = widths[-1]
        self.mid = Middle(block(width, width), attention(width), block(width, width))

        up = []
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(block(width + skips.pop(), widths[level]))
                width = widths[level]
            upsample = double(width) if level > 0 else None
            up.append(Level(blocks, attentions(level, config.num_res_blocks + 1, width), upsample=upsample))
        self.up = nnx.List(up[::-1])  # up[level], like down[level]; level 0 is full resolution

        self.norm_out = group_norm(width, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv_out = conv3(width, config.out_channels)

    def __call__(self, x_t: Array, t: Array) -> Array:
        *_, (_, output) = self.activations(x_t, t)
        return output.astype(x_t.dtype)

    def activations(self, x_t: Array, t: Array) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per block in the order computed; the last is the network's output.

        `jddim verify` compares these one by one; the names are those of the PyTorch reference's blocks.
        """
        if x_t.ndim != 4 or x_t.shape[3] != self.config.in_channels:
            raise ValueError(f"UNet: x_t must be (b, h, w, {self.config.in_channels}), got {x_t.shape}")
        if problems := size_problems(self.config, (x_t.shape[1], x_t.shape[2])):
            raise ValueError(f"UNet: {problems[0]}")

        time = self.time_embed(t)
        yield "time_embed", time

        h = self.conv_in(x_t)
        yield "conv_in", h
        skips = [h]
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.blocks):
                h = block(h, time)
                yield f"down.{i}.block.{j}", h
                if level.attentions:
                    h = level.attentions[j](h)
                    yield f"down.{i}.attn.{j}", h
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample(h)
                yield f"down.{i}.downsample", h
                skips.append(h)

        h = self.mid.block_1(h, time)
        yield "mid.block_1", h
        h = self.mid.attention(h)
        yield "mid.attn_1", h
        h = self.mid.block_2(h, time)
        yield "mid.block_2", h

        for i, level in reversed(list(enumerate(self.up))):
            for j, block in enumerate(level.blocks):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), time)
                yield f"up.{i}.block.{j}", h
                if level.attentions:
                    h = level.attentions[j](h)
                    yield f"up.{i}.attn.{j}", h
            if level.upsample is not None:
                h = level.upsample(h)
                yield f"up.{i}.upsample", h

        yield "conv_out", self.conv_out(jax.nn.swish(self.norm_out(h)))
