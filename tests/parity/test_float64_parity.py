"""The parity tests again in float64, where rounding cannot hide a wrong constant. In a process of its own for x64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import openai_cases
import parity_cases as cases
import pytest

HERE = Path(__file__).parent

BOUNDS = {"unet": 1e-11, "sampler": 1e-9, "network": 1e-9, "ancestral": 1e-9}
BOUNDS |= {"openai": 1e-11, "cosine": 1e-9, "eta 1 is ancestral": 1e-9}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, str(HERE / "float64_checks.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("unet", name) for name in cases.UNET_CASES),
        *(("openai", name) for name in openai_cases.OPENAI_CASES),
        *(("sampler", name) for name in cases.SAMPLER_CASES),
        *(("network", name) for name in cases.UNET_SAMPLER_CASES),
        *(("ancestral", name) for name in cases.ANCESTRAL_CASES),
        *(("cosine", name) for name in cases.COSINE_CASES),
        *(("eta 1 is ancestral", f"T {T}") for T in (300, 1000)),
    ],
)
def test_float64_error(errors: dict[str, dict[str, float]], kind: str, name: str) -> None:
    assert errors[kind][name] <= BOUNDS[kind]
