"""Sampling by one evaluation a call, where the number of steps is data: for programs that answer people.

`DDIM.sample` scans over segments of a table, whose length is a shape. Here a call takes one row, by the same program
with a table of length 1, and images go in groups of one size, the last filled up: S, eta, spacing, seed, label and
guidance scale are arguments, and only the method, and the kind of guidance, choose the program. Between calls other
work can be done, and the run be dropped.

Nothing is drawn or compiled before the first `step`; each makes the next evaluation, in whatever thread calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jddim.editing import slerp
from jddim.pipeline import DDIM
from jddim.run.batches import raise_if_bad
from jddim.run.methods import Inversion
from jddim.run.plan import Batch, Part, Plan
from jddim.run.programs import check_decoded, draw_keys, draw_noise
from jddim.sampling import State

GROUP = 4
"""Images a call. On a CPU more are not faster an image, and make everyone else wait longer."""

Floats = NDArray[np.float32]


class Run(Protocol):
    """Images on their way, one call after the other. rows: steps on the way of each; 0: they differ."""

    total: int
    rows: int

    @property
    def done(self) -> int:
        """Calls made."""

    @property
    def row(self) -> int:
        """How many steps all images have made."""

    def step(self) -> None:
        """Make the next of `total` calls. Raises FloatingPointError if a NaN or infinity appears at the end."""

    def x_t(self) -> Floats:
        """The samples as they are, `(num, h, w, c)`; zeros where the first call is still to come."""

    def x0_hat(self) -> Floats:
        """The clean images that each one's last call predicted, likewise."""

    def start(self) -> Floats:
        """What each began with: x_T, or the picture that is inverted, encoded where there is a first stage."""

    def noise(self) -> Floats:
        """The x_T that each is sampled from, likewise."""


class Stepping:
    """A plan's run by single rows: all groups take a row before any takes the next.

    A plan of `jddim.run.plan.plan`, of sampling, editing or inversion; its images are those of `DDIM.sample` up to the
    rounding that comes with another batch size. group: images a call.
    """

    def __init__(self, plan: Plan, group: int = GROUP):
        self.plan, self.group = plan, group
        self.parts: list[Part] = [
            plan.part(Batch(low, min(group, plan.num - low), group)) for low in range(0, plan.num, group)
        ]
        self.states: list[State | None] = [None] * len(self.parts)
        self.rows = plan.rows.num_steps
        self.done, self.total = 0, self.rows * len(self.parts)

    @property
    def row(self) -> int:
        """How many steps all images have made."""
        return self.done // len(self.parts)

    def step(self) -> None:
        """The next row for the next group."""
        i, g = divmod(self.done, len(self.parts))
        part = self.parts[g]
        state = part.advance(self.states[g] or part.begin(), _row(self.plan.rows, i))
        jax.block_until_ready(state.x_t)
        self.states[g] = state
        self.done += 1
        if i == self.plan.rows.num_steps - 1:
            raise_if_bad(state, self.plan.rows, part.batch.low, part.batch.taken)

    def x_t(self) -> Floats:
        """The samples as they are, `(num, h, w, c)`; zeros where the first call is still to come."""
        return self._seen(lambda g, state: state.x_t)

    def x0_hat(self) -> Floats:
        """The clean images that each one's last call predicted, likewise."""
        return self._seen(lambda g, state: state.x0_hat)

    def start(self) -> Floats:
        """As of `Run`."""
        return self.noise()

    def noise(self) -> Floats:
        """The x_T that each began from, likewise."""
        return self._seen(lambda g, state: self.parts[g].x_T)

    @functools.cached_property
    def begun(self) -> Floats:
        """Of an inversion, the pictures as the network knows them."""
        return np.asarray(self.plan.latents(jnp.asarray(self.plan.inputs.images)), np.float32)

    def _seen(self, of: Callable[[int, State], Array]) -> Floats:
        if isinstance(self.plan.program.method, Inversion) and not self.done:
            return self.begun
        empty = np.zeros((self.group, *self.plan.shape), np.float32)
        groups = [None if state is None else of(g, state) for g, state in enumerate(self.states)]
        return np.concatenate([empty if x is None else np.asarray(x, np.float32) for x in groups])[: self.plan.num]


class Inverted:
    """A picture inverted, then sampled from the x_T found, as often as there are images: `then(x_T)` plans that."""

    def __init__(self, inversion: Plan, num: int, steps: int, then: Callable[[Floats], Plan]):
        self.inversion, self.num, self.then = Stepping(inversion, 1), num, then
        self.sampling: Stepping | None = None
        self.rows = self.inversion.total + steps
        self.done, self.total = 0, self.inversion.total + steps * -(-num // GROUP)

    @property
    def row(self) -> int:
        """Those up, and those down of all images."""
        return self.inversion.done + (self.sampling.row if self.sampling else 0)

    def step(self) -> None:
        """A row of the way up, or once that is done, of the way down."""
        if self.inversion.done < self.inversion.total:
            self.inversion.step()
        else:
            self.sampling = self.sampling or Stepping(self.then(np.repeat(self._found(), self.num, axis=0)))
            self.sampling.step()
        self.done += 1

    def x_t(self) -> Floats:
        """Of the way that is being taken, `(num, h, w, c)`."""
        return self.sampling.x_t() if self.sampling else np.repeat(self.inversion.x_t(), self.num, axis=0)

    def x0_hat(self) -> Floats:
        """The picture on its way up, and what is predicted on the way down."""
        return self.sampling.x0_hat() if self.sampling else self.x_t()

    def start(self) -> Floats:
        """The picture."""
        return np.repeat(self.inversion.begun, self.num, axis=0)

    def noise(self) -> Floats:
        """The x_T found."""
        return self.sampling.noise() if self.sampling else np.repeat(self._found(), self.num, axis=0)

    def _found(self) -> Floats:
        return self.inversion.x_t() / np.float32(self.inversion.plan.prior_scale)


class Between:
    """Sampling from noises between the first images of two seeds, or of four, the corners of a square by row.

    at: how far down and across each noise lies, `(num, 2)`, as `jddim.editing.slerp_grid` has them; of two seeds the
    way across, as `slerp_line` has it. then: plans the rest.
    """

    def __init__(self, ddim: DDIM, seeds: Sequence[int], at: Floats, steps: int, then: Callable[[Floats], Plan]):
        self.ddim, self.seeds, self.at, self.then = ddim, seeds, at, then
        self.num = num = len(at)
        self.sampling: Stepping | None = None
        self.rows = steps
        self.done, self.total = 0, steps * -(-num // GROUP)

    @property
    def row(self) -> int:
        """As of `Stepping`."""
        return 0 if self.sampling is None else self.sampling.row

    def step(self) -> None:
        """The next row; before the first, the noises."""
        self.sampling = self.sampling or Stepping(self.then(self._noises()))
        self.sampling.step()
        self.done += 1

    def _noises(self) -> Floats:
        config = self.ddim.model.config
        shape, numbers = (*config.image_size, config.in_channels), np.zeros(GROUP, np.uint32)
        ends = [
            draw_noise(draw_keys(jax.random.key(seed), numbers), shape, np.dtype(np.float32)) for seed in self.seeds
        ]
        at = np.resize(self.at, (-(-self.num // GROUP) * GROUP, 2))
        made = []
        for low in range(0, len(at), GROUP):
            down, across = at[low : low + GROUP].T
            left, right = ends if len(ends) == 2 else [_slerp(ends[i], ends[i + 2], down) for i in (0, 1)]
            made.append(np.asarray(_slerp(left, right, across)))
        return np.concatenate(made)[: self.num]

    def x_t(self) -> Floats:
        """As of `Stepping`."""
        return self._seen(lambda sampling: sampling.x_t())

    def x0_hat(self) -> Floats:
        """As of `Stepping`."""
        return self._seen(lambda sampling: sampling.x0_hat())

    def start(self) -> Floats:
        """As of `Stepping`."""
        return self.noise()

    def noise(self) -> Floats:
        """As of `Stepping`."""
        return self._seen(lambda sampling: sampling.noise())

    def _seen(self, of: Callable[[Stepping], Floats]) -> Floats:
        config = self.ddim.model.config
        empty = np.zeros((self.num, *config.image_size, config.in_channels), np.float32)
        return empty if self.sampling is None else of(self.sampling)


class Decoded:
    """A run of latents, and then their images, of which each call decodes as many as the plan says: x_t at the end.

    On the way x_t, x0_hat and start are decoded when they are asked for, which takes the time of calls; noise is of
    latents always. plan: of the run's sampling, whose first stage and mask are used.
    """

    def __init__(self, run: Run, plan: Plan, num: int):
        self.run, self.plan = run, plan
        self.lows = range(0, num, plan.decode_batch)
        self.images: list[Floats] = []
        self.rows = run.rows
        self.total = run.total + len(self.lows)

    @property
    def done(self) -> int:
        """Calls made."""
        return self.run.done + len(self.images)

    @property
    def row(self) -> int:
        """As of the run."""
        return self.run.row

    def step(self) -> None:
        """The run's next call, or once it is done, the next images. Raises FloatingPointError for a NaN in these."""
        if self.run.done < self.run.total:
            self.run.step()
            return
        low = self.lows[len(self.images)]
        made = self.plan.images(jnp.asarray(self.run.x_t()[low : low + self.lows.step]))
        check_decoded(made, np.arange(low, low + len(made)))
        self.images.append(np.asarray(self.plan.pasted(made, low), np.float32))

    def x_t(self) -> Floats:
        """The images, once they are there."""
        return np.concatenate(self.images) if self.done == self.total else self.seen(self.run.x_t())

    def x0_hat(self) -> Floats:
        """As of the run, decoded."""
        return self.seen(self.run.x0_hat())

    def start(self) -> Floats:
        """As of the run, decoded."""
        return self.seen(self.run.start())

    def noise(self) -> Floats:
        """As of the run, in latents."""
        return self.run.noise()

    def seen(self, z: Floats) -> Floats:
        """Latents as images."""
        return np.asarray(self.plan.images(jnp.asarray(z)), np.float32)


class Swept:
    """Plans of other numbers of steps side by side, the one that is least far always next.

    Images by row: the first of each plan, then the second of each.
    """

    def __init__(self, plans: Sequence[Plan]):
        self.columns = [Stepping(plan) for plan in plans]
        self.done, self.total = 0, sum(column.total for column in self.columns)
        self.rows = self.row = 0

    def step(self) -> None:
        """The next row of one plan's next group."""
        min(self.columns, key=lambda column: column.done / column.total).step()
        self.done += 1

    def x_t(self) -> Floats:
        """As of `Stepping`."""
        return self._seen(Stepping.x_t)

    def x0_hat(self) -> Floats:
        """As of `Stepping`."""
        return self._seen(Stepping.x0_hat)

    def start(self) -> Floats:
        """As of `Stepping`."""
        return self.noise()

    def noise(self) -> Floats:
        """As of `Stepping`."""
        return self._seen(Stepping.noise)

    def _seen(self, of: Callable[[Stepping], Floats]) -> Floats:
        by_column = np.stack([of(column) for column in self.columns], axis=1)
        return by_column.reshape(-1, *by_column.shape[2:])


def _row(table: Any, i: int) -> Any:
    """Row i as a table of one step."""
    return type(table)(*(np.asarray(column)[i : i + 1] for column in table))


_slerp: Callable[[Array, Array, Any], Array] = jax.jit(slerp)
