"""The converted UNet and the PyTorch reference equal diffusers' own UNet2DModel, every option of it."""

from __future__ import annotations

import diffusers_cases as cases
import numpy as np
import pytest
from in_float64 import errors_in_float64


@pytest.mark.parametrize("name", cases.IN_FLOAT32)
def test_float32(name: str) -> None:
    # float32 rounding through up to 20 convolutions; the bound
    assert max(cases.errors(name, np.float32).values()) <= 2e-5


@pytest.fixture(scope="module")
def float64_errors() -> dict[str, dict[str, float]]:
    return errors_in_float64("diffusers_cases.py")


@pytest.mark.parametrize("name", cases.CASES)
def test_float64(float64_errors: dict[str, dict[str, float]], name: str) -> None:
    # where rounding cannot hide a wrong constant; the bound
    assert max(float64_errors[name].values()) <= 1e-11
