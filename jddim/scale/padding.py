"""Several numbers of steps in one program: tables filled up to one length with rows that change nothing.

S is a shape, so each S compiles its own program. Filled up, K tables are one array, over which `vmap` runs: one
compilation, for K times the longest table's evaluations in place of the sum of all. docs/research.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim.ddim import Column, StepTable
from jddim.sampling import Denoiser, Update, check_prediction, ddim_update, is_zero, update_loop


class PaddedTable(NamedTuple):
    """K step tables of up to S steps; each column `(K, S)`. live: bool, False where a row only fills up."""

    step: Column
    t: Column
    t_prev: Column
    alpha_t: Column
    sigma_t: Column
    alpha_prev: Column
    sigma_prev: Column
    fresh: Column
    live: Column

    @property
    def num_steps(self) -> int:
        """S, the longest table's."""
        return self.t.shape[-1]


def padded(tables: Sequence[StepTable]) -> PaddedTable:
    """Tables on the host, of any lengths, each followed by its own last row until it is as long as the longest.

    Their steps keep their numbers, so each draws the noise that it draws alone.
    """
    if not tables:
        raise ValueError("padded needs at least one table")
    longest = max(table.num_steps for table in tables)
    rows = [np.minimum(np.arange(longest), table.num_steps - 1) for table in tables]
    filled = [
        [*(np.asarray(column)[i] for column in table), np.arange(longest) < table.num_steps]
        for table, i in zip(tables, rows, strict=True)
    ]
    return PaddedTable(*map(np.stack, zip(*filled, strict=True)))


def padded_loop(
    denoise: Denoiser,
    x_T: Array,
    table: PaddedTable,
    *,
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: tuple[ArrayLike, ArrayLike] | None = None,
    threshold: tuple[ArrayLike, ArrayLike] | None = None,
    rederive_eps: bool = False,
    self_condition: bool = False,
) -> Array:
    """`sample_loop` by each of K tables, from the same x_T and noise: `(K, b, ...)`, one program. Traceable.

    The arguments are `jddim.sampling.sample_loop`'s; the memory is that of K batches.
    """
    check_prediction(StepTable(*table[:-1]), prediction_type)
    update = live_rows(
        ddim_update(
            eta=eta,
            prediction_type=prediction_type,
            clip_range=clip_range,
            threshold=threshold,
            rederive_eps=rederive_eps,
        )
    )

    def run(rows: PaddedTable) -> Any:
        still = is_zero(eta)
        return update_loop(denoise, update, x_T, rows, key=key, deterministic=still, self_condition=self_condition)

    images: Array = jax.vmap(run)(PaddedTable(*(jnp.asarray(column) for column in table)))
    return images


def live_rows(update: Update) -> Update:
    """A step that is taken where the row is live, and otherwise leaves x_t as it is, to the bit."""

    def step(x_t: Array, output: Array, noise: Array, row: PaddedTable, *memory: Any) -> tuple[Any, ...]:
        x_prev, x0, *memory_next = update(x_t, output, noise, row, *memory)
        return jnp.where(row.live, x_prev, x_t), x0, *memory_next

    return step
