"""Run with JAX_ENABLE_X64=1: prints every case's float64 error as JSON, for `test_lucidrains_parity.py`."""

from __future__ import annotations

import json

import lucidrains_cases as cases
import numpy as np

if __name__ == "__main__":
    print(json.dumps({name: cases.error(name, np.float64) for name in cases.CASES}))
