"""Steps a second of `jddim train` and of the same training in PyTorch, interleaved: the MNIST network, batches of 64.

    PYTHONPATH=.:tests python tests/measure_training.py [--rounds 5] [--steps 4] [--dtype float32]

One step: draws, loss, gradients, Adam, the average of the weights; images are in memory. PyTorch's is the reference
network in float32 or bfloat16, in both memory layouts. Prints medians, and the rounds' ratios to jddim's time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from convert.reference.unet import ReferenceUNet
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.schedule import linear_schedule
from jddim.train import step as training
from jddim.train.task import Task, TrainConfig

BATCH = 64
CONFIG = UNetConfig(
    image_size=(28, 28),
    in_channels=1,
    out_channels=1,
    channels=32,
    channel_mults=(1, 2, 2),
    num_res_blocks=1,
    attention_levels=(2,),
)


def ours(dtype: str, images: np.ndarray) -> Callable[[], float]:
    task = Task(CONFIG, ScheduleConfig(), SamplerConfig(), TrainConfig(steps=1000, batch_size=BATCH, dtype=dtype))
    state = training.init_state(task, training.fresh_params(CONFIG, 0))
    step = training.make_train_step(task)
    batch, key = {"images": jax.numpy.asarray(images)}, jax.random.key(0)

    def run() -> float:
        nonlocal state
        state, said = step(state, batch, key)
        return float(said["loss"])

    return run


def theirs(dtype: str, images: np.ndarray, layout: torch.memory_format) -> Callable[[], float]:
    model = ReferenceUNet(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_levels=(2,), in_channels=1, out_ch=1)
    model = model.to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    average = [value.detach().clone() for value in model.parameters()]
    bars = torch.tensor(linear_schedule(1000).alphas_cumprod, dtype=torch.float32)
    x_0 = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)

    def run() -> float:
        t, eps = torch.randint(0, 1000, (BATCH,)), torch.randn_like(x_0)
        a = bars[t][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            output = model(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t)
        loss = (output.float() - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, list(model.parameters()), 1e-3)
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    images = np.random.default_rng(0).uniform(-1, 1, (BATCH, 28, 28, 1)).astype(np.float32)
    runs = {
        "jddim": ours(args.dtype, images),
        "PyTorch eager": theirs(args.dtype, images, torch.contiguous_format),
        "PyTorch eager, channels_last": theirs(args.dtype, images, torch.channels_last),
    }
    for run in runs.values():
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            for _ in range(args.steps):
                run()
            seconds[name].append((time.perf_counter() - started) / args.steps)
    for name, of in seconds.items():
        ratio = np.median(np.divide(of, seconds["jddim"]))
        print(f"{name}: {np.median(of) * 1e3:.0f} ms a step, {ratio:.2f} of jddim's time")


if __name__ == "__main__":
    main()
