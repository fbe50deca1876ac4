"""The jitted scan equals the walk-through's loop in PyTorch, for the same x_T and noise, at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity_cases as cases
import pytest
from parity_cases import torch

import jddim
from convert.files.readers import read
from jddim.config import ScheduleConfig

pytestmark = pytest.mark.unoptimised

# Of the largest magnitude of the trajectory. At T = 1000 unclipped, that is 158 = 1 / sqrt(alpha_bar_999) times x_T;
# clipped, a pixel of the first x0_hat that the clip lets through carries 158 roundings of eps.
TOLERANCE = 1e-4


@pytest.mark.optimised
@pytest.mark.parametrize("clip", cases.CLIPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_step_equals_through_the_shipped_checkpoint(mnist_checkpoint: Path, eta: float, clip: str) -> None:
    from conftest import MNIST_SOURCE

    ddim = jddim.load(mnist_checkpoint)
    assert ddim.metadata is not None
    schedule = ddim.metadata.schedule
    assert schedule == ScheduleConfig("linear", schedule.num_train_timesteps, 1e-4, 0.02)  # as `sampler_error` has it
    model = cases.reference(ddim.model.config).eval().requires_grad_(False)
    ema = read(MNIST_SOURCE / "ckpt.pth")[4]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in ema.items()})

    S, shape = 30, (3, 28, 28, 1)
    x_T, noise = cases.sampler_inputs(S, shape, np.float32)
    expected = cases.torch_ddim.ddim_sample(
        model,
        cases.to_torch(x_T),
        ddim.schedule.alphas_cumprod,
        cases.torch_ddim.linspace_timesteps(schedule.num_train_timesteps, S),
        eta=eta,
        noise=cases.to_torch(noise),
        clip=cases.CLIPS[clip],
    )
    x_0, trajectory = ddim.sample(
        steps=S, spacing="linspace", eta=eta, clip=clip == "clip", x_T=x_T, noise=noise, trajectory_every=1
    )
    np.testing.assert_array_equal(x_0, trajectory.x_t[-1])
    assert cases.trajectory_error(trajectory, expected, x0_too=False) <= TOLERANCE  # x_t; measured 1e-5
    # At t = 965 x0_hat = (x_t - eps) / 0.0087, which cancels in a trained network: there PyTorch's own float32 is
    # 2e-4 from its float64. Measured: 4e-4.
    assert cases.trajectory_error(trajectory, expected) <= 1e-3


@pytest.mark.parametrize("name", cases.SAMPLER_CASES)
def test_every_step_equals_the_references(name: str) -> None:
    # measured: at most 3e-5, in x0_hat at S = T = 1000
    assert cases.sampler_error(cases.SAMPLER_CASES[name], np.float32) <= TOLERANCE


@pytest.mark.parametrize("name", cases.UNET_SAMPLER_CASES)
def test_every_step_equals_through_a_redrawn_network(name: str) -> None:
    # measured: at most 5e-5, in x0_hat at S = 30
    assert cases.unet_sampler_error(cases.UNET_SAMPLER_CASES[name], np.float32) <= TOLERANCE


@pytest.mark.parametrize("name", cases.COSINE_CASES)
def test_every_x_t_equals_the_references_on_a_cosine_schedule(name: str) -> None:
    # x_t alone, see COSINE_CASES; float64 compares x0_hat too. Measured: at most 2e-5
    assert cases.sampler_error(cases.COSINE_CASES[name], np.float32, x0_too=False) <= TOLERANCE


@pytest.mark.parametrize("name", cases.ANCESTRAL_CASES)
def test_ancestral_sampling_equals_the_references(name: str) -> None:
    # measured: at most 2e-5
    assert cases.ancestral_error(cases.ANCESTRAL_CASES[name], np.float32) <= TOLERANCE


@pytest.mark.parametrize("T", [300, 1000])
def test_eta_one_with_all_steps_is_ancestral_sampling(T: int) -> None:
    # The same sums in another order, over all steps, at the smallest t divided by 1 - alpha_bar_t = 1e-4, of which
    # float32 keeps 3 digits less. Measured: 7e-5; 1e-12 in float64.
    assert cases.eta_one_is_ancestral_error(T, np.float32) <= TOLERANCE


def test_errors_are_seen() -> None:
    """The comparison itself: the largest magnitude of both sequences, every step, and NaN counts as infinite."""
    from jddim.sampling import Trajectory

    def nchw(values: list[float]) -> list:
        return [torch.full((1, 1, 1, 1), value) for value in values]

    def nhwc(values: list[float]) -> np.ndarray:
        return np.array(values, np.float32).reshape(-1, 1, 1, 1, 1)

    def error(x_t: list[float], x0_hat: list[float]) -> float:
        trajectory = Trajectory(np.arange(2), nhwc(x_t), nhwc(x0_hat))  # type: ignore[arg-type]
        return cases.trajectory_error(trajectory, (nchw([1.0, 2.0]), nchw([-4.0, 3.0])))

    assert error([1, 2], [-4, 3]) == 0
    assert error([1.5, 2], [-4, 3]) == pytest.approx(0.5 / 4)
    assert error([1, 2], [-4, 2]) == pytest.approx(1 / 4)
    assert error([1, float("nan")], [-4, 3]) == float("inf")
    assert error([1, 2], [float("nan"), 3]) == float("inf")
