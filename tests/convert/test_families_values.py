"""convert.families.values: each kind of setting, and that what cannot be read is refused as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from convert.engine import ConversionError
from convert.families import diffusers_config, ho, lucidrains
from convert.families.values import literal, number, positive

_LONG = "1" + "0" * 400  # an integer that no float holds


@pytest.mark.parametrize(
    ("text", "value"), [("64", 64), ("true", True), ("[1, 2]", [1, 2]), ("null", None), ("", None)]
)
def test_a_literal_is_yamls(text: str, value: object) -> None:
    assert literal(text) == value


@pytest.mark.parametrize("text", ["[", "2001-99-99", "1" * 5000, "[" * 5000, "!!int x", "!!int ''", "!!timestamp x"])
def test_a_literal_that_yaml_cannot_read_is_text(text: str) -> None:
    assert literal(text) == text


@pytest.mark.parametrize(("value", "found"), [(1, 1.0), ("1e-4", 1e-4), (-0.5, -0.5)])
def test_a_number_may_be_text(value: object, found: float) -> None:
    assert number(value) == found


@pytest.mark.parametrize("value", [True, None, [1], "x", "nan", float("inf"), int(_LONG)])
def test_what_is_no_finite_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"^a number$"):
        number(value)


def test_positive_is_above_0() -> None:
    assert positive("1e-6") == 1e-6
    with pytest.raises(ValueError, match=r"^a number above 0$"):
        positive(0)


@pytest.mark.parametrize(
    ("read", "told", "message"),
    [
        (ho.read_settings, {"ch_mult": "1,["}, r"ch_mult must be integers \(KEY=1,2,2\), got '1,\['"),
        (ho.read_settings, {"beta_start": _LONG}, "beta_start must be a number, got 1000"),
        (diffusers_config.read_configs, {"block_out_channels": "4,["}, "block_out_channels must be a list, each an"),
        (lucidrains.read_settings, {"ddim_sampling_eta": _LONG}, "ddim_sampling_eta must be a number, got 1000"),
    ],
)
def test_what_python_or_yaml_fails_on_is_refused(
    read: Callable[[None, Mapping[str, str]], Any], told: dict[str, str], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        read(None, told)


def test_a_number_in_a_yaml_file_may_lack_its_dot() -> None:
    """YAML 1.1 takes 1e-1 for text."""
    assert lucidrains.read_settings({"ddim_sampling_eta": "1e-1"}, {}) == {"ddim_sampling_eta": 0.1}
