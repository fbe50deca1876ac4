"""The objective against its formulas in NumPy, and what a step draws."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from training_cases import SHORT, arrays, draw, task

from jddim.config import ScheduleConfig
from jddim.ddim import add_noise
from jddim.schedule import make_schedule
from jddim.train import objective
from jddim.train.objective import Draws
from jddim.train.task import LOSSES

pytestmark = pytest.mark.unoptimised


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "velocity"])
def test_the_loss_is_its_formula(kind: str, loss: str) -> None:
    job = task(sampler={"prediction_type": kind}, loss=loss, min_snr_gamma=2.5)
    output, x_0, noise = arrays(3, *[(5, 3, 7, 1)] * 3)
    t = np.array([0, 7, 23, 31, 49])
    a = make_schedule(SHORT).alphas_cumprod[t]
    x_t = add_noise(x_0, noise, jnp.float32(np.sqrt(a)), jnp.float32(np.sqrt(1 - a)))
    found = objective.losses_of(job, objective.training_table(job), jnp.asarray(output), x_0, x_t, Draws(t, noise))

    root, rest = np.sqrt(a)[:, None, None, None], np.sqrt(1 - a)[:, None, None, None]
    snr = a / (1 - a)
    assert snr.min() < 2.5 < snr.max()
    target = {"epsilon": noise, "sample": x_0, "v_prediction": root * noise - rest * x_0, "velocity": noise - x_0}[kind]
    # arXiv:2303.09556: the weight is of x_0's error, whose square is 1 / SNR times eps', and 1 / (SNR + 1) times v's
    # of the velocity's, by which x_0 is (x_t - sigma velocity) / (alpha + sigma)
    per = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1, "velocity": (1 + np.sqrt(snr)) ** 2}[kind]
    weight = np.minimum(snr, 2.5) / per
    error = ((output - target) ** 2).mean(axis=(1, 2, 3))
    assert_allclose(found, error * (weight if loss == "min_snr" else 1), rtol=2e-5)  # float32


def test_min_snr_weights_the_same_error_of_x_0_whatever_is_predicted() -> None:
    schedule = make_schedule(SHORT)
    a = schedule.alphas_cumprod
    weights = {k: objective.snr_weights(schedule, k, 5.0) for k in ("epsilon", "sample", "v_prediction")}
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
        table, draws = objective.training_table(job), Draws(jnp.asarray(t), jnp.asarray(noise))
        both = jnp.asarray(np.concatenate([out, values], -1))

        def of(both: jax.Array) -> jax.Array:
            return objective.losses_of(job, table, both, jnp.asarray(x_0), jnp.asarray(x_t), draws)

        assert_allclose(of(both), expected, rtol=1e-9)
        # the bound teaches the variance alone: the mean's gradient is that of the squared error
        gradient = jax.grad(lambda both: of(both).sum())(both)
    assert_allclose(gradient[..., :1], 2 * (out - target) / 6, rtol=1e-6)
    assert np.abs(gradient[..., 1:]).max() > 1e-4


@pytest.mark.parametrize("name", ["flow", "edm", "vp"])
def test_a_continuous_paths_rows_are_its_schedules(name: str) -> None:
    kind = {"flow": "velocity", "edm": "edm", "vp": "epsilon"}[name]
    spacing = "even" if name == "flow" else "karras"
    job = task(sampler={"prediction_type": kind, "spacing": spacing}, schedule=ScheduleConfig(name))
    schedule = make_schedule(job.schedule)
    assert objective.training_table(job) is None
    t = np.linspace(*((schedule.t_min + 1e-3, schedule.t_max)), 9)
    row = objective.rows_at(job, None, jnp.asarray(t, jnp.float32), jnp.float32)
    assert_allclose(row.alpha, schedule.alpha(t), rtol=2e-6, atol=1e-7)
    assert_allclose(row.sigma, schedule.sigma(t), rtol=2e-6)
    # the weight of x_0's error makes F's error count once: c_out^2 times it is 1
    expected = (t**2 + 0.25) / (0.5 * t) ** 2 if name == "edm" else np.ones(9)
    assert_allclose(row.weight, expected, rtol=2e-6)


def test_times_have_their_distributions() -> None:
    """4,000 draws: a mean to 0.02 deviations, five of its errors 0.08."""

    def drawn(name: str, kind: str, **train: object) -> np.ndarray:
        sampler = {"prediction_type": kind, "spacing": "even" if name == "flow" else "karras"}
        job = task(sampler=sampler, schedule=ScheduleConfig(name), **train)
        return np.asarray(draw(jax.random.key(2), job, (4000, 1, 1, 1), jnp.float32).t)

    flow = drawn("flow", "velocity")
    assert flow.dtype == np.float32
    assert 0 <= flow.min() < 0.01 < 0.99 < flow.max() <= 1
    assert flow.mean() == pytest.approx(0.5, abs=0.03)
    paired = drawn("flow", "velocity", t_sampling="antithetic")
    assert_allclose(paired[:2000] + paired[2000:], 1, rtol=1e-6)
    edm = np.log(drawn("edm", "edm", t_sampling="log_normal"))
    assert (edm.mean(), edm.std()) == (pytest.approx(-1.2, abs=0.1), pytest.approx(1.2, abs=0.1))
    sd3 = drawn("flow", "velocity", t_sampling="logit_normal", t_mean=0.5, t_std=2.0)
    logits = np.log(sd3 / (1 - sd3))
    assert (logits.mean(), logits.std()) == (pytest.approx(0.5, abs=0.16), pytest.approx(2, abs=0.16))


@pytest.mark.parametrize(
    ("name", "sampler", "train", "told"),
    [
        ("flow", {"prediction_type": "velocity"}, {"loss": "min_snr"}, "loss min_snr is of schedules with T timesteps"),
        ("flow", {"prediction_type": "epsilon"}, {}, "a predicted eps tells nothing of x0 at alpha_t = 0"),
        ("flow", {"prediction_type": "edm"}, {}, "sampler: prediction_type edm is of the schedule edm"),
        ("flow", {"prediction_type": "velocity"}, {"t_sampling": "log_normal"}, "log_normal is of the schedule edm"),
        ("flow", {"prediction_type": "velocity", "variance": "unused"}, {}, "variance is fixed_small on a continuous"),
        ("linear", {"spacing": "linspace"}, {"t_sampling": "logit_normal"}, "logit_normal is of a continuous schedule"),
        ("linear", {"spacing": "linspace"}, {"t_std": 1.0}, "t_mean and t_std are of t_sampling log_normal and logit"),
        (
            "flow",
            {"prediction_type": "velocity"},
            {"t_sampling": "logit_normal", "t_std": 0.0},
            "t_std must be in 0.01",
        ),
    ],
)
def test_what_a_path_is_not_trained_with(name: str, sampler: dict, train: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        task(sampler={"spacing": "even"} | sampler, schedule=ScheduleConfig(name), **train)


def test_antithetic_pairs() -> None:
    t = jnp.array([3, 49, 0, 21, 20, 17, 5])
    assert objective.antithetic(t, 49).tolist() == [3, 49, 0, 21, 46, 0, 49]
    assert objective.antithetic(t[:6], 49).tolist() == [3, 49, 0, 46, 0, 49]
    drawn = draw(jax.random.key(1), task(t_sampling="antithetic"), (3, 1, 2, 1), jnp.float32).t
    plain = draw(jax.random.key(1), task(), (3, 1, 2, 1), jnp.float32).t
    assert drawn.tolist() == objective.antithetic(plain, 49).tolist()


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
