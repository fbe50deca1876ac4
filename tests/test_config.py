"""Configs round-trip through JSON, and say what is wrong with themselves."""

from __future__ import annotations

import json

import pytest

from jddim.config import (
    SamplerConfig,
    ScheduleConfig,
    UNetConfig,
    first_few,
    from_json,
    levels_at_resolutions,
    to_json,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig((32, 32)),
        UNetConfig(
            (12, 20),
            1,
            2,
            channels=15,
            channel_mults=(1, 3.2),
            attention_levels=(),
            downsample=("pool",),
            norm_groups=1,
        ),
        UNetConfig(
            (16, 24), channels=4, norm_groups=2, class_embedding="learned", num_classes=7, up_attention_levels=(0,)
        ),
        ScheduleConfig("betas", 3, betas=(0.1, 1 / 3, 0.7)),
        SamplerConfig("quad", 7, 0.3, clip=False, clip_range=(-2.0, 3.0), rederive_eps=True, variance="fixed_large"),
    ],
)
def test_round_trip(config) -> None:
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "2 blocks a level, attention at 8x12, no classes"),
        ({"attention_levels": (0, 2)}, "attention at 16x24,4x6, no classes"),
        ({"attention_levels": (), "num_res_blocks": 1}, "1 block a level, attention at no level, no classes"),
        ({"class_embedding": "learned", "num_classes": 1000}, ", 1,000 classes"),
        ({"class_embedding": "learned", "num_classes": 1}, ", 1 class"),
        ({"class_embedding": "timestep"}, ", labels are numbers"),
        ({"class_embedding": "identity"}, ", labels are vectors"),
    ],
)
def test_a_summary_has_resolutions_and_classes(fields: dict, end: str) -> None:
    assert UNetConfig((16, 24), **fields).summary.endswith(end)


def test_unknown_and_missing_keys_raise_together() -> None:
    with pytest.raises(
        ValueError, match=r"unknown key 'chanels' \(did you mean 'channels'\?\); missing key 'image_size'"
    ):
        from_json(UNetConfig, {"chanels": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (28, 30)}, r"multiples of 8 \(nearest: 24x24 or 32x32\)"),
        ({"image_size": (4, 8)}, "nearest: 8x8"),
        ({"channels": 48}, "multiple of norm_groups=32"),
        ({"attention_levels": (4,)}, r"0\.\.3"),
        ({"attention_levels": (1, 1)}, "repeats"),
        ({"channels": 3, "norm_groups": 1}, "at least 4"),
        ({"channel_mults": ()}, "one positive number per level"),
        ({"num_res_blocks": 0, "in_channels": 0}, "in_channels=0 must be at least 1; num_res_blocks=0"),
    ],
)
def test_a_unet_that_cannot_be_raises_on_construction(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"image_size": (32, 32), **fields})


def test_attention_by_resolution_becomes_levels() -> None:
    assert levels_at_resolutions(32, 4, [16]) == (1,)
    assert levels_at_resolutions(28, 3, [7]) == (2,)
    assert levels_at_resolutions(256, 6, [16, 64]) == (2, 4)
    assert levels_at_resolutions(32, 4, [15]) == ()


def test_lists_in_a_message_end_somewhere() -> None:
    assert [first_few(["a", "b", "c"][:n], 2) for n in range(4)] == ["", "a", "a; b", "a; b; and 1 more"]
