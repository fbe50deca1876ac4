"""Inversion, step by step, against diffusers' own scheduler and OpenAI's semantics: float32 here, float64 apart."""

from __future__ import annotations

import inversion_cases as cases
import numpy as np
import pytest
from in_float64 import errors_in_float64

pytestmark = pytest.mark.unoptimised

# Each case compiles a program of its own, so a draw of them; every value of every option is in it.
NAMES = sorted(name for name, case in cases.DIFFUSERS_CASES.items() if not cases.divides_by_zero(case))
DRAWN = [NAMES[i] for i in np.random.default_rng(0).permutation(len(NAMES))[:36]]


def test_the_draw_has_every_option() -> None:
    drawn = [cases.DIFFUSERS_CASES[name] for name in DRAWN]
    for position, values in enumerate(zip(*cases.DIFFUSERS_CASES.values(), strict=True)):
        assert {case[position] for case in drawn} == set(values)


@pytest.mark.parametrize("name", DRAWN)
def test_diffusers_inverse_scheduler(name: str) -> None:
    pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")
    # jddim in float32
    assert cases.diffusers_error(cases.DIFFUSERS_CASES[name], np.float32) <= 1e-4


@pytest.mark.quick
@pytest.mark.parametrize("name", cases.OPENAI_CASES)
def test_openai_reverse_sample(name: str) -> None:
    assert cases.openai_error(cases.OPENAI_CASES[name], np.float32) <= 1e-4


def test_in_float64() -> None:
    """Where rounding cannot hide a wrong constant: a few roundings of 1e-16, enlarged by 1 / sqrt(1 - alpha_bar_0)."""
    pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")
    errors = errors_in_float64("inversion_float64.py")
    assert len(errors) == len(DRAWN) + len(cases.OPENAI_CASES)
    assert {name: error for name, error in errors.items() if not error <= 1e-11} == {}
