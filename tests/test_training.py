"""A step of training: its average, accumulation, precision, devices; and what a task may be."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from training_cases import arrays, draw, task

from jddim.config import ScheduleConfig, from_json, to_json
from jddim.train import objective
from jddim.train import step as training
from jddim.train.task import Task, TrainConfig

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def conditional() -> tuple[Task, dict[str, jax.Array], dict[str, jax.Array]]:
    """A task with classes, weights that no layer of is zero, and a batch of all classes."""
    job = task({"class_embedding": "learned", "num_classes": 4}, label_dropout=1.0, null_label=3, clip_norm=None)
    shapes = training.fresh_params(job.model, 0)
    rng = np.random.default_rng(2)
    params = {k: jnp.float32(v + 0.1 * rng.standard_normal(v.shape)) for k, v in shapes.items()}
    batch = {"images": jnp.asarray(arrays(8, (5, 6, 10, 1))[0]), "labels": jnp.array([0, 1, 2, 0, 1])}
    return job, params, batch


@pytest.fixture(scope="module")
def step(conditional: Any) -> Any:
    return training.make_train_step(conditional[0])


def test_dropped_labels_become_the_null_label(conditional: Any, step: Any) -> None:
    job, params, batch = conditional
    state = training.init_state(job, params)
    new, _ = step(state, batch, jax.random.key(0))
    moved = np.abs(np.asarray(new.params["class_embed.embedding"] - params["class_embed.embedding"])).max(axis=1)
    assert (moved[:3] == 0).all() and moved[3] > 0  # noqa: PT018


def test_accumulated_batches_are_one_large_one_and_the_average_waits(conditional: Any) -> None:
    job, params, batch = conditional
    job = dataclasses.replace(job, train=dataclasses.replace(job.train, accumulate=3, clip_norm=0.1, ema_decay=0.3))
    key, table = jax.random.key(5), objective.training_table(job)
    step = training.make_train_step(job)
    state = training.init_state(job, params)
    for i in range(3):
        assert all((state.ema[name] == params[name]).all() for name in params), i
        state, said = step(state, batch, key)
    draws = [draw(jax.random.fold_in(key, i), job, (5, 6, 10, 1), jnp.float32) for i in range(3)]
    of = jax.jit(jax.grad(lambda params, d: objective.losses(job, table, params, batch, d)[0]))
    parts = [of(params, d) for d in draws]
    mean = {name: sum(part[name] for part in parts) / 3 for name in params}
    norm = float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in mean.values())))
    assert norm > 0.1
    for name, g in mean.items():  # Adam's first step is lr g / (|g| + eps), of the clipped g
        clipped = np.asarray(g) * 0.1 / norm
        expected = np.asarray(params[name]) - 0.01 * clipped / (np.abs(clipped) + 1e-8)
        clear = np.abs(clipped) > 1e-6  # where the sign is not rounding's
        assert_allclose(np.asarray(state.params[name])[clear], expected[clear], atol=2e-5)
        decay = min(0.3, 2 / 11)
        average = decay * np.asarray(params[name]) + (1 - decay) * np.asarray(state.params[name])
        assert_allclose(state.ema[name], average, atol=1e-6)
    last = float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in parts[2].values())))
    assert_allclose(said["grad_norm"], last, rtol=1e-4)


def test_the_averages_decay() -> None:
    config = TrainConfig(ema_decay=0.99)
    found = [training.ema_decay(config, n) for n in (1, 2, 90, 890, 891, 10**6)]
    assert_allclose(found, [2 / 11, 3 / 12, 0.91, 0.99, 0.99, 0.99], rtol=1e-6)
    assert float(training.ema_decay(TrainConfig(ema_decay=0.99, ema_warmup=False), 1)) == np.float32(0.99)


def test_learning_rates() -> None:
    cosine = training.learning_rate(TrainConfig(steps=110, warmup_steps=10, lr=0.4, final_lr=0.1, lr_schedule="cosine"))
    assert_allclose([cosine(n) for n in (0, 5, 10, 60, 110)], [0, 0.2, 0.4, 0.25, 0.1], rtol=1e-6)
    constant = training.learning_rate(TrainConfig(warmup_steps=4, lr=0.4))
    assert_allclose([constant(n) for n in (0, 3, 4, 10**6)], [0, 0.3, 0.4, 0.4], rtol=1e-6)


def test_bfloat16_keeps_float32_weights(conditional: Any) -> None:
    job, params, batch = conditional
    table, draws = objective.training_table(job), draw(jax.random.key(2), job, (5, 6, 10, 1), jnp.float32)
    half = dataclasses.replace(job, train=dataclasses.replace(job.train, dtype="bfloat16"))
    assert {leaf.dtype for leaf in training.init_state(half, params).params.values()} == {jnp.dtype("float32")}
    loss, rounded = (
        jax.jit(lambda p, job=job: objective.losses(job, table, p, batch, draws)[1])(params) for job in (job, half)
    )
    assert 0 < abs(rounded / loss - 1) < 0.02  # 8 bits of mantissa
    gradient = jax.eval_shape(jax.grad(lambda p: objective.losses(half, table, p, batch, draws)[0]), params)
    assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype("float32")}


def test_remat_computes_norms_again_and_convolutions_not(conditional: Any) -> None:
    job, params, batch = conditional
    count = {}
    for remat in (False, True):
        other = dataclasses.replace(job, train=dataclasses.replace(job.train, remat=remat))
        text = training.make_train_step(other).lower(training.init_state(other, params), batch, jax.random.key(0))
        count[remat] = [
            text.as_text().count(f"stablehlo.{name} ") + text.as_text().count(f"stablehlo.{name}(")
            for name in ("convolution", "rsqrt")
        ]
    assert count[True][0] == count[False][0] > 0
    assert count[True][1] > count[False][1] > 0


def test_a_batch_is_cut_evenly() -> None:
    three: Any = SimpleNamespace(shape={"data": 3, "model": 1})
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 devices, got 5"):
        training.make_train_step(task(), three)


def test_tasks_round_trip_and_say_all_that_is_wrong() -> None:
    job = task({"class_embedding": "learned", "num_classes": 4}, label_dropout=0.1, null_label=3, clip_norm=None)
    assert Task.from_json(job.to_json()) == job
    assert from_json(TrainConfig, to_json(job.train)) == job.train
    with pytest.raises(ValueError, match=r"unknown key 'lrr' \(did you mean 'lr'"):
        Task.from_json({**job.to_json(), "train": {"lrr": 1}})
    with pytest.raises(ValueError, match=r"unknown section 'trian' .*; section 'model' is missing"):
        Task.from_json({"trian": {}})
    with pytest.raises(ValueError, match=r"loss 'l1' is unknown .*; steps must be .*; lr must be above 0, got -1"):
        TrainConfig(loss="l1", steps=0, lr=-1)
    with pytest.raises(ValueError, match=r"multiple of accumulate=3.*; label_dropout needs null_label"):
        TrainConfig(steps=4, accumulate=3, label_dropout=0.1)
    with pytest.raises(ValueError, match=r"zero_terminal_snr needs .*; out_channels must be 2 .*; null_label must be"):
        task(
            sampler={"variance": "learned_range"},
            schedule=ScheduleConfig("linear", 50, 1e-3, 0.2, zero_terminal_snr=True),
            null_label=4,
        )
    with pytest.raises(ValueError, match=r"sampler: num_steps .* must lie in 1..50"):
        task(sampler={"num_steps": 51})  # the result could not be sampled as it says
