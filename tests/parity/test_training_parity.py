"""Training steps equal PyTorch's: the same weights, batches, t and noise, with its autograd, Adam and AdamW."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import fill, to_torch
from tiny import SIZE, SMALL, small_config

from convert.families.ho import rules
from convert.reference.unet import ReferenceUNet, redraw_
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params
from jddim.schedule import noise_schedule
from jddim.train import objective
from jddim.train import step as training
from jddim.train.objective import Draws
from jddim.train.task import Task, TrainConfig

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.unoptimised

STEPS, BATCH, DECAY = 3, 3, 0.7
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "adam, clipped sum": ("epsilon", (1, 2), {"reduction": "sum", "clip_norm": 1.0}),
    "adamw, min-SNR": ("v_prediction", (1,), {"optimizer": "adamw", "weight_decay": 0.3, "loss": "min_snr"}),
    "flow": ("velocity", (1,), {}),
    "edm": ("edm", (1,), {"clip_norm": 0.5}),
}
"""What is predicted, the levels' widths, and fields of `TrainConfig`."""


def ours(config: UNetConfig, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a state dict, or differences of such, under our names and in our layout; rounded to float32."""
    shapes = {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}
    return fill({name: value.numpy() for name, value in tensors.items()}, shapes, rules(config))


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_pytorchs(name: str) -> None:
    kind, mults, changes = CASES[name]
    levels = (len(mults) - 1,)
    config = small_config(channel_mults=mults, attention_levels=levels)
    schedule = ScheduleConfig("linear", 50, 1e-3, 0.2) if name.startswith("adam") else ScheduleConfig(name)
    settings = {"clip_norm": None, "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "ema_warmup": False, "warmup_steps": 0}
    train = TrainConfig(steps=STEPS, batch_size=BATCH, dtype="float64", ema_decay=DECAY, **(settings | changes))
    spacing = {"flow": "even", "edm": "karras"}.get(name, "linspace")
    sampler = SamplerConfig(spacing, prediction_type=kind, timestep_scale={"flow": 40.0, "edm": 9.0}.get(name, 1.0))
    job = Task(config, schedule, sampler, train)
    rng = np.random.default_rng(4)
    images, noise = rng.uniform(-1, 1, (STEPS, BATCH, *SIZE, 1)), rng.standard_normal((STEPS, BATCH, *SIZE, 1))
    ts = np.array([[0, 17, 49], [3, 3, 30], [44, 1, 20]])
    if not name.startswith("adam"):
        ts = (ts + 0.5) / (50 if name == "flow" else 5)

    model = ReferenceUNet(**(SMALL | {"ch_mult": mults, "attn_levels": levels}))
    redraw_(model, 7)
    model.double()  # which changes none of them
    start = {k: v.detach().clone() for k, v in model.named_parameters()}
    average = {k: v.clone() for k, v in start.items()}
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8}
    optimizer = (
        torch.optim.AdamW(model.parameters(), weight_decay=0.3, **options)
        if train.optimizer == "adamw"
        else torch.optim.Adam(model.parameters(), **options)
    )
    expected = []
    for x_0, eps, t in zip(map(to_torch, images), map(to_torch, noise), map(torch.tensor, ts), strict=True):
        if name.startswith("adam"):
            a = torch.tensor(noise_schedule(schedule).alphas_cumprod)[t][:, None, None, None]
            predicted = model(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t)
        each = t[:, None, None, None]
        if name == "flow":
            loss = (model((1 - each) * x_0 + each * eps, 40 * t) - (eps - x_0)).square().mean()
        elif name == "edm":  # Table 1 of arXiv:2206.00364, sigma_data 0.5
            r2 = each**2 + 0.25
            x_t = x_0 + each * eps
            denoised = 0.25 / r2 * x_t + each * 0.5 / r2.sqrt() * model(x_t / r2.sqrt(), 9 * t.log())
            loss = (r2 / (each * 0.5) ** 2 * (denoised - x_0).square()).mean()
        elif kind == "epsilon":
            loss = (predicted - eps).square().sum(dim=(1, 2, 3)).mean()
        else:
            snr = a / (1 - a)
            weight = torch.clamp(snr, max=5) / (snr + 1)
            loss = (weight * (predicted - (a.sqrt() * eps - (1 - a).sqrt() * x_0)).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm or float("inf"))
        optimizer.step()
        expected.append((loss.item() / (60 if kind == "epsilon" else 1), norm.item()))
        with torch.no_grad():
            for k, v in model.named_parameters():
                average[k].lerp_(v, 1 - DECAY)
    moved = ours(config, {k: v.detach() - start[k] for k, v in model.named_parameters()})
    averaged = ours(config, {k: v - start[k] for k, v in average.items()})
    before = ours(config, start)

    with jax.enable_x64(True):
        optimizer, table = training.make_optimizer(job), objective.training_table(job)
        step = jax.jit(lambda *state: training.update(job, table, optimizer, *state))
        state = training.init_state(job, before)
        for x_0, eps, t, (loss, norm) in zip(images, noise, ts, expected, strict=True):
            state, said = step(state, {"images": jnp.asarray(x_0)}, Draws(jnp.asarray(t), jnp.asarray(eps)))
            # of edm's weight at t = 0.1, and x_0 by way of the velocity
            rtol = 1e-8 if name == "edm" else 1e-9
            np.testing.assert_allclose((said["loss"], said["grad_norm"]), (loss, norm), rtol=rtol)
    if train.clip_norm is not None:
        assert min(norm for _, norm in expected) > train.clip_norm  # so it clipped
    # In float64. torch divides by the norm + 1e-6 when it clips: 1e-6 of the gradient, less of the update.
    for mine, theirs in ((state.params, moved), (state.ema, averaged)):
        largest = max(np.abs(value).max() for value in theirs.values())
        worst = max(np.abs(np.asarray(mine[k]) - before[k] - theirs[k]).max() for k in before)
        assert worst <= 1e-5 * largest, (worst, largest)
