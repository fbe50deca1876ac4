"""Writes golden/SOURCE.npz from a source's own code: `source_cases` says what is in it.

    python tests/parity/make_source_golden.py pytorch_ddpm CHECKOUT    # w86763777/pytorch-ddpm at f804ccb

CHECKOUT: the source's files, whose own requirements have to be there. Needs to be run again only if a case changes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from source_cases import GOLDEN, SOURCES, SourceCase, drawn, images


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x.numpy(), -3, -1))


def redrawn(network: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network with every tensor drawn, and its tensors' shapes."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict({name: torch.tensor(drawn(name, shape)) for name, shape in shapes.items()})
    return network.eval().requires_grad_(False), shapes


def pytorch_ddpm(name: str, case: SourceCase) -> dict[str, Any]:
    from diffusion import GaussianDiffusionSampler
    from model import UNet

    network, shapes = redrawn(UNet(**case.network))
    found = {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t))}
    if name == "one block":
        T = case.network["T"]
        betas = float(case.settings["beta_1"]), float(case.settings["beta_T"])
        for var_type in ("fixedlarge", "fixedsmall"):
            sampler = GaussianDiffusionSampler(network, *betas, T, mean_type="epsilon", var_type=var_type)
            noise = iter(nchw(images(case, T, 2, seed=3)))
            torch.randn_like = lambda x, noise=noise: next(noise)
            torch.clip = lambda x, *limits: x  # of the result alone: an untrained network's is far outside
            found[var_type] = sampler(nchw(images(case, 2, seed=2)))
    return found


MAKERS: dict[str, Callable[[str, SourceCase], dict[str, Any]]] = {"pytorch_ddpm": pytorch_ddpm}

if __name__ == "__main__":
    source, checkout = sys.argv[1:]
    sys.path.insert(0, checkout)
    kept: dict[str, Any] = {}
    for name, case in SOURCES[source].items():
        for part, value in MAKERS[source](name, case).items():
            kept[f"{name}/{part}"] = nhwc(value) if isinstance(value, torch.Tensor) else json.dumps(value)
    path = GOLDEN / f"{source}.npz"
    np.savez_compressed(path, **kept)
    print(f"wrote {path.name}, {path.stat().st_size} bytes")
