"""mnist-cnn-v1: a small convolutional MNIST classifier, pure functions on a dict of arrays; and MNIST's own files.

It judges the shipped checkpoint's digits, and its last hidden layer is what `jddim evaluate` compares digits by.
scripts/train_classifier.py trains it and writes its file: 98.65% right on the test set.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jddim.files import read_gzip, read_regular

NAME = "mnist-cnn-v1"
FILE = Path(__file__).with_name("mnist_cnn.npz")
CONFIDENT = 0.9
"""A digit counts as named from this probability on."""

Params = dict[str, Array]
# 105,866 parameters. A kernel's last axis is its outputs.
SHAPES = {
    "conv1": (3, 3, 1, 16),
    "conv2": (3, 3, 16, 32),
    "dense1": (7 * 7 * 32, 64),
    "dense2": (64, 10),
}
FIGURES = ("test_accuracy", "test_confident")


def init(key: Array) -> Params:
    """He-normal kernels, zero biases."""
    params = {}
    for (name, shape), k in zip(SHAPES.items(), jax.random.split(key, len(SHAPES)), strict=True):
        fan_in = np.prod(shape[:-1])
        params[f"{name}/kernel"] = jnp.sqrt(2 / fan_in) * jax.random.normal(k, shape)
        params[f"{name}/bias"] = jnp.zeros(shape[-1])
    return params


def hidden(params: Params, images: Array) -> Array:
    """The last hidden layer `(n, 64)` of images `(n, 28, 28, 1)` in [-1, 1]."""
    x = images
    for name in ("conv1", "conv2"):
        x = lax.conv_general_dilated(
            x, params[f"{name}/kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"{name}/bias"])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1)
    return jax.nn.relu(x @ params["dense1/kernel"] + params["dense1/bias"])


_hidden = jax.jit(hidden)


def logits(params: Params, images: Array) -> Array:
    """`(n, 28, 28, 1)` in [-1, 1] -> `(n, 10)`."""
    return hidden(params, images) @ params["dense2/kernel"] + params["dense2/bias"]


@jax.jit
def predict(params: Params, images: Array) -> Array:
    """Probabilities `(n, 10)` of images `(n, 28, 28, 1)` in [-1, 1]."""
    return jax.nn.softmax(logits(params, images))


def features(images: Array | np.ndarray, params: Params | None = None) -> np.ndarray:
    """The last hidden layer `(n, 64)` of any number of images `(n, 28, 28, 1)` in [-1, 1], a thousand at a time.

    params: the shipped ones, if None. Raises ValueError for images of another shape, and for a NaN or infinity.
    """
    if images.shape[1:] != (28, 28, 1):
        raise ValueError(f"{NAME} looks at images of 28x28x1, these are {images.shape[1:]}")
    finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
    if not finite.all():
        raise ValueError(f"a NaN or infinity in image {np.flatnonzero(~np.asarray(finite))[0]}")
    params = load() if params is None else params
    size = min(1000, len(images))
    return np.concatenate([_hidden(params, images[i : i + size]) for i in range(0, len(images), size)])


def confident(probabilities: Array) -> float:
    """The share of images whose likeliest digit has at least `CONFIDENT`."""
    return float((np.asarray(probabilities).max(axis=1) >= CONFIDENT).mean())


def load(path: Path = FILE) -> Params:
    """The shipped parameters, kept as float16 and used as float32."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: jnp.asarray(arrays[name], jnp.float32) for name in arrays if name not in FIGURES}


def figures(path: Path = FILE) -> dict[str, float]:
    """What scripts/train_classifier.py measured of the file it wrote, on the 10,000 test images."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: float(arrays[name]) for name in FIGURES}


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An IDX file of bytes, FOLDER/NAME or FOLDER/NAME.gz: MNIST's images `(n, 28, 28)` or labels `(n,)`, uint8."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    try:
        raw = read_gzip(path) if path.suffix == ".gz" else read_regular(path)
        if raw[:3] != b"\0\0\x08" or len(raw) < 4:
            raise ValueError("those start with 000008 in hexadecimal")
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except ValueError as error:
        raise ValueError(f"{path} is no IDX file of bytes ({error})") from error


def read_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, 28, 28, 1)` float32 in [-1, 1] and labels `(n,)` of part "train" or "t10k"."""
    images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder} holds images {images.shape} and labels {labels.shape}, not one label an image")
    return images[..., None] / np.float32(127.5) - 1, labels
