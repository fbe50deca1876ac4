"""Is the Flax model the PyTorch model? Both run on the same random inputs and are compared block by block."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jddim.config import ClassifierConfig, ModelConfig, UNetConfig
from jddim.converting import Verification
from jddim.installing import install_line
from jddim.models import Network

from .engine import ConversionError
from .families import Family
from .files.mapped import release

TOLERANCE = 1e-4
"""Largest error over largest output. float32 rounding through 60 convolutions leaves 1e-6 to 1e-5; a wrong epsilon,
padding or transpose 1e-3 and up."""


LARGE = 100_000_000
"""Parameters from which on one sample is run, not three, and XLA does not optimise: compiling would take longer."""


def can_verify() -> bool:
    """Whether PyTorch is installed here."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def verify(
    model: Network,
    tensors: Mapping[str, np.ndarray],
    family: Family,
    config: ModelConfig,
    t: np.ndarray,
    seed: int = 0,
    reference_options: Mapping[str, Any] | None = None,
) -> Verification:
    """Run the Flax model and the family's PyTorch reference, loaded from the source's own tensors, on random inputs.

    t: three, as the network is told them (1 in place of 0 where it takes log t), one for each sample of the batch; a
    `LARGE` network's has only the second. reference_options: the plan's. JAX multiplies in its highest precision (a GPU
    would use TF32 by default). Raises ConversionError where PyTorch is not installed.
    """
    if not can_verify():
        raise ConversionError(f"comparing with PyTorch needs PyTorch: {install_line('convert')}")
    import torch

    rng = np.random.default_rng(seed)
    large = sum(np.size(value) for value in tensors.values()) > LARGE
    t = t[1:2] if large else t
    if getattr(config, "time_embedding", None) == "fourier":
        t = np.maximum(t, 1)
    image_size = small_image_size(config)
    x_t = rng.standard_normal((len(t), *image_size, config.input_channels), dtype=np.float32)
    labels = random_labels(config, rng, len(t))

    # PyTorch first, then jax, so that only one of them holds memory beside the parameters.
    with torch.device("meta"):
        reference = family.reference(config, **(reference_options or {}))
    reference.load_state_dict({name: _to_torch(value) for name, value in tensors.items()}, assign=True)
    reference.eval()
    with torch.no_grad():
        outputs = reference.activations(
            torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(t.astype(np.int64) if t.dtype == np.int32 else t),
            None if labels is None else torch.from_numpy(labels),
        )
        expected = {}
        for name, output in outputs:
            expected[name] = _nhwc(output.numpy())
            release(*tensors.values())  # a block's weights are read from a mapped file when it runs, and stay no longer
    del reference

    inputs = (jnp.asarray(x_t), jnp.asarray(t), None if labels is None else jnp.asarray(labels))
    with jax.default_matmul_precision("highest"):
        program = jax.jit(lambda model, *inputs: dict(model.activations(*inputs))).lower(model, *inputs)
        options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"} if large else {}
        actual = program.compile(options)(model, *inputs)
    if expected.keys() != actual.keys():  # not their order: a dict leaves jit with its keys sorted
        raise AssertionError(f"the reference's blocks {list(expected)} are not the model's {list(actual)}")
    return Verification(
        blocks={name: scaled_error(np.asarray(actual[name], np.float32), expected[name]) for name in expected},
        t=tuple(t.tolist()),
        image_size=image_size,
        seed=seed,
        torch=torch.__version__,
        jax=jax.__version__,
        tolerance=TOLERANCE,
        all_zero=not list(expected.values())[-1].any(),
    )


def in_place(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters for `build_model` that jax reads where they are, if that is where it computes; else a copy there.

    For arrays that nobody writes to afterwards; jax pins what it makes of them to their device.
    """
    on_host = jax.default_backend() == "cpu"
    return {name: jax.dlpack.from_dlpack(value) if on_host else jnp.asarray(value) for name, value in params.items()}


def small_image_size(config: ModelConfig) -> tuple[int, int]:
    """2x3 at the coarsest level, where every tap of a 3x3 kernel still meets a pixel, or the trained size if smaller.

    The weights do not depend on the size, and a layout that is wrong at one is wrong at all. A classifier's do, so its
    is the trained one.
    """
    if isinstance(config, ClassifierConfig):
        return config.image_size
    height, width = config.image_size
    return min(height, 2 * config.size_factor), min(width, 3 * config.size_factor)


def random_labels(config: ModelConfig, rng: np.random.Generator, num: int) -> np.ndarray | None:
    """Labels `(num, ...)` that a network with classes takes, or None."""
    match config.class_embedding:
        case None:
            return None
        case "learned":
            return rng.integers(0, config.num_classes or 1, num)
        case "timestep":
            if isinstance(config, UNetConfig) and config.num_timesteps is not None:  # a row of the table of t
                return rng.integers(0, config.num_timesteps, num)
            return rng.uniform(1, 1000, num).astype(np.float32)
        case _:
            assert isinstance(config, UNetConfig)
            return rng.standard_normal((num, config.time_width), dtype=np.float32)


def scaled_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute error over the largest expected magnitude; NaN if either holds one."""
    scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (scale if scale > 0 else 1.0))


def _to_torch(value: np.ndarray) -> Any:
    """A float32 tensor, of the array's own memory where it is float32 (a mapped file's, which nothing writes to)."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(value, np.float32))


def _nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
