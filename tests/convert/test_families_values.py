"""convert.families.values: each kind of setting, all of a family's, and that what cannot be read is refused as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from convert.engine import ConversionError
from convert.families import diffusers_config, ho, lucidrains, openai
from convert.families.values import (
    asking,
    integer,
    is_integer,
    literal,
    not_read,
    number,
    parse,
    positive,
    sections,
    settling,
    whole,
)

_LONG = "1" + "0" * 400  # an integer that no float holds


@pytest.mark.parametrize(
    ("text", "value"), [("64", 64), ("true", True), ("[1, 2]", [1, 2]), ("null", None), ("", None)]
)
def test_a_literal_is_yamls(text: str, value: object) -> None:
    assert literal(text) == value


@pytest.mark.parametrize("text", ["[", "2001-99-99", "1" * 5000, "[" * 5000, "!!int x", "!!int ''", "!!timestamp x"])
def test_a_literal_that_yaml_cannot_read_is_text(text: str) -> None:
    assert literal(text) == text


@pytest.mark.parametrize(("value", "is_one"), [(0, True), (-3, True), (True, False), (2.0, False), ("2", False)])
def test_an_integer_is_no_truth_value(value: object, is_one: bool) -> None:
    assert is_integer(value) == is_one
    if not is_one:
        with pytest.raises(ValueError, match=r"^an integer$"):
            integer(value)


def test_a_whole_number_loses_its_point() -> None:
    assert [str(whole(value)) for value in (2.0, 1.5, 3, 0.0)] == ["2", "1.5", "3", "0"]


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


def test_settings_are_parsed_and_all_that_is_wrong_is_said() -> None:
    parsers: dict[str, Callable[[Any], Any]] = {"width": integer, "eta": number, "depth": integer}
    told = {"config": {"width": 4, "eta": "much", "depth": 1}, "--set": {"width": 8, "eta": "0.5", "dept": 2}}
    parsed, problems = parse(told, parsers)
    assert parsed == {"width": 8, "eta": 0.5, "depth": 1}
    assert problems == [
        "config: eta must be a number, got 'much'",
        "unknown --set key 'dept' (did you mean 'depth'? allowed: depth, eta, width)",
    ]


def test_sections_of_a_config() -> None:
    config = {"a": 1, "model": {"b": 2, "c": {"x": 3}}, "optim": {"a": 9}, "more": {"y": {"z": 1}}, "data": None}
    assert sections(config, {"a", "b", "x"}) == ({"a": 1, "b": 2, "x": 3}, ["optim", "more", "data"], [])
    assert sections({"s": {"a": 1}, "t": {"a": 1}, "u": {"a": 2}}, {"a"})[2] == [
        "config: a is 1 in one section and 2 in another"
    ]
    assert sections(None, {"a"}) == ({}, [], [])
    assert not_read([]) == []
    (said,) = not_read([f"k\n{i}" for i in range(9)])
    assert said == "config: not read: " + "; ".join(f"k?{i}" for i in range(6)) + "; ... and 3 more"


def test_what_was_not_told_is_settled_and_assumed() -> None:
    assumed: list[str] = []
    settle = settling({"eta": 0.5}, assumed)
    assert (settle("eta", 0.0, "the paper's"), settle("steps", 50, "the README's")) == (0.5, 50)
    assert assumed == ["steps = 50 (the README's)"]


def test_what_was_not_told_is_asked_for() -> None:
    assert asking(("a", "b", "c"), {"b": 1}) == ("a=VALUE", "c=VALUE")
    assert asking(("a", "b", "c"), {"b": 1}, {"c=SIDE": "the size"}) == ("c=SIDE", "a=VALUE")


@pytest.mark.parametrize("family", [ho, lucidrains, openai])
def test_every_setting_has_its_parser(family: Any) -> None:
    assert family._PARSERS.keys() == family.SETTINGS.keys()
