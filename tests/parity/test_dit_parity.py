"""The converted DiT and the PyTorch reference equal diffusers' own; its pipelines are sampled as it samples them."""

from __future__ import annotations

from pathlib import Path

import dit_cases as cases
import numpy as np
import pytest
import torch
from in_float64 import errors_in_float64

import jddim
from convert.conversion import convert

diffusers = cases.diffusers


@pytest.mark.parametrize("name", cases.CASES)
def test_float32(name: str) -> None:
    assert max(cases.errors(name, np.float32).values()) <= 2e-5  # measured 1e-6


def test_float64() -> None:
    # where rounding cannot hide a wrong constant; measured 2e-14
    errors = errors_in_float64("dit_cases.py")
    assert max(error for case in errors.values() for error in case.values()) <= 1e-11


def test_a_pipelines_folder_samples_as_the_pipeline_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance, of all channels, and without; what the pipeline hands to its vae is compared."""
    diffusers.utils.logging.set_verbosity_error()
    options = {"num_attention_heads": 3, "out_channels": 8, "sample_size": 14, "patch_size": 2}
    network = cases.network(**options, num_embeds_ada_norm=1000)  # the pipeline's null label is always 1000
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, scaling_factor=0.5)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", num_train_timesteps=300)
    pipe = diffusers.DiTPipeline(network, vae, scheduler, id2label={"0": "tench, Tinca tinca"})
    pipe.save_pretrained(tmp_path / "pipeline")
    metadata = convert(tmp_path / "pipeline", tmp_path / "ckpt")
    assert metadata.provenance["assumed"] == []
    assert metadata.null_label == 1000
    assert metadata.provenance["verification"]["output_error"] <= 2e-5
    ddim = jddim.load(tmp_path / "ckpt")

    x_T, labels = np.random.default_rng(5).standard_normal((2, 14, 14, 4), np.float32), [7, 998]
    start = torch.tensor(np.moveaxis(x_T, -1, 1).copy())
    monkeypatch.setattr(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", lambda *args, **kwargs: start)
    taken: list[torch.Tensor] = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: taken.append(z) or decode(z))
    pipe.set_progress_bar_config(disable=True)
    for scale in (1.0, 4.0):
        images = pipe(labels, guidance_scale=scale, num_inference_steps=7, output_type="np").images
        theirs = np.moveaxis(taken[-1].numpy(), 1, -1) * vae.config.scaling_factor
        guided = {} if scale == 1 else {"guidance_scale": scale}
        ours = np.asarray(ddim.sample(x_T=x_T, labels=labels, steps=7, eta=0.0, latents=True, **guided))
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()  # measured 1e-6
        made = np.clip(np.asarray(ddim.decode(ours)) / 2 + 0.5, 0, 1)
        assert np.abs(made - images).max() <= 1e-4  # measured 1e-6
