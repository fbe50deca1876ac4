"""Layers for TPUs and GPUs that pass over memory less often. In bfloat16 a step waits for memory more than for
products.

`NearestConv` replaces "double the image, then convolve" by one convolution of the small image with zeros between its
pixels; XLA does not multiply by these zeros. Let z be the pixels and zeros. The doubled image is z[i] + z[i - 1], so
in each direction

    y[i] = sum_k w[k] (z[i + k - 1] + z[i + k - 2]) = sum_m (w[m] + w[m - 1]) z[i + m - 2].

This is a 4x4 kernel, with four ninths of the products.

`NormOfParts` is a group norm that sums each channel first. The decoder's first norms read two arrays side by side. A
TPU sums the channels of an array while the convolution before it writes the array, but it reads a concatenation once
more. So each part's sums are taken from the part.

`Apart` and `FusedAttention` are for NVIDIA GPUs, where convolutions come from a library, cuDNN. They decide what
cuDNN adds to the result of a convolution.
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
    """Stands in a network for an upsampling layer. The kernel is summed once, when the layer is made before a scan.

    The layer stores the reversed kernel and reverses it again in each call: then cuDNN computes the convolution as the
    derivative of a strided convolution.
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
    """Stands in a network for a group norm of x `(b, h, w, c)`.

    at: x is two arrays side by side, the first with `at` channels; 0: x is one array.

    One pass over x sums the differences from a reference value, and their squares. For norms that flax computes in two
    passes (float32), the reference is the middle pixel of each channel; precision is lost by the square of that pixel's
    distance from the mean, in standard deviations. For the other norms the reference is 0, so that a TPU can sum before
    any pixel is known.
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
    """Stands for a convolution, and keeps cuDNN from adding anything but the bias to its result.

    Otherwise XLA writes the time embedding out for every pixel and lets cuDNN add it; the norm that reads the result
    adds it without another pass.
    """

    def __init__(self, conv: nnx.Conv):
        self.conv = conv

    def __call__(self, x: Array) -> Array:
        y: Array = lax.optimization_barrier(self.conv(x))
        return y


class FusedAttention(nnx.Module):
    """Stands for an attention layer, `(b, h, w, c)` -> the same shape; q, k, v and the output are 1x1 convolutions.

    cudnn: take cuDNN's attention, which does not write the attention weights to memory.

    cuDNN's convolutions add the biases and the residual. XLA would compute q and k as one product, then read the
    product twice, to cut it and to add the biases.
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
        mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn") if self.cudnn else layers.attend(q, k, v)
        y = x + _pointwise(plain.out, mixed.reshape(b, h, w, c))
        return y if plain.scale == 1 else y / plain.scale


def _pointwise(linear: nnx.Linear, x: Array) -> Array:
    """A linear layer of each pixel, computed as a 1x1 convolution."""
    kernel = linear.kernel[...].astype(linear.dtype)[None, None]
    y = lax.conv_general_dilated(x.astype(kernel.dtype), kernel, (1, 1), "VALID", dimension_numbers=NAMES)
    return y if linear.bias is None else y + linear.bias[...].astype(y.dtype)


def with_tpu_layers(tree: Any) -> Any:
    """A copy of a model, or of a pytree of models, with `NearestConv` and, in the decoder, `NormOfParts`.

    The copy computes the same function to rounding, and the original stays unchanged. Only norms that compute the
    variance in one pass are replaced: norms of networks in half precision.
    """

    def put(unet: UNet) -> None:
        for block, at in _of_two(unet):
            if block.norm1.use_fast_variance:
                block.norm1 = NormOfParts(block.norm1, at)  # type: ignore[assignment]

    return _replaced(_put(tree, put), _doubles, NearestConv)


def with_gpu_layers(tree: Any, capability: tuple[int, int]) -> Any:
    """A copy of a model, or of a pytree of models, with all layers of this module.

    The copy computes the same function to rounding, and the original stays unchanged.

    capability: the GPU's compute capability, which limits the width of heads in cuDNN's attention.
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
    """The blocks of the decoder, each with the number of channels of the first of its two input arrays."""
    width = unet.config.widths[-1]
    for level, above in reversed(list(enumerate(unet.config.widths))):
        for block in unet.up[level].blocks:
            yield block, width
            width = above


def _cudnn_has(attention: layers.Attention, capability: tuple[int, int]) -> bool:
    """Whether cuDNN's forward attention takes this layer, by jax's documentation: half precision, narrow heads."""
    width = attention.out.in_features // attention.heads
    # 256 on Hopper; later GPUs may have as much, which was not tried. jax looks for it on its default backend alone.
    most = 256 if capability[0] == 9 and jax.default_backend() == "gpu" else 128
    offered = capability >= (8, 0) and capability != (10, 3)  # for which jax asks for a later cuDNN
    return offered and jnp.finfo(attention.dtype).bits == 16 and width % 8 == 0 and width <= most
