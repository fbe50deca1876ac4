"""jddim's loops against diffusers' DDIM and DDPM schedulers: its tests' published sums, and the schedulers themselves.

The sums are in diffusers' tests/schedulers/test_scheduler_{ddim,ddim_parallel,ddpm}.py.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.config import ScheduleConfig
from jddim.ddim import StepTable, add_noise, ddim_sigma, ddim_step, predict_x0, step_table, vp_rows
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import linear_schedule, make_schedule
from jddim.timesteps import make_timesteps, previous_timesteps

pytestmark = pytest.mark.unoptimised

# -- the published sums -----------------------------------------------------------------------------------------------

COUNT = 4 * 3 * 8 * 8


def ramp(values: np.ndarray) -> np.ndarray:
    """Their test image: numbers in the order (c, h, w, b), over their count; here `(b, h, w, c)`."""
    return (values.reshape(3, 8, 8, 4) / COUNT).transpose(3, 1, 2, 0).astype(np.float32)


SAMPLE, NOISE = ramp(np.arange(COUNT)), ramp(np.arange(COUNT)[::-1].copy())


def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Their test network, x t / (t + 1)."""
    t = t.astype(x_t.dtype)[:, None, None, None]
    return x_t * t / (t + 1)


def table_of(schedule, spacing: str, S: int, offset: int = 0, *, to_one: bool = True, dtype=np.float32) -> StepTable:
    T = schedule.num_train_timesteps
    t = make_timesteps(spacing, T, S, offset)
    return step_table(schedule, t, dtype, timesteps_prev=previous_timesteps(t, spacing, T), set_alpha_to_one=to_one)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("expected", "prediction_type", "beta_start", "to_one"),
    [
        (172.0067, "epsilon", 1e-4, True),
        (52.5302, "v_prediction", 1e-4, True),
        (149.8295, "epsilon", 0.01, True),
        (149.0784, "epsilon", 0.01, False),
    ],
)
def test_published_ddim_sums(expected: float, prediction_type: str, beta_start: float, to_one: bool) -> None:
    table = table_of(linear_schedule(1000, beta_start, 0.02), "leading", 10, to_one=to_one)
    x_0 = sample_loop(network, jnp.asarray(SAMPLE), table, prediction_type=prediction_type, clip_range=(-1.0, 1.0))
    assert abs(float(jnp.abs(x_0).sum()) - expected) < 1e-2  # their tolerance


@pytest.mark.quick
def test_published_ddim_sum_from_the_eighth_step() -> None:
    schedule = linear_schedule(1000)
    table = StepTable(*(column[8:] for column in table_of(schedule, "leading", 10)))
    x_t = add_noise(SAMPLE, NOISE, table.alpha_t[0], table.sigma_t[0])
    table = table._replace(step=np.arange(2, dtype=np.int32))
    x_0 = sample_loop(network, x_t, table, clip_range=(-1.0, 1.0))
    assert abs(float(jnp.abs(x_0).sum()) - 354.5418) < 1e-2


@pytest.mark.quick
def test_published_sum_of_one_batched_step_at_several_t() -> None:
    schedule = linear_schedule(1000)
    x_t = jnp.concatenate([jnp.asarray(SAMPLE + shift, jnp.float32) for shift in (0.0, 0.1, -0.1)])
    t = np.repeat([0, 1, 2], 4)
    at = schedule.alpha(t).astype(np.float32), schedule.sigma(t).astype(np.float32)
    eps = network(x_t, jnp.asarray(t))
    x0 = jnp.clip(predict_x0(x_t, eps, *at), -1, 1)
    x_prev = ddim_step(x0, eps, 0.0, **vp_rows(schedule.alpha_bar(t), np.ones(12)), eta=0.0)
    assert abs(float(jnp.abs(x_prev).sum()) - 1147.7904) < 1e-2


@pytest.mark.quick
def test_published_variances() -> None:
    published = ((0, 0, 0.0), (420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02))
    for t, t_prev, variance in published:
        row = step_table(linear_schedule(1000), [t], timesteps_prev=[t_prev])
        assert abs(float(ddim_sigma(sigma_prev=row.sigma_prev, fresh=row.fresh, eta=1.0)[0]) ** 2 - variance) < 1e-5


@pytest.mark.parametrize(
    ("expected", "prediction_type", "last"),
    [(258.9606, "epsilon", 1000), (202.0296, "v_prediction", 1000), (387.9466, "epsilon", 2)],
)
def test_published_ddpm_sums(expected: float, prediction_type: str, last: int) -> None:
    """Of the ancestral sampler, with the noise that torch's generator draws for the seed 0."""
    torch = pytest.importorskip("torch", reason="these sums are of torch's random numbers")
    schedule = linear_schedule(1000)
    generator = torch.manual_seed(0)
    noise = np.zeros((last, *SAMPLE.shape), np.float32)
    for row in noise[:-1]:  # no noise is drawn at t = 0
        row[:] = torch.randn(4, 3, 8, 8, generator=generator).numpy().transpose(0, 2, 3, 1)
    table = step_table(schedule, np.arange(last)[::-1])
    x_t = jnp.asarray(SAMPLE) if last == 1000 else add_noise(SAMPLE, NOISE, schedule.alpha(1), schedule.sigma(1))
    x_0 = ancestral_loop(network, x_t, table, noise=jnp.asarray(noise), prediction_type=prediction_type)
    # At t = 0 diffusers has 1 - alpha_bar = 1e-4 to 3e-4 of itself: float32. In float64 the last sum is 387.9673.
    assert abs(float(jnp.abs(x_0).sum()) - expected) < (3e-2 if last == 2 else 1e-2)


# -- the schedulers themselves ----------------------------------------------------------------------------------------

SHAPE = (3, 5, 7, 2)  # b, h, w, c

PREDICTIONS = ("epsilon", "sample", "v_prediction")
LIMITS = {  # the loops' arguments, as arrays so that equal kinds share a program
    "none": {},
    "clip": {"clip_range": (-1.0, 1.0)},
    "narrow clip": {"clip_range": (-0.7, 0.7)},
    "threshold": {"threshold": (0.995, 1.0)},
    "wide threshold": {"threshold": (0.6, 1.5)},
}
BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "betas": {"trained_betas": tuple(np.linspace(0.002, 0.05, 200))},
}
SPACINGS = (("leading", 0), ("leading", 1), ("trailing", 0), ("linspace_diffusers", 0))
NUM = 240
STEPS = (5, 7, 30)  # of T = 200: divides, does not, does not


def combinations(num: int) -> list[tuple]:
    """A seeded draw from all of them, without those that divide by sqrt(alpha_bar) = 0."""
    rng = np.random.default_rng(0)
    every = list(
        itertools.product(BETAS, (False, True), SPACINGS, (True, False), PREDICTIONS, LIMITS, (False, True), STEPS)
    )
    kept = [row for row in every if not (row[1] and row[4] == "epsilon")]
    return [kept[i] for i in rng.permutation(len(kept))[:num]]


def curved(x: np.ndarray | jax.Array, t: float | jax.Array, sin):
    """A network that is not linear, and another at every t."""
    return 0.8 * sin(1.3 * x + t / 20) + 0.1 * x


@partial(jax.jit, static_argnames=("prediction_type", "rederive"))
def run_jddim(x_T, table, noise, eta, limits, prediction_type, rederive):
    def denoise(x_t, t):
        return curved(x_t, t.astype(x_t.dtype)[:, None, None, None], jnp.sin)

    return sample_loop(
        denoise,
        x_T,
        table,
        eta=eta,
        noise=noise,
        prediction_type=prediction_type,
        rederive_eps=rederive,
        trajectory_every=1,
        **limits,
    )[1]


def test_every_step_of_240_combinations_equals_ddim_scheduler() -> None:
    torch = pytest.importorskip("torch", reason="diffusers is in torch")
    diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers: pip install diffusers")
    rng = np.random.default_rng(1)
    errors = {}
    for combination in combinations(NUM):
        betas, zero_snr, (spacing, offset), to_one, prediction_type, limit, rederive, S = combination
        eta = float(rng.choice([0.0, 0.3, 1.0]))
        options = {"num_train_timesteps": 200, "beta_start": 1e-4, "beta_end": 0.02, **BETAS[betas]}
        scheduler = diffusers.DDIMScheduler(
            **options,
            clip_sample="clip" in limit,
            clip_sample_range=0.7 if limit == "narrow clip" else 1.0,
            set_alpha_to_one=to_one,
            steps_offset=offset,
            prediction_type=prediction_type,
            thresholding="threshold" in limit,
            dynamic_thresholding_ratio=0.6 if limit == "wide threshold" else 0.995,
            sample_max_value=1.5 if limit == "wide threshold" else 1.0,
            timestep_spacing=spacing.removesuffix("_diffusers"),
            rescale_betas_zero_snr=zero_snr,
        )
        scheduler.set_timesteps(S)
        # Stepped in float64: in float32, from zero SNR, it is up to 2.7e-4 off itself on some CPUs.
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        x_T = rng.standard_normal(SHAPE, dtype=np.float32)
        noise = rng.standard_normal((S, *SHAPE), dtype=np.float32)

        nchw = (0, 3, 1, 2)
        x_t = torch.from_numpy(x_T.transpose(nchw)).double()
        xs, x0s = [], []
        for i, t in enumerate(scheduler.timesteps):
            result = scheduler.step(
                curved(x_t, t, torch.sin),
                t,
                x_t,
                eta=eta,
                use_clipped_model_output=rederive,
                variance_noise=torch.from_numpy(noise[i].transpose(nchw)).double() if eta else None,
            )
            x_t = result.prev_sample
            xs.append(x_t.numpy().transpose(0, 2, 3, 1))
            x0s.append(result.pred_original_sample.numpy().transpose(0, 2, 3, 1))

        config = {
            "linear": ScheduleConfig("linear", 200, 1e-4, 0.02),
            "scaled_linear": ScheduleConfig("scaled_linear", 200, 0.00085, 0.012),
            "cosine": ScheduleConfig("cosine", 200),
            "betas": ScheduleConfig("betas", 200, betas=BETAS["betas"]["trained_betas"]),
        }[betas]
        schedule = make_schedule(ScheduleConfig(**{**vars(config), "zero_terminal_snr": zero_snr}))
        table = table_of(schedule, spacing, S, offset, to_one=to_one)
        assert table.t.tolist() == scheduler.timesteps.tolist()
        trajectory = run_jddim(x_T, table, noise, np.float32(eta), LIMITS[limit], prediction_type, rederive)
        error = np.abs(np.asarray(trajectory.x_t) - np.array(xs)).max() / np.abs(xs).max()
        # x0 is had by dividing by sqrt(alpha_bar_t), 1/4058 where the cosine schedule starts: what float32 rounds off
        # x_t and eps comes out so much larger. (Each step's own scale, so that none hides behind a larger one.)
        gain = 1 / table.alpha_t if prediction_type == "epsilon" else np.ones(S)
        scale = np.maximum(np.abs(x0s).max(axis=(1, 2, 3, 4)), 1e-2)
        x0_error = np.abs(np.asarray(trajectory.x0_hat) - np.array(x0s)).max(axis=(1, 2, 3, 4)) / scale
        errors[combination] = (error, float((x0_error / np.maximum(gain / 100, 1)).max()))
    # jddim in float32; and diffusers multiplies up its alphas_cumprod in float32, jddim in float64.
    assert len(errors) == NUM
    for kind in range(2):
        worst = max(errors, key=lambda combination: errors[combination][kind])
        assert errors[worst][kind] <= 1e-4, (kind, errors[worst], worst)
