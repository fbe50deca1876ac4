"""Run with JAX_ENABLE_X64=1: prints every case's float64 error as JSON, for `test_lucidrains_parity.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import lucidrains_cases as cases
import numpy as np


def samples(name: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return max(cases.sampling_errors(name, Path(folder), np.float64))


if __name__ == "__main__":
    errors = {"network": {name: cases.error(name, np.float64) for name in cases.CASES}}
    print(json.dumps({**errors, "samples": {name: samples(name) for name in cases.SAMPLED}}))
