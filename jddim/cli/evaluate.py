"""`jddim evaluate`: how far a set of images is from a reference."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim.cli.options import add_overwrite, print_json

if TYPE_CHECKING:
    import numpy as np

    from jddim.evaluate.metrics import Moments

STDOUT = Path("-")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    sub = command(
        "evaluate",
        _evaluate,
        "measure how far images are from a reference\nFD, KD, precision, recall; of digits by features of ours.",
        "samples.npz --reference ../shared/data/mnist\nmine.npz --reference theirs.npz --json figures.json\n"
        "pool3-of-mine.npy --reference fid_stats_cifar10.npz --features inception-pool3",
    )
    sub.add_argument("images", type=Path, help="as jddim sample writes them: .npz, .npy, a folder of PNGs, a grid")
    sub.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="DATA",
        help="images likewise, or a folder with MNIST's train-images-idx3-ubyte and -labels (.gz too)",
    )
    sub.add_argument(
        "--features",
        metavar="NAME",
        help="take both for features made elsewhere, .npy (n, d), or for the reference their mu and sigma, .npz; NAME "
        "is what the figures are called by. Inception's pool3 features by the FID's own weights make FD the FID",
    )
    sub.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the figures there, to many digits; without FILE: print them as one JSON document instead",
    )
    add_overwrite(sub)


def digit_features(path: Path) -> np.ndarray:
    """The features mnist-cnn-v1 `(n, 64)` of what `load_images` reads, or of a folder with MNIST's training files."""
    from jddim import images
    from jddim.evaluate import mnist_cnn

    try:
        if any((path / f"train-images-idx3-ubyte{end}").exists() for end in ("", ".gz")):
            found, _ = mnist_cnn.read_mnist(path, "train")
        else:
            found = images.load_images(path, (28, 28))
        return mnist_cnn.features(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def _features(path: Path, *, statistics: bool) -> np.ndarray | Moments:
    """Features `(n, d)` that were made elsewhere, .npy; or their statistics, an .npz with `mu` and `sigma`."""
    from jddim.evaluate.metrics import Moments
    from jddim.files import read_arrays

    try:
        held = read_arrays(path)
        if not isinstance(held, dict):
            if held.ndim != 2:
                raise ValueError(f"features must be (n, d), got shape {held.shape}")
            return held
        if statistics and {"mu", "sigma"} <= held.keys():
            return Moments.given(held["mu"], held["sigma"])
        raise ValueError(f"an .npz with {', '.join(held) or 'nothing'}")
    except ValueError as error:
        wanted = "features (n, d) as .npy" + (", or .npz statistics, mu and sigma" if statistics else "")
        raise ValueError(f"{path} does not hold {wanted}: {error}") from error


def _evaluate(args: argparse.Namespace) -> int:
    from jddim import images
    from jddim.evaluate import metrics, mnist_cnn

    if args.json not in (None, STDOUT):
        images.check_output(args.json, 1, formats={".json": "the figures"}, overwrite=args.overwrite)
    made: Any
    real: Any
    if args.features is None:
        name, made, real = mnist_cnn.NAME, digit_features(args.images), digit_features(args.reference)
    else:
        name = args.features
        made, real = _features(args.images, statistics=False), _features(args.reference, statistics=True)
    published = isinstance(real, metrics.Moments)
    of_real = real if published else metrics.Moments.of(real)
    distance = metrics.frechet_distance(metrics.Moments.of(made), of_real)
    figures: dict[str, Any] = {"features": name, "images": len(made)}
    figures |= {"reference": None if published else len(real), "frechet_distance": distance}
    against = "published statistics" if published else len(real)
    lines = [f"{len(made)} images against {against}", f"FD ({name})         {distance:.3f}"]
    few = len(made)
    if not published:  # which have no samples to compare with
        few = min(len(made), len(real), 10_000)
        kernel, deviation = metrics.kernel_distance(made, real)
        spread = None if math.isnan(deviation) else deviation
        precision, recall = metrics.precision_recall(real[:few], made[:few])
        figures |= {"kernel_distance": kernel, "kernel_distance_std": spread, "precision": precision, "recall": recall}
        over = "of all images at once" if spread is None else f"+- {spread:.4f} over 100 subsets"
        lines.append(f"KD ({name})         {kernel:.4f} {over}")
        lines.append(f"precision, recall ({name}, k = 3, {few} of each)  {precision:.3f}, {recall:.3f}")
    lines.append("FD falls with the number of images: compare it at equal numbers only")
    if few < 1000:
        lines.append(f"note: {few} images are few: below 1,000 or so these figures say little")
    if args.json == STDOUT:
        print_json(figures)
        return 0
    if args.json is not None:
        with images.atomic(args.json) as staging:
            staging.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(lines))
    return 0
