"""An atlas of a sampler: rows eta, columns S, in each cell images, what they cost, and how far they are from data.

`survey` makes the cells, `picture` and `page` show them, as one PNG or as one HTML file that needs no other.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jddim.images import grid, labelled
from jddim.pipeline import DDIM
from jddim.scale.sweeping import sweep


class Column(NamedTuple):
    """One S. steps: the table's length, so the evaluations an image takes. images: `(E, num, h, w, c)`.

    seconds: an image's, measured without compiling. distances: one for each eta, or None.
    """

    steps: int
    images: NDArray[np.float32]
    seconds: float
    distances: list[float] | None


def survey(
    ddim: DDIM,
    key: Array,
    num: int,
    etas: Sequence[float],
    steps: int,
    *,
    rows_at_once: int | None = None,
    distance: Callable[[NDArray[np.float32]], float] | None = None,
    **options: Any,
) -> Column:
    """The column of S = `steps`: a `sweep`, of which the first `rows_at_once` etas run again for the clock.

    distance: of images `(num, h, w, c)` from the data. The options and what raises are `jddim.scale.sweeping.sweep`'s.
    """
    made = np.asarray(sweep(ddim, key, num, np.asarray(etas), steps=steps, rows_at_once=rows_at_once, **options))
    again = np.asarray(etas)[: rows_at_once or len(etas)]
    start = time.perf_counter()
    options["progress"] = False
    jax.block_until_ready(sweep(ddim, key, num, again, steps=steps, rows_at_once=rows_at_once, **options))
    seconds = (time.perf_counter() - start) / (len(again) * num)
    distances = None if distance is None else [distance(images) for images in made]
    return Column(ddim.table(steps, options.get("spacing")).num_steps, made, seconds, distances)


def captions(column: Column, name: str | None) -> list[str]:
    """What is written under each of a column's cells. name: of the distance."""
    if column.distances is None:
        return [""] * len(column.images)
    return [f"{name} {distance:.3g}" for distance in column.distances]


def heading(column: Column) -> str:
    """What stands over a column."""
    return f"S {column.steps}: {column.steps} evaluations, {column.seconds:.3g} s an image"


def picture(columns: Sequence[Column], etas: Sequence[float], name: str | None, show: int = 8) -> NDArray[np.uint8]:
    """The atlas `(H, W, c)`, uint8, with `show` images a cell."""
    size = 20
    font = ImageFont.load_default(size)
    parts = []
    for column in columns:
        cells = [grid(images[:show], columns=_across(images[:show])) for images in column.images]
        texts = [heading(column), *captions(column, name)]
        width = max(cells[0].shape[1], math.ceil(max(map(font.getlength, texts))) + 2) + size
        over = _written(texts[0], font, width, cells[0].shape[2])
        rows = []
        for cell, text in zip(cells, texts[1:], strict=True):
            beside = np.full((cell.shape[0], width - cell.shape[1], cell.shape[2]), 255, np.uint8)
            rows.append(np.concatenate([cell, beside], axis=1))
            if name is not None:
                rows.append(_written(text, font, width, cell.shape[2]))
        parts.append((over, np.concatenate(rows)))
    body = labelled(np.concatenate([part for _, part in parts], axis=1), [f"eta {eta:g}" for eta in etas])
    over = np.concatenate([over for over, _ in parts], axis=1)
    corner = np.full((over.shape[0], body.shape[1] - over.shape[1], over.shape[2]), 255, np.uint8)
    return np.concatenate([np.concatenate([corner, over], axis=1), body])


def page(
    columns: Sequence[Column],
    etas: Sequence[float],
    name: str | None,
    settings: Mapping[str, Any],
    show: int = 8,
) -> str:
    """The atlas as HTML, with its pictures inside it; nothing is fetched from anywhere.

    settings: what it was made with, shown beneath.
    """
    head = "".join(f"<th>{html.escape(heading(column))}</th>" for column in columns)
    texts = [captions(column, name) for column in columns]
    rows = []
    for i, eta in enumerate(etas):
        cells = []
        for column, text in zip(columns, texts, strict=True):
            shown = column.images[i][:show]
            sheet = grid(shown, columns=_across(shown), side=64)  # several cells side by side fit a screen
            cells.append(
                f'<td><img src="{_data_uri(sheet)}" width="{sheet.shape[1]}" height="{sheet.shape[0]}" '
                f'alt="S {column.steps}, eta {eta:g}"><br>{html.escape(text[i])}</td>'
            )
        rows.append(f"<tr><th>eta {eta:g}</th>{''.join(cells)}</tr>")
    listed = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(_shown(v))}</td></tr>" for k, v in settings.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>jddim sweep</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2em; color: #222; background: #fff }}
th, td {{ padding: 0.3em 0.8em 0.6em 0; text-align: left; vertical-align: top; font-weight: normal }}
img {{ image-rendering: pixelated }}
table.settings td {{ padding: 0 1em 0 0; color: #666 }}
</style>
</head>
<body>
<table>
<tr><th></th>{head}</tr>
{chr(10).join(rows)}
</table>
<p>Every cell is drawn from the same x_T and noise. Seconds are without compiling, of all rows at once.</p>
<table class="settings">{listed}</table>
</body>
</html>
"""


def _across(images: NDArray[np.float32]) -> int:
    """Images in a cell's row: four by two, not three by three with a hole."""
    return math.ceil(math.sqrt(2 * len(images)))


def _written(text: str, font: Any, width: int, channels: int) -> NDArray[np.uint8]:
    """A line of text `(h, width, channels)`."""
    line = Image.new("L", (width, round(1.6 * font.size)), 255)
    ImageDraw.Draw(line).text((2, line.height / 2), text, fill=0, font=font, anchor="lm")
    return np.repeat(np.asarray(line)[..., None], channels, axis=2)


def _data_uri(sheet: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
