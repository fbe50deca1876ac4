"""First stages of latent diffusion (arXiv:2112.10752): AutoencoderKL and VQModel, of diffusers and CompVis.

One wiring for both; a codebook is what the second has beside it. Images are NHWC in [-1, 1]; z is what the network of
latents sees, scaled.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import AutoencoderConfig, size_problems
from jddim.models.layers import Attention, Downsample, ResBlock, Upsample, at_least_float32, conv, group_norm, linear
from jddim.models.unet import Level, Middle


class Moments(NamedTuple):
    """The Gaussian of z at each pixel, unscaled: mean and log-variance, `(b, h, w, latent_channels)` each.

    The latter is clamped to -30..20, as in the sources. Of a VQModel the mean is all there is, and logvar is None.
    """

    mean: Array
    logvar: Array | None


class Half(nnx.Module):
    """Encoder or decoder, without its levels' order: convolution in, levels, middle, norm and convolution out."""

    def __init__(self, config: AutoencoderConfig, *, up: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, c = config.widths, config

        def block(channels_in: int, channels_out: int) -> ResBlock:
            return ResBlock(
                channels_in,
                channels_out,
                time_channels=None,
                groups=c.norm_groups,
                epsilon=c.norm_epsilon,
                dtype=dtype,
                rngs=rngs,
            )

        def attention(width: int) -> Attention:
            return Attention(width, groups=c.norm_groups, epsilon=c.norm_epsilon, dtype=dtype, rngs=rngs)

        before = widths[-1] if up else c.channels
        self.conv_in = conv(c.hidden if up else c.in_channels, before, 3, dtype=dtype, rngs=rngs)
        levels: dict[int, Level] = {}
        for i in reversed(range(len(widths))) if up else range(len(widths)):
            blocks = []
            for _ in range(c.num_res_blocks + up):
                blocks.append(block(before, widths[i]))
                before = widths[i]
            attentions = [attention(before) for _ in blocks] if i in c.attention_levels else []
            levels[i] = Level(
                blocks,
                attentions,
                downsample=None
                if up or i == len(widths) - 1
                else Downsample(before, with_conv=True, dtype=dtype, rngs=rngs),
                upsample=Upsample(before, with_conv=True, dtype=dtype, rngs=rngs) if up and i else None,
            )
        self.levels = nnx.List([levels[i] for i in range(len(widths))])  # level 0 is full resolution
        low = widths[-1]
        self.mid = Middle(block(low, low), attention(low) if c.mid_attention else None, block(low, low))
        self.norm_out = group_norm(before, c.norm_groups, c.norm_epsilon, dtype=dtype, rngs=rngs)
        out = c.out_channels if up else c.moments * c.hidden
        self.conv_out = conv(before, out, 3, dtype=dtype, rngs=rngs)


class Autoencoder(nnx.Module):
    """A first stage: `encode(images)` -> z, `decode(z)` -> images.

    dtype: the compute dtype; norms and softmax are never below float32. Fresh parameters are distributed as PyTorch's
    defaults; `jddim.load_autoencoder` fills them from a checkpoint.
    """

    def __init__(self, config: AutoencoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        hidden, latent, moments = config.hidden, config.latent_channels, config.moments
        self.encoder = Half(config, up=False, dtype=dtype, rngs=rngs)
        self.decoder = Half(config, up=True, dtype=dtype, rngs=rngs)
        self.quant_conv = (
            linear(moments * hidden, moments * latent, dtype=dtype, rngs=rngs) if config.quant_conv else None
        )
        self.post_quant_conv = linear(latent, hidden, dtype=dtype, rngs=rngs) if config.post_quant_conv else None
        self.codes = None if config.num_codes is None else nnx.Embed(config.num_codes, latent, rngs=rngs)

    def encode(self, images: Array, key: Array | None = None) -> Array:
        """Z `(b, h / f, w / f, latent_channels)` of images `(b, h, w, in_channels)` in [-1, 1].

        key: z is drawn from the encoder's Gaussian, image i with `fold_in(key, i)`, or with the i-th of one key an
        image; None: its mean. A VQModel has no Gaussian: ValueError for a key. Raises ValueError for images of another
        shape, too.
        """
        return self.z_of(self.moments(images), key)

    def z_of(self, moments: Moments, key: Array | None = None) -> Array:
        """Z of what `moments` returns: as `encode`, without the network."""
        mean, logvar = moments
        if key is not None:
            if logvar is None:
                raise ValueError("encode: a VQModel's z is not drawn: leave key out")
            keys = key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(mean.shape[0]))
            eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
            mean = mean + jnp.exp(0.5 * logvar) * eps
        z: Array = (mean - self.config.shift_factor) * self.config.scaling_factor
        return z

    def moments(self, images: Array) -> Moments:
        """The encoder's Gaussian, unscaled, for images `(b, h, w, in_channels)`, as `encode` takes them."""
        moments = _last(self._encoded(images)).astype(images.dtype)
        if self.config.num_codes is not None:
            return Moments(moments, None)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """Images `(b, f h, f w, out_channels)`, nominally in [-1, 1], of z `(b, h, w, latent_channels)`, as `encode`'s.

        A VQModel takes the nearest codes first. Raises ValueError for z of another shape.
        """
        return _last(self._decoded(z)).astype(z.dtype)

    def nearest_codes(self, z: Array) -> Array:
        """Each pixel of z, unscaled, as the nearest row of the codebook; the first of several that are as near."""
        assert self.codes is not None
        codes = self.codes.embedding[...].astype(z.dtype)
        # |z - e|^2 without |z|^2, which does not depend on e.
        distances = (codes**2).sum(1) - 2 * jnp.einsum("bhwc,nc->bhwn", z, codes, precision="highest")
        rows: Array = codes[jnp.argmin(distances, axis=-1)]
        return rows

    def activations(self, x_t: Array, t: ArrayLike = 0, labels: None = None) -> Iterator[tuple[str, Array]]:
        """Images there and back by the mean: one `(name, output)` per block in the order computed. t is not used."""
        moments = yield from self._encoded(x_t)
        z = moments[..., : self.config.latent_channels].astype(x_t.dtype)
        yield from self._decoded((z - self.config.shift_factor) * self.config.scaling_factor)

    def _encoded(self, images: Array) -> Generator[tuple[str, Array], None, Array]:
        c, half = self.config, self.encoder
        if images.ndim != 4 or images.shape[3] != c.in_channels or not jnp.issubdtype(images.dtype, jnp.floating):
            wanted = f"floats (b, h, w, {c.in_channels}) in [-1, 1]"
            raise ValueError(f"encode: images must be {wanted}, got {images.dtype} {images.shape}")
        if problems := size_problems(c, (images.shape[1], images.shape[2])):
            raise ValueError(f"encode: {problems[0]}")
        h = half.conv_in(images)
        yield "encoder.conv_in", h
        for i, level in enumerate(half.levels):
            h = yield from _blocks(level, h, f"encoder.level.{i}")
            if level.downsample is not None:
                h = level.downsample(h)
                yield f"encoder.level.{i}.downsample", h
        h = yield from _middle(half.mid, h, "encoder.mid")
        h = half.conv_out(jax.nn.silu(half.norm_out(h)))
        yield "encoder.conv_out", h
        if self.quant_conv is not None:
            h = self.quant_conv(h)
            yield "quant_conv", h
        return h

    def _decoded(self, z: Array) -> Generator[tuple[str, Array], None, Array]:
        c, half = self.config, self.decoder
        if z.ndim != 4 or z.shape[3] != c.latent_channels or not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"decode: z must be floats (b, h, w, {c.latent_channels}), got {z.dtype} {z.shape}")
        h = z.astype(at_least_float32(self.dtype)) / c.scaling_factor + c.shift_factor
        if self.codes is not None:
            h = self.nearest_codes(h)
            yield "codes", h
        if self.post_quant_conv is not None:
            h = self.post_quant_conv(h)
            yield "post_quant_conv", h
        h = half.conv_in(h)
        yield "decoder.conv_in", h
        h = yield from _middle(half.mid, h, "decoder.mid")
        for i, level in reversed(list(enumerate(half.levels))):
            h = yield from _blocks(level, h, f"decoder.level.{i}")
            if level.upsample is not None:
                h = level.upsample(h)
                yield f"decoder.level.{i}.upsample", h
        h = half.conv_out(jax.nn.silu(half.norm_out(h)))
        yield "decoder.conv_out", h
        return h


def _blocks(level: Level, h: Array, at: str) -> Generator[tuple[str, Array], None, Array]:
    for j, block in enumerate(level.blocks):
        h = block(h, None)
        yield f"{at}.block.{j}", h
        if level.attentions:
            h = level.attentions[j](h)
            yield f"{at}.attn.{j}", h
    return h


def _middle(mid: Middle, h: Array, at: str) -> Generator[tuple[str, Array], None, Array]:
    h = mid.block_1(h, None)
    yield f"{at}.block_1", h
    if mid.attention is not None:
        h = mid.attention(h)
        yield f"{at}.attn_1", h
    h = mid.block_2(h, None)
    yield f"{at}.block_2", h
    return h


def _last(blocks: Iterator[tuple[str, Array]]) -> Array:
    *_, (_, output) = blocks
    return output
