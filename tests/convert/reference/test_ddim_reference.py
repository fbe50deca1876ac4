"""The PyTorch reference samplers against scalar arithmetic, each other, and the walk-through's trap."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from convert.reference.ddim import (
    ddim_sample,
    ddim_step,
    ddpm_sample,
    linspace_timesteps,
    walkthrough_snippet_step,
)

F64 = torch.float64


def linear_alphas_cumprod(T: int) -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, T))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """A network's stand-in: nonlinear in x, depends on t, differs between samples and pixels."""
    assert t.dtype == torch.int64
    assert t.shape == (x.shape[0],)
    return torch.sin(1.7 * x + 0.01 * t.to(x.dtype)[:, None, None, None]) + 0.3 * x.flip(3)


def scalar_step(x: float, eps: float, a_t: float, a_s: float, eta: float, z: float, clip: bool) -> float:
    """Eq. 12 and 16 of arXiv:2010.02502 for one number, in Python's floats."""
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    x0 = min(1.0, max(-1.0, x0)) if clip else x0
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    return math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - sigma**2) * eps + sigma * z


def test_a_step_by_hand():
    # Numbers chosen to be exact: sqrt(0.36) = 0.6, sqrt(1 - 0.36) = 0.8; 0.64 likewise.
    # x0 = (0.5 - 0.8 * 0.25) / 0.6 = 0.5; x_s = 0.8 * 0.5 + 0.6 * 0.25 = 0.55
    x_s, x0 = ddim_step(torch.tensor(0.5, dtype=F64), torch.tensor(0.25, dtype=F64), 0.36, 0.64, 0.0, None)
    assert x0.item() == pytest.approx(0.5, abs=1e-15)
    assert x_s.item() == pytest.approx(0.55, abs=1e-15)
    # eta = 1: sigma^2 = 0.36 / 0.64 * (1 - 0.36 / 0.64) = 0.24609375; direction sqrt(0.36 - sigma^2) = 0.3375
    # x_s = 0.4 + 0.3375 * 0.25 + sqrt(0.24609375) * 2 = 0.484375 + 0.99215674...
    x_s, _ = ddim_step(torch.tensor(0.5, dtype=F64), torch.tensor(0.25, dtype=F64), 0.36, 0.64, 1.0, torch.tensor(2.0))
    assert x_s.item() == pytest.approx(0.484375 + 2 * math.sqrt(0.24609375), abs=1e-14)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_is_the_scalar_equation(eta: float, clip: bool):
    x, eps, z = draw(2, 3, 5, 7, seed=1), draw(2, 3, 5, 7, seed=2), draw(2, 3, 5, 7, seed=3)
    for a_t, a_s in [(4e-5, 0.03), (0.3, 0.31), (0.9998, 0.9999), (0.9999, 1.0)]:
        got, _ = ddim_step(x, eps, a_t, a_s, eta, z, (-1.0, 1.0) if clip else None)
        numbers = zip(x.flatten().tolist(), eps.flatten().tolist(), z.flatten().tolist(), strict=True)
        want = [scalar_step(xi, ei, a_t, a_s, eta, zi, clip) for xi, ei, zi in numbers]
        # 1 - a_s - sigma**2 near a_s = 1 cancels: 1e-4 is known to 1e-12, its root to 1e-12 * 0.01 / 2.
        # Unclipped, x0 reaches 1/sqrt(4e-5) * 4 = 600, whence the relative part.
        np.testing.assert_allclose(got.flatten().numpy(), want, rtol=1e-13, atol=1e-13)


def test_rederived_eps_is_the_noise_of_the_clipped_image():
    x, eps = draw(2, 1, 5, 7, seed=1), draw(2, 1, 5, 7, seed=2)
    got, x0 = ddim_step(x, eps, 0.1, 0.4, 0.0, None, (-0.5, 0.8), rederive_eps=True)
    assert x0.min() == -0.5
    assert x0.max() == 0.8
    again = (x - math.sqrt(0.1) * x0) / math.sqrt(0.9)
    torch.testing.assert_close(got, math.sqrt(0.4) * x0 + math.sqrt(0.6) * again, rtol=0, atol=1e-14)
    raw, _ = ddim_step(x, eps, 0.1, 0.4, 0.0, None, (-0.5, 0.8))
    assert (got - raw).abs().max() > 0.1
    # Where nothing is clipped there is nothing to re-derive.
    a, _ = ddim_step(x, eps, 0.1, 0.4, 0.0, None, None, rederive_eps=True)
    b, _ = ddim_step(x, eps, 0.1, 0.4, 0.0, None, None)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_the_walkthroughs_snippet_is_not_its_equation():
    x, eps, z = draw(2, 1, 5, 7, seed=1), draw(2, 1, 5, 7, seed=2), draw(2, 1, 5, 7, seed=3)
    a_t, a_s = 0.3, 0.5
    right, _ = ddim_step(x, eps, a_t, a_s, 0.0, None)
    wrong, _ = walkthrough_snippet_step(x, eps, a_t, a_s, 0.0, None)
    assert torch.equal(right, wrong)
    for eta in (0.2, 1.0):
        sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        right, _ = ddim_step(x, eps, a_t, a_s, eta, z)
        wrong, _ = walkthrough_snippet_step(x, eps, a_t, a_s, eta, z)
        gap = math.sqrt(1 - a_s) - math.sqrt(1 - a_s - sigma2)
        torch.testing.assert_close(wrong - right, gap * eps, rtol=0, atol=1e-14)
        assert gap > 5e-3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_only_the_equation_keeps_the_marginal_variance(eta: float):
    """Given x_0 and the true eps, x_s must have the mean and the variance of q(x_s | x_0), Eq. 4."""
    n = 200_000
    x0, true_eps, z = torch.full((n,), 0.7, dtype=F64), draw(n, seed=4), draw(n, seed=5)
    a_t, a_s = 0.2, 0.6
    x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * true_eps
    right, _ = ddim_step(x_t, true_eps, a_t, a_s, eta, z, None)
    wrong, _ = walkthrough_snippet_step(x_t, true_eps, a_t, a_s, eta, z, None)
    sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    # The variance of n Gaussian draws has a relative standard error of sqrt(2 / n) = 0.3%; four of them.
    assert right.var().item() == pytest.approx(1 - a_s, rel=0.0127)
    assert wrong.var().item() == pytest.approx(1 - a_s + sigma2, rel=0.0127)
    assert right.mean().item() == pytest.approx(math.sqrt(a_s) * 0.7, abs=4 * math.sqrt((1 - a_s) / n))


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_eta_1_over_all_timesteps_is_ddpm(clip: tuple[float, float] | None):
    T = 211
    abar = linear_alphas_cumprod(T)
    x_T, noise = draw(2, 3, 5, 7), draw(T, 2, 3, 5, 7, seed=1)
    steps = linspace_timesteps(T, T)
    assert steps == list(range(T - 1, -1, -1))
    ddim, ddim_x0 = ddim_sample(
        denoise, x_T, abar, steps, eta=1.0, noise=noise, clip=clip, rederive_eps=clip is not None
    )
    ddpm, ddpm_x0 = ddpm_sample(denoise, x_T, abar, steps, noise=noise, clip=clip)
    assert len(ddim) == len(ddpm) == len(ddim_x0) == len(ddpm_x0) == T
    scale = max(x.abs().max().item() for x in ddpm)
    for a, b in zip(ddim + ddim_x0, ddpm + ddpm_x0, strict=True):
        # 211 steps of float64 rounding, amplified by the denoiser; measured 8.5e-14 of the scale.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)
    # The noise matters: without it the run is another.
    assert (ddim[-1] - ddim_sample(denoise, x_T, abar, steps, clip=clip)[0][-1]).abs().max() > 0.1


def test_ddpm_is_the_papers_equation_7():
    T = 23
    betas = np.linspace(1e-3, 0.3, T)
    abar = np.cumprod(1 - betas)
    x_T, noise = draw(2, 1, 3, 5), draw(T, 2, 1, 3, 5, seed=1)
    for variance in ("fixed_small", "fixed_large"):
        got, _ = ddpm_sample(
            denoise,
            x_T,
            abar,
            list(range(T))[::-1],
            variance=variance,
            noise=noise,
            clip=None,
        )
        x = x_T.numpy()
        for k, t in enumerate(reversed(range(T))):
            eps = denoise(torch.from_numpy(x), torch.full((2,), t)).numpy()
            # Eq. 11: the same mean with x0 eliminated, from the paper's betas and not from ratios of abar.
            x = (x - betas[t] / math.sqrt(1 - abar[t]) * eps) / math.sqrt(1 - betas[t])
            if t > 0:
                small = (1 - abar[t - 1]) / (1 - abar[t]) * betas[t]
                x = x + math.sqrt(small if variance == "fixed_small" else betas[t]) * noise[k].numpy()
            np.testing.assert_allclose(got[k].numpy(), x, rtol=1e-10, atol=1e-10)


def test_ddpm_over_a_subsequence_has_the_marginals_of_its_ends():
    """q(x_s | x_t, x0) with the true x0: mean and variance of x_s given x0 must be those of q(x_s | x0)."""
    n = 200_000
    x0, eps = 0.7, draw(n, 1, 1, 1, seed=4)
    abar = linear_alphas_cumprod(1000)
    t, s = 600, 400
    x_t = math.sqrt(abar[t]) * x0 + math.sqrt(1 - abar[t]) * eps
    true = lambda x, step: (x - math.sqrt(abar[step[0]]) * x0) / math.sqrt(1 - abar[step[0]])  # noqa: E731
    noise = draw(2, n, 1, 1, 1, seed=5)
    (x_s, last), x0s = ddpm_sample(true, x_t, abar, [t, s], noise=noise, clip=None)
    # Standard errors as above, four of each.
    assert x_s.var().item() == pytest.approx(1 - abar[s], rel=0.0127)
    assert x_s.mean().item() == pytest.approx(math.sqrt(abar[s]) * x0, abs=4 * math.sqrt((1 - abar[s]) / n))
    # The last step is the mean at alpha_bar = 1: the image itself, no noise on it.
    torch.testing.assert_close(last, torch.full_like(last, x0), rtol=0, atol=1e-12)
    torch.testing.assert_close(x0s[1], torch.full_like(last, x0), rtol=0, atol=1e-12)


def test_the_last_step_is_the_predicted_image():
    abar = linear_alphas_cumprod(300)
    x_T, noise = draw(2, 1, 5, 7), draw(7, 2, 1, 5, 7, seed=1)
    for eta in (0.0, 0.6):
        xs, x0s = ddim_sample(denoise, x_T, abar, linspace_timesteps(300, 7), eta=eta, noise=noise)
        assert torch.equal(xs[-1], x0s[-1])
        assert (xs[-2] - x0s[-2]).abs().max() > 0.01  # the step before it is not


def test_rows_of_noise_and_timesteps_are_used_in_the_order_taken():
    abar = linear_alphas_cumprod(300)
    steps = linspace_timesteps(300, 3)
    assert steps == [299, 199, 99]
    x, noise = draw(2, 1, 5, 7), draw(3, 2, 1, 5, 7, seed=1)
    seen: list[int] = []

    def spy(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return denoise(x_t, t)

    got, _ = ddim_sample(spy, x, abar, steps, eta=0.8, noise=noise, clip=(-0.9, 1.1))
    assert seen == steps
    bars = [abar[299], abar[199], abar[99], 1.0]
    for k in range(3):
        eps = denoise(x, torch.full((2,), steps[k]))
        x, _ = ddim_step(x, eps, bars[k], bars[k + 1], 0.8, noise[k], (-0.9, 1.1))
        torch.testing.assert_close(got[k], x, rtol=0, atol=0)


def test_float32_runs_in_float32_and_agrees():
    abar = linear_alphas_cumprod(1000)
    steps = linspace_timesteps(1000, 30)
    x_T, noise = draw(2, 1, 5, 7), draw(30, 2, 1, 5, 7, seed=1)

    def smooth(x: Tensor, t: Tensor) -> Tensor:  # close to a trained network: x is mostly noise
        return 0.9 * x + 0.1 * torch.sin(x)

    double, _ = ddim_sample(smooth, x_T, abar, steps, eta=0.5, noise=noise)
    single, _ = ddim_sample(smooth, x_T.float(), torch.from_numpy(abar), steps, eta=0.5, noise=noise)
    assert {x.dtype for x in single} == {torch.float32}
    # 30 steps of float32 rounding that this denoiser does not amplify; measured 7.9e-7.
    error = max((a - b).abs().max().item() for a, b in zip(single, double, strict=True))
    assert 0 < error < 1e-5


def test_timesteps_are_float32s_own():
    # Written down from float32 arithmetic: a float64 linspace truncates differently somewhere for S = 26.
    float64 = np.linspace(-1, 999, 27).astype(int)[:0:-1].tolist()
    got = linspace_timesteps(1000, 26)
    assert len(got) == 26
    assert got[0] == 999
    assert got != float64
    assert max(abs(a - b) for a, b in zip(got, float64, strict=True)) == 1
    assert linspace_timesteps(300, 30) == list(range(299, 0, -10))
    assert linspace_timesteps(1000, 1) == [999]
    for S in (1, 7, 26, 139, 997, 1000):
        steps = linspace_timesteps(1000, S)
        assert len(steps) == S
        assert all(a > b >= 0 for a, b in itertools.pairwise(steps))


def step(**changes) -> None:
    arguments = {
        "x_t": draw(3),
        "eps": draw(3),
        "t_alpha_bar": 0.3,
        "prev_alpha_bar": 0.5,
        "eta": 0.0,
        "noise": draw(3),
    }
    ddim_step(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eta": -0.1}, "eta must be a finite number, 0 or more, got -0.1"),
        ({"eta": math.nan}, "eta must be a finite number, 0 or more, got nan"),
        ({"eta": math.inf}, "eta must be a finite number, 0 or more, got inf"),
        ({"eta": 0.5, "noise": None}, "give the noise to add"),
        ({"eta": 9.0}, "eta=9.0 is too large here"),
    ],
)
def test_a_bad_step_says_why(changes: dict, says: str):
    with pytest.raises(ValueError, match=says):
        step(**changes)


@pytest.mark.parametrize("sampler", [ddim_sample, ddpm_sample])
@pytest.mark.parametrize(
    ("steps", "noise", "says"),
    [
        ([], (0, 2, 1, 3, 5), "one or more strictly descending"),
        ([5, 5], (2, 2, 1, 3, 5), r"strictly descending integers, got \[5, 5\]"),
        ([1, 2], (2, 2, 1, 3, 5), "strictly descending"),
        ([5, -1], (2, 2, 1, 3, 5), "lie in 0..9 .the step to -1 is taken without naming it"),
        ([10, 3], (2, 2, 1, 3, 5), "lie in 0..9"),
        ([9, 3], (2, 1, 1, 3, 5), r"noise must have shape \(2, 2, 1, 3, 5\), got \(2, 1, 1, 3, 5\)"),
        ([9, 3], (3, 2, 1, 3, 5), r"noise must have shape \(2, 2, 1, 3, 5\)"),
    ],
)
def test_a_bad_run_says_why(sampler, steps: list[int], noise: tuple[int, ...], says: str):
    with pytest.raises(ValueError, match=says):
        sampler(denoise, draw(2, 1, 3, 5), linear_alphas_cumprod(10), steps, noise=draw(*noise))


def test_stochastic_runs_demand_their_noise():
    x_T, abar = draw(2, 1, 3, 5), linear_alphas_cumprod(10)
    with pytest.raises(ValueError, match=r"give noise of shape \(2, 2, 1, 3, 5\)"):
        ddim_sample(denoise, x_T, abar, [9, 3], eta=0.1)
    with pytest.raises(ValueError, match="variance must be 'fixed_small' or 'fixed_large', got 'small'"):
        ddpm_sample(denoise, x_T, abar, [9], variance="small", noise=draw(1, 2, 1, 3, 5))  # type: ignore[arg-type]
