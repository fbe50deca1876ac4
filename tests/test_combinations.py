"""Every solver with every wrapper, under jit, vmap, grad, per-sample keys and in bfloat16.

Every wrapper has a strength. A solver has one program with all the wrappers in it, the jit of a vmap of a grad; each
row of the vmap turns one of them on. With all at 0 it must be the solver without them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from tiny import SOLVER_KINDS

from jddim import denoisers, editing, guidance, sampling
from jddim.ddim import per_sample, step_table
from jddim.schedule import linear_schedule
from jddim.solvers import SOLVERS, Solver, cast, ddim_plan, memory_of, solver_loop, solver_update
from jddim.timesteps import linspace_timesteps

pytestmark = pytest.mark.unoptimised

T, S, NUM, SHAPE = 200, 5, 3, (3, 5, 2)
SCHEDULE = linear_schedule(T, 5e-4, 0.03)
TABLE = step_table(SCHEDULE, linspace_timesteps(T, S), np.float64)
X_T = jax.random.normal(jax.random.key(0), (NUM, *SHAPE))
KEYS = jax.random.split(jax.random.key(1), (2, NUM))  # one a sample
KNOWN = jnp.full(X_T.shape, 0.25)
KEEP = jnp.zeros((*SHAPE[:2], 1)).at[:, :2].set(1)
LABELS = jnp.array([2, 0, 1])
MEANS = jnp.array([0.0, 0.4, -0.4, 0.7])  # of class y; of none, 0


def network(x_t: Array, t: Array, labels: Array | None = None, dtype: Any = jnp.float32) -> Array:
    """The perfect eps of class y, N(mean_y, 0.3^2), or of N(0, 0.3^2), computed in `dtype`."""
    a, x = per_sample(jnp.asarray(SCHEDULE.alphas_cumprod, dtype)[t], x_t), x_t.astype(dtype)
    mean = 0 if labels is None else per_sample(MEANS.astype(dtype)[labels], x_t)
    return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * 0.3**2 + 1 - a)


# -- the solvers: (denoise, x_T, eta, keys, wrap, self_condition) -> x_0, `wrap` a function from updates to updates ----

Wrap = Callable[[sampling.Update], sampling.Update]


def by_ddim(denoise: Any, x_T: Array, eta: Array, keys: Array, wrap: Wrap | None, self_condition: bool) -> Array:
    options: dict[str, Any] = {"key": keys, "self_condition": self_condition}
    if wrap is not None:
        return sampling.update_loop(denoise, wrap(sampling.ddim_update(eta=eta)), x_T, TABLE, **options)
    return sampling.sample_loop(denoise, x_T, TABLE, eta=eta, **options)


def by_ancestral(denoise: Any, x_T: Array, eta: Array, keys: Array, wrap: Wrap | None, self_condition: bool) -> Array:
    options: dict[str, Any] = {"key": keys, "self_condition": self_condition}
    if wrap is not None:
        update = sampling.ancestral_update(variance="fixed_large", clip_range=None)
        return sampling.update_loop(denoise, wrap(update), x_T, TABLE, **options)
    return sampling.ancestral_loop(denoise, x_T, TABLE, variance="fixed_large", clip_range=None, **options)


def by_solver(
    denoise: Any, x_T: Array, eta: Array, keys: Array, wrap: Wrap | None, self_condition: bool, *, name: str
) -> Array:
    solver = SOLVERS[name]
    options: dict[str, Any] = {"key": keys if solver.stochastic else None, "self_condition": self_condition}
    if wrap is not None:
        plan = cast(solver.rows(TABLE, SCHEDULE), x_T.dtype)
        options |= {"memory": memory_of(plan, x_T), "deterministic": not solver.stochastic}
        return sampling.update_loop(denoise, wrap(solver_update(solver)), x_T, plan, **options)
    return solver_loop(denoise, x_T, TABLE, solver=name, schedule=SCHEDULE, **options)


MINE = Solver(lambda table: ddim_plan(table)._replace(noise=np.where(table.t_prev >= 0, 0.1, 0)), stochastic=True)
SAMPLERS: dict[str, Any] = {
    "DDIM": by_ddim,
    "ancestral": by_ancestral,
    **{name: partial(by_solver, name=name) for name in ("ddim", *SOLVER_KINDS, "mine")},
}
STOCHASTIC = ["DDIM", "ancestral", "mine", *(name for name in SOLVER_KINDS if SOLVERS[name].stochastic)]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "mine", MINE)


# -- the wrappers: (strength, dtype of the network) -> (denoise, wrap, self_condition) --------------------------------

OF = ("labels", "scale", "cond_fn", "inpainting", "self_condition")
Strengths = dict[str, Any]


def plain(strength: Strengths, dtype: Any) -> Any:
    return lambda x_t, t: network(x_t, t, dtype=dtype), None, False


def labels(strength: Strengths, dtype: Any) -> Any:
    return denoisers.with_labels(partial(network, dtype=dtype), _labels(strength)), None, False


def classifier_free(strength: Strengths, dtype: Any) -> Any:
    pair = guidance.label_pair(partial(network, dtype=dtype), _labels(strength), 0)
    return guidance.classifier_free(pair, strength["scale"]), None, False


def cond_fn(strength: Strengths, dtype: Any) -> Any:
    denoise, _, _ = plain(strength, dtype)
    return guidance.classifier_guided(denoise, _up(strength), SCHEDULE), None, False


def inpainting(strength: Strengths, dtype: Any) -> Any:
    denoise, _, _ = plain(strength, dtype)
    return denoise, lambda update: editing.keep_known(update, KNOWN, strength["inpainting"] * KEEP, X_T), False


def self_condition(strength: Strengths, dtype: Any) -> Any:
    return denoisers.with_self_condition(partial(_conditioned, strength, dtype)), None, True


def everything(strength: Strengths, dtype: Any) -> Any:
    pair = guidance.label_pair(partial(_conditioned, strength, dtype), _labels(strength), 0)
    conditioned = denoisers.with_self_condition(guidance.classifier_free(pair, strength["scale"]))
    _, wrap, _ = inpainting(strength, dtype)
    return guidance.classifier_guided(conditioned, _up(strength), SCHEDULE), wrap, True


WRAPPERS = (plain, labels, classifier_free, cond_fn, inpainting, self_condition, everything)


def _labels(strength: Strengths) -> Array:
    return jnp.where(strength["labels"] > 0, LABELS, 0)


def _up(strength: Strengths) -> guidance.CondFn:
    return lambda x_t, t: strength["cond_fn"] * jnp.ones_like(x_t)


def _conditioned(strength: Strengths, dtype: Any, x: Array, t: Array, labels: Array | None = None) -> Array:
    """A network that takes x0_hat and x_t side by side."""
    x0_hat, x_t = jnp.split(x, 2, axis=-1)
    return network(x_t, t, labels, dtype) - (0.3 * strength["self_condition"] * x0_hat).astype(dtype)


# -- the tests --------------------------------------------------------------------------------------------------------

ROWS = {  # name -> strengths, eta, which keys
    "none": ((0, 1, 0, 0, 0), 0.6, 0),
    "labels": ((1, 1, 0, 0, 0), 0.6, 0),
    "guided": ((1, 2.5, 0, 0, 0), 0.6, 0),
    "cond_fn": ((0, 1, 1, 0, 0), 0.6, 0),
    "inpainting": ((0, 1, 0, 1, 0), 0.6, 0),
    "self_condition": ((0, 1, 0, 0, 1), 0.6, 0),
    "all": ((1, 2.5, 1, 1, 1), 0.6, 0),
    "other keys": ((0, 1, 0, 0, 0), 0.6, 1),
    "other eta": ((0, 1, 0, 0, 0), 0.2, 0),
}


def run_with(sampler: str, wrapper: Any, dtype: Any = jnp.float32) -> Any:
    def run(x_T: Array, strengths: Array, eta: Array, keys: Array) -> Any:
        denoise, wrap, conditioned = wrapper(dict(zip(OF, strengths, strict=True)), dtype)
        x_0 = SAMPLERS[sampler](denoise, x_T, eta, keys, wrap, conditioned)
        return x_0.sum(), x_0

    return run


def row(name: str) -> tuple[Array, Array, Array]:
    strengths, eta, which = ROWS[name]
    return jnp.array(strengths, jnp.float32), jnp.float32(eta), KEYS[which]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_jit_vmap_grad_and_keys(sampler: str) -> None:
    args = (X_T, *(jnp.stack(column) for column in zip(*map(row, ROWS), strict=True)))
    program = jax.jit(jax.vmap(jax.grad(run_with(sampler, everything), has_aux=True), (None, 0, 0, 0)))
    made = program(*args)
    chex.assert_tree_all_finite(made)
    gradients, x_0 = (dict(zip(ROWS, rows, strict=True)) for rows in made)
    _, without = jax.jit(run_with(sampler, plain))(X_T, *row("none"))
    chex.assert_trees_all_close(x_0["none"], without, atol=2e-5)  # float32, five steps
    assert jnp.abs(gradients["none"]).max() > 0

    def shift(name: str) -> Any:
        return np.asarray((x_0[name] - x_0["none"]).mean((1, 2, 3)))

    # Each does what it is for: of a Gaussian all these are nearly affine.
    to_class = np.asarray(MEANS[LABELS])
    reached = shift("labels")[0] / to_class[0]
    assert 0.7 < reached < 1.1  # x_T's own mean is 0, not that of a noised class; and five steps err
    np.testing.assert_allclose(shift("labels"), reached * to_class, atol=1e-4)
    np.testing.assert_allclose(shift("guided"), 2.5 * reached * to_class, atol=2e-4)
    assert (shift("cond_fn") > 0.02).all()
    for name in ("inpainting", "all"):
        np.testing.assert_array_equal(x_0[name][:, :, :2], KNOWN[:, :, :2])
        np.testing.assert_array_equal(gradients[name][:, :, :2], 0)
    chex.assert_trees_all_close(x_0["inpainting"][:, :, 2:], x_0["none"][:, :, 2:], atol=1e-5)  # of pixels on their own
    # eps is taken lower where x0_hat is above 0, which drives x0 out.
    assert x_0["self_condition"].std() > 1.02 * x_0["none"].std()
    for name, moves in (("other keys", sampler in STOCHASTIC), ("other eta", sampler == "DDIM")):
        assert (np.abs(x_0[name] - x_0["none"]).max() > 1e-3) == moves, name
        if not moves:
            np.testing.assert_array_equal(x_0[name], x_0["none"])


@pytest.mark.parametrize("wrapper", WRAPPERS[1:])
def test_a_bfloat16_network(wrapper: Any) -> None:
    """Each wrapper alone, traced: x_0 keeps x_T's dtype, whatever the network's and the table's."""
    for sampler in SAMPLERS:
        for dtype in (jnp.float32, jnp.bfloat16) if wrapper is everything else (jnp.float32,):
            x_T = jax.ShapeDtypeStruct(X_T.shape, dtype)
            strengths, eta = jax.ShapeDtypeStruct((len(OF),), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
            _, x_0 = jax.eval_shape(run_with(sampler, wrapper, jnp.bfloat16), x_T, strengths, eta, KEYS[0])
            assert (x_0.shape, x_0.dtype) == (x_T.shape, dtype), sampler


def learned(x_t: Array, t: Array, *_: Any) -> Array:
    return jnp.concatenate([network(x_t, t), jnp.zeros_like(x_t)], axis=-1)


IMPOSSIBLE: dict[str, tuple[Callable[[], Any], str]] = {
    "a solver's memory does not survive RePaint's way back": (
        lambda: sampling.update_loop(
            network,
            editing.repaint(solver_update(SOLVERS["dpm++2m"]), KNOWN, KEEP),
            X_T,
            SOLVERS["dpm++2m"].plan(TABLE),
            key=KEYS[0],
            draws=2,
            memory=memory_of(SOLVERS["dpm++2m"].plan(TABLE), X_T),
        ),
        "RePaint goes back to noisier samples, of which a solver's memory knows nothing",
    ),
    "a gradient is of an eps, not of a variance": (
        lambda: sampling.ancestral_loop(
            guidance.classifier_guided(learned, lambda x_t, t: x_t, SCHEDULE),
            X_T,
            TABLE,
            key=KEYS[0],
            variance="learned_range",
        ),
        "leave a learned variance out",
    ),
    "a learned variance is DDPM's alone": (
        lambda: sampling.sample_loop(learned, X_T, TABLE),
        r"denoise must return \(3, 3, 5, 2\) for an x_t like \(3, 3, 5, 2\), it returned \(3, 3, 5, 4\)",
    ),
    "a stochastic solver needs noise": (
        lambda: solver_loop(network, X_T, TABLE, "euler-a"),
        "give either key or noise",
    ),
    "nor has a key per sample other samples": (
        lambda: solver_loop(network, X_T, TABLE, "dpm++2m-sde", key=KEYS[0][:2]),
        r"key must be one key or one per sample \(3,\), got shape \(2,\)",
    ),
    "eta is one number or one per sample": (
        lambda: sampling.sample_loop(network, X_T, TABLE, eta=jnp.ones(2), key=KEYS[0]),
        r"eta must be a scalar or one value per sample \(3,\), got shape \(2,\)",
    ),
    "a mask of another size": (
        lambda: editing.inpaint_loop(network, X_T, TABLE, KNOWN, jnp.ones((4, 5, 1))),
        r"keep must broadcast to the images \(3, 3, 5, 2\)",
    ),
    "no such solver": (
        lambda: solver_loop(network, X_T, TABLE, "euler"),
        "unknown method 'euler'.*euler-a",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_combined_says_why(name: str) -> None:
    run, said = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=said):
        run()
