"""Writes assets/digits.npz, which tests/test_digits.py reads: what the judge names 512 digits of each sampler.

    PYTHONPATH=.:tests python tests/measure_digits.py CKPT      (CKPT: the shipped checkpoint, converted; ten minutes)

The PyTorch side is the reference network with the walk-through's loop, its noise drawn by torch: none in common.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import torch

import jddim
from convert.families.ho import reference
from convert.reference import ddim as torch_ddim
from jddim.evaluate import mnist_cnn as classifier
from jddim.schedule import linear_schedule

STEPS, NUM = 30, 512
CKPT = Path(__file__).parent.parent / "scripts" / "assets" / "mnist-ddpm" / "ckpt.pth"


def torch_digits(eta: float, seed: int = 0) -> np.ndarray:
    """`(NUM, 28, 28, 1)` from the PyTorch reference: linspace timetable, x0 clipped."""
    config = jddim.load(sys.argv[1]).model.config
    model = reference(config)
    state = torch.load(CKPT, weights_only=True)[4]  # the EMA's
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(NUM // 64):
        shape = (64, 1, 28, 28)
        x_T = torch.randn(shape, generator=generator)
        noise = torch.randn((STEPS, *shape), generator=generator)
        xs, _ = torch_ddim.ddim_sample(
            model,
            x_T,
            linear_schedule(1000).alphas_cumprod,
            torch_ddim.linspace_timesteps(1000, STEPS),
            eta=eta,
            noise=noise,
        )
        parts.append(xs[-1].numpy().transpose(0, 2, 3, 1))
    return np.concatenate(parts)


def jax_digits(path: str, eta: float, num: int = NUM, seed: int = 0) -> np.ndarray:
    """The same of jddim."""
    ddim = jddim.load(path)
    images = ddim.sample(
        jax.random.key(seed), num, steps=STEPS, spacing="linspace", clip=True, eta=eta, batch_size=min(64, num)
    )
    return np.asarray(images)


def main() -> None:
    judge = classifier.load()
    print(classifier.figures())
    kept = {}
    for eta in (0.0, 1.0):
        for sampler, images in (("torch", torch_digits(eta)), ("jddim", jax_digits(sys.argv[1], eta))):
            probabilities = np.asarray(classifier.predict(judge, images))
            names, confidences = probabilities.argmax(1), probabilities.max(1)
            shares = np.bincount(names, minlength=10) / NUM
            print(f"eta {eta:g} {sampler}: {classifier.confident(probabilities):.4f}, classes {shares.round(3)}")
            kept[f"{sampler}/{eta:g}/names"] = names.astype(np.int8)
            kept[f"{sampler}/{eta:g}/confidences"] = confidences.astype(np.float32)
    np.savez_compressed(Path(__file__).parent / "assets" / "digits.npz", allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
