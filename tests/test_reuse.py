"""Reusing the deep half of a UNet: what it computes, what it refuses. tests/parity/test_reuse_parity.py has PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, small_config

import jddim
from jddim.config import DiTConfig, SamplerConfig
from jddim.run.request import RequestError
from jddim.schedule import linear_schedule
from jddim.timetables import whole_steps

pytestmark = pytest.mark.unoptimised

KEY, SIZE = jax.random.key(2), (6, 10)
CONFIG = small_config(image_size=SIZE, num_res_blocks=2, class_embedding="learned", num_classes=4)


def pipeline(config: Any = CONFIG, **sampler: Any) -> jddim.DDIM:
    return jddim.DDIM(random_model(config), linear_schedule(50), SamplerConfig(num_steps=7, **sampler))


def test_what_every_block_is_given_has_the_stated_shape_and_gives_the_output_back() -> None:
    model, x, t, labels = random_model(CONFIG), jax.random.normal(KEY, (2, *SIZE, 1)), jnp.array([3, 40]), jnp.arange(2)
    exact = model(x, t, labels)
    assert CONFIG.up_blocks == 3 * len(CONFIG.channel_mults)
    for blocks in range(1, CONFIG.up_blocks + 1):
        output, deep = model.whole(x, t, labels, blocks=blocks)
        assert deep.shape == (2, *CONFIG.deep_shape(SIZE, blocks))
        chex.assert_trees_all_equal(output, exact)
        chex.assert_trees_all_equal(model.shallow(x, t, labels, deep=deep, blocks=blocks), exact)
        assert np.abs(model.shallow(x, t, labels, deep=0 * deep, blocks=blocks) - exact).max() > 1e-3


def test_one_program_for_all_who_watch() -> None:
    ddim, seen = pipeline(), []
    sample = partial(ddim.sample, KEY, 3, labels=[0, 2, 1], eta=0.6, guidance_scale=[0.5, 2.0, 3.0], null_label=3)
    exact, reused = sample(), sample(reuse=3)
    assert np.abs(reused - exact).max() > 1e-2
    chex.assert_trees_all_equal(sample(reuse=3, on_segment=lambda preview: seen.append(preview.done)), reused)
    assert len(seen) > 1
    # every step whole, or the same steps by their center: the same arithmetic, in another program
    chex.assert_trees_all_close(sample(reuse=1), exact, atol=1e-4)
    assert np.abs(sample(reuse=3, reuse_center=5) - reused).max() > 1e-3
    chex.assert_trees_all_close(sample(reuse=3, batch_size=2), reused, atol=1e-3)  # two images: other rounding
    swept = jax.vmap(lambda eta: sample(reuse=3, eta=eta))(jnp.array([0.6, 0.2]))
    chex.assert_trees_all_close(swept[0], reused, atol=1e-3)
    # half a run begins with a whole step of its own
    half = ddim.edit(jnp.zeros((3, *SIZE, 1)), KEY, strength=0.5, labels=[0, 2, 1], reuse=2)
    assert np.isfinite(half).all()


def test_deep_caches_own_steps() -> None:
    """Figures of its code, `sample_from_quad_center` (horseee/DeepCache); without a center every N-th."""
    assert whole_steps(50, 5, 15) == (0, 5, 10, 14, 18, 22, 27, 32, 38, 44)
    assert whole_steps(50, 5, 30) == (0, 6, 12, 17, 22, 27, 30, 35, 39, 44)
    assert whole_steps(7, 3, 2) == (0, 2, 4)
    assert whole_steps(7, 3) == (0, 3, 6)
    with pytest.raises(ValueError, match="at least 1"):
        whole_steps(7, 0)
    with pytest.raises(ValueError, match=r"a step in 0\.\.7, got 8"):
        whole_steps(7, 3, 8)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"reuse": 0}, "reuse must be at least 1"),
        ({"reuse_center": 2}, "reuse_center is for reuse: give reuse too"),
        ({"reuse_blocks": 2}, "reuse_blocks is for reuse: give reuse too"),
        ({"reuse": 2, "reuse_center": 7}, r"reuse_center must be a step in 0\.\.6, got 7"),
        ({"reuse": 2, "reuse_blocks": 7}, r"reuse_blocks must lie in 1\.\.6"),
        (
            {"reuse": 2, "guidance_scale": 2.0, "guidance_interval": (5.0, 9.0), "null_label": 3},
            "reuse does not go with guidance_interval",
        ),
    ],
)
def test_what_cannot_be(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        pipeline().sample(KEY, 2, labels=0, **asked)


def test_a_transformer_has_no_last_blocks() -> None:
    config = DiTConfig(
        image_size=(4, 6),
        in_channels=1,
        out_channels=1,
        channels=12,
        depth=1,
        num_heads=3,
        patch_size=2,
        num_classes=None,
    )
    with pytest.raises(RequestError, match="this network is none: leave it out"):
        pipeline(config).sample(KEY, 2, reuse=2)
