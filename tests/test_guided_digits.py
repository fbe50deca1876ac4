"""The shipped class-conditional checkpoint: digits that were asked for, as another network names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

import jddim
from jddim import mnist_cnn

pytestmark = pytest.mark.unoptimised


def test_guidance_makes_the_digits_asked_for() -> None:
    ddim = jddim.load(ROOT / "scripts" / "assets" / "mnist-guided")
    assert ddim.model.config.num_classes == 11
    labels = jnp.arange(20) % 10
    how = {"num": 20, "steps": 10, "eta": 0.0, "null_label": 10, "labels": labels}
    right = {}
    for scale in (0.0, 3.0):
        digits = ddim.sample(jax.random.key(1), guidance_scale=scale, **how)
        right[scale] = int((mnist_cnn.predict(mnist_cnn.load(), digits).argmax(-1) == labels).sum())
    assert right[0.0] <= 8, right  # without labels a digit is right one time in ten
    assert right[3.0] >= 19, right  # 99.3 of 100 (docs/training.md)
