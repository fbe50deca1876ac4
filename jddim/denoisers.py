"""Functions around a network that make the sampler's denoiser, `denoise(x_t, t) -> output`. Each does one thing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jddim.ddim import per_sample
from jddim.sampling import Denoiser


def with_labels(model: Denoiser, labels: Array) -> Denoiser:
    """A class-conditional network `model(x_t, t, labels)` at these labels, one per sample."""
    return lambda x_t, t: model(x_t, t, labels)


def with_scaled_time(denoise: Denoiser, scale: ArrayLike) -> Denoiser:
    """A denoiser whose network was trained with t times `scale` (OpenAI's rescale_timesteps: 1000 / T).

    What else it takes, labels for instance, is passed on.
    """
    return lambda x_t, t, *rest: denoise(x_t, t * jnp.asarray(scale, x_t.dtype), *rest)


def with_reversed_time(denoise: Denoiser) -> Denoiser:
    """A flow's denoiser of a network whose t = 1 is the clean image, and whose velocity leads there (SiT).

    Given 1 - t, it returns minus the velocity eps - x0. What else it takes is passed on.
    """
    return lambda x_t, t, *rest: -denoise(x_t, 1 - t, *rest)


def with_edm(denoise: Denoiser, sigma_data: float = 0.5, time_scale: float = 0.25, t_free: float = 0.0) -> Denoiser:
    """The velocity eps - x0 from a network F of EDM's preconditioning (arXiv:2206.00364, Table 1), where t is sigma.

    x0 = c_skip x_t + c_out F(c_in x_t, time_scale log t), with c_in = 1 / r, c_skip = sigma_data^2 / r^2, c_out = t
    sigma_data / r, r^2 = t^2 + sigma_data^2. The velocity has no division by a small t.
    t_free: where x0 is x_t itself, whatever F is: in c_skip and c_out t is t - t_free (consistency models,
    arXiv:2303.01469, appendix C). What else the network takes is passed on.
    """

    def velocity(x_t: Array, t: Array, *rest: Array) -> Array:
        sigma = per_sample(t.astype(x_t.dtype), x_t)
        r, left = jnp.hypot(sigma, sigma_data), sigma - t_free
        F = denoise(x_t / r, time_scale * jnp.log(t), *rest)
        skip = left**2 + sigma_data**2
        # x0 = (sigma_data^2 / skip) x_t + (left sigma_data / r) F, and eps = (x_t - x0) / sigma
        eps = left / sigma * (left / skip * x_t - sigma_data / r * F)
        return eps - (sigma_data**2 / skip * x_t + left * sigma_data / r * F)

    return velocity


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
