"""Programs compiled with options: the same results, wherever they are called from."""

from __future__ import annotations

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.run.compiling import CPU_OPTIONS, GPU_OPTIONS, TPU_OPTIONS, Jit, Kind, compiler_options, kind_of

pytestmark = pytest.mark.quick

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, 7, 11, 5), dtype=np.float32))
KERNEL = jnp.asarray(RNG.standard_normal((3, 3, 5, 13), dtype=np.float32))


def convolved(kernel: jax.Array, x: jax.Array, power: int) -> jax.Array:
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y**power


@pytest.fixture
def compiled() -> Jit:
    def own(*args: object, **kwargs: object) -> object:  # jax counts the programs of a function, whoever compiled it
        return convolved(*args, **kwargs)

    return Jit(own, static_argnames=("power",))


def test_options_are_those_of_the_platform() -> None:
    assert compiler_options(Kind("cpu")) == CPU_OPTIONS
    assert (
        compiler_options(Kind("gpu")) == compiler_options(Kind("tpu")) == compiler_options(Kind("tpu", "TPU v3")) == {}
    )
    assert compiler_options(Kind("tpu", "TPU v5 lite")) == TPU_OPTIONS
    assert compiler_options(Kind("gpu", "NVIDIA H100", (9, 0))) == GPU_OPTIONS
    program = jax.jit(jnp.sin, compiler_options=compiler_options())
    chex.assert_trees_all_close(program(X), np.sin(X), atol=1e-6)


@pytest.mark.parametrize(("told", "capability"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx90a", None), (None, None)])
def test_a_kind_is_what_a_device_says_of_itself(told: str | None, capability: tuple[int, int] | None) -> None:
    told_so = {} if told is None else {"compute_capability": told}
    device = types.SimpleNamespace(platform="gpu", device_kind="a GPU", **told_so)
    assert kind_of(device) == Kind("gpu", "a GPU", capability)  # AMD's GPUs are of the same platform


@pytest.mark.parametrize("options", [GPU_OPTIONS, CPU_OPTIONS])
def test_xla_knows_the_options(options: dict[str, bool | str]) -> None:
    """Whatever it compiles for, it reads all of them: one that it has renamed would fail every run there."""
    chex.assert_trees_all_close(jax.jit(jnp.sin, compiler_options=options)(X), np.sin(X), atol=1e-6)
    with pytest.raises(jax.errors.JaxRuntimeError, match="CONVOLUTIONS"):
        jax.jit(jnp.sin, compiler_options={"xla_gpu_enable_command_buffer": "CONVOLUTIONS"})(X)


def test_arguments_are_a_tree(compiled: Jit) -> None:
    def total(model: dict[str, object], x: jax.Array, scale: jax.Array | None = None, *, power: int) -> jax.Array:
        return sum(jax.tree.leaves(model)) * x**power * (1 if scale is None else scale)

    run = Jit(total, static_argnames=("power",))
    one, two = {"a": KERNEL[0, 0, 0, 0]}, {"a": KERNEL[0, 0, 0, 0], "b": [KERNEL[0, 0, 0, 1]]}
    for model in (one, two):
        for scale in (None, jnp.float32(3)):
            made = run(model, x=X, scale=scale, power=2)
            chex.assert_trees_all_close(made, total(model, X, scale, power=2), rtol=1e-6)
    programs = run.on(kind_of())._cache_size()
    run({"a": KERNEL[0, 0, 1, 1]}, x=X, scale=None, power=2)
    assert run.on(kind_of())._cache_size() == programs == 4


def test_called_at_the_top_it_has_the_options(compiled: Jit) -> None:
    chex.assert_trees_all_close(compiled(KERNEL, X, power=2), convolved(KERNEL, X, 2), rtol=1e-5, atol=1e-5)
    assert (compiled.on(kind_of())._cache_size(), compiled.plain._cache_size()) == (1, 0)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: jax.jit(lambda k, x: f(k, x, power=2)),
        lambda f: jax.jit(lambda k, x: f(KERNEL, X, power=2) + 0 * x.sum()),  # no argument of f's is traced
        lambda f: lambda k, x: jax.vmap(lambda one: f(k, one[None], power=2)[0])(x),
        lambda f: lambda k, x: jax.jvp(lambda x: f(k, x, power=2), (x,), (x,))[0],
        lambda f: lambda k, x: jax.vjp(lambda x: f(k, x, power=2), x)[0],
    ],
)
def test_under_every_transformation_it_is_part_of_the_callers_program(compiled: Jit, transformed: object) -> None:
    actual = transformed(compiled)(KERNEL, X)
    chex.assert_trees_all_close(actual, convolved(KERNEL, X, 2), rtol=1e-5, atol=1e-5)
    assert compiled.on(kind_of())._cache_size() == 0
