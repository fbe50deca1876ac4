"""Run with JAX_ENABLE_X64=1: prints every parity case's float64 error as JSON, for `test_float64_parity.py`."""

from __future__ import annotations

import json

import numpy as np
import openai_cases
import parity_cases as cases


def main() -> None:
    """Print one JSON object, kind -> case -> error."""
    f64 = np.float64
    errors = {
        "unet": {name: cases.unet_error(name, f64) for name in cases.UNET_CASES},
        "openai": {name: openai_cases.openai_error(name, f64) for name in openai_cases.OPENAI_CASES},
        "sampler": {name: cases.sampler_error(case, f64) for name, case in cases.SAMPLER_CASES.items()},
        "network": {name: cases.unet_sampler_error(case, f64) for name, case in cases.FLOAT64_NETWORK_CASES.items()},
        "ancestral": {name: cases.ancestral_error(case, f64) for name, case in cases.ANCESTRAL_CASES.items()},
        "cosine": {name: cases.sampler_error(case, f64) for name, case in cases.COSINE_CASES.items()},
        "eta 1 is ancestral": {f"T {T}": cases.eta_one_is_ancestral_error(T, f64) for T in (300, 1000)},
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
