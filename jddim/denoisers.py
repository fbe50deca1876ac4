"""Functions around a network that make the sampler's denoiser, `denoise(x_t, t) -> output`. Each does one thing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jddim.sampling import Denoiser


def with_labels(model: Denoiser, labels: Array) -> Denoiser:
    """A class-conditional network `model(x_t, t, labels)` at these labels, one per sample."""
    return lambda x_t, t: model(x_t, t, labels)


def with_scaled_time(denoise: Denoiser, scale: ArrayLike) -> Denoiser:
    """A denoiser whose network was trained with t times `scale` (OpenAI's rescale_timesteps: 1000 / T).

    What else it takes, labels for instance, is passed on.
    """
    return lambda x_t, t, *rest: denoise(x_t, t * jnp.asarray(scale, x_t.dtype), *rest)


def without_variance(denoise: Denoiser) -> Denoiser:
    """A denoiser of a network with learned variance: the first half of its channels (OpenAI, Nichol)."""
    return lambda x_t, t, *rest: jnp.split(denoise(x_t, t, *rest), 2, axis=-1)[0]


def with_condition(denoise: Denoiser, condition: Array, *, first: bool = False) -> Denoiser:
    """A denoiser of a network that is given an image beside each x_t: condition `(b, h, w, channels)`, as in training.

    Its channels come after x_t's, or first. A smaller one is enlarged bilinearly (guided-diffusion's SuperResModel).
    What else the network takes is passed on. Raises ValueError for one that is not smaller by whole factors.
    """
    b, *side, channels = condition.shape

    def conditioned(x_t: Array, t: Array, *rest: Array) -> Array:
        beside = condition.astype(x_t.dtype)
        height, width = x_t.shape[1:3]
        if height % side[0] or width % side[1]:
            raise ValueError(
                f"a condition for images of {height}x{width} is as large, or smaller by whole factors: {side}"
            )
        if (height, width) != tuple(side):
            beside = jax.image.resize(beside, (b, height, width, channels), "linear", antialias=False)
        return denoise(jnp.concatenate([beside, x_t] if first else [x_t, beside], axis=-1), t, *rest)

    return conditioned


def with_self_condition(denoise: Denoiser) -> Denoiser:
    """`denoise(x_t, t, x0_hat)` of a network that takes x0_hat and x_t side by side, in this order (lucidrains)."""
    return lambda x_t, t, x0_hat: denoise(jnp.concatenate([x0_hat, x_t], axis=-1), t)
