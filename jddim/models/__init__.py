"""Networks, one module per wiring. A checkpoint's config says which is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from jax import Array
from jax.typing import DTypeLike

from jddim.config import LucidrainsConfig, ModelConfig, UNetConfig
from jddim.models.lucidrains import LucidrainsUNet
from jddim.models.unet import UNet


class Network(Protocol):
    """What a wiring provides; an `nnx.Module`, so a pytree."""

    config: ModelConfig
    dtype: DTypeLike

    def __call__(self, x_t: Array, t: Array, labels: Array | None = None) -> Array:
        """x_t `(b, h, w, input_channels)`, t `(b,)`, labels as the config says -> `(b, h, w, out_channels)`."""

    def activations(self, x_t: Array, t: Array, labels: Array | None = None) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per block in the order computed; the last is the output."""


class Keys(Protocol):
    """What fresh parameters are drawn from: `nnx.Rngs`, or what has its `params()`."""

    def params(self) -> Array:
        """The next key."""


# By the name that a checkpoint's metadata has for the wiring: the config that describes it, the network it builds.
MODELS: dict[str, tuple[type[ModelConfig], Callable[..., UNet | LucidrainsUNet]]] = {
    "unet": (UNetConfig, UNet),
    "lucidrains": (LucidrainsConfig, LucidrainsUNet),
}


def build(config: ModelConfig, *, dtype: DTypeLike, rngs: Keys) -> UNet | LucidrainsUNet:
    """The network that `config` describes, with fresh parameters."""
    return MODELS[wiring_of(config)][1](config, dtype=dtype, rngs=rngs)


def wiring_of(config: ModelConfig) -> str:
    """The name that the config's wiring has in MODELS."""
    return next(name for name, (cls, _) in MODELS.items() if cls is type(config))
