"""Sampling row by row: equal to `DDIM.sample`, with no program compiled for another S, eta, seed, label or scale.

Guidance, one x_T at several etas and in several numbers of steps, noises between two seeds and four, and inverted
pictures are compared in test_web.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZE, write_checkpoint

import jddim
from jddim.editing import inpaint_loop
from jddim.pipeline import DDIM
from jddim.run.plan import Inputs, plan
from jddim.run.request import Request
from jddim.scale.stepping import GROUP, Run, Stepping

pytestmark = pytest.mark.unoptimised

NUM = GROUP + 1  # two groups, the second filled up


@pytest.fixture(scope="module")
def ddim(tmp_path_factory: pytest.TempPathFactory) -> DDIM:
    return jddim.load(write_checkpoint(tmp_path_factory.mktemp("stepping") / "ckpt", **SMALL))


SMALL: dict[str, Any] = {
    "channel_mults": (1,),
    "attention_levels": (),
    "middle": False,
    "class_embedding": "learned",
    "num_classes": 5,
}
LABELS = np.array([3, 0, 4, 1, 2], np.int32)


def same(actual: np.ndarray, expected: jax.Array) -> None:
    """Up to rounding: another batch size lets XLA sum in another order, and an unclipped random network's images reach
    hundreds, so what counts is the largest.
    """
    assert np.abs(actual - np.asarray(expected)).max() <= 1e-5 * np.abs(expected).max()


def made(run: Run) -> np.ndarray:
    while run.done < run.total:
        run.step()
    return run.x_t()


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("ddim", {"steps": 3, "eta": 0.7}),
        ("heun", {"steps": 1, "spacing": "linspace"}),  # remembers one prediction, where longer tables remember two
    ],
)
def test_the_images_are_samples(ddim: DDIM, method: str, how: dict[str, Any]) -> None:
    expected = ddim.sample(jax.random.key(11), NUM, method=method, labels=LABELS, **how)
    inputs = Inputs(jax.random.key(11), labels=LABELS)
    run = Stepping(plan(ddim, Request(method=method, **how), inputs, NUM).check("sample"))
    same(made(run), expected)
    last = run.x0_hat()  # all these tables end at the clean image, which is what the last step predicts
    same(last, run.x_t())
    assert np.abs(run.noise() - run.x_t()).max() > 0.1


def test_no_choice_compiles_again(ddim: DDIM) -> None:
    def run(seed: int, num: int, steps: int, eta: float, label: int, scale: float) -> None:
        labels = np.full(num, label, np.int32)
        request = Request(steps=steps, eta=eta, guidance_scale=scale, null_label=2)
        made(Stepping(plan(ddim, request, Inputs(jax.random.key(seed), labels=labels), num).check("sample")))

    run(0, NUM, 2, 0.0, 0, 1.0)
    compiled: list[str] = []

    def note(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        run(2**32 - 1, NUM, 7, 0.9, 3, 2.5)
        assert not compiled
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
        assert compiled  # the event's name has not changed
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_inpainting_keeps_what_is_known(ddim: DDIM) -> None:
    rng = np.random.default_rng(1)
    known = rng.uniform(-0.9, 0.9, (*SIZE, 1)).astype(np.float32)
    keep = rng.integers(0, 2, (*SIZE, 1)).astype(np.float32)
    keys = jddim.sample_keys(jax.random.key(9), NUM)
    x_T = jddim.initial_noise(keys, known.shape)
    table = ddim.table(3)
    how = {"eta": 0.6, "key": keys, **ddim.conventions()}
    expected = inpaint_loop(ddim.denoiser(LABELS), x_T, table, jnp.repeat(known[None], NUM, axis=0), keep, **how)
    inputs = Inputs(jax.random.key(9), labels=LABELS, images=np.repeat(known[None], NUM, axis=0), mask=(1 - 2 * keep))
    run = Stepping(plan(ddim, Request(steps=3, eta=0.6), inputs).check("edit"))
    images = made(run)
    same(images, expected)
    assert (images[:, keep == 1] == known[keep == 1]).all()
    assert np.abs(images[:, keep == 0] - known[keep == 0]).max() > 0.1


def test_a_nan_is_said(tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "nan", edit=lambda name, v: v * np.nan if "conv_out" in name else v, **SMALL)
    inputs = Inputs(jax.random.key(0), labels=LABELS[:2])
    run = Stepping(plan(jddim.load(broken), Request(steps=2), inputs, 2).check("sample"))
    with pytest.raises(FloatingPointError, match="NaN or infinity appeared in image 0 at step 1 of 2"):
        made(run)
