"""OpenAI's networks for the parity tests: torch modules, and the flags from which and whose tensors jddim's are made.

As in `parity_cases`: imported by the float32 tests and by `float64_checks.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from parity_cases import relative_error, to_numpy, to_torch, torch

from convert.engine import fill
from convert.families.openai import plan
from convert.reference.openai_unet import OpenAIUNet
from convert.reference.unet import redraw_
from jddim.models.building import abstract_model, build_model, flat_params


class OpenAICase(NamedTuple):
    network: dict[str, Any]  # of OpenAIUNet
    flags: dict[str, str]  # what its tensors do not tell
    size: tuple[int, int]
    t: tuple[float, ...]
    labels: tuple[int, ...] | None = None


SMALL = {"in_channels": 3, "out_channels": 3, "model_channels": 8, "num_res_blocks": 1, "groups": 4}

# Every option at least once; the flags are told, the rest `plan` has to infer.
OPENAI_CASES: dict[str, OpenAICase] = {
    "improved: additive, legacy order, heads by number, convolutions": OpenAICase(
        SMALL
        | {"widths": (8, 16), "num_res_blocks": 2, "attention_levels": (1,), "scale_shift": False}
        | {"heads": (2, 2), "heads_up": (2, 2)},
        {"num_heads": "2"},
        (6, 10),
        (0, 499, 999),
    ),
    "guided: new order, heads by width, residual resampling, classes, learned sigma": OpenAICase(
        SMALL
        | {"widths": (4, 8, 16), "attention_levels": (1, 2), "out_channels": 6, "resample": "resnet"}
        | {"heads": (1, 2, 4), "heads_up": (1, 2, 4), "new_order": True, "num_classes": 5},
        {"num_head_channels": "4", "use_new_attention_order": "True", "class_cond": "True", "learn_sigma": "True"},
        (12, 20),
        (999, 731),
        (4, 0),
    ),
    "legacy order, more heads upwards, pooled, fractional t": OpenAICase(
        SMALL
        | {"widths": (8, 8), "in_channels": 1, "out_channels": 1, "attention_levels": (0,), "resample": "pool"}
        | {"heads": (2, 2), "heads_up": (4, 4)},
        {"num_heads": "2", "num_heads_upsample": "4"},
        (14, 6),
        (0.25, 998.5),
    ),
}


def network(case: OpenAICase, seed: int) -> Any:
    """The PyTorch network, every layer redrawn, float32; the first scaled down so that norms' epsilons matter."""
    model = OpenAIUNet(**case.network).eval().requires_grad_(False)
    redraw_(model, seed)
    for parameter in model.input_blocks[0].parameters():
        parameter.mul_(0.02)
    return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


apply = jax.jit(lambda model, x_t, t, labels: model(x_t, t, labels))


def openai_error(name: str, dtype: Any, seed: int = 3) -> float:
    """Largest error of jddim's output over the source's largest output."""
    case = OPENAI_CASES[name]
    model = network(case, seed)
    height, width = case.size
    flags = {"image_size": f"{height}x{width}", "norm_groups": "4"} | case.flags
    tensors = tensors_of(model)
    made = plan(tensors, None, flags)
    expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(made.model)).items()}
    params = fill(tensors, expected, made.rules)
    unet = build_model(made.model, {name: value.astype(dtype) for name, value in params.items()}, dtype)
    model = model.to(torch.float64 if dtype == np.float64 else torch.float32)

    x_t = np.random.default_rng(seed).standard_normal(
        (len(case.t), height, width, case.network["in_channels"]), np.float32
    )
    x_t = x_t.astype(dtype)
    t = np.array(case.t, dtype if any(t != int(t) for t in case.t) else np.int32)
    labels = None if case.labels is None else np.array(case.labels)
    theirs = model(to_torch(x_t), torch.tensor(t), None if labels is None else torch.tensor(labels))
    return relative_error(apply(unet, x_t, t, labels), to_numpy(theirs))
