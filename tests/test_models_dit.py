"""The DiT network: what a fresh one does, other sizes and dtypes, and what it and its config refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_model

import jddim
from jddim.config import DiTConfig, from_json, to_json
from jddim.images import from_uint8
from jddim.models import build
from jddim.models.dit import positions
from jddim.train.data import Data
from jddim.train.loop import train
from jddim.train.task import Task

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

CONFIG = DiTConfig((6, 10), in_channels=3, out_channels=6, channels=20, depth=2, num_heads=5, num_classes=7)


def inputs(size: tuple[int, int] = (6, 10)) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_t = np.random.default_rng(0).standard_normal((3, *size, 3), np.float32)
    return jnp.asarray(x_t), jnp.array([0, 499, 999]), jnp.array([6, 0, 3])


def test_a_fresh_network_puts_out_zeros_and_each_block_what_it_is_given() -> None:
    outputs = dict(build(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)).activations(*inputs()))
    assert not outputs["output"].any()
    np.testing.assert_array_equal(outputs["block.1"], outputs["patch_embed"])
    assert outputs["patch_embed"].std() > 0.1
    assert outputs["condition"].std() > 1e-3


def test_another_size_counts_rows_and_columns_on() -> None:
    model = random_model(CONFIG)
    assert model(*inputs((4, 14))).shape == (3, 4, 14, 6)
    wide = positions(2, 9, 20)
    np.testing.assert_array_equal(wide[:, :5], positions(3, 5, 20)[:2])
    angles = np.arange(9)[:, None] * 10000.0 ** -(np.arange(5) / 5)
    np.testing.assert_allclose(wide[1, :, :5], np.sin(angles), atol=1e-7)
    np.testing.assert_allclose(wide[1, 3, 15:], np.cos(10000.0 ** -(np.arange(5) / 5)), atol=1e-7)


def test_half_precision_is_near_and_one_number_is_for_all() -> None:
    x_t, t, labels = inputs()
    half = random_model(CONFIG, dtype=jnp.bfloat16)(x_t, t, labels)
    exact = random_model(CONFIG)(x_t, t, labels)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - exact).max() / np.abs(exact).max() < 0.1
    np.testing.assert_array_equal(
        random_model(CONFIG)(x_t, 499, 3), random_model(CONFIG)(x_t, jnp.full(3, 499), jnp.full(3, 3))
    )


def test_what_it_refuses() -> None:
    model, (x_t, t, labels) = random_model(CONFIG), inputs()
    with pytest.raises(ValueError, match="needs labels"):
        model(x_t, t)
    with pytest.raises(ValueError, match=r"x_t must be \(b, h, w, 3\), got \(3, 6, 10, 2\)"):
        model(x_t[..., :2], t, labels)
    with pytest.raises(ValueError, match="image size 5x10 does not divide: height and width must be multiples of 2"):
        model(x_t[:, :5], t, labels)
    plain = random_model(dataclasses.replace(CONFIG, num_classes=None))
    assert plain(x_t, t).shape == (3, 6, 10, 6)
    with pytest.raises(ValueError, match="takes no labels"):
        plain(x_t, t, labels)


def test_its_config_goes_through_json_and_says_all_that_is_wrong() -> None:
    assert from_json(DiTConfig, to_json(CONFIG)) == CONFIG
    with pytest.raises(ValueError, match=r"unknown key 'dept' \(did you mean 'depth'\?\)"):
        from_json(DiTConfig, {"image_size": [6, 10], "dept": 2})
    with pytest.raises(ValueError, match="channels must be int, got '20'"):
        from_json(DiTConfig, {**to_json(CONFIG), "channels": "20"})
    wrong: dict[str, Any] = {"patch_size": 4, "channels": 18, "depth": 101, "num_heads": 0, "num_classes": 0}
    with pytest.raises(ValueError, match="channels=18 must be a multiple of 4") as caught:
        dataclasses.replace(CONFIG, **wrong, time_features=3, mlp_norm_epsilon=float("nan"))
    for told in (
        "num_heads=0 must be at least 1",
        "depth=101 must lie in 1..100",
        "num_classes=0 must be at least 1, or None",
        "time_features=3 must be at least 4",
        "mlp_norm_epsilon=nan is beyond",
        "image size 6x10 does not divide: height and width must be multiples of 4",
    ):
        assert told in str(caught.value)
    with pytest.raises(ValueError, match="channels=20 cannot be split into num_heads=3"):
        dataclasses.replace(CONFIG, num_heads=3)


def test_it_is_trained(tmp_path: Path) -> None:
    """From zeros, with labels dropped and a learned variance: the loss falls, and what comes out samples, guided."""
    rng = np.random.default_rng(2)
    images, labels = rng.integers(0, 256, (8, 6, 10, 3), dtype=np.uint8), rng.integers(0, 6, 8).astype(np.int32)
    task = Task.from_json(
        {
            "model": {"type": "dit", **to_json(CONFIG)},
            "schedule": {"num_train_timesteps": 20, "beta_start": 1e-3, "beta_end": 0.3},
            "sampler": {"num_steps": 2, "variance": "learned_range", "guidance_channels": 2},
            "train": {"steps": 40, "batch_size": 8, "lr": 3e-3, "warmup_steps": 1, "ema_decay": 0.5}
            | {"label_dropout": 0.2, "null_label": 6},
        }
    )
    said: list[str] = []
    train(task, Data(images, labels), tmp_path / "run", say=said.append)
    ddim = jddim.load(tmp_path / "run")
    assert ddim.null_label == 6
    assert ddim.model.config == CONFIG
    assert all(np.any(value) for value in jax.tree.leaves(nnx.state(ddim.model)))  # nothing stays 0
    made = ddim.sample(jax.random.key(0), 2, labels=[0, 5], guidance_scale=2.0, method="ddpm")
    assert made.shape == from_uint8(images[:2]).shape
    assert np.isfinite(made).all()
