"""Reusing the deep half of a UNet (`reuse`) is DeepCache: the PyTorch network, a block of which finds an old input.

Of ermongroup's networks its repository (horseee/DeepCache) calls `branch=b` what is here `reuse_blocks=b + 2`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import parity_cases as cases
import pytest
from parity_cases import torch

import jddim
from jddim.config import SamplerConfig, UNetConfig
from jddim.schedule import linear_schedule
from jddim.timetables import whole_steps

pytestmark = pytest.mark.unoptimised

T, S, SIZE = 200, 7, (12, 20)
CONFIG = UNetConfig(
    image_size=SIZE, channels=5, norm_groups=5, channel_mults=(1, 2, 3), num_res_blocks=2, attention_levels=(1,)
)


class Cached:
    """The PyTorch network, called at one step after the other; between whole steps one block finds an old input."""

    def __init__(self, model: Any, blocks: int, whole: Collection[int]):
        level, j = CONFIG.up_block(blocks)
        self.model, self.whole, self.step = model, whole, 0
        self.width = CONFIG.deep_shape(SIZE, blocks)[2]
        model.up[level].block[j].register_forward_pre_hook(self.replace)

    def __call__(self, x: Any, t: Any) -> Any:
        output = self.model(x, t)
        self.step += 1
        return output

    def replace(self, block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        h, *rest = inputs
        if self.step in self.whole:
            self.deep = h[:, : self.width]
        return torch.cat([self.deep, h[:, self.width :]], dim=1), *rest


@pytest.mark.parametrize(("every", "center", "blocks", "eta"), [(3, None, 4, 0.6), (3, 4, 1, 0.0)])
def test_every_step_equals_deep_cache(every: int, center: int | None, blocks: int, eta: float) -> None:
    model = cases.reference_unet(CONFIG, seed=3)
    _, flax = cases.both(CONFIG, model, np.float32)
    whole = whole_steps(S, every, center)
    assert 1 < len(whole) < S
    x_T, noise = cases.sampler_inputs(S, (2, *SIZE, 3), np.float32)
    schedule = linear_schedule(T)
    run = partial(
        cases.torch_ddim.ddim_sample,
        x_T=cases.to_torch(x_T),
        alphas_cumprod=schedule.alphas_cumprod,
        timesteps=cases.torch_ddim.linspace_timesteps(T, S),
        eta=eta,
        noise=cases.to_torch(noise),
        clip=cases.CLIPS["clip"],
    )
    with torch.inference_mode():
        exact = run(model)
        expected = run(Cached(model, blocks, whole))
    ddim = jddim.DDIM(flax, schedule, SamplerConfig("linspace", S, clip=True))
    _, way = ddim.sample(
        x_T=x_T,
        noise=noise,
        eta=eta,
        reuse=every,
        reuse_center=center,
        reuse_blocks=blocks,
        trajectory_every=1,
    )
    # measured: 3e-6; the bound is the parity tests'
    assert cases.trajectory_error(way, expected) <= 1e-4
    assert cases.trajectory_error(way, exact) > 1e-3
