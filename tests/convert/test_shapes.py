"""A tensor has the shape that its family gives it, or is refused: PyTorch's own networks say which that is."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import named
import numpy as np
import pytest

from convert.engine import ConversionError, fill
from convert.families import (
    consistency,
    diffusers,
    diffusers_dit,
    dit,
    edm,
    ho,
    lucidrains,
    monai,
    openai,
    openai_classifier,
    palette,
    pytorch_ddpm,
    score_sde,
)
from convert.writers import state_shapes
from jddim.config import ClassifierConfig, DiTConfig, LucidrainsConfig, ModelConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

pytest.importorskip("torch", reason="the shapes are PyTorch's")

SMALL: dict[str, Any] = {"image_size": (8, 8), "channels": 4, "channel_mults": (1, 2), "num_res_blocks": 1}
SMALL |= {"in_channels": 3, "out_channels": 3}
UNET = SMALL | {"attention_levels": (1,), "norm_groups": 2}
SONG = SMALL | {
    **{"channels": 32, "attention_levels": (1,), "time_embedding": "frequencies", "class_embedding": "learned"},
    **{"num_classes": 3, "early_class": True, "up_attention_last": True, "resample_shortcut": True},
    **{"input_pyramid": True, "downsample": ("resnet",), "upsample": ("resnet",)},
}
LEVELS = {"full_attention": (False, True), "num_heads": (2, 3), "head_channels": (5, 7)}
LUCIDRAINS = {name: value for name, value in SMALL.items() if name != "num_res_blocks"} | LEVELS
CLASSIFIER = {name: value for name, value in UNET.items() if name != "out_channels"} | {"num_classes": 3}
CLASSIFIER |= {"head_channels": 4}
TRANSFORMER: dict[str, Any] = {"image_size": (8, 8), "channels": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
CASES: dict[str, tuple[ModuleType, ModelConfig, dict[str, bool]]] = {
    "ho": (ho, UNetConfig(**UNET), {}),
    "ho, 3x3 shortcuts": (ho, UNetConfig(**UNET, conv_shortcut=True), {}),
    "diffusers": (diffusers, UNetConfig(**UNET), {}),
    "openai": (openai, UNetConfig(**UNET, **openai._FIXED, num_heads=2), {"use_new_attention_order": False}),
    "consistency": (consistency, UNetConfig(**UNET, **openai._FIXED, num_heads=2), {}),
    "edm": (edm, UNetConfig(**SONG), {}),
    "palette": (
        palette,
        UNetConfig(**UNET, **openai._FIXED, num_heads=2, time_embedding="noise_level", num_timesteps=3),
        {"use_new_attention_order": False},
    ),
    "openai_classifier": (openai_classifier, ClassifierConfig(**CLASSIFIER), {}),
    "openai_classifier, adaptive": (openai_classifier, ClassifierConfig(**CLASSIFIER, pool="adaptive"), {}),
    "pytorch_ddpm": (pytorch_ddpm, UNetConfig(**UNET, time_embedding="learned", num_timesteps=3), {}),
    "monai": (monai, UNetConfig(**UNET), {"core": True, "combined": True}),
    "score_sde": (score_sde, UNetConfig(**SMALL | {"channels": 32}, attention_levels=(1,), up_attention_last=True), {}),
    "score_sde, blocks resample": (
        score_sde,
        UNetConfig(
            **SMALL | {"channels": 32, "attention_levels": (), "up_attention_last": True, "resample_shortcut": True},
            **{"input_pyramid": True, "downsample": ("resnet",), "upsample": ("resnet",)},
            resample_filter=(1.0, 3.0, 3.0, 1.0),
        ),
        {},
    ),
    "dit": (dit, DiTConfig(**TRANSFORMER), {}),
    "diffusers_dit": (diffusers_dit, DiTConfig(**TRANSFORMER), {}),
    "lucidrains, classes": (
        lucidrains,
        LucidrainsConfig(**LUCIDRAINS | {"full_attention": (False, False)}, num_classes=3, strided=True, memory=0),
        {},
    ),
    "lucidrains": (lucidrains, LucidrainsConfig(**LUCIDRAINS, stem_channels=6), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_ones_too_many_or_too_few_are_refused(name: str) -> None:
    family, config, options = CASES[name]
    rules = family.rules(config, **options)
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(config)).items()}
    if family in (pytorch_ddpm, monai, dit):  # their reference has diffusers' names; golden files have their own code's
        right = named.state_dict(family, config, 1, **options)
    else:
        shapes = state_shapes(lambda: family.reference(config, **options))
        right = {name: np.zeros(shape) for name, shape in shapes.items()}
    pointwise = family.FAMILY.pointwise
    assert fill(right, expected, rules, {}, pointwise).keys() == expected.keys()
    wrong = {name: [value[..., None], value[None]] for name, value in right.items()}
    for name, value in right.items():
        if value.ndim > 1 and value.shape[-1] == 1:
            wrong[name] += [value[..., 0], value.reshape(value.shape[:2]), value.reshape(-1)]
    wrong.pop("noise_level.weight", None)  # the plan's own, in no file
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ConversionError, match=f"1 tensor does not fit the model: {name} has shape") as caught:
                fill(right | {name: value}, expected, rules, {}, pointwise)
            assert str(caught.value).endswith(f"has shape {value.shape}, expected {right[name].shape}")


def test_a_2d_convolution_in_one_attention_alone_is_damage(tmp_path: Any) -> None:
    """All of them are consistency models', with q, k and v in another order."""
    import torch

    from convert.conversion import convert

    _, config, options = CASES["openai"]
    shapes = state_shapes(lambda: openai.reference(config, **options))
    settings = {"image_size": "8", "num_heads": "2", "norm_groups": "2"}
    file, where = tmp_path / "a.pt", "middle_block.1.qkv.weight"
    torch.save({n: torch.ones(*shape, *([1] if where in n else [])) for n, shape in shapes.items()}, file)
    for verify in (True, False):
        with pytest.raises(ConversionError, match=r"qkv\.weight has shape \(24, 8, 1, 1\), expected \(24, 8, 1\)"):
            convert(file, tmp_path / "out", settings=settings, verify=verify)
