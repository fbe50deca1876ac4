"""Trains jddim/evaluate/mnist_cnn.py on MNIST and writes the file that tests/test_digits.py judges samples with.

Stopped early on purpose: the judge is to be as sure of real digits as the one that the reference figures come from
(98.7% right on the test set, confidence >= 0.9 on 96.5% of it), since more epochs make any classifier surer of
malformed digits too. Needs optax (the extra `train`); about two minutes on two cores.

Example:
  .venv/bin/python scripts/train_classifier.py DATA

DATA holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the t10k- pair, gzipped or plain.

"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

sys.path.insert(0, str(Path(__file__).parents[1]))
from jddim.evaluate import mnist_cnn as classifier
from jddim.evaluate.mnist_cnn import Params

SHIFT = 2  # pixels; MNIST is centred by mass, samples are so only roughly


def shifted(key: Array, images: Array) -> Array:
    """Each image moved by up to SHIFT pixels each way, its background filled in."""
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=-1)
    corners = jax.random.randint(key, (n, 2), 0, 2 * SHIFT + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, c)))(padded, corners)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(
    optimizer: optax.GradientTransformation, params: Params, state: Any, key: Array, images: Array, labels: Array
) -> tuple[Params, Any, Array]:
    def loss_of(params: Params) -> Array:
        outputs = classifier.logits(params, shifted(key, images))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(images: np.ndarray, labels: np.ndarray, *, epochs: int, batch_size: int, lr: float, seed: int) -> Params:
    key = jax.random.key(seed)
    rng = np.random.default_rng(seed)
    per_epoch = len(images) // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, epochs * per_epoch))
    params = classifier.init(jax.random.fold_in(key, 0))
    state = optimizer.init(params)
    started = time.perf_counter()
    for epoch in range(epochs):
        order = rng.permutation(len(images))
        losses = []
        for i in range(per_epoch):
            batch = order[i * batch_size : (i + 1) * batch_size]
            step_key = jax.random.fold_in(key, 1 + epoch * per_epoch + i)
            params, state, loss = update(
                optimizer, params, state, step_key, images[batch], labels[batch].astype(np.int32)
            )
            losses.append(loss)
        mean = np.mean(jax.device_get(losses))
        print(f"epoch {epoch + 1} of {epochs}: loss {mean:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    return params


def measure(params: Params, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and share of confident answers, under the names they have in the file."""
    probabilities = np.concatenate([classifier.predict(params, part) for part in np.split(images, 10)])
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    return dict(zip(classifier.FIGURES, (accuracy, classifier.confident(probabilities)), strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of MNIST's four IDX files")
    parser.add_argument("--out", type=Path, default=classifier.FILE, help="default: the file in jddim")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam, to 0 on a cosine (0.001)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        train_set = classifier.read_mnist(args.data, "train")
        test_images, test_labels = classifier.read_mnist(args.data, "t10k")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: cannot read MNIST: {error}", file=sys.stderr)
        return 1

    params = train(*train_set, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    kept = {name: np.asarray(value, np.float16) for name, value in params.items()}
    figures = measure(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), kept), test_images, test_labels)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, allow_pickle=False, **kept, **{k: np.float64(v) for k, v in figures.items()})
    before = measure(params, test_images, test_labels)
    for name, value in figures.items():
        print(f"{name} {value:.4f} (in float32 {before[name]:.4f})")
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
