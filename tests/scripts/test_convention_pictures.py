"""The picture of mixed-up conventions is the script's, and its page tells of each row."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import write_checkpoint

import jddim

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "conventions.md").read_text()


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "convention_pictures.py"
    spec = importlib.util.spec_from_file_location("convention_pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.unoptimised
def test_rows_that_are_right_are_the_samplers_and_the_page_has_the_others(script, tmp_path: Path) -> None:
    ddim = jddim.load(write_checkpoint(tmp_path / "ckpt", channel_mults=(1,), attention_levels=()))
    rows = script.rows(ddim)
    table = re.findall(r"^\| (\w+: [^|]*?) \|", PAGE, re.M)
    assert table == [label for label in rows if not label.startswith("right")]
    x_T = jax.random.normal(jax.random.key(3), (2, 6, 10, 1))
    right = np.asarray(rows["right, eta 0"](x_T))
    one_step = ddim.sample(x_T=x_T, steps=script.STEPS, eta=0.0)
    np.testing.assert_allclose(right, one_step, atol=1e-2)  # random weights amplify rounding through 20 steps
    cut = np.asarray(rows["starts: at t = 700"](x_T))
    assert np.abs(cut - right).max() > 0.1
    assert ddim.table(script.STEPS).t[5] == 700


def test_the_picture_is_small_and_has_a_strip_for_each_row() -> None:
    path = ROOT / "docs" / "conventions.png"
    assert path.stat().st_size < 60_000
    rows = len(re.findall(r"^\| \w+: [^|]*? \|", PAGE, re.M)) + 2
    with Image.open(path) as picture:
        assert picture.height == 2 * (rows * 30 + 2)


def test_the_pages_python_runs_and_its_table_of_timesteps_is_so() -> None:
    found: dict = {}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(block, found)
    rows = re.findall(r"^\| `(\w+)` \| (\d+), (\d+), (\d+) \| (\d+) \| (\d+) \|", PAGE, re.M)
    assert {name: [int(number) for number in numbers] for name, *numbers in rows} == found["tables"]
