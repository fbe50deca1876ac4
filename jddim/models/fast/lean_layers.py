"""Layers of the UNet with fewer passes over memory, for TPUs and GPUs, where that is what a step in bfloat16 waits for.

`NearestConv`: doubling an image and convolving it is one convolution of the small image with zeros between its pixels,
which XLA does without multiplying by them. With z those pixels and zeros, the doubled image is z[i] + z[i - 1], so

    y[i] = sum_k w[k] (z[i + k - 1] + z[i + k - 2]) = sum_m (w[m] + w[m - 1]) z[i + m - 2],

in each direction: a 4x4 kernel, and four ninths of the products.

`NormOfParts`: a group norm whose sums are taken channel by channel first. The decoder's first norms are of two arrays
side by side: a TPU sums up an array's channels while the convolution before writes it, but not those of a
concatenation, which it reads once more; sums over each part are found as the part is made.

`Apart` and `FusedAttention` are for NVIDIA's GPUs, whose convolutions come from a library: what it adds to its result
and what it does not is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jddim.models import layers, lucidrains
from jddim.models.unet import UNet

NAMES = ("NHWC", "HWIO", "NHWC")


class NearestConv(nnx.Module):
    """An upsampling layer's place in a network, with its kernel summed: once, where it is made before a scan.

    The kernel is held reversed and reversed when used: so cuDNN has the convolution as a strided one's derivative.
    """

    def __init__(self, upsample: layers.Upsample | lucidrains.Upsample):
        conv = upsample.conv
        assert conv is not None
        assert conv.bias is not None
        assert conv.dtype is not None
        kernel = conv.kernel[...].astype(layers.at_least_float32(conv.dtype))
        w = jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
        rows = w[1:] + w[:-1]
        self.kernel = nnx.Param(lax.rev(rows[:, 1:] + rows[:, :-1], (0, 1)).astype(conv.dtype))
        self.bias = nnx.Param(conv.bias[...].astype(conv.dtype))

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        kernel, sides = lax.rev(self.kernel[...], (0, 1)), ((2, 2), (2, 2))
        y = lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, (1, 1), sides, lhs_dilation=(2, 2), dimension_numbers=NAMES
        )
        return y + self.bias[...]


class NormOfParts(nnx.Module):
    """A group norm's place: `(b, h, w, c)`, two arrays side by side, of `at` channels and the rest, or one (0).

    One pass over x: sums of differences from a value, and of their squares. Where flax's norm takes two passes, in
    float32, that is a pixel in the middle: what is lost is what it is away from the channel's mean, in squares of the
    standard deviation. Otherwise it is 0, so that a TPU can sum up before any pixel is known.
    """

    def __init__(self, norm: nnx.GroupNorm, at: int = 0):
        self.norm = norm
        self.at = at

    def __call__(self, x: Array) -> Array:
        norm, (_, h, w, c) = self.norm, x.shape
        means, variances = [], []
        for part in (x[..., : self.at], x[..., self.at :]) if self.at else (x,):  # XLA sees what was put together
            part = part.astype(norm.dtype)
            middle = part[:, h // 2, w // 2]
            near = jnp.zeros_like(middle) if norm.use_fast_variance else middle
            off = part - near[:, None, None]
            mean = off.mean(axis=(1, 2))
            means.append(near + mean)
            variances.append((off * off).mean(axis=(1, 2)) - mean * mean)
        mean, variance = (
            jnp.concatenate(values, axis=1).reshape(-1, norm.num_groups, c // norm.num_groups)
            for values in (means, variances)
        )
        between = mean - mean.mean(axis=2, keepdims=True)
        by = lax.rsqrt(jnp.maximum((variance + between * between).mean(axis=2), 0) + norm.epsilon)
        assert norm.scale is not None
        assert norm.bias is not None
        factor = jnp.repeat(by, c // norm.num_groups, axis=1) * norm.scale[...]
        mean = jnp.repeat(mean.mean(axis=2), c // norm.num_groups, axis=1)
        return (x.astype(norm.dtype) - mean[:, None, None]) * factor[:, None, None] + norm.bias[...]


class Apart(nnx.Module):
    """A convolution whose result nothing is added to but its bias.

    XLA would have cuDNN add the time embedding, written out for every pixel first; the norm that reads the result can
    add it on the way.
    """

    def __init__(self, conv: nnx.Conv):
        self.conv = conv

    def __call__(self, x: Array) -> Array:
        return lax.optimization_barrier(self.conv(x))


class FusedAttention(nnx.Module):
    """An attention's place, `(b, h, w, c)` -> the same, between convolutions of 1x1; cudnn: whether it is cuDNN's.

    cuDNN's attention does not write the weights to memory, and its convolutions add their biases and the residual;
    XLA makes one product of q's and k's, and then reads that twice to cut it and add the biases.
    """

    def __init__(self, attention: layers.Attention, *, cudnn: bool):
        self.attention = attention
        self.cudnn = cudnn

    def __call__(self, x: Array) -> Array:
        plain, (b, h, w, c) = self.attention, x.shape
        pixels = x if plain.norm is None else plain.norm(x)
        q, k, v = (
            _pointwise(linear, pixels).reshape(b, h * w, plain.heads, c // plain.heads)
            for linear in (plain.q, plain.k, plain.v)
        )
        mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn") if self.cudnn else plain.mix(q, k, v)
        y = x + _pointwise(plain.out, mixed.reshape(b, h, w, c))
        return y if plain.scale == 1 else y / plain.scale


def _pointwise(linear: nnx.Linear, x: Array) -> Array:
    """A product of each pixel, as a convolution."""
    kernel = linear.kernel[...].astype(linear.dtype)[None, None]
    y = lax.conv_general_dilated(x.astype(kernel.dtype), kernel, (1, 1), "VALID", dimension_numbers=NAMES)
    return y if linear.bias is None else y + linear.bias[...].astype(y.dtype)


def with_tpu_layers(tree: Any) -> Any:
    """A model, or whatever holds models, with `NearestConv` and, in the decoder, `NormOfParts` in their places.

    The same function to rounding; what is given is not changed. The norms are those that take the variance in one pass
    anyway, of networks that compute in half precision.
    """

    def put(unet: UNet) -> None:
        for block, at in _of_two(unet):
            if block.norm1.use_fast_variance:
                block.norm1 = NormOfParts(block.norm1, at)  # type: ignore[assignment]

    return _replaced(_put(tree, put), _doubles, NearestConv)


def with_gpu_layers(tree: Any, capability: tuple[int, int]) -> Any:
    """A model, or whatever holds models, with all of these layers in their places, as `with_tpu_layers` otherwise.

    capability: the GPU's compute capability, on which it depends how wide a head cuDNN's attention can be.
    """

    def put(unet: UNet) -> None:
        for block, at in _of_two(unet):
            block.norm1 = NormOfParts(block.norm1, at)  # type: ignore[assignment]
        for _, module in list(nnx.iter_modules(unet)):
            if isinstance(module, layers.ResBlock) and not module.scale_shift:
                module.conv1 = Apart(module.conv1)  # type: ignore[assignment]
            if not isinstance(module, NormOfParts):  # whose own norm stays
                for name, norm in list(vars(module).items()):
                    if isinstance(norm, nnx.GroupNorm):
                        setattr(module, name, NormOfParts(norm))

    def attention(plain: layers.Attention) -> FusedAttention:
        return FusedAttention(plain, cudnn=_cudnn_has(plain, capability))

    tree = _replaced(_put(tree, put), _doubles, NearestConv)
    return _replaced(tree, lambda node: isinstance(node, layers.Attention), attention)


def _replaced(tree: Any, fits: Callable[[Any], bool], make: Callable[[Any], Any]) -> Any:
    return jax.tree.map(lambda node: make(node) if fits(node) else node, tree, is_leaf=fits)


def _put(tree: Any, put: Callable[[UNet], None]) -> Any:
    def changed(unet: UNet) -> UNet:
        unet = jax.tree.map(lambda leaf: leaf, unet)  # another one, of the same parameters
        put(unet)
        return unet

    return _replaced(tree, lambda node: isinstance(node, UNet), changed)


def _doubles(node: Any) -> bool:
    return isinstance(node, layers.Upsample | lucidrains.Upsample) and node.conv is not None


def _of_two(unet: UNet) -> Iterator[tuple[layers.ResBlock, int]]:
    """The decoder's blocks, whose input is two arrays side by side, and how many channels the first one has."""
    width = unet.config.widths[-1]
    for level, above in reversed(list(enumerate(unet.config.widths))):
        for block in unet.up[level].blocks:
            yield block, width
            width = above


def _cudnn_has(attention: layers.Attention, capability: tuple[int, int]) -> bool:
    """What jax's documentation asks of cuDNN's attention, forwards: half precision, and heads of so many channels."""
    width = attention.out.in_features // attention.heads
    # 256 on Hopper; later GPUs may have as much, which was not tried. jax looks for it on its default backend alone.
    most = 256 if capability[0] == 9 and jax.default_backend() == "gpu" else 128
    offered = capability >= (8, 0) and capability != (10, 3)  # for which jax asks for a later cuDNN
    return offered and jnp.finfo(attention.dtype).bits == 16 and width % 8 == 0 and width <= most
