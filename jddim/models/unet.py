"""The UNet of Ho et al. (arXiv:2006.11239) and its descendants of the same wiring: ermongroup, diffusers, OpenAI."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import BY_TABLE, UNetConfig, size_problems
from jddim.models.layers import (
    Attention,
    Downsample,
    FourierFeatures,
    ResBlock,
    TimeMLP,
    Upsample,
    at_least_float32,
    conv,
    group_norm,
    halved,
    per_sample,
    timestep_embedding,
)


class Level(nnx.Module):
    """One resolution of the encoder or decoder: residual blocks, attention after each or none, a resampling."""

    def __init__(
        self,
        blocks: list[ResBlock],
        attentions: list[Attention],
        *,
        downsample: Downsample | ResBlock | None = None,
        upsample: Upsample | ResBlock | None = None,
    ):
        self.blocks = nnx.List(blocks)
        self.attentions = nnx.List(attentions)
        self.downsample = downsample
        self.upsample = upsample


class Middle(nnx.Module):
    """The bottom of the UNet: block, attention or none, block at the lowest resolution."""

    def __init__(self, block_1: ResBlock, attention: Attention | None, block_2: ResBlock):
        self.block_1 = block_1
        self.attention = attention
        self.block_2 = block_2


class Encoded(NamedTuple):
    """What the way down ends in: the middle's output, and what every block is told of t."""

    h: Array
    time: Array


class Encoder(nnx.Module):
    """The first half of the UNet: time and class embedding, the way down and the middle. It computes nothing by itself.

    The arguments are `UNet`'s.
    """

    def __init__(self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        block = _blocks(config, dtype, rngs)
        attention = partial(Attention, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)

        def halve(level: int) -> Downsample | ResBlock:
            kind, width = config.resampling(level)[0], config.widths[level]
            if kind == "resnet":
                return block(width, width, resample="down")
            return Downsample(
                width, with_conv=kind == "conv", symmetric=config.symmetric_padding, dtype=dtype, rngs=rngs
            )

        features = config.time_features
        time_mlp = partial(TimeMLP, features, config.time_width, dtype=dtype, rngs=rngs)
        self.time_proj = _time_projection(config, rngs)
        self.time_embed = time_mlp()
        self.class_embed = time_mlp() if config.class_embedding == "timestep" else _class_table(config, dtype, rngs)
        self.conv_in = conv(config.input_channels, config.stem, 3, dtype=dtype, rngs=rngs)

        widths = config.widths
        before, given = config.stem, config.input_channels
        down, pyramid = [], []
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(config.num_res_blocks):
                blocks.append(block(before, width))
                before = width
            downsample = halve(level) if level < len(widths) - 1 else None
            attentions = _attentions(config, level, config.num_res_blocks, up=False, dtype=dtype, rngs=rngs)
            down.append(Level(blocks, attentions, downsample=downsample))
            if config.input_pyramid and level > 0:
                side = 1 + (len(config.resample_filter or (1, 1)) - 1) // 2
                pyramid.append(conv(given, widths[level - 1], 3, padding=(side, side), dtype=dtype, rngs=rngs))
                given = widths[level - 1]
        self.down = nnx.List(down)
        self.pyramid = nnx.List(pyramid)

        width = widths[-1]
        mid_groups = config.norm_groups if config.mid_norm_groups is None else config.mid_norm_groups
        mid_block = partial(block, width, width, scale=config.mid_scale)
        mid_attention = partial(attention, width, groups=mid_groups, heads=config.heads(width), scale=config.mid_scale)
        self.mid = (
            Middle(mid_block(), mid_attention() if config.mid_attention else None, mid_block())
            if config.middle
            else None
        )

    def encoded(
        self, x_t: Array, t: ArrayLike, labels: ArrayLike | None, skips: list[Array]
    ) -> Generator[tuple[str, Array], None, Encoded]:
        """The way down, one `(name, output)` per block in the order computed; and what the second half needs.

        skips: receives the outputs that the way up reads, as they are made.
        """
        if x_t.ndim != 4 or x_t.shape[3] != self.config.input_channels:
            parts = ", x_t's and the condition's" if self.config.condition_channels else ""
            raise ValueError(f"UNet: x_t must be (b, h, w, {self.config.input_channels}{parts}), got {x_t.shape}")
        if problems := size_problems(self.config, (x_t.shape[1], x_t.shape[2])):
            raise ValueError(f"UNet: {problems[0]}")

        time = self._embedding(per_sample(t, x_t), None if labels is None else per_sample(labels, x_t))
        yield "time_embed", time

        aux = 2 * x_t - 1 if self.config.center_input else x_t
        h = self.conv_in(aux)
        yield "conv_in", h
        skips.append(h)
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.blocks):
                h = block(h, time)
                yield f"down.{i}.block.{j}", h
                if level.attentions:
                    h = level.attentions[j](h)
                    yield f"down.{i}.attn.{j}", h
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample(h, time)
                yield f"down.{i}.downsample", h
                if self.pyramid:
                    h = aux = (h + halved(self.pyramid[i](aux), self.config.resample_filter, 0)) / 2**0.5
                    yield f"down.{i}.pyramid", h
                skips.append(h)

        if self.mid is not None:
            h = self.mid.block_1(h, time)
            yield "mid.block_1", h
            if self.mid.attention is not None:
                h = self.mid.attention(h)
                yield "mid.attn_1", h
            h = self.mid.block_2(h, time)
            yield "mid.block_2", h
        return Encoded(h, time)

    def _embedding(self, t: Array, labels: Array | None) -> Array:
        """What every block is told: the time MLP's output, plus the class's embedding, `(b, time_width)`."""
        kind = self.config.class_embedding
        if (kind is None) != (labels is None):
            wanted = "takes no labels: it has no classes" if kind is None else f"needs labels ({kind} class embedding)"
            raise ValueError(f"UNet: this model {wanted}")
        features = self._features(t)
        if labels is not None and self.config.early_class:
            assert isinstance(self.class_embed, nnx.Embed)
            return self.time_embed(features + self.class_embed(labels))
        time = self.time_embed(features)
        if labels is None:
            return time
        if isinstance(self.class_embed, nnx.Embed):
            return time + self.class_embed(labels)
        return time + (labels if self.class_embed is None else self.class_embed(self._features(labels)))

    def _features(self, t: Array) -> Array:
        # Never below float32: the sinusoid's argument reaches 1000, where bfloat16 resolves only 4.
        dtype = at_least_float32(self.dtype)
        if isinstance(self.time_proj, FourierFeatures):
            return self.time_proj(t, dtype)
        c = self.config
        if self.time_proj is not None:
            t = self.time_proj(t)
            if c.time_embedding == "learned":
                return t
            t = t[:, 0]
        return timestep_embedding(
            t, c.channels, dtype, cosine_first=c.cosine_first, shift=c.frequency_shift, divide_last=c.divide_last
        )


class UNet(Encoder):
    """The network: `unet(x_t, t)`, x_t `(b, h, w, input_channels)` float, t int or float, `(b,)` or one for all.

    labels: int for a class embedding "learned", numbers for "timestep", `(b,)` or one for all; `(b, time_width)` for
    "identity"; needed by a model with classes, refused by one without (ValueError).

    Returns `(b, h, w, out_channels)` in x_t's dtype: eps, or whatever the network was trained to predict. Fully
    convolutional: h and w need not be the config's, but must be multiples of 2^(levels - 1); others raise ValueError.

    dtype: the compute dtype; norms and softmax are never below float32. Fresh parameters are distributed as
    PyTorch's defaults, for training from scratch; `jddim.load` fills them from a checkpoint.
    """

    def __init__(self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        block = _blocks(config, dtype, rngs)

        def double(level: int) -> Upsample | ResBlock:  # from `level` to the one above it
            kind, width = config.resampling(level - 1)[1], config.widths[level]
            if kind == "resnet":
                return block(width, width, resample="up")
            return Upsample(width, with_conv=kind == "conv", dtype=dtype, rngs=rngs)

        widths, each = config.widths, config.num_res_blocks
        last = len(widths) - 1
        skips = [config.stem]  # the widths that the decoder pops, in the order the encoder pushes them
        for level, width in enumerate(widths):
            skips += [width] * (each + (level < last))
        width = widths[-1]
        up = []
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(each + 1):
                blocks.append(block(width + skips.pop(), widths[level]))
                width = widths[level]
            upsample = double(level) if level > 0 else None
            attentions = _attentions(config, level, each + 1, up=True, dtype=dtype, rngs=rngs)
            up.append(Level(blocks, attentions, upsample=upsample))
        self.up = nnx.List(up[::-1])  # up[level], like down[level]; level 0 is full resolution

        self.norm_out = group_norm(width, config.norm_groups, config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.conv_out = conv(width, config.out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Array:
        *_, (_, output) = self.activations(x_t, t, labels)
        return output.astype(x_t.dtype)

    def activations(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per block in the order computed; the last is the network's output.

        `jddim verify` compares these one by one; the names are those of the PyTorch reference's blocks.
        """
        skips: list[Array] = []
        h, time = yield from self.encoded(x_t, t, labels, skips)
        yield from self._decoded(h, time, skips, x_t, t)

    def whole(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None, *, blocks: int) -> tuple[Array, Array]:
        """The output, and what its last `blocks` blocks of the way up are given: `shallow`'s `deep`."""
        level, j = self.config.up_block(blocks)
        deep = output = x_t
        for name, made in self.activations(x_t, t, labels):
            deep = output if name == f"up.{level}.block.{j}" else deep
            output = made
        return output.astype(x_t.dtype), deep

    def shallow(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None, *, deep: Array, blocks: int) -> Array:
        """The output by the last `blocks` blocks of the way up alone, from the `deep` of another x_t and t.

        DeepCache (Ma et al., arXiv:2312.00858). Of the way down only what these blocks read is computed.
        """
        skips: list[Array] = []
        way = self.encoded(x_t, t, labels, skips)
        _, time = next(way)
        for _ in way:
            if len(skips) == blocks:  # seen one block late, whose output XLA then leaves out
                break
        *_, (_, output) = self._decoded(deep, time, skips, x_t, t)
        return output.astype(x_t.dtype)

    def _decoded(
        self, h: Array, time: Array, skips: list[Array], x_t: Array, t: ArrayLike
    ) -> Iterator[tuple[str, Array]]:
        """The way up, as many of its last blocks as there are skips: `(name, output)` as of `activations`."""
        left_out = self.config.up_blocks - len(skips)
        for i, level in reversed(list(enumerate(self.up))):
            if left_out >= len(level.blocks):
                left_out -= len(level.blocks)
                continue
            for j, block in enumerate(level.blocks):
                if left_out:
                    left_out -= 1
                    continue
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), time)
                yield f"up.{i}.block.{j}", h
                if (k := j - len(level.blocks) + len(level.attentions)) >= 0:  # fewer attentions are of the last blocks
                    h = level.attentions[k](h)
                    yield f"up.{i}.attn.{j}", h
            if level.upsample is not None:
                h = level.upsample(h, time)
                yield f"up.{i}.upsample", h

        output = self.conv_out(jax.nn.silu(self.norm_out(h)))
        if self.config.time_embedding == "fourier":
            output = output / per_sample(t, x_t).astype(output.dtype)[:, None, None, None]
        yield "conv_out", output


def _blocks(config: UNetConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., ResBlock]:
    return partial(
        ResBlock,
        time_channels=config.time_width,
        groups=config.norm_groups,
        epsilon=config.norm_epsilon,
        conv_shortcut=config.conv_shortcut,
        scale_shift=config.scale_shift,
        activation=config.activation,
        taps=config.resample_filter,
        resample_shortcut=config.resample_shortcut,
        scale=config.block_scale,
        dtype=dtype,
        rngs=rngs,
    )


def _attentions(
    config: UNetConfig, level: int, count: int, *, up: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> list[Attention]:
    width = config.widths[level]
    make = partial(
        Attention,
        width,
        groups=config.norm_groups,
        epsilon=config.norm_epsilon,
        heads=config.heads(width, up=up),
        scale=config.block_scale,
        dtype=dtype,
        rngs=rngs,
    )
    count = 1 if up and config.up_attention_last else count
    return [make() for _ in range(count if config.has_attention(level, up=up) else 0)]


def _time_projection(config: UNetConfig, rngs: nnx.Rngs) -> FourierFeatures | nnx.Embed | None:
    """What turns t into the time MLP's input; None: the sinusoid, which has no parameters."""
    if config.time_embedding in ("fourier", "frequencies"):
        return FourierFeatures(config.channels, logarithm=config.time_embedding == "fourier", rngs=rngs)
    if config.time_embedding in BY_TABLE:
        assert config.num_timesteps is not None
        width = config.channels if config.time_embedding == "learned" else 1
        return nnx.Embed(config.num_timesteps, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
    return None


def _class_table(config: UNetConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed | None:
    if config.class_embedding != "learned":
        return None
    assert config.num_classes is not None
    normal = nnx.initializers.normal(1.0)
    width = config.time_features if config.early_class else config.time_width
    return nnx.Embed(config.num_classes, width, embedding_init=normal, dtype=dtype, rngs=rngs)
