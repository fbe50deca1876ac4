"""Every loop under every transformation and check of JAX: derivatives in float64, devices, modes, dtypes.

`LOOPS` is the table: a row is a loop at some options, of two samples, three steps and a network of one line. The tests
take each row, and the networks, through JAX.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_models_lucidrains import CONFIG as LUCIDRAINS
from tiny import random_model, small_config

import jddim
from jddim import guidance, sampling
from jddim.config import SamplerConfig
from jddim.ddim import step_table, vp_rows
from jddim.editing import inpaint_loop, slerp
from jddim.inversion import invert_loop
from jddim.likelihood import log_likelihood
from jddim.schedule import linear_schedule
from jddim.solvers import solver_loop

pytestmark = pytest.mark.unoptimised

SHAPE = (2, 2, 1)
TABLE = step_table(linear_schedule(300, 5e-4, 0.03), [290, 150, 20], np.float64)
KEYS = jax.random.split(jax.random.key(1), 2)
KEEP = np.array([[1.0], [0.3]])  # of each row of pixels, so of fewer axes than an image
CLIP = (-1.0, 1.0)


def learned(f: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, t: jnp.concatenate([f(x, t), jnp.tanh(x)], axis=-1)


def weaker(f: Callable[..., Array]) -> guidance.Pair:
    return guidance.pair(f, lambda x, t: 0.7 * f(x, t))


def known(x: Array) -> Array:
    return 0.5 * jnp.cos(x)


# name -> (denoise, x, table, eta, keys) -> arrays, each with the samples along some axis
LOOPS: dict[str, Callable[..., Any]] = {
    "ddim": lambda f, x, table, eta, keys: sampling.sample_loop(f, x, table),
    "ddim, eta": lambda f, x, table, eta, keys: sampling.sample_loop(f, x, table, eta=eta, key=keys, clip_range=CLIP),
    "ddim, eps re-derived": lambda f, x, table, eta, keys: sampling.sample_loop(
        f, x, table, eta=jnp.broadcast_to(eta, x.shape[:1]), key=keys, threshold=(0.8, 2),
        rederive_eps=True, self_condition=True,
    ),
    "ancestral": lambda f, x, table, eta, keys: sampling.ancestral_loop(
        f, x, table, key=keys, trajectory_every=2
    )[1][1:],
    "ancestral, large": lambda f, x, table, eta, keys: sampling.ancestral_loop(
        f, x, table, key=keys, variance="fixed_large", clip_range=None
    ),
    "ancestral, learned": lambda f, x, table, eta, keys: sampling.ancestral_loop(
        learned(f), x, table, key=keys, variance="learned_range"
    ),
    "inversion": lambda f, x, table, eta, keys: invert_loop(f, x, table, refine=1),
    "inversion, eps re-derived": lambda f, x, table, eta, keys: invert_loop(
        f, x, table, convention="paper", clip_range=CLIP, rederive_eps=True
    ),
    "inversion, openai": lambda f, x, table, eta, keys: invert_loop(f, x, table, convention="openai"),
    "cfg++": lambda f, x, table, eta, keys: guidance.cfg_plus_plus_loop(
        weaker(f), x, table, scale=0.4, eta=eta, key=keys, clip_range=CLIP
    ),
    "guided": lambda f, x, table, eta, keys: sampling.sample_loop(
        guidance.classifier_free(weaker(f), eta, rescale=0.5), x, table
    ),
    "inpainting": lambda f, x, table, eta, keys: inpaint_loop(f, x, table, known(x), KEEP, eta=eta, key=keys),
    "repaint": lambda f, x, table, eta, keys: inpaint_loop(f, x, TABLE, known(x), KEEP, eta=eta, resample=2, key=keys),
    "dpm++2m-sde": lambda f, x, table, eta, keys: solver_loop(f, x, TABLE, "dpm++2m-sde", key=keys, clip_range=CLIP),
    "unipc": lambda f, x, table, eta, keys: solver_loop(f, x, TABLE, "unipc"),
    "likelihood": lambda f, x, table, eta, keys: log_likelihood(f, x, TABLE),
    "slerp": lambda f, x, table, eta, keys: slerp(x, 2 * jnp.cos(3 * x), eta),
}  # fmt: skip
NOISY = {"ddim, eta", "ddim, eps re-derived", "cfg++", "inpainting", "repaint", "dpm++2m-sde"}
NOISY |= {name for name in LOOPS if name.startswith("ancestral")}


def x_T(dtype: Any) -> Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, *SHAPE)), dtype)


def denoiser(gain: Any) -> Callable[..., Array]:
    """Not linear, different at every t, and it takes a self-conditioned network's x0_hat."""

    def denoise(x: Array, t: Array, *x0_hat: Array) -> Array:
        shift = t.astype(x.dtype).reshape(-1, 1, 1, 1) / 50
        return gain * jnp.sin(x + shift) + 0.1 * sum(x0_hat, x)

    return denoise


def arguments(dtype: Any) -> list[Array]:
    return [x_T(dtype), *(jnp.asarray(value, dtype) for value in (0.8, 0.6, TABLE.alpha_bar_t, 1.0))]


def run(name: str, x: Array, gain: Array, eta: Array, alpha_bar: Array, last: Array, keys: Array = KEYS) -> Array:
    """The loop's results side by side, `(n, ...)`, with all that may be traced traced: alpha_bar too, and its end."""
    table = TABLE._replace(**vp_rows(alpha_bar, jnp.append(alpha_bar[1:], last)))
    made = LOOPS[name](denoiser(gain), x, table, eta, keys)
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(made)])


def memory(ddim: jddim.DDIM, steps: int, *, remat: bool) -> int:
    """Bytes that the gradient with respect to x_T and the model needs beside its arguments and results."""
    table = ddim.table(steps)

    def loss(model, x_T):
        denoise = dataclasses.replace(ddim, model=model).denoiser()
        return sampling.sample_loop(jax.checkpoint(denoise) if remat else denoise, x_T, table).sum()

    x_T = jax.ShapeDtypeStruct((5, 14, 14, 1), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True)).lower(ddim.model, x_T).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_flat_in_the_number_of_steps() -> None:
    model = random_model(small_config(image_size=(14, 14), channels=16, channel_mults=(1,), attention_levels=()))
    ddim = jddim.DDIM(model, linear_schedule(300), SamplerConfig())
    ten, hundred = (memory(ddim, steps, remat=True) for steps in (10, 100))
    assert hundred <= 1.3 * ten, (ten, hundred)
    without = memory(ddim, 100, remat=False)
    assert without > 3 * hundred, (without, hundred)  # so that it is the checkpoint that keeps it flat


@pytest.mark.parametrize("name", LOOPS)
def test_derivatives(name: str) -> None:
    """First and second ones, forwards and in reverse, against finite differences in float64.

    Those of the compiled program and of one operation at a time, each of which must give no NaN.
    """
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        *at, last = arguments(jnp.float64)
        v, unravel = jax.flatten_util.ravel_pytree(at)
        d = jnp.asarray(np.random.default_rng(1).standard_normal(v.shape)) * jnp.minimum(jnp.abs(v), 1 - jnp.abs(v) / 2)

        def f(v: Array, last: Array = last) -> Array:
            return run(name, *unravel(v), last)

        def gradients(v: Array) -> tuple[Array, Array]:
            return jax.grad(lambda v, last: (f(v, last) ** 2).sum(), argnums=(0, 1))(v, last)

        @jax.jit
        def program(v: Array) -> dict[str, Any]:
            first, second = jax.jvp(gradients, (v,), (d,))
            return {
                "f": jax.vmap(f)(jnp.stack([v + d, v]))[1],
                "forward": jax.jacfwd(f)(v) @ d,
                "reverse": jax.jacrev(jax.checkpoint(f))(v) @ d,
                "gradient": first[0],
                "of the last alpha_bar": first[1],
                "hvp": second[0],
            }

        h = 1e-5
        here, up, down = program(v), program(v + h * d), program(v - h * d)
        numeric, of_gradient = ((up[k] - down[k]) / (2 * h) for k in ("f", "gradient"))

        def close(a: Array, b: Array, rtol: float) -> None:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

        assert np.abs(numeric).max() > 1e-3
        close(here["forward"], numeric, 1e-6)  # h^2, and 1e-16 / h
        close(here["hvp"], of_gradient, 1e-6)
        close(here["reverse"], here["forward"], 1e-10)
        close(here["gradient"] @ d, (2 * here["f"] * here["forward"]).sum(), 1e-10)
        assert np.isfinite(here["of the last alpha_bar"])
        with jax.disable_jit():
            close(f(v), here["f"], 1e-10)
            close(jax.grad(lambda v: gradients(v)[0] @ d)(v), here["hvp"], 1e-10)


@pytest.mark.parametrize("name", LOOPS)
def test_no_tracer_leaks(name: str) -> None:
    with jax.checking_leaks():
        jax.eval_shape(jax.grad(lambda x, *rest: run(name, x, *rest).sum()), *arguments(jnp.float32))


@pytest.mark.parametrize("name", LOOPS)
def test_dtypes(name: str) -> None:
    """x_0 has x_T's dtype, with x64 on or off, and in bfloat16 is that of float32, roughly."""
    for x64 in (True, False):
        with jax.enable_x64(x64):
            for dtype in (jnp.float32, jnp.bfloat16):
                x = jax.ShapeDtypeStruct((2, *SHAPE), dtype)
                made = jax.eval_shape(lambda x: LOOPS[name](denoiser(0.8), x, TABLE, jnp.float32(0.6), KEYS), x)
                assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}
    if name not in NOISY:  # a key draws other noise in bfloat16
        half, single = (run(name, *arguments(dtype)).astype(jnp.float32) for dtype in (jnp.bfloat16, jnp.float32))
        np.testing.assert_allclose(half, single, atol=0.1 * np.abs(single).max())


NETWORKS = {
    "ho": small_config(),
    "openai": small_config(class_embedding="timestep", scale_shift=True, divide_last=True),
    "score_sde": small_config(time_embedding="fourier"),
    "lucidrains": LUCIDRAINS,
}


def predict(model: Any, x: Array) -> Array:
    """A network in a sampler's loop, self-conditioned or not, with labels or without."""
    if model.config is LUCIDRAINS:
        return sampling.sample_loop(
            lambda x, t, x0: model(jnp.concatenate([x0, x], -1), t), x, TABLE, self_condition=True, clip_range=CLIP
        )
    labels = [jnp.full_like(x[:, 0, 0, 0], 3)] if model.config.class_embedding else []
    return sampling.sample_loop(lambda x, t: model(x, t, *labels), x, TABLE, clip_range=CLIP)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_promote_no_ranks(name: str) -> None:
    model = random_model(NETWORKS[name])
    with jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        x = jax.ShapeDtypeStruct((2, 6, 10, 1), jnp.float32)
        jax.eval_shape(jax.grad(lambda x: predict(model, x).sum()), x)


def on_two_devices() -> None:
    """Every loop and network, sharded in two: by `shard_map` with its checks, and with shardings in types."""
    assert jax.device_count() == 2
    plain, mesh = (jax.make_mesh((2,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit))
    x, *rest = arguments(jnp.float32)
    for name in LOOPS:

        def made(x: Array, keys: Array, name: str = name) -> Any:
            return LOOPS[name](denoiser(0.8), x, TABLE, jnp.float32(0.6), keys)

        whole = jax.jit(made)(x, KEYS)
        axes = jax.tree.map(lambda leaf: leaf.shape.index(2) if leaf.ndim != 5 else 1, whole)
        specs = jax.tree.map(lambda axis: P(*[None] * axis, "data"), axes)
        parts = jax.jit(jax.shard_map(made, mesh=plain, in_specs=P("data"), out_specs=specs))(x, KEYS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts, whole)
        with jax.set_mesh(mesh):
            there = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, KEYS)]
            typed = jax.jit(made)(*there)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), typed, whole)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 10, 1)), jnp.float32)
    for name, config in NETWORKS.items():
        model = random_model(config)
        whole = jax.jit(predict)(model, x)
        with jax.set_mesh(mesh):
            typed = jax.jit(predict)(
                jax.device_put(model, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data")))
            )
        assert typed.sharding.spec[0] == "data", name
        np.testing.assert_allclose(typed, whole, atol=1e-4, err_msg=name)


def test_on_two_devices() -> None:
    """In a process of its own, which has two."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    code = "from test_transformations import on_two_devices; on_two_devices()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
