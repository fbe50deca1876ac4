"""The DDPM objective: what a step draws, what the network is to predict, and the losses, pure functions of arrays.

The network sees x_t of Eq. 4 (arXiv:2006.11239) and learns what `SamplerConfig.prediction_type` says. What step n draws
depends on (seed, n) alone, and what its sample i draws on (seed, n, i).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from jddim.config import EDM, PREDICTION_TYPES, did_you_mean
from jddim.ddim import Column, add_noise, per_sample, predict_both
from jddim.models.building import build_model
from jddim.models.layers import at_least_float32
from jddim.run.methods import find
from jddim.run.programs import Program, denoiser_returns, told_t
from jddim.sampling import sample_keys
from jddim.schedule import (
    CONTINUOUS,
    ContinuousSchedule,
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    Schedule,
    VPSchedule,
    make_schedule,
    noise_schedule,
)
from jddim.train.task import LOG_NORMAL, LOGIT_NORMAL, Task

Params = dict[str, Array]
"""Dotted name -> array, as `jddim.models.building.flat_params` has them."""


class Table(NamedTuple):
    """What the loss needs of each t, `(T,)`: computed in float64 on the host, cast once.

    weight: of L_simple. x0_factor: of x_0 in the posterior's mean, Eq. 7 of arXiv:2006.11239. log_small, log_large:
    the log-variances between which a learned one lies, the posterior's (at t = 0, where it is 0, that of t = 1) and
    beta (Eq. 15 of arXiv:2102.09672). The last three are read for a learned variance alone.
    """

    alpha: Column
    sigma: Column
    weight: Column
    x0_factor: Column
    log_small: Column
    log_large: Column


def training_table(task: Task) -> Table | None:
    """The float64 table of a task's schedule and weights; None where t is continuous."""
    if task.schedule.name in CONTINUOUS:
        return None
    schedule = noise_schedule(task.schedule)
    T, a, beta = schedule.num_train_timesteps, schedule.alphas_cumprod, schedule.betas
    a_prev = schedule.alpha_bar(np.arange(T) - 1)
    posterior = beta * (1 - a_prev) / (1 - a)
    weight = np.ones(T)
    if task.train.loss == "min_snr":
        weight = snr_weights(schedule, task.sampler.prediction_type, task.train.min_snr_gamma)
    log_small = np.log(np.append(posterior[1:2], posterior[1:])) if T > 1 else np.zeros(1)
    return Table(np.sqrt(a), np.sqrt(1 - a), weight, np.sqrt(a_prev) * beta / (1 - a), log_small, np.log(beta))


def rows_at(task: Task, table: Table | None, t: Array, dtype: DTypeLike) -> Table:
    """Of each sample's t, `(b,)`: of the table, or of the path where t is continuous.

    EDM's weight is of x_0, (t^2 + sigma_data^2) / (t sigma_data)^2: that of F's error is then 1 (arXiv:2206.00364,
    section 5).
    """
    if table is not None:
        return Table(*(jnp.asarray(column, dtype)[t] for column in table))
    alpha, sigma = path_at(make_schedule(task.schedule), t)
    weight = jnp.ones_like(t)
    if task.sampler.prediction_type == EDM:
        data = task.sampler.sigma_data
        weight = (jnp.square(t) + data**2) / jnp.square(t * data)
    return Table(alpha, sigma, weight, *(jnp.zeros_like(t) for _ in range(3)))


def path_at(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """Alpha and sigma of a continuous schedule at t, traceable: its own `alpha` and `sigma` are of the host."""
    match schedule:
        case FlowSchedule():
            return 1 - t, t
        case EDMSchedule():
            return jnp.ones_like(t), t
        case VPSchedule():
            decay = jnp.square(t) * (schedule.beta_end - schedule.beta_start) / 4 + t * schedule.beta_start / 2
            return jnp.exp(-decay), jnp.sqrt(-jnp.expm1(-2 * decay))
    raise TypeError(f"{type(schedule).__name__} is no continuous schedule")


def snr_weights(schedule: NoiseSchedule, prediction_type: str, gamma: float) -> NDArray[np.float64]:
    """min-SNR-gamma's weights `(T,)` of each prediction's squared error, section 3.4 of arXiv:2303.09556.

    min(SNR, gamma) for x_0, and what that is in terms of the others: / SNR for eps, / (SNR + 1) for v, and
    / (1 + sqrt(SNR))^2 for the velocity eps - x_0, by which x_0 is (x_t - sigma_t velocity) / (alpha_t + sigma_t).
    """
    a = schedule.alphas_cumprod
    with np.errstate(divide="ignore"):
        snr, one_over = a / (1 - a), (1 - a) / a
    match prediction_type:
        case "epsilon":
            return np.minimum(1, gamma * one_over)
        case "sample":
            return np.minimum(snr, gamma)
        case "v_prediction":
            return np.minimum(a, gamma * (1 - a))  # SNR + 1 = 1 / (1 - alpha_bar)
        case "velocity":
            return np.asarray(np.minimum(snr, gamma) / (1 + np.sqrt(snr)) ** 2)
    raise ValueError(f"unknown prediction_type {prediction_type!r}{did_you_mean(prediction_type, PREDICTION_TYPES)}")


def target_of(prediction_type: str, x_0: Array, noise: Array, alpha_t: ArrayLike, sigma_t: ArrayLike) -> Array:
    """What the network is to predict, like x_0: eps, x_0, v = alpha_t eps - sigma_t x_0, or the velocity eps - x_0."""
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            return per_sample(alpha_t, x_0) * noise - per_sample(sigma_t, x_0) * x_0
        case "velocity":
            return noise - x_0
    raise ValueError(f"unknown prediction_type {prediction_type!r}{did_you_mean(prediction_type, PREDICTION_TYPES)}")


class Draws(NamedTuple):
    """What is random in a step.

    t: `(b,)` int32 in 0..T-1, or where it is continuous of the images' dtype; noise: like the images; drop: `(b,)`
    bool, or None.
    """

    t: Array
    noise: Array
    drop: Array | None = None


def draw(key: Array, task: Task, shape: tuple[int, ...], dtype: DTypeLike) -> Draws:
    """The draws of one step for a batch `shape`, `(b, h, w, c)`; key: the step's. Sample i's are of fold_in(key, i)."""
    b, T = shape[0], task.schedule.num_train_timesteps
    keys = jax.vmap(functools.partial(jax.random.split, num=3))(sample_keys(key, b))
    if task.schedule.name in CONTINUOUS:
        low, high = _ends(task)
        t = jax.vmap(lambda k: _continuous_t(task, k, dtype))(keys[:, 0])
    else:
        low, high = 0, T - 1
        t = jax.vmap(lambda k: jax.random.randint(k, (), 0, T))(keys[:, 0])
    if task.train.t_sampling == "antithetic":
        t = antithetic(t, low + high)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(keys[:, 1])
    drop = None
    if task.model.class_embedding is not None and task.train.label_dropout:
        drop = jax.vmap(lambda k: jax.random.uniform(k))(keys[:, 2]) < task.train.label_dropout
    return Draws(t, noise, drop)


def _ends(task: Task) -> tuple[float, float]:
    schedule = make_schedule(task.schedule)
    assert isinstance(schedule, ContinuousSchedule)
    return schedule.t_min, schedule.t_max


def _continuous_t(task: Task, key: Array, dtype: DTypeLike) -> Array:
    """A t of a continuous schedule, as `TrainConfig.t_sampling` says."""
    config, (low, high) = task.train, _ends(task)
    if config.t_sampling not in (LOG_NORMAL, LOGIT_NORMAL):
        return jax.random.uniform(key, (), dtype, low, high)
    mean, std = (-1.2, 1.2) if config.t_sampling == LOG_NORMAL else (0.0, 1.0)
    mean, std = mean if config.t_mean is None else config.t_mean, std if config.t_std is None else config.t_std
    normal = mean + std * jax.random.normal(key, (), dtype)
    return jnp.exp(normal) if config.t_sampling == LOG_NORMAL else low + (high - low) * jax.nn.sigmoid(normal)


def antithetic(t: Array, both: float) -> Array:
    """`t`, `(b,)`, the second half of it `both` (T - 1, or t_min + t_max) minus the first; of an odd b one is alone.

    ermongroup's pairs, but all of them: it draws b // 2 + 1 and leaves two of an even batch alone.
    """
    half = (t.shape[0] + 1) // 2
    return jnp.concatenate([t[:half], (both - t[: t.shape[0] - half]).astype(t.dtype)])


def losses(
    task: Task, table: Table | None, params: Params, batch: Mapping[str, Array], draws: Draws
) -> tuple[Array, Array]:
    """(what is minimised, the loss per value): scalars. They differ by `reduction`'s factor alone.

    batch: images `(b, h, w, c)` in [-1, 1]; labels `(b,)` int32 if the network has classes.
    """
    dtype = at_least_float32(task.train.dtype)
    x_0, t = batch["images"].astype(dtype), draws.t
    row = rows_at(task, table, t, dtype)
    x_t = add_noise(x_0, draws.noise, row.alpha, row.sigma)
    labels = batch.get("labels")
    if labels is not None and draws.drop is not None:
        labels = jnp.where(draws.drop, jnp.int32(task.train.null_label or 0), labels)
    output = _network(task)(params, x_t, t, labels).astype(dtype)
    loss = losses_of(task, table, output, x_0, x_t, draws).mean()
    return loss * (math.prod(x_0.shape[1:]) if task.train.reduction == "sum" else 1), loss


def losses_of(task: Task, table: Table | None, output: Array, x_0: Array, x_t: Array, draws: Draws) -> Array:
    """Each sample's loss per value, `(b,)`, of the denoiser's output for it, `(b, h, w, c)`, or `2 c` channels with a
    learned variance: L_simple, weighted, and then L_hybrid. Of EDM's F, whose denoiser gives a velocity, that of x_0.
    """
    kind, noise, t = denoiser_returns(task.sampler), draws.noise, draws.t
    row = rows_at(task, table, t, output.dtype)
    if task.sampler.prediction_type == EDM:
        x0_hat, _ = predict_both(output, x_t, row.alpha, row.sigma, kind)
        return _mean(jnp.square(x0_hat - x_0)) * row.weight
    values = None
    if task.learns_variance:
        output, values = jnp.split(output, 2, axis=-1)
    loss = _mean(jnp.square(output - target_of(kind, x_0, noise, row.alpha, row.sigma))) * row.weight
    if values is None or table is None:
        return loss
    x0_hat, _ = predict_both(lax.stop_gradient(output), x_t, row.alpha, row.sigma, kind)
    bound = len(table.weight) * vlb_term(x_0, x0_hat, values, t, row)
    return loss + task.train.vlb_weight * bound


def vlb_term(x_0: Array, x0_hat: Array, values: Array, t: Array, row: Table) -> Array:
    """L_t of the variational bound, `(b,)`, in bits per value, for a learned variance; T of them are the bound.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) and, at t = 0, -log p(x_0 | x_1) of 8-bit images (section 3.3 of
    arXiv:2006.11239). x0_hat: the network's x_0, `(b, h, w, c)`, without its gradient: the bound is to teach the
    variance only (section 3.1 of arXiv:2102.09672). values: the network's v, about [-1, 1]; row: of each sample's t.
    """
    log_small, log_large = per_sample(row.log_small, x_0), per_sample(row.log_large, x_0)
    fraction = (values + 1) / 2
    log_variance = fraction * log_large + (1 - fraction) * log_small
    # The two means differ in their x_0 alone.
    difference = per_sample(row.x0_factor, x_0) * (x_0 - x0_hat)
    ratio = jnp.exp(log_small - log_variance)
    kl = 0.5 * (log_variance - log_small + ratio - 1 + jnp.square(difference) * jnp.exp(-log_variance))
    nll = -log_discretised_normal(x_0, x0_hat, 0.5 * log_variance)  # at t = 0 the mean is x0_hat itself
    return jnp.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)


def log_discretised_normal(x: Array, mean: Array, log_scale: Array) -> Array:
    """Log of the probability that N(mean, scale^2) has in the bin, 2 / 255 wide, of each 8-bit value x in [-1, 1].

    The first bin reaches to -infinity and the last to infinity. Like x; at least 1e-12 before the logarithm, as in
    OpenAI's.
    """
    inverse = jnp.exp(-log_scale)
    above = jax.scipy.stats.norm.cdf((x - mean + 1 / 255) * inverse)
    below = jax.scipy.stats.norm.cdf((x - mean - 1 / 255) * inverse)
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _mean(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def _network(task: Task) -> Callable[[Params, Array, Array, Array | None], Array]:
    """The network as a function of its parameters, with t as it takes it."""
    program = Program.of(find("ddim"), task.sampler, make_schedule(task.schedule))

    def apply(params: Params, x_t: Array, t: Array, labels: Array | None) -> Array:
        denoise = told_t(build_model(task.model, params, task.train.dtype), program)
        return denoise(x_t, t) if labels is None else denoise(x_t, t, labels)

    if not task.train.remat:
        return apply
    kept = (lax.conv_general_dilated_p, lax.dot_general_p)
    return jax.checkpoint(apply, policy=lambda primitive, *_, **__: primitive in kept)
