"""Random state dicts of families whose names are a rename table on another's wiring, made without torch."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from convert.engine import _ones
from convert.rules import source_of, torch_shape
from jddim.config import ModelConfig
from jddim.models.building import abstract_model, flat_params


def state_dict(family: ModuleType, config: ModelConfig, seed: int, **options: bool) -> dict[str, np.ndarray]:
    """The tensors that `family` asks for, norms' scales about 1. (That the source has these, its golden file shows.)

    options: of the family's rename table.
    """
    rng = np.random.default_rng(seed)
    rules, pointwise = family.rules(config, **options), family.FAMILY.pointwise
    state: dict[str, np.ndarray] = {}
    for leaf, abstract in flat_params(abstract_model(config)).items():
        name = source_of(leaf, rules)
        shape = torch_shape(abstract.shape, np.empty(()), leaf, _ones(name, pointwise))
        value = (leaf.endswith("scale") + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        state[name] = np.concatenate([state[name], value]) if name in state else value  # fused
    return state
