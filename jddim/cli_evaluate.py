"""`jddim evaluate`: how far a set of images is from a reference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    sub = command(
        "evaluate",
        _evaluate,
        "how far digits are from a reference: FD, KD, precision and recall by the features mnist-cnn-v1",
        "samples.npz --reference ../data/mnist\nmine.npz --reference theirs.npz --json figures.json",
    )
    sub.add_argument("images", type=Path, help="as jddim sample writes them: .npz, .npy, a folder of PNGs, a grid")
    sub.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="DATA",
        help="images likewise, or a folder with MNIST's train-images-idx3-ubyte and -labels (.gz too)",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="the figures, to many digits")


def digit_features(path: Path) -> np.ndarray:
    """The features mnist-cnn-v1 `(n, 64)` of what `load_images` reads, or of a folder with MNIST's training files."""
    from jddim import images, mnist_cnn

    try:
        if any((path / f"train-images-idx3-ubyte{end}").exists() for end in ("", ".gz")):
            found, _ = mnist_cnn.read_mnist(path, "train")
        else:
            found = images.load_images(path, (28, 28))
        return mnist_cnn.features(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def _evaluate(args: argparse.Namespace) -> int:
    import numpy as np

    from jddim import images, metrics, mnist_cnn

    if args.json is not None:
        if args.json.suffix.lower() != ".json":
            raise ValueError(f"--json {args.json}: end it in .json")
        images.check_output(args.json, 1, formats=(".json",))
    made, real = digit_features(args.images), digit_features(args.reference)
    few = min(len(made), len(real), 10_000)
    kernel, deviation = metrics.kernel_distance(made, real)
    spread = None if np.isnan(deviation) else deviation
    precision, recall = metrics.precision_recall(real[:few], made[:few])
    figures = {
        "features": mnist_cnn.NAME,
        "images": len(made),
        "reference": len(real),
        "frechet_distance": metrics.frechet_distance(metrics.Moments.of(made), metrics.Moments.of(real)),
        "kernel_distance": kernel,
        "kernel_distance_std": spread,
        "precision": precision,
        "recall": recall,
    }
    if args.json is not None:
        with images.atomic(args.json) as staging:
            staging.write_text(json.dumps(figures, indent=2) + "\n")
    name = mnist_cnn.NAME
    print(f"{len(made)} images against {len(real)}")
    print(f"FD ({name})         {figures['frechet_distance']:.3f}")
    over = "of all images at once" if spread is None else f"+- {spread:.4f} over 100 subsets"
    print(f"KD ({name})         {kernel:.4f} {over}")
    print(f"precision, recall ({name}, k = 3, {few} of each)  {precision:.3f}, {recall:.3f}")
    print("FD falls with the number of images: compare it at equal numbers only")
    if few < 1000:
        print(f"note: {few} images are few: below 1,000 or so these figures say little")
    return 0
