"""Filling: strict both ways, and one report of everything that does not fit."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from convert.engine import ConversionError, fill, shortened

pytestmark = pytest.mark.quick

RULES = {"a.{i}.conv": "a.{i}.c", "lin": "l", "norm": "n"}
EXPECTED = {
    **{f"a.{i}.c.{leaf}": shape for i in range(2) for leaf, shape in (("kernel", (3, 3, 2, 5)), ("bias", (5,)))},
    "l.kernel": (7, 3),
    "l.bias": (3,),
    "n.scale": (3,),
    "n.bias": (3,),
}


def source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        **{f"a.{i}.conv.{leaf}": shape for i in range(2) for leaf, shape in (("weight", (5, 2, 3, 3)), ("bias", (5,)))},
        "lin.weight": (3, 7),
        "lin.bias": (3,),
        "norm.weight": (3,),
        "norm.bias": (3,),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_every_parameter_is_filled_in_its_layout() -> None:
    tensors = source()
    filled = fill(tensors, EXPECTED, RULES)
    assert {name: value.shape for name, value in filled.items()} == EXPECTED
    np.testing.assert_array_equal(filled["a.1.c.kernel"], tensors["a.1.conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(filled["l.kernel"], tensors["lin.weight"].T)
    np.testing.assert_array_equal(filled["n.scale"], tensors["norm.weight"])
    assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in filled.values())


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32(dtype: type) -> None:
    tensors = {name: value.astype(dtype) for name, value in source().items()}
    filled = fill(tensors, EXPECTED, RULES)
    np.testing.assert_array_equal(filled["l.bias"], tensors["lin.bias"].astype(np.float32))  # widening is exact
    assert filled["l.bias"].dtype == np.float32


def test_ignored_names_are_left_out_and_not_checked() -> None:
    tensors = source() | {"counter": np.array([np.nan])}
    assert fill(tensors, EXPECTED, RULES, {"counter": "not a weight"}).keys() == EXPECTED.keys()
    with pytest.raises(ConversionError, match=r"1 tensor does not fit the model: unexpected counter \(1,\)"):
        fill(tensors, EXPECTED, RULES)


def test_ignoring_a_weight_leaves_it_missing() -> None:
    with pytest.raises(ConversionError, match=r"missing lin\.bias"):
        fill(source(), EXPECTED, RULES, {"lin.bias": "a mistake"})


def test_one_report_of_every_kind() -> None:
    tensors = source()
    del tensors["a.0.conv.bias"]
    tensors["a.2.conv.bias"] = np.zeros(5, np.float32)
    tensors["lin.weight"] = np.zeros((7, 3), np.float32)  # the transpose
    tensors["norm.weight"] = np.array([1, np.nan, np.inf], np.float32)
    tensors["norm.bias"] = np.zeros(3, np.int64)
    with pytest.raises(ConversionError) as caught:
        fill(tensors, EXPECTED, RULES)
    message = str(caught.value)
    assert message.startswith("5 tensors do not fit the model: ")
    for part in (
        "missing a.0.conv.bias",
        "unexpected a.2.conv.bias (5,)",
        "lin.weight has shape (7, 3), expected (3, 7)",
        "norm.weight holds NaN or infinity in 2 of 3",
        "norm.bias holds int64",
    ):
        assert part in message


@pytest.mark.parametrize("name", list(source()))
def test_any_missing_tensor_is_named(name: str) -> None:
    tensors = source()
    del tensors[name]
    with pytest.raises(ConversionError, match=f"1 tensor does not fit the model: missing {re.escape(name)}$"):
        fill(tensors, EXPECTED, RULES)


@pytest.mark.parametrize("name", list(source()))
@pytest.mark.parametrize("axis", [0, -1])
def test_any_misshapen_tensor_is_named_with_the_shape_in_torch_layout(name: str, axis: int) -> None:
    tensors = source()
    right = tensors[name].shape
    tensors[name] = np.concatenate([tensors[name]] * 2, axis)
    with pytest.raises(ConversionError) as caught:
        fill(tensors, EXPECTED, RULES)
    assert f"{name} has shape {tensors[name].shape}, expected {right}" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.bool_, np.uint8])
def test_only_floating_point_is_a_weight(dtype: type) -> None:
    tensors = source()
    tensors["lin.bias"] = tensors["lin.bias"].astype(dtype)
    with pytest.raises(ConversionError, match=f"lin.bias holds {np.dtype(dtype)}, not floating point"):
        fill(tensors, EXPECTED, RULES)


@pytest.mark.filterwarnings("error")  # NumPy's overflow warning would be a second line on stderr
def test_float64_beyond_float32_is_not_finite() -> None:
    tensors = source()
    tensors["lin.bias"] = np.array([0.0, 1e300, -1e300])
    with pytest.raises(ConversionError, match=r"lin\.bias holds NaN or infinity in 2 of 3 float32 numbers"):
        fill(tensors, EXPECTED, RULES)


def test_two_sources_for_one_parameter() -> None:
    tensors = source() | {"other.bias": np.zeros(3, np.float32)}
    with pytest.raises(ConversionError, match=r"other\.bias and lin\.bias both fill l\.bias"):
        fill(tensors, EXPECTED, RULES | {"other": "l"})


def test_a_source_that_two_rules_want() -> None:
    with pytest.raises(ConversionError, match=r"a\.0\.conv\.bias matches 2 rules"):
        fill(source(), EXPECTED, RULES | {"a.0.conv": "a.1.c"})


def test_a_parameter_that_no_rule_names() -> None:
    with pytest.raises(ConversionError, match=r"missing \? \(for new\.kernel: no rule\)"):
        fill(source(), EXPECTED | {"new.kernel": (2, 2)}, RULES)


def test_a_flood_of_one_kind_does_not_hide_another() -> None:
    tensors = source() | {f"extra.{i}": np.zeros(1, np.float32) for i in range(100)}
    del tensors["lin.bias"]
    with pytest.raises(ConversionError) as caught:
        fill(tensors, EXPECTED, RULES)
    message = str(caught.value)
    assert message.startswith("101 tensors")
    assert "missing lin.bias" in message
    assert "and 94 more" in message
    assert "\n" not in message


def test_shortened() -> None:
    assert shortened(["a", "b"]) == "a; b"
    assert shortened(list("abcd"), shown=2) == "a; b; ... and 2 more"
