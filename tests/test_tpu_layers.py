"""jddim.tpu_layers: each layer equals its plain twin, and they are put where they are for, and nowhere else."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_model, small_config

from jddim.checkpoint import flat_params
from jddim.compiling import faster
from jddim.config import LucidrainsConfig
from jddim.models import layers, lucidrains
from jddim.models.unet import UNet
from jddim.tpu_layers import NearestConv, NormOfParts, with_tpu_layers

pytestmark = [pytest.mark.unoptimised, pytest.mark.quick]

RNG = np.random.default_rng(0)


def redrawn(module: nnx.Module) -> nnx.Module:
    """With every parameter random."""
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape), leaf.dtype), module)


@pytest.mark.parametrize("kind", [layers.Upsample, lucidrains.Upsample])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_one_convolution_doubles_and_convolves(kind: type, size: tuple[int, int]) -> None:
    more = {"with_conv": True} if kind is layers.Upsample else {"channels_out": 7}
    plain = redrawn(kind(7, **more, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = RNG.standard_normal((2, *size, 7), dtype=np.float32)
    expected = plain(x)
    # 63 products in another order
    chex.assert_trees_all_close(NearestConv(plain)(x), expected, atol=1e-6 * np.abs(expected).max() * 4)


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_norm_of_parts_is_flaxs_of_the_whole(at: int) -> None:
    plain = redrawn(layers.group_norm(12, 3, 1e-3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert plain.use_fast_variance
    x = jnp.asarray(3 + RNG.standard_normal((2, 5, 7, 12)), jnp.bfloat16)
    made = NormOfParts(plain, at)(x)
    assert made.dtype == jnp.float32
    chex.assert_trees_all_close(made, plain(x), atol=2e-5)  # E[x^2] - E[x]^2 of means of 3 loses a digit


NETWORKS = {
    "two levels": small_config(),
    "three levels, classes": small_config(
        channel_mults=(1, 2, 1), num_res_blocks=2, class_embedding="learned", num_classes=3, image_size=(8, 12)
    ),
    "no convolution": small_config(downsample=("pool",), upsample=("pool",)),
    "lucidrains": LucidrainsConfig(
        image_size=(8, 12), in_channels=1, out_channels=1, channels=8, channel_mults=(1, 2), memory=2, num_heads=(2, 2),
        head_channels=(4, 4), full_attention=(False, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_the_same(name: str) -> None:
    config = NETWORKS[name]
    x = RNG.standard_normal((2, *config.image_size, config.in_channels), dtype=np.float32)
    given = (jnp.asarray(x), jnp.array([3, 900]))
    given += (jnp.array([0, 2]),) if config.num_classes else ()
    plain = random_model(config)
    names = sorted(flat_params(plain))
    run = jax.jit(lambda model, *given: model(*given))
    expected = run(plain, *given)
    largest = np.abs(expected).max()
    chex.assert_trees_all_close(run(faster(plain, "tpu"), *given), expected, rtol=0, atol=1e-5 * largest)  # rounding
    assert sorted(flat_params(plain)) == names  # what is given is not changed

    half = random_model(config, dtype=jnp.bfloat16)
    errors = [float(np.sqrt(np.square(run(m, *given) - expected).mean())) for m in (half, faster(half, "tpu"))]
    assert errors[1] < 1.3 * errors[0]  # no worse than bfloat16 is


def test_where_they_are_put() -> None:
    model = with_tpu_layers({"a": random_model(small_config(), dtype=jnp.bfloat16)})["a"]
    assert isinstance(model, UNet)
    assert isinstance(model.up[1].upsample, NearestConv)
    assert model.up[1].upsample.kernel.dtype == jnp.bfloat16
    parts = [block.norm1.at for level in model.up for block in level.blocks]
    assert parts == [16, 8, 16, 16]  # levels of 8 and 16 channels: what comes from below is first
    assert not any(isinstance(block.norm1, NormOfParts) for level in model.down for block in level.blocks)
    exact = with_tpu_layers(random_model(small_config()))
    assert not any(isinstance(module, NormOfParts) for _, module in nnx.iter_modules(exact))
