"""NVlabs/edm's networks in plain torch, under their names: DDPM++ and NCSN++ (SongUNet), ADM (DhariwalUNet).

Written from notes on the source. Labels are rows of a table here, in place of a product with one-hot vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block, that may resample, and attention behind it. scale: by which both sums are divided."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        time: int,
        eps: float,
        scale: float,
        doubled: bool,
        taps: Sequence[float],
        heads: int = 0,
        resample: str | None = None,
        always_skip: bool,
    ):
        super().__init__()
        self.heads, self.scale, self.doubled, self.taps, self.resample = heads, scale, doubled, taps, resample
        self.norm0 = nn.GroupNorm(32, channels, eps)
        self.conv0 = nn.Conv2d(channels, width, 3, padding=1)
        self.affine = nn.Linear(time, width * (2 if doubled else 1))
        self.norm1 = nn.GroupNorm(32, width, eps)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        plain = channels == width and not (resample and always_skip)
        self.skip = nn.Identity() if plain else nn.Conv2d(channels, width, 1)
        if heads:
            self.norm2 = nn.GroupNorm(32, width, eps)
            self.qkv = nn.Conv2d(width, 3 * width, 1)
            self.proj = nn.Conv2d(width, width, 1)

    def outputs(self, x: Tensor, time: Tensor) -> Iterator[Tensor]:
        """The block's output, then its attention's, if it has one."""
        h = F.silu(self.norm0(x))
        if self.resample:
            h, x = (resampled(each, self.taps, self.resample) for each in (h, x))
        h, told = self.conv0(h), self.affine(time)[:, :, None, None]
        if self.doubled:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + told)
        x = (self.skip(x) + self.conv1(F.silu(h))) / self.scale
        yield x
        if self.heads:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, -1).unbind(3)
            weights = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(c // self.heads)).softmax(dim=-1)
            mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, c, height, width)
            yield (self.proj(mixed) + x) / self.scale


def _outputs(block: nn.Module, x: Tensor, time: Tensor) -> Iterator[Tensor]:
    assert isinstance(block, Block)
    return block.outputs(x, time)


def resampled(x: Tensor, taps: Sequence[float], direction: str, padding: int | None = None) -> Tensor:
    """Of x `(b, c, h, w)`: it at half the size ("down") or twice ("up"), filtered by the taps in each direction."""
    f = torch.tensor(taps, dtype=x.dtype)
    f = torch.outer(f, f) / f.sum() ** 2
    f = f.expand(x.shape[1], 1, *f.shape)
    side = (len(taps) - 1) // 2 if padding is None else padding
    if direction == "down":
        return F.conv2d(x, f, stride=2, padding=side, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * f, stride=2, padding=side, groups=x.shape[1])


class EDMUNet(nn.Module):
    """F of EDM's preconditioning, of c_in x_t and log sigma / 4.

    side: the pixels of a side that the names count from. channels: the width of time's embedding, or half of it with
    frequencies. song: a SongUNet, else a DhariwalUNet. pyramid: NCSN++'s encoder. heads: of each level.
    """

    def __init__(
        self,
        *,
        side: int,
        images: int,
        channels: int,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Sequence[int],
        heads: Sequence[int],
        time: int,
        classes: int | None,
        song: bool,
        doubled: bool,
        frequencies: bool,
        pyramid: bool,
        taps: Sequence[float],
    ):
        super().__init__()
        self.song, self.channels, self.blocks, self.taps = song, channels, blocks, taps
        self.names = [f"{side >> level}x{side >> level}" for level in range(len(widths))]
        features = channels * (2 if frequencies else 1)
        if frequencies:
            self.map_noise = nn.ParameterDict({"weight": torch.randn(channels)})
        if classes is not None:
            self.map_label = nn.Embedding(classes, features if song else time)
        self.map_layer0, self.map_layer1 = nn.Linear(features, time), nn.Linear(time, time)

        def block(before: int, width: int, heads: int = 0, resample: str | None = None) -> Block:
            return Block(
                before,
                width,
                time=time,
                eps=1e-6 if song else 1e-5,
                scale=math.sqrt(2) if song else 1.0,
                doubled=doubled,
                taps=taps,
                heads=heads,
                resample=resample,
                always_skip=song,
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, aux = stem, images
        self.enc[f"{self.names[0]}_conv"] = nn.Conv2d(images, stem, 3, padding=1)
        skips = [stem]
        for level, (name, width) in enumerate(zip(self.names, widths, strict=True)):
            if level:
                self.enc[f"{name}_down"] = block(c, c, resample="down")
                skips.append(c)
                if pyramid:
                    self.enc[f"{name}_aux_residual"] = nn.Conv2d(aux, c, 3, padding=1 + (len(taps) - 1) // 2)
                    aux = c
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(c, width, heads[level] if level in attention_levels else 0)
                c = width
                skips.append(c)
        for level, (name, width) in reversed(list(enumerate(zip(self.names, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(c, c, heads[level])
                self.dec[f"{name}_in1"] = block(c, c)
            else:
                self.dec[f"{name}_up"] = block(c, c, resample="up")
            for i in range(blocks + 1):
                attended = level in attention_levels and (i == blocks or not song)
                self.dec[f"{name}_block{i}"] = block(c + skips.pop(), width, heads[level] if attended else 0)
                c = width
        norm, conv = nn.GroupNorm(32, c, 1e-6 if song else 1e-5), nn.Conv2d(c, images, 3, padding=1)
        if song:
            self.dec[f"{self.names[0]}_aux_norm"], self.dec[f"{self.names[0]}_aux_conv"] = norm, conv
        else:
            self.out_norm, self.out_conv = norm, conv

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: `(b, images, h, w)`, t: `(b,)`, labels: `(b,)` int or None. Returns `(b, images, h, w)`."""
        *_, (_, output) = self.activations(x, t, labels)
        return output

    def _time(self, t: Tensor, labels: Tensor | None) -> Tensor:
        if hasattr(self, "map_noise"):
            angles = torch.outer(t, 2 * math.pi * self.map_noise["weight"].to(t.dtype))
        else:
            half = self.channels // 2
            powers = torch.arange(half, dtype=t.dtype) / (half - self.song)
            angles = torch.outer(t, (1 / 10000) ** powers)
        waves = [angles.sin(), angles.cos()]
        features = torch.cat(waves if self.song else waves[::-1], dim=1)
        if labels is not None and self.song:
            features = features + self.map_label(labels)
        time = self.map_layer1(F.silu(self.map_layer0(features)))
        return time if labels is None or self.song else time + self.map_label(labels)

    def activations(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every block's output, in the order computed, by the names of `jddim.models.unet.UNet.activations`."""
        embedding = self._time(t.to(x.dtype), labels)
        yield "time_embed", embedding
        time = F.silu(embedding)
        aux = x
        h = self.enc[f"{self.names[0]}_conv"](x)
        yield "conv_in", h
        skips = [h]
        for level, name in enumerate(self.names):
            if level:
                (h,) = _outputs(self.enc[f"{name}_down"], h, time)
                yield f"down.{level - 1}.downsample", h
                if f"{name}_aux_residual" in self.enc:
                    coarse = resampled(self.enc[f"{name}_aux_residual"](aux), self.taps, "down", padding=0)
                    h = aux = (h + coarse) / math.sqrt(2)
                    yield f"down.{level - 1}.pyramid", h
                skips.append(h)
            for i in range(self.blocks):
                for kind, made in zip(("block", "attn"), _outputs(self.enc[f"{name}_block{i}"], h, time), strict=False):
                    yield f"down.{level}.{kind}.{i}", made
                h = made
                skips.append(h)
        last = self.names[-1]
        for kind, made in zip(("block_1", "attn_1"), _outputs(self.dec[f"{last}_in0"], h, time), strict=True):
            yield f"mid.{kind}", made
        (h,) = _outputs(self.dec[f"{last}_in1"], made, time)
        yield "mid.block_2", h
        for level, name in reversed(list(enumerate(self.names))):
            if name != last:
                (h,) = _outputs(self.dec[f"{name}_up"], h, time)
                yield f"up.{level + 1}.upsample", h
            for i in range(self.blocks + 1):
                h = torch.cat([h, skips.pop()], dim=1)
                for kind, made in zip(("block", "attn"), _outputs(self.dec[f"{name}_block{i}"], h, time), strict=False):
                    yield f"up.{level}.{kind}.{i}", made
                h = made
        norm, conv = (
            (self.dec[f"{self.names[0]}_aux_norm"], self.dec[f"{self.names[0]}_aux_conv"])
            if self.song
            else (self.out_norm, self.out_conv)
        )
        yield "conv_out", conv(F.silu(norm(h)))
