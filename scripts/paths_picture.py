"""Draws docs/paths.png: the lines of the ODE from noise to a mixture of two Gaussians, along four paths.

    python scripts/paths_picture.py [OUT.png]

DDIM at eta 0 in 400 steps, by the mixture's own posterior mean in place of a network. Each panel starts at the same
quantiles of x_T and so ends at the same x_0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jddim.config import SamplerConfig, ScheduleConfig
from jddim.ddim import StepTable, sampler_table
from jddim.sampling import sample_loop
from jddim.schedule import make_schedule

MEANS, DEVIATION = jnp.array([-0.7, 0.5]), 0.1
SHARE = jnp.array([0.3, 0.7])
PATHS = {
    "DDPM's, linear betas": ("linear", "linspace"),
    "vp, continuous": ("vp", "even"),
    "flow": ("flow", "even"),
    "edm (t from 80; drawn from 2)": ("edm", "karras"),
}


def lines(table: StepTable, scale: float) -> np.ndarray:
    """x_t after each step, `(S, 15)`."""
    t, alpha, sigma = (jnp.asarray(column)[::-1] for column in (table.t, table.alpha_t, table.sigma_t))

    def velocity(x_t: jax.Array, told: jax.Array) -> jax.Array:
        i = jnp.searchsorted(t, told)
        a, s = alpha[i][:, None], sigma[i][:, None]
        v = (a * DEVIATION) ** 2 + s**2
        nearer = jax.nn.softmax(jnp.log(SHARE) - (x_t - a * MEANS) ** 2 / (2 * v))
        x0 = (nearer * (MEANS + a * DEVIATION**2 / v * (x_t - a * MEANS))).sum(axis=1, keepdims=True)
        return (x_t - a * x0) / s - x0

    with jax.enable_x64(True):
        x_T = scale * jax.scipy.stats.norm.ppf(jnp.linspace(0.03, 0.97, 15, dtype=jnp.float64))[:, None]
        _, way = sample_loop(velocity, x_T, table, prediction_type="velocity", trajectory_every=1)
        return np.asarray(jnp.concatenate([x_T[None], way.x_t]))[..., 0]


def main(out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(11, 2.8), sharey=True, layout="constrained")
    for panel, (title, (name, spacing)) in zip(axes, PATHS.items(), strict=True):
        schedule = make_schedule(ScheduleConfig(name))
        table = sampler_table(schedule, SamplerConfig(spacing, 400), dtype=np.float64)
        x = lines(table, schedule.prior_scale(float(table.t[0])))
        panel.plot(np.append(table.t, table.t_prev[-1]), x, color="C0", linewidth=0.8)
        panel.set(title=title, xlabel="t", ylim=(-2.2, 2.2))
        panel.set_xlim((2, 0) if name == "edm" else (table.t[0], 0))
        print(f"{title}: ends at {', '.join(f'{value:.3f}' for value in x[-1][::7])}")
    axes[0].set_ylabel("x_t")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "paths.png"))
