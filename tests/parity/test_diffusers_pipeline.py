"""Whole sampled runs: converted models against DDIMScheduler and UNet2DModel, and exports in diffusers' pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import diffusers_cases as cases
import numpy as np
import pytest
import torch

import jddim
from convert.conversion import convert
from convert.export import export

pytestmark = pytest.mark.unoptimised

diffusers = cases.diffusers

# The issue's bound. Rounding grows over the steps, and diffusers' schedule is float32's, ours float64's.
TOLERANCE = 1e-4

SCHEDULERS = {
    "leading": {"_class_name": "DDPMScheduler", "steps_offset": 1, "variance_type": "fixed_large"},
    "trailing": {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def noise(steps: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    return rng.standard_normal(shape, np.float32), rng.standard_normal((steps, *shape), np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def their_loop(pipe: object, x_T: np.ndarray, noises: np.ndarray, eta: float, steps: int) -> np.ndarray:
    """DDIMPipeline's loop with given noise, `(n, h, w, c)`."""
    pipe.scheduler.set_timesteps(steps)
    x = channels_first(x_T)
    with torch.no_grad():
        for t, step_noise in zip(pipe.scheduler.timesteps, noises, strict=True):
            output = pipe.unet(x, t).sample
            x = pipe.scheduler.step(output, t, x, eta=eta, variance_noise=channels_first(step_noise)).prev_sample
    return np.moveaxis(x.numpy(), 1, -1)


def assert_same_runs(ddim: jddim.DDIM, pipe: object, steps: int, shape: tuple[int, ...]) -> None:
    x_T, noises = noise(steps, shape)
    for eta in (0.0, 0.5):
        ours = np.asarray(ddim.sample(x_T=x_T, noise=noises, eta=eta, steps=steps))
        theirs = their_loop(pipe, x_T, noises, eta, steps)
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_converted_pipeline_samples_as_diffusers_does(tmp_path: Path, name: str) -> None:
    model = cases.network("one head, as in Ho et al.")
    diffusers.utils.logging.set_verbosity_error()  # it warns that casting is not as good as loading
    model.to(torch.float32)
    kind = getattr(diffusers, SCHEDULERS[name].get("_class_name", "DDIMScheduler"))
    scheduler = kind.from_config({"num_train_timesteps": 300, **SCHEDULERS[name]})
    pipe = diffusers.DDIMPipeline(unet=model, scheduler=scheduler)
    diffusers.DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    metadata = convert(tmp_path / "pipeline", tmp_path / "ckpt", verify=False)
    assert metadata.provenance["assumed"] == []
    ddim = jddim.load(tmp_path / "ckpt")
    assert_same_runs(ddim, pipe, 11, (2, *ddim.model.config.image_size, 3))  # 11 does not divide 300: t - T // S


RUNS = {
    "DDPMScheduler": {"prediction_type": "sample", "variance_type": "fixed_large"},
    "PNDMScheduler": {"beta_schedule": "scaled_linear", "skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_a_run_samples_by_the_runs_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = cases.network("one head, as in Ho et al.")
    diffusers.utils.logging.set_verbosity_error()
    model.to(torch.float32)
    model.save_pretrained(tmp_path / "run" / "checkpoint-7" / "unet")
    kind = getattr(diffusers, name)
    kind(num_train_timesteps=300, **RUNS[name]).save_pretrained(tmp_path / "run" / "scheduler")
    scheduler = kind.from_pretrained(tmp_path / "run" / "scheduler")  # DDIM takes what the file says, defaults too
    convert(tmp_path / "run" / "checkpoint-7", tmp_path / "ckpt", verify=False)
    ddim = jddim.load(tmp_path / "ckpt")
    shape = (2, *ddim.model.config.image_size, 3)
    pipe = diffusers.DDIMPipeline(unet=model, scheduler=scheduler)
    assert_same_runs(ddim, pipe, 7, shape)
    if name != "DDPMScheduler":
        return
    x_T, noises = noise(7, shape)
    left = iter(noises)  # DDPMScheduler takes no noise; it draws, but in its last step
    monkeypatch.setattr(
        diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: channels_first(next(left))
    )
    scheduler.set_timesteps(7)
    x = channels_first(x_T)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    theirs = np.moveaxis(x.numpy(), 1, -1)
    ours = np.asarray(ddim.sample(x_T=x_T, noise=noises, method="ddpm", steps=7))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def test_an_exported_mnist_runs_in_the_pipeline_with_the_same_digits(tmp_path: Path, mnist_checkpoint: Path) -> None:
    export(mnist_checkpoint, tmp_path / "pipeline", "diffusers")
    pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    ddim = jddim.load(mnist_checkpoint)
    assert_same_runs(ddim, pipe, 10, (2, 28, 28, 1))

    images = pipe(2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    x_T = np.moveaxis(torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).numpy(), 1, -1)
    ours = np.asarray(ddim.sample(x_T=x_T, steps=10, noise=noise(10, x_T.shape)[1]))  # eta 0 does not use it
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), images, atol=TOLERANCE)

    back = convert(tmp_path / "pipeline", tmp_path / "back", verify=False)
    assert back.params_sha256 == ddim.metadata.params_sha256
    # The sinusoid's frequencies are rounded in diffusers' order now.
    assert back.model == dataclasses.replace(ddim.model.config, divide_last=True, up_attention_levels=None)
