"""How the programs of `sample` and `invert` are compiled: what XLA does not choose by itself, in one place.

On a CPU, XLA gives convolutions to YNNPACK, whose 3x3 ones are slower than Eigen's at nearly all sizes in a UNet.
Medians of two runs, jax 0.10.2, 2 cores, one evaluation, milliseconds without and with the option: MNIST's network at
batch 64 449 -> 262 and 408 -> 244, at 16 106 -> 76 and 115 -> 72; CIFAR-10's at 8 803 -> 583 and 789 -> 591. Tried and
left out: Winograd's F(2x2, 3x3) is 1.3 times as fast again from 256 channels on, slower below 128, and takes half a
second to compile for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

CPU_OPTIONS: dict[str, bool | str] = {
    # Products of matrices stay with YNNPACK; convolutions do not go there.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def compiler_options(platform: str | None = None) -> dict[str, bool | str]:
    """What to pass to `jax.jit(..., compiler_options=...)` around a sampling loop; platform: by default jax's own."""
    return dict(CPU_OPTIONS) if (platform or jax.default_backend()) == "cpu" else {}


class Jit:
    """`jax.jit` with `compiler_options` for the device of its arguments.

    jax takes options for a whole program only: under a transformation of the caller's the function is a plain `jit`, a
    part of the caller's program, which has the caller's options.
    """

    def __init__(self, function: Callable[..., Any], static_argnames: Sequence[str]):
        self.plain = jax.jit(function, static_argnames=static_argnames)
        self.on_cpu = jax.jit(function, static_argnames=static_argnames, compiler_options=CPU_OPTIONS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in [*leaves, jnp.zeros(())]):  # the last one's: under jit
            return self.plain(*args, **kwargs)
        platforms = {device.platform for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
        return (self.on_cpu if platforms == {"cpu"} else self.plain)(*args, **kwargs)
