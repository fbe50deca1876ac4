"""convert.families.tensors: what is no tensor is named; sizes go by majority."""

from __future__ import annotations

import numpy as np
import pytest

from convert.engine import ConversionError
from convert.families.tensors import check_tensors, common_size


def test_entries_that_are_not_tensors_are_named() -> None:
    check_tensors({"a": np.zeros(1), 3: np.zeros(())}, "x.pt")
    with pytest.raises(ConversionError, match=r"^x\.pt holds entries that are not tensors: b \(int\); 4 \(str\)$"):
        check_tensors({"a": np.zeros(1), "b": 1, 4: "text"}, "x.pt")


@pytest.mark.parametrize(
    ("shapes", "axis", "size"),
    [
        ([(8, 3), (8,), (4, 3)], 0, 8),  # one misshapen
        ([(8, 3), (5,), (4, 3)], 1, 3),  # one without the axis
        ([(8, 3), (3,), ()], -1, 3),
        ([(8,), ()], 1, None),
        ([()], -1, None),
        ([], 0, None),
    ],
)
def test_a_size_is_the_majoritys(shapes: list[tuple[int, ...]], axis: int, size: int | None) -> None:
    tensors = {f"x.{i}": np.zeros(shape) for i, shape in enumerate(shapes)}
    assert common_size(tensors | {"y.0": np.zeros((7, 7)), "x.0.y": np.zeros((7, 7))}, r"x\.\d", axis) == size


def test_a_size_is_divided_before_it_is_counted() -> None:
    assert common_size({"a": np.zeros(9), "b": np.zeros(8), "c": np.zeros(12)}, ".", 0, 4) == 2
