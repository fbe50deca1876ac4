"""Pictures as text: two pixels a character, in the colours of a terminal that has 24 bits of them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from jddim.images import to_uint8

UPPER_HALF = "▀"
RESET = "\x1b[0m"


def blocks(images: ArrayLike, width: int) -> str:
    """As many of `images` `(n, h, w, c)`, [-1, 1], c 1 or 3, as stand side by side in `width` characters.

    A character is one pixel wide and two high. A picture wider than `width` is drawn smaller, every k-th pixel of it.
    """
    pixels = to_uint8(images)
    every = math.ceil(pixels.shape[2] / max(width, 1))
    pixels = np.broadcast_to(pixels[:, ::every, ::every], (*pixels[:, ::every, ::every].shape[:3], 3))
    fit = max((width + 1) // (pixels.shape[2] + 1), 1)  # with a column between two
    pixels = pixels[:fit]
    if pixels.shape[1] % 2:
        pixels = np.pad(pixels, ((0, 0), (0, 1), (0, 0), (0, 0)))
    lines = []
    for top in range(0, pixels.shape[1], 2):
        parts = []
        for upper, lower in zip(pixels[:, top], pixels[:, top + 1], strict=True):
            cells = [f"\x1b[38;2;{_rgb(u)};48;2;{_rgb(v)}m{UPPER_HALF}" for u, v in zip(upper, lower, strict=True)]
            parts.append("".join(cells) + RESET)
        lines.append(" ".join(parts))
    return "\n".join(lines)


def _rgb(pixel: np.ndarray) -> str:
    return ";".join(str(int(value)) for value in pixel)
