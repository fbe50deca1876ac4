"""Draws docs/trajectory.png and the pictures of docs/tutorials/ddim.md: digits of the MNIST checkpoint.

    python scripts/tutorial_pictures.py CKPT [FOLDER]       # CKPT: scripts/assets/mnist-ddpm, converted; FOLDER: docs

Minutes on a CPU: one of them samples with all of the 1000 timesteps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

import jddim
from jddim import sampling
from jddim.images import grid, labelled, save_picture

ROOT = Path(__file__).resolve().parents[1]
NUM, STEPS, EVERY = 8, 30, 1000
KEPT = np.array([0, 6, 12, 16, 20, 24, 27, 29])  # the steps after which a trajectory is shown
HOW: dict[str, Any] = {"spacing": "linspace", "clip": True}

Rows = dict[str, Array]


def way(ddim: jddim.DDIM, x_T: Array, **options: Any) -> jddim.Trajectory:
    """Of the image that starts at x_T `(h, w, c)`: t `(k,)`, x_t and x0_hat `(k, h, w, c)`."""
    _, path = ddim.sample(x_T=x_T[None], steps=STEPS, trajectory_every=1, **HOW, **options)
    return jddim.Trajectory(path.t[KEPT], path.x_t[KEPT, 0], path.x0_hat[KEPT, 0])


def trajectory(ddim: jddim.DDIM, x_T: Array) -> Rows:
    ways = {i: way(ddim, x_T[i], eta=0.0) for i in (0, 7)}
    print(f"t: {ways[0].t.tolist()}")
    return {f"image {i}: {name}": getattr(of, name) for i, of in ways.items() for name in ("x_t", "x0_hat")}


def marginals(ddim: jddim.DDIM, x_T: Array) -> Rows:
    """x_t on the way of one x_T: it looks as it did in training, unless sigma is only added."""
    key = jax.random.key(1)
    rows = {f"eta {eta:g}": way(ddim, x_T[0], eta=eta, key=key).x_t for eta in (0.0, 0.5, 1.0)}

    def too_noisy(x_t, eps, noise, row):
        x0 = jddim.predict_x0(x_t, eps, row.alpha_t, row.sigma_t).clip(-1, 1)
        sigma = jddim.ddim_sigma(sigma_prev=row.sigma_prev, fresh=row.fresh, eta=1.0)
        return row.alpha_prev * x0 + row.sigma_prev * eps + sigma * noise, x0

    def sample(model, x_T):
        return sampling.update_loop(model, too_noisy, x_T, ddim.table(STEPS, "linspace"), key=key, trajectory_every=1)

    _, path = jax.jit(sample)(ddim.model, x_T[:1])
    return rows | {"too noisy": path.x_t[KEPT, 0]}


def twice(ddim: jddim.DDIM, x_T: Array) -> Rows:
    return {
        f"eta {eta:.0f}, key {seed}": ddim.sample(jax.random.key(seed), x_T=x_T, steps=STEPS, eta=eta, **HOW)
        for eta in (0.0, 1.0)
        for seed in (1, 2)
    }


def lengths(ddim: jddim.DDIM, x_T: Array) -> Rows:
    return {f"S = {S}": ddim.sample(x_T=x_T, steps=S, eta=0.0, **HOW) for S in (3, 5, 10, 20, 50)}


def every_step(ddim: jddim.DDIM, x_T: Array) -> Rows:
    """DDPM computes its mean from the clipped x0; `rederive_eps` makes DDIM do so too."""
    ddpm = {"method": "ddpm", "variance": "fixed_small"}
    asked: dict[str, dict[str, Any]] = {"DDPM": ddpm, "eta 1": {"eta": 1.0, "rederive_eps": True}}
    return {
        f"{name}, S = {S}": ddim.sample(jax.random.key(1), x_T=x_T, steps=S, **HOW, **how)
        for S in (EVERY, STEPS)
        for name, how in asked.items()
    }


def by_hand(ddim: jddim.DDIM, x_T: Array) -> Rows:
    _, path = ddim.sample(x_T=x_T, steps=STEPS, eta=0.0, trajectory_every=1, **HOW)
    print(f"by hand: from t = {path.t[21]} to t = {path.t[22]}")
    return {"x_t": path.x_t[21], "x0_hat": path.x0_hat[22], "x_s": path.x_t[22], "x_0": path.x_t[-1]}


PICTURES = {
    "trajectory": trajectory,
    "tutorials/ddim-marginals": marginals,
    "tutorials/ddim-twice": twice,
    "tutorials/ddim-lengths": lengths,
    "tutorials/ddim-every": every_step,
    "tutorials/ddim-by-hand": by_hand,
}


def main(ckpt: str, folder: str = str(ROOT / "docs")) -> None:
    ddim = jddim.load(ckpt)
    x_T = jddim.initial_noise(jddim.sample_keys(jax.random.key(0), NUM), (28, 28, 1))
    for name, rows in PICTURES.items():
        drawn = rows(ddim, x_T)
        out = Path(folder, f"{name}.png")
        picture = grid(np.concatenate([np.asarray(row) for row in drawn.values()]), columns=NUM, side=2 * 28)
        save_picture(out, labelled(picture, list(drawn)), {"num_steps": STEPS})
        print(f"{out}: {out.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
