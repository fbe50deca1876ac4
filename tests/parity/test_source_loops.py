"""The loops against each source's own DDIM and ancestral loop, written out here in float64 NumPy from its semantics.

(ermongroup's and the walk-through's DDIM are in test_sampler_parity.py, diffusers' in test_diffusers_scheduler.py.)
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jddim.ddim import StepTable, step_table
from jddim.denoisers import with_scaled_time, with_self_condition, without_variance
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import NoiseSchedule, cosine_schedule, linear_schedule
from jddim.timesteps import make_timesteps

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

SHAPE = (3, 5, 7, 2)  # b, h, w, c
RNG = np.random.default_rng(0)
X_T = RNG.standard_normal(SHAPE)
NOISE = RNG.standard_normal((31, *SHAPE))

# float32 against float64; a few steps from alpha_bar = 1e-3, no larger gain than 30 in between
TOLERANCE = 1e-4


def bend(x, t, sin=np.sin):
    """A network that is not linear, and another at every t."""
    return 0.8 * sin(1.3 * x + t / 50) + 0.1 * x


def bend32(x_t, t):
    return bend(x_t, t.astype(x_t.dtype)[:, None, None, None], jnp.sin)


def check(actual, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(actual, np.float64) - expected).max() <= TOLERANCE * np.abs(expected).max()


def f32(array: np.ndarray):
    return jnp.asarray(array, jnp.float32)


# -- OpenAI -----------------------------------------------------------------------------------------------------------


def respaced(schedule: NoiseSchedule, timesteps: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SpacedDiffusion's own alphas_cumprod and betas over the kept timesteps, and its alphas_cumprod_prev."""
    last, betas = 1.0, []
    for t in timesteps:
        betas.append(1 - schedule.alphas_cumprod[t] / last)
        last = schedule.alphas_cumprod[t]
    alphas_cumprod = np.cumprod(1 - np.array(betas))
    return alphas_cumprod, np.array(betas), np.append(1.0, alphas_cumprod[:-1])


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("spacing", ["ddim10", "10,3,5"])
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_openai_ddim(eta: float, spacing: str, predict_xstart: bool) -> None:
    T = 300
    schedule = linear_schedule(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)
    table = step_table(schedule, make_timesteps(spacing, T))
    kept = table.t[::-1].tolist()
    alphas_cumprod, _, alphas_cumprod_prev = respaced(schedule, kept)
    x = X_T
    for row, i in enumerate(reversed(range(len(kept)))):
        a, a_prev = alphas_cumprod[i], alphas_cumprod_prev[i]
        output = bend(x, kept[i] * (1000 / T))
        x0 = output if predict_xstart else np.sqrt(1 / a) * x - np.sqrt(1 / a - 1) * output
        x0 = x0.clip(-1, 1)
        eps = (np.sqrt(1 / a) * x - x0) / np.sqrt(1 / a - 1)
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
        mean = x0 * np.sqrt(a_prev) + np.sqrt(1 - a_prev - sigma**2) * eps
        x = mean + (i != 0) * sigma * NOISE[row]

    def network(x_t, t):  # with learned variance, whose half DDIM does not use
        return jnp.concatenate([bend32(x_t, t), 100 * x_t], axis=-1)

    actual = sample_loop(
        without_variance(with_scaled_time(network, 1000 / T)),
        f32(X_T),
        table,
        eta=eta,
        noise=f32(NOISE[: len(kept)]),
        prediction_type="sample" if predict_xstart else "epsilon",
        clip_range=(-1.0, 1.0),
        rederive_eps=True,
    )
    check(actual, x)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_openai_ancestral(variance: str) -> None:
    T, S = 300, 11
    schedule = cosine_schedule(T)
    table = step_table(schedule, make_timesteps("openai", T, S))
    kept = table.t[::-1].tolist()
    alphas_cumprod, betas, alphas_cumprod_prev = respaced(schedule, kept)
    posterior = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    log_clipped = np.log(np.append(posterior[1], posterior[1:]))
    x = X_T
    for row, i in enumerate(reversed(range(S))):
        a, a_prev, beta = alphas_cumprod[i], alphas_cumprod_prev[i], betas[i]
        x0 = (np.sqrt(1 / a) * x - np.sqrt(1 / a - 1) * bend(x, kept[i])).clip(-1, 1)
        mean = beta * np.sqrt(a_prev) / (1 - a) * x0 + (1 - a_prev) * np.sqrt(1 - beta) / (1 - a) * x
        log_variance = {
            "fixed_small": log_clipped[i],
            "fixed_large": np.log(np.append(posterior[1], betas[1:]))[i],
            "learned_range": (np.sin(x) + 1) / 2 * np.log(beta) + (1 - (np.sin(x) + 1) / 2) * log_clipped[i],
        }[variance]
        x = mean + (i != 0) * np.exp(0.5 * log_variance) * NOISE[row]

    def network(x_t, t):
        eps = bend32(x_t, t)
        return jnp.concatenate([eps, jnp.sin(x_t)], axis=-1) if variance == "learned_range" else eps

    check(ancestral_loop(network, f32(X_T), table, noise=f32(NOISE[:S]), variance=variance), x)


# -- ermongroup -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "S"), [("uniform", 7), ("uniform", 30), ("quad", 29)])
def test_ermongroup_ddpm_noisy(spacing: str, S: int) -> None:
    """Its `sample_type: ddpm_noisy`, sigma-hat of the DDIM paper."""
    T = 300
    schedule = linear_schedule(T)
    table = step_table(schedule, make_timesteps(spacing, T, S))
    at = dict(enumerate([1.0, *schedule.alphas_cumprod], start=-1))
    x = X_T
    for row, (t, t_prev) in enumerate(zip(table.t.tolist(), table.t_prev.tolist(), strict=True)):
        beta = 1 - at[t] / at[t_prev]
        x0 = (math.sqrt(1 / at[t]) * x - math.sqrt(1 / at[t] - 1) * bend(x, t)).clip(-1, 1)
        mean = (math.sqrt(at[t_prev]) * beta * x0 + math.sqrt(1 - beta) * (1 - at[t_prev]) * x) / (1 - at[t])
        x = mean + (t != 0) * math.sqrt(beta) * NOISE[row]
    noise = f32(NOISE[: table.num_steps])
    check(ancestral_loop(bend32, f32(X_T), table, noise=noise, variance="fixed_large"), x)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ermongroup_quad_with_its_repeated_zeros(eta: float) -> None:
    """A step from t to itself changes nothing, and takes a row of noise, as there."""
    T, S = 300, 31
    schedule = linear_schedule(T)
    table = step_table(schedule, make_timesteps("quad", T, S))
    assert (table.num_steps, table.t[-4:].tolist()) == (S, [2, 1, 0, 0])
    at = dict(enumerate([1.0, *schedule.alphas_cumprod], start=-1))
    x = X_T
    for row, (now, then) in enumerate(zip(table.t.tolist(), table.t_prev.tolist(), strict=True)):
        eps = bend(x, now)
        x0 = (x - eps * math.sqrt(1 - at[now])) / math.sqrt(at[now])
        c1 = eta * math.sqrt((1 - at[now] / at[then]) * (1 - at[then]) / (1 - at[now]))
        x = math.sqrt(at[then]) * x0 + c1 * NOISE[row] + math.sqrt(1 - at[then] - c1**2) * eps
    check(sample_loop(bend32, f32(X_T), table, eta=eta, noise=f32(NOISE[:S])), x)


# -- lucidrains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_lucidrains_ddim(eta: float, self_condition: bool, objective: str) -> None:
    T, S = 300, 7
    schedule = cosine_schedule(T)
    table: StepTable = step_table(schedule, make_timesteps("linspace", T, S))
    x, x0_before = X_T, np.zeros(SHAPE)
    for row, (t, t_prev) in enumerate(zip(table.t.tolist(), table.t_prev.tolist(), strict=True)):
        a = schedule.alphas_cumprod[t]
        output = bend(x, t) + (0.5 * x0_before if self_condition else 0)
        if objective == "pred_noise":
            x0 = np.sqrt(1 / a) * x - np.sqrt(1 / a - 1) * output
        else:
            x0 = output if objective == "pred_x0" else np.sqrt(a) * x - np.sqrt(1 - a) * output
        x0 = x0_before = x0.clip(-1, 1)
        eps = (np.sqrt(1 / a) * x - x0) / np.sqrt(1 / a - 1)
        if t_prev < 0:
            x = x0
            continue
        a_next = schedule.alphas_cumprod[t_prev]
        sigma = eta * np.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
        x = x0 * np.sqrt(a_next) + np.sqrt(1 - a_next - sigma**2) * eps + sigma * NOISE[row]

    def network(x_t, t):
        x0_hat, x_t = jnp.split(x_t, 2, axis=-1) if self_condition else (0.0, x_t)
        return bend32(x_t, t) + 0.5 * x0_hat

    actual = sample_loop(
        with_self_condition(network) if self_condition else network,
        f32(X_T),
        table,
        eta=eta,
        noise=f32(NOISE[:S]),
        prediction_type={"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}[objective],
        clip_range=(-1.0, 1.0),
        rederive_eps=True,
        self_condition=self_condition,
    )
    check(actual, x)
