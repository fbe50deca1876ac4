"""Rename templates and layouts."""

from __future__ import annotations

import numpy as np
import pytest

from convert.engine import ConversionError, fill, source_tensors
from convert.rules import Fused, Nin, from_layout, source_of, target_leaves, targets_of, to_layout, torch_shape

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
    assert target_leaves("conv", "weight", leaves) == ["conv.kernel"]
    assert target_leaves("norm", "weight", leaves) == ["norm.scale"]
    assert target_leaves("table", "weight", leaves) == ["table.embedding"]
    assert target_leaves("norm", "bias", leaves) == ["norm.bias"]
    assert target_leaves("norm", "running_mean", leaves) == []
    assert target_leaves("absent", "weight", leaves) == []


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


@pytest.mark.parametrize("shape", [(7, 5, 3, 2), (7, 5), (7, 5, 1, 1), (7,)])
def test_torch_shape_inverts_to_layout(shape: tuple[int, ...]) -> None:
    target = {4: (3, 2, 5, 7), 2: (5, 7), 1: (7,)}[1 if len(shape) == 1 else 2 if shape[2:] in ((), (1, 1)) else 4]
    array = np.ones(shape)
    assert to_layout(array, target).shape == target
    assert torch_shape(target, array) == shape


@pytest.mark.parametrize(("ones", "shape"), [(None, (5, 3, 1)), (0, (5, 3)), (1, (5, 3, 1)), (2, (5, 3, 1, 1))])
def test_a_linears_shape_is_the_familys(ones: int | None, shape: tuple[int, ...]) -> None:
    assert torch_shape((3, 5), np.ones((5, 3, 1)), ones=ones) == shape


def test_tables_are_not_transposed_even_if_square() -> None:
    table = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(to_layout(table, (3, 3), "class_embed.embedding"), table)
    assert from_layout(table, "class_embed.embedding") is table
    assert torch_shape((5, 3), table, "class_embed.embedding") == (5, 3)


def test_the_two_orders_of_fused_outputs() -> None:
    q, k, v = (letter + np.arange(6) for letter in (100, 200, 300))
    stacked, by_head = Fused(("q", "k", "v")), Fused(("q", "k", "v"), groups=2)
    assert stacked.join([q, k, v]).tolist() == [*q, *k, *v]
    assert by_head.join([q, k, v]).tolist() == [*q[:3], *k[:3], *v[:3], *q[3:], *k[3:], *v[3:]]
    for fused in (stacked, by_head):
        for part, expected in zip(fused.split(fused.join([q, k, v])), (q, k, v), strict=True):
            np.testing.assert_array_equal(part, expected)
    assert by_head.split(np.ones(9)) == []
    assert [part.shape for part in by_head.split(np.ones((6, 0)))] == [(2, 0)] * 3


FUSED = {"a.{i}.qkv": Fused(("b.{i}.q", "b.{i}.k", "b.{i}.v"), groups=3), "table": "rows"}
EXPECTED = {f"b.7.{part}.{leaf}": shape for part in "qkv" for leaf, shape in (("kernel", (5, 6)), ("bias", (6,)))}
EXPECTED |= {"rows.embedding": (4, 4)}


def fused_source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.7.qkv.weight": (18, 5, 1), "a.7.qkv.bias": (18,), "table.weight": (4, 4)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_a_fused_tensor_fills_its_parts_and_comes_back_to_the_bit() -> None:
    source = fused_source()
    params = fill(source, EXPECTED, FUSED)
    # The third head's key, second channel: rows are [head][part][channel].
    row = 2 * 6 + 1 * 2 + 1
    np.testing.assert_array_equal(params["b.7.k.kernel"][:, 5], source["a.7.qkv.weight"][row, :, 0])
    assert params["b.7.k.bias"][5] == source["a.7.qkv.bias"][row]
    np.testing.assert_array_equal(params["rows.embedding"], source["table.weight"])
    back = source_tensors(params, FUSED, {name: value.shape for name, value in source.items()})
    assert list(back) == list(source)
    assert all(np.array_equal(back[name], value) for name, value in source.items())


def test_what_is_wrong_with_a_fused_tensor_is_said_once() -> None:
    source = fused_source()
    del source["a.7.qkv.bias"]
    source["a.7.qkv.weight"] = source["a.7.qkv.weight"][:17]
    with pytest.raises(ConversionError) as caught:
        fill(source, EXPECTED, FUSED)
    assert str(caught.value) == (
        "2 tensors do not fit the model: missing a.7.qkv.bias; a.7.qkv.weight has shape (17, 5, 1), expected (18, 5, 1)"
    )


def test_a_nins_w_is_no_transpose() -> None:
    """Of a linear and of a 1x1 convolution; it is named as such where it is missing."""
    rules = {"a.NIN_0": Nin(("q",)), "b.NIN_0": Nin(("shortcut",))}
    W = np.arange(6.0).reshape(3, 2)
    source = {"a.NIN_0.W": W, "a.NIN_0.b": np.ones(2), "b.NIN_0.W": W, "b.NIN_0.b": np.ones(2)}
    expected = {"q.kernel": (3, 2), "q.bias": (2,), "shortcut.kernel": (1, 1, 3, 2), "shortcut.bias": (2,)}
    params = fill(source, expected, rules)
    for leaf in ("q.kernel", "shortcut.kernel"):
        np.testing.assert_array_equal(params[leaf].reshape(3, 2), W)
    back = source_tensors(params, rules, {name: value.shape for name, value in source.items()})
    assert all(np.array_equal(back[name], value) for name, value in source.items())
    with pytest.raises(ConversionError, match=r"missing b\.NIN_0\.W; a\.NIN_0\.W has shape \(2, 3\), exp.* \(3, 2\)"):
        fill({"a.NIN_0.W": W.T, "a.NIN_0.b": np.ones(2), "b.NIN_0.b": np.ones(2)}, expected, rules)
