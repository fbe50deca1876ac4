"""Draws docs/conventions.png: digits of the MNIST checkpoint, each row from the same noise, one convention mixed up.

    python scripts/convention_pictures.py CKPT [OUT.png]       # CKPT: scripts/assets/mnist-ddpm, converted

Prints each row's root mean square distance from the right one, of pixels in [-1, 1].
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jddim
from jddim import sampling
from jddim.images import grid, labelled, save_picture

ROOT = Path(__file__).resolve().parents[1]
NUM, STEPS = 6, 20

Row = Callable[[Array], Array]


def rows(ddim: jddim.DDIM) -> dict[str, Row]:
    """Label -> x_T to images. Those labelled "right" are; each other one is compared with the last of them above."""
    key = jax.random.key(1)
    table = ddim.table(STEPS)

    def loop(denoise=lambda model, x_t, t: model(x_t, t), table=table, update=None, **options) -> Row:
        def sample(model, x_T):
            def network(x_t, t):
                return denoise(model, x_t, t)

            if update is not None:
                return sampling.update_loop(network, update, x_T, table, key=key)
            return sampling.sample_loop(network, x_T, table, key=key, **options)

        run = jax.jit(sample)
        return lambda x_T: run(ddim.model, x_T)

    def as_in_the_snippet(x_t, eps, noise, row):
        x0 = jddim.predict_x0(x_t, eps, row.alpha_t, row.sigma_t)
        sigma = jddim.ddim_sigma(sigma_prev=row.sigma_prev, fresh=row.fresh, eta=1.0)
        return row.alpha_prev * x0 + row.sigma_prev * eps + sigma * noise, x0

    right = loop()
    return {
        "right, eta 0": right,
        "betas: scaled_linear": loop(table=jddim.step_table(jddim.scaled_linear_schedule(), table.t)),
        "betas: cosine": loop(table=jddim.step_table(jddim.cosine_schedule(), table.t)),
        "t: the next step's": loop(lambda model, x_t, t: model(x_t, jnp.maximum(t - 1000 // STEPS, 0))),
        "t: divided by T": loop(lambda model, x_t, t: model(x_t, t / 1000)),
        "predicts: v for eps": loop(prediction_type="v_prediction"),
        "x0: clipped, eps raw": loop(clip_range=(-1.0, 1.0)),
        "x0: clipped, eps anew": loop(clip_range=(-1.0, 1.0), rederive_eps=True),
        "ends: at alpha_bar_0": loop(table=jddim.step_table(ddim.schedule, table.t, set_alpha_to_one=False)),
        "starts: at t = 700": loop(table=jax.tree.map(lambda column: column[5:], table)),
        "pixels: read as [0, 1]": lambda x_T: 2 * right(x_T).clip(0, 1) - 1,
        "right, eta 1": loop(eta=1.0),
        "sigma: only added": loop(update=as_in_the_snippet),
    }


def main(ckpt: str, out: str = str(ROOT / "docs" / "conventions.png")) -> None:
    ddim = jddim.load(ckpt)
    x_T = jddim.initial_noise(jddim.sample_keys(jax.random.key(0), NUM), (28, 28, 1))
    drawn: dict[str, np.ndarray] = {}
    right = np.zeros(0)
    for label, row in rows(ddim).items():
        drawn[label] = np.asarray(row(x_T))
        if label.startswith("right"):
            right = drawn[label]
        print(f"{label:<24} {np.sqrt(np.mean((drawn[label] - right) ** 2)):.3f}")
    picture = grid(np.concatenate(list(drawn.values())), columns=NUM, side=2 * 28)
    save_picture(Path(out), labelled(picture, list(drawn)), {"num_steps": STEPS})
    print(f"{out}: {Path(out).stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
