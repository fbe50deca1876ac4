"""How far apart two sets of images are, by any features: Frechet and kernel distances, precision and recall.

Features are `(n, d)` arrays from any function of images; all arithmetic here is float64 NumPy. A figure is named for
its features ("FD (mnist-cnn-v1)"): FID and KID are these distances by Inception's pool3 features, and only those may
be compared with published ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, gathered batch by batch without holding them.

    count: n; None: not told. mean: `(d,)`. scatter: `(d, d)`, the sum of outer products about the mean; their unbiased
    mean, the covariance, where n is not told.
    """

    count: int | None
    mean: Floats
    scatter: Floats

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Of features `(n, d)`."""
        x = _features(features)
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    @classmethod
    def given(cls, mean: ArrayLike, covariance: ArrayLike) -> Moments:
        """Of published statistics: mean `(d,)`, unbiased covariance `(d, d)`, of how many is not told."""
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"statistics must be (d,) and (d, d), got shapes {mean.shape} and {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("statistics hold a NaN or infinity")
        return cls(None, mean, covariance)

    def merged(self, other: Moments) -> Moments:
        """Of both sets together (Chan, Golub and LeVeque's update, which does not cancel).

        Raises ValueError if it is not known how many one of them are of.
        """
        if self.count is None or other.count is None:
            raise ValueError("published statistics do not tell of how many samples they are, so nothing can be added")
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Floats:
        """Unbiased, as the FID of the literature has it. Raises ValueError for n below 2."""
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


def moments(batches: Iterable[ArrayLike], features: Callable[[ArrayLike], ArrayLike]) -> Moments:
    """The moments of `features` of images that come in batches."""
    total: Moments | None = None
    for batch in batches:
        new = Moments.of(features(batch))
        total = new if total is None else total.merged(new)
    if total is None:
        raise ValueError("no images")
    return total


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) (Heusel et al., arXiv:1706.08500, Eq. 6), squared as there.

    The root's trace is that of (C_a^1/2 C_b C_a^1/2)^1/2, symmetric, so that `eigh` does without a matrix square root
    of a matrix that is none, and rounding's small negative eigenvalues are set to 0. Never below 0 but by rounding.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must be of one kind, got {a.mean.shape[0]} and {b.mean.shape[0]} of them")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    difference = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(inner, 0)).sum()
    return float(difference @ difference + traces)


def kernel_distance(
    x: ArrayLike, y: ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) over random subsets of the unbiased squared MMD (Binkowski et al., arXiv:1801.01401).

    The deviation is NaN where a subset is all there is of both.

    Kernel (x . y / d + 1)^3. x, y: features `(n, d)`, n >= subset_size, or a smaller size is taken. Around 0, and
    below, where both come from one distribution, whatever n: it has no bias, which the Frechet distance has.
    """
    x, y = _features(x), _features(y)
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 samples of each, got {len(x)} and {len(y)}")
    subsets = 1 if size == len(x) == len(y) else subsets
    rng = np.random.default_rng(seed)

    def kernel(a: Floats, b: Floats) -> Floats:
        cubes: Floats = (a @ b.T / a.shape[1] + 1) ** 3
        return cubes

    def between(a: Floats) -> float:  # without the pairs of a sample with itself
        k = kernel(a, a)
        mean: float = (k.sum() - np.trace(k)) / (size * (size - 1))
        return mean

    distances = []
    for _ in range(subsets):
        a, b = (v[rng.choice(len(v), size, replace=False)] for v in (x, y))
        distances.append(between(a) + between(b) - 2 * kernel(a, b).mean())
    return float(np.mean(distances)), float(np.std(distances)) if subsets > 1 else float("nan")


def precision_recall(real: ArrayLike, made: ArrayLike, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. (arXiv:1904.06991): shares of made in real's manifold, and of real in
    made's, a manifold being the balls around its points that reach to their k-th nearest neighbour.

    real, made: features `(n, d)`, best of equal n, on which both depend. Memory: n^2 float64.
    """
    real, made = _features(real), _features(made)
    if min(len(real), len(made)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} samples of each, got {len(real)} and {len(made)}")

    def squared(a: Floats, b: Floats) -> Floats:
        distances: Floats = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
        return distances

    def inside(points: Floats, of: Floats) -> float:
        radius = np.partition(squared(of, of), k, axis=1)[:, k]  # the 0-th is the point itself
        return float((squared(points, of) <= radius).any(axis=1).mean())

    return inside(made, real), inside(real, made)


def _features(values: ArrayLike) -> Floats:
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"features must be (n, d), got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features hold a NaN or infinity")
    return x
