"""How many of the digits that were asked for are made, by guidance scale: judged by jddim.evaluate.mnist_cnn.

    PYTHONPATH=. python tests/measure_guided.py CKPT [--num 200] [--steps 20] [--scales 0,1,2,3]

CKPT: the MNIST network with classes 0 to 9 and the null label 10 (docs/training.md says how it is trained).
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

import jddim
from jddim.evaluate import mnist_cnn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt")
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scales", type=lambda text: [float(scale) for scale in text.split(",")], default=[0, 1, 2, 3])
    args = parser.parse_args()
    ddim, judge = jddim.load(args.ckpt), mnist_cnn.load()
    labels = jnp.arange(args.num) % 10
    how = {"num": args.num, "steps": args.steps, "eta": 0.0, "labels": labels, "null_label": 10, "batch_size": 50}
    for scale in args.scales:
        digits = ddim.sample(jax.random.key(0), guidance_scale=scale, **how)
        probabilities = mnist_cnn.predict(judge, digits)
        right = float((probabilities.argmax(-1) == labels).mean())
        print(f"scale {scale:g}: {right:.1%} as asked for; {mnist_cnn.confident(probabilities):.1%} confident")


if __name__ == "__main__":
    main()
