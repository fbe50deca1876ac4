"""jddim.models.fast.lean_layers: each layer equals its plain twin, and they are put only where they are for."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_model, small_config

from jddim.config import LucidrainsConfig
from jddim.models import layers, lucidrains
from jddim.models.building import flat_params
from jddim.models.fast.lean_layers import (
    Apart,
    FusedAttention,
    NearestConv,
    NormOfParts,
    with_gpu_layers,
    with_tpu_layers,
)
from jddim.models.unet import UNet
from jddim.run.compiling import Kind, compiler_options, faster

pytestmark = pytest.mark.unoptimised

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


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_a_norm_of_parts_is_flaxs_of_the_whole(at: int) -> None:
    plain = redrawn(layers.group_norm(12, 3, 1e-3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert plain.use_fast_variance
    x = jnp.asarray(3 + RNG.standard_normal((2, 5, 7, 12)), jnp.bfloat16)
    made = NormOfParts(plain, at)(x)
    assert made.dtype == jnp.float32
    chex.assert_trees_all_close(made, plain(x), atol=2e-5)  # E[x^2] - E[x]^2 of means of 3 loses a digit


@pytest.mark.parametrize("at", [0, 1, 5, 11])
@pytest.mark.parametrize(("mean", "away"), [(0, 0), (1000, 0), (0, 10)])
def test_in_float32_one_pass_is_about_as_exact_as_two(at: int, mean: float, away: float) -> None:
    plain = redrawn(layers.group_norm(12, 3, 1e-3, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert not plain.use_fast_variance
    values = mean + RNG.standard_normal((2, 5, 7, 12)) + RNG.standard_normal(12)
    values[:, 2, 3] += away  # the pixel in the middle, `away` standard deviations from the rest
    x = jnp.asarray(values, jnp.float32)
    rounding = max(mean, 1 + away**2) * np.finfo(np.float32).eps  # E[x^2] - E[x]^2 of means of 1000 would lose all
    chex.assert_trees_all_close(NormOfParts(plain, at)(x), plain(x), atol=30 * rounding)


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        model = random_model(small_config(), dtype=jnp.float64)
        x, t = (
            jnp.asarray(RNG.standard_normal((2, *model.config.image_size, model.config.in_channels))),
            jnp.array([3, 9]),
        )
        expected = model(x, t)
        for kind in KINDS:
            chex.assert_trees_all_close(
                faster(model, kind)(x, t), expected, rtol=0, atol=1e-12 * np.abs(expected).max()
            )


def test_norms_of_other_peoples_models_stay() -> None:
    class Theirs(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.GroupNorm(12, num_groups=3, use_bias=False, rngs=nnx.Rngs(0))

    for kind in KINDS:
        assert isinstance(faster(Theirs(), kind).norm, nnx.GroupNorm)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "scale"), [(1, 3, 1.0), (3, 3, 1.5), (2, 0, 1.0)])
def test_an_attention_between_convolutions_is_the_same(dtype: jnp.dtype, heads: int, groups: int, scale: float) -> None:
    plain = layers.Attention(12, groups=groups, epsilon=1e-5, heads=heads, scale=scale, dtype=dtype, rngs=nnx.Rngs(0))
    plain = jax.tree.map(lambda leaf: leaf / 4, redrawn(plain))  # so that the softmax is of more than one value
    x = jnp.asarray(RNG.standard_normal((2, 3, 5, 12)), dtype)
    made, expected = FusedAttention(plain, cudnn=False)(x), plain(x)
    assert made.dtype == expected.dtype
    chex.assert_trees_all_close(made, expected, atol=1e-5 if dtype == jnp.float32 else 0.1)  # 8 bits of values of 5


NETWORKS = {
    "three levels, classes": small_config(
        channel_mults=(1, 2, 1), class_embedding="learned", num_classes=3, image_size=(8, 12)
    ),
    "no convolution": small_config(downsample=("pool",), upsample=("pool",)),
    "lucidrains": LucidrainsConfig(
        image_size=(8, 12), in_channels=1, out_channels=1, channels=8, channel_mults=(1, 2), memory=2, num_heads=(2, 2),
        head_channels=(4, 4), full_attention=(False, True),
    ),
}  # fmt: skip


KINDS = [Kind("tpu"), Kind("gpu", "an old one", (7, 5))]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_the_same(name: str) -> None:
    config = NETWORKS[name]
    x = RNG.standard_normal((2, *config.image_size, config.in_channels), dtype=np.float32)
    given = (jnp.asarray(x), jnp.array([3, 900]))
    given += (jnp.array([0, 2]),) if config.num_classes else ()
    plain, half = random_model(config), random_model(config, dtype=jnp.bfloat16)
    names = sorted(flat_params(plain))
    run = jax.jit(lambda model, *given: model(*given))
    expected = run(plain, *given)
    largest = np.abs(expected).max()
    error = np.sqrt(np.square(run(half, *given) - expected).mean())
    for kind in KINDS:
        chex.assert_trees_all_close(run(faster(plain, kind), *given), expected, rtol=0, atol=1e-5 * largest)  # rounding
        assert sorted(flat_params(plain)) == names  # what is given is not changed
        of_half = run(faster(half, kind), *given)
        assert np.sqrt(np.square(of_half - expected).mean()) < 1.3 * error, kind  # no worse than bfloat16 is


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


def test_where_they_are_put_for_a_gpu() -> None:
    assert faster(plain := random_model(small_config()), Kind("gpu", "AMD's")) is plain
    model = with_gpu_layers([random_model(small_config())], (9, 0))[0]
    assert isinstance(model.up[1].upsample, NearestConv)
    modules = [module for _, module in nnx.iter_modules(model)]
    attentions = [module for module in modules if isinstance(module, FusedAttention)]
    assert attentions
    assert not any(module.cudnn for module in attentions)  # it is for half precision
    norms = [module.norm for module in modules if isinstance(module, NormOfParts)]
    assert len(norms) == sum(isinstance(module, nnx.GroupNorm) for module in modules)
    assert [block.norm1.at for block in model.up[0].blocks] == [16, 8]
    blocks = [module for module in modules if isinstance(module, layers.ResBlock)]
    assert all(isinstance(block.conv1, Apart) for block in blocks)
    scaled = with_gpu_layers(random_model(small_config(scale_shift=True)), (9, 0))
    assert not any(isinstance(module, Apart) for _, module in nnx.iter_modules(scaled))  # time is not added to it


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "heads", "offered"),
    [
        ((9, 0), jnp.bfloat16, 256, 1, True),
        ((9, 0), jnp.float16, 264, 1, False),
        ((9, 0), jnp.bfloat16, 12, 1, False),
        ((9, 0), jnp.float32, 64, 1, False),
        ((8, 6), jnp.bfloat16, 256, 1, False),
        ((8, 6), jnp.bfloat16, 256, 2, True),
        ((7, 5), jnp.bfloat16, 64, 1, False),
        ((12, 0), jnp.bfloat16, 256, 1, False),
        ((10, 3), jnp.bfloat16, 64, 1, False),
    ],
)
def test_cudnns_attention_is_where_it_is_offered(
    capability: tuple[int, int],
    dtype: jnp.dtype,
    width: int,
    heads: int,
    offered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plain = layers.Attention(width, groups=4, epsilon=1e-5, heads=heads, dtype=dtype, rngs=nnx.Rngs(0))
    assert with_gpu_layers(plain, capability).cudnn == offered
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # jax would not find the GPU, and take it for an old one
    assert with_gpu_layers(plain, capability).cudnn == (offered and width // heads <= 128)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA GPU; on one: JAX_PLATFORMS=cuda,cpu")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_gpu_it_is_the_cpus_network(dtype: jnp.dtype) -> None:
    config = small_config(
        channels=32, channel_mults=(1, 2), norm_groups=8, image_size=(16, 16), attention_levels=(0, 1)
    )
    plain = random_model(config, dtype=dtype)
    given = (jnp.asarray(RNG.standard_normal((3, 16, 16, config.in_channels)), jnp.float32), jnp.array([3, 900, 41]))
    exact = random_model(config)
    run = jax.jit(lambda model, *given: faster(model)(*given), compiler_options=compiler_options())
    with jax.default_matmul_precision("highest"):
        on_cpu = jax.device_put((exact, *given), jax.devices("cpu")[0])
        expected = np.asarray(jax.jit(lambda model, *given: model(*given))(*on_cpu))
        made = np.asarray(run(plain, *given))
    assert any(isinstance(module, FusedAttention) for _, module in nnx.iter_modules(faster(plain)))
    error, scale = np.sqrt(np.square(made - expected).mean()), np.sqrt(np.square(expected).mean())
    assert error < (1e-5 if dtype == jnp.float32 else 0.05) * scale
