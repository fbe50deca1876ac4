"""`DDIM.sample` to the bit, whatever the batch and whoever watches; and inside other transformations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from test_pipeline import KEY, SEVEN, SIZE, small_ddim, toy

import jddim

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def ddim() -> jddim.DDIM:
    return small_ddim()


@pytest.mark.optimised
def test_the_shipped_checkpoints_images_are_equal_to_the_bit_whatever_the_batch(mnist_checkpoint: Path) -> None:
    mnist = jddim.load(mnist_checkpoint)
    whole = mnist.sample(KEY, 16, steps=5, eta=0.7)
    in_two = jnp.concatenate([mnist.sample(KEY, 7, steps=5, eta=0.7), mnist.sample(KEY, 9, start=7, steps=5, eta=0.7)])
    chex.assert_trees_all_equal(in_two, whole)


def test_any_batch_size_gives_the_same_images(ddim: jddim.DDIM) -> None:
    whole = ddim.sample(KEY, 16, eta=0.7)
    chex.assert_shape(whole, (16, *SIZE, 2))
    assert whole.dtype == jnp.float32
    # XLA may choose another kernel for another batch, so rounding may differ; for this odd network (6 channels,
    # groups of 2) it does, by 1e-5. For the shipped checkpoint it does not: see above.
    in_two = jnp.concatenate([ddim.sample(KEY, 7, eta=0.7), ddim.sample(KEY, 9, start=7, eta=0.7)])
    chex.assert_trees_all_close(in_two, whole, atol=2e-4)
    padded = ddim.sample(KEY, 16, eta=0.7, batch_size=5)  # 5 + 5 + 5 + 1, exactly 16
    chex.assert_trees_all_close(padded, whole, atol=2e-4)
    chex.assert_trees_all_equal(ddim.sample(KEY, 16, eta=0.7), whole)
    assert jnp.abs(whole - ddim.sample(jax.random.key(6), 16, eta=0.7)).max() > 0.1


def test_progress_is_bit_equal_and_shows_compiling_then_rate(
    ddim: jddim.DDIM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ddim.sample(KEY, 3, steps=16, eta=0.7)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with_bar = ddim.sample(KEY, 3, steps=16, eta=0.7, progress=True)
    chex.assert_trees_all_equal(with_bar, whole)
    shown = capsys.readouterr().err
    assert "compiling 16 steps" in shown
    assert "100%" in shown
    assert "image/s" in shown


@pytest.mark.parametrize("every", [None, 3])
def test_previews_change_nothing_and_end_at_the_images(ddim: jddim.DDIM, every: int | None) -> None:
    seen: list[jddim.Preview] = []
    each = 2 if every is None else 1  # a segment ends wherever the trajectory is kept, and all are as long
    options = {"steps": 16, "eta": 0.7, "batch_size": 2, "trajectory_every": every}
    whole = ddim.sample(KEY, 3, **options)
    chex.assert_trees_all_equal(ddim.sample(KEY, 3, on_segment=seen.append, **options), whole)
    assert [(now.start, now.done) for now in seen] == [(low, n) for low in (0, 2) for n in range(each, 17, each)]
    assert {now.total for now in seen} == {16}
    images = whole if every is None else whole[0]
    chex.assert_trees_all_equal(seen[16 // each - 1].x_t, images[:2])
    chex.assert_trees_all_equal(seen[-1].x_t, images[2:])
    _, way = ddim.sample(KEY, 3, **{**options, "trajectory_every": 1})
    for now in seen[: 16 // each]:
        # segments of one step are another program: rounding
        chex.assert_trees_all_close(now.x0_hat, way.x0_hat[now.done - 1, :2], atol=2e-4)


def test_jit_vmap_and_grad_go_through(ddim: jddim.DDIM) -> None:
    light = toy(SEVEN)
    etas = jnp.array([0.0, 0.6])
    swept = jax.vmap(lambda eta: light.sample(KEY, 2, steps=3, eta=eta))(etas)
    for row, eta in zip(swept, etas, strict=True):
        chex.assert_trees_all_close(row, light.sample(KEY, 2, steps=3, eta=eta), atol=1e-5)  # another program
    seeds = jax.jit(jax.vmap(lambda key: light.sample(key, 2, steps=3, eta=0.5)))(jax.random.split(KEY, 3))
    chex.assert_shape(seeds, (3, 2, *SIZE, 2))

    def brightness(x_T, eta, model):
        return dataclasses.replace(ddim, model=model).sample(KEY, 2, x_T=x_T, steps=3, eta=eta, clip=False).mean()

    x_T = jax.random.normal(KEY, (2, *SIZE, 2))
    of_x_T, of_eta, of_model = jax.grad(brightness, argnums=(0, 1, 2), allow_int=True)(x_T, 0.5, ddim.model)
    chex.assert_tree_all_finite((of_x_T, of_eta))
    for gradient in (of_x_T, of_eta, of_model.conv_in.kernel[...]):
        assert jnp.abs(gradient).max() > 0
