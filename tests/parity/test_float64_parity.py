"""The parity tests again in float64, where rounding cannot hide a wrong constant. In a process of its own for x64."""

from __future__ import annotations

import openai_cases
import parity_cases as cases
import pytest
from in_float64 import errors_in_float64

BOUNDS = {"unet": 1e-11, "sampler": 1e-9, "network": 1e-9, "ancestral": 1e-9}
BOUNDS |= {"openai": 1e-11, "cosine": 1e-9, "eta 1 is ancestral": 1e-9}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    return errors_in_float64("float64_checks.py")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("unet", name) for name in cases.UNET_CASES),
        *(("openai", name) for name in openai_cases.OPENAI_CASES),
        *(("sampler", name) for name in cases.SAMPLER_CASES),
        *(("network", name) for name in cases.FLOAT64_NETWORK_CASES),
        *(("ancestral", name) for name in cases.ANCESTRAL_CASES),
        *(("cosine", name) for name in cases.COSINE_CASES),
        *(("eta 1 is ancestral", f"T {T}") for T in (300, 1000)),
    ],
)
def test_float64_error(errors: dict[str, dict[str, float]], kind: str, name: str) -> None:
    assert errors[kind][name] <= BOUNDS[kind]
