"""`DDIM.invert`: the loop with the checkpoint's conventions, the way back, and everything wrong said at once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import SEVEN, SIZE, UNUSUAL, Toy, toy
from tiny import random_model

import jddim
from jddim.config import SamplerConfig, UNetConfig
from jddim.inversion import invert_loop, reconstruction_error
from jddim.run import programs
from jddim.run.compiling import kind_of
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.unoptimised
IMAGES = np.random.default_rng(3).uniform(-0.9, 0.9, (3, *SIZE, 2)).astype(np.float32)
UNCLIPPED = dataclasses.replace(SEVEN, clip=False)


@pytest.mark.optimised
def test_progress_is_bit_equal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy(UNCLIPPED)
    whole = model.invert(IMAGES, steps=16, refine=1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    chex.assert_trees_all_equal(model.invert(IMAGES, steps=16, refine=1, progress=True), whole)
    assert "100%" in capsys.readouterr().err


@pytest.mark.optimised
def test_the_shipped_checkpoints_digits_survive_as_measured(mnist_checkpoint: Path) -> None:
    """The first row of docs/inversion.md's table, on samples of the model: S = 10, and refinement there."""
    mnist = jddim.load(mnist_checkpoint)
    x_0 = mnist.sample(jax.random.key(0), 3, steps=10)
    plain, refined = (
        float(reconstruction_error(x_0, mnist.sample(x_T=mnist.invert(x_0, steps=10, refine=k), steps=10)).mean())
        for k in (0, 5)
    )
    assert 5e-3 < plain < 5e-2
    assert refined < plain / 50


def test_every_convention_reaches_the_loop() -> None:
    conventions = dataclasses.replace(UNUSUAL, variance="learned_range", eta=0.7)  # eta plays no part
    model = toy(conventions, class_embedding="learned", num_classes=5, out_channels=4)
    labels = np.array([4, 0, 3])

    def network(x_t, t):
        return Toy(dataclasses.replace(model.model.config, out_channels=2))(x_t, t * 2.5, labels)

    inverted = model.invert(IMAGES, labels=labels, convention="paper", refine=2)
    expected = invert_loop(
        network,
        jnp.asarray(IMAGES),
        model.table(),
        convention="paper",
        refine=2,
        prediction_type="v_prediction",
        threshold=(0.9, 1.5),
        rederive_eps=True,
    )
    assert inverted.dtype == jnp.float32
    chex.assert_trees_all_close(inverted, expected, atol=1e-4)  # the same maths outside jit: rounding only
    padded = model.invert(IMAGES, labels=labels, convention="paper", refine=2, batch_size=2)
    chex.assert_trees_all_close(padded, inverted, atol=1e-5)
    for change in (
        {"steps_offset": 0},
        {"set_alpha_to_one": True},
        {"threshold_ratio": 0.6},
        {"rederive_eps": False},
        {"prediction_type": "epsilon"},
        {"timestep_scale": 1.0},
    ):
        other = model.with_sampler(**change).invert(IMAGES, labels=labels, convention="paper", refine=2)
        assert jnp.abs(other - inverted).max() > 1e-4, change
    for option in (
        {"labels": labels[::-1]},
        {"convention": "diffusers", "refine": 0},
        {"refine": 1},
        {"steps": 8},
        {"spacing": [200, 100, 1]},
        {"clip": True, "clip_range": (-0.3, 0.3)},
        {"guidance_scale": 2.5, "null_label": 1},
    ):
        other = model.invert(IMAGES, **{"labels": labels, "convention": "paper", "refine": 2, **option})
        assert jnp.abs(other - inverted).max() > 1e-4, option


@pytest.mark.parametrize("conventions", [UNCLIPPED, dataclasses.replace(SEVEN, clip=True, rederive_eps=True)])
def test_sampling_leads_back_and_refinement_leads_nearer(conventions: SamplerConfig) -> None:
    model = toy(conventions)
    means = [
        float(reconstruction_error(IMAGES, model.sample(x_T=model.invert(IMAGES, refine=k), eta=0)).mean())
        for k in (0, 3, 30)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1e-5
    assert means[-1] < 1e-11  # float32: 1e-6 a number, squared


def test_jit_vmap_grad_and_one_program_for_all_weights() -> None:
    config = UNetConfig(SIZE, 2, 2, channels=6, channel_mults=(1, 2), num_res_blocks=1, norm_groups=3)
    ddim = jddim.DDIM(random_model(config), linear_schedule(300), UNCLIPPED)
    whole = ddim.invert(IMAGES, steps=2)
    compiled = programs.segment.on(kind_of())._cache_size()
    other = dataclasses.replace(ddim, model=random_model(config, 8)).invert(IMAGES[::-1], steps=2)
    assert programs.segment.on(kind_of())._cache_size() == compiled
    assert jnp.abs(other[::-1] - whole).max() > 0.01

    light = toy(UNCLIPPED)
    chex.assert_trees_all_close(jax.jit(light.invert)(IMAGES), light.invert(IMAGES), atol=1e-5)  # another program
    swept = jax.vmap(lambda x: light.invert(x[None])[0])(jnp.asarray(IMAGES))
    chex.assert_trees_all_close(swept, light.invert(IMAGES), atol=1e-5)

    def brightness(x, model):
        return dataclasses.replace(ddim, model=model).invert(x, steps=2).mean()

    of_x, of_model = jax.grad(brightness, argnums=(0, 1), allow_int=True)(IMAGES, ddim.model)
    for gradient in (of_x, of_model.conv_in.kernel[...]):
        assert 0 < jnp.abs(gradient).max() < jnp.inf


def test_a_nan_names_the_image_and_the_step() -> None:
    class Breaks:
        config = toy(UNCLIPPED).model.config
        dtype = jnp.float32

        def __call__(self, x_t, t):
            return jnp.where((t > 150)[:, None, None, None] & (x_t[:, :1, :1, :1] > 0), jnp.nan, 0.1 * x_t)

    broken = jddim.DDIM(jax.tree_util.register_static(Breaks)(), linear_schedule(300), UNCLIPPED)
    images = np.full((3, *SIZE, 2), -0.3, np.float32)
    images[1] = 0.3
    with pytest.raises(FloatingPointError, match=r"image 1 at step 4 of 7 \(t = 170\), in 1 of 3"):
        broken.invert(images)


@pytest.mark.parametrize(
    ("images", "arguments", "messages"),
    [
        (IMAGES[0], {}, ["must have shape (num, h, w, 2) with num at least 1, got (6, 10, 2)"]),
        (IMAGES[:0], {}, ["num at least 1, got (0, 6, 10, 2)"]),
        (IMAGES.transpose(0, 3, 1, 2), {}, ["images looks like (N, C, H, W), got (3, 2, 6, 10): transpose"]),
        (IMAGES[..., :1], {}, ["images must have shape (3, 6, 10, 2), got (3, 6, 10, 1)"]),
        (IMAGES[:, :5], {}, ["multiples of 2"]),
        (IMAGES.astype(np.float64), {"eta": 0.5}, ["must be float32, got float64", "eta must be 0, got 0.5"]),
        (IMAGES * 127.5 + 127.5, {}, ["must lie in [-1, 1], got ", "x / 127.5 - 1"]),
        (np.full_like(IMAGES, np.nan), {}, ["images holds a NaN or infinity, first at (0, 0, 0, 0)"]),
        (IMAGES, {"labels": [1, 2, 3]}, ["this network has no classes"]),
        (IMAGES, {"guidance_scale": 2.0}, ["guidance_scale needs a network with learned class labels"]),
        (IMAGES, {"batch_size": 0}, ["batch_size must be a whole number, at least 1"]),
        (IMAGES, {"convention": "openai", "refine": 1}, ["refine solves the sampler's own steps"]),
        (IMAGES, {"convention": "ddim", "refine": -1}, ["unknown convention 'ddim'", "got -1"]),
        (IMAGES, {"steps": 301}, ["1..300 (the training timesteps), got 301"]),
    ],
)
def test_what_is_wrong_is_said_at_once(images: np.ndarray, arguments: dict, messages: list[str]) -> None:
    with pytest.raises(ValueError, match=r"invert: |num_steps") as raised:
        toy(UNCLIPPED).invert(images, **arguments)
    for message in messages:
        assert message in str(raised.value)


def test_networks_that_cannot_be_inverted() -> None:
    with pytest.raises(ValueError, match=r"self-conditioned: a step depends on the x0 of the one before it"):
        toy(dataclasses.replace(UNCLIPPED, self_condition=True)).invert(IMAGES)
    predicts_x0 = toy(dataclasses.replace(UNCLIPPED, prediction_type="sample"))
    with pytest.raises(ValueError, match=re.escape("tells nothing of eps at sigma = 0")):
        predicts_x0.invert(IMAGES)
    assert jnp.isfinite(predicts_x0.invert(IMAGES, convention="openai")).all()
    with pytest.raises(ValueError, match=r"class-conditional: give labels, .*, integers in 0\.\.4"):
        toy(UNCLIPPED, class_embedding="learned", num_classes=5).invert(IMAGES)
