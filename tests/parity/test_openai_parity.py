"""jddim's network, made from an OpenAI network's tensors and flags, computes what that network computes."""

from __future__ import annotations

import numpy as np
import pytest
from openai_cases import OPENAI_CASES, openai_error

pytestmark = pytest.mark.unoptimised


@pytest.mark.parametrize("name", OPENAI_CASES)
def test_output_equals_the_sources(name: str) -> None:
    # float32 rounding through up to 20 convolutions; the bound. In float64: test_float64_parity.py
    assert openai_error(name, np.float32) <= 2e-5
