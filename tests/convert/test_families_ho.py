"""convert.families.ho: the names and shapes that are worked out without its network are the network's."""

from __future__ import annotations

import pytest
from tiny import small_config

pytest.importorskip("torch", reason="the network is PyTorch's: pip install 'jddim[convert]'")

from convert.families.ho import reference, source_shapes


@pytest.mark.parametrize(
    "changes", [{}, {"conv_shortcut": True}, {"downsample": ("pool",), "upsample": ("pool",)}, {"in_channels": 3}]
)
def test_shapes_are_the_references(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    expected = {name: tuple(value.shape) for name, value in reference(config).state_dict().items()}
    assert source_shapes(config) == expected
