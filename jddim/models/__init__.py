"""Networks, one module per wiring. A checkpoint's config says which is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import AutoencoderConfig, ClassifierConfig, DiTConfig, LucidrainsConfig, ModelConfig, UNetConfig
from jddim.models.autoencoder import Autoencoder
from jddim.models.classifier import Classifier
from jddim.models.dit import DiT
from jddim.models.lucidrains import LucidrainsUNet
from jddim.models.unet import UNet


class Network(Protocol):
    """What a wiring provides; an `nnx.Module`, so a pytree."""

    config: ModelConfig
    dtype: DTypeLike

    def __call__(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Array:
        """x_t `(b, h, w, input_channels)`, t `(b,)` or one, labels as the config says -> `(b, h, w, out_channels)`."""

    def activations(self, x_t: Array, t: ArrayLike, labels: ArrayLike | None = None) -> Iterator[tuple[str, Array]]:
        """The forward pass, one `(name, output)` per block in the order computed; the last is the output."""


class Keys(Protocol):
    """What a wiring draws its parameters with, where it is no `nnx.Rngs`."""

    def params(self) -> Array:
        """The next parameter's key."""


# By the name that a checkpoint's metadata has for the wiring: the config that describes it, the network it builds.
MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    "unet": (UNetConfig, UNet),
    "lucidrains": (LucidrainsConfig, LucidrainsUNet),
    "dit": (DiTConfig, DiT),
}
PARTS: dict[str, tuple[type[Any], type[Any]]] = {
    "classifier": (ClassifierConfig, Classifier),
    "autoencoder": (AutoencoderConfig, Autoencoder),
}
"""The wirings that are not sampled: what guides, and what makes images of latents."""


def build(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | Keys) -> Network:
    """The network that `config` describes, with fresh parameters. rngs: `nnx.Rngs`, or what has its `params()`."""
    network: Network = (MODELS | PARTS)[wiring_of(config)][1](config, dtype=dtype, rngs=rngs)
    return network


def wiring_of(config: ModelConfig) -> str:
    """The name that the config's wiring has in MODELS or PARTS."""
    return next(name for name, (cls, _) in (MODELS | PARTS).items() if cls is type(config))
