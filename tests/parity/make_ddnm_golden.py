"""Writes golden/ddnm.npz from the DDNM authors' own loop: python tests/parity/make_ddnm_golden.py CHECKOUT

CHECKOUT: wyhuai/DDNM at 00b58ea. Their `ddnm_diffusion` and operators of functions/, on the CPU, in float64, with the
network `ddnm_cases.eps` in place of theirs and its noise drawn beforehand. To be run again only if a case changes.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ddnm_cases import CASES, GOLDEN, KERNEL, STEPS, S, T, drawn, eps


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def main(checkout: Path) -> None:
    for name in ("torchvision", "torchvision.utils", "cv2"):  # imported there, and not used by these
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].utils = sys.modules["torchvision.utils"]  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    torch.set_default_dtype(torch.float64)
    loop, operators = (importlib.import_module(f"functions.{name}") for name in ("svd_ddnm", "svd_operators"))
    # Of three channels their Vt has a number's channels side by side, their singular values one channel after the
    # other: each is put to its own number here, or the operator is no blur.
    operators.Deblurring.singulars = lambda self: self._singulars.repeat_interleave(3)
    operators.Deblurring.A_pinv = operators.A_functions.A_pinv
    to, drawing = torch.Tensor.to, iter(())
    torch.Tensor.to = lambda x, *where: x if where == ("cuda",) else to(x, *where)  # type: ignore[method-assign]
    torch.randn_like = lambda x: next(drawing)  # type: ignore[assignment]

    x_T, image, noise, keep = drawn()
    missing = torch.nonzero(torch.tensor(keep.reshape(-1) == 0)).reshape(-1) * 3
    theirs: dict[str, Any] = {
        "inpainting": operators.Inpainting(3, S, torch.cat([missing, missing + 1, missing + 2]), "cpu"),
        "average_pooling": operators.SuperResolution(3, S, 2, "cpu"),
        "channel_mix": operators.Colorization(S, "cpu"),
        "blur": operators.Deblurring(torch.tensor(KERNEL), 3, S, "cpu"),
    }
    stop = types.SimpleNamespace
    config = stop(
        diffusion=stop(num_diffusion_timesteps=T), time_travel=stop(T_sampling=STEPS, travel_length=1, travel_repeat=1)
    )
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    made = {}
    for operator, eta in CASES:
        A = theirs[operator]
        y = A.A(nchw(image))
        drawing = iter([nchw(z) for z in noise])

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return nchw(eps(np, nhwc(x_t), t.numpy()))

        (x_0,), _ = loop.ddnm_diffusion(nchw(x_T), network, betas, eta, A, y, config=config)
        made[f"{operator}/{eta}"] = nhwc(x_0)
    made["blur_matrix"] = (
        theirs["blur"].U_small @ torch.diag(theirs["blur"].singulars_small_orig) @ theirs["blur"].V_small.T
    )
    np.savez_compressed(GOLDEN, **{name: np.asarray(value) for name, value in made.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
