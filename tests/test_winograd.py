"""Winograd's convolutions: the identity they rest on, exactly; the same as XLA's; in which places of a network."""

from __future__ import annotations

from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, lax
from tiny import random_model, small_config

import jddim
from jddim.models.fast import winograd
from jddim.models.fast.winograd import INPUT, KERNEL, OUTPUT, Winograd, convolve, pays, transformed, with_winograd
from jddim.models.layers import conv
from jddim.run.compiling import Kind, faster
from jddim.scale.batch_size import _network
from jddim.scale.export import export_sampler
from jddim.scale.sharding import Sharded, make_mesh

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

RNG = np.random.default_rng(31)


def direct(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_four_outputs_of_six_products_exactly() -> None:
    a, g, b = (
        [[Fraction(value).limit_denominator(30) for value in row] for row in m.tolist()]
        for m in (OUTPUT, KERNEL, INPUT)
    )

    def times(matrix: list[list[Fraction]], vector: list[Fraction]) -> list[Fraction]:
        return [sum((m * v for m, v in zip(row, vector, strict=True)), Fraction()) for row in matrix]

    for _ in range(5):
        x, w = ([Fraction(int(value)) for value in RNG.integers(-99, 99, n)] for n in (6, 3))
        products = [u * v for u, v in zip(times(g, w), times(b, x), strict=True)]
        assert times(a, products) == [sum(w[k] * x[i + k] for k in range(3)) for i in range(4)]


@pytest.mark.parametrize("height", [1, 3, 4, 5, 8, 11, 14])
def test_it_is_a_convolution(height: int) -> None:
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(RNG.standard_normal(shape)) for shape in ((2, height, 7, 5), (3, 3, 5, 11)))
        chex.assert_trees_all_close(convolve(x, transformed(kernel)), direct(x, kernel), rtol=0, atol=1e-13)


def test_its_float32_is_nearly_as_good_as_xlas() -> None:
    x = RNG.standard_normal((2, 16, 16, 128)).astype(np.float32)
    kernel = (RNG.standard_normal((3, 3, 128, 130)) / 34).astype(np.float32)
    with jax.enable_x64(True):
        exact = np.asarray(direct(jnp.asarray(x, np.float64), jnp.asarray(kernel, np.float64)))
    y = convolve(jnp.asarray(x), transformed(jnp.asarray(kernel)))
    assert y.dtype == jnp.float32
    assert (
        np.abs(np.asarray(y) - exact).max() / np.abs(exact).max() < 3e-6
    )  # 1.1e-6 here; with the points 2 and -2 twice that


def test_derivatives_and_vmap() -> None:
    x, kernel = (jnp.asarray(RNG.standard_normal(s), jnp.float32) for s in ((3, 5, 7, 3), (3, 3, 3, 2)))

    def loss(of: object, x: Array, kernel: Array) -> Array:
        return jnp.sin(of(x, kernel)).sum()

    own = lambda x, kernel: convolve(x, transformed(kernel))  # noqa: E731
    grads = [jax.jit(jax.grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1)))(x, kernel) for f in (own, direct)]
    chex.assert_trees_all_close(*grads, rtol=0, atol=1e-4)
    each = jax.vmap(lambda one: own(one[None], kernel)[0])(x)
    chex.assert_trees_all_close(each, direct(x, kernel), rtol=0, atol=1e-4)


def test_only_what_it_can_do_and_what_pays_is_replaced() -> None:
    rngs = nnx.Rngs(0)
    wide = conv(128, 131, 3, dtype=jnp.float32, rngs=rngs)
    others = {
        "narrow": conv(127, 131, 3, dtype=jnp.float32, rngs=rngs),
        "one by one": conv(128, 131, 1, dtype=jnp.float32, rngs=rngs),
        "halving": nnx.Conv(128, 128, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs),
        "padded otherwise": nnx.Conv(128, 128, (3, 3), padding=((0, 1), (0, 1)), rngs=rngs),
        "in groups": nnx.Conv(256, 256, (3, 3), padding=((1, 1), (1, 1)), feature_group_count=2, rngs=rngs),
        "dilated": nnx.Conv(128, 128, (3, 3), padding=((1, 1), (1, 1)), kernel_dilation=2, rngs=rngs),
        "bfloat16": conv(128, 131, 3, dtype=jnp.bfloat16, rngs=rngs),
        "float64": conv(128, 131, 3, dtype=jnp.float64, rngs=rngs),
        "no layer": jnp.zeros(3),
    }
    swapped = with_winograd({"wide": wide, **others})
    assert [name for name, layer in swapped.items() if isinstance(layer, Winograd)] == ["wide"]
    assert pays(wide, 8)
    assert not pays(wide, 7)
    for height in (7, 9):
        x = jnp.asarray(RNG.standard_normal((1, height, 5, 128)), jnp.float32)
        chex.assert_trees_all_close(swapped["wide"](x), wide(x), rtol=0, atol=1e-5)
    assert isinstance(faster({"wide": wide}, Kind("cpu"))["wide"], Winograd)
    assert faster({"wide": wide}, Kind("gpu"))["wide"] is wide


def test_the_sampler_has_them_and_a_callers_program_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "pays", lambda conv, height: True)
    heights: list[int] = []
    monkeypatch.setattr(winograd, "convolve", lambda x, kernels: heights.append(x.shape[1]) or convolve(x, kernels))
    config = small_config()
    ddim = jddim.DDIM(
        random_model(config),
        jddim.linear_schedule(50),
        jddim.SamplerConfig(spacing="uniform", num_steps=3, clip=True),
    )
    key = jax.random.key(7)
    own = ddim.sample(key, 3, eta=0.7)
    assert len(heights) > 5
    heights.clear()
    plain = jax.jit(lambda: ddim.sample(key, 3, eta=0.7))()
    assert not heights
    # Every convolution is another sum here, in a network with random weights: 2e-6 in one evaluation, more in three.
    chex.assert_trees_all_close(own, plain, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("users_emitters")
def test_what_is_exported_for_a_cpu_alone_and_what_is_sharded_have_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flatbuffers", reason="exporting needs flatbuffers: pip install 'jddim[export]'")
    monkeypatch.setattr(winograd, "pays", lambda conv, height: True)
    calls: list[int] = []
    monkeypatch.setattr(winograd, "convolve", lambda x, kernels: calls.append(x.shape[1]) or convolve(x, kernels))
    config = small_config(channel_mults=(1,), attention_levels=(), middle=False)
    sampler = jddim.SamplerConfig(spacing="uniform", num_steps=2, clip=True)
    ddim = jddim.DDIM(random_model(config), jddim.linear_schedule(50), sampler)
    own = ddim.sample(jax.random.key(5), 3, eta=0.7)
    taken = len(calls)
    assert taken

    exported = export_sampler(ddim, batch_size=3, platforms=("cpu",))
    arguments = (exported.weights, np.uint32(5), np.arange(3, dtype=np.uint32), np.float32(0.7))
    run = jax.jit(exported.program.call, compiler_options=exported.about["compiler_options"]["cpu"])
    np.testing.assert_array_equal(run(*arguments), own)
    assert len(calls) == 2 * taken
    export_sampler(ddim, batch_size=3, platforms=("cpu", "cuda"))  # for a GPU they would be slower
    assert len(calls) == 2 * taken

    np.testing.assert_array_equal(Sharded(ddim, make_mesh(1)).sample(jax.random.key(5), 3, eta=0.7), own)
    assert len(calls) == 3 * taken


def test_the_batch_size_is_chosen_with_them_and_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one_level = small_config(channel_mults=(1,), attention_levels=(), middle=False)
    ddim = jddim.DDIM(random_model(one_level), jddim.linear_schedule(50), jddim.SamplerConfig())
    _, plain = _network(ddim, 2)
    monkeypatch.setattr(winograd, "pays", lambda conv, height: True)
    _, needed = _network(ddim, 2)
    kernels = [leaf for leaf in jax.tree.leaves(ddim.model) if leaf.shape[:2] == (3, 3)]
    transformed_bytes = sum(2 * kernel.nbytes for kernel in kernels)  # 18 rows where there were 9
    assert needed >= transformed_bytes
    assert needed > plain
