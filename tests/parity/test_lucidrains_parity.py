"""The lucidrains network equals the PyTorch reference, and a converted checkpoint samples as its source's loop does."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import lucidrains_cases as cases
import numpy as np
import pytest
import torch
from in_float64 import errors_in_float64
from lucidrains_files import draw, trainer, write
from parity_cases import to_numpy, to_torch

import jddim
from convert.conversion import convert
from convert.families.lucidrains import buffers
from convert.reference import lucidrains_unet
from jddim.config import ScheduleConfig
from jddim.models.lucidrains import RMSNorm

pytestmark = pytest.mark.unoptimised


@pytest.mark.parametrize("name", cases.CASES)
def test_output_equals_the_references(name: str) -> None:
    # float32 rounding through up to 40 convolutions; the bound
    assert cases.error(name, np.float32) <= 2e-5


@pytest.fixture(scope="module")
def errors64() -> dict[str, dict[str, float]]:
    return errors_in_float64("lucidrains_float64.py")


@pytest.mark.parametrize("name", cases.CASES)
def test_float64_error(errors64: dict[str, dict[str, float]], name: str) -> None:
    # where rounding cannot hide a wrong constant; the bound
    assert errors64["network"][name] <= 1e-11


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-12, 1.0])
def test_the_norms_floor_is_torchs(scale: float) -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 5, 7), np.float32) * np.float32(scale)
    expected = to_numpy(lucidrains_unet.RMSNorm(7)(to_torch(x)))
    actual = np.asarray(RMSNorm(7, dtype=np.float32)(jnp.asarray(x)))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)  # a few roundings


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.SAMPLED)
def test_ddim_samples_as_the_source_does(tmp_path: Path, name: str) -> None:
    assert max(cases.sampling_errors(name, tmp_path, np.float32)) <= 1e-4  # the bound


@pytest.mark.parametrize("name", cases.SAMPLED)
def test_float64_samples(errors64: dict[str, dict[str, float]], name: str) -> None:
    # What float32 leaves is rounding: 1e-5 here, 1e-4 for other weights, for which the source's loop in float32 is as
    # far from itself in float64. In float64 it is 3e-14.
    assert errors64["samples"][name] <= 1e-11


@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_sampling_is_the_sources(tmp_path: Path, learned: bool) -> None:
    T = 23
    schedule, objective = ScheduleConfig("cosine", T), "pred_noise" if learned else "pred_v"
    config = cases.LEARNED if learned else cases.SELF_CONDITIONED
    source = write(tmp_path / "model-3.pt", trainer(config, schedule, objective))
    convert(source, tmp_path / "out", settings={"image_size": "6x10"}, verify=False)
    ddim = jddim.load(tmp_path / "out")
    rng = np.random.default_rng(13)
    shape = (2, *config.image_size, config.in_channels)
    x_T, noise = rng.standard_normal(shape, np.float32), rng.standard_normal((T, *shape), np.float32)
    buffer = {name: torch.from_numpy(value) for name, value in buffers(schedule, objective).items()}
    expected = cases.p_sample_loop(
        cases.network(config, draw(config, 1)),
        buffer,
        to_torch(x_T),
        to_torch(noise),
        objective=objective,
        learned=learned,
    )
    actual = ddim.sample(x_T=x_T, noise=noise, method="ddpm", steps=T)
    np.testing.assert_allclose(actual, to_numpy(expected), rtol=0, atol=1e-4)  # the bound
