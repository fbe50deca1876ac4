"""Prints the table of docs/inversion.md: how well the shipped checkpoint's digits survive x_0 -> x_T -> x_0.

    PYTHONPATH=.:tests python tests/measure_inversion.py CKPT [S ...]    (CKPT: the shipped checkpoint, converted)

The first 8 digits of MNIST's test set where it is beside the checkout (or at $MNIST), else 8 samples of the model; the
checkpoint's own conventions (uniform spacing, x0 not clipped), S steps either way. Mean squared errors in [0, 1].
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jddim
from jddim.evaluate import mnist_cnn as classifier
from jddim.inversion import invert_loop, reconstruction_error
from jddim.sampling import sample_loop

DATA = Path(os.environ.get("MNIST", Path(__file__).parent.parent.parent / "shared" / "data" / "mnist"))
NUM = 8
STEPS = (10, 20, 50, 100, 200, 500, 1000)
WAYS = [(convention, 0) for convention in ("paper", "diffusers", "openai")] + [("diffusers", k) for k in (1, 2, 5)]
MOST = 100  # S up to which k above 1 is measured: a step takes k + 1 evaluations


@partial(jax.jit, static_argnames=("S", "convention", "refine"))
def there(model, x_0, S, convention, refine):
    return invert_loop(model, x_0, tables[S], convention=convention, refine=refine)


@partial(jax.jit, static_argnames="S")
def back(model, x_T, S):
    return sample_loop(model, x_T, tables[S])


if __name__ == "__main__":
    ddim = jddim.load(sys.argv[1])
    if DATA.is_dir():
        x_0, _ = classifier.read_mnist(DATA, "t10k")
        x_0 = jnp.asarray(x_0[:NUM], jnp.float32)
    else:
        x_0 = ddim.sample(jax.random.key(0), NUM, steps=100, eta=1.0)
    chosen = [int(word) for word in sys.argv[2:]] or STEPS
    tables = {S: ddim.table(S) for S in chosen}
    for S in chosen:
        for convention, refine in WAYS:
            if refine > 1 and S > MOST:
                continue
            x_T = there(ddim.model, x_0, S, convention, refine)
            error = np.asarray(reconstruction_error(x_0, back(ddim.model, x_T, S)))
            print(
                f"S {S:5} {convention:>10} refine {refine:2}: mean {error.mean():.3e} largest {error.max():.3e}; "
                f"x_T mean {x_T.mean():.3f} std {x_T.std():.3f}",
                flush=True,
            )
