"""What golden/ddnm.npz holds: runs of the DDNM authors' loop by operator and eta, from arrays that are drawn here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "ddnm.npz"
T, STEPS, S = 1000, 10, 14
KERNEL = [0.1, 0.25, 0.3, 0.2, 0.15]
GREY = (0.3333, 0.3334, 0.3333)  # the source's
CASES = [(name, eta) for name in ("inpainting", "average_pooling", "channel_mix", "blur") for eta in (0.0, 0.85)]


def drawn() -> tuple[np.ndarray, ...]:
    """x_T and an image `(2, S, S, 3)`, a noise for each step, and which pixels are kept `(S, S, 1)`. float64."""
    rng = np.random.default_rng(7)
    x_T, image = rng.standard_normal((2, 2, S, S, 3))
    keep = (rng.uniform(size=(S, S, 1)) < 0.6).astype(np.float64)
    return x_T, np.clip(image, -1, 1), rng.standard_normal((STEPS, 2, S, S, 3)), keep


def eps(np_like: Any, x_t: Any, t: Any) -> Any:
    """In place of a network: something of x_t's neighbours, channels and t. t: `(b,)`."""
    mixed = np_like.roll(x_t, 1, axis=1) + 0.5 * np_like.roll(x_t, -1, axis=2) - 0.3 * x_t[..., ::-1]
    return np_like.tanh(x_t + 0.3 * mixed + t.reshape(-1, 1, 1, 1) / T)
