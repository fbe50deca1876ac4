"""Sweeps: one x_T under many etas, as one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim.pipeline import DDIM, eta_problems


def sweep(
    ddim: DDIM,
    key: Array | None,
    num: int | None,
    etas: ArrayLike,
    *,
    rows_at_once: int | None = None,
    steps: int | None = None,
    spacing: str | Sequence[int] | np.ndarray | None = None,
    **options: Any,
) -> Array:
    """The images `(E, num, h, w, c)` of `ddim.sample` at each of `etas` `(E,)`, from the same x_T and noise.

    rows_at_once: how many etas share a call, and with it memory: `vmap` needs that of so many batches. The last call
    is filled up, so all run the one program; None: all at once. Inside `jit`, `jax.lax.map(..., batch_size=)` does
    the same. steps, spacing and the options are `sample`'s.
    Raises ValueError on what `sample` would, and FloatingPointError naming the eta if an image is not finite.
    """
    etas = np.asarray(etas, float)
    table = ddim.table(steps, spacing)
    if etas.ndim != 1 or not etas.size:
        raise ValueError(f"etas must be a list of numbers, got {etas}")
    if rows_at_once is not None and rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    if problems := eta_problems(etas, len(etas), table):
        raise ValueError("sweep: " + "; ".join(problems))
    rows = min(rows_at_once or len(etas), len(etas))
    run = jax.vmap(lambda eta: ddim.sample(key, num, eta=eta, steps=steps, spacing=spacing, **options))
    images = []
    for low in range(0, len(etas), rows):
        given = etas[low : low + rows]
        filled = np.append(given, np.repeat(given[-1:], rows - len(given)))
        images.append(run(jnp.asarray(filled, jnp.float32))[: len(given)])
    x_0 = images[0] if len(images) == 1 else jnp.concatenate(images)
    finite = np.asarray(jnp.isfinite(x_0).reshape(len(etas), -1).all(axis=1))
    if not finite.all():
        raise FloatingPointError(
            f"a NaN or infinity appeared at eta {etas[~finite][0]:g}; `sample` at this eta says in which step"
        )
    return x_0
