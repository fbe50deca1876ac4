"""What is on the page as Python, and as a command: both make its images again, up to rounding.

Pictures are the page's downloads: picture.png, mask.png and condition.png. A command that lacks an option that was used
is not written; what it lacks is said instead.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from jddim.pipeline import DDIM
from jddim.run.plan import classes_in_turn
from jddim.run.request import Request
from jddim.serve.request import REFINE, Asked, shape_of


def python(asked: Asked, ddim: DDIM, path: str) -> str:
    """A program whose `x_0` are the images. path: the checkpoint's, from where it will be run."""
    request, num, shape = asked.request, asked.num, shape_of(ddim)
    size, noise = shape[:2], (*ddim.model.config.image_size, ddim.model.config.in_channels)
    elsewhere = ("seed", "dtype")
    how = {name: _written(value) for name, value in _own(request, ddim).asked().items() if name not in elsewhere}
    if asked.label == "each":
        classes = classes_in_turn(ddim, asked.request)
        label = f"i % {len(classes)}"
        label = label if classes == list(range(len(classes))) else f"{classes}[{label}]"
        how["labels"] = f"[{label} for i in range({num})]"
    elif asked.label is not None:
        how["labels"] = f"[{asked.label}] * {num}"
    head, beside = ["import jax", "import jddim"], []
    if asked.condition is not None:
        head = ["import jax", "import jax.numpy as jnp", "import jddim", "from jddim.images import load_images"]
        beside = [f'beside = load_images("condition.png", {size})']
        how["condition"] = f"jnp.repeat(beside, {num}, axis=0)"
    dtype = f", dtype={json.dumps(request.dtype)}" if "dtype" in request.asked() else ""
    load = f"ddim = jddim.load({json.dumps(path)}{dtype})"
    match asked.mode:
        case "strip":
            head.insert(1, "import jax.numpy as jnp")
            how["eta"] = f"jnp.linspace(0, 1, {num})"
            body = [
                f"keys = jnp.stack([jddim.sample_keys(jax.random.key({request.seed}), 1)[0]] * {num})  # one x_T",
                f"x_0 = ddim.sample(keys, {num}, {_listed(how)})",
            ]
        case "grid":
            head.insert(1, "import jax.numpy as jnp")
            how["eta"] = f"jnp.linspace(0, 1, {num})"
            how.pop("steps")
            cells = (-1, *shape)
            body = [
                f"keys = jnp.stack([jddim.sample_keys(jax.random.key({request.seed}), 1)[0]] * {num})  # one x_T",
                f"columns = [ddim.sample(keys, {num}, steps=S, {_listed(how)}) for S in {list(asked.columns)}]",
                f"x_0 = jnp.stack(columns, axis=1).reshape{cells}",
            ]
        case "slerp":
            head.append("from jddim.editing import slerp_line")
            how["eta"] = "0.0"
            body = [
                f"keys = [jddim.sample_keys(jax.random.key(seed), 1) for seed in ({request.seed}, {asked.seed_to})]",
                f"a, b = (jddim.initial_noise(key, {noise})[0] for key in keys)",
                f"x_0 = ddim.sample(x_T=slerp_line(a, b, {num}), {_listed(how)})",
            ]
        case "corners":
            head.append("from jddim.editing import slerp")
            how["eta"] = "0.0"
            down, across = (float(f"{x:.9g}") for x in asked.at)
            body = [
                f"keys = [jddim.sample_keys(jax.random.key(seed), 1) for seed in {asked.corners}]",
                f"a, b, c, d = (jddim.initial_noise(key, {noise}) for key in keys)  # by row",
                f"x_T = slerp(slerp(a, c, {down}), slerp(b, d, {down}), {across})",
                f"x_0 = ddim.sample(x_T=x_T, {_listed(how)})",
            ]
        case "invert":
            head.insert(1, "import jax.numpy as jnp")
            head.append("from jddim.images import load_images")
            up = {name: value for name, value in how.items() if name not in ("eta", "variance")}
            up |= {"labels": f"[{asked.label}]"} if "labels" in up else {}
            up |= {"condition": "beside"} if beside else {}
            how["eta"] = f"jnp.linspace(0, 1, {num})"
            body = [
                f'picture = load_images("picture.png", {size})',
                f"x_T = ddim.invert(picture, refine={REFINE}, {_listed(up)})",
                f"x_T = jnp.repeat(x_T, {num}, axis=0)",
                f"x_0 = ddim.sample(jax.random.key({request.seed}), x_T=x_T, {_listed(how)})",
            ]
        case "inpaint":
            head.append("from jddim.images import load_images")
            body = [
                f'known = load_images("picture.png", {size})  # as often as there are images',
                f'mask = load_images("mask.png", {size})[0]',
                f"x_0 = ddim.edit(known, jax.random.key({request.seed}), mask=mask, {_listed(how)})",
            ]
        case _:
            body = [f"x_0 = ddim.sample(jax.random.key({request.seed}), {num}, {_listed(how)})"]
    return "\n".join([*dict.fromkeys(head), "", load, *beside, *body]) + "\n"


def command(asked: Asked, ddim: DDIM, path: str) -> tuple[str | None, str | None]:
    """(the command, None), or (None, why there is none)."""
    request, num = _own(asked.request, ddim), asked.num
    if asked.label is not None:
        request = dataclasses.replace(request, labels="balanced" if asked.label == "each" else str(asked.label))
    match asked.mode:
        case "strip" | "grid":
            etas = ",".join(f"{i / (num - 1):.9g}" for i in range(num))
            steps = ",".join(map(str, asked.columns or [request.steps]))
            name, words = "sweep", [f"{asked.mode}.png", "--eta", etas, "--num", "1", "--steps", steps]
        case "slerp":
            request = dataclasses.replace(request, seed=0, eta=None)
            seeds = f"{asked.request.seed},{asked.seed_to}"
            name, words = "interpolate", ["line.png", "--seeds", seeds, "--num", str(num)]
        case "corners":
            return None, "jddim interpolate --seeds A,B,C,D draws the whole square; the Python draws the point"
        case "invert":
            if num > 1:
                return None, "jddim invert leads back to one image, at eta 0; ask for 1 image, or take the Python"
            words = ["picture.png", "x_T.npy", "--refine", str(REFINE), "--reconstruct", "again.png"]
            name = "invert"
        case "inpaint":
            name, words = "edit", ["picture.png", "filled.png", "--mask", "mask.png"]
        case _:
            name, words = "sample", ["images.png", "--num", str(num)]
    words += ["--condition", "condition.png"] if asked.condition is not None else []
    return shlex.join(["jddim", name, path, *words, *request.words(name)]), None


def _own(request: Request, ddim: DDIM) -> Request:
    """The request without what the checkpoint says itself."""
    return dataclasses.replace(request, spacing=None) if request.spacing == ddim.sampler.spacing else request


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _listed(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())
