"""The Flax UNet equals the PyTorch reference, redrawn weights, every option of its config at least twice."""

from __future__ import annotations

import numpy as np
import parity_cases as cases
import pytest

pytestmark = pytest.mark.unoptimised


@pytest.mark.parametrize("name", cases.UNET_CASES)
def test_output_equals_the_references(name: str) -> None:
    # float32 rounding through up to 40 convolutions; the bound
    assert cases.unet_error(name, np.float32) <= 2e-5
