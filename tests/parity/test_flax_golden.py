"""jddim.compat.diffusers_flax against numbers that diffusers' own Flax classes left in golden/flax.npz."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util
from flax_cases import DDIM, DDPM, DTYPES, GOLDEN, STAGE, ddim, ddpm, drawn, first_stage

from jddim.compat import diffusers_flax

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

with np.load(GOLDEN) as file:
    FOUND = dict(file)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "run", "name"),
    [(kind, run, name) for kind, run, names in (("ddim", ddim, DDIM), ("ddpm", ddpm, DDPM)) for name in names],
)
def test_schedulers_do_as_theirs(kind: str, run: Callable[..., dict[str, np.ndarray]], name: str, dtype: str) -> None:
    """In float64 to its rounding; in float32 to that of theirs, whose 1 - alpha_bar has 3 digits at t = 0."""
    with jax.enable_x64(dtype == "float64"):
        found = run(diffusers_flax, name, dtype)
    bound = 1e-12 if dtype == "float64" else 2e-4  # measured 6e-14 and 7e-5, both in DDPM's step from t = 1
    for key, value in found.items():
        assert error(value, FOUND[f"{kind}/{name}/{dtype}/{key}"]) <= bound, key
        if kind == "ddim":  # which has no noise, of which another is drawn in float64
            assert error(value, FOUND[f"{kind}/{name}/float64/{key}"]) <= 5e-7, key  # measured 1.4e-7 in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with the first stage, as their `save_pretrained` wrote it."""
    pytest.importorskip("ml_dtypes")
    folder = tmp_path_factory.mktemp("flax") / "stable-diffusion"
    shapes = json.loads(str(FOUND["shapes"]))
    tree = traverse_util.unflatten_dict({name: drawn(name, tuple(shapes[name])) for name in shapes}, sep="/")
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "diffusion_flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    config = {"_class_name": "FlaxAutoencoderKL", "_diffusers_version": "0.39.0", **STAGE}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return folder


def test_the_first_stage_does_as_theirs(folder: Path) -> None:
    model, params = diffusers_flax.FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae")
    assert model.config.scaling_factor == STAGE["scaling_factor"]
    for key, value in first_stage(model, params).items():
        assert error(value, FOUND[f"stage/{key}"]) <= 2e-5, key  # the bound of every network here; measured 1e-6


def test_the_pages_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "flax.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(folder.parent)
    found: dict = {}
    for block in blocks:
        exec(block, found)
    assert found["x_0"].shape == found["x_t"].shape == found["x_T"].shape
    assert np.isfinite(found["x_0"]).all()
    assert found["z"].shape == (2, 8, 8, 3)
    assert found["decoded"].shape == found["images"].shape
