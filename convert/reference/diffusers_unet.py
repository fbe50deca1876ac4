"""diffusers' UNet2DModel in plain PyTorch, so that verification does not need diffusers.

Parameters and options carry diffusers' own names: its state dicts load with `strict=True`, and a `config.json` gives
the arguments. Inference only: there is no dropout. The blocks that `convert.families.diffusers` refuses are not here.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}


class Sinusoid(nn.Module):
    """t `(b,)` -> `(b, channels)`: sines then cosines, or with `flip` the other way round. No parameters.

    In float32, as diffusers', unless t is float64.
    """

    def __init__(self, channels: int, flip: bool, shift: float):
        super().__init__()
        self.channels, self.flip, self.shift = channels, flip, shift

    def forward(self, t: Tensor) -> Tensor:
        """t: `(b,)` int or float. Returns `(b, channels)`; an odd number ends in a zero."""
        half = self.channels // 2
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        exponents = -math.log(10000) * torch.arange(half, dtype=dtype) / (half - self.shift)
        angles = t[:, None].to(dtype) * exponents.exp()
        waves = [angles.sin(), angles.cos()]
        return F.pad(torch.cat(waves[::-1] if self.flip else waves, dim=1), (0, self.channels % 2))


class Fourier(nn.Module):
    """t `(b,)` -> `(b, 2 channels)`: sines, then cosines, of 2 pi log t times fixed frequencies."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(16 * torch.randn(channels))

    def forward(self, t: Tensor) -> Tensor:
        """t: `(b,)` int or float, above 0 (0 gives NaN). Returns `(b, 2 channels)`."""
        angles = t.log()[:, None] * self.weight * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimestepEmbedding(nn.Module):
    """Linear, silu, linear."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels_in, channels_out)
        self.linear_2 = nn.Linear(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, channels_in)`. Returns `(b, channels_out)`."""
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """norm, act, (resample,) conv, time, norm, act, conv; plus the input; over `scale`."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        temb: int,
        groups: int,
        eps: float,
        act: str,
        scale_shift: bool,
        resample: str | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.act, self.scale_shift, self.resample, self.scale = ACTIVATIONS[act], scale_shift, resample, scale
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb, channels_out * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x: `(b, channels_in, h, w)`, temb: `(b, temb)`. Returns `(b, channels_out, h', w')`."""
        h = self.act(self.norm1(x))
        if self.resample is not None:
            h, x = (halved(y) if self.resample == "down" else doubled(y) for y in (h, x))
        h = self.conv1(h)
        time = self.time_emb_proj(self.act(temb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.act(h))
        return ((x if self.conv_shortcut is None else self.conv_shortcut(x)) + h) / self.scale


def halved(x: Tensor) -> Tensor:
    """The mean of each 2x2 square."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Each pixel as a 2x2 square."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self-attention over the pixels in heads of `head_dim` channels; plus the input; over `scale`.

    groups None: no norm. head_dim None: one head.
    """

    def __init__(self, channels: int, *, groups: int | None, eps: float, head_dim: int | None, scale: float = 1.0):
        super().__init__()
        self.heads, self.scale = channels // (head_dim or channels), scale
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """x: `(b, c, h, w)`. Returns the same shape."""
        b, c, h, w = x.shape
        pixels = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # (b, h w, c)
        q, k, v = (
            project(pixels).view(b, h * w, self.heads, -1).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        weights = (q @ k.transpose(2, 3) * (c // self.heads) ** -0.5).softmax(dim=3)
        mixed = self.to_out[0]((weights @ v).transpose(1, 2).reshape(b, h * w, c))
        return (x + mixed.transpose(1, 2).reshape(b, c, h, w)) / self.scale


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2. padding 1: on every side; 0: below and to the right only."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x: `(b, c, h, w)`; temb is not used. Returns `(b, c, h / 2, w / 2)`."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x: `(b, c, h, w)`; temb is not used. Returns `(b, c, 2 h, 2 w)`."""
        return self.conv(doubled(x))


class Block(nn.Module):
    """A level of the encoder or decoder, or the middle: residual blocks, attentions, and what resamples at the end.

    A level has as many attentions as residual blocks, or none; the middle has them between its residual blocks.
    """

    def __init__(
        self,
        resnets: list[nn.Module],
        attentions: list[nn.Module],
        downsampler: nn.Module | None = None,
        upsampler: nn.Module | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])


class ReferenceUNet2D(nn.Module):
    """UNet2DModel, by the keys of its `config.json` (those that do not matter here, such as dropout, left out)."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        center_input_sample: bool,
        time_embedding_type: str,
        time_embedding_dim: int | None,
        freq_shift: float,
        flip_sin_to_cos: bool,
        down_block_types: Sequence[str],
        mid_block_type: str | None,
        up_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int,
        mid_block_scale_factor: float,
        downsample_padding: int,
        downsample_type: str,
        upsample_type: str,
        act_fn: str,
        attention_head_dim: int | None,
        norm_num_groups: int,
        attn_norm_num_groups: int | None,
        norm_eps: float,
        resnet_time_scale_shift: str,
        add_attention: bool,
        class_embed_type: str | None,
        num_class_embeds: int | None,
        num_train_timesteps: int | None,
    ):
        super().__init__()
        self.center_input_sample = center_input_sample
        self.fourier = time_embedding_type == "fourier"
        width, last = block_out_channels[0], len(block_out_channels) - 1
        temb = time_embedding_dim or 4 * width
        scale_shift = resnet_time_scale_shift == "scale_shift"

        def resnet(channels_in: int, channels_out: int, resample: str | None = None, scale: float = 1.0) -> ResnetBlock:
            return ResnetBlock(
                channels_in,
                channels_out,
                temb=temb,
                groups=norm_num_groups,
                eps=norm_eps,
                act=act_fn,
                scale_shift=scale_shift,
                resample=resample,
                scale=scale,
            )

        def attention(channels: int) -> Attention:
            return Attention(channels, groups=norm_num_groups, eps=norm_eps, head_dim=attention_head_dim)

        def resampling(block: str, of_attention: str) -> str:
            return of_attention if block.startswith("Attn") else "resnet" if block.startswith("Resnet") else "conv"

        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        features = 2 * width if self.fourier else width
        self.time_proj: nn.Module = {
            "fourier": lambda: Fourier(width),
            "positional": lambda: Sinusoid(width, flip_sin_to_cos, freq_shift),
            "learned": lambda: nn.Embedding(num_train_timesteps or 0, width),
        }[time_embedding_type]()
        self.time_embedding = TimestepEmbedding(features, temb)
        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(features, temb)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, temb)

        skips = [width]
        down = []
        for i, (kind, channels) in enumerate(zip(down_block_types, block_out_channels, strict=True)):
            blocks = []
            for _ in range(layers_per_block):
                blocks.append(resnet(width, channels))
                width = channels
                skips.append(width)
            attentions = [attention(width) for _ in blocks] if kind.startswith("Attn") else []
            downsampler = None
            if i < last:
                by_resnet = resampling(kind, downsample_type) == "resnet"
                downsampler = resnet(width, width, "down") if by_resnet else Downsample(width, downsample_padding)
                skips.append(width)
            down.append(Block([*blocks], [*attentions], downsampler))
        self.down_blocks = nn.ModuleList(down)

        self.mid_block: Block | None = None
        if mid_block_type is not None:
            groups = attn_norm_num_groups or (None if scale_shift else norm_num_groups)
            between = Attention(
                width, groups=groups, eps=norm_eps, head_dim=attention_head_dim, scale=mid_block_scale_factor
            )
            both = [resnet(width, width, scale=mid_block_scale_factor) for _ in range(2)]
            self.mid_block = Block([*both], [between] if add_attention else [])

        up = []
        for i, (kind, channels) in enumerate(zip(up_block_types, reversed(block_out_channels), strict=True)):
            blocks = []
            for _ in range(layers_per_block + 1):
                blocks.append(resnet(width + skips.pop(), channels))
                width = channels
            attentions = [attention(width) for _ in blocks] if kind.startswith("Attn") else []
            upsampler = None
            if i < last:
                by_resnet = resampling(kind, upsample_type) == "resnet"
                upsampler = resnet(width, width, "up") if by_resnet else Upsample(width)
            up.append(Block([*blocks], [*attentions], upsampler=upsampler))
        self.up_blocks = nn.ModuleList(up)

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: `(b, in_channels, h, w)`, t: `(b,)`, labels as the class embedding says. `(b, out_channels, h, w)`."""
        *_, (_, output) = self.activations(x, t, labels)
        return output

    def activations(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every block's output in the order computed, named as in `jddim.models.unet.UNet.activations`."""
        dtype = self.conv_in.weight.dtype
        temb = self.time_embedding(self.time_proj(t).to(dtype))
        if self.class_embedding is not None:
            if isinstance(self.class_embedding, TimestepEmbedding):
                labels = self.time_proj(labels).to(dtype)
            temb = temb + self.class_embedding(labels)
        yield "time_embed", temb

        h = self.conv_in(2 * x - 1 if self.center_input_sample else x)
        yield "conv_in", h
        skips = [h]
        for i, block in enumerate(self.down_blocks):
            assert isinstance(block, Block)
            for j, resnet in enumerate(block.resnets):
                h = resnet(h, temb)
                yield f"down.{i}.block.{j}", h
                if len(block.attentions):
                    h = block.attentions[j](h)
                    yield f"down.{i}.attn.{j}", h
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h, temb)
                yield f"down.{i}.downsample", h
                skips.append(h)

        if self.mid_block is not None:
            h = self.mid_block.resnets[0](h, temb)
            yield "mid.block_1", h
            if len(self.mid_block.attentions):
                h = self.mid_block.attentions[0](h)
                yield "mid.attn_1", h
            h = self.mid_block.resnets[1](h, temb)
            yield "mid.block_2", h

        for i, block in enumerate(self.up_blocks):
            assert isinstance(block, Block)
            level = len(self.up_blocks) - 1 - i
            for j, resnet in enumerate(block.resnets):
                h = resnet(torch.cat([h, skips.pop()], dim=1), temb)
                yield f"up.{level}.block.{j}", h
                if len(block.attentions):
                    h = block.attentions[j](h)
                    yield f"up.{level}.attn.{j}", h
            if block.upsamplers is not None:
                h = block.upsamplers[0](h, temb)
                yield f"up.{level}.upsample", h

        output = self.conv_out(F.silu(self.conv_norm_out(h)))
        yield "conv_out", output / t[:, None, None, None].to(dtype) if self.fourier else output
