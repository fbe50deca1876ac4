"""The orders that docs/convergence.png draws: the slope of each solver's error, and the picture itself."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "convergence_picture.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convergence_picture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.unoptimised
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2), ("plms", 2), ("unipc", 2), ("heun", 2)])
def test_orders(script, solver: str, order: int) -> None:
    each = script.SOLVERS[solver]
    errors = [script.error(solver, count // each) for count in (128, 256)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.4  # plms: its first steps' error still shows


def test_it_is_drawn(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "COUNTS", (4, 8))
    script.main(tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width > 300
