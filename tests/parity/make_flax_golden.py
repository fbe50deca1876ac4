"""Writes golden/flax.npz from diffusers' own Flax classes: `flax_cases` says what is in it.

    python tests/parity/make_flax_golden.py

In an environment with flax and diffusers 0.39.0, the last that has them. Needs to be run again only if a case changes.
"""

from __future__ import annotations

import json

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax_cases import DDIM, DDPM, DTYPES, GOLDEN, STAGE, ddim, ddpm, drawn, first_stage


def main() -> None:
    found: dict[str, np.ndarray] = {}
    clip = jnp.clip
    jnp.clip = lambda x, *limits, a_min=None: clip(x, *(limits or (a_min,)))  # a name that jax took away
    jax.config.update("jax_enable_x64", True)
    for dtype in DTYPES:
        for kind, cases, run in (("ddim", DDIM, ddim), ("ddpm", DDPM, ddpm)):
            for name in cases:
                found |= {f"{kind}/{name}/{dtype}/{key}": value for key, value in run(diffusers, name, dtype).items()}
    jax.config.update("jax_enable_x64", False)
    model = diffusers.FlaxAutoencoderKL(**STAGE)
    flat = flax.traverse_util.flatten_dict(model.init_weights(jax.random.key(0)), sep="/")
    shapes = {name: value.shape for name, value in flat.items()}
    params = flax.traverse_util.unflatten_dict({name: drawn(name, shapes[name]) for name in shapes}, sep="/")
    found |= {f"stage/{key}": value for key, value in first_stage(model, params).items()}
    np.savez_compressed(GOLDEN, shapes=json.dumps(shapes), **found)


if __name__ == "__main__":
    main()
