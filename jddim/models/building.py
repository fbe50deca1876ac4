"""Networks from a config and parameters, or with shapes in place of parameters; and parameters by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jddim.config import ModelConfig
from jddim.models import Network, build

Params = Mapping[str, np.ndarray]
"""Dotted name -> array."""


def flat_params(model: nnx.Module | Network) -> dict[str, Any]:
    """A model's parameters by dotted path, `down.0.blocks.1.conv1.kernel`; arrays, or shapes of an abstract model."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract_model(config: ModelConfig, dtype: DTypeLike = np.float32) -> Network:
    """The model with shapes in place of parameters; nothing is allocated."""
    graph, leaves = _abstract(config, np.dtype(dtype))
    return _merged(graph, {path: leaf.get_value() for path, leaf in leaves.items()}, leaves)


def build_model(config: ModelConfig, params: Params | Mapping[str, Array], dtype: DTypeLike = np.float32) -> Network:
    """The model with these parameters. dtype: the compute dtype; parameters keep their own.

    Raises ValueError naming every parameter that is missing, not the model's, or of another shape (flax's own
    `merge` accepts all three).
    """
    graph, leaves = _abstract(config, np.dtype(dtype))
    check_fit(config, params)
    # All at once: an `asarray` for each takes jax 20 times as long, since it compiles one for each shape.
    moved = jax.device_put({name: value for name, value in params.items() if not isinstance(value, jax.Array)})
    values = {**params, **moved}
    return _merged(graph, {path: values[".".join(map(str, path))] for path in leaves}, leaves)


def check_fit(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Raise ValueError naming every parameter that is missing, not the model's, or of another shape."""
    _, leaves = _abstract(config, np.dtype(np.float32))
    expected = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in leaves.items()}
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in params]
    problems += [f"unexpected {name} {params[name].shape}" for name in params if name not in expected]
    problems += [
        f"{name} has shape {params[name].shape}, the model's is {expected[name]}"
        for name in expected
        if name in params and params[name].shape != expected[name]
    ]
    if problems:
        raise ValueError(f"{len(problems)} parameters do not fit the model: " + "; ".join(problems[:8]))


class _OneKey:
    """Stands in for `nnx.Rngs` where parameters are only shapes.

    Rngs counts its draws in a traced variable, and writing to one takes flax time proportional to all that has been
    traced so far: 8 s for the CIFAR-10 network, against 1.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> Array:
        return self.key


@functools.lru_cache(maxsize=16)
def _abstract(config: ModelConfig, dtype: np.dtype) -> tuple[Any, Mapping[Any, Any]]:
    """A model's graph and its variables by path, shapes in place of values. Shared: never changed, only replaced."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=_OneKey())))
    return graph, dict(nnx.to_flat_state(state))


def _merged(graph: Any, values: Mapping[Any, Any], leaves: Mapping[Any, Any]) -> Network:
    state = nnx.from_flat_state({path: leaves[path].replace(values[path]) for path in leaves})
    model: Network = nnx.merge(graph, state)
    return model
