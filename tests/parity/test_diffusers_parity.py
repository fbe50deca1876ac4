"""The converted UNet and the PyTorch reference equal diffusers' own UNet2DModel, every option of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers_cases as cases
import numpy as np
import pytest
from in_float64 import errors_in_float64
from real_configs import DIFFUSERS

pytestmark = pytest.mark.unoptimised

PUBLISHED = {
    name: config
    for name, row in DIFFUSERS.items()
    for config in row.files.values()
    if config.get("_class_name") == "UNet2DModel"
}


@pytest.mark.parametrize("name", cases.IN_FLOAT32)
def test_float32(name: str) -> None:
    # float32 rounding through up to 20 convolutions; the bound
    assert max(cases.errors(name, np.float32).values()) <= 2e-5


@pytest.fixture(scope="module")
def float64_errors() -> dict[str, dict[str, float]]:
    return errors_in_float64("diffusers_cases.py")


@pytest.mark.parametrize("name", cases.CASES)
def test_float64(float64_errors: dict[str, dict[str, float]], name: str) -> None:
    # where rounding cannot hide a wrong constant; the bound
    assert max(float64_errors[name].values()) <= 1e-11


@pytest.mark.parametrize("name", cases.CASES)
def test_the_tensors_alone_tell_what_the_config_does(name: str) -> None:
    """But for what no tensor tells, which is given as --set takes it."""
    model = cases.network(name)
    contents = cases.config_of(model) | {"out_channels": model.config.in_channels}
    state = {key: value.numpy() for key, value in model.state_dict().items() if not key.startswith("conv_out.")}
    state["conv_out.weight"] = np.zeros((model.config.in_channels, 1, 3, 3), np.float32)
    keys = ("sample_size", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps", "act_fn")
    keys += ("mid_block_scale_factor", "downsample_padding", "flip_sin_to_cos", "freq_shift", "center_input_sample")
    keys += ("class_embed_type",) * (model.config.class_embed_type == "identity")
    told = {key: "x".join(map(str, v)) if isinstance(v := contents[key], list) else str(v).lower() for key in keys}
    told = {key: "None" if value == "none" else value for key, value in told.items()}
    found = cases.family.plan(state, {}, told | cases.AVOID_ZERO).model
    assert found == cases.family.plan(state, {"unet": contents}, cases.AVOID_ZERO).model


@pytest.mark.parametrize(("name", "config"), PUBLISHED.items())
def test_published_networks_have_the_names_and_shapes_that_the_table_gives_them(
    name: str, config: Mapping[str, Any]
) -> None:
    with cases.torch.device("meta"):
        state = cases.diffusers.UNet2DModel.from_config(dict(config)).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == DIFFUSERS[name].shapes()
