"""The loop over a plan's batches and segments, which sees a NaN and says where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jddim.ddim import StepTable
from jddim.run.plan import Batch, Plan
from jddim.run.progress import Progress
from jddim.sampling import State, Trajectory, segments


class Preview(NamedTuple):
    """What `sample` hands to `on_segment`: a batch on its way.

    start: the first image's number. done, total: evaluations taken, and in all. x_t, x0_hat: `(n, h, w, c)`, the
    samples now, and the clean images that the last step predicted; latents of a checkpoint with a first stage.
    """

    start: int
    done: int
    total: int
    x_t: Array
    x0_hat: Array


def run(
    plan: Plan,
    *,
    batch_size: int | None = None,
    trajectory_every: int | None = None,
    progress: bool | None = False,
    on_segment: Callable[[Preview], object] | None = None,
) -> tuple[Array, Trajectory | None]:
    """A plan's images, and the trajectory if one is asked for.

    Always in the same segments, so that whoever watches has the program, and the bits, of who does not; inside a
    transformation of the caller's as one scan, where nothing is looked at. progress: what `Progress` is `shown`. Raises
    FloatingPointError if a sample leaves the finite numbers, ValueError if there is something to watch under a
    transformation.
    """
    num, rows, start = plan.num, plan.rows, _first(plan)
    inside = plan.traced
    if inside and on_segment is not None:
        raise ValueError("sample: on_segment sees no values inside jit, vmap or grad: leave it out there")
    size, buffers = min(batch_size or num, num), trajectory_every if inside else None
    cut = [rows] if inside else segments(rows, every=trajectory_every)
    images: list[Array] = []
    trajectories: list[Trajectory] = []
    steps = rows.num_steps + plan.decodes  # decoding counts as one more
    with Progress(num, f"{rows.num_steps} steps", shown=False if inside else progress) as bar:
        bar.compiling()
        for low in range(0, num, size):
            batch = Batch(low, min(size, num - low), size)
            part, kept = plan.part(batch), []
            state = part.begin(buffers)
            for segment in cut:
                state = part.advance(state, segment, buffers)
                if inside:
                    continue
                taken = int(segment.step[-1]) - int(rows.step[0]) + 1
                if trajectory_every is not None and (taken % trajectory_every == 0 or taken == rows.num_steps):
                    kept.append((segment.t_prev[-1], state.x_t[: batch.taken], state.x0_hat[: batch.taken]))
                if progress or bar.shown:  # between segments Ctrl-C is heard, and a NaN seen, silent or not
                    raise_if_bad(state, rows, start + low, batch.taken)
                    bar.add(batch.taken * segment.num_steps / steps)
                if on_segment is not None:
                    x_t, x0_hat = state.x_t[: batch.taken], state.x0_hat[: batch.taken]
                    on_segment(Preview(start + low, taken, rows.num_steps, x_t, x0_hat))
            raise_if_bad(state, rows, start + low, batch.taken)
            images.append(part.images(state.x_t))
            if plan.decodes:
                bar.add(batch.taken / steps)
            if state.trajectory is not None:
                t, x_t, x0_hat = state.trajectory
                trajectories.append(Trajectory(t, x_t[:, : batch.taken], x0_hat[:, : batch.taken]))
            elif kept:
                t, x_t, x0_hat = (jnp.stack([jnp.asarray(entry[i]) for entry in kept]) for i in range(3))
                trajectories.append(Trajectory(t, x_t, x0_hat))
    x_0 = images[0] if len(images) == 1 else jnp.concatenate(images)
    if not trajectories:
        return x_0, None
    x_ts, x0_hats = (jnp.concatenate([part[i] for part in trajectories], axis=1) for i in (1, 2))
    return x_0, Trajectory(trajectories[0].t, x_ts, x0_hats)


def _first(plan: Plan) -> int:
    """The number of a plan's first image, for messages."""
    numbers: Any = plan.inputs.numbers
    return 0 if isinstance(numbers, jax.core.Tracer) else int(np.asarray(numbers)[0])


def raise_if_bad(state: State, table: StepTable, start: int, count: int) -> None:
    """Raise FloatingPointError if any of the batch's first `count` samples has left the finite numbers.

    start: the number of the batch's first image. Of a traced state nothing is known.
    """
    if isinstance(state.first_bad, jax.core.Tracer):
        return
    first_bad = np.asarray(state.first_bad)[:count]
    bad = np.flatnonzero(first_bad >= 0)
    if bad.size:
        worst = bad[np.argmin(first_bad[bad])]
        step = int(first_bad[worst]) - int(np.asarray(table.step)[0])  # the end of a table keeps its steps' numbers
        raise FloatingPointError(
            f"a NaN or infinity appeared in image {start + worst} at step {step + 1} of {table.num_steps} "
            f"(t = {np.asarray(table.t)[step]}), in {bad.size} of {count} images of this batch; "
            "check the weights (jddim verify), or clip x0, or use float32"
        )
