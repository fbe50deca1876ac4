"""Images to train on, in memory or mapped from a file, and the order they are seen in. NumPy and Pillow only.

The order is a function of (seed, step): every epoch is a permutation of its own, drawn from a counter-based generator,
so nothing of it has to be saved, and a process that knows its number takes its part without hearing of the others.
(grain does this too. It takes two seconds to import and brings 20 MB, readers of other formats and worker processes,
which pixels that lie in one array have no use for.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from jddim.config import AutoencoderConfig, ModelConfig, image_shape
from jddim.evaluate.mnist_cnn import read_mnist
from jddim.files import read_arrays
from jddim.images import from_uint8, open_picture
from jddim.installing import install_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
MNIST = "train-images-idx3-ubyte"
HUB = "hf:"


class Data(NamedTuple):
    """pixels: `(n, h, w, c)` uint8, or floats in [-1, 1]; or latents. labels: `(n,)` int32, or None. bad: left out."""

    pixels: np.ndarray
    labels: NDArray[np.int32] | None
    bad: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], config: ModelConfig, stage: AutoencoderConfig | None = None) -> Data:
    """The images at `path` as this network takes them, `(n, *image_size, in_channels)`; or as a first stage does.

    stage: that of a network of latents. An array of the latents' shape is taken as latents then, which are any floats.

    A folder of MNIST's IDX files (the training part); a folder of pictures, below it at any depth; `.npy`, mapped and
    not read, or `.npz` with `arr_0`: uint8, or floats in [-1, 1], of the network's size. Pictures of another size are
    scaled, the shorter side to fit, and cut in the middle; they are kept as uint8. "hf:NAME", with "#CONFIG" and
    "@SPLIT" ("train") after it if needed: what `datasets.load_dataset` finds under that name, which is downloaded.

    Labels, if the network has classes: MNIST's, a picture's folder (the folders' names in order are 0, 1, ...), `arr_1`
    of an `.npz`, a dataset's column of classes. Pictures that cannot be read are left out and named in `bad`. Raises
    ValueError, or OSError, if there is no image left, or if the images do not fit the network.
    """
    target, latents = Path(path), (*config.image_size, config.in_channels)
    shape = image_shape(config, stage)
    if str(path).startswith(HUB):
        found = _hub_dataset(str(path).removeprefix(HUB), config, shape)
    elif target.is_dir():
        if (target / MNIST).exists() or (target / f"{MNIST}.gz").exists():
            images, digits = read_mnist(target, "train")
            found = Data(((images + 1) * 127.5).round().astype(np.uint8), digits.astype(np.int32))
        else:
            found = _pictures(target, config, shape)
    else:
        found = _array(target)
        if found.pixels.dtype != np.uint8:
            _check_floats(target, found.pixels, latents=found.pixels.shape[1:] == latents != shape)
    problems = []
    given = found.pixels.shape[1:]
    if given != shape and (given != latents or found.pixels.dtype == np.uint8):
        turned = given == (shape[2], *shape[:2])
        hint = ": channels come last, array.transpose(0, 2, 3, 1)" if turned else ""
        own = "" if stage is None else f" and its latents, as floats, {_by(latents)}"
        problems.append(f"images are {_by(given)}, the network's are {_by(shape)}{own}{hint}")
    if not len(found.pixels):
        problems.append("there is no image")
    labels = found.labels
    if config.class_embedding is None:
        labels = None
    elif labels is None:
        problems.append(
            "the network has classes, the images no labels: put pictures in a folder for each class, or arr_1 in a .npz"
        )
    elif len(labels) != len(found.pixels):
        problems.append(f"{len(labels)} labels for {len(found.pixels)} images")
    elif len(labels) and not 0 <= labels.min() <= labels.max() < (config.num_classes or 0):
        problems.append(
            f"labels must lie in 0..{(config.num_classes or 0) - 1}, got {labels.min()}..{labels.max()}: the network "
            f"has {config.num_classes} classes (in a folder of pictures each folder is one)"
        )
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return found._replace(labels=labels)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _array(path: Path) -> Data:
    if path.suffix.lower() not in (".npy", ".npz"):
        if path.exists():
            raise ValueError(f"{path}: images are read from .npy, .npz, a folder of pictures or MNIST's folder")
        raise FileNotFoundError(f"no such file or folder: {path}")
    try:
        held = read_arrays(path, ["arr_0", "arr_1"], mapped=True)
    except ValueError as error:
        raise ValueError(f"{path} holds no images: {error}") from error
    if isinstance(held, dict) and "arr_0" not in held:
        raise ValueError(f"{path} holds no images: it is an archive without arr_0")
    pixels, labels = (held["arr_0"], held.get("arr_1")) if isinstance(held, dict) else (held, None)
    if pixels.ndim != 4 or pixels.dtype not in (np.uint8, np.float32, np.float64, np.float16):
        raise ValueError(f"{path} must hold images (N, H, W, C), uint8 or floats, got {pixels.dtype} {pixels.shape}")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: arr_1 must hold labels, (N,) integers, got {labels.dtype} {labels.shape}")
    return Data(pixels, None if labels is None else labels.astype(np.int32))


def _check_floats(path: Path, pixels: np.ndarray, *, latents: bool) -> None:
    """Raise ValueError for images beyond [-1, 1], and for latents that are no numbers."""
    for start in range(0, len(pixels), 4096):  # mapped ones are looked at in parts
        part = np.asarray(pixels[start : start + 4096])
        good = np.isfinite(part) if latents else np.abs(part) <= 1.0 + 1e-6
        outside = ~good.reshape(len(part), -1).all(axis=1)
        if outside.any():
            first = start + int(outside.argmax())
            if latents:
                raise ValueError(f"{path}: latent {first} holds a NaN or infinity")
            hint = "; save pixels of 0..255 as uint8" if part.min() >= 0 and part.max() > 2 else ""
            raise ValueError(f"{path}: floats must lie in [-1, 1]; those of image {first} do not{hint}")


def _pictures(folder: Path, config: ModelConfig, shape: tuple[int, int, int]) -> Data:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder}: neither MNIST's {MNIST} nor pictures ({', '.join(SUFFIXES)})")
    classes = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    labelled = all(file.parent != folder for file in files)
    if config.class_embedding is not None and classes and not labelled:
        loose = next(file for file in files if file.parent == folder)
        raise ValueError(f"{loose} lies beside the folders of classes, and so has no label: move it into one, or away")
    labels = None
    if labelled:
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[file.relative_to(folder).parts[0]] for file in files], np.int32)
    return decoded(str(folder), [(str(file.relative_to(folder)), file) for file in files], labels, shape)


def decoded(
    where: str,
    pictures: Sequence[tuple[str, Path | bytes]],
    labels: NDArray[np.int32] | None,
    shape: tuple[int, int, int],
) -> Data:
    """Pictures, (name, file or its bytes), as uint8 `shape`. Raises ValueError if none can be read."""
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(f"{where}: pictures have 1 or 3 channels, the network takes {channels}; use .npy")
    pixels = np.empty((len(pictures), height, width, channels), np.uint8)

    def decode(i: int) -> str | None:
        name, file = pictures[i]
        try:
            pixels[i] = _decode(file, (width, height), channels)
        except (OSError, ValueError) as error:
            return f"{name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(decode, range(len(pictures))))
    bad = tuple(problem for problem in problems if problem is not None)
    if len(bad) == len(pictures):
        raise ValueError(f"{where}: none of {len(pictures)} pictures can be read: {'; '.join(bad[:3])}")
    if bad:
        good = np.flatnonzero([problem is None for problem in problems])
        pixels, labels = pixels[good], None if labels is None else labels[good]
    return Data(pixels, labels, bad)


def _decode(file: Path | bytes, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """One picture as `(h, w, channels)`; size: (width, height), as Pillow has it."""
    with open_picture(file) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            raise ValueError("transparent in places: flatten it first")
        if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):  # 16 bits would be clipped, not scaled
            raise ValueError(f"pictures have 8 bits a channel, this one is {image.mode}: save it so")
        whole = image.convert("L" if channels == 1 else "RGB")
    if whole.size != size:
        whole = ImageOps.fit(whole, size, Image.Resampling.BICUBIC)
    return np.asarray(whole).reshape(size[1], size[0], channels)


def _hub_dataset(wanted: str, config: ModelConfig, shape: tuple[int, int, int]) -> Data:
    """NAME[#CONFIG][@SPLIT] of Hugging Face datasets: its first column of pictures, and of classes."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{HUB}{wanted} needs datasets: {install_line('datasets')}") from error
    name, _, split = wanted.partition("@")
    name, _, subset = name.partition("#")
    if not name:
        raise ValueError(f"{HUB}{wanted} names no dataset: give {HUB}NAME, or {HUB}NAME#CONFIG@SPLIT")
    if name[0] in "./~" and not Path(name).exists():
        raise FileNotFoundError(f"{HUB}{wanted}: no such file or folder: {name}")
    try:
        rows = datasets.load_dataset(name, subset or None, split=split or "train")
    except Exception as error:  # of many kinds: not there, no such split, no network, no permission
        told = str(error).strip().splitlines()
        raise ValueError(
            f"{HUB}{wanted} cannot be loaded ({type(error).__name__}: {told[0] if told else ''}): "
            f"give {HUB}NAME, or {HUB}NAME#CONFIG@SPLIT"
        ) from error
    pictures, classes = (
        [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if not pictures:
        raise ValueError(f"{HUB}{wanted} has no column of pictures, its columns are {', '.join(rows.features)}")
    if config.class_embedding is not None and not classes:
        raise ValueError(
            f"{HUB}{wanted} has no column of classes (ClassLabel), and the network has classes; its columns are "
            + ", ".join(rows.features)
        )
    encoded = rows.cast_column(pictures[0], datasets.Image(decode=False))[pictures[0]]
    files = [(f"row {i}", row["bytes"] or Path(row["path"])) for i, row in enumerate(encoded)]
    labels = np.array(rows[classes[0]], np.int32) if classes else None
    return decoded(f"{HUB}{wanted}", files, labels, shape)


# -- the order --------------------------------------------------------------------------------------------------------

ORDER, FLIP = 0, 1


def _random(seed: int, what: int, epoch: int, n: int) -> NDArray[np.uint64]:
    """So many random 64-bit numbers of an epoch: Philox's own output, which NumPy promises not to change."""
    return np.random.Philox(key=np.array([seed, 2 * epoch + what], np.uint64)).random_raw(n)


class Order:
    """Which images a step sees: `order.rows(step)`. Each epoch has every image once; batches may cross over."""

    def __init__(self, num: int, batch_size: int, seed: int):
        self.num, self.batch_size, self.seed = num, batch_size, seed
        self._epochs: dict[int, tuple[NDArray[np.intp], NDArray[np.bool_]]] = {}

    def _epoch(self, epoch: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        if epoch not in self._epochs:
            self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1}
            order = np.argsort(_random(self.seed, ORDER, epoch, self.num), kind="stable")
            self._epochs[epoch] = order, (_random(self.seed, FLIP, epoch, self.num) & 1).astype(bool)
        return self._epochs[epoch]

    def rows(self, step: int, process: tuple[int, int] = (0, 1)) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """The images `(b,)` of step 0, 1, ..., and which of them would be mirrored.

        process: (i, n): the i-th of n equal parts of the batch. Raises ValueError if it has none.
        """
        i, n = process
        if not 0 <= i < n or self.batch_size % n:
            raise ValueError(f"a batch of {self.batch_size} has no part {i} of {n}")
        part = self.batch_size // n
        first = step * self.batch_size + i * part
        places = np.arange(first, first + part)
        picked = np.empty(part, np.intp)
        flips = np.empty(part, bool)
        for epoch in np.unique(places // self.num).tolist():
            inside = places // self.num == epoch
            order, mirrored = self._epoch(epoch)
            picked[inside], flips[inside] = order[places[inside] % self.num], mirrored[places[inside] % self.num]
        return picked, flips


def in_range(pixels: np.ndarray) -> NDArray[np.float32]:
    """Images float32 in [-1, 1] of what `Data` holds; latents as they are."""
    return from_uint8(np.asarray(pixels)) if pixels.dtype == np.uint8 else np.asarray(pixels, np.float32)


def batches(
    data: Data, *, batch_size: int, seed: int, flip: bool, start: int = 0, process: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start, start + 1, ... without end: images `(b, h, w, c)` float32 in [-1, 1], and labels.

    The same for every start: nothing is carried from one to the next. process: as for `Order.rows`.
    """
    order, step = Order(len(data.pixels), batch_size, seed), start
    while True:
        rows, mirrored = order.rows(step, process)
        images = in_range(data.pixels[rows])
        if flip:
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        yield {"images": images} if data.labels is None else {"images": images, "labels": data.labels[rows]}
        step += 1
