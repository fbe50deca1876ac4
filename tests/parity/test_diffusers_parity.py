"""The converted UNet and the PyTorch reference equal diffusers' own UNet2DModel, every option of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers_cases as cases
import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", cases.IN_FLOAT32)
def test_float32(name: str) -> None:
    # float32 rounding through up to 20 convolutions; the bound
    assert max(cases.errors(name, np.float32).values()) <= 2e-5


@pytest.fixture(scope="module")
def float64_errors() -> dict[str, dict[str, float]]:
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # it compiles in half the time
    run = subprocess.run(
        [sys.executable, str(HERE / "diffusers_cases.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", cases.CASES)
def test_float64(float64_errors: dict[str, dict[str, float]], name: str) -> None:
    # where rounding cannot hide a wrong constant; the bound
    assert max(float64_errors[name].values()) <= 1e-11
