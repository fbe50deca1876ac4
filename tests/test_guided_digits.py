"""The shipped class-conditional checkpoint: digits that were asked for, as another network names them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

import jddim
from jddim.bulk import run as bulk
from jddim.bulk.manifest import BulkConfig
from jddim.evaluate import mnist_cnn
from jddim.run.plan import Inputs, classes_in_turn, plan
from jddim.run.request import Request

pytestmark = pytest.mark.unoptimised


def test_guidance_makes_the_digits_asked_for() -> None:
    ddim = jddim.load(ROOT / "scripts" / "assets" / "mnist-guided")
    assert ddim.model.config.num_classes == 11
    labels = jnp.arange(20) % 10
    how = {"num": 20, "steps": 10, "eta": 0.0, "labels": labels}
    right = {}
    for scale in (0.0, 3.0):
        digits = ddim.sample(jax.random.key(1), guidance_scale=scale, **how)
        right[scale] = int((mnist_cnn.predict(mnist_cnn.load(), digits).argmax(-1) == labels).sum())
    assert right[0.0] <= 8, right  # without labels a digit is right one time in ten
    assert right[3.0] >= 19, right  # 99.3 of 100 (docs/training.md)


def test_what_training_recorded_is_the_null_label() -> None:
    folder = ROOT / "scripts" / "assets" / "mnist-guided"
    ddim = jddim.load(folder)
    assert ddim.metadata is not None
    assert ddim.metadata.null_label == 10
    config = BulkConfig(num=13, request=Request(labels="balanced"), batch_size=13, shard_size=13)
    assert bulk.labels_of(ddim, config, range(13)).tolist() == [*range(10), 0, 1, 2]
    assert classes_in_turn(ddim, Request()) == list(range(10))
    planned = plan(ddim, Request(labels="3", guidance_scale=3.0), Inputs(jax.random.key(0)), 2)
    assert (planned.problems, planned.null_label) == ([], 10)
    command = re.findall("^jddim (sample CKPT .*?) +#", (folder / "README.md").read_text(), re.MULTILINE)
    assert command == ["sample CKPT samples.png --num 10 --labels 0:10 --guidance-scale 3"]
    assert "/" not in "".join(path.read_text() for path in folder.rglob("commit_success.txt"))  # a machine's paths
