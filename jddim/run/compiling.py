"""How the programs of `sample` and `invert` are compiled: what XLA does not choose by itself, in one place.

On a TPU nothing was run; of v5e XLA's compiler says (`scripts/tpu_compile`: CIFAR-10's network, 256 images a chip,
bfloat16, Mcycles a step) 48.97 as the network stands, about 44.9 with upsampling and its convolution as one, 39.2 with
the decoder's norms by parts as well (`lean_layers`), and 36.9 with twice the scoped memory. Tried and left out:
four times that memory (0.3 less, twice as long to compile), q, k and v in one product (0.14 less), upsampling as four
convolutions (2.4 more than as it stands).

On an H100 (CIFAR-10's network, bfloat16, 256 images, 10 steps as one program, jax 0.11.2, ms a step) the network takes
10.62 as it stands; 10.14 with upsampling and its convolution as one, 10.07 with the time embedding added by the norm
that reads it and not by the convolution, 10.06 with cuDNN's attention between 1x1 convolutions, 10.47 with norms in
one pass by channel; 9.15 with all four, 9.43 on a slower machine. There the decoder's norms by parts took 9.79 to
9.46, both times without CUDA graphs. In TF32 the network went from 19.4 to 16.7 with the four, but for cuDNN's
attention, which is not for it.

CUDA graphs, by default, leave each convolution out, so that a step is some thirty of them. With convolutions it is
one: nothing gained at 256 images, but 2.13 becomes 1.95 at 8, and MNIST's network as it stands, 16 images in TF32,
goes from 1.34 to 0.73.

Tried on the H100 and left out: q, k and v as separate products (10.23 with cuDNN's attention), the decoder's shortcuts
as two convolutions so that nothing is put side by side (as fast), norm, time and activation as one Pallas kernel (9.65
with the rest: a prototype, in Pallas for Triton, which jax has deprecated).

On a CPU, XLA gives convolutions to YNNPACK, whose 3x3 ones are slower than Eigen's at nearly all sizes in a UNet.
Medians of two runs, jax 0.10.2, 2 cores, one evaluation, milliseconds without and with the option: MNIST's network at
batch 64 449 -> 262 and 408 -> 244, at 16 106 -> 76 and 115 -> 72; CIFAR-10's at 8 803 -> 583 and 789 -> 591.

From 128 channels on `winograd` is faster again: CIFAR-10's at 8 524 -> 407 and 508 -> 400, medians of ten
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
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jddim.models.fast.lean_layers import with_gpu_layers, with_tpu_layers
from jddim.models.fast.winograd import with_winograd

CPU_OPTIONS: dict[str, bool | str] = {
    # Products of matrices stay with YNNPACK; convolutions do not go there.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
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


def kind_of(device: Any = None) -> Kind:
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


class Jit:
    """`jax.jit` with `compiler_options` and `faster` for the device of its arguments.

    jax takes options for a whole program only: under a transformation of the caller's the function is a plain `jit`, a
    part of the caller's program, which has the caller's options.
    """

    def __init__(self, function: Callable[..., Any], static_argnames: Sequence[str]):
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        return self.bound(args[0])(*args[1:], **kwargs)

    def bound(self, first: Any) -> Callable[..., Any]:
        """The function with its first argument in place, which is flattened once for all calls."""
        held, held_structure = jax.tree.flatten(first)

        def call(*args: Any, **kwargs: Any) -> Any:
            static = {name: kwargs.pop(name) for name in self.static_argnames if name in kwargs}
            leaves, structure = jax.tree.flatten((args, kwargs))
            under_jit = jnp.zeros(())  # then, a tracer
            every = [*held, *leaves]
            traced = any(isinstance(leaf, jax.core.Tracer) for leaf in [*every, under_jit])
            devices = set() if traced else {each for x in every if isinstance(x, jax.Array) for each in x.devices()}
            kinds = {kind_of(device) for device in devices}
            if len(kinds) != 1:
                return self.plain(first, *args, **kwargs, **static)
            (kind,) = kinds
            return self.on(kind)(held, leaves, structure=(held_structure, structure), **static)

        return call
