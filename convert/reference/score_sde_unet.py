"""yang-song/score_sde_pytorch's `ddpm` and `ncsnpp` in plain torch, under their names, as the VP models have them.

Written from notes on the source. All modules are in one list, in the order that they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .edm_unet import resampled


class NIN(nn.Module):
    """A linear over channels: `(b, c, h, w)` -> `(b, d, h, w)`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.empty(channels, width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


class Block(nn.Module):
    """A residual block; biggan: that may resample. scale: by which the sum is divided."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        time: int,
        biggan: bool,
        scale: float,
        taps: Sequence[float],
        resample: str | None = None,
    ):
        super().__init__()
        self.scale, self.taps, self.resample = scale, taps, resample
        self.GroupNorm_0 = nn.GroupNorm(32, channels, 1e-6)
        self.Conv_0 = nn.Conv2d(channels, width, 3, padding=1)
        self.Dense_0 = nn.Linear(time, width)
        self.GroupNorm_1 = nn.GroupNorm(32, width, 1e-6)
        self.Conv_1 = nn.Conv2d(width, width, 3, padding=1)
        if biggan and (channels != width or resample):
            self.Conv_2 = nn.Conv2d(channels, width, 1)
        elif channels != width:
            self.NIN_0 = NIN(channels, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: `(b, c, h, w)`, time: `(b, time)`, after its silu."""
        h = F.silu(self.GroupNorm_0(x))
        if self.resample:
            h, x = (resampled(each, self.taps, self.resample) for each in (h, x))
        h = self.Conv_0(h) + self.Dense_0(time)[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        for name in ("Conv_2", "NIN_0"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return (x + h) / self.scale


class Attention(nn.Module):
    """Self-attention over pixels, one head."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.GroupNorm_0 = nn.GroupNorm(32, channels, 1e-6)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        h = self.GroupNorm_0(x)
        q, k, v = (nin(h).flatten(2) for nin in (self.NIN_0, self.NIN_1, self.NIN_2))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        return (x + self.NIN_3((v @ weights.transpose(1, 2)).reshape(x.shape))) / self.scale


class Down(nn.Module):
    """A strided convolution, padded below and to the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.Conv_0 = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, h, w)` -> `(b, c, h/2, w/2)`."""
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.Conv_0 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, h, w)` -> `(b, c, 2 h, 2 w)`."""
        return self.Conv_0(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Again(nn.Module):
    """The input of the network, at half the size: filtered, then by a strided convolution."""

    def __init__(self, channels: int, width: int, taps: Sequence[float]):
        super().__init__()
        self.taps = taps
        self.Conv2d_0 = nn.Conv2d(channels, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, h, w)` -> `(b, width, h/2, w/2)`."""
        f = torch.tensor(self.taps, dtype=x.dtype)
        f = (torch.outer(f, f) / f.sum() ** 2).expand(x.shape[1], 1, len(f), len(f))
        return self.Conv2d_0(F.conv2d(x, f, padding=len(self.taps) // 2, groups=x.shape[1]))


class ScoreUNet(nn.Module):
    """eps of x_t and of t as the source's score functions tell it.

    biggan: blocks resample. scale: by which sums with residuals are divided. pyramid: NCSN++'s encoder.
    """

    def __init__(
        self,
        *,
        images: int,
        nf: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Sequence[int],
        biggan: bool,
        scale: float,
        taps: Sequence[float],
        pyramid: bool,
    ):
        super().__init__()
        self.nf, self.widths, self.blocks, self.pyramid = nf, widths, blocks, pyramid
        self.attention_levels = attention_levels

        def block(channels: int, width: int, resample: str | None = None) -> nn.Module:
            return Block(channels, width, time=4 * nf, biggan=biggan, scale=scale, taps=taps, resample=resample)

        modules: list[nn.Module] = [nn.Linear(nf, 4 * nf), nn.Linear(4 * nf, 4 * nf)]
        modules.append(nn.Conv2d(images, nf, 3, padding=1))
        c, given, skips = nf, images, [nf]
        last = len(widths) - 1
        for level, width in enumerate(widths):
            for _ in range(blocks):
                modules.append(block(c, width))
                c = width
                if level in attention_levels:
                    modules.append(Attention(c, scale))
                skips.append(c)
            if level < last:
                modules.append(block(c, c, "down") if biggan else Down(c))
                if pyramid:
                    modules.append(Again(given, c, taps))
                    given = c
                skips.append(c)
        modules += [block(c, c), Attention(c, scale), block(c, c)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                modules.append(block(c + skips.pop(), width))
                c = width
            if level in attention_levels:
                modules.append(Attention(c, scale))
            if level:
                modules.append(block(c, c, "up") if biggan else Up(c))
        modules += [nn.GroupNorm(32, c, 1e-6), nn.Conv2d(c, images, 3, padding=1)]
        self.all_modules = nn.ModuleList(modules)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: `(b, images, h, w)`, t: `(b,)`. Returns x's shape."""
        *_, (_, output) = self.activations(x, t)
        return output

    def activations(self, x: Tensor, t: Tensor, labels: None = None) -> Iterator[tuple[str, Tensor]]:
        """Every block's output, in the order computed, by the names of `jddim.models.unet.UNet.activations`."""
        modules = iter(self.all_modules)
        half = self.nf // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
        angles = t.to(x.dtype)[:, None] * rates.to(x.dtype)
        time = next(modules)(torch.cat([angles.sin(), angles.cos()], dim=1))
        time = next(modules)(F.silu(time))
        yield "time_embed", time
        time = F.silu(time)

        def step(h: Tensor) -> Tensor:
            module = next(modules)
            return module(h, time) if isinstance(module, Block) else module(h)

        aux, h = x, step(x)
        yield "conv_in", h
        skips = [h]
        for level in range(len(self.widths)):
            for i in range(self.blocks):
                h = step(h)
                yield f"down.{level}.block.{i}", h
                if level in self.attention_levels:
                    h = step(h)
                    yield f"down.{level}.attn.{i}", h
                skips.append(h)
            if level < len(self.widths) - 1:
                h = step(h)
                yield f"down.{level}.downsample", h
                if self.pyramid:
                    h = aux = (step(aux) + h) / math.sqrt(2)
                    yield f"down.{level}.pyramid", h
                skips.append(h)
        for name in ("block_1", "attn_1", "block_2"):
            h = step(h)
            yield f"mid.{name}", h
        for level in reversed(range(len(self.widths))):
            for i in range(self.blocks + 1):
                h = step(torch.cat([h, skips.pop()], dim=1))
                yield f"up.{level}.block.{i}", h
            if level in self.attention_levels:
                h = step(h)
                yield f"up.{level}.attn.{self.blocks}", h
            if level:
                h = step(h)
                yield f"up.{level}.upsample", h
        yield "conv_out", step(F.silu(step(h)))
