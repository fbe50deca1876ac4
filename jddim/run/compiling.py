"""How the programs of `sample` and `invert` are compiled: what XLA does not choose by itself, in one place.

On a CPU XLA gives convolutions and products of matrices to YNNPACK, which is slower than Eigen at nearly all sizes of a
UNet or a transformer: an option leaves both to Eigen. From 128 channels on `jddim.models.fast.winograd` is faster
again. On NVIDIA's GPUs CUDA graphs by default leave each convolution out, which cuts a step into some thirty; an option
makes it one. On TPUs with room for it a fused operation may use twice the memory on the chip. On both
`jddim.models.fast.lean_layers` has layers that read and write less. docs/benchmarks.md says what each was measured to
do, and what was tried and left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from jddim.models.fast.lean_layers import with_gpu_layers, with_tpu_layers
from jddim.models.fast.winograd import with_winograd

R = TypeVar("R")
P = ParamSpec("P")

CPU_OPTIONS: dict[str, bool | str] = {
    # Nothing goes to YNNPACK: neither convolutions nor products of matrices.
    "xla_cpu_experimental_ynn_fusion_type": "",
}

TPU_OPTIONS: dict[str, bool | str] = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
"""Twice the memory on the chip that a fused operation may use. For `LARGE_VMEM` alone: others may not have as much."""

LARGE_VMEM = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
"""Kinds of TPU, as jax names them (v5e, v5p, v6e), with 64 MiB of that memory or more."""


GPU_OPTIONS: dict[str, bool | str] = {
    # XLA's own kinds of command, and convolutions, which otherwise cut a step's CUDA graph into some thirty.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,CONVOLUTION"
    ),
}
"""For NVIDIA's GPUs."""


class Kind(NamedTuple):
    """What programs are compiled for. name: as `device_kind`; capability: the compute capability of an NVIDIA GPU."""

    platform: str
    name: str = ""
    capability: tuple[int, int] | None = None


def kind_of(device: jax.Device | None = None) -> Kind:
    """A device's kind; by default that of jax's first."""
    device = jax.devices()[0] if device is None else device
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # AMD's are gfx90a, ...
    capability = None if version is None else (int(version[1]), int(version[2]))
    return Kind(device.platform, device.device_kind, capability)


def compiler_options(kind: Kind | None = None) -> dict[str, bool | str]:
    """What to pass to `jax.jit(..., compiler_options=...)` around a sampling loop.

    kind: by default that of jax's first device.
    """
    kind = kind or kind_of()
    if kind.platform == "tpu" and kind.name in LARGE_VMEM:
        return dict(TPU_OPTIONS)
    if kind.platform == "gpu" and kind.capability is not None:
        return dict(GPU_OPTIONS)
    return dict(CPU_OPTIONS) if kind.platform == "cpu" else {}


def faster(tree: Any, kind: Kind | None = None) -> Any:
    """A model, or whatever holds models, with layers that are faster there, equal to rounding.

    To be called where a program begins, before its loop. kind: by default that of jax's first device.
    """
    kind = kind or kind_of()
    if kind.platform == "cpu":
        return with_winograd(tree)
    if kind.platform == "tpu":
        return with_tpu_layers(tree)
    return tree if kind.capability is None else with_gpu_layers(tree, kind.capability)


class Jit(Generic[P, R]):
    """`jax.jit` with `compiler_options` and `faster` for the device of its arguments.

    jax takes options for a whole program only: under a transformation of the caller's the function is a plain `jit`, a
    part of the caller's program, which has the caller's options.
    """

    def __init__(self, function: Callable[P, R], static_argnames: Sequence[str]):
        self.function, self.static_argnames = function, static_argnames
        self.plain = jax.jit(function, static_argnames=static_argnames)
        self.on = functools.cache(self._on)

    def _on(self, kind: Kind) -> Any:
        """The program for a kind of device, of its arguments' leaves: it takes milliseconds to flatten a model."""

        def tuned(held: list[Any], leaves: list[Any], structure: Any, **static: Any) -> Any:
            first, (args, kwargs) = map(jax.tree.unflatten, structure, (held, leaves))
            return self.function(*faster((first, *args), kind), **kwargs, **static)

        tuned.__name__ = tuned.__qualname__ = self.function.__name__
        return jax.jit(
            tuned, static_argnames=("structure", *self.static_argnames), compiler_options=compiler_options(kind)
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As the function."""
        return self.bound(args[0])(*args[1:], **kwargs)

    def bound(self, first: object) -> Bound[R]:
        """The function with its first argument in place, which is flattened once for all calls."""
        return Bound(self, first)


class Bound(Generic[R]):
    """A function of `Jit` whose first argument, a model for instance, is given already. leaves: that argument's."""

    def __init__(self, jitted: Jit[Any, R], first: object):
        self.jitted, self.first = jitted, first
        self.leaves, self.structure = jax.tree.flatten(first)

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """As the function, with the rest of its arguments."""
        jitted = self.jitted
        static = {name: kwargs.pop(name) for name in jitted.static_argnames if name in kwargs}
        leaves, structure = jax.tree.flatten((args, kwargs))
        every = [*self.leaves, *leaves]
        kinds: set[Kind] = set()
        if not is_traced(every):
            devices = {each for x in every if isinstance(x, jax.Array) for each in x.devices()}
            kinds = {kind_of(device) for device in devices}
        if len(kinds) != 1:
            result: R = jitted.plain(self.first, *args, **kwargs, **static)
            return result
        (kind,) = kinds
        tuned: R = jitted.on(kind)(self.leaves, leaves, structure=(self.structure, structure), **static)
        return tuned


def is_traced(leaves: Sequence[object]) -> bool:
    """Whether any leaf is traced, or a transformation of the caller's is under way."""
    under_jit = jnp.zeros(())  # then, a tracer
    return any(isinstance(leaf, jax.core.Tracer) for leaf in [*leaves, under_jit])
