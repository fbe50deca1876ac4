"""What previews cost: digits in 50 steps, plainly, in segments, and with a picture of x0_hat written after each.

    PYTHONPATH=. python tests/measure_previews.py CKPT [--rounds 7]      (CKPT: the shipped checkpoint, converted)

Interleaved; prints the median of the rounds' ratios to the plain run's time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

import jddim
from jddim.images import grid, save_png
from jddim.pipeline import Preview


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    ddim = jddim.load(args.ckpt)
    picture = Path(tempfile.mkdtemp()) / "preview.png"

    def write(preview: Preview) -> None:
        save_png(picture, grid(preview.x0_hat), {})

    for num in (16, 64):
        sample = partial(ddim.sample, jax.random.key(0), num, steps=50)
        runs = {"plain": {}, "segments": {"on_segment": lambda preview: None}, "pictures": {"on_segment": write}}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round in range(args.rounds + 1):
            for name, how in runs.items():
                started = time.perf_counter()
                sample(**how).block_until_ready()
                if round:  # the first compiles
                    seconds[name].append(time.perf_counter() - started)
        plain = seconds["plain"]
        told = ", ".join(f"{name} {np.median(np.divide(of, plain)):.3f}" for name, of in seconds.items())
        print(f"{num} images, plain {np.median(plain):.2f} s: {told}")


if __name__ == "__main__":
    main()
