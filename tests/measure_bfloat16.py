"""What computing the network in bfloat16 changes: the same x_T in both, step by step, and FD of both on MNIST.

    PYTHONPATH=. python tests/measure_bfloat16.py CKPT MNIST [--num 512] [--steps 20]

CKPT: the shipped checkpoint, converted; MNIST: the folder of its IDX files. The sampler's state, norms and softmax are
float32 in both. Prints docs/gpu.md's table; two minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jddim
from jddim.evaluate.metrics import frechet_distance, moments
from jddim.evaluate.mnist_cnn import features, read_mnist
from jddim.images import from_uint8, to_uint8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt")
    parser.add_argument("mnist")
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    both = [jddim.load(args.ckpt, dtype=dtype) for dtype in ("float32", "bfloat16")]
    key, size = jax.random.key(0), 64

    (_, full), (_, half) = (
        ddim.sample(key, size, steps=args.steps, eta=0.0, trajectory_every=1, batch_size=size) for ddim in both
    )
    eps = [jax.jit(ddim.denoiser()) for ddim in both]
    print(
        "| after step | t | x_t, rms of the difference over rms | eps of the same x_t, the same |\n|---|---:|---:|---:|"
    )
    for i in sorted({0, args.steps // 4, args.steps // 2, 3 * args.steps // 4, args.steps - 1}):
        now = int(full.t[i])  # where the step ended; after the last, there is no t to ask the network at
        outputs = [denoise(full.x_t[i], jnp.full(size, now, jnp.int32)) for denoise in eps] if now >= 0 else None
        of_eps = "" if outputs is None else f"{apart(*outputs):.1e}"
        print(f"| {i + 1} | {now} | {apart(full.x_t[i], half.x_t[i]):.1e} | {of_eps} |")

    sets = []
    for ddim in both:
        images = ddim.sample(key, args.num, steps=args.steps, eta=0.0, batch_size=size)
        sets.append(to_uint8(images))
    real = moments(np.array_split(read_mnist(Path(args.mnist), "train")[0], 100), features)
    of = [moments(np.array_split(from_uint8(images), 8), features) for images in sets]
    levels = np.abs(sets[0].astype(int) - sets[1].astype(int))
    print(f"FD to the training images, {args.num} images: " + ", ".join(f"{frechet_distance(m, real):.3f}" for m in of))
    print(f"FD between the two sets: {frechet_distance(*of):.4f}")
    print(
        f"levels of 255: mean {levels.mean():.2f}, 99th percentile {np.percentile(levels, 99):.0f}, most {levels.max()}"
    )


def apart(a: jax.Array, b: jax.Array) -> float:
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(a**2)))


if __name__ == "__main__":
    main()
