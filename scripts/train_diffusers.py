"""Trains a class-conditional DDPM in PyTorch, with diffusers' UNet2DModel, and writes a DDIMPipeline's folder.

    python scripts/train_diffusers.py scripts/emoji.json DATA/train.npz OUT    # DATA: scripts/emoji_data.py
    jddim convert OUT emoji

What `jddim train` does, where PyTorch is faster: on a CPU it takes a kernel's gradient in a quarter of XLA's time. The
loss is min-SNR's of v (arXiv:2303.09556, arXiv:2202.00512), the result the running average of the weights.
The configuration has three sections: the arguments of UNet2DModel and of DDIMScheduler, and `train` (see Recipe).

OUT.pt is the state of the run, written every --save-every steps, at the end, and on Ctrl-C or SIGTERM: the same command
goes on. The learning rate falls only in the last steps, so more `steps` may be asked for before these begin. OUT.jsonl
is the log.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from jddim.cli.options import OneLineParser
from jddim.config import from_json
from jddim.evaluate.mnist_cnn import read_mnist


@dataclass(frozen=True)
class Recipe:
    """steps: of `batch_size` images. The learning rate rises over `warmup_steps` and falls over the last `decay_steps`.

    label_dropout: the share of labels that become the null label, the last class, for classifier-free guidance.
    ema_decay: of the weights' average: min(ema_decay, (1 + n) / (10 + n)) at step n. gamma: min-SNR's.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 300
    decay_steps: int = 1500
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    gamma: float = 5.0
    label_dropout: float = 0.1
    seed: int = 0

    def lr_at(self, step: int) -> float:
        return self.lr * max(0.0, min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps))


def read(data: Path) -> tuple[Tensor, Tensor]:
    """Images, `(n, c, h, w)` uint8, and labels, `(n,)` int64, of an .npz, or of a folder with MNIST's training part."""
    if data.is_dir():
        images, labels = read_mnist(data, "train")
        pixels = ((images + 1) * 127.5).round().astype(np.uint8)
    else:
        with np.load(data) as arrays:
            pixels, labels = arrays["arr_0"], arrays["arr_1"]
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def loss_of(unet: Any, recipe: Recipe, acp: Tensor, x0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """min-SNR's loss of v, min(SNR, gamma) / (SNR + 1) times the squared error, over a batch. acp: `(T,)`."""
    n = len(x0)
    t = torch.randint(len(acp), (n,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    dropped = torch.rand(n, generator=generator) < recipe.label_dropout
    labels = torch.where(dropped, unet.config.num_class_embeds - 1, labels)
    alpha, sigma = acp[t].sqrt()[:, None, None, None], (1 - acp[t]).sqrt()[:, None, None, None]
    x_t, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x_t.contiguous(memory_format=torch.channels_last), t, labels).sample
    snr = acp[t] / (1 - acp[t])
    weight = snr.clamp(max=recipe.gamma) / (snr + 1)
    return (weight * ((out.float() - v) ** 2).mean((1, 2, 3))).mean()


def train(
    config: dict[str, Any], recipe: Recipe, data: Path, out: Path, begin: Path | None, log_every: int, save_every: int
) -> int:
    torch.manual_seed(recipe.seed)
    unet: Any = UNet2DModel(**config["unet"]).to(memory_format=torch.channels_last)
    if begin is not None:
        unet.load_state_dict(UNet2DModel.from_pretrained(begin, subfolder="unet").state_dict())
    average = copy.deepcopy(unet).requires_grad_(False)
    scheduler = DDIMScheduler(**config["scheduler"])
    optimizer = torch.optim.Adam(unet.parameters(), lr=recipe.lr)
    pixels, digits = read(data)
    state_file, log = (out.parent / f"{out.name}{suffix}" for suffix in (".pt", ".jsonl"))
    begun = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["step"]
    print(f"{unet.num_parameters():,} parameters, {len(pixels):,} images, from step {begun}", flush=True)

    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))

    def save(step: int) -> None:
        parts = {"unet": unet, "average": average, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, f"{state_file}.new")
        os.replace(f"{state_file}.new", state_file)

    since, losses = time.perf_counter(), []
    for step in range(begun, recipe.steps):
        # Of the step alone, so that a run in parts draws what a whole one does.
        generator = torch.Generator().manual_seed(recipe.seed * 2**32 + step)
        rows = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        x0 = pixels[rows].float() / 127.5 - 1
        optimizer.param_groups[0]["lr"] = recipe.lr_at(step)
        loss = loss_of(unet, recipe, scheduler.alphas_cumprod, x0, digits[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), recipe.clip_norm, error_if_nonfinite=True)
        optimizer.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), unet.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        losses.append(float(loss.detach()))
        last = step + 1 == recipe.steps
        if len(losses) == log_every or last or stopped:
            speed = recipe.batch_size * len(losses) / (time.perf_counter() - since)
            said = {"step": step + 1, "loss": sum(losses) / len(losses), "images_per_s": round(speed, 1)}
            print(json.dumps(said), flush=True)
            with log.open("a") as lines:
                lines.write(json.dumps(said) + "\n")
            since, losses = time.perf_counter(), []
        if (step + 1) % save_every == 0 or last or stopped:
            save(step + 1)
        if stopped:
            return 128 + stopped[0]
    DDIMPipeline(average.to(memory_format=torch.contiguous_format), scheduler).save_pretrained(out)
    print(f"wrote {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="train_diffusers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="unet, scheduler and train")
    parser.add_argument(
        "data", type=Path, help="an .npz with arr_0 (n, h, w, c) uint8 and arr_1, or a folder of MNIST's"
    )
    parser.add_argument("out", type=Path, help="the pipeline's folder; OUT.pt and OUT.jsonl lie beside it")
    parser.add_argument("--begin", type=Path, metavar="PIPELINE", help="a folder whose weights a new run starts from")
    parser.add_argument("--steps", type=int, help="in place of the configuration's")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args(argv)
    try:
        config = json.loads(args.config.read_text())
        if set(config) != {"unet", "scheduler", "train"}:
            raise ValueError(f"{args.config} must have the sections unet, scheduler and train, got {', '.join(config)}")
        recipe = from_json(Recipe, config["train"] | ({} if args.steps is None else {"steps": args.steps}))
        return train(config, recipe, args.data, args.out, args.begin, args.log_every, args.save_every)
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    raise SystemExit(main())
