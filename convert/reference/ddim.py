"""The samplers that jddim is compared with, in plain PyTorch, every random number injected.

DDIM is arXiv:2010.02502, DDPM arXiv:2006.11239. alpha_bar is alphas_cumprod; t is the current timestep, s the
next (smaller) one that is kept, and after the last kept timestep comes s = -1, where alpha_bar is 1: a clean
image.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Clip = tuple[float, float] | None


def linspace_timesteps(T: int, S: int) -> list[int]:
    """S of the T training timesteps, descending from T - 1: the walk-through's table.

    `torch.linspace(-1, T - 1, S + 1)` in float32, truncated to int, reversed; the -1 that ends it is left
    out, because the samplers below end there by themselves. In float64 some entries would truncate to other
    integers.

    Raises ValueError unless 1 <= S <= T.
    """
    if not 1 <= S <= T:
        raise ValueError(f"S must be in 1..{T} (T = {T}), got {S}")
    table = torch.linspace(-1, T - 1, S + 1, dtype=torch.float32).int().tolist()
    return table[:0:-1]


def predict_x0(x_t: Tensor, eps: Tensor, t_alpha_bar: Tensor, clip: Clip) -> Tensor:
    """The image left when x_t loses its noise, Eq. 9 of arXiv:2010.02502; clamped to clip if given."""
    x0 = (x_t - (1 - t_alpha_bar).sqrt() * eps) / t_alpha_bar.sqrt()
    return x0 if clip is None else x0.clamp(*clip)


def ddim_sigma(t_alpha_bar: Tensor, prev_alpha_bar: Tensor, eta: float) -> Tensor:
    """The standard deviation of the noise that a step adds, Eq. 16 of arXiv:2010.02502."""
    variance = (1 - prev_alpha_bar) / (1 - t_alpha_bar) * (1 - t_alpha_bar / prev_alpha_bar)
    return eta * variance.sqrt()


def ddim_step(
    x_t: Tensor,
    eps: Tensor,
    t_alpha_bar: float | Tensor,
    prev_alpha_bar: float | Tensor,
    eta: float,
    noise: Tensor | None,
    clip: Clip = (-1.0, 1.0),
    rederive_eps: bool = False,
) -> tuple[Tensor, Tensor]:
    """One DDIM update, Eq. 12 of arXiv:2010.02502 with sigma from Eq. 16.

    x_t, eps, noise: `(n, c, h, w)` (any one shape will do), float32 or float64; all arithmetic is in x_t's
    dtype. t_alpha_bar, prev_alpha_bar: scalars in (0, 1], at t and at s. eta >= 0: 0 deterministic, 1 the
    DDPM posterior variance. noise: standard normal, may be None when eta is 0. clip: range for x0_hat, None
    for none. rederive_eps: recompute the noise of the direction term from the clipped x0_hat. Returns `(x_s,
    x0_hat)`.

    Raises ValueError for eta < 0, infinite or NaN, eta > 0 without noise, or an eta so large that sigma**2
    exceeds 1 - prev_alpha_bar.
    """
    t_bar, s_bar = _scalar(t_alpha_bar, x_t), _scalar(prev_alpha_bar, x_t)
    sigma = _checked_sigma(t_bar, s_bar, eta, noise)
    x0 = predict_x0(x_t, eps, t_bar, clip)
    if rederive_eps:
        eps = (x_t - t_bar.sqrt() * x0) / (1 - t_bar).sqrt()
    direction_variance = 1 - s_bar - sigma**2
    # Exactly 0 at s = -1, and at eta = 1 tiny when alpha_bar_t is: rounding alone may put it below 0.
    if direction_variance < -4 * torch.finfo(x_t.dtype).eps:
        raise ValueError(
            f"eta={eta} is too large here: sigma**2 = {sigma.item() ** 2:.6g} exceeds 1 - prev_alpha_bar = "
            f"{1 - s_bar.item():.6g}"
        )
    x_s = s_bar.sqrt() * x0 + direction_variance.clamp(min=0).sqrt() * eps
    if noise is not None:
        x_s = x_s + sigma * noise
    return x_s, x0


def walkthrough_snippet_step(
    x_t: Tensor,
    eps: Tensor,
    t_alpha_bar: float | Tensor,
    prev_alpha_bar: float | Tensor,
    eta: float,
    noise: Tensor | None,
    clip: Clip = (-1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """A trap, kept to measure it: the lesson's code snippet, which is not its equation.

    Its direction term is sqrt(1 - prev_alpha_bar) * eps, without the "- sigma**2" of Eq. 12 of
    arXiv:2010.02502, so every step with eta > 0 adds sigma**2 of variance too much and the marginal q(x_s |
    x_0) is lost. At eta = 0 the two agree. Arguments and result as `ddim_step`. Never sample with this.
    """
    t_bar, s_bar = _scalar(t_alpha_bar, x_t), _scalar(prev_alpha_bar, x_t)
    sigma = _checked_sigma(t_bar, s_bar, eta, noise)
    x0 = predict_x0(x_t, eps, t_bar, clip)
    x_s = s_bar.sqrt() * x0 + (1 - s_bar).sqrt() * eps
    if noise is not None:
        x_s = x_s + sigma * noise
    return x_s, x0


def ddim_sample(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor | np.ndarray,
    timesteps: Sequence[int],
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    clip: Clip = (-1.0, 1.0),
    rederive_eps: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The DDIM loop: one `ddim_step` per kept timestep, from x_T to alpha_bar = 1.

    denoise: `(x_t (n, c, h, w), t (n,) int64) -> eps`. x_T: `(n, c, h, w)`, float32 or float64, the dtype of
    the whole run. alphas_cumprod: `(T,)`, float64, rounded to that dtype. timesteps: strictly descending
    within 0..T-1, without a closing -1. noise: `(S, n, c, h, w)`, row k used in the k-th step taken; required
    when eta > 0. clip, rederive_eps: as `ddim_step`. Returns the x after each step and the x0_hat of each
    step, S tensors each; the last x is the sample.

    Raises ValueError for timesteps that do not descend or leave the table, and for noise that is missing or
    has another shape.
    """
    steps = _step_pairs(alphas_cumprod, timesteps, x_T)
    rows = _noise_rows(noise, len(steps), x_T, required=eta > 0)
    xs, x0s = [], []
    x = x_T
    with torch.no_grad():
        for (t, t_bar, s_bar), z in zip(steps, rows, strict=True):
            eps = denoise(x, torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device))
            x, x0 = ddim_step(x, eps, t_bar, s_bar, eta, z, clip, rederive_eps)
            xs.append(x)
            x0s.append(x0)
    return xs, x0s


def ddpm_sample(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor | np.ndarray,
    timesteps: Sequence[int],
    *,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    noise: Tensor,
    clip: Clip = (-1.0, 1.0),
) -> tuple[list[Tensor], list[Tensor]]:
    """Ancestral sampling from q(x_s | x_t, x0_hat), Eq. 6-7 of arXiv:2006.11239, over any kept timesteps.

    Between neighbours the paper's beta_t becomes beta = 1 - alpha_bar_t / alpha_bar_s. variance:
    "fixed_small" is the posterior's (Eq. 7), "fixed_large" is beta itself (section 3.2). The last step
    returns the mean, its row of noise unused. Other arguments and the result as `ddim_sample`. With
    fixed_small this is DDIM at eta = 1, provided that the DDIM step does not clip or re-derives eps: Eq. 7
    has no eps other than x0_hat's own.

    Raises ValueError as `ddim_sample`, and for another variance.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance must be 'fixed_small' or 'fixed_large', got {variance!r}")
    steps = _step_pairs(alphas_cumprod, timesteps, x_T)
    rows = _noise_rows(noise, len(steps), x_T, required=True)
    xs, x0s = [], []
    x = x_T
    with torch.no_grad():
        for k, ((t, t_bar, s_bar), z) in enumerate(zip(steps, rows, strict=True)):
            eps = denoise(x, torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device))
            x0 = predict_x0(x, eps, t_bar, clip)
            alpha = t_bar / s_bar
            beta = 1 - alpha
            x = (s_bar.sqrt() * beta * x0 + alpha.sqrt() * (1 - s_bar) * x) / (1 - t_bar)
            if k != len(steps) - 1:
                assert z is not None
                var = beta if variance == "fixed_large" else (1 - s_bar) / (1 - t_bar) * beta
                x = x + var.sqrt() * z
            xs.append(x)
            x0s.append(x0)
    return xs, x0s


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _checked_sigma(t_bar: Tensor, s_bar: Tensor, eta: float, noise: Tensor | None) -> Tensor:
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be a finite number, 0 or more, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"eta={eta} adds noise at every step: give the noise to add")
    return ddim_sigma(t_bar, s_bar, eta)


def _step_pairs(
    alphas_cumprod: Tensor | np.ndarray, timesteps: Sequence[int], like: Tensor
) -> list[tuple[int, Tensor, Tensor]]:
    """(t, alpha_bar at t, alpha_bar at the next kept timestep) for each step, alpha_bar 1 after the last."""
    # torch.tensor copies: sharing memory with the read-only arrays that schedules hand out earns a warning.
    table = (alphas_cumprod if isinstance(alphas_cumprod, Tensor) else torch.tensor(alphas_cumprod)).to(like)
    kept = [int(t) for t in timesteps]
    if not kept or any(t <= s for t, s in itertools.pairwise(kept)):
        raise ValueError(f"timesteps must be one or more strictly descending integers, got {kept}")
    if kept[0] >= len(table) or kept[-1] < 0:
        raise ValueError(
            f"timesteps must lie in 0..{len(table) - 1} (the step to -1 is taken without naming it), "
            f"got {kept[0]} down to {kept[-1]}"
        )
    bars = [*(table[t] for t in kept), torch.ones_like(table[0])]
    return list(zip(kept, bars[:-1], bars[1:], strict=True))


def _noise_rows(noise: Tensor | None, count: int, x_T: Tensor, *, required: bool) -> Sequence[Tensor | None]:
    if noise is None:
        if required:
            raise ValueError(f"this run adds noise: give noise of shape {(count, *x_T.shape)}")
        return [None] * count
    if tuple(noise.shape) != (count, *x_T.shape):
        raise ValueError(f"noise must have shape {(count, *x_T.shape)}, got {tuple(noise.shape)}")
    return list(noise.to(x_T))
