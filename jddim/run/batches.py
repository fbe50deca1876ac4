"""The loop over batches and segments around a compiled program, which sees a NaN and says where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jddim.ddim import StepTable
from jddim.run.progress import Progress
from jddim.sampling import State, segments


class Batch(NamedTuple):
    """Images low..low+taken-1 of a run, computed as `size` of them: the last batch too has the others' program."""

    low: int
    taken: int
    size: int

    def of(self, x: Array | np.ndarray, axis: int = 0) -> Array:
        """Its part of `x`; its last sample repeated to make a full batch, whose copies are dropped afterwards."""
        rows = jnp.asarray(x[(slice(None),) * axis + (slice(self.low, self.low + self.taken),)])
        missing = self.size - self.taken
        if not missing:
            return rows
        return jnp.concatenate([rows, jnp.repeat(jnp.take(rows, jnp.array([-1]), axis), missing, axis)], axis)


def in_batches(
    num: int,
    batch_size: int | None,
    table: Any,
    begin: Callable[[Batch], State],
    advance: Callable[[Batch, State, Any], State],
    start: int,
    progress: bool,
    seen: Callable[[Batch, State, Any], None] | None = None,
) -> Iterator[tuple[int, State]]:
    """Each batch from `begin` through the table by `advance`: (how many of its samples count, its last state).

    In segments if there is progress to show or `seen` wants to be called after each. start: the number of image 0.
    Raises FloatingPointError if a sample leaves the finite numbers.
    """
    size = min(batch_size or num, num)
    cut = segments(table) if progress or seen else [table]
    with Progress(num, f"{table.num_steps} steps", enabled=progress) as bar:
        for low in range(0, num, size):
            batch = Batch(low, min(size, num - low), size)
            state = begin(batch)
            for segment in cut:
                state = advance(batch, state, segment)
                if progress:  # between segments Ctrl-C is heard, and a NaN seen, with a terminal or without
                    raise_if_bad(state, table, start + low, batch.taken)
                    bar.add(batch.taken * segment.num_steps / table.num_steps)
                if seen is not None:
                    seen(batch, state, segment)
            raise_if_bad(state, table, start + low, batch.taken)
            yield batch.taken, state


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
        step = int(first_bad[worst])
        raise FloatingPointError(
            f"a NaN or infinity appeared in image {start + worst} at step {step + 1} of {table.num_steps} "
            f"(t = {np.asarray(table.t)[step]}), in {bad.size} of {count} images of this batch; "
            "check the weights (jddim verify), or clip x0, or use float32"
        )
