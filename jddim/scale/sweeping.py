"""Sweeps: one x_T under many etas, as one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim.pipeline import DDIM, SampleOptions
from jddim.run.plan import Inputs, as_key
from jddim.run.problems import eta_problems
from jddim.run.request import RequestError
from jddim.sampling import sample_keys

PER_IMAGE = {
    name: int(name == "noise") for name in Inputs._fields if name in SampleOptions.__annotations__ and name != "eta"
}
"""Options of `DDIM.sample` that may have one value per image, and along which axis."""


def sweep(
    ddim: DDIM,
    key: Array | int | None,
    num: int | None,
    etas: ArrayLike,
    *,
    rows_at_once: int | None = None,
    steps: int | None = None,
    spacing: str | Sequence[int] | np.ndarray | None = None,
    start: int = 0,
    **options: Any,
) -> Array:
    """The images `(E, num, h, w, c)` of `ddim.sample` at each of `etas` `(E,)`, from the same x_T and noise.

    All rows are one batch, with an eta for each image. rows_at_once: how many etas share a call, and with it memory;
    the last call is filled up, so all run the one program; None: all at once. steps, spacing, start and the options are
    `sample`'s, but trajectories.
    Raises ValueError on what `sample` would, and FloatingPointError naming the etas if an image is not finite.
    """
    etas = np.asarray(etas, float)
    if etas.ndim != 1 or not etas.size:
        raise ValueError(f"etas must be a list of numbers, got {etas}")
    if rows_at_once is not None and rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    if options.get("trajectory_every") is not None:
        raise ValueError("a sweep keeps no trajectory: call sample at each eta")
    asked = {**options, "steps": steps, "spacing": spacing, "start": start}
    if problems := eta_problems(etas, len(etas), ddim.table(steps, spacing)):
        raise RequestError(problems, "sweep")
    num = ddim._plan("sweep", key, num, {**asked, "eta": float(etas.max())}).check("sweep").num
    rows = min(rows_at_once or len(etas), len(etas))
    key = as_key(key)
    keys = None if key is None else sample_keys(key, num, start) if key.ndim == 0 else key

    def repeated(x: Any, axis: int) -> Any:
        return x if x is None or np.ndim(x) <= axis else jnp.concatenate([jnp.asarray(x)] * rows, axis)

    options |= {name: repeated(options.get(name), axis) for name, axis in PER_IMAGE.items()}
    images = []
    for low in range(0, len(etas), rows):
        given = etas[low : low + rows]
        filled = np.append(given, np.repeat(given[-1:], rows - len(given)))
        try:
            made = ddim.sample(
                repeated(keys, 0),
                rows * num,
                steps=steps,
                spacing=spacing,
                eta=np.repeat(filled, num).astype(np.float32),
                **options,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"sweep: of {num} images at each eta of {given.tolist()}, {error}") from error
        images.append(made.reshape(rows, num, *made.shape[1:])[: len(given)])
    return images[0] if len(images) == 1 else jnp.concatenate(images)
