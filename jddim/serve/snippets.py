"""What is on the page as Python, and as a command: both make its images again, up to rounding.

Pictures and masks are the page's downloads, picture.png and mask.png. A command that lacks an option that was used is
not written; what it lacks is said instead.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from jddim.pipeline import DDIM
from jddim.serve.request import REFINE, Asked, classes_in_turn


def python(request: Asked, ddim: DDIM, path: str) -> str:
    """A program whose `x_0` are the images. path: the checkpoint's, from where it will be run."""
    how = _arguments(request, ddim)
    config = ddim.model.config
    seed, num = request.seed, request.num
    head, size = ["import jax", "import jddim"], config.image_size
    load = f"ddim = jddim.load({json.dumps(path)})"
    etas = {"strip": f"jnp.linspace(0, 1, {num})", "invert": f"jnp.linspace(0, {request.eta!r}, {num})"}
    match request.mode:
        case "strip":
            head.insert(1, "import jax.numpy as jnp")
            how["eta"] = etas["strip"]
            body = [
                f"keys = jnp.stack([jddim.sample_keys(jax.random.key({seed}), 1)[0]] * {num})  # one x_T, one noise",
                f"x_0 = ddim.sample(keys, {num}, {_listed(how)})",
            ]
        case "slerp":
            head.append("from jddim.editing import slerp_line")
            how["eta"] = "0.0"
            body = [
                f"keys = [jddim.sample_keys(jax.random.key(seed), 1) for seed in ({seed}, {request.seed_to})]",
                f"a, b = (jddim.initial_noise(key, {(*size, config.in_channels)})[0] for key in keys)",
                f"x_0 = ddim.sample(x_T=slerp_line(a, b, {num}), {_listed(how)})",
            ]
        case "invert":
            head.insert(1, "import jax.numpy as jnp")
            head.append("from jddim.images import load_images")
            up = {name: value for name, value in how.items() if name != "eta"}
            if "labels" in up:
                up["labels"] = f"[{0 if request.label == 'each' else request.label}]"
            how["eta"] = etas["invert"]
            body = [
                f'picture = load_images("picture.png", {size})',
                f"x_T = ddim.invert(picture, refine={REFINE}, {_listed(up)})",
                f"x_T = jnp.repeat(x_T, {num}, axis=0)",
                f"x_0 = ddim.sample(jax.random.key({seed}), x_T=x_T, {_listed(how)})",
            ]
        case "inpaint":
            head.insert(1, "import jax.numpy as jnp")
            head += ["from jddim.editing import inpaint_loop, keep_of", "from jddim.images import load_images"]
            labels = how.get("labels", "")
            body = [
                f'known = load_images("picture.png", {size})  # as often as there are images',
                f'mask = load_images("mask.png", {size})',
                "keep = keep_of(mask[0])",
                f"keys = jddim.sample_keys(jax.random.key({seed}), len(known))",
                "x_T = jddim.initial_noise(keys, known.shape[1:])",
                f"table = ddim.table({request.steps}, {json.dumps(request.spacing)})",
                f"how = dict(eta={request.eta!r}, key=keys, **ddim.conventions())",
                f"x_0 = inpaint_loop(ddim.denoiser({labels}), x_T, table, jnp.asarray(known), keep, **how)",
            ]
        case _:
            body = [f"x_0 = ddim.sample(jax.random.key({seed}), {num}, {_listed(how)})"]
    return "\n".join([*head, "", load, *body]) + "\n"


def command(request: Asked, ddim: DDIM, path: str) -> tuple[str | None, str | None]:
    """(the command, None), or (None, why there is none)."""
    options: list[Any] = ["--steps", request.steps]
    if request.spacing != ddim.sampler.spacing:
        options += ["--spacing", request.spacing]
    if request.label is not None:
        options += ["--labels", f"0:{classes_in_turn(ddim)}" if request.label == "each" else request.label]
    guidance: list[Any] = []
    if request.guidance_scale is not None:
        guidance = ["--guidance-scale", repr(request.guidance_scale), "--null-label", request.null_label]
    seed = ["--seed", request.seed]
    match request.mode:
        case "strip":
            etas = ",".join(f"{i / (request.num - 1):.9g}" for i in range(request.num))
            if request.label == "each":
                return None, "the rows of jddim sweep have the same labels; Python can give each image its own"
            words = ["sweep", path, "strip.png", "--eta", etas, "--num", 1, *seed]
        case "slerp":
            words = ["interpolate", path, "line.png", "--seeds", f"{request.seed},{request.seed_to}"]
            words += ["--num", request.num]
        case "invert":
            if request.num > 1 and request.eta:
                return None, "jddim invert leads back at eta 0 alone; Python at any"
            if request.label == "each":
                options[options.index("--labels") + 1] = 0
            words = ["invert", path, "picture.png", "x_T.npy", "--refine", REFINE, "--reconstruct", "again.png"]
        case "inpaint":
            words = ["edit", path, "picture.png", "filled.png", "--mask", "mask.png", "--eta", repr(request.eta), *seed]
        case _:
            how = ["--eta", repr(request.eta)] if request.method == "ddim" else ["--method", request.method]
            words = ["sample", path, "images.png", "--num", request.num, *seed, *how]
    return shlex.join(["jddim", *map(str, [*words, *options, *guidance])]), None


def _arguments(request: Asked, ddim: DDIM) -> dict[str, str]:
    """What all methods of DDIM take, as Python."""
    how = {"steps": repr(request.steps)}
    if request.spacing != ddim.sampler.spacing:
        how["spacing"] = json.dumps(request.spacing)
    if request.method == "ddim":
        how["eta"] = repr(request.eta)
    else:
        how["method"] = json.dumps(request.method)
    if request.label == "each":
        how["labels"] = f"[i % {classes_in_turn(ddim)} for i in range({request.num})]"
    elif request.label is not None:
        how["labels"] = f"[{request.label}] * {request.num}"
    if request.guidance_scale is not None:
        how |= {"guidance_scale": repr(request.guidance_scale), "null_label": repr(request.null_label)}
    return how


def _listed(arguments: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())
