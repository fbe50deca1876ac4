"""How the programs of `sample` and `invert` are compiled: what XLA does not choose by itself, in one place.

On a CPU, XLA gives convolutions to YNNPACK, whose 3x3 ones are slower than Eigen's at nearly all sizes in a UNet.
Medians of two runs, jax 0.10.2, 2 cores, one evaluation, milliseconds without and with the option: MNIST's network at
batch 64 449 -> 262 and 408 -> 244, at 16 106 -> 76 and 115 -> 72; CIFAR-10's at 8 803 -> 583 and 789 -> 591.

From 128 channels on `jddim.winograd` is faster again: CIFAR-10's at 8 524 -> 407 and 508 -> 400, medians of ten
interleaved calls, for 4 s more of compiling; 1.1 to 1.9 times for single convolutions of 128 to 512 channels and at
least 8 rows, batches of 1, 8 and 64. In MNIST's network, which has 64, it would be 1.02 to 1.06. Tried and left out,
since the whole network was not faster: group norms as sums over pixels by channel (0.98 to 1.07), q, k and v in one
product (0.98, 1.01), Eigen's products of matrices instead of YNNPACK's (0.99 to 1.02), and, of Winograd's, the
two-dimensional F(2x2) and F(4x4), input rows put together without padding (0.9), all six products as one convolution in
groups (0.7).

jaxlib has oneDNN's convolutions, PyTorch's own, but no option leads to them: the pass that would do so needs a macro
that its wheels are built without (jaxlib 0.10.2; IsOneDnnCompatible in XLA's cpu_compiler.cc). A custom call by their
name reaches them, and MNIST's network was 1.13 and 1.18 times as fast at batches of 64 and 16, CIFAR-10's no faster
(10 interleaved calls). Left out: such a program cannot be serialised (std::bad_alloc), so each start would compile it
and export could not write it, and XLA does not partition it over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jddim.winograd import with_winograd

CPU_OPTIONS: dict[str, bool | str] = {
    # Products of matrices stay with YNNPACK; convolutions do not go there.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def compiler_options(platform: str | None = None) -> dict[str, bool | str]:
    """What to pass to `jax.jit(..., compiler_options=...)` around a sampling loop; platform: by default jax's own."""
    return dict(CPU_OPTIONS) if (platform or jax.default_backend()) == "cpu" else {}


def faster(tree: Any, platform: str | None = None) -> Any:
    """A model, or whatever holds models, with layers that are faster there, equal to rounding; on a CPU `Winograd`.

    To be called where a program begins, before its loop. platform: by default jax's own.
    """
    return with_winograd(tree) if (platform or jax.default_backend()) == "cpu" else tree


class Jit:
    """`jax.jit` with `compiler_options` and `faster` for the device of its arguments.

    jax takes options for a whole program only: under a transformation of the caller's the function is a plain `jit`, a
    part of the caller's program, which has the caller's options.
    """

    def __init__(self, function: Callable[..., Any], static_argnames: Sequence[str]):
        @functools.wraps(function)
        def tuned(*args: Any, **kwargs: Any) -> Any:
            return function(*faster(args, "cpu"), **kwargs)

        self.plain = jax.jit(function, static_argnames=static_argnames)
        self.on_cpu = jax.jit(tuned, static_argnames=static_argnames, compiler_options=CPU_OPTIONS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in [*leaves, jnp.zeros(())]):  # the last one's: under jit
            return self.plain(*args, **kwargs)
        platforms = {device.platform for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
        return (self.on_cpu if platforms == {"cpu"} else self.plain)(*args, **kwargs)
