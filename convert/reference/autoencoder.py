"""First stages in plain PyTorch: CompVis' Encoder, Decoder, AutoencoderKL and VQModel, under their names.

Inference only: there is no dropout, and no loss.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """norm, silu, conv, norm, silu, conv; plus the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, channels_in, h, w)`. Returns `(b, channels_out, h, w)`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """One head of self-attention over the pixels, scaled by channels ** -0.5; plus the input."""

    def __init__(self, channels: int, *, groups: int, eps: float):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))
        weights = (q @ k.transpose(1, 2) * x.shape[1] ** -0.5).softmax(dim=2)
        return x + self.proj_out((weights @ v).transpose(1, 2).reshape(x.shape))


class _Sampler(nn.Module):
    """A 3x3 convolution that halves (padded at the bottom and right), or comes after doubling by nearest neighbour."""

    def __init__(self, channels: int, *, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns `(b, c, 2 h, 2 w)`, or the halves."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class _Half(nn.Module):
    """Encoder (`down`) or decoder (`up`): the levels are counted from full resolution in both."""

    def __init__(
        self,
        *,
        channels_in: int,
        channels_out: int,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        groups: int,
        eps: float,
        up: bool,
    ):
        super().__init__()
        before = widths[-1] if up else stem
        self.conv_in = nn.Conv2d(channels_in, before, 3, padding=1)
        self.is_up = up
        order = range(len(widths))
        levels = {}
        for i in reversed(order) if up else order:
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                level.block.append(ResnetBlock(before, widths[i], groups=groups, eps=eps))
                before = widths[i]
                if i in attention_levels:
                    level.attn.append(AttnBlock(before, groups=groups, eps=eps))
            if up and i:
                level.upsample = _Sampler(before, up=True)
            elif not up and i < len(widths) - 1:
                level.downsample = _Sampler(before, up=False)
            levels[i] = level
        setattr(self, "up" if up else "down", nn.ModuleList(levels[i] for i in order))
        self.mid = nn.Module()
        low = widths[-1]
        self.mid.block_1 = ResnetBlock(low, low, groups=groups, eps=eps)
        if mid_attention:
            self.mid.attn_1 = AttnBlock(low, groups=groups, eps=eps)
        self.mid.block_2 = ResnetBlock(low, low, groups=groups, eps=eps)
        self.norm_out = nn.GroupNorm(groups, before, eps)
        self.conv_out = nn.Conv2d(before, channels_out, 3, padding=1)

    def activations(self, h: Tensor, at: str) -> Iterator[tuple[str, Tensor]]:
        """(name, output) of each part in the order computed; the last is the output."""
        h = self.conv_in(h)
        yield f"{at}.conv_in", h
        levels: list[tuple[int, Any]] = list(enumerate(getattr(self, "up" if self.is_up else "down")))
        parts = [(f"{at}.mid.{name}", part) for name, part in self.mid.named_children()]
        inside = []
        for i, level in reversed(levels) if self.is_up else levels:
            for j, block in enumerate(level.block):
                inside.append((f"{at}.level.{i}.block.{j}", block))
                if level.attn:
                    inside.append((f"{at}.level.{i}.attn.{j}", level.attn[j]))
            sampler = "upsample" if self.is_up else "downsample"
            if hasattr(level, sampler):
                inside.append((f"{at}.level.{i}.{sampler}", getattr(level, sampler)))
        for name, part in (*parts, *inside) if self.is_up else (*inside, *parts):
            h = part(h)
            yield name, h
        yield f"{at}.conv_out", self.conv_out(F.silu(self.norm_out(h)))


class _Codes(nn.Module):
    """A codebook."""

    def __init__(self, num: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(num, channels)

    def forward(self, z: Tensor) -> Tensor:
        """Each pixel of z `(b, channels, h, w)` as the nearest row."""
        codes, pixels = self.embedding.weight, z.permute(0, 2, 3, 1)
        distances = (pixels**2).sum(-1, keepdim=True) + (codes**2).sum(1) - 2 * pixels @ codes.T
        return codes[distances.argmin(-1)].permute(0, 3, 1, 2)


class ReferenceAutoencoder(nn.Module):
    """A first stage. num_codes None: AutoencoderKL's two numbers a latent; else VQModel's codebook."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        hidden: int,
        channels: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        groups: int,
        eps: float,
        num_codes: int | None,
        quant_conv: bool,
        post_quant_conv: bool,
    ):
        super().__init__()
        moments = 2 if num_codes is None else 1
        half = partial(
            _Half,
            stem=channels,
            widths=widths,
            attention_levels=attention_levels,
            mid_attention=mid_attention,
            groups=groups,
            eps=eps,
        )
        self.encoder = half(channels_in=in_channels, channels_out=moments * hidden, blocks=num_res_blocks, up=False)
        self.decoder = half(channels_in=hidden, channels_out=out_channels, blocks=num_res_blocks + 1, up=True)
        self.quant_conv = nn.Conv2d(moments * hidden, moments * latent_channels, 1) if quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, hidden, 1) if post_quant_conv else None
        self.latent_channels = latent_channels
        self.quantize = None if num_codes is None else _Codes(num_codes, latent_channels)

    def activations(self, x: Tensor, t: Tensor | None = None, labels: None = None) -> Iterator[tuple[str, Tensor]]:
        """Images `(b, c, h, w)` there and back by the mean: (name, output) of each block in the order computed."""
        for name, h in self.encoder.activations(x, "encoder"):  # the last is used
            yield name, h
        if self.quant_conv is not None:
            h = self.quant_conv(h)
            yield "quant_conv", h
        yield from self.decoded(h[:, : self.latent_channels])

    def decoded(self, z: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The same of the way back, of z unscaled `(b, latent_channels, h, w)`."""
        if self.quantize is not None:
            z = self.quantize(z)
            yield "codes", z
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
            yield "post_quant_conv", z
        yield from self.decoder.activations(z, "decoder")
