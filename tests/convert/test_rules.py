"""Rename templates and layouts."""

from __future__ import annotations

import numpy as np
import pytest

from convert.rules import source_of, target_leaf, targets_of, to_layout, torch_shape

pytestmark = pytest.mark.quick

RULES = {"down.{i}.block.{j}.conv1": "levels.{i}.{j}.conv_a", "conv_in": "stem", "odd[0].x": "odd"}


def test_numbers_carry_over_whatever_their_length() -> None:
    assert targets_of("down.10.block.3.conv1", RULES) == ["levels.10.3.conv_a"]
    assert targets_of("conv_in", RULES) == ["stem"]


@pytest.mark.parametrize(
    "name",
    [
        "down.x.block.3.conv1",  # not a number
        "down.1.block.3.conv1.more",  # templates match whole names
        "my.down.1.block.3.conv1",
        "down.1.block..conv1",
        "down_1.block.3.conv1",  # a dot is a dot, not any character
        "convXin",
        "",
    ],
)
def test_anything_else_does_not_match(name: str) -> None:
    assert targets_of(name, RULES) == []


def test_brackets_in_a_template_are_literal() -> None:
    assert targets_of("odd[0].x", RULES) == ["odd"]
    assert targets_of("odd0.x", RULES) == []


def test_an_overlap_of_rules_shows_as_two_targets() -> None:
    rules = {"a.{i}": "first.{i}", "a.1": "second"}
    assert targets_of("a.1", rules) == ["first.1", "second"]


def test_two_numbers_keep_their_order() -> None:
    assert targets_of("a.1.2", {"a.{i}.{j}": "b.{j}.{i}"}) == ["b.2.1"]
    assert source_of("b.2.1.kernel", {"a.{i}.{j}": "b.{j}.{i}"}) == "a.1.2.weight"


@pytest.mark.parametrize(
    ("leaf", "source"),
    [
        ("levels.2.0.conv_a.kernel", "down.2.block.0.conv1.weight"),
        ("levels.2.0.conv_a.bias", "down.2.block.0.conv1.bias"),
        ("stem.scale", "conv_in.weight"),
        ("nowhere.kernel", "? (for nowhere.kernel: no rule)"),
    ],
)
def test_the_way_back_names_what_is_missing(leaf: str, source: str) -> None:
    assert source_of(leaf, RULES) == source


def test_a_weight_goes_to_the_leaf_that_the_module_has() -> None:
    leaves = ["conv.kernel", "conv.bias", "norm.scale", "norm.bias", "table.embedding"]
    assert target_leaf("conv", "weight", leaves) == "conv.kernel"
    assert target_leaf("norm", "weight", leaves) == "norm.scale"
    assert target_leaf("table", "weight", leaves) == "table.embedding"
    assert target_leaf("norm", "bias", leaves) == "norm.bias"
    assert target_leaf("norm", "running_mean", leaves) is None
    assert target_leaf("absent", "weight", leaves) is None


def test_a_convolution_computes_the_same_after_the_change_of_layout() -> None:
    # An element of the kernel, and not only the shape, must end where the other layout looks for it.
    rng = np.random.default_rng(0)
    oihw = rng.standard_normal((7, 5, 3, 2))
    hwio = to_layout(oihw, (3, 2, 5, 7))
    assert hwio.shape == (3, 2, 5, 7)
    image = rng.standard_normal((5, 3, 2))  # c, h, w: as large as the kernel, so there is one output pixel
    np.testing.assert_allclose(
        np.einsum("ihw,oihw->o", image, oihw), np.einsum("hwi,hwio->o", image.transpose(1, 2, 0), hwio), rtol=1e-12
    )


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 1), (5, 3, 1, 1)])
def test_linears_and_pointwise_convolutions_transpose(shape: tuple[int, ...]) -> None:
    weight = np.arange(15.0).reshape(shape)
    np.testing.assert_array_equal(to_layout(weight, (3, 5)), np.arange(15.0).reshape(5, 3).T)


def test_a_square_linear_is_transposed_too() -> None:
    weight = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(to_layout(weight, (3, 3)), weight.T)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((5,), (5,)),
        ((5, 3, 3, 3), (3, 5)),
        ((5,), (3, 5)),
        ((), (3, 5)),
        ((5, 3), (3, 3, 3, 5)),
        ((2, 3, 4), (4, 3, 2)),
    ],
)
def test_what_no_rule_covers_comes_back_as_it_is(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    array = np.ones(shape)
    assert to_layout(array, target).shape == shape


@pytest.mark.parametrize("shape", [(7, 5, 3, 2), (7, 5), (7, 5, 1, 1), (7,)])
def test_torch_shape_inverts_to_layout(shape: tuple[int, ...]) -> None:
    target = {4: (3, 2, 5, 7), 2: (5, 7), 1: (7,)}[1 if len(shape) == 1 else 2 if shape[2:] in ((), (1, 1)) else 4]
    array = np.ones(shape)
    assert to_layout(array, target).shape == target
    assert torch_shape(target, array) == shape
