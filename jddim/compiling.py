"""How the programs of `sample` and `invert` are compiled: what XLA does not choose by itself, in one place.

On a TPU nothing was run; of v5e XLA's compiler says (`scripts/tpu_compile`: CIFAR-10's network, 256 images a chip,
bfloat16, Mcycles a step) 48.97 as the network stands, about 44.9 with upsampling and its convolution as one, 39.2 with
the decoder's norms by parts as well (`jddim.tpu_layers`), and 36.8 with twice the scoped memory. Tried and left out:
four times that memory (0.3 less, twice as long to compile), q, k and v in one product (0.14 less), upsampling as four
convolutions (2.4 more than as it stands).

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
(10 interleaved calls). Left out: such a program cannot be serialised (std::bad_alloc), so each start would compile it,
and export could not promise where it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jddim.tpu_layers import with_tpu_layers
from jddim.winograd import with_winograd

CPU_OPTIONS: dict[str, bool | str] = {
    # Products of matrices stay with YNNPACK; convolutions do not go there.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


TPU_OPTIONS: dict[str, bool | str] = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
"""Twice the memory on the chip that a fused operation may use. For `LARGE_VMEM` alone: others may not have as much."""

LARGE_VMEM = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
"""Kinds of TPU, as jax names them (v5e, v5p, v6e), with 64 MiB of that memory or more."""


def compiler_options(platform: str | None = None, kind: str = "") -> dict[str, bool | str]:
    """What to pass to `jax.jit(..., compiler_options=...)` around a sampling loop.

    platform, kind: a device's `platform` and `device_kind`; by default those of jax's first.
    """
    if platform is None:
        platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    if platform == "tpu" and kind in LARGE_VMEM:
        return dict(TPU_OPTIONS)
    return dict(CPU_OPTIONS) if platform == "cpu" else {}


FASTER: dict[str, Callable[[Any], Any]] = {"cpu": with_winograd, "tpu": with_tpu_layers}
"""platform -> what `faster` does there."""


def faster(tree: Any, platform: str | None = None) -> Any:
    """A model, or whatever holds models, with layers that are faster there, equal to rounding.

    To be called where a program begins, before its loop. platform: by default jax's own.
    """
    return FASTER.get(platform or jax.default_backend(), lambda tree: tree)(tree)


class Jit:
    """`jax.jit` with `compiler_options` and `faster` for the device of its arguments.

    jax takes options for a whole program only: under a transformation of the caller's the function is a plain `jit`, a
    part of the caller's program, which has the caller's options.
    """

    def __init__(self, function: Callable[..., Any], static_argnames: Sequence[str]):
        self.function, self.static_argnames = function, static_argnames
        self.plain = jax.jit(function, static_argnames=static_argnames)
        self.on = functools.cache(self._on)

    def _on(self, platform: str, kind: str) -> Any:
        """The program for a kind of device."""

        @functools.wraps(self.function)
        def tuned(*args: Any, **kwargs: Any) -> Any:
            return self.function(*faster(args, platform), **kwargs)

        return jax.jit(tuned, static_argnames=self.static_argnames, compiler_options=compiler_options(platform, kind))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in [*leaves, jnp.zeros(())]):  # the last one's: under jit
            return self.plain(*args, **kwargs)
        kinds = {
            (device.platform, device.device_kind)
            for leaf in leaves
            if isinstance(leaf, jax.Array)
            for device in leaf.devices()
        }
        if len(kinds) != 1:
            return self.plain(*args, **kwargs)
        (kind,) = kinds
        return self.on(*kind)(*args, **kwargs)
