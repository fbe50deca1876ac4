"""Log-likelihoods by the probability-flow ODE, whose steps DDIM takes at eta 0 (arXiv:2010.02502, Eq. 14).

Along y = x_t / alpha_t, with r = sigma_t / alpha_t, the ODE is dy / dr = eps(x_t, t),
and a density changes along it by the divergence (Song et al., arXiv:2011.13456, Eq. 39):

    log p(y at r_0) = log p(y at r_T) + integral from r_0 to r_T of div_y eps dr.

Both are taken by Heun's rule, of second order: y in r, and the divergence in log r, where r div_y eps stays between
about 0 and the number of dimensions (in r it falls as 1 / r, from 100 of them at t = 0).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jddim import ddim
from jddim.ddim import StepTable
from jddim.sampling import Denoiser


class LogLikelihood(NamedTuple):
    """log_p: `(b,)`, the natural logarithm of the density. x_T: `(b, ...)`, where the ODE leads from x_0."""

    log_p: Array
    x_T: Array


def log_likelihood(
    denoise: Denoiser,
    x_0: Array,
    table: StepTable,
    *,
    probes: Array | None = None,
    prediction_type: str = "epsilon",
) -> LogLikelihood:
    """The log-density of x_0 under the model, by 2 (S - 1) evaluations and as many divergences. Traceable.

    denoise: as for `jddim.sampling.sample_loop`; it may not mix samples. x_0: `(b, ...)` float, in [-1, 1] for images
    (`dequantised`). table: of `jddim.ddim.step_table`, on the host, best in float64. Its timesteps alone are used: x_0
    is taken for a sample at the least of them, so take a spacing that visits t = 0 ("uniform", "openai"), and x_T at
    the largest for a standard normal.
    probes: None, the divergence exactly, by one derivative along each of x_0's axes, for small images; or Hutchinson's
    estimate v . J v of it, unbiased, by n vectors v: `(n, *x_0.shape)`, such as `jax.random.rademacher(key, (n,
    *x_0.shape), x_0.dtype)`, the same at every step.
    prediction_type: what the denoiser returns. x0 is never clipped: the clamp is no part of the ODE.

    Raises ValueError on probes of another shape, a table of one step, and one that starts at alpha_t = 0.
    """
    alpha, sigma = (np.asarray(column, np.float64)[::-1] for column in (table.alpha_t, table.sigma_t))
    if len(alpha) < 2:
        raise ValueError("a likelihood needs a table of at least 2 timesteps, the ends of the ODE")
    if alpha[-1] == 0:
        raise ValueError("the ODE has no end at alpha_t = 0 (zero terminal SNR): leave the table's first timestep out")
    if probes is not None and probes.shape[1:] != x_0.shape:
        raise ValueError(f"probes must have shape (n, {', '.join(map(str, x_0.shape))}), got {probes.shape}")
    if np.abs(alpha[-1] ** 2 + sigma[-1] ** 2 - 1) > 1e-3:
        raise ValueError("a likelihood needs a path with alpha_t^2 + sigma_t^2 = 1, whose x_T is standard normal")
    t = np.asarray(table.t)[::-1]
    r = sigma / alpha

    def flow(y: Array, t: Array, alpha_t: Array, sigma_t: Array) -> tuple[Array, Array]:
        """The slope dy / dr, and its divergence with respect to y `(b,)`."""

        def eps(y: Array) -> Array:
            x_t = alpha_t * y
            output = denoise(x_t, jnp.broadcast_to(t, x_t.shape[:1])).astype(x_t.dtype)
            if output.shape != x_t.shape:
                raise ValueError(f"denoise must return {x_t.shape} for an x_t like it, it returned {output.shape}")
            return ddim.predict_both(output, x_t, alpha_t, sigma_t, prediction_type)[1]

        return _with_divergence(eps, y, probes)

    def step(carry: tuple[Array, Array], row: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        y, integral = carry
        here, there, h, weight, weight_next = row
        slope, divergence = flow(y, *here)
        slope_next, divergence_next = flow(y + h * slope, *there)
        added = weight * divergence + weight_next * divergence_next
        return (y + h / 2 * (slope + slope_next), integral + added), None

    h_log = np.diff(np.log(r)) / 2
    ends = (t, alpha.astype(x_0.dtype), sigma.astype(x_0.dtype))
    steps = [column.astype(x_0.dtype) for column in (np.diff(r), h_log * r[:-1], h_log * r[1:])]
    rows = ([column[:-1] for column in ends], [column[1:] for column in ends], *steps)
    nothing = jnp.zeros_like(x_0.sum(axis=tuple(range(1, x_0.ndim))))  # one for each sample, where it lies
    start = (x_0 / float(alpha[0]), nothing)
    (y, integral), _ = lax.scan(step, start, jax.tree.map(jnp.asarray, rows))

    x_T = float(alpha[-1]) * y
    size = math.prod(x_0.shape[1:])
    log_normal = -0.5 * (jnp.square(x_T).reshape(x_T.shape[0], -1).sum(axis=1) + size * math.log(2 * math.pi))
    scaled = size * (math.log(alpha[-1]) - math.log(alpha[0]))  # x_T and x_0 are y by a factor
    return LogLikelihood(log_normal + scaled + integral, x_T)


def _with_divergence(f: Denoiser, y: Array, probes: Array | None) -> tuple[Array, Array]:
    """(f(y), the sum of df_i / dy_i `(b,)`), by derivatives along the axes or along probes."""
    value, derivative = jax.linearize(f, y)

    def along(v: Array) -> Array:
        v = jnp.zeros_like(y) + v
        products: Array = v * derivative(v)
        return products.reshape(y.shape[0], -1).sum(axis=1)

    if probes is not None:
        return value, lax.map(along, probes).mean(axis=0)
    axes = jnp.eye(math.prod(y.shape[1:]), dtype=y.dtype).reshape(-1, 1, *y.shape[1:])
    return value, lax.map(along, axes, batch_size=min(16, len(axes))).sum(axis=0)


def dequantised(pixels: ArrayLike, uniform: ArrayLike) -> Array:
    """Bytes 0..255 `(b, ...)` as x_0 with a density: (pixels + uniform) / 127.5 - 1.

    uniform: in [-0.5, 0.5), like pixels: `jax.random.uniform(key, pixels.shape, minval=-0.5, maxval=0.5)`.
    """
    return (jnp.asarray(pixels, jnp.float32) + jnp.asarray(uniform)) / 127.5 - 1


def bits_per_dim(log_p: ArrayLike, size: int, scale: float = 127.5) -> Array:
    """-log2 of the probability of an image's bytes, by their number: at least that, in the mean over dequantisations.

    log_p: `(b,)`, natural, of x_0 `dequantised`. size: the numbers in an image. scale: bytes per unit of x_0. A
    model that holds all 256 bytes equally likely has 8.
    """
    return -jnp.asarray(log_p) / (size * math.log(2)) + math.log2(scale)
