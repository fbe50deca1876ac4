"""The lucidrains wiring against the PyTorch reference: every option of its config, redrawn weights, odd sizes.

Imported by the float32 tests in pytest's own process and by `lucidrains_float64.py` in one with JAX_ENABLE_X64=1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from parity_cases import apply, relative_error, to_numpy, to_torch

from convert.engine import fill
from convert.families.lucidrains import reference, rules
from jddim.checkpoint import abstract_model, build_model, flat_params
from jddim.config import LucidrainsConfig

torch = pytest.importorskip("torch", reason="parity is with PyTorch")
sys.path.append(str(Path(__file__).parent.parent))

from lucidrains_files import draw  # noqa: E402


class Case(NamedTuple):
    config: LucidrainsConfig
    size: tuple[int, int]  # (height, width) of the input, not always the config's
    t: tuple[float, ...]


def _case(size: tuple[int, int], t: tuple[float, ...] = (0, 499, 999), **fields: Any) -> Case:
    return Case(LucidrainsConfig(**({"image_size": size, "in_channels": 1, "out_channels": 1} | fields)), size, t)


CASES = {
    "self-conditioned, both attentions, each level its own": _case(
        (12, 20),
        in_channels=2,
        out_channels=2,
        self_condition=True,
        channels=6,
        channel_mults=(1, 2, 3),
        stem_channels=10,
        full_attention=(True, False, True),
        num_heads=(1, 2, 3),
        head_channels=(5, 7, 3),
    ),
    "one level, learned features of t": _case(
        (7, 11),
        (0.25, 1),  # through learned frequencies, t = 999 has an angle of thousands, of which float32 knows 4e-4
        channels=4,
        channel_mults=(2,),
        full_attention=(False,),
        num_heads=(2,),
        head_channels=(3,),
        memory=3,
        time_embedding="learned",
        time_features=6,
    ),
    "learned variance, another theta, not the config's size": _case(
        (6, 14),
        (999, 0),
        image_size=(8, 8),
        in_channels=3,
        out_channels=6,
        channels=10,
        channel_mults=(2, 1),
        full_attention=(False, False),
        num_heads=(3, 1),
        head_channels=(2, 5),
        theta=100.0,
    ),
}


def params_of(config: LucidrainsConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the converter makes of a Unet's state dict."""
    expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}
    return fill(tensors, expected, rules(config))


def error(name: str, dtype: Any, seed: int = 3) -> float:
    """Largest error of jddim's output over the reference's largest output, for a case of CASES."""
    config, size, t = CASES[name]
    tensors = draw(config, seed)
    model = reference(config).eval().requires_grad_(False)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    model.to(torch.float64 if dtype == np.float64 else torch.float32)
    unet = build_model(config, {key: value.astype(dtype) for key, value in params_of(config, tensors).items()}, dtype)
    shape = (len(t), *size, config.input_channels)
    x_t = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)
    times = np.array(t, dtype if any(value != int(value) for value in t) else np.int32)
    return relative_error(apply(unet, x_t, times), to_numpy(model(to_torch(x_t), torch.tensor(times))))
