"""What the layers promise beside parity: dtypes."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import SIZE, random_model, small_config

from jddim.models.layers import cast_kernels, group_norm


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_kernels_cast_beforehand_give_the_same_bits(dtype: type) -> None:
    model = random_model(small_config(class_embedding="learned", num_classes=5), dtype=dtype)
    x_t = jax.random.normal(jax.random.key(1), (3, *SIZE, 1))
    inputs = (x_t, jnp.array([0, 17, 999]), jnp.array([4, 0, 2]))
    before = jax.jit(lambda model, *inputs: model(*inputs))(model, *inputs)
    after = jax.jit(lambda model, *inputs: cast_kernels(model)(*inputs))(model, *inputs)
    chex.assert_trees_all_equal(before, after)

    cast = cast_kernels(model)
    assert {cast.conv_in.kernel.dtype, cast.time_embed.linear_1.bias.dtype} == {np.dtype(dtype)}
    # Norms and tables compute from float32.
    assert {cast.norm_out.scale.dtype, cast.class_embed.embedding.dtype} == {np.dtype(np.float32)}
    assert model.conv_in.kernel.dtype == np.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 4e-3)])
def test_norms_are_exact_to_their_inputs_precision(dtype: type, tolerance: float) -> None:
    # A mean of 30 standard deviations is rounded to 30 * 6e-8; E[x^2] - E[x]^2 to 900 * 6e-8, which bfloat16 can take.
    norm = group_norm(12, 3, 1e-5, dtype=dtype, rngs=nnx.Rngs(0))
    x = (30 + np.random.default_rng(0).standard_normal((5, 7, 3, 12))).astype(dtype)
    exact = x.astype(np.float64).reshape(5, 21, 3, 4)
    mean, var = exact.mean((1, 3), keepdims=True), exact.var((1, 3), keepdims=True)
    exact = ((exact - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    normed = norm(jnp.asarray(x))
    assert normed.dtype == jnp.float32
    assert np.abs(np.asarray(normed) - exact).max() <= tolerance
