"""Draws docs/convergence.png: each solver's error by the number of evaluations, for data whose ODE is solved by hand.

    python scripts/convergence_picture.py [OUT.png]

Of data N(0, c^2) every coordinate of the probability-flow ODE stays at its quantile, x_t = x_T sqrt(v_t / v_T) with
v_t = alpha_bar_t c^2 + 1 - alpha_bar_t. Steps are even in t from T - 1 to T / 10, in float64. Prints the orders: the
slope between the last two counts.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jddim.ddim import StepTable, step_table
from jddim.schedule import from_betas
from jddim.solvers import solver_loop

T, DEVIATION = 4000, 0.35
SCHEDULE = from_betas(np.full(T, 1 - 0.02 ** (1 / T)))
SOLVERS = {"ddim": 1, "dpm++2m": 1, "plms": 1, "unipc": 1, "heun": 2}
"""name -> evaluations a step"""
COUNTS = (8, 16, 32, 64, 128, 256)


def variance(alpha_bar):
    return alpha_bar * DEVIATION**2 + 1 - alpha_bar


def perfect(x_t, t):
    """What the perfect network says."""
    a = jnp.asarray(SCHEDULE.alphas_cumprod, x_t.dtype)[t][:, None]
    return jnp.sqrt(1 - a) * x_t / variance(a)


def error(solver: str, steps: int) -> float:
    """The largest error of x at T / 10, from x_T between -2 and 2."""
    timesteps = np.linspace(T - 1, T // 10, steps + 1).round().astype(int)
    table = StepTable(*(column[:-1] for column in step_table(SCHEDULE, timesteps, np.float64)))
    with jax.enable_x64(True):
        x_T = jnp.linspace(-2, 2, 31, dtype=jnp.float64)[None]
        made = jax.jit(lambda x_T: solver_loop(perfect, x_T, table, solver))(x_T)
        exact = x_T * math.sqrt(variance(table.alpha_bar_prev[-1]) / variance(table.alpha_bar_t[0]))
        return float(jnp.abs(made - exact).max())


def main(out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 3.8), layout="constrained")
    for (solver, each), marker in zip(SOLVERS.items(), "osvd^", strict=True):
        errors = [error(solver, count // each) for count in COUNTS]
        axes.loglog(COUNTS, errors, marker=marker, markersize=4, label=solver)
        print(f"{solver}: {errors[0]:.1e} to {errors[-1]:.1e}, order {math.log2(errors[-2] / errors[-1]):.2f}")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    axes.set_xlabel("evaluations of the network")
    axes.set_ylabel("largest error of x")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "convergence.png"))
