"""Restoration: sampling images that agree with a measurement y = A x of them. Short functions around the loop.

DDNM (Wang et al., arXiv:2212.00490) splits each step's x0 by a linear operator A with a pseudo-inverse: what A sees of
it is the measurement's, what A does not see (its null space) is the network's. The network is any that samples; nothing
is trained, and no gradient taken. docs/restoration.md has an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim import ddim
from jddim.ddim import StepTable
from jddim.sampling import (
    Denoiser,
    Limits,
    SampleOptions,
    Trajectory,
    as_eta,
    check_prediction,
    is_zero,
    predictor,
    update_loop,
)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A linear map of images, without its matrix. Both functions are traceable, and take any number of images.

    forward: images `(b, h, w, c)` -> measurements `(b, ...)`. pinv: measurements -> images, its Moore-Penrose inverse:
    of all images with this measurement the one of least norm.
    """

    forward: Callable[[Array], Array]
    pinv: Callable[[Array], Array]


def inpainting(keep: ArrayLike) -> Operator:
    """The pixels where `keep` is not 0, the others 0. keep: `(h, w, 1)`, or another shape that broadcasts."""
    seen = jnp.asarray(np.asarray(keep) != 0)
    return Operator(lambda x: jnp.where(seen, x, 0), lambda y: jnp.where(seen, y, 0))


def channel_mix(weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> Operator:
    """The weighted sum of the channels, `(b, h, w, c)` -> `(b, h, w, 1)`: by default what a colour's grey is.

    Raises ValueError if no weight differs from 0.
    """
    w = np.asarray(weights, np.float64)
    if w.ndim != 1 or not np.isfinite(w).all() or not w.any():
        raise ValueError(f"weights must be numbers, one a channel and not all 0, got {weights}")
    sums, spreads = (jnp.asarray(column, jnp.float32) for column in (w, w / (w @ w)))
    return Operator(lambda x: (x * sums).sum(-1, keepdims=True), lambda y: y * spreads)


def separable(rows: ArrayLike, columns: ArrayLike, least: float = 1e-6) -> Operator:
    """Each channel x becomes rows x columns^T, `(b, h, w, c)` -> `(b, h', w', c)`.

    rows: `(h', h)`; columns: `(w', w)`. least: singular values of either matrix up to it are taken for 0 in both
    directions. Raises ValueError for what is no matrix of finite numbers.
    """
    pairs = []
    for name, matrix in (("rows", rows), ("columns", columns)):
        m = np.asarray(matrix, np.float64)
        if m.ndim != 2 or not np.isfinite(m).all():
            raise ValueError(f"{name} must be a matrix of finite numbers, got shape {m.shape}")
        u, s, vt = np.linalg.svd(m, full_matrices=False)
        s = np.where(s > least, s, 0)
        inverse = np.divide(1, s, out=np.zeros_like(s), where=s > 0)
        pairs.append((jnp.asarray((u * s) @ vt, jnp.float32), jnp.asarray((vt.T * inverse) @ u.T, jnp.float32)))
    (down, up), (across, back) = pairs

    def apply(left: Array, right: Array, x: Array) -> Array:
        height, width = left.shape[1], right.shape[1]
        if x.shape[1:3] != (height, width):
            raise ValueError(f"the operator takes {height}x{width} pixels, got {x.shape[1]}x{x.shape[2]}")
        return jnp.einsum("ih,bhwc,jw->bijc", left, x, right, precision="highest")

    return Operator(partial(apply, down, across), partial(apply, up, back))


def average_pooling(size: tuple[int, int], factor: int) -> Operator:
    """Means of squares of `factor` pixels a side, for super-resolution. size: the images' (h, w), its multiples.

    Raises ValueError for others.
    """
    if factor < 1 or any(side % factor for side in size):
        raise ValueError(f"factor must divide the size {size[0]}x{size[1]}, got {factor}")
    rows, columns = (np.repeat(np.eye(side // factor), factor, axis=1) / factor for side in size)
    return separable(rows, columns)


def blur(size: tuple[int, int], kernel: ArrayLike, least: float = 3e-2) -> Operator:
    """A blur along rows and columns, with zeros around the image. kernel: `(k,)`, k odd; size: the images' (h, w).

    least: as in `separable`; a blur nearly loses what its small singular values carry. Raises ValueError for another
    kernel.
    """
    taps = np.asarray(kernel, np.float64)
    if taps.ndim != 1 or taps.size % 2 == 0:
        raise ValueError(f"kernel must be a row of an odd number of taps, got shape {taps.shape}")
    middle = taps.size // 2
    rows, columns = (np.sum([np.eye(n, k=k - middle) * tap for k, tap in enumerate(taps)], axis=0) for n in size)
    return separable(rows, columns, least)


def ddnm_update(
    operator: Operator,
    y: Array,
    *,
    eta: ArrayLike = 0.85,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
) -> Callable[..., tuple[Array, Array]]:
    """`restore_loop`'s step, for `update_loop`; what the arguments mean is said there."""
    predict = predictor(prediction_type, clip_range, threshold, rederive_eps=rederive_eps)

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        x0, eps = predict(output, x_t, row)
        x0 = x0 - operator.pinv(operator.forward(x0) - y)  # Eq. 13
        share = ddim.per_sample(as_eta(eta, x_t), x_t)
        mixed = share * noise + jnp.sqrt(1 - share**2) * eps
        return ddim.add_noise(x0, mixed, row.alpha_prev, row.sigma_prev), x0

    return update


@overload
def restore_loop(
    denoise: Denoiser,
    operator: Operator,
    y: Array,
    x_T: Array,
    table: StepTable,
    *,
    trajectory_every: None = None,
    **options: Unpack[SampleOptions],
) -> Array: ...
@overload
def restore_loop(
    denoise: Denoiser,
    operator: Operator,
    y: Array,
    x_T: Array,
    table: StepTable,
    *,
    trajectory_every: int,
    **options: Unpack[SampleOptions],
) -> tuple[Array, Trajectory]: ...
def restore_loop(
    denoise: Denoiser,
    operator: Operator,
    y: Array,
    x_T: Array,
    table: StepTable,
    *,
    eta: ArrayLike = 0.85,
    key: Array | None = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """DDNM without measurement noise (arXiv:2212.00490, Algorithm 1): images `(b, h, w, c)` whose measurement is y.

        x0_hat = x0 - A^+ (A x0 - y)                                       (Eq. 13)
        x_prev = alpha_prev x0_hat + sigma_prev (eta z + sqrt(1 - eta^2) eps)

    y: `(b, ...)`, `operator`'s measurements of images in [-1, 1]. eta: in [0, 1], one or `(b,)`: the share of
    sigma_prev that is drawn anew, which is the source's eta (0.85 there) and not DDIM's. eps is the network's; x0 is
    limited, if at all, before the measurement is put in, so the result has it to rounding. The other arguments and the
    result are `jddim.sampling.sample_loop`'s. Raises ValueError on shapes that do not fit, and for another eta.
    """
    measured = jax.eval_shape(operator.forward, x_T)
    if measured.shape != y.shape:
        raise ValueError(
            f"y must have the shape of the operator's measurements of x_T, {measured.shape}, got {y.shape}"
        )
    if not isinstance(eta, jax.core.Tracer) and not np.all((np.asarray(eta) >= 0) & (np.asarray(eta) <= 1)):
        raise ValueError(f"eta is a share here, in [0, 1], got {eta}")
    check_prediction(table, prediction_type)
    limits = {"clip_range": clip_range, "threshold": threshold}
    update = ddnm_update(operator, y, eta=eta, prediction_type=prediction_type, rederive_eps=rederive_eps, **limits)
    return update_loop(
        denoise,
        update,
        x_T,
        table,
        key=key,
        noise=noise,
        deterministic=is_zero(eta),
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )
