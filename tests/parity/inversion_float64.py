"""Run with JAX_ENABLE_X64=1: prints inversion's float64 errors as JSON, for `test_inversion_parity.py`."""

from __future__ import annotations

import json

import inversion_cases as cases
import numpy as np
from test_inversion_parity import DRAWN

if __name__ == "__main__":
    errors = {name: cases.diffusers_error(cases.DIFFUSERS_CASES[name], np.float64) for name in DRAWN}
    errors |= {name: cases.openai_error(case, np.float64) for name, case in cases.OPENAI_CASES.items()}
    print(json.dumps(errors))
