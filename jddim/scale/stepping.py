"""Sampling by one evaluation a call, where the number of steps is data: for programs that answer people.

`DDIM.sample` scans over a table, whose length is a shape, so each S compiles. Here a call takes one row, by the same
program (`jddim.run.programs.sample_segment`) with a table of length 1, and images go in groups of one size, the last
filled up: S, eta, spacing, seed, label and guidance scale are arguments, and only the method, and whether there is
guidance, choose the program. Between calls other work can be done, and the run be dropped.

A run is made without touching the device; `step` makes the next evaluation, in whatever thread calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jddim.ddim import StepTable
from jddim.editing import keep_known, slerp
from jddim.inversion import inversion_table
from jddim.models.layers import at_least_float32
from jddim.pipeline import DDIM
from jddim.run.batches import raise_if_bad
from jddim.run.problems import eta_problems, guidance_problems, label_problems
from jddim.run.programs import draw_noise, invert_segment, sample_segment
from jddim.sampling import State, check_prediction, init_state, numbered_keys
from jddim.solvers import SolverTable, cast, memory_of

GROUP = 4
"""Images a call. On a CPU more are not faster an image, and make everyone else wait longer."""

_ONE_SLOT = 2**30  # `trajectory_every`: every step is recorded in slot 0, whatever S

Floats = NDArray[np.float32]


class Run(Protocol):
    """Images on their way, one call after the other."""

    done: int
    total: int

    def step(self) -> None:
        """Make the next of `total` calls. Raises FloatingPointError if a NaN or infinity appears at the end."""

    def x_t(self) -> Floats:
        """The samples as they are, `(num, h, w, c)`; zeros where the first call is still to come."""

    def x0_hat(self) -> Floats:
        """The clean images that each one's last call predicted."""


class Sampling:
    """`DDIM.sample`, equal to it up to the rounding that comes with another batch size.

    seed: as `jax.random.key` takes it. numbers: which images of the seed they are, `(num,)`; one may come again.
    etas: a scalar or one value per image. x_T: `(num, h, w, c)` float32 in place of the seed's.
    known, keep: inpainting, as in `jddim.editing.inpaint_loop` without resampling, of one picture `(h, w, c)` in
    [-1, 1] and a mask `(h, w, 1)`. The rest is `DDIM.sample`'s. Raises ValueError with everything wrong.
    """

    def __init__(
        self,
        ddim: DDIM,
        seed: int,
        numbers: Sequence[int] | NDArray[Any],
        *,
        method: str = "ddim",
        steps: int | None = None,
        etas: ArrayLike = 0.0,
        spacing: str | None = None,
        labels: NDArray[np.int32] | None = None,
        guidance_scale: float | None = None,
        null_label: int | None = None,
        x_T: Floats | None = None,
        known: Floats | None = None,
        keep: Floats | None = None,
    ):
        self.ddim, self.seed = ddim, seed
        self.numbers = np.asarray(numbers, np.uint32)
        self.num = len(self.numbers)
        dtype = at_least_float32(ddim.model.dtype)
        self.program = ddim._program(method, _ONE_SLOT)
        table: Any = ddim.table(steps, spacing, np.float64 if self.program.solver else dtype)
        null_label = ddim.null_label_for(guidance_scale, null_label)
        problems = guidance_problems(ddim.model.config, ddim.sampler, guidance_scale, null_label, self.num, method)
        given = None if labels is None else jnp.asarray(labels)
        problems += label_problems(ddim.model.config, given, self.num)
        if method == "ddim":
            problems += eta_problems(etas, self.num, table)
        if known is not None and method != "ddim":
            problems.append(f"inpainting is by method ddim here, got {method!r}")
        try:
            check_prediction(table, ddim.sampler.prediction_type)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        if self.program.solver is not None:
            table = _wide(cast(self.program.solver.plan(table), dtype))
        self.table = table
        self.etas = np.broadcast_to(np.asarray(etas, np.float32), (self.num,))
        self.labels = None if labels is None else np.asarray(labels, np.int32)
        self.guidance_scale, self.null_label = guidance_scale, null_label
        self.x_T, self.known, self.keep = x_T, known, keep
        self.dtype = dtype
        self.limits = ddim._limits(dtype)
        self.lows = range(0, self.num, GROUP)
        self.states: list[State | None] = [None] * len(self.lows)
        self.starts: list[Any] = [None] * len(self.lows)
        self.done, self.total = 0, table.num_steps * len(self.lows)

    def step(self) -> None:
        """The next row for the next group: all groups take a row before any takes the next."""
        i, g = divmod(self.done, len(self.lows))
        state = self.states[g]
        keys = _image_keys(jax.random.key(self.seed), self._of(self.numbers, g))
        if state is None:
            state = self._begin(g, keys)
        row = _row(self.table, i)
        scales = np.full(GROUP, self.guidance_scale or 0, self.dtype)
        state = sample_segment(
            self.ddim.model,
            state,
            row,
            self._of(self.etas, g).astype(self.dtype),
            keys,
            None,
            self.limits,
            None if self.labels is None else self._of(self.labels, g),
            None if self.guidance_scale is None else (scales, np.int32(self.null_label or 0)),
            program=self.program,
        )
        if self.known is not None:
            state = state._replace(x_t=_put_back(state.x_t, self.known, self.keep, self.starts[g], row))
        jax.block_until_ready(state.x_t)
        self.states[g] = state
        self.done += 1
        if i == self.table.num_steps - 1:
            raise_if_bad(state, self.table, self.lows[g], min(GROUP, self.num - self.lows[g]))

    def x_t(self) -> Floats:
        """The samples as they are, `(num, h, w, c)`; zeros where the first call is still to come."""
        return self._seen(lambda state: state.x_t)

    def x0_hat(self) -> Floats:
        """The clean images that each one's last call predicted, likewise."""
        return self._seen(lambda state: state.trajectory.x0_hat[0] if state.trajectory else state.x_t)

    def noise(self) -> Floats:
        """The x_T that each began from, likewise."""
        return self._gather(self.starts)

    def _begin(self, g: int, keys: Array) -> State:
        config = self.ddim.model.config
        if self.x_T is not None:
            x_T = jnp.asarray(self._of(self.x_T, g), self.dtype)
        else:
            x_T = draw_noise(keys, (*config.image_size, config.in_channels), self.dtype)
        self.starts[g] = x_T
        state = init_state(x_T, self.table, _ONE_SLOT, self_condition=self.ddim.sampler.self_condition)
        return state if self.program.solver is None else state._replace(memory=memory_of(self.table, x_T))

    def _of(self, values: NDArray[Any], g: int) -> NDArray[Any]:
        """A group's part, its last repeated to fill it up."""
        return values[np.minimum(np.arange(self.lows[g], self.lows[g] + GROUP), self.num - 1)]

    def _seen(self, of: Any) -> Floats:
        return self._gather([None if state is None else of(state) for state in self.states])

    def _gather(self, groups: Sequence[Any]) -> Floats:
        config = self.ddim.model.config
        empty = np.zeros((GROUP, *config.image_size, config.in_channels), np.float32)
        return np.concatenate([empty if g is None else np.asarray(g, np.float32) for g in groups])[: self.num]


class Inversion:
    """`DDIM.invert` of one picture `(h, w, c)` float32 in [-1, 1], in the convention "diffusers"."""

    def __init__(
        self,
        ddim: DDIM,
        picture: Floats,
        *,
        steps: int | None = None,
        spacing: str | None = None,
        refine: int = 0,
        label: int | None = None,
        guidance_scale: float | None = None,
        null_label: int | None = None,
    ):
        labels = None if label is None else np.full(1, label, np.int32)
        null_label = ddim.null_label_for(guidance_scale, null_label)
        problems = guidance_problems(ddim.model.config, ddim.sampler, guidance_scale, null_label, 1, "ddim")
        problems += label_problems(ddim.model.config, None if labels is None else jnp.asarray(labels), 1)
        if ddim.sampler.self_condition:
            problems.append("this network is self-conditioned, and cannot be inverted")
        if problems:
            raise ValueError("; ".join(problems))
        self.ddim, self.refine, self.labels = ddim, refine, labels
        self.dtype = at_least_float32(ddim.model.dtype)
        self.rows = inversion_table(ddim.table(steps, spacing, self.dtype))
        self.guidance = None
        if guidance_scale is not None:
            self.guidance = (np.full(1, guidance_scale, self.dtype), np.int32(null_label or 0))
        self.program, self.limits = ddim._program("ddim", _ONE_SLOT), ddim._limits(self.dtype)
        self.picture = picture[None].astype(self.dtype)
        self.state: State | None = None
        self.done, self.total = 0, self.rows.num_steps

    def step(self) -> None:
        """One row up."""
        state = self.state or init_state(jnp.asarray(self.picture), self.rows)
        row = _row(self.rows, self.done)
        state = invert_segment(
            self.ddim.model,
            state,
            row,
            self.limits,
            self.labels,
            self.guidance,
            program=self.program,
            refine=self.refine,
        )
        self.state = jax.block_until_ready(state)
        self.done += 1
        if self.done == self.total:
            raise_if_bad(state, self.rows, 0, 1)

    def x_t(self) -> Floats:
        """The picture on its way to x_T, `(1, h, w, c)`."""
        return self.picture if self.state is None else np.asarray(self.state.x_t, np.float32)


class Inverted:
    """A picture inverted, then sampled from the x_T found: `sampling` is made by `then(x_T)`, `(1, h, w, c)`."""

    def __init__(self, inversion: Inversion, sampling: Sampling):
        self.inversion, self.sampling = inversion, sampling
        self.done, self.total = 0, inversion.total + sampling.total

    def step(self) -> None:
        """A row of the way up, or once that is done, of the way down."""
        if self.inversion.done < self.inversion.total:
            self.inversion.step()
        else:
            if self.sampling.x_T is None:
                self.sampling.x_T = np.repeat(self.inversion.x_t(), self.sampling.num, axis=0)
            self.sampling.step()
        self.done += 1

    def x_t(self) -> Floats:
        """Of the way that is being taken, `(num, h, w, c)`."""
        if self.sampling.done:
            return self.sampling.x_t()
        return np.repeat(self.inversion.x_t(), self.sampling.num, axis=0)

    def x0_hat(self) -> Floats:
        """The picture on its way up, and what is predicted on the way down."""
        return self.sampling.x0_hat() if self.sampling.done else self.x_t()


class Between:
    """Sampling from noises between the first images of two seeds: `jddim.editing.slerp_line`."""

    def __init__(self, sampling: Sampling, seeds: tuple[int, int]):
        self.sampling, self.seeds = sampling, seeds
        self.done, self.total = 0, sampling.total

    def step(self) -> None:
        """The next row; before the first, the noises."""
        s = self.sampling
        if s.x_T is None:
            config = s.ddim.model.config
            numbers = np.zeros(GROUP, np.uint32)
            shape = (*config.image_size, config.in_channels)
            ends = [draw_noise(_image_keys(jax.random.key(i), numbers), shape, s.dtype) for i in self.seeds]
            fractions = np.linspace(0, 1, s.num, dtype=np.float32)
            line = [_slerp(*ends, s._of(fractions, g)) for g in range(len(s.lows))]
            s.x_T = np.concatenate([np.asarray(x) for x in line])[: s.num]
        s.step()
        self.done += 1

    def x_t(self) -> Floats:
        """As of `Sampling`."""
        return self.sampling.x_t()

    def x0_hat(self) -> Floats:
        """As of `Sampling`."""
        return self.sampling.x0_hat()


def _row(table: Any, i: int) -> Any:
    """Row i as a table of one step."""
    return type(table)(*(np.asarray(column)[i : i + 1] for column in table))


def _wide(table: SolverTable) -> SolverTable:
    """With room for two remembered predictions at least: a single Heun step remembers one, several two."""
    missing = ((0, 0), (0, max(2 - table.step_history.shape[1], 0)))
    return table._replace(
        base_history=np.pad(table.base_history, missing), step_history=np.pad(table.step_history, missing)
    )


_image_keys = jax.jit(numbered_keys)
_slerp = jax.jit(slerp)


@jax.jit
def _put_back(x_t: Array, known: Array, keep: Array, known_noise: Array, row: StepTable) -> Array:
    """`keep_known` around a step that has been taken already."""
    known = jnp.broadcast_to(known, x_t.shape)
    one = jax.tree.map(lambda column: column[0], row)
    kept = keep_known(lambda x, *_: (x, x), known, keep, known_noise)
    return kept(x_t, x_t, x_t, one)[0]
