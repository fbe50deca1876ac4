"""Layers of the UNet with fewer passes over memory, for TPUs, where that is what a step in bfloat16 waits for.

`NearestConv`: doubling an image and convolving it is one convolution of the small image with zeros between its pixels,
which XLA does without multiplying by them. With z those pixels and zeros, the doubled image is z[i] + z[i - 1], so

    y[i] = sum_k w[k] (z[i + k - 1] + z[i + k - 2]) = sum_m (w[m] + w[m - 1]) z[i + m - 2],

in each direction: a 4x4 kernel, and four ninths of the products.

`NormOfParts`: the decoder's first norms are of two arrays side by side. XLA sums up an array's channels while the
convolution before writes it, but not those of a concatenation, which it reads once more. Sums over each part are found
as the part is made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jddim.models import layers, lucidrains
from jddim.models.unet import UNet


class NearestConv(nnx.Module):
    """An upsampling layer's place in a network, with its kernel summed: once, where it is made before a scan."""

    def __init__(self, upsample: layers.Upsample | lucidrains.Upsample):
        conv = upsample.conv
        assert conv is not None
        assert conv.bias is not None
        w = jnp.pad(conv.kernel[...], ((1, 1), (1, 1), (0, 0), (0, 0)))
        rows = w[1:] + w[:-1]
        self.kernel = nnx.Param((rows[:, 1:] + rows[:, :-1]).astype(conv.dtype))
        self.bias = nnx.Param(conv.bias[...].astype(conv.dtype))

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        kernel, sides = self.kernel[...], ((2, 2), (2, 2))
        names = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, (1, 1), sides, lhs_dilation=(2, 2), dimension_numbers=names
        )
        return y + self.bias[...]


class NormOfParts(nnx.Module):
    """A group norm's place, where its input is two arrays side by side: `at` channels, and the rest.

    As flax's with use_fast_variance, E[x^2] - E[x]^2 in float32.
    """

    def __init__(self, norm: nnx.GroupNorm, at: int):
        self.norm = norm
        self.at = at

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        groups = self.norm.num_groups
        sums, squares = [], []
        for part in (x[..., : self.at], x[..., self.at :]):  # XLA sees what was put together
            part = part.astype(jnp.float32)
            sums.append(part.sum(axis=(1, 2)))
            squares.append((part * part).sum(axis=(1, 2)))
        mean, square = (
            jnp.concatenate(parts, axis=1).reshape(b, groups, -1).sum(axis=2) / (h * w * (c // groups))
            for parts in (sums, squares)
        )
        by = lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.norm.epsilon)
        mean, by = (jnp.repeat(value, c // groups, axis=1)[:, None, None] for value in (mean, by))
        assert self.norm.scale is not None
        assert self.norm.bias is not None
        return (x.astype(jnp.float32) - mean) * (by * self.norm.scale[...]) + self.norm.bias[...]


def with_tpu_layers(tree: Any) -> Any:
    """A model, or whatever holds models, with these layers in the places they are for.

    The same function to rounding; what is given is not changed. `NormOfParts` is for norms that take the variance in
    one pass anyway, those of networks that compute in half precision.
    """
    tree = jax.tree.map(
        lambda node: _norms_of_parts(node) if isinstance(node, UNet) else node,
        tree,
        is_leaf=lambda node: isinstance(node, UNet),
    )
    return jax.tree.map(lambda node: NearestConv(node) if _doubles(node) else node, tree, is_leaf=_doubles)


def _doubles(node: Any) -> bool:
    return isinstance(node, layers.Upsample | lucidrains.Upsample) and node.conv is not None


def _norms_of_parts(unet: UNet) -> UNet:
    unet = jax.tree.map(lambda leaf: leaf, unet)  # another one, of the same parameters
    width = unet.config.widths[-1]
    for level, above in reversed(list(enumerate(unet.config.widths))):
        for block in unet.up[level].blocks:
            if block.norm1.use_fast_variance:
                block.norm1 = NormOfParts(block.norm1, width)  # type: ignore[assignment]
            width = above
    return unet
