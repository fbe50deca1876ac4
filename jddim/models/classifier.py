"""The classifier of noisy images of OpenAI's guided-diffusion (arXiv:2105.05233): half of its UNet, then logits."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import ClassifierConfig
from jddim.models.layers import group_norm, linear
from jddim.models.unet import Encoder


class AttentionPool(nnx.Module):
    """Attention of the pixels' mean over itself and all pixels: `(b, h, w, channels)` -> `(b, outputs)`.

    The mean, then the pixels, have learned positions, `(channels, 1 + h w)`. CLIP's (arXiv:2103.00020).
    """

    def __init__(self, channels: int, outputs: int, *, positions: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        drawn = jax.random.normal(rngs.params(), (channels, 1 + positions), jnp.float32)
        self.positional_embedding = nnx.Param(drawn / channels**0.5)
        self.q = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.out = linear(channels, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, _, _, c = x.shape
        pixels = x.reshape(b, -1, c)
        tokens = jnp.concatenate([pixels.mean(1, keepdims=True), pixels], axis=1)
        tokens = tokens + self.positional_embedding[...].astype(x.dtype).T[None]
        q, k, v = (
            project(part).reshape(b, -1, self.heads, c // self.heads)
            for project, part in ((self.q, tokens[:, :1]), (self.k, tokens), (self.v, tokens))  # of the mean alone
        )
        return self.out(jax.nn.dot_product_attention(q, k, v).reshape(b, c))


class Classifier(nnx.Module):
    """Logits `(b, num_classes)`, in x_t's dtype: `classifier(x_t, t)`, x_t `(b, h, w, in_channels)` float.

    t: int or float, `(b,)` or one for all, as the guided network is given it. Raises ValueError for images of another
    size, where the pooling has positions.
    """

    def __init__(self, config: ClassifierConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        half = config.encoder
        width = half.widths[-1]
        self.encoder = Encoder(half, dtype=dtype, rngs=rngs)
        self.norm_out = group_norm(width, half.norm_groups, half.norm_epsilon, dtype=dtype, rngs=rngs)
        self.pool = (
            AttentionPool(
                width,
                config.num_classes,
                positions=config.positions,
                heads=half.heads(width),
                dtype=dtype,
                rngs=rngs,
            )
            if config.pool == "attention"
            else linear(width, config.num_classes, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x_t: Array, t: ArrayLike, labels: None = None) -> Array:
        *_, (_, logits) = self.activations(x_t, t)
        return logits.astype(x_t.dtype)

    def activations(self, x_t: Array, t: ArrayLike, labels: None = None) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per block in the order computed, as `UNet.activations`."""
        size = self.config.image_size
        if self.config.pool == "attention" and x_t.shape[1:3] != size:
            raise ValueError(f"Classifier: x_t must be of {size[0]}x{size[1]} pixels, got {x_t.shape}")
        h, _ = yield from self.encoder.encoded(x_t, t, None, [])
        h = jax.nn.silu(self.norm_out(h))
        yield "logits", self.pool(h) if isinstance(self.pool, AttentionPool) else self.pool(h.mean((1, 2)))
