"""convert.families.ho: the names and shapes that are worked out without its network are the network's."""

from __future__ import annotations

import pytest
from tiny import SETTINGS, arrays, small_config

pytest.importorskip("torch", reason="the network is PyTorch's: pip install 'jddim[convert]'")

from convert.families.ho import plan, reference, source_shapes


@pytest.mark.parametrize(
    "changes", [{}, {"conv_shortcut": True}, {"downsample": ("pool",), "upsample": ("pool",)}, {"in_channels": 3}]
)
def test_shapes_are_the_references(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    expected = {name: tuple(value.shape) for name, value in reference(config).state_dict().items()}
    assert source_shapes(config) == expected


def test_what_is_told_and_no_tensor_checks() -> None:
    given = {
        **SETTINGS,
        "ch": str(small_config().channels),
        "norm_eps": "1e-6",
        "eta": "0.5",
        "beta_schedule": "linear",
    }
    assert plan(arrays(), None, given).unchecked == ("norm_groups", "image_size", "norm_eps", "beta_schedule")
