"""Which weights of a file are converted: every family is tried on the file as it is, then on what its wrappers hold.

A wrapper is a dict that has the weights under a key, as trainers save them, or a module that has the network as a part,
whose names then begin with a prefix. Both are steps of a path. What a family takes is not looked into any further.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import foreign
from .engine import ConversionError, shortened
from .families import FAMILIES, Family, Source
from .families.base import check_companions
from .files.pickles import printable

LEVELS = 4
"""The most steps to a set of weights: `{"state_dict": {"model._orig_mod.module.conv_in.weight": ...}}` has four."""

# ermongroup's runner saves a list without names; the last entry is there where the EMA is.
_LIST = ("model", "optimizer", "epoch", "step", "ema")
_AVERAGE = re.compile(r"(^|_)(ema|shadow|average|averaged)(_|\.?$)", re.IGNORECASE)
_NOT_AVERAGE = re.compile(r"(^|_)online(_|\.?$)", re.IGNORECASE)  # ema_pytorch's name for what it averages
_STEPS = ("step", "global_step", "iteration", "iter", "it")


@dataclasses.dataclass(frozen=True)
class _Place:
    """A part of a file that a family takes. path: keys, and prefixes with their dots. beside: what else each step had.

    clashes: names that the part has with and without one of its prefixes.
    """

    family: Family
    state: Mapping[Any, Any]
    path: tuple[str, ...] = ()
    beside: tuple[Mapping[str, Any], ...] = ()
    clashes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The path as `--weights` takes it; empty for the file as it is."""
        return ".".join(printable(part.removesuffix(".")) for part in self.path)

    @property
    def said(self) -> str:
        """The kind of weights: as the path says; "raw" beside something that is called an average; else "unstated"."""
        for part in reversed(self.path):
            if _NOT_AVERAGE.search(part):
                return "raw"
            if _AVERAGE.search(part):
                return "ema"
        return "raw" if self.averages else "unstated"

    @property
    def averages(self) -> list[tuple[str, Any]]:
        """What beside it is called an average and is no number."""
        entries = (entry for step in self.beside for entry in step.items())
        return [(k, v) for k, v in entries if _AVERAGE.search(k) and (v is None or isinstance(v, (Mapping, list)))]

    @property
    def step(self) -> int | None:
        """How long the weights were trained, where the file says."""
        for beside in self.beside:
            for name in _STEPS:
                value = beside.get(name)
                if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
                    return int(value)
        return None


_Set = tuple[_Place, Source]


class Recognised(NamedTuple):
    """The family of a file's contents, the weights to take, and the first stages that lie beside them."""

    family: Family
    source: Source
    stages: tuple[tuple[Family, Source], ...] = ()

    @property
    def stage(self) -> tuple[Family, Source] | None:
        """The first stage, where there is one alone."""
        return self.stages[0] if len(self.stages) == 1 else None

    @property
    def several(self) -> str:
        """What to do where there are several first stages; "" where there are not."""
        if len(self.stages) < 2:
            return ""
        taken = [str(source.taken) for _, source in self.stages]
        way = f"convert one alone, such as with --weights {taken[0]}, and give it by --autoencoder"
        return f"several first stages lie with it ({shortened(taken)}): {way}"


def recognise(raw: Any, name: str, weights: str | None = None) -> Recognised:
    """What a file's contents are.

    name: the file's, for messages. weights: "ema", "raw", a place in the file (`Source.taken`, or its beginning) or
    None, which is the EMA's where there are any. Raises ConversionError, saying what the file is or has, where no
    family takes a part of it whole, none is what was asked for, or several are.
    """
    contents = raw
    if isinstance(raw, list):
        names = _LIST if len(raw) in (4, 5) else [str(i) for i in range(len(raw))]
        contents = dict(zip(names, [*raw, None], strict=False))  # four: without an EMA
    places = list(_search(contents))
    if not places:
        known = ", ".join(family.title for family in FAMILIES.values())
        raise ConversionError(f"{name} {foreign.what_it_is(raw)}; jddim reads: {known} (docs/families.md)")
    sets: list[_Set] = []
    notes: list[str] = []
    for place in places:
        try:
            sets.append((place, _opened(place, name)))
        except ConversionError as error:
            if len(places) == 1 or _is_at(place.label, weights):
                raise
            notes += [str(error)] if place.said == "ema" else []
            refusal = error
    if not sets:
        raise refusal
    stages = _different([(place, source) for place, source in sets if place.family.first_stage])
    asked = any(_is_at(place.label, weights) for place, _ in stages)
    networks = [item for item in sets if not item[0].family.first_stage]
    place, source = _chosen(networks if networks and not asked else stages, contents, name, weights, notes)
    beside = [item for item in stages if item[0] is not place]
    names_beside = (key.removesuffix(".") for step in place.beside for key in step)
    check_companions(name, place.label, names_beside, handled=bool(beside) or place.family.first_stage)
    own = [] if place.family.first_stage else beside
    return Recognised(place.family, source, tuple((other.family, opened) for other, opened in own))


def as_asked(source: Source, weights: str | None, name: str) -> Source:
    """The source, of which name and place have been heard. ConversionError if its weights are not those asked for."""
    if weights == "raw" and source.weights == "unstated":
        return dataclasses.replace(source, weights="raw")
    if weights in ("ema", "raw") and source.weights != weights:
        kind = "which do not say what they are" if source.weights == "unstated" else f"the {source.weights} ones"
        raise ConversionError(
            f"{name} has one set of weights, {kind}, so no --weights {weights} in it; leave the option out"
        )
    return source


def _search(node: Any, left: int = LEVELS) -> Iterator[_Place]:
    if not isinstance(node, Mapping):
        return
    if family := next((family for family in FAMILIES.values() if family.recognise(node)), None):
        yield _Place(family, node)
    elif left:
        parts = _parts(node)
        for key, inner in parts.items():
            for place in _search(inner, left - 1):
                beside = {other: value for other, value in parts.items() if other != key}
                clashes = tuple(str(name) for name in inner if key.endswith(".") and name in node)
                yield dataclasses.replace(
                    place, path=(key, *place.path), beside=(beside, *place.beside), clashes=(*clashes, *place.clashes)
                )


def _parts(node: Mapping[Any, Any]) -> dict[str, Any]:
    """A dict's entries; those whose names share what stands before their first dot as one, under that with its dot."""
    parts: dict[str, Any] = {}
    for key, value in node.items():
        head, dot, rest = str(key).partition(".")
        if dot and not isinstance(value, Mapping):
            parts.setdefault(f"{head}.", {})[rest] = value
        else:
            parts[str(key)] = value
    return parts


def _opened(place: _Place, name: str) -> Source:
    where = f"{name}, under {place.label}," if place.path else name
    if place.clashes:
        raise ConversionError(f"{where} holds, with and without a prefix, {shortened(list(place.clashes))}")
    source = place.family.open_source(place.state, where)
    beside = [_shown(key, value) for step in place.beside for key, value in step.items() if value is not None]
    note, tensors = source.note, source.tensors
    buffers = {
        name: step[name]
        for step in place.beside
        for name in place.family.buffers
        if isinstance(step.get(name), np.ndarray)
    }
    if buffers and buffers.keys() == place.family.buffers:
        tensors = {**buffers, **tensors}
    elif any("betas" in step for step in place.beside) and not place.family.first_stage:
        betas = "betas lie beside them, which this family does not read: see that the schedule is theirs"
        note = f"{note}; {betas}" if note else betas
    return dataclasses.replace(
        source,
        tensors=tensors,
        weights=place.said,
        step=place.step,
        note=note,
        taken=place.label,
        beside=shortened(beside, 8),
        told=next((told for step in place.beside if isinstance(told := step.get(place.family.entry), Mapping)), {}),
    )


def _shown(key: str, value: Any) -> str:
    number = isinstance(value, (int, float, str, np.generic))
    return printable(key.removesuffix("."), 40) + (f" {printable(str(value), 40)}" if number else "")


def _is_at(label: str, weights: str | None) -> bool:
    """Whether this place, or what holds it, is asked for by name."""
    return weights not in (None, "ema", "raw") and f"{label}.".startswith(f"{weights}.")


def _chosen(sets: list[_Set], contents: Any, name: str, weights: str | None, notes: list[str]) -> _Set:
    """One of the sets, by the rules that `recognise` says. notes: why averages in the file are none of them."""
    others = _different([item for item in sets if item[1].weights != "ema"])
    averaged: list[_Set] = []
    found = [item for item in sets if item[1].weights == "ema"]
    for place, source in [*found, *_lists(contents, others, notes), *_dotless(others)]:
        if not others:
            averaged.append((place, source))
        elif twins := [other for of, other in others if of.family is place.family and _same(place, source, other)]:
            # the EMA of parameters alone has none of the buffers, which tell schedule and objective
            kept = {key: value for key, value in twins[0].tensors.items() if key in place.family.buffers}
            averaged.append((place, dataclasses.replace(source, tensors=kept | dict(source.tensors))))
        else:
            notes.append(f"{source.taken} has not the names of {others[0][1].taken or 'the rest'}")
    averaged = _different(averaged)
    if weights not in (None, "ema", "raw"):
        by_place = {item[1].taken: item for item in (*sets, *averaged)}
        if not (group := _different([item for label, item in by_place.items() if _is_at(label, weights)])):
            raise ConversionError(
                f"{name} holds no weights {printable(weights)}; it has: {_listed([*others, *averaged])}"
            )
    elif weights == "ema" and not averaged and (notes or any(source.weights == "raw" for _, source in others)):
        why = f" ({shortened(notes)})" if notes else ""
        raise ConversionError(f"{name} holds no ema weights{why}; it has: {_listed(others)}")
    elif weights == "raw" and not others:
        raise ConversionError(f"{name} holds no raw weights; it has: {_listed(averaged)}")
    else:
        group = averaged if averaged and weights != "raw" else others
    if len(group) > 1:
        raise ConversionError(
            f"{name} holds several sets of weights: {_listed(group)}; say which, such as --weights {group[0][1].taken}"
        )
    place, source = group[0]
    if not averaged and place.averages and source.weights == "raw":
        empty = all(not value for _, value in place.averages)
        (key, _), *_ = place.averages
        average = printable(key.removesuffix("."), 40)
        notes = notes or ["the file has no EMA weights" if empty else f"{average} has the names of no family's network"]
    return place, dataclasses.replace(source, note="; ".join(filter(None, [source.note, *dict.fromkeys(notes)])))


def _same(place: _Place, average: Source, raw: Source) -> bool:
    return average.tensors.keys() - place.family.buffers == raw.tensors.keys() - place.family.buffers


def _different(sets: Sequence[_Set]) -> list[_Set]:
    """The sets without those that are equal to an earlier one: a trainer's EMA holds the raw weights once more."""
    found: list[_Set] = []
    for item in sets:
        if not any(_equal(item[1].tensors, earlier.tensors) for _, earlier in found):
            found.append(item)
    return found


def _equal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(value, b[name]) for name, value in a.items())


def _lists(contents: Any, others: Sequence[_Set], notes: list[str], path: tuple[str, ...] = ()) -> Iterator[_Set]:
    """EMAs that are lists in the order of a model's parameters, `shadow_params`, under the names of a set in the file.

    Where a set has not as many, or not the shapes in this order, a sentence on it is added to `notes`.
    """
    for key, value in contents.items() if isinstance(contents, Mapping) and len(path) < LEVELS else ():
        here = (*path, str(key))
        if key != "shadow_params" or not isinstance(value, list):
            yield from _lists(value, others, notes, here)
            continue
        label = ".".join(printable(part) for part in here)
        for place, source in others:
            names = [name for name in source.tensors if name not in place.family.buffers]
            if [np.shape(source.tensors[name]) for name in names] == [np.shape(item) for item in value]:
                tensors = dict(zip(names, value, strict=True))
                yield place, dataclasses.replace(source, tensors=tensors, weights="ema", taken=label)
                break
        else:
            notes.append(f"{label} is a list of {len(value)} tensors without names, not those of a model in this file")


def _dotless(others: Sequence[_Set]) -> Iterator[_Set]:
    """EMAs of a module that lies beside them, under its names without the dots: CompVis' LitEma."""
    for place, source in others:
        names = [name for name in source.tensors if name not in place.family.buffers]
        for i, step in enumerate(place.beside):
            dotless = {name: "".join([*place.path[i + 1 :], name]).replace(".", "") for name in names}
            for key, value in step.items():
                if not _AVERAGE.search(key) or not isinstance(value, Mapping):
                    continue
                tensors = {n: value[short] for n, short in dotless.items() if isinstance(value.get(short), np.ndarray)}
                if tensors.keys() == dotless.keys():
                    label = ".".join(printable(part.removesuffix(".")) for part in (*place.path[:i], key))
                    yield place, dataclasses.replace(source, tensors=tensors, weights="ema", taken=label)


def _listed(sets: Sequence[_Set]) -> str:
    return shortened(
        [f"{source.weights} ({source.taken or 'the file itself'}: {place.family.title})" for place, source in sets]
    )
