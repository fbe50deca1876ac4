"""The adapter of tests/measure_scheduler_suite.py: diffusers' schedulers with our steps are diffusers' schedulers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure_scheduler_suite as suite
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="diffusers is in torch")
diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def run(scheduler: Any) -> np.ndarray:
    scheduler.set_timesteps(7)
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.standard_normal((2, 3, 5, 4), dtype=np.float32)) * scheduler.init_noise_sigma
    draws = {"generator": torch.manual_seed(5)} if "Ancestral" in type(scheduler).__name__ else {}
    for t in scheduler.timesteps:
        output = 0.8 * torch.sin(1.3 * scheduler.scale_model_input(x, t) + t / 90)
        x = scheduler.step(output, t, x, **draws, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("name", suite.SCHEDULERS)
def test_a_scheduler_with_our_steps_is_theirs(name: str) -> None:
    theirs = getattr(diffusers, name)
    ours = type(name, (theirs,), {})
    suite.replace(ours, "step", suite.SCHEDULERS[name][1])
    before = suite.taken.total()
    torch.manual_seed(6)
    made = run(ours())
    assert suite.taken.total() - before >= 7
    torch.manual_seed(6)
    expected = run(theirs())
    # of theirs in float32
    np.testing.assert_allclose(made, expected, atol=2e-4 * np.abs(expected).max())


def test_it_says_loudly_that_the_tests_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main([]) == suite.main(["no-such-tree"]) == 2
    assert capsys.readouterr().err.count("SKIPPED: THE TESTS OF DIFFUSERS ARE NOT HERE") == 2


def test_the_scheduler_tests_of_diffusers() -> None:
    tree = os.environ.get("DIFFUSERS_TREE")
    if tree is None:
        pytest.skip("THE TESTS OF DIFFUSERS ARE NOT HERE: $DIFFUSERS_TREE names no work tree of theirs")
    here = os.environ | {"PYTHONPATH": str(Path(suite.__file__).parents[1])}
    done = subprocess.run([sys.executable, suite.__file__, tree], env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
