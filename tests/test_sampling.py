"""The loops: keys, segments, trajectories, compile counts, and the transformations of JAX."""

from __future__ import annotations

import inspect
from functools import partial
from typing import get_args, get_overloads, get_type_hints

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import step_table
from jddim.editing import inpaint_loop
from jddim.guidance import cfg_plus_plus_loop
from jddim.inversion import invert_loop
from jddim.sampling import (
    ancestral_loop,
    consistency_update,
    ddim_update,
    init_state,
    initial_noise,
    is_zero,
    sample_keys,
    sample_loop,
    segments,
    update_loop,
    update_steps,
)
from jddim.schedule import linear_schedule
from jddim.solvers import solver_loop
from jddim.timesteps import linspace_timesteps

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

T, S = 300, 13
TABLE = step_table(linear_schedule(T), linspace_timesteps(T, S))
SHAPE = (5, 7, 3)  # h, w, c


def denoise(x_t, t):
    """Not linear, and different at every t."""
    return 0.8 * jnp.sin(x_t + t[:, None, None, None] / 50) + 0.1 * x_t


def start(num: int, seed: int = 0) -> jax.Array:
    return initial_noise(sample_keys(jax.random.key(seed), num), SHAPE)


@partial(jax.jit, static_argnames=("every", "clip", "rederive"))
def run(x_T, table, eta, key, every=None, clip=True, rederive=False):
    clip_range = (-1.0, 1.0) if clip else None
    return sample_loop(
        denoise, x_T, table, eta=eta, key=key, clip_range=clip_range, rederive_eps=rederive, trajectory_every=every
    )


@pytest.mark.optimised
@pytest.mark.parametrize("every", [1, 4, 13, 100])
@pytest.mark.parametrize("at_least", [2, 5, 13])
def test_segments_equal_the_whole_to_the_bit(every: int, at_least: int) -> None:
    table = step_table(linear_schedule(T), linspace_timesteps(T, 30))
    x_T, key = start(3), jax.random.key(2)

    @jax.jit
    def segment(state, rows):
        update = ddim_update(eta=0.6, clip_range=(-1.0, 1.0))
        return update_steps(denoise, update, state, rows, key=key, trajectory_every=every)

    cut = segments(table, at_least)
    assert len({rows.num_steps for rows in cut}) == 1
    assert len(cut) >= at_least
    assert np.concatenate([rows.t for rows in cut]).tolist() == table.t.tolist()
    state = init_state(x_T, table, every)
    for rows in cut:
        state = segment(state, rows)
    whole = segment(init_state(x_T, table, every), table)
    chex.assert_trees_all_equal(state, whole)


def test_sample_i_is_a_function_of_seed_and_i_alone() -> None:
    key = jax.random.key(3)
    keys = sample_keys(key, 16)
    whole = run(start(16), TABLE, 0.7, keys)
    parts = [run(start(16)[:7], TABLE, 0.7, keys[:7]), run(start(16)[7:], TABLE, 0.7, sample_keys(key, 9, start=7))]
    chex.assert_trees_all_equal(jnp.concatenate(parts), whole)
    # one key stands for the keys of samples 0, 1, ...
    chex.assert_trees_all_equal(run(start(16), TABLE, 0.7, key), whole)
    chex.assert_trees_all_equal(initial_noise(keys[7:], SHAPE), start(16, 3)[7:])
    assert len({row.tobytes() for row in np.asarray(whole)}) == 16


def test_eta_zero_is_deterministic_and_eta_matters() -> None:
    first, again, other_key = (run(start(3), TABLE, 0.0, jax.random.key(k)) for k in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(first, other_key)
    assert jnp.abs(first - run(start(3), TABLE, 0.3, jax.random.key(0))).max() > 0.01
    assert (
        jnp.abs(run(start(3), TABLE, 0.3, jax.random.key(1)) - run(start(3), TABLE, 0.3, jax.random.key(0))).max()
        > 0.01
    )


@pytest.mark.parametrize("eta", [0, 0.0, np.float32(0), np.zeros(3), jnp.zeros(3), False])
def test_eta_known_to_be_zero_needs_neither_key_nor_noise(eta) -> None:
    assert is_zero(eta)
    chex.assert_trees_all_close(
        sample_loop(denoise, start(3), TABLE, eta=eta, clip_range=(-1.0, 1.0)),
        run(start(3), TABLE, 0.0, jax.random.key(0)),
        atol=1e-5,
    )


def test_other_etas_are_not() -> None:
    assert not any(is_zero(eta) for eta in (1e-9, np.array([0, 0.5]), jnp.float32(jnp.nan)))
    assert not jax.jit(is_zero)(0.0)  # of what is traced nothing is known


def test_a_batch_of_none_and_whole_numbers_for_the_threshold() -> None:
    assert sample_loop(denoise, start(3)[:0], TABLE, eta=0.5, key=jax.random.key(0), threshold=(1, 2)).shape[0] == 0
    whole, decimal = (sample_loop(denoise, start(3), TABLE, threshold=limits) for limits in ((1, 2), (1.0, 2.0)))
    chex.assert_trees_all_equal(whole, decimal)


@pytest.mark.parametrize(
    "loop",
    [ancestral_loop, cfg_plus_plus_loop, inpaint_loop, invert_loop, sample_loop, solver_loop, update_loop],
)
def test_the_overloads_take_what_the_loop_takes(loop) -> None:
    taken = [p.name for p in inspect.signature(loop).parameters.values() if p.kind == p.KEYWORD_ONLY]
    for overloaded in get_overloads(loop):
        own = inspect.signature(overloaded).parameters
        rest = get_type_hints(overloaded)["options"]
        named = [p.name for p in own.values() if p.kind == p.KEYWORD_ONLY]
        assert sorted([*named, *get_type_hints(get_args(rest)[0])]) == sorted(taken)


def test_the_trajectory_is_the_way_taken() -> None:
    x_T, key = start(3), jax.random.key(2)
    x_0, all_steps = run(x_T, TABLE, 0.6, key, every=1)
    assert all_steps.t.tolist() == TABLE.t_prev.tolist()
    chex.assert_trees_all_equal(all_steps.x_t[-1], x_0)
    chex.assert_shape([all_steps.x_t, all_steps.x0_hat], (S, 3, *SHAPE))
    x_0_again, some = run(x_T, TABLE, 0.6, key, every=5)
    kept = [4, 9, 12]  # the ends of steps 5, 10 and the last
    assert some.t.tolist() == TABLE.t_prev[kept].tolist()
    # another program than every=1's, so equal to rounding
    chex.assert_trees_all_close(
        (x_0_again, some.x_t, some.x0_hat), (x_0, all_steps.x_t[kept, ...], all_steps.x0_hat[kept, ...]), atol=1e-5
    )
    assert jnp.abs(all_steps.x0_hat).max() <= 1


def test_noise_rows_are_used_in_the_order_of_steps() -> None:
    x_T, key = start(3), jax.random.key(2)
    keys = sample_keys(key, 3)
    rows = [jax.vmap(lambda k, s=s: jax.random.normal(jax.random.fold_in(k, s + 1), SHAPE))(keys) for s in range(S)]
    injected = sample_loop(denoise, x_T, TABLE, eta=0.6, noise=jnp.stack(rows), clip_range=(-1.0, 1.0))
    chex.assert_trees_all_close(injected, run(x_T, TABLE, 0.6, key), atol=1e-5)
    # the last step adds no noise, every other does
    for s in range(S):
        changed = list(rows)
        changed[s] = -rows[s]
        other = sample_loop(denoise, x_T, TABLE, eta=0.6, noise=jnp.stack(changed), clip_range=(-1.0, 1.0))
        assert (jnp.abs(other - injected).max() > 1e-4) == (s < S - 1), s


def test_one_trace_serves_every_eta_seed_and_weights() -> None:
    traces = []

    @jax.jit
    def sample(scale, x_T, eta, key):
        traces.append(1)
        return sample_loop(lambda x, t: scale * denoise(x, t), x_T, TABLE, eta=eta, key=key)

    for i, eta in enumerate((0.0, 0.3, 1.0)):
        sample(jnp.float32(0.5 + i), start(3, i), eta, jax.random.key(i))
    assert len(traces) == 1
    sample(jnp.float32(1), start(2), 0.0, jax.random.key(0))
    assert len(traces) == 2


def test_vmap_over_eta_and_over_keys() -> None:
    x_T, etas = start(3), jnp.array([0.0, 0.25, 1.0])
    keys = jax.random.split(jax.random.key(0), 3)
    swept = jax.vmap(lambda eta: run(x_T, TABLE, eta, keys[0]))(etas)
    seeds = jax.vmap(lambda key: run(x_T, TABLE, 0.5, key))(keys)
    for i in range(3):
        # batched programs round differently; sin amplifies a little over 13 steps
        chex.assert_trees_all_close(swept[i], run(x_T, TABLE, etas[i], keys[0]), atol=1e-4)
        chex.assert_trees_all_close(seeds[i], run(x_T, TABLE, 0.5, keys[i]), atol=1e-4)


def test_eta_per_sample() -> None:
    x_T, keys = start(3), sample_keys(jax.random.key(0), 3)
    together = run(x_T, TABLE, jnp.array([0.0, 0.5, 1.0]), keys)
    for i, eta in enumerate((0.0, 0.5, 1.0)):
        chex.assert_trees_all_close(together[i], run(x_T[i : i + 1], TABLE, eta, keys[i : i + 1])[0], atol=1e-5)


@pytest.mark.parametrize("least_sigma", [0.0, 0.2])
def test_consistency_sampling_noises_each_x0_anew(least_sigma: float) -> None:
    x_T, noise = start(2), jax.random.normal(jax.random.key(3), (S, 2, *SHAPE))
    update = consistency_update(least_sigma=least_sigma, clip_range=(-0.5, 0.7))
    x_0 = update_loop(denoise, update, x_T, TABLE, noise=noise)
    x = x_T
    for i in range(S):
        t, alpha, sigma, alpha_prev, sigma_prev = (float(column[i]) for column in (TABLE.t, *TABLE[3:7]))
        clean = ((x - sigma * denoise(x, jnp.full(2, t))) / alpha).clip(-0.5, 0.7)
        x = alpha_prev * clean + max(sigma_prev**2 - least_sigma**2, 0) ** 0.5 * noise[i]
    np.testing.assert_allclose(x_0, x, atol=1e-5)  # float32 rounding of 13 steps
    assert float(abs(x_0 - clean).max()) == 0  # the last step adds none


def test_rederived_eps_differs_only_where_x0_was_clipped() -> None:
    x_T, key = start(3), jax.random.key(0)
    raw, rederived = run(x_T, TABLE, 0.5, key), run(x_T, TABLE, 0.5, key, rederive=True)
    assert jnp.abs(raw - rederived).max() > 0.01

    def small(x_t, t):  # x0 = 0.1 wherever the sampler is, so nothing is clipped
        a = jnp.asarray(linear_schedule(T).alphas_cumprod, jnp.float32)[t][:, None, None, None]
        return (x_t - jnp.sqrt(a) * 0.1) / jnp.sqrt(1 - a)

    results = [
        sample_loop(small, x_T, TABLE, eta=0.5, key=key, clip_range=(-1.0, 1.0), rederive_eps=flag)
        for flag in (False, True)
    ]
    chex.assert_trees_all_close(*results, atol=1e-5)


def test_a_nan_is_dated_and_stays_in_its_sample() -> None:
    def breaks(x_t, t):
        sample = jnp.arange(x_t.shape[0])
        return denoise(x_t, t) + jnp.where((sample == 1) & (t < 150), jnp.nan, 0)[:, None, None, None]

    update = ddim_update(eta=0.5)
    state = update_steps(breaks, update, init_state(start(3), TABLE), TABLE, key=jax.random.key(0))
    first = int(np.flatnonzero(np.asarray(TABLE.t) < 150)[0])
    assert state.first_bad.tolist() == [-1, first, -1]
    assert jnp.isfinite(state.x_t[jnp.array([0, 2])]).all()


def test_it_compiles_to_a_program_that_exports() -> None:
    """No host callback in the scan: `jax.export` refuses those."""
    exported = jax.export.export(run)(start(2), jax.tree.map(jnp.asarray, TABLE), 0.5, jax.random.key(0))
    assert "custom_call_target" not in exported.mlir_module() or "callback" not in exported.mlir_module()
    chex.assert_trees_all_close(
        exported.call(start(2), jax.tree.map(jnp.asarray, TABLE), 0.5, jax.random.key(0)),
        run(start(2), TABLE, 0.5, jax.random.key(0)),
        atol=1e-5,
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_uses_keys_like_ddim(variance: str) -> None:
    keys = sample_keys(jax.random.key(0), 5)
    whole = ancestral_loop(denoise, start(5), TABLE, key=keys, variance=variance)
    part = ancestral_loop(denoise, start(5)[3:], TABLE, key=keys[3:], variance=variance)
    chex.assert_trees_all_close(whole[3:], part, atol=1e-5)
    assert jnp.abs(whole).max() <= 1  # x_0 is the clipped x0 of the last step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 0.5}, "give either key or noise"),
        ({"eta": 0.5, "key": jax.random.key(0), "noise": jnp.zeros((S, 3, *SHAPE))}, "not both"),
        ({"eta": 0.5, "noise": jnp.zeros((S - 1, 3, *SHAPE))}, r"expected \(13, 3, 5, 7, 3\).*got \(12"),
        ({"eta": 0.5, "key": jnp.zeros(2, jnp.uint32)}, "jax.random.key"),
        ({"eta": 0.5, "key": sample_keys(jax.random.key(0), 4)}, r"one per sample \(3,\), got shape \(4,\)"),
        ({"eta": jnp.zeros(2), "key": jax.random.key(0)}, r"one value per sample \(3,\), got shape \(2,\)"),
        ({"trajectory_every": 0}, "at least 1"),
    ],
)
def test_arguments_that_do_not_agree_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_loop(denoise, start(3), TABLE, **arguments)


def test_a_denoiser_of_the_wrong_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"must return \(3, 5, 7, 3\) .* it returned \(3, 5, 7, 6\)"):
        sample_loop(lambda x, t: jnp.concatenate([x, x], -1), start(3), TABLE)
