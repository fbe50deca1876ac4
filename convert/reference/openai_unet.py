"""The UNet of OpenAI's guided-diffusion and improved-diffusion in plain PyTorch, and the former's classifier.

Parameters carry the names that their checkpoints use, so those load with `strict=True`. Inference only: no dropout,
no gradient checkpointing, no half-precision torso.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal embedding: all cosines, then all sines, frequencies 10000^(-i / (dim // 2)).

    t: `(b,)`, int or fractional. Returns `(b, dim)` in dtype; an odd dim ends in a zero. The division comes last in
    the exponent, as in the source, which always computes in float32; here float64 is for float64 networks.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype) / half)
    angles = t.to(dtype)[:, None] * frequencies[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class ResBlock(nn.Module):
    """Norm, silu, (resampling), conv; time; norm, silu, conv; plus the (resampled, projected) input.

    resample: "down" or "up": both branches, before the first convolution. scale_shift: time scales and shifts the
    second norm's output; else it is added before that norm.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        time_channels: int,
        scale_shift: bool,
        groups: int,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout's place, which the last layer's name counts
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: `(b, channels, h, w)`, time: `(b, time_channels)`. Returns `(b, out_channels, h', w')`."""
        norm, silu, conv = self.in_layers
        h = silu(norm(x))
        if self.resample is not None:
            h, x = (_resample(tensor, self.resample) for tensor in (h, x))
        h = conv(h)
        embedding = self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + embedding)
        return self.skip_connection(x) + self.out_layers[1:](h)


class AttentionBlock(nn.Module):
    """Self-attention of several heads over the pixels, plus the input; q, k and v come from one projection.

    new_order: the projection's channels are [q, k, v][head]; else (improved-diffusion's, and the default of
    guided-diffusion) [head][q, k, v]. flat: the projections are 1-D convolutions, over the pixels in a row; else 2-D.
    """

    def __init__(self, channels: int, *, heads: int, new_order: bool, groups: int, flat: bool):
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = nn.GroupNorm(groups, channels)
        conv = nn.Conv1d if flat else nn.Conv2d
        self.flat = flat
        self.qkv = conv(channels, 3 * channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        pixels = x.flatten(2) if self.flat else x
        qkv = self.qkv(self.norm(pixels)).flatten(2)
        mixed = _mixed(qkv, self.heads, new_order=self.new_order).reshape(pixels.shape)
        return (pixels + self.proj_out(mixed)).reshape(x.shape)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded by 1 on every side; or, without convolution, 2x2 means."""

    def __init__(self, channels: int, *, with_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns `(b, c, h / 2, w / 2)`."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution where asked."""

    def __init__(self, channels: int, *, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns `(b, c, 2 h, 2 w)`."""
        return self.conv(_resample(x, "up"))


class _Encoder(nn.Module):
    """The first half, which the UNet and the classifier share. The arguments are `OpenAIUNet`'s."""

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        heads: Sequence[int],
        resample: str = "conv",
        scale_shift: bool = True,
        new_order: bool = False,
        flat: bool = True,
        num_classes: int | None = None,
        groups: int = 32,
        noise_levels: int | None = None,
    ):
        super().__init__()
        self.model_channels = model_channels
        self.num_res_blocks = num_res_blocks
        self.num_levels = len(widths)
        time_channels = 4 * model_channels
        self.block = partial(ResBlock, time_channels=time_channels, scale_shift=scale_shift, groups=groups)
        self.attention = partial(AttentionBlock, new_order=new_order, groups=groups, flat=flat)
        embed = nn.Sequential(
            nn.Linear(model_channels, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.noise_level = None if noise_levels is None else nn.Embedding(noise_levels, 1)
        self.embed = "time_embed" if noise_levels is None else "cond_embed"
        self.add_module(self.embed, embed)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_channels)

        c = widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, c, 3, padding=1)])])
        self.skips = [c]
        for level, width in enumerate(widths):
            attended = level in attention_levels
            for _ in range(num_res_blocks):
                layers = [self.block(c, width), *([self.attention(width, heads=heads[level])] if attended else [])]
                self.input_blocks.append(nn.ModuleList(layers))
                c = width
                self.skips.append(c)
            if level < len(widths) - 1:
                halve = (
                    self.block(c, c, resample="down")
                    if resample == "resnet"
                    else Downsample(c, with_conv=resample == "conv")
                )
                self.input_blocks.append(nn.ModuleList([halve]))
                self.skips.append(c)
        middle = self.attention(c, heads=heads[-1])
        self.middle_block = nn.ModuleList([self.block(c, c), middle, self.block(c, c)])

    def encoded(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None
    ) -> Generator[tuple[str, Tensor], None, tuple[Tensor, Tensor, list[Tensor]]]:
        """Every block's output, as `OpenAIUNet.activations`; returned: the last, time's embedding, each entry's."""
        told = t if self.noise_level is None else self.noise_level(t)[:, 0]
        # Angles reach 1000; the source's are float32 always.
        time = self.get_submodule(self.embed)(
            timestep_embedding(told, self.model_channels, next(self.parameters()).dtype)
        )
        if labels is not None:
            time = time + self.label_emb(labels)
        yield "time_embed", time

        blocks = map(_layers, self.input_blocks)
        h = next(blocks)[0](x)
        yield "conv_in", h
        skips = [h]
        for level in range(self.num_levels):
            for i in range(self.num_res_blocks):
                layers = next(blocks)
                h = layers[0](h, time)
                yield f"down.{level}.block.{i}", h
                if len(layers) > 1:
                    h = layers[1](h)
                    yield f"down.{level}.attn.{i}", h
                skips.append(h)
            if level < self.num_levels - 1:
                h = _apply(next(blocks)[0], h, time)
                yield f"down.{level}.downsample", h
                skips.append(h)

        for name, layer in zip(("block_1", "attn_1", "block_2"), self.middle_block, strict=True):
            h = _apply(layer, h, time)
            yield f"mid.{name}", h
        return h, time, skips


class OpenAIUNet(_Encoder):
    """Predicts the noise in x at timestep t (or x_0), and with twice the channels the variance too.

    model_channels: the width that time's embedding has; widths: of each level, full resolution first.
    attention_levels: levels whose blocks are followed by attention, on both ways; the middle always has one.
    heads: of each level's attention on the way down; the last entry is the middle's too. heads_up: on the way up.
    resample: "conv", "resnet" (the source's resblock_updown) or "pool" (its conv_resample=False). new_order, flat:
    `AttentionBlock`'s. num_classes: None without classes. groups: the sources' are always 32. noise_levels: how many
    there are in a table by t, one of which is embedded in place of t, by a `cond_embed` (Palette); None: t itself is.
    """

    def __init__(
        self,
        *,
        out_channels: int,
        widths: Sequence[int],
        attention_levels: Sequence[int],
        heads_up: Sequence[int],
        num_res_blocks: int,
        resample: str = "conv",
        groups: int = 32,
        **encoder: Any,
    ):
        super().__init__(
            widths=widths,
            attention_levels=attention_levels,
            num_res_blocks=num_res_blocks,
            resample=resample,
            groups=groups,
            **encoder,
        )
        c, skips = widths[-1], list(self.skips)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            attended = level in attention_levels
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [self.block(c + skips.pop(), widths[level])]
                c = widths[level]
                layers += [self.attention(c, heads=heads_up[level])] if attended else []
                if level > 0 and i == num_res_blocks:
                    layers.append(
                        self.block(c, c, resample="up")
                        if resample == "resnet"
                        else Upsample(c, with_conv=resample == "conv")
                    )
                self.output_blocks.append(nn.ModuleList(layers))

        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: `(b, in_channels, h, w)`, t: `(b,)`, labels: `(b,)` int or None. Returns `(b, out_channels, h, w)`."""
        *_, (_, output) = self.activations(x, t, labels)
        return output

    def activations(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every block's output, in the order computed, by the names of `jddim.models.unet.UNet.activations`."""
        h, time, skips = yield from self.encoded(x, t, labels)
        blocks = map(_layers, self.output_blocks)
        for level in reversed(range(self.num_levels)):
            for i in range(self.num_res_blocks + 1):
                first, *rest = next(blocks)
                h = first(torch.cat([h, skips.pop()], dim=1), time)
                yield f"up.{level}.block.{i}", h
                for layer in rest:
                    h = _apply(layer, h, time)
                    yield f"up.{level}." + (f"attn.{i}" if isinstance(layer, AttentionBlock) else "upsample"), h

        yield "conv_out", self.out(h)


class AttentionPool2d(nn.Module):
    """Attention of the pixels' mean over itself and all pixels, which have learned positions; q, k and v in this order.

    positions: pixels.
    """

    def __init__(self, channels: int, outputs: int, *, positions: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, channels, h, w)`. Returns `(b, outputs)`."""
        pixels = x.flatten(2)
        tokens = torch.cat([pixels.mean(dim=2, keepdim=True), pixels], dim=2) + self.positional_embedding
        return self.c_proj(_mixed(self.qkv_proj(tokens), self.heads, new_order=True))[:, :, 0]


class OpenAIClassifier(_Encoder):
    """The logits of the classes of x at timestep t: guided-diffusion's EncoderUNetModel.

    classes: how many. positions: pixels at the lowest resolution, for attention as the pooling; None: by their mean.
    The other arguments are `OpenAIUNet`'s.
    """

    def __init__(
        self,
        *,
        classes: int,
        positions: int | None,
        widths: Sequence[int],
        heads: Sequence[int],
        groups: int = 32,
        **encoder: Any,
    ):
        super().__init__(widths=widths, heads=heads, groups=groups, **encoder)
        c = widths[-1]
        pooling: list[nn.Module] = (
            [nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, classes, 1), nn.Flatten()]
            if positions is None
            else [AttentionPool2d(c, classes, positions=positions, heads=heads[-1])]
        )
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), *pooling)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: `(b, in_channels, h, w)`, t: `(b,)`. Returns `(b, classes)`."""
        *_, (_, logits) = self.activations(x, t)
        return logits

    def activations(self, x: Tensor, t: Tensor, labels: None = None) -> Iterator[tuple[str, Tensor]]:
        """As `OpenAIUNet.activations`."""
        h, _, _ = yield from self.encoded(x, t)
        yield "logits", self.out(h)


def _mixed(qkv: Tensor, heads: int, *, new_order: bool) -> Tensor:
    """v, weighted by the softmax of q k: `(b, 3 c, pixels)` -> `(b, c, pixels)`. new_order: as in `AttentionBlock`."""
    b, c = qkv.shape[0], qkv.shape[1] // 3
    if new_order:
        q, k, v = (part.reshape(b * heads, c // heads, -1) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(b * heads, 3 * c // heads, -1).chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(c // heads))
    weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)


def _layers(block: nn.Module) -> list[nn.Module]:
    assert isinstance(block, nn.ModuleList)
    return list(block)


def _apply(layer: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    return layer(x, time) if isinstance(layer, ResBlock) else layer(x)


def _resample(x: Tensor, direction: str) -> Tensor:
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
