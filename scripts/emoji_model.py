"""Makes scripts/assets/emoji, a jddim checkpoint, of the pipeline that scripts/train_diffusers.py trained on emoji.

    python scripts/train_diffusers.py scripts/emoji.json DATA/train.npz PIPELINE      # DATA: scripts/emoji_data.py
    python scripts/emoji_model.py PIPELINE DATA scripts/assets/emoji

Beside the conversion it records what a pipeline has no place for: the null label, and the classes' names. Then it
measures samples against DATA, and draws them (eta 0), those that are nearest to pictures of the training set beside
these, and one sample a class at five eta: docs/emoji.png, docs/emoji-nearest.png and docs/emoji-eta.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
import jddim
from convert.conversion import convert
from jddim.checkpoint.folder import load_params, save_checkpoint
from jddim.cli.options import OneLineParser
from jddim.images import grid, labelled, save_picture

LICENCE = "Apache-2.0"
PER_CLASS, SCALE, STEPS, SHOWN = 12, 2.0, 50, 12
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def ship(pipeline: Path, names: list[str], out: Path) -> None:
    """The pipeline as a checkpoint whose last label is the null label, in the place of `out`, whose licence stays."""
    texts = {file: file.read_bytes() for file in (out / "LICENSE", out / "NOTICE") if file.exists()}
    told = {"null_label": len(names), "label_names": {name: i for i, name in enumerate(names)}}
    with tempfile.TemporaryDirectory() as folder:
        metadata = convert(pipeline, Path(folder) / "converted", license=LICENCE)
        params = load_params(Path(folder) / "converted", metadata)
    provenance = {**metadata.provenance, **told}
    save_checkpoint(out, params, dataclasses.replace(metadata, provenance=provenance), overwrite=True)
    for file, text in texts.items():
        file.write_bytes(text)


def nearest(images: NDArray[np.float32], among: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Of each image the nearest by the root mean square over pixels: (which, how far, 2 being black to white)."""
    a, b = images.reshape(len(images), -1).astype(np.float64), among.reshape(len(among), -1).astype(np.float64)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    which = squares.argmin(1)
    return which, np.sqrt(np.maximum(squares[np.arange(len(a)), which], 0) / a.shape[1])


def read(file: Path) -> NDArray[np.float32]:
    with np.load(file) as arrays:
        return (arrays["arr_0"] / 127.5 - 1).astype(np.float32)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="emoji_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("data", type=Path, help="a folder with train.npz and held-out.npz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=Path, default=Path("docs"), help="where the pictures go")
    args = parser.parse_args(argv)
    try:
        train, held_out = read(args.data / "train.npz"), read(args.data / "held-out.npz")
        with np.load(args.data / "train.npz") as arrays:
            names = [str(name) for name in arrays["categories"]]
        if not args.pictures.is_dir():
            raise ValueError(f"no folder {args.pictures} for the pictures")
        ship(args.pipeline, names, args.out)
    except (OSError, ValueError, KeyError) as error:
        parser.error(" ".join(str(error).split()))

    ddim = jddim.load(args.out)
    labels = np.tile(np.arange(len(names)), PER_CLASS)
    how = {"labels": labels, "guidance_scale": SCALE, "steps": STEPS, "batch_size": 50}
    for eta in (1.0, 0.0):
        samples = np.asarray(ddim.sample(jax.random.key(0), len(labels), eta=eta, **how))
        which, far = nearest(samples, train)
        copies = " ".join(f"{value:.3f}" for value in np.quantile(far, [0, 0.05, 0.5]))
        print(f"eta {eta:g}: distance to the nearest of the training set, least, 5 %, median: {copies}")
    far_held_out = nearest(held_out, train)[1]
    print("the same of held-out pictures:", " ".join(f"{v:.3f}" for v in np.quantile(far_held_out, [0, 0.05, 0.5])))
    closest = np.argsort(far)[:SHOWN]
    rows = np.concatenate([samples[closest], train[which[closest]]])
    save_picture(args.pictures / "emoji-nearest.png", labelled(grid(rows, SHOWN, side=64), ["sample", "nearest"]), {})
    by_class = samples[np.argsort(labels, kind="stable")]
    save_picture(args.pictures / "emoji.png", labelled(grid(by_class, PER_CLASS, side=64), names), {})
    sweep = [
        np.asarray(ddim.sample(jax.random.key(5), len(names), eta=eta, **{**how, "labels": np.arange(len(names))}))
        for eta in ETAS
    ]
    strip = grid(np.concatenate(sweep), len(names), side=64)
    save_picture(args.pictures / "emoji-eta.png", labelled(strip, [f"eta {eta:g}" for eta in ETAS]), {})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
