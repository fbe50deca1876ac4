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

import jax
import numpy as np
from numpy.typing import NDArray

from jddim.config import did_you_mean, image_shape, type_problems
from jddim.ddim import sampler_table
from jddim.images import from_uint8
from jddim.pipeline import DDIM
from jddim.run.methods import find
from jddim.run.plan import Inputs, Plan, classes_in_turn, plan
from jddim.run.request import Option, Request, options, taken_by
from jddim.scale.stepping import Between, Decoded, Inverted, Run, Stepping, Swept
from jddim.schedule import NoiseSchedule
from jddim.timesteps import RATIOS, SPACINGS, of_ratios

MODES = ("sample", "strip", "grid", "slerp", "corners", "invert", "inpaint")
MANY_LABELS = ("sample", "inpaint")
"""Modes whose images may have a label each; in the others it would hide what they show."""
COLUMNS = 6
"""Numbers of steps that a grid compares at most."""
GOOD_SCALE = 3.0
"""What the page begins with of a checkpoint that records a null label: of the scales 0 to 4, the one at which a
classifier recognises most of what was asked of scripts/assets/mnist-guided (docs/training.md)."""
GOOD_CFG_PLUS_PLUS = 0.6
"""The same of cfg++, whose scale lies in 0..1: that of the example in docs/research.md."""
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
    """A run of the page. `parse` makes it of JSON, where the request's fields stand beside the others.

    mode: "sample"; "strip", one x_T at `num` etas from 0 to 1; "grid", the same in each number of steps of `columns`;
    "slerp", `num` noises from the seed's first to `seed_to`'s; "corners", the noise that lies `at` (down, across) in
    the square of the seeds `corners`, given by row; "invert", `picture` to its x_T and back at `num` etas from 0 to 1;
    "inpaint", `picture` made anew where `mask` is white. num: images; of a grid, its rows. label: one for all images,
    or in `MANY_LABELS` "each": 0, 1, 2, ... over and over, the null label left out. picture: uint8 `(h, w, c)`; mask:
    uint8 `(h, w, 1)`; condition: uint8 `(h, w, channels)`, in [-1, 1] beside each x_t of a network that is given one.
    Pictures are bytes, so that requests compare.
    """

    checkpoint: str
    request: Request
    mode: str = "sample"
    seed_to: int = 1
    num: int = 4
    columns: tuple[int, ...] = ()
    corners: tuple[int, ...] = ()
    at: tuple[float, ...] = ()
    label: int | str | None = None
    picture: bytes | None = None
    mask: bytes | None = None
    condition: bytes | None = None

    @property
    def guided(self) -> bool:
        """Whether there is guidance, which is another program."""
        return self.request.guidance_scale is not None

    @property
    def settings(self) -> dict[str, Any]:
        """All but the pictures, as JSON."""
        own = {
            name: getattr(self, name)
            for name in ("checkpoint", "mode", "seed_to", "num", "columns", "corners", "at", "label")
        }
        asked = {o.name: getattr(self.request, o.name) for o in taken_by("page")}
        return {**own, **asked, **self.request.asked()}


GUIDED = {"guidance_scale": 1.0, "null_label": 0}
"""Of a request with guidance, whichever."""

MADE_BY_HAND = ("method", "steps", "eta", "spacing", "seed", "guidance_scale", "null_label")
"""Fields of `Request` whose controls the page draws itself; it makes those of the rest from `fields`."""


def fields() -> list[dict[str, str]]:
    """The controls that the page makes of `Request`'s other fields: name, kind ("whole", "pair", "switch"), help."""
    return [
        {"name": o.name, "kind": _kind(o.option), "help": o.option.help}
        for o in taken_by("page")
        if o.name not in MADE_BY_HAND
    ]


def _kind(option: Option) -> str:
    if option.how.get("nargs") == 2:
        return "pair"
    return "whole" if option.how.get("type") is int else "switch"


def parse(
    data: Any,
    served: Mapping[str, DDIM],
    methods: Mapping[str, Sequence[str]],
    bounds: Bounds,
    start: Request = Request(),  # noqa: B008  # frozen
) -> Asked:
    """The request that JSON says. methods: those of each checkpoint. start: what the page was started with, in place of
    the defaults; its guidance is of runs that are guided. Raises Refused, with everything wrong.
    """
    if not isinstance(data, dict):
        raise Refused({"request": f"must be a JSON object, got {_shown(data)}"})
    problems: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(Asked)} - {"request"} | {o.name for o in taken_by("page")}
    refused = {o.name: o.option.left_out["page"] for o in options() if "page" in o.option.left_out}
    for key in sorted(data.keys() - names)[:5]:
        why = refused.get(key) if isinstance(key, str) else None
        problems[_shown(key)] = f"unknown{did_you_mean(str(key)[:40], names)}" if why is None else f"not here: {why}"

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
    config, T = ddim.model.config, ddim.schedule.most_steps
    shape = shape_of(ddim)
    mode = choice("mode", MODES, "sample")
    method = choice("method", methods[checkpoint], "ddim")
    timetables = spacings(ddim)
    if mode != "sample" and method != "ddim":
        problems["method"] = f"mode {mode} is DDIM's: take ddim, got {method}"
    asked: dict[str, Any] = {
        "method": method,
        "steps": number("steps", 1, min(bounds.steps, T), min(20, T)),
        "eta": number("eta", 0, 10, 0.0, whole=False),
        "spacing": choice("spacing", timetables, timetables[0]),
        "seed": number("seed", 0, 2**32 - 1, 0),
    }
    if not find(method).takes_eta and asked.pop("eta"):
        problems["eta"] = f"eta is DDIM's; method {method} takes none: 0, got {_shown(data.get('eta'))}"
    asked |= _plain_fields(data, problems)
    least = 2 if mode in ("strip", "grid", "slerp") else 1
    own: dict[str, Any] = {
        "seed_to": number("seed_to", 0, 2**32 - 1, 1),
        "num": 1 if mode == "corners" else number("num", least, bounds.num, min(4, bounds.num)),
    }
    if mode == "grid":
        own["columns"] = _listed(data, "columns", int, (1, COLUMNS), (1, min(bounds.steps, T)), problems)
    if mode == "corners":
        own["corners"] = _listed(data, "corners", int, (4, 4), (0, 2**32 - 1), problems)
        own["at"] = _listed(data, "at", float, (2, 2), (0, 1), problems)
    label, guided = _classes(data, ddim, mode, number, problems)
    if mode in ("invert", "inpaint"):
        own["picture"] = _pixels(data, "picture", shape, problems)
    if mode == "inpaint":
        own["mask"] = _pixels(data, "mask", (*shape[:2], 1), problems)
        if own["mask"] is not None and not any(own["mask"]):
            problems["mask"] = "is empty: paint where the picture is to be made anew"
    if config.condition_channels:
        own["condition"] = _pixels(data, "condition", (*config.image_size, config.condition_channels), problems)
    elif data.get("condition") is not None:
        problems["condition"] = "this network is given no picture beside x_t"
    if mode == "invert" and ddim.sampler.self_condition:
        problems["mode"] = "this network is self-conditioned, and cannot be inverted"
    if problems:
        raise Refused(problems)
    if not guided:
        start = dataclasses.replace(start, guidance=None, guidance_rescale=None, guidance_interval=None)
    request = Asked(checkpoint, dataclasses.replace(start, **asked, **guided), mode, label=label, **own)
    for steps in own.get("columns") or [request.request.steps]:
        _check_table(ddim, dataclasses.replace(request.request, steps=steps), bounds)
    return request


def _listed(
    data: Mapping[str, Any],
    name: str,
    kind: type[int] | type[float],
    lengths: tuple[int, int],
    ends: tuple[int, int],
    problems: dict[str, str],
) -> tuple[Any, ...]:
    """A list of numbers. lengths, ends: how many and how large they are, at least and at most."""
    value = data.get(name)
    kinds = (int,) if kind is int else (int, float)
    found = value if isinstance(value, list) and lengths[0] <= len(value) <= lengths[1] else []
    if found and all(type(n) in kinds and ends[0] <= n <= ends[1] for n in found):
        return tuple(map(kind, found))
    many = lengths[0] if lengths[0] == lengths[1] else f"{lengths[0]} to {lengths[1]}"
    what = "whole numbers" if kind is int else "numbers"
    problems[name] = f"must be {many} {what} in {ends[0]}..{ends[1]}, got {_shown(value)}"
    return ()


def _plain_fields(data: Mapping[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    """The fields that the page makes controls of, checked by their types; their values are the plan's to judge."""
    found: dict[str, Any] = {}
    for field in fields():
        if (value := data.get(field["name"])) is not None:
            found[field["name"]] = tuple(value) if isinstance(value, list) and len(value) < 9 else value
    for told in type_problems(Request(**found)):
        name = told.split(" ")[0]
        problems[name] = f"must be {field_of(name)}, got {_shown(data.get(name))}"
        del found[name]
    return found


def field_of(name: str) -> str:
    """What a control's value is, in words."""
    kinds = {"whole": "a whole number", "pair": "a pair of numbers", "switch": "true or false"}
    return next(kinds[field["kind"]] for field in fields() if field["name"] == name)


def spacings(ddim: DDIM) -> tuple[str, ...]:
    """The named timetables, the checkpoint's own first."""
    own = ddim.sampler.spacing
    if isinstance(ddim.schedule, NoiseSchedule):
        names = [*SPACINGS]
    else:
        names = ["even", *(name for name in RATIOS if _makes_steps(ddim, name))]
    if of_ratios(own) and own not in names:
        names.append(own)
    return tuple(sorted(names, key=lambda name: name != own))


def _makes_steps(ddim: DDIM, spacing: str) -> bool:
    """Whether the schedule has timetables of this name: sigma / alpha is infinite at a flow's first t."""
    try:
        sampler_table(ddim.schedule, ddim.sampler, 2, spacing=spacing)
    except ValueError:
        return False
    return True


def shape_of(ddim: DDIM) -> tuple[int, int, int]:
    """(height, width, channels) of its images."""
    return image_shape(ddim.model.config, None if ddim.autoencoder is None else ddim.autoencoder.config)


def labels_of(request: Asked, classes: Sequence[int]) -> NDArray[np.int32] | None:
    """One label an image."""
    if request.label is None:
        return None
    return np.resize(np.array(classes if request.label == "each" else [request.label], np.int32), request.num)


def etas_of(request: Asked) -> Any:
    """Eta of each image, or of all; None: the method takes none."""
    if request.mode in ("strip", "grid", "invert"):
        return np.linspace(0, 1, request.num)
    return 0.0 if request.mode in ("slerp", "corners") else request.request.eta


def picture_of(request: Asked, ddim: DDIM) -> NDArray[np.float32]:
    """The picture `(h, w, c)` in [-1, 1]."""
    return from_uint8(np.frombuffer(request.picture or b"", np.uint8).reshape(shape_of(ddim)))


def mask_of(request: Asked, ddim: DDIM) -> NDArray[np.float32]:
    """The mask `(h, w, 1)` in [-1, 1], 1 where the picture is made anew."""
    pixels = np.frombuffer(request.mask or b"", np.uint8).reshape(*shape_of(ddim)[:2], 1)
    return from_uint8(pixels)


def condition_of(asked: Asked, ddim: DDIM, num: int) -> NDArray[np.float32] | None:
    """The picture beside each of `num` x_t, `(num, h, w, channels)` in [-1, 1]."""
    if asked.condition is None:
        return None
    config = ddim.model.config
    pixels = np.frombuffer(asked.condition, np.uint8).reshape(*config.image_size, config.condition_channels)
    return np.repeat(from_uint8(pixels)[None], num, axis=0)


def run_of(asked: Asked, ddim: DDIM) -> Run:
    """The run of a request, decoded where there is a first stage. Raises Refused for what only the plan tells."""
    run, plan = _planned(asked, ddim)
    return run if ddim.autoencoder is None else Decoded(run, plan, asked.num * max(1, len(asked.columns)))


def _planned(asked: Asked, ddim: DDIM) -> tuple[Run, Plan]:
    """The run of a request, and the plan of its sampling."""
    labels = labels_of(asked, classes_in_turn(ddim, asked.request))
    request, num, mode = dataclasses.replace(asked.request, eta=None), asked.num, asked.mode
    key = jax.random.key(request.seed)

    def planned(request: Request = request, **arrays: Any) -> Plan:
        beside = condition_of(asked, ddim, num)
        inputs = Inputs(key, labels=labels, eta=etas_of(asked), condition=beside, **arrays)
        return _granted(plan(ddim, request, inputs, num))

    try:
        if mode == "inpaint":
            pictures = np.repeat(picture_of(asked, ddim)[None], num, axis=0)
            filled = planned(images=pictures, mask=mask_of(asked, ddim))
            return Stepping(filled), filled
        if mode in ("strip", "grid"):
            rows = asked.columns or (request.steps,)
            same = np.zeros(num, np.uint32)
            plans = [planned(dataclasses.replace(request, steps=steps), numbers=same) for steps in rows]
            return Stepping(plans[0]) if mode == "strip" else Swept(plans), plans[0]
        own = planned()  # raises what is wrong before the first part is made
        steps = own.rows.num_steps
        if mode == "sample":
            return Stepping(own), own
        if mode in ("slerp", "corners"):
            seeds = asked.corners or (request.seed, asked.seed_to)
            at = np.array(asked.at or [(0, i / (num - 1)) for i in range(num)], np.float32).reshape(num, 2)
            return Between(ddim, seeds, at, steps, lambda x_T: planned(x_T=x_T)), own
        up = dataclasses.replace(request, refine=REFINE)
        one = None if labels is None else labels[:1]
        inputs = Inputs(images=picture_of(asked, ddim)[None], labels=one, condition=condition_of(asked, ddim, 1))
        return Inverted(_granted(plan(ddim, up, inputs)), num, steps, lambda x_T: planned(x_T=x_T)), own
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused({"method": str(error)}) from error


def _granted(plan: Plan) -> Plan:
    """Itself. Raises Refused with its problems by field."""
    if plan.problems:
        raise Refused(dict(reversed(plan.problems)))
    return plan


def _check_table(ddim: DDIM, request: Request, bounds: Bounds) -> None:
    try:
        sampler = request.sampler(ddim.sampler)
    except ValueError as error:
        raise Refused({"clip_range": str(error)}) from error
    try:
        rows = sampler_table(ddim.schedule, sampler, request.steps, spacing=request.spacing).num_steps
    except ValueError as error:
        raise Refused({"steps": str(error)}) from error
    if rows > bounds.steps:
        raise Refused({"steps": f"{request.spacing} makes {rows} steps of {request.steps}; at most {bounds.steps}"})


def _classes(
    data: Mapping[str, Any], ddim: DDIM, mode: str, number: Any, problems: dict[str, str]
) -> tuple[int | str | None, dict[str, Any]]:
    """The label; guidance_scale and null_label."""
    classes = ddim.model.config.num_classes
    if classes is None:
        names = ("label", "guidance_scale", "null_label")
        problems |= {name: "this network has no classes" for name in names if data.get(name) is not None}
        return None, {}
    many = data.get("label") == "each" and mode in MANY_LABELS
    label = "each" if many else number("label", 0, classes - 1, 0)
    if data.get("guidance_scale") is None:
        return label, {}
    scale = number("guidance_scale", 0, 100, 1.0, whole=False)
    return label, {"guidance_scale": scale, "null_label": number("null_label", 0, classes - 1, ddim.null_label)}


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
