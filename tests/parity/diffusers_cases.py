"""UNet2DModel against the converted UNet and the PyTorch reference: real diffusers modules, every weight redrawn.

Imported by pytest's own process (float32) and, as a program in one with JAX_ENABLE_X64=1, prints float64's errors.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is with PyTorch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs it: pip install diffusers")

from convert.engine import fill  # noqa: E402
from convert.families import diffusers as family  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.models.building import abstract_model, build_model, flat_params  # noqa: E402

# Sides a prime times 2^(levels - 1). Together: every option that UNet2DModel has, most of them twice.
CASES: dict[str, dict[str, Any]] = {
    "one head, as in Ho et al.": {
        **{"sample_size": [6, 10], "block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4},
        **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        **{"attention_head_dim": None, "downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
        **{"norm_eps": 1e-6, "attn_norm_num_groups": 2},
    },
    "heads, scale-shift, resampled by resnets, classes": {
        **{"sample_size": [12, 20], "block_out_channels": (8, 16, 8), "layers_per_block": 1, "norm_num_groups": 2},
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        **{"attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.4142},
        **{"downsample_type": "resnet", "upsample_type": "resnet", "center_input_sample": True, "act_fn": "mish"},
        **{"num_class_embeds": 7, "norm_eps": 1e-3, "in_channels": 1, "out_channels": 1},
    },
    "fourier, labels embedded as t is, no middle": {
        **{"sample_size": [10, 6], "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        **{"time_embedding_type": "fourier", "class_embed_type": "timestep", "time_embedding_dim": 20},
        **{"mid_block_type": None, "act_fn": "gelu", "in_channels": 2, "out_channels": 4},
    },
    "learned t, labels as they are, one level, odd width": {
        **{"sample_size": [7, 11], "block_out_channels": (15,), "layers_per_block": 2, "norm_num_groups": 5},
        **{"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "attention_head_dim": 5},
        **{"time_embedding_type": "learned", "num_train_timesteps": 1000, "class_embed_type": "identity"},
        **{"add_attention": False, "act_fn": "relu", "mid_block_scale_factor": 2, "freq_shift": 0.5},
    },
}
IN_FLOAT32 = ("one head, as in Ho et al.", "learned t, labels as they are, one level, odd width")
T = (1, 499, 999)  # not 0, of which fourier features have no logarithm
AVOID_ZERO = {"steps_offset": "1"}


@cache
def network(name: str, seed: int = 3) -> Any:
    """A real UNet2DModel in float32, redrawn; conv_in small, so that an epsilon shows (as in parity_cases)."""
    model = diffusers.UNet2DModel(**CASES[name]).eval().requires_grad_(False)
    redraw_(model, seed)
    for parameter in model.conv_in.parameters():
        parameter.mul_(0.02)
    return model


def config_of(model: Any) -> dict[str, Any]:
    """The contents of the config.json that diffusers saves."""
    return json.loads(model.to_json_string())


def inputs(name: str, dtype: Any, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x_t `(b, h, w, c)`, t, labels or None: the same float32 numbers in either dtype."""
    case, rng = CASES[name], np.random.default_rng(seed)
    x = rng.standard_normal((len(T), *case["sample_size"], case.get("in_channels", 3)), np.float32)
    t = np.array(T, np.int32 if case.get("time_embedding_type") == "learned" else dtype)
    labels: np.ndarray | None = None
    match case.get("class_embed_type"):
        case "timestep":
            labels = np.array((5.5, 17, 300), dtype)
        case "identity":
            width = 4 * CASES[name]["block_out_channels"][0]
            labels = rng.standard_normal((len(T), width), np.float32).astype(dtype)
        case None if "num_class_embeds" in CASES[name]:
            labels = np.array((6, 0, 3))
    return x.astype(dtype), t, labels


def errors(name: str, dtype: Any) -> dict[str, float]:
    """Largest error of jddim's output, and of the reference's, over diffusers' largest output."""
    model, x_t, t, labels = network(name), *inputs(name, dtype)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    plan = family.plan(state, {"unet": config_of(model) | {"out_channels": model.config.in_channels}}, AVOID_ZERO)
    config = plan.model.__class__(**{**vars(plan.model), "out_channels": model.config.out_channels})
    expected_shapes = {key: leaf.shape for key, leaf in flat_params(abstract_model(config)).items()}
    params = {key: value.astype(dtype) for key, value in fill(state, expected_shapes, plan.rules).items()}
    reference = family.reference(config).eval().requires_grad_(False)
    reference.load_state_dict(model.state_dict(), strict=True)

    double = dtype == np.float64
    diffusers.utils.logging.set_verbosity_error()  # it warns that casting is not as good as loading
    for module in (model, reference):
        module.to(torch.float64 if double else torch.float32)
    args = [torch.tensor(np.moveaxis(x_t, -1, 1).copy()), torch.tensor(t)]
    args.append(None if labels is None else torch.tensor(labels))
    if double and model.config.time_embedding_type == "positional":
        model.time_proj = reference.time_proj  # diffusers' sinusoid is float32 whatever the network is
    expected = np.moveaxis(model(*args).sample.numpy(), 1, -1)
    ours = jax.jit(lambda model, *args: model(*args))(
        build_model(config, params, dtype), *(None if a is None else jnp.asarray(a) for a in (x_t, t, labels))
    )
    theirs = np.moveaxis(reference(*args).numpy(), 1, -1)
    assert np.isfinite(expected).all()
    scale = np.abs(expected).max()
    return {
        "jddim": float(np.abs(np.asarray(ours) - expected).max() / scale),
        "reference": float(np.abs(theirs - expected).max() / scale),
    }


if __name__ == "__main__":
    print(json.dumps({name: errors(name, np.float64) for name in CASES}))
