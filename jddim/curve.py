"""The curve of a schedule as an inline picture, for notebooks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def alpha_bar_curve(alphas_cumprod: NDArray[np.float64], timesteps: ArrayLike = ()) -> str:
    """An SVG of alpha_bar over t, in the colour of the text around it.

    alphas_cumprod: `(T,)`, in [0, 1]. timesteps: integers in 0..T-1, each of which gets a dot.
    """
    T = len(alphas_cumprod)

    def points(t: NDArray[np.int64]) -> list[str]:
        x, y = 40 + 320 * t / max(T - 1, 1), 110 - 100 * alphas_cumprod[t]
        return list(dict.fromkeys(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)))

    every = np.linspace(0, T - 1, min(T, 161)).round().astype(np.int64)
    visited = points(np.asarray(timesteps, np.int64))
    named = [(36, 14, "1"), (36, 114, "0"), (48, 126, "0"), (360, 126, f"t = {T - 1:,}"), (360, 18, "alpha_bar")]
    named += [(360, 34, f"dots: {len(np.unique(timesteps)):,} t of the timetable")] if visited else []
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="end">{text}</text>' for x, y, text in named)
    return (
        '<svg width="380" height="134" viewBox="0 0 380 134" role="img" '
        'aria-label="alpha_bar over t" fill="none" stroke="currentColor">'
        f'<path d="M40 10V110H360" opacity="0.4"/><path d="M{"L".join(points(every))}"/>'
        f'<path d="{"".join(f"M{point}h0" for point in visited)}" stroke-width="5" stroke-linecap="round"/>'
        f'<g fill="currentColor" stroke="none" font-size="11" font-family="sans-serif">{texts}</g></svg>'
    )
