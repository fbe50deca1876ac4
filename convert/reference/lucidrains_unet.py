"""The UNet of denoising-diffusion-pytorch 2.x in plain PyTorch, under the source's parameter names. NCHW.

Written from the source's semantics: what it computes, in the order it computes it. No dropout and no flash attention,
which change nothing at inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .recorded import recorded


class RMSNorm(nn.Module):
    """Unit length over the channels, times g and the root of their number. `(b, c, h, w)` -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. A pixel shorter than 1e-12 is divided by that."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / length.clamp(min=1e-12) * self.g * x.shape[1] ** 0.5


class SinusoidalPosEmb(nn.Module):
    """t `(b,)` -> sines, then cosines, `(b, dim)`; frequencies 1 down to 1 / theta. dim is even."""

    def __init__(self, dim: int, theta: float):
        super().__init__()
        self.count, self.theta = dim // 2, theta

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Every operation is rounded in dtype."""
        i = torch.arange(self.count, dtype=dtype, device=t.device)
        angles = t.to(dtype)[:, None] * torch.exp(i * -(math.log(self.theta) / (self.count - 1)))[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class LearnedSinusoidalPosEmb(nn.Module):
    """t `(b,)` -> t, sines, cosines of 2 pi t w, `(b, dim + 1)`, for learned or random w."""

    def __init__(self, dim: int):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Every operation is rounded in dtype."""
        t = t.to(dtype)[:, None]
        angles = t * self.weights.to(dtype)[None, :] * 2 * math.pi
        return torch.cat([t, angles.sin(), angles.cos()], dim=1)


class TimeMLP(nn.Sequential):
    """Embedding, linear, exact gelu, linear: `(b,)` -> `(b, out)`."""

    def __init__(self, embedding: nn.Module, features: int, out: int):
        super().__init__(embedding, nn.Linear(features, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, t: Tensor) -> Tensor:
        """t: `(b,)` int or float. Angles are at least float32."""
        dtype = next(self[3].parameters()).dtype
        features = self[0](t, torch.promote_types(dtype, torch.float32)).to(dtype)
        return self[3](self[2](self[1](features)))


class Block(nn.Module):
    """3x3 convolution, norm, scale and shift (or none), silu."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.proj = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm = RMSNorm(channels_out)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: `(b, in, h, w)`, scale and shift `(b, out, 1, 1)`. Returns `(b, out, h, w)`."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResnetBlock(nn.Module):
    """Two blocks, the first told the time, plus the input, through a 1x1 where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, time_width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * channels_out))
        self.block1 = Block(channels_in, channels_out)
        self.block2 = Block(channels_out, channels_out)
        self.res_conv = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: `(b, in, h, w)`, time: `(b, time_width)`. Returns `(b, out, h, w)`."""
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, (scale, shift))) + self.res_conv(x)


class Attention(nn.Module):
    """Self-attention over pixels and learned keys and values; the residual is the network's."""

    def __init__(self, channels: int, heads: int, dim_head: int, memory: int):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, memory, dim_head)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        b, _, h, w = x.shape
        q, k, v = (  # each (b, heads, h * w, dim_head)
            part.reshape(b, self.heads, -1, h * w).transpose(2, 3) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        if self.mem_kv is not None:
            k, v = (torch.cat([m.expand(b, -1, -1, -1), p], dim=2) for m, p in zip(self.mem_kv, (k, v), strict=True))
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)
        return self.to_out((weights @ v).transpose(2, 3).reshape(b, -1, h, w))


class LinearAttention(nn.Module):
    """Queries' softmax over a head's channels, keys' over positions and memory; the residual is the network's."""

    def __init__(self, channels: int, heads: int, dim_head: int, memory: int):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, memory)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, channels, 1), RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        b, _, h, w = x.shape
        q, k, v = (  # each (b, heads, dim_head, h * w)
            part.reshape(b, self.heads, -1, h * w) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        if self.mem_kv is not None:
            k, v = (torch.cat([m.expand(b, -1, -1, -1), p], dim=3) for m, p in zip(self.mem_kv, (k, v), strict=True))
        q = q.softmax(dim=2) * q.shape[2] ** -0.5
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=3), v)
        return self.to_out(torch.einsum("bhde,bhdn->bhen", context, q).reshape(b, -1, h, w))


class PreNormed(nn.Module):
    """An attention under the names that it has in classifier_free_guidance.py: `fn.fn`, and its norm `fn.norm`."""

    def __init__(self, attention: Attention | LinearAttention):
        super().__init__()
        self.fn = nn.Module()
        self.fn.fn, self.fn.norm, attention.norm = attention, attention.norm, nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        return self.fn.fn(self.fn.norm(x))  # type: ignore[operator]


class PixelUnshuffle(nn.Module):
    """Each 2x2 square into the channels, ordered by channel, row, column: `(b, c, h, w)` -> `(b, 4 c, h/2, w/2)`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`, h and w even."""
        return F.pixel_unshuffle(x, 2)


class LucidrainsUNet(nn.Module):
    """The network: `(b, input channels, h, w)`, t `(b,)` -> `(b, out_dim, h, w)`.

    Arguments have the source's names; full_attn, attn_heads and attn_dim_head are one value per level. A
    self-conditioned network is given the conditioning and x_t already concatenated, in this order.
    learned_sinusoidal_dim: None for the fixed sinusoid. num_classes: of classifier_free_guidance.py's, the null class's
    row in classes_emb too.
    """

    def __init__(
        self,
        *,
        dim: int,
        init_dim: int,
        out_dim: int,
        dim_mults: Sequence[int],
        channels: int,
        self_condition: bool,
        full_attn: Sequence[bool],
        attn_heads: Sequence[int],
        attn_dim_head: Sequence[int],
        num_mem_kv: int = 4,
        learned_sinusoidal_dim: int | None = None,
        sinusoidal_pos_emb_theta: float = 10000,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.factor = 2 ** (len(dim_mults) - 1)
        time_width = 4 * dim
        widths = [init_dim, *(dim * mult for mult in dim_mults)]

        def block(channels_in: int, channels_out: int) -> nn.Module:
            return ResnetBlock(channels_in, channels_out, time_width * (1 if num_classes is None else 2))

        def attention(level: int, width: int, full: bool) -> nn.Module:
            kind = Attention if full else LinearAttention
            made = kind(width, attn_heads[level], attn_dim_head[level], num_mem_kv)
            return made if num_classes is None else PreNormed(made)

        self.init_conv = nn.Conv2d(channels * (1 + self_condition), init_dim, 7, padding=3)
        if learned_sinusoidal_dim is None:
            self.time_mlp = TimeMLP(SinusoidalPosEmb(dim, sinusoidal_pos_emb_theta), dim, time_width)
        else:
            embedding = LearnedSinusoidalPosEmb(learned_sinusoidal_dim)
            self.time_mlp = TimeMLP(embedding, learned_sinusoidal_dim + 1, time_width)

        if num_classes is not None:
            self.classes_emb = nn.Embedding(num_classes, dim)
            self.classes_mlp = nn.Sequential(nn.Linear(dim, time_width), nn.GELU(), nn.Linear(time_width, time_width))

        last = len(dim_mults) - 1
        downs, ups = [], []
        for level, (width, deeper) in enumerate(pairwise(widths)):
            shrink = (
                nn.Conv2d(width, deeper, 3, padding=1)
                if level == last
                else nn.Conv2d(width, deeper, 4, stride=2, padding=1)
                if num_classes is not None
                else nn.Sequential(PixelUnshuffle(), nn.Conv2d(4 * width, deeper, 1))
            )
            attend = attention(level, width, full_attn[level])
            downs.append(nn.ModuleList([block(width, width), block(width, width), attend, shrink]))
            grow = nn.Conv2d(deeper, width, 3, padding=1)
            attend = attention(level, deeper, full_attn[level])
            ups.append(
                nn.ModuleList(
                    [
                        block(deeper + width, deeper),
                        block(deeper + width, deeper),
                        attend,
                        grow if level == 0 else nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), grow),
                    ]
                )
            )
        self.downs = nn.ModuleList(downs)
        self.ups = nn.ModuleList(reversed(ups))  # in the order that they run
        self.mid_block1 = block(widths[-1], widths[-1])
        self.mid_attn = attention(last, widths[-1], True)
        self.mid_block2 = block(widths[-1], widths[-1])
        self.final_res_block = block(2 * init_dim, init_dim)
        self.final_conv = nn.Conv2d(init_dim, out_dim, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: `(b, input channels, h, w)` in the parameters' dtype, t: `(b,)`. Raises ValueError if the size is odd."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}, got {x.shape[2]}x{x.shape[3]}")
        x = stem = self.init_conv(x)
        time = self.time_mlp(t)
        if labels is not None:
            time = torch.cat([time, self.classes_mlp(self.classes_emb(labels))], dim=1)
        skips = []
        for level in self.downs:
            block1, block2, attention, shrink = level.children()
            x = block1(x, time)
            skips.append(x)
            x = block2(x, time)
            x = attention(x) + x
            skips.append(x)
            x = shrink(x)
        x = self.mid_block1(x, time)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, time)
        for level in self.ups:
            block1, block2, attention, grow = level.children()
            x = block1(torch.cat([x, skips.pop()], dim=1), time)
            x = block2(torch.cat([x, skips.pop()], dim=1), time)
            x = attention(x) + x
            x = grow(x)
        return self.final_conv(self.final_res_block(torch.cat([x, stem], dim=1), time))

    def activations(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Iterable[tuple[str, Tensor]]:
        """Every module's output by its name in the source, in the order computed, the model's last. No gradients.

        `init_conv`, `time_mlp`, `classes_mlp` (where there are classes), `downs.{i}.{0..3}` (block, block, attention
        without its residual, resampling), `mid_block1`, `mid_attn`, `mid_block2`, `ups.{i}.{0..3}`, `final_res_block`,
        `final_conv`.
        """
        parts = {name: module for name, module in self.named_children() if name not in ("downs", "ups", "classes_emb")}
        for side in ("downs", "ups"):
            for i, level in enumerate(getattr(self, side)):
                parts |= {f"{side}.{i}.{j}": module for j, module in enumerate(level)}
        return recorded(self, parts, x, t, *([] if labels is None else [labels])).items()
