"""The lucidrains network equals the PyTorch reference, and a converted checkpoint samples as its source's loop does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import lucidrains_cases as cases
import numpy as np
import pytest
import torch
from in_float64 import errors_in_float64
from lucidrains_files import draw, small_config, trainer, write
from parity_cases import to_numpy, to_torch

import jddim
from convert.convert import convert
from convert.families.lucidrains import buffers, reference
from convert.reference import lucidrains_unet
from jddim.config import LucidrainsConfig, ScheduleConfig
from jddim.models.lucidrains import RMSNorm


@pytest.mark.parametrize("name", cases.CASES)
def test_output_equals_the_references(name: str) -> None:
    # float32 rounding through up to 40 convolutions; the bound
    assert cases.error(name, np.float32) <= 2e-5


@pytest.fixture(scope="module")
def errors64() -> dict[str, float]:
    return errors_in_float64("lucidrains_float64.py")


@pytest.mark.parametrize("name", cases.CASES)
def test_float64_error(errors64: dict[str, float], name: str) -> None:
    # where rounding cannot hide a wrong constant; the bound
    assert errors64[name] <= 1e-11


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-12, 1.0])
def test_the_norms_floor_is_torchs(scale: float) -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 5, 7), np.float32) * np.float32(scale)
    expected = to_numpy(lucidrains_unet.RMSNorm(7)(to_torch(x)))
    actual = np.asarray(RMSNorm(7, dtype=np.float32)(jnp.asarray(x)))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)  # a few roundings


# -- sampling ---------------------------------------------------------------------------------------------------------


def network(config: LucidrainsConfig) -> Callable[[Any, Any, Any], Any]:
    """`model(x, t, x_self_cond)` of the source, with the trainer file's EMA weights."""
    model = reference(config).eval().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in draw(config, 1).items()})

    def call(x: Any, t: int, condition: Any) -> Any:
        if config.self_condition:
            x = torch.cat([torch.zeros_like(x) if condition is None else condition, x], dim=1)
        return model(x, torch.full((x.shape[0],), t))

    return call


def predictions(output: Any, x: Any, a: Any, objective: str) -> Any:
    """x0, clamped, and the eps that it implies: model_predictions with clip_x_start and rederive_pred_noise."""
    match objective:
        case "pred_noise":
            x0 = (1 / a).sqrt() * x - (1 / a - 1).sqrt() * output
        case "pred_x0":
            x0 = output
        case _:
            x0 = a.sqrt() * x - (1 - a).sqrt() * output
    x0 = x0.clamp(-1, 1)
    return x0, ((1 / a).sqrt() * x - x0) / (1 / a - 1).sqrt()


def ddim_sample(
    model: Callable[[Any, Any, Any], Any],
    alpha_bar: Any,
    x: Any,
    noise: Any,
    *,
    steps: int,
    eta: float,
    objective: str,
    learned: bool,
) -> Any:
    """What GaussianDiffusion.ddim_sample computes, in [-1, 1]; noise: one `(b, c, h, w)` for each step."""
    times = torch.linspace(-1, len(alpha_bar) - 1, steps + 1).int().tolist()[::-1]
    x0 = None
    for step, (t, t_next) in enumerate(pairwise(times)):
        output = model(x, t, x0)
        a = alpha_bar[t]
        if learned:  # LearnedGaussianDiffusion's own model_predictions: half the output, and eps as predicted
            output = output.chunk(2, dim=1)[0]
        x0, eps = predictions(output, x, a, objective)
        if learned:
            eps = output
        if t_next < 0:
            return x0
        b = alpha_bar[t_next]
        sigma = eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
        x = x0 * b.sqrt() + (1 - b - sigma**2).sqrt() * eps + sigma * noise[step]
    raise AssertionError("the last time is -1")


def p_sample_loop(
    model: Callable[[Any, Any, Any], Any], buffer: dict[str, Any], x: Any, noise: Any, *, objective: str, learned: bool
) -> Any:
    """What GaussianDiffusion.p_sample_loop computes, in [-1, 1]."""
    x0 = None
    for step, t in enumerate(reversed(range(len(buffer["betas"])))):
        output = model(x, t, x0)
        log_variance = buffer["posterior_log_variance_clipped"][t]
        if learned:
            output, v = output.chunk(2, dim=1)
            weight = (v + 1) / 2
            log_variance = weight * buffer["betas"][t].log() + (1 - weight) * log_variance
        x0, _ = predictions(output, x, buffer["alphas_cumprod"][t], objective)
        x = buffer["posterior_mean_coef1"][t] * x0 + buffer["posterior_mean_coef2"][t] * x
        x = x + (0.5 * log_variance).exp() * noise[step] * (t > 0)
    return x


# One level: the wiring is compared above, and compiling it is most of these tests' time.
ONE = {"channel_mults": (2,), "full_attention": (False,), "num_heads": (2,), "head_channels": (3,)}
PLAIN, SELF_CONDITIONED = small_config(**ONE), small_config(**ONE, self_condition=True)
LEARNED = small_config(**ONE, out_channels=2)
LINEAR = ScheduleConfig("linear", 1000, 1e-4, 0.02)
SAMPLED = {
    "plain, v": (PLAIN, ScheduleConfig("sigmoid_alpha_bar", 1000), "pred_v"),
    "self-conditioned, noise": (SELF_CONDITIONED, LINEAR, "pred_noise"),
    "self-conditioned, x0": (SELF_CONDITIONED, ScheduleConfig("cosine", 300), "pred_x0"),
    "learned variance": (LEARNED, LINEAR, "pred_noise"),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_ddim_samples_as_the_source_does(tmp_path: Path, name: str) -> None:
    config, schedule, objective = SAMPLED[name]
    source = write(tmp_path / "model-3.pt", trainer(config, schedule, objective))
    convert(source, tmp_path / "out", settings={"image_size": "6x10", "sampling_timesteps": "7"}, verify=False)
    ddim = jddim.load(tmp_path / "out")
    rng = np.random.default_rng(11)
    shape = (2, *config.image_size, config.in_channels)
    x_T, noise = rng.standard_normal(shape, np.float32), rng.standard_normal((7, *shape), np.float32)
    alpha_bar = torch.from_numpy(buffers(schedule, objective)["alphas_cumprod"])
    for eta in (0.0, 0.5):
        expected = ddim_sample(
            network(config),
            alpha_bar,
            to_torch(x_T),
            to_torch(noise),
            steps=7,
            eta=eta,
            objective=objective,
            learned=config.out_channels == 2,
        )
        actual = ddim.sample(x_T=x_T, noise=noise, eta=eta)
        assert (expected.abs() < 0.99).float().mean() > 0.05  # not all clamped
        np.testing.assert_allclose(actual, to_numpy(expected), rtol=0, atol=1e-4)  # the bound


@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_sampling_is_the_sources(tmp_path: Path, learned: bool) -> None:
    T = 23
    schedule, objective = ScheduleConfig("cosine", T), "pred_noise" if learned else "pred_v"
    config = LEARNED if learned else SELF_CONDITIONED
    source = write(tmp_path / "model-3.pt", trainer(config, schedule, objective))
    convert(source, tmp_path / "out", settings={"image_size": "6x10"}, verify=False)
    ddim = jddim.load(tmp_path / "out")
    rng = np.random.default_rng(13)
    shape = (2, *config.image_size, config.in_channels)
    x_T, noise = rng.standard_normal(shape, np.float32), rng.standard_normal((T, *shape), np.float32)
    buffer = {name: torch.from_numpy(value) for name, value in buffers(schedule, objective).items()}
    expected = p_sample_loop(
        network(config), buffer, to_torch(x_T), to_torch(noise), objective=objective, learned=learned
    )
    actual = ddim.sample(x_T=x_T, noise=noise, method="ddpm", steps=T)
    np.testing.assert_allclose(actual, to_numpy(expected), rtol=0, atol=1e-4)  # the bound
