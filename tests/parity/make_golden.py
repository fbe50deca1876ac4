"""Writes golden/spine.npz: a small redrawn PyTorch network and what the PyTorch reference makes of it.

    python tests/parity/make_golden.py

`test_golden.py` holds jddim to it where there is no torch, and, where there is, the reference to it. Needs to be run
again only if the reference is meant to give other numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.families.ho import reference
from jddim.config import UNetConfig
from jddim.schedule import linear_schedule
from jddim.timesteps import linspace_timesteps

PATH = Path(__file__).parent / "golden" / "spine.npz"

# Every kind of tensor that the rename table knows: both shortcuts' places, resampling, attention on both sides. Widths
# of 4 and 8, so that no two axes of a kernel are alike; one group, which keeps an untrained network's slope small
# enough to sample it (a group of one or two channels can have almost no variance to divide by).
CONFIG = UNetConfig(
    (4, 6), 2, 2, channels=4, channel_mults=(1, 2), num_res_blocks=1, attention_levels=(1,), norm_groups=1
)
T, S = 300, 7
TIMES = (0, 150, 299)  # of the network's own comparison
ETAS = (0.0, 0.7)
CLIPS: dict[str, tuple[float, float] | None] = {"clip": (-1.0, 1.0), "free": None}
WEIGHT = "weight/"  # prefix of the state dict's names in the file


def draw_inputs() -> dict[str, np.ndarray]:
    """x_T `(b, h, w, c)` and the noise of each step `(S, b, h, w, c)`, standard normal, and the state dict."""
    from convert.reference.unet import redraw_

    model = reference(CONFIG)
    redraw_(model, seed=31)
    rng = np.random.default_rng(37)
    shape = (len(TIMES), *CONFIG.image_size, CONFIG.in_channels)
    return {
        "x_T": rng.standard_normal(shape, np.float32),
        "noise": rng.standard_normal((S, *shape), np.float32),
        **{WEIGHT + name: tensor.numpy() for name, tensor in model.state_dict().items()},
    }


def compute_outputs(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the reference makes of them: `eps` at TIMES, and for each eta and clip `x_t` and `x0_hat` of every step."""
    import torch

    from convert.reference.ddim import ddim_sample

    def nchw(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3)))

    def nhwc(x: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(x.numpy(), -3, -1))

    model = reference(CONFIG).eval().requires_grad_(False)
    weights = {name.removeprefix(WEIGHT): value for name, value in inputs.items() if name.startswith(WEIGHT)}
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    x_T, noise = nchw(inputs["x_T"]), nchw(inputs["noise"])
    outputs = {"eps": nhwc(model(x_T, torch.tensor(TIMES)))}
    for eta in ETAS:
        for name, clip in CLIPS.items():
            timesteps = linspace_timesteps(T, S).tolist()
            x_t, x0_hat = ddim_sample(
                model, x_T, linear_schedule(T).alphas_cumprod, timesteps, eta=eta, noise=noise, clip=clip
            )
            outputs[f"x_t/{eta}/{name}"] = np.stack([nhwc(x) for x in x_t])
            outputs[f"x0_hat/{eta}/{name}"] = np.stack([nhwc(x) for x in x0_hat])
    return outputs


if __name__ == "__main__":
    inputs = draw_inputs()
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **inputs, **compute_outputs(inputs))  # type: ignore[arg-type]
    print(f"wrote {PATH.name}, {PATH.stat().st_size} bytes")
