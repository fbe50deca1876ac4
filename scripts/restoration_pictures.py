"""Measures DDNM on held-out emoji and draws docs/restoration.png.

    python scripts/restoration_pictures.py DATA [FOLDER]       # DATA: scripts/emoji_data.py's folder; FOLDER: docs

Prints a table: of each operator the PSNR of A^+ y and of what is restored from y, in two numbers of steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from jax import Array

import jddim
from jddim import restoration, sampling
from jddim.cli.options import OneLineParser
from jddim.images import grid, labelled, save_picture
from jddim.restoration import Operator

ROOT = Path(__file__).resolve().parents[1]
NUM, SHOWN, STEPS, SIDE = 40, 10, (20, 50), 32


def operators() -> dict[str, Operator]:
    """By the name of what they do."""
    keep = np.random.default_rng(0).uniform(size=(SIDE, SIDE, 1)) < 0.3
    middle = np.ones((SIDE, SIDE, 1))
    middle[10:22, 10:22] = 0
    return {
        "30 % of pixels": restoration.inpainting(keep),
        "no middle": restoration.inpainting(middle),
        "2x smaller": restoration.average_pooling((SIDE, SIDE), 2),
        "4x smaller": restoration.average_pooling((SIDE, SIDE), 4),
        "grey": restoration.channel_mix(),
        "blurred": restoration.blur((SIDE, SIDE), np.ones(9) / 9),
    }


def psnr(images: Array, of: Array) -> float:
    """In dB, the mean over images; of [-1, 1], so the peak is 2."""
    error = ((np.clip(images, -1, 1) - of) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(4 / error)))


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="restoration_pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder with held-out.npz")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs", help="where the picture goes")
    args = parser.parse_args(argv)
    file = args.data / "held-out.npz"
    if missing := [path for path in (file, args.folder) if not path.exists()]:
        parser.error(f"there is no {missing[0]}")
    ddim = jddim.load(ROOT / "scripts" / "assets" / "emoji")
    with np.load(file) as arrays:
        chosen = np.linspace(0, len(arrays["arr_0"]) - 1, NUM).astype(int)
        images = (arrays["arr_0"][chosen] / 127.5 - 1).astype(np.float32)
        labels = arrays["arr_1"][chosen]
    keys = sampling.sample_keys(jax.random.key(0), NUM)
    x_T = sampling.initial_noise(keys, images.shape[1:])
    denoise = ddim.denoiser(labels=labels)
    rows, names = [images[:: NUM // SHOWN]], ["image"]
    for name, operator in operators().items():
        y = operator.forward(images)
        said = [f"{psnr(operator.pinv(y), images):.1f}"]
        for steps in STEPS:
            x_0 = jax.jit(
                lambda y, operator=operator, steps=steps: restoration.restore_loop(
                    denoise, operator, y, x_T, ddim.table(steps), key=keys, **ddim.conventions()
                )
            )(y)
            said.append(f"{psnr(x_0, images):.1f}")
        print(f"| {name} | {' | '.join(said)} |", flush=True)
        rows += [np.asarray(part)[:: NUM // SHOWN] for part in (operator.pinv(y), x_0)]
        names += [name, "restored"]
    save_picture(args.folder / "restoration.png", labelled(grid(np.concatenate(rows), SHOWN, side=64), names), {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
