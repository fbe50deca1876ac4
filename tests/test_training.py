"""The objective against its formulas in NumPy; the step's draws, average, accumulation."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny import small_config

from jddim import training
from jddim.config import SamplerConfig, ScheduleConfig, from_json, to_json
from jddim.ddim import add_noise
from jddim.schedule import make_schedule
from jddim.training import Draws, Task, TrainConfig

pytestmark = pytest.mark.unoptimised

draw = jax.jit(training.draw, static_argnums=(1, 2, 3))
SMALLEST: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
SHORT = ScheduleConfig("linear", 50, 1e-3, 0.2)


def task(
    model: dict | None = None, sampler: dict | None = None, schedule: ScheduleConfig = SHORT, **train: Any
) -> Task:
    config = TrainConfig(**({"steps": 12, "batch_size": 5, "warmup_steps": 0, "lr": 0.01} | train))
    return Task(small_config(**SMALLEST, **(model or {})), schedule, SamplerConfig(**(sampler or {})), config)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("loss", training.LOSSES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_its_formula(kind: str, loss: str) -> None:
    job = task(sampler={"prediction_type": kind}, loss=loss, min_snr_gamma=2.5)
    output, x_0, noise = arrays(3, *[(5, 3, 7, 1)] * 3)
    t = np.array([0, 7, 23, 31, 49])
    a = make_schedule(SHORT).alphas_cumprod[t]
    x_t = add_noise(x_0, noise, jnp.float32(a))
    found = training.losses_of(job, training.training_table(job), jnp.asarray(output), x_0, x_t, Draws(t, noise))

    root, rest = np.sqrt(a)[:, None, None, None], np.sqrt(1 - a)[:, None, None, None]
    snr = a / (1 - a)
    assert snr.min() < 2.5 < snr.max()
    target = {"epsilon": noise, "sample": x_0, "v_prediction": root * noise - rest * x_0}[kind]
    # arXiv:2303.09556: the weight is of x_0's error, whose square is 1 / SNR times eps', and 1 / (SNR + 1) times v's
    weight = np.minimum(snr, 2.5) / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[kind]
    error = ((output - target) ** 2).mean(axis=(1, 2, 3))
    assert_allclose(found, error * (weight if loss == "min_snr" else 1), rtol=2e-5)  # float32


def test_min_snr_weights_the_same_error_of_x_0_whatever_is_predicted() -> None:
    schedule = make_schedule(SHORT)
    a = schedule.alphas_cumprod
    weights = {k: training.snr_weights(schedule, k, 5.0) for k in ("epsilon", "sample", "v_prediction")}
    assert_allclose(weights["epsilon"] * a / (1 - a), weights["sample"], rtol=1e-12)
    assert_allclose(weights["v_prediction"] / (1 - a), weights["sample"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_hybrid_loss_is_improved_diffusions(kind: str) -> None:
    job = task({"out_channels": 2}, {"prediction_type": kind, "variance": "learned_range"}, vlb_weight=0.01)
    x_0, noise, out, values = (x.astype(float) for x in arrays(5, *[(4, 3, 2, 1)] * 4))
    x_0 = np.clip(x_0, -1, 1)  # the ends' bins reach to infinity
    t = np.array([0, 0, 1, 37])
    schedule = make_schedule(SHORT)
    betas, bars = schedule.betas, schedule.alphas_cumprod
    before = np.append(1.0, bars[:-1])
    a, a_prev, beta = (column[t][:, None, None, None] for column in (bars, before, betas))
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise
    x0_hat = (x_t - np.sqrt(1 - a) * out) / np.sqrt(a) if kind == "epsilon" else np.sqrt(a) * x_t - np.sqrt(1 - a) * out

    def mean(x: np.ndarray) -> np.ndarray:  # of q(x_{t-1} | x_t, x_0), Eq. 7
        return (np.sqrt(a_prev) * beta * x + np.sqrt(1 - beta) * (1 - a_prev) * x_t) / (1 - a)

    posterior = betas * (1 - before) / (1 - bars)
    small = np.log(np.append(posterior[1], posterior[1:]))[t][:, None, None, None]
    log_variance = (values + 1) / 2 * np.log(beta) + (1 - (values + 1) / 2) * small
    kl = 0.5 * (
        -1
        + log_variance
        - small
        + np.exp(small - log_variance)
        + (mean(x_0) - mean(x0_hat)) ** 2 * np.exp(-log_variance)
    )
    cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / 2**0.5)))
    sigma = np.exp(0.5 * log_variance)
    upper = np.where(x_0 > 0.999, 1, cdf((x_0 + 1 / 255 - mean(x0_hat)) / sigma))
    lower = np.where(x_0 < -0.999, 0, cdf((x_0 - 1 / 255 - mean(x0_hat)) / sigma))
    nll = -np.log(np.maximum(upper - lower, 1e-12))
    bits = np.where(t == 0, nll.mean(axis=(1, 2, 3)), kl.mean(axis=(1, 2, 3))) / np.log(2)
    target = noise if kind == "epsilon" else np.sqrt(a) * noise - np.sqrt(1 - a) * x_0
    expected = ((out - target) ** 2).mean(axis=(1, 2, 3)) + 0.01 * 50 * bits

    with jax.enable_x64(True):
        table, draws = training.training_table(job), Draws(jnp.asarray(t), jnp.asarray(noise))
        both = jnp.asarray(np.concatenate([out, values], -1))

        def of(both: jax.Array) -> jax.Array:
            return training.losses_of(job, table, both, jnp.asarray(x_0), jnp.asarray(x_t), draws)

        assert_allclose(of(both), expected, rtol=1e-9)
        # the bound teaches the variance alone: the mean's gradient is that of the squared error
        gradient = jax.grad(lambda both: of(both).sum())(both)
    assert_allclose(gradient[..., :1], 2 * (out - target) / 6, rtol=1e-6)
    assert np.abs(gradient[..., 1:]).max() > 1e-4


def test_antithetic_pairs() -> None:
    t = jnp.array([3, 49, 0, 21, 20, 17, 5])
    assert training.antithetic(t, 50).tolist() == [3, 49, 0, 21, 46, 0, 49]
    assert training.antithetic(t[:6], 50).tolist() == [3, 49, 0, 46, 0, 49]
    drawn = draw(jax.random.key(1), task(t_sampling="antithetic"), (3, 1, 2, 1), jnp.float32).t
    plain = draw(jax.random.key(1), task(), (3, 1, 2, 1), jnp.float32).t
    assert drawn.tolist() == training.antithetic(plain, 50).tolist()


def test_draws_are_per_sample_and_have_their_distributions() -> None:
    classes = {"class_embedding": "learned", "num_classes": 4}
    job = task(classes, label_dropout=0.2, null_label=3)
    many = draw(jax.random.key(1), job, (4001, 1, 2, 1), jnp.float32)
    few = draw(jax.random.key(1), task(), (3, 1, 2, 1), jnp.float32)
    assert few.drop is None
    np.testing.assert_array_equal(many.t[:3], few.t)
    np.testing.assert_array_equal(many.noise[:3], few.noise)
    assert abs(np.asarray(many.drop).mean() - 0.2) < 4 * (0.2 * 0.8 / 4001) ** 0.5
    t = np.asarray(many.t)
    assert (t.min(), t.max()) == (0, 49)
    assert abs(t.mean() - 24.5) < 4 * (50**2 / 12 / 4001) ** 0.5
    assert abs(np.asarray(many.noise).std() - 1) < 4 / (2 * 8002) ** 0.5


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
    key, table = jax.random.key(5), training.training_table(job)
    step = training.make_train_step(job)
    state = training.init_state(job, params)
    for i in range(3):
        assert all((state.ema[name] == params[name]).all() for name in params), i
        state, said = step(state, batch, key)
    draws = [draw(jax.random.fold_in(key, i), job, (5, 6, 10, 1), jnp.float32) for i in range(3)]
    of = jax.jit(jax.grad(lambda params, d: training.losses(job, table, params, batch, d)[0]))
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
    table, draws = training.training_table(job), draw(jax.random.key(2), job, (5, 6, 10, 1), jnp.float32)
    half = dataclasses.replace(job, train=dataclasses.replace(job.train, dtype="bfloat16"))
    assert {leaf.dtype for leaf in training.init_state(half, params).params.values()} == {jnp.dtype("float32")}
    loss, rounded = (
        jax.jit(lambda p, job=job: training.losses(job, table, p, batch, draws)[1])(params) for job in (job, half)
    )
    assert 0 < abs(rounded / loss - 1) < 0.02  # 8 bits of mantissa
    gradient = jax.eval_shape(jax.grad(lambda p: training.losses(half, table, p, batch, draws)[0]), params)
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
