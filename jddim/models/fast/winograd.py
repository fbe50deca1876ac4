"""3x3 convolutions with half the multiplications, for CPUs: Winograd's F(4, 3) along the height (arXiv:1509.09308).

Four rows of the output take six products, where the plain convolution takes twelve. A product is one row of the
input, convolved along the width with one row of the kernel. The reason: four output rows from three kernel rows are
the transpose of a product of polynomials, one with three coefficients, one with four. That product has degree 5, so
six of its values determine it, and each value takes one multiplication. The algorithm therefore sums rows of the
input (B^T) and rows of the kernel (G), multiplies, and sums the products (A^T):

    y = A^T [(G w) * (B^T x)]

Here * is a convolution along the width, which XLA computes fast. The six points are 0, 1, -1, 2, -1/2 and infinity;
with the usual -2 in place of -1/2 the error is twice as large (arXiv:1803.10986). The error is about 1e-6 of the
output's largest value; the error of XLA's own convolution is 5e-7. F(2x2, 3x3) and F(4x4, 3x3) take 4/9 and 1/4 of
the multiplications, but move more memory: F(2x2, 3x3) was slower at all sizes tried, F(4x4, 3x3) at most of them,
with an error of 5e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

ROWS = 4
INPUT = np.array(  # B^T
    [
        [1, 3 / 2, -2, -3 / 2, 1, 0],
        [0, 2, 5, 1, -2, 0],
        [0, 2, 1, -5, 2, 0],
        [0, -1, -2, 1, 2, 0],
        [0, -2, 1, 2, -1, 0],
        [0, 1, 3 / 2, -2, -3 / 2, 1],
    ]
)
KERNEL = np.array(  # G
    [
        [1, 0, 0],
        [1 / 6, 1 / 6, 1 / 6],
        [1 / 6, -1 / 6, 1 / 6],
        [1 / 30, 2 / 30, 4 / 30],
        [16 / 15, -8 / 15, 4 / 15],
        [0, 0, 1],
    ]
)
OUTPUT = np.array(  # A^T
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -1 / 2, 0],
        [0, 1, 1, 4, 1 / 4, 0],
        [0, 1, -1, 8, -1 / 8, 1],
    ]
)


def transformed(kernel: Array) -> list[Array]:
    """G w: the kernel `(3, 3, in, out)` as six kernels of one row, `(1, 3, in, out)` each, for `convolve`."""
    return _sums(KERNEL, [kernel[i : i + 1] for i in range(3)])


def convolve(x: Array, kernels: Sequence[Array]) -> Array:
    """The convolution of x `(b, h, w, in)`, padded by zeros: `(b, h, w, out)`. kernels: from `transformed`."""
    b, h, w, _ = x.shape
    count = -(-h // ROWS)  # of groups of four rows, the last filled up with zeros
    padded = jnp.pad(x, ((0, 0), (1, count * ROWS - h + 1), (0, 0), (0, 0)))
    last = (count - 1) * ROWS + 1
    rows = [lax.slice_in_dim(padded, i, i + last, ROWS, axis=1) for i in range(len(KERNEL))]
    products = [
        lax.conv_general_dilated(row, kernel, (1, 1), ((0, 0), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        for row, kernel in zip(_sums(INPUT, rows), kernels, strict=True)
    ]
    groups = jnp.stack(_sums(OUTPUT, products), axis=2)
    return groups.reshape(b, count * ROWS, w, -1)[:, :h]


def _sums(matrix: np.ndarray, terms: list[Array]) -> list[Array]:
    """The matrix times the vector of terms; entries that are 0 cost nothing."""
    rows = []
    for row in matrix.tolist():
        total: Any = None
        for factor, term in zip(row, terms, strict=True):
            if factor:
                part = term if factor == 1 else factor * term
                total = part if total is None else total + part
        rows.append(total)
    return rows


class Winograd(nnx.Module):
    """Stands in a network for a 3x3 convolution. The kernel is transformed once, when the layer is made."""

    def __init__(self, conv: nnx.Conv):
        self.conv = conv
        self.kernels = nnx.List([nnx.Param(kernel) for kernel in transformed(conv.kernel[...])])

    def __call__(self, x: Array) -> Array:
        if not pays(self.conv, x.shape[1]):
            return self.conv(x)
        y = convolve(x, [kernel[...] for kernel in self.kernels])
        return y if self.conv.bias is None else y + self.conv.bias[...]


def pays(conv: nnx.Conv, height: int) -> bool:
    """Whether `convolve` is faster than XLA: below 128 channels the sums cost more than the products save."""
    return min(conv.in_features, conv.out_features) >= 128 and height >= 2 * ROWS


def with_winograd(tree: Any) -> Any:
    """A copy of a model, or of a pytree of models, with `Winograd` in place of each convolution that it can replace.

    Those are the float32 3x3 convolutions that `jddim.models.layers.conv` makes, from 128 channels on. The copy
    computes the same function to rounding, and the original stays unchanged.
    """
    return jax.tree.map(
        lambda node: Winograd(node) if isinstance(node, nnx.Conv) and _fits(node) else node,
        tree,
        is_leaf=lambda node: isinstance(node, nnx.Conv),
    )


def _fits(conv: nnx.Conv) -> bool:
    plain = conv.strides in (1, (1, 1)) and conv.padding == ((1, 1), (1, 1)) and conv.feature_group_count == 1
    undilated = all(by in (None, 1, (1, 1)) for by in (conv.input_dilation, conv.kernel_dilation))
    dtypes = {jnp.dtype(dtype) for dtype in (conv.kernel[...].dtype, conv.dtype) if dtype is not None}
    shape = conv.kernel_shape[:2] == (3, 3) and conv.mask is None
    return plain and undilated and shape and dtypes == {jnp.dtype(jnp.float32)} and pays(conv, 2 * ROWS)
