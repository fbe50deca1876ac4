"""What the page asks for: one frozen dataclass, made from JSON that anyone may have sent, with everything bounded.

A request names a checkpoint among those served, never a file; pictures come as their pixels.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim import editing
from jddim.config import did_you_mean
from jddim.images import from_uint8
from jddim.pipeline import DDIM
from jddim.scale.stepping import Between, Inversion, Inverted, Sampling
from jddim.timesteps import SPACINGS

MODES = ("sample", "strip", "slerp", "invert", "inpaint")
REFINE = 1
"""More evaluations a step of inversion (`jddim.inversion.invert_loop`); part of its compiled program."""


class Refused(ValueError):
    """A request that is not granted. fields: what is wrong, by the name of the control that says it."""

    def __init__(self, fields: Mapping[str, str]):
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in fields.items()))
        self.fields = dict(fields)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a request may ask for at most. steps: rows of the table. num: images."""

    steps: int = 250
    num: int = 16


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run of the page. `parse` makes it of JSON.

    mode: "sample"; "strip", one x_T at `num` etas from 0 to 1; "slerp", `num` noises from `seed`'s first to
    `seed_to`'s; "invert", `picture` to its x_T and back at `num` etas from 0 to `eta`; "inpaint", `picture` made anew
    where `mask` is white. label: one for all images, or "each": 0, 1, 2, ... over and over.
    picture: uint8 `(h, w, c)`; mask: uint8 `(h, w, 1)`; as bytes, so that requests compare.
    """

    checkpoint: str
    mode: str = "sample"
    method: str = "ddim"
    steps: int = 20
    eta: float = 0.0
    spacing: str = "linspace"
    seed: int = 0
    seed_to: int = 1
    num: int = 4
    label: int | str | None = None
    guidance_scale: float | None = None
    null_label: int | None = None
    picture: bytes | None = None
    mask: bytes | None = None


def parse(data: Any, served: Mapping[str, DDIM], methods: Mapping[str, Sequence[str]], bounds: Bounds) -> Asked:
    """The request that JSON says. methods: those of each checkpoint. Raises Refused, with everything wrong."""
    if not isinstance(data, dict):
        raise Refused({"request": f"must be a JSON object, got {_shown(data)}"})
    problems: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(Asked)}
    for key in sorted(data.keys() - names)[:5]:
        problems[_shown(key)] = f"unknown{did_you_mean(str(key)[:40], names)}"

    def choice(name: str, allowed: Sequence[str], default: str) -> str:
        value = data.get(name, default)
        if value not in allowed or not isinstance(value, str):
            problems[name] = f"must be one of {', '.join(allowed)}; got {_shown(value)}"
            return default
        return value

    def number(name: str, low: float, high: float, default: Any, *, whole: bool = True) -> Any:
        value = data.get(name, default)
        kinds = (int,) if whole else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool)
        if not good or not low <= value <= high:  # NaN neither
            what = "a whole number" if whole else "a number"
            problems[name] = f"must be {what} in {low:g}..{high:.10g}, got {_shown(value)}"
            return default
        return value if whole else float(value)

    checkpoint = choice("checkpoint", tuple(served), next(iter(served)))
    ddim = served[checkpoint]
    config, sampler = ddim.model.config, ddim.sampler
    mode = choice("mode", MODES, "sample")
    method = choice("method", methods[checkpoint], "ddim")
    if mode != "sample" and method != "ddim":
        problems["method"] = f"mode {mode} is DDIM's: take ddim, got {method}"
    T = ddim.schedule.num_train_timesteps
    asked: dict[str, Any] = {
        "checkpoint": checkpoint,
        "mode": mode,
        "method": method,
        "steps": number("steps", 1, min(bounds.steps, T), min(20, T)),
        "eta": number("eta", 0, 10, 0.0, whole=False),
        "spacing": choice("spacing", spacings(ddim), spacings(ddim)[0]),
        "seed": number("seed", 0, 2**32 - 1, 0),
        "seed_to": number("seed_to", 0, 2**32 - 1, 1),
        "num": number("num", 2 if mode in ("strip", "slerp") else 1, bounds.num, min(4, bounds.num)),
    }
    if method != "ddim" and asked["eta"]:
        problems["eta"] = f"eta is DDIM's; method {method} takes none: 0, got {_shown(data.get('eta'))}"
    asked |= _classes(data, ddim, number, problems)
    if mode == "inpaint" and asked["guidance_scale"] is not None:
        problems["guidance_scale"] = "inpainting goes without guidance here"
    if mode in ("invert", "inpaint"):
        asked["picture"] = _pixels(data, "picture", (*config.image_size, config.in_channels), problems)
    if mode == "inpaint":
        asked["mask"] = _pixels(data, "mask", (*config.image_size, 1), problems)
        if asked["mask"] is not None and not any(asked["mask"]):
            problems["mask"] = "is empty: paint where the picture is to be made anew"
    if mode == "invert" and sampler.self_condition:
        problems["mode"] = "this network is self-conditioned, and cannot be inverted"
    if problems:
        raise Refused(problems)
    request = Asked(**asked)
    _check_table(ddim, request, bounds)
    return request


def spacings(ddim: DDIM) -> tuple[str, ...]:
    """The named timetables, the checkpoint's own first."""
    own = ddim.sampler.spacing
    return (*([own] if own in SPACINGS else []), *(name for name in SPACINGS if name != own))


def classes_in_turn(ddim: DDIM) -> int | None:
    """How many classes "each" goes through: all, but for a last one that means no label."""
    classes = ddim.model.config.num_classes
    return classes - 1 if classes is not None and ddim.null_label == classes - 1 else classes


def labels_of(request: Asked, num_classes: int | None) -> NDArray[np.int32] | None:
    """One label an image."""
    if request.label is None:
        return None
    if request.label == "each":
        return np.resize(np.arange(num_classes or 1, dtype=np.int32), request.num)
    return np.full(request.num, request.label, np.int32)


def etas_of(request: Asked) -> Any:
    """Eta of each image, or of all."""
    if request.mode == "strip":
        return np.linspace(0, 1, request.num)
    if request.mode == "invert":
        return np.linspace(0, request.eta, request.num)
    return request.eta if request.method == "ddim" and request.mode != "slerp" else 0.0


def picture_of(request: Asked, ddim: DDIM) -> NDArray[np.float32]:
    """The picture `(h, w, c)` in [-1, 1]."""
    config = ddim.model.config
    pixels = np.frombuffer(request.picture or b"", np.uint8)
    return from_uint8(pixels.reshape(*config.image_size, config.in_channels))


def keep_of(request: Asked, ddim: DDIM) -> NDArray[np.float32]:
    """What `jddim edit --mask` makes of the mask: `(h, w, 1)`, 1 where the picture stays."""
    pixels = np.frombuffer(request.mask or b"", np.uint8).reshape(*ddim.model.config.image_size, 1)
    return editing.keep_of(from_uint8(pixels))


def run_of(request: Asked, ddim: DDIM) -> Sampling | Between | Inverted:
    """The run of a request. Raises Refused for what only the table tells."""
    strip = request.mode == "strip"
    labels = labels_of(request, classes_in_turn(ddim))
    guidance: dict[str, Any] = {"guidance_scale": request.guidance_scale, "null_label": request.null_label}
    table: dict[str, Any] = {"steps": request.steps, "spacing": request.spacing}
    inpainting: dict[str, Any] = {}
    if request.mode == "inpaint":
        inpainting = {"known": picture_of(request, ddim), "keep": keep_of(request, ddim)}
    try:
        sampling = Sampling(
            ddim,
            request.seed,
            np.zeros(request.num) if strip else np.arange(request.num),
            method=request.method,
            etas=etas_of(request),
            labels=labels,
            **guidance,
            **table,
            **inpainting,
        )
        if request.mode == "slerp":
            return Between(sampling, (request.seed, request.seed_to))
        if request.mode == "invert":
            label = None if labels is None else int(labels[0])
            inversion = Inversion(ddim, picture_of(request, ddim), refine=REFINE, label=label, **guidance, **table)
            return Inverted(inversion, sampling)
    except ValueError as error:
        message = str(error)
        raise Refused({"eta" if message.startswith("eta") else "method": message}) from error
    return sampling


def _check_table(ddim: DDIM, request: Asked, bounds: Bounds) -> None:
    try:
        rows = ddim.table(request.steps, request.spacing).num_steps
    except ValueError as error:
        raise Refused({"steps": str(error)}) from error
    if rows > bounds.steps:
        raise Refused({"steps": f"{request.spacing} makes {rows} steps of {request.steps}; at most {bounds.steps}"})


def _classes(data: Mapping[str, Any], ddim: DDIM, number: Any, problems: dict[str, str]) -> dict[str, Any]:
    """label, guidance_scale and null_label."""
    classes = ddim.model.config.num_classes
    found: dict[str, Any] = {"label": None, "guidance_scale": None, "null_label": None}
    if classes is None:
        problems |= {name: "this network has no classes" for name in found if data.get(name) is not None}
        return found
    found["label"] = "each" if data.get("label") == "each" else number("label", 0, classes - 1, 0)
    if data.get("guidance_scale") is not None:
        found["guidance_scale"] = number("guidance_scale", 0, 100, 1.0, whole=False)
        found["null_label"] = number("null_label", 0, classes - 1, ddim.null_label)
    return found


def _pixels(data: Mapping[str, Any], name: str, shape: tuple[int, ...], problems: dict[str, str]) -> bytes | None:
    value = data.get(name)
    try:
        pixels = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        pixels = b""
    if len(pixels) != math.prod(shape):
        wanted = "x".join(map(str, shape))
        problems[name] = f"must be {wanted} bytes in base64, got " + (f"{len(pixels)}" if pixels else _shown(value))
        return None
    return pixels


def _shown(value: Any) -> str:
    """A value from outside, short and printable."""
    if value is None:
        return "nothing"
    text = repr(value)
    text = text if len(text) <= 40 else text[:37] + "..."
    return "".join(character if character.isprintable() else "?" for character in text)
