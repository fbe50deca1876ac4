"""The UNet of Ho et al. (arXiv:2006.11239, appendix B) in plain PyTorch.

Parameters carry the names that the checkpoints of ermongroup/ddim and pesser/pytorch_diffusion use, so their
state dicts load with `strict=True` and no renaming. Inference only: there is no dropout.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recorded import recorded


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal embedding of the timestep: all sines, then all cosines, frequencies 1 down to 1/10000.

    t: `(b,)`, int or float. dim: at least 4; an odd dim ends in one zero. Returns `(b, dim)` in dtype, every
    operation rounded in that dtype (the published networks were trained with float32 angles).

    Raises ValueError for dim < 4: the exponent divides by dim // 2 - 1.
    """
    half = dim // 2
    if half < 2:
        raise ValueError(f"the timestep embedding needs at least 4 channels, got ch={dim}")
    step = -math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * step)
    angles = t.to(dtype)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, dim % 2))


def swish(x: Tensor) -> Tensor:
    """Swish, x * sigmoid(x), arXiv:1710.05941."""
    return x * torch.sigmoid(x)


class TimeEmbedding(nn.Module):
    """Timestep `(b,)` -> sinusoids -> two dense layers with a swish between -> `(b, 4 * ch)`."""

    def __init__(self, ch: int):
        super().__init__()
        self.ch = ch
        self.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])

    def forward(self, t: Tensor) -> Tensor:
        """t: `(b,)` int or float. Returns `(b, 4 * ch)` in the parameters' dtype."""
        param_dtype = next(self.parameters()).dtype
        # Angles reach 1000: half precision would lose all but the largest frequencies' integer part.
        angle_dtype = torch.float64 if param_dtype == torch.float64 else torch.float32
        sinusoids = timestep_embedding(t, self.ch, angle_dtype).to(param_dtype)
        return self.dense[1](swish(self.dense[0](sinusoids)))


class ResnetBlock(nn.Module):
    """norm, swish, conv; plus the time embedding; norm, swish, conv; plus the (projected) input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int,
        conv_shortcut: bool,
        norm_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut_name: str | None = None
        if in_channels != out_channels:
            # Two attribute names for one role, because the checkpoints have two.
            if conv_shortcut:
                self.shortcut_name = "conv_shortcut"
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.shortcut_name = "nin_shortcut"
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x: `(b, in_channels, h, w)`, temb: `(b, temb_channels)`. Returns `(b, out_channels, h, w)`."""
        h = self.conv1(swish(self.norm1(x)))
        h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(swish(self.norm2(h)))
        return (x if self.shortcut_name is None else getattr(self, self.shortcut_name)(x)) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the h * w positions, scaled by channels ** -0.5, plus the input."""

    def __init__(self, channels: int, *, norm_groups: int, norm_eps: float):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))  # each (b, c, h * w)
        scores = torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5
        attended = torch.einsum("bij,bcj->bci", scores.softmax(dim=2), v)
        return x + self.proj_out(attended.reshape(x.shape))


class Downsample(nn.Module):
    """Halves h and w: a stride-2 3x3 conv padded at the bottom and right only, or 2x2 average pooling."""

    def __init__(self, channels: int, *, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns `(b, c, h // 2, w // 2)`."""
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Doubles h and w by nearest neighbour, then a 3x3 conv when with_conv."""

    def __init__(self, channels: int, *, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns `(b, c, 2 * h, 2 * w)`."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Level(nn.Module):
    """The blocks of one resolution on one side of the UNet; `attn` is empty or has one entry per block.

    On the way down `downsample` ends every level but the deepest, on the way up `upsample` every level but 0.
    """

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, block: list[nn.Module], attn: list[nn.Module]):
        super().__init__()
        self.block = nn.ModuleList(block)
        self.attn = nn.ModuleList(attn)

    def apply_block(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        """Residual block i, then its attention where the level has any."""
        h = self.block[i](x, temb)
        return self.attn[i](h) if len(self.attn) else h


class Middle(nn.Module):
    """Block, attention, block at the deepest resolution."""

    def __init__(self, block_1: nn.Module, attn_1: nn.Module, block_2: nn.Module):
        super().__init__()
        self.block_1 = block_1
        self.attn_1 = attn_1
        self.block_2 = block_2

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x: `(b, c, h, w)`, temb: `(b, 4 * ch)`. Returns the shape of x."""
        return self.block_2(self.attn_1(self.block_1(x, temb)), temb)


class ReferenceUNet(nn.Module):
    """The noise-predicting UNet of DDPM, wired as in ermongroup/ddim and pesser/pytorch_diffusion.

    ch: base channels, at least 4; the time embedding has 4 * ch. ch_mult: one multiplier per resolution, the
    first at full resolution. num_res_blocks: residual blocks per level going down (one more going up).
    attn_levels: level indices (0 = full resolution) whose blocks are followed by attention; the middle always
    has one. resamp_with_conv: False resamples by average pooling and nearest neighbour alone. conv_shortcut:
    a 3x3 convolution named `conv_shortcut`, in place of a 1x1 one named `nin_shortcut`, where a block changes
    channels. norm_groups must divide every level's channels and those of every concatenation with a skip.

    Raises ValueError for ch < 4, no levels, fewer than one block, an attention level that does not exist, or
    channels that norm_groups does not divide.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_levels: Sequence[int],
        in_channels: int,
        out_ch: int,
        resamp_with_conv: bool = True,
        conv_shortcut: bool = False,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        levels = len(ch_mult)
        if ch < 4:
            raise ValueError(f"ch must be at least 4 (the timestep embedding divides by ch // 2 - 1), got {ch}")
        if levels == 0:
            raise ValueError("ch_mult must have at least one entry, got none")
        if num_res_blocks < 1:
            raise ValueError(f"num_res_blocks must be at least 1, got {num_res_blocks}")
        absent = [level for level in attn_levels if not 0 <= level < levels]
        if absent:
            raise ValueError(f"attn_levels must be within 0..{levels - 1} for ch_mult={tuple(ch_mult)}, got {absent}")

        def make_block(c_in: int, c_out: int) -> nn.Module:
            for c in (c_in, c_out):
                if c % norm_groups:
                    raise ValueError(f"norm_groups={norm_groups} does not divide the {c} channels of a block")
            return ResnetBlock(
                c_in,
                c_out,
                temb_channels=4 * ch,
                conv_shortcut=conv_shortcut,
                norm_groups=norm_groups,
                norm_eps=norm_eps,
            )

        def make_attn(level: int, c: int, count: int) -> list[nn.Module]:
            if level not in attn_levels:
                return []
            return [AttnBlock(c, norm_groups=norm_groups, norm_eps=norm_eps) for _ in range(count)]

        self.ch_mult = tuple(ch_mult)
        self.num_res_blocks = num_res_blocks

        self.temb = TimeEmbedding(ch)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        widths = [ch * mult for mult in ch_mult]
        skips = [ch]  # channels of every tensor kept for the way up, in the order kept
        c = ch
        down = []
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(make_block(c, width))
                c = width
                skips.append(c)
            stage = Level(blocks, make_attn(level, width, num_res_blocks))
            if level != levels - 1:
                stage.downsample = Downsample(c, with_conv=resamp_with_conv)
                skips.append(c)
            down.append(stage)
        self.down = nn.ModuleList(down)

        attn_1 = AttnBlock(c, norm_groups=norm_groups, norm_eps=norm_eps)
        self.mid = Middle(make_block(c, c), attn_1, make_block(c, c))

        up = []
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(make_block(c + skips.pop(), width))
                c = width
            stage = Level(blocks, make_attn(level, width, num_res_blocks + 1))
            if level != 0:
                stage.upsample = Upsample(c, with_conv=resamp_with_conv)
            up.append(stage)
        self.up = nn.ModuleList(reversed(up))  # up[0] is full resolution, though it runs last

        self.norm_out = nn.GroupNorm(norm_groups, c, eps=norm_eps)
        self.conv_out = nn.Conv2d(c, out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise in x at timestep t.

        x: `(b, in_channels, h, w)` in the parameters' dtype, h and w divisible by 2 ** (levels - 1), not
        necessarily equal. t: `(b,)`, int or float. Returns `(b, out_ch, h, w)`.

        Raises ValueError when h or w does not divide.
        """
        factor = 2 ** (len(self.ch_mult) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"height and width must be divisible by {factor} (ch_mult has {len(self.ch_mult)} levels), "
                f"got {x.shape[2]}x{x.shape[3]}"
            )
        temb = self.temb(t)

        h = self.conv_in(x)
        skips = [h]
        for level, stage in enumerate(self.down):
            assert isinstance(stage, Level)
            for i in range(self.num_res_blocks):
                h = stage.apply_block(i, h, temb)
                skips.append(h)
            if level != len(self.down) - 1:
                h = stage.downsample(h)
                skips.append(h)

        h = self.mid(h, temb)

        for level, stage in reversed(list(enumerate(self.up))):
            assert isinstance(stage, Level)
            for i in range(self.num_res_blocks + 1):
                h = stage.apply_block(i, torch.cat([h, skips.pop()], dim=1), temb)
            if level != 0:
                h = stage.upsample(h)

        return self.conv_out(swish(self.norm_out(h)))

    def activations(self, x: Tensor, t: Tensor, labels: None = None) -> Iterable[tuple[str, Tensor]]:
        """Every block's output in the order computed, named as in `jddim.models.unet.UNet.activations`; no gradients.

        x, t: as for `forward`; this network takes no labels. `time_embed` is `(b, 4 * ch)`, all others `(b, c, h, w)`;
        `conv_out`, the last, is the model's output.
        """
        kinds = (ResnetBlock, AttnBlock, Downsample, Upsample)
        parts: dict[str, nn.Module] = {n: m for n, m in self.named_modules() if isinstance(m, kinds)}
        parts |= {"time_embed": self.temb, "conv_in": self.conv_in, "conv_out": self.conv_out}
        return recorded(self, parts, x, t).items()


def redraw_(model: nn.Module, seed: int) -> None:
    """Redraws every parameter in place, so that no zero-initialised layer hides an error behind it.

    Weights are N(0, 1 / fan_in) (standard deviation fan_in ** -0.5), norm scales N(1, 0.2 ** 2), all biases
    N(0, 0.2 ** 2). Values depend on seed and on the parameters' order and shapes alone: they are drawn in
    float64 and rounded, so a float32 and a float64 model agree to float32 rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.GroupNorm)}
    with torch.no_grad():
        for param in model.parameters():
            draw = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if id(param) in norms:
                draw = 1 + 0.2 * draw
            elif param.ndim == 1:
                draw = 0.2 * draw
            else:
                draw = draw * param[0].numel() ** -0.5
            param.copy_(draw)
