"""The conversion, end to end: read, recognise, infer, fill, verify, write. What `jddim.converting` calls."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import shlex
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import jddim
from jddim.checkpoint.card import ALL_ZERO, sampler_line, schedule_line
from jddim.checkpoint.folder import (
    CheckpointError,
    check_destination,
    load_autoencoder_metadata,
    load_params,
    load_recorded,
    part_of,
    save_checkpoint,
)
from jddim.checkpoint.metadata import FIRST_STAGE, Metadata, PartMetadata
from jddim.config import EDM, AutoencoderConfig, ClassifierConfig, ModelConfig, did_you_mean
from jddim.converting import Check, Located, Paths, UnsettledError, Verification, Warns
from jddim.files import MOST_JSON, parse_json, read_regular, whole_number
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.run.problems import pair_problems
from jddim.schedule import ContinuousSchedule, make_schedule

from . import verify as verification
from .engine import ConversionError, fill, refusing
from .families import Family, Plan, Source
from .files.pickles import plain, printable
from .files.readers import sha256
from .files.shards import read_weights
from .recognition import Recognised, as_asked, recognise
from .sources import Origin, files_read, find, first_stage_of

Say = Callable[[str], None]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: Paths | None = None,
    settings: Mapping[str, str] | None = None,
    preset: str | None = None,
    weights: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    say: Say = lambda line: None,
    check: Check | None = None,
) -> Metadata | PartMetadata:
    """Convert a PyTorch checkpoint into a jddim checkpoint folder: `jddim.convert`, whose docstring has the arguments.

    Raises ConversionError or CheckpointError, each with all that is wrong; nothing is then written.
    """
    check_destination(dst, overwrite=overwrite)
    if license is not None and not (license.strip() and license.isprintable() and len(license) <= 200):
        raise ConversionError(f"a licence is a line of 1 to 200 characters, such as MIT; got {license[:50]!r}")
    origin = find(src, weights, variant, revision)
    try:
        opened = _open(origin, config, settings or {}, preset, weights, alone=autoencoder is not None)
    except UnsettledError as error:
        if error.options:
            words = _words(config, settings or {}, preset, weights, variant, revision)
            error.command = shlex.join(["jddim", "convert", str(src), "DST", *words, *error.options])
        raise
    stage = _first_stage(opened, autoencoder)
    if check is not None:
        check(_metadata(opened.plan, {}, stage and stage[0]))
    params, provenance = _converted(opened, src, dst, verify, say)
    if license is not None:
        provenance["license"] = license.strip()
    if stage is not None:
        more, provenance["autoencoder"] = _beside(stage[1], dst, verify, say)
        params |= {FIRST_STAGE + name: value for name, value in more.items()}
    whole = _metadata(opened.plan, provenance, stage and stage[0])
    metadata: Metadata | PartMetadata
    if isinstance(whole, Metadata):  # one call would be of neither type, to the checker
        metadata = save_checkpoint(dst, params, whole, overwrite=overwrite)
    else:
        metadata = save_checkpoint(dst, params, whole, overwrite=overwrite)
    say(f"wrote {dst}")
    return metadata


def _metadata(plan: Plan, provenance: dict[str, Any], stage: AutoencoderConfig | None) -> Metadata | PartMetadata:
    if plan.schedule is None or plan.sampler is None:
        assert isinstance(plan.model, ClassifierConfig | AutoencoderConfig)
        return PartMetadata(plan.model, provenance)
    return Metadata(plan.model, plan.schedule, plan.sampler, provenance, autoencoder=stage)


def _converted(
    opened: _Opened, src: object, dst: object, verify: bool, say: Say
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parameters of what is opened, verified if asked, and their provenance."""
    family, source, plan = opened.family, opened.source, opened.plan
    with refusing(src):
        params = _params(family, source, plan)
    for line in opened.lines:
        say(line)
    say(f"  {len(params)} parameters filled, {sum(p.size for p in params.values()):,} numbers")

    figure: dict[str, Any] = {"skipped": True}
    if verify and not verification.can_verify():
        figure["reason"] = "PyTorch is not installed"
        say(Warns(f"  NOT VERIFIED: PyTorch is not installed; where it is, run: jddim verify {dst} {src}"))
    elif verify:
        result = _verify(family, source, plan, params)
        if result.first_bad is not None:
            raise ConversionError(
                f"{src}: the converted model differs from PyTorch by {result.output_error:.2e} of its output's scale "
                f"(allowed: {result.tolerance:g}), first at block {result.first_bad}; nothing was written"
            )
        say(
            f"  verified: largest error {result.output_error:.1e} of the output's scale, against PyTorch {result.torch}"
        )
        if result.all_zero:
            say(Warns(f"  WARNING: {ALL_ZERO}"))
        figure = result.to_json()
    else:
        say("  not verified (--no-verify), and recorded as such")

    told = {key: "--set" if key in opened.given else f"--preset {opened.preset}" for key in opened.settings}
    return params, {
        "family": family.name,
        "source": opened.origin.to_json(),
        "config": [{"file": file.name, "sha256": sha256(file)} for file in opened.configs],
        "preset": opened.preset,
        "set": dict(opened.settings),
        "weights": source.weights,
        "step": source.step,
        "assumed": list(plan.assumed),
        **({"unchecked": list(plan.unchecked)} if plan.unchecked else {}),
        "ignored": dict(plan.ignored),
        "notes": list(plan.notes),
        **({"warnings": list(plan.warnings)} if plan.warnings else {}),
        "wording": plan.wording.to_json(told),
        "reference_options": dict(plan.reference_options),
        "verification": figure,
        "versions": _versions(),
        **({"taken": source.taken} if source.taken else {}),
        **({} if plan.null_label is None else {"null_label": plan.null_label}),
        **({"label_names": dict(plan.label_names)} if plan.label_names else {}),
    }


_NO_STAGE = (
    "a network of latents, and its first stage does not lie with it: --autoencoder SRC gives that, a jddim checkpoint "
    "of it, its folder or its file"
)


def _first_stage(
    opened: _Opened, given: str | os.PathLike[str] | None
) -> tuple[AutoencoderConfig, _Opened | Path] | None:
    """The first stage to put beside a network: its own source or jddim folder where given, else what lies with it.

    Raises ConversionError if it has to be given and is not, or does not belong to the network.
    """
    plan = opened.plan
    if given is not None and plan.sampler is None:
        raise ConversionError(f"{opened.origin.file} is not sampled, so takes no --autoencoder; leave it out")
    if given is None and opened.several:
        raise ConversionError(f"{opened.origin.file}: {opened.several}")
    if given is None and plan.latent and opened.stage is None:
        raise ConversionError(f"{opened.origin.file}: {_NO_STAGE}")
    stage: _Opened | Path | None = opened.stage
    if given is not None:
        try:
            given = first_stage_of(Path(given) / "model_index.json") or given  # of a pipeline, its part
            stage = Path(given) if (Path(given) / "metadata").is_dir() else _open(find(given), None, {}, None, None)
        except UnsettledError as error:
            raise _of_stage(error, given) from error
    if stage is None:
        return None
    if isinstance(stage, Path):
        metadata = load_autoencoder_metadata(stage)
        config: Any = metadata.autoencoder if isinstance(metadata, Metadata) else metadata.model
    else:
        config = stage.plan.model
    if not isinstance(config, AutoencoderConfig):
        raise ConversionError(f"--autoencoder {given} is no first stage: {config.summary}")
    for _, problem in pair_problems(config, plan.model):
        raise ConversionError(problem)
    return config, stage


def _beside(stage: _Opened | Path, dst: object, verify: bool, say: Say) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A first stage's parameters and provenance."""
    if not isinstance(stage, Path):
        return _converted(stage, stage.origin.file, dst, verify, say)
    metadata = load_autoencoder_metadata(stage)
    params = load_params(stage, metadata)
    if isinstance(metadata, Metadata):
        return part_of(params, FIRST_STAGE), metadata.provenance["autoencoder"]
    return params, metadata.provenance


def locate(
    src: str | os.PathLike[str],
    config: Paths | None,
    weights: str | None,
    variant: str | None,
    revision: str | None,
    autoencoder: str | os.PathLike[str] | None,
) -> Located:
    """Where a source's files are: `jddim.converting.locate`."""
    origin = find(src, weights, variant, revision)
    stage: list[Path] = []
    if autoencoder is not None:
        autoencoder = first_stage_of(Path(autoencoder) / "model_index.json") or autoencoder
        own = Path(autoencoder) / "metadata" / "metadata"
        stage = [own] if own.is_file() else files_read(find(autoencoder))
    name = (origin.hub_id or os.path.abspath(src)).rstrip("/").rpartition("/")[2]
    return Located(name, (*files_read(origin), *_given(config), *stage), origin.hub_id, origin.commit)


def verify(ckpt: str | os.PathLike[str], src: str | os.PathLike[str], config: Paths | None = None) -> Verification:
    """Compare a converted checkpoint with the PyTorch file it came from, block by block: `jddim.verify`.

    Raises ConversionError if `src` is not that file (by SHA-256).
    """
    metadata = load_recorded(ckpt)
    params = load_params(ckpt, metadata)
    provenance = metadata.provenance
    facts, said = provenance.get("source", {}), provenance.get("weights", "unstated")
    if (recorded := facts.get("sha256")) is None:
        raise ConversionError(
            f"{ckpt} does not say which file it was converted from, so there is none to verify it with"
        )
    kind = None if said == "unstated" else said
    if (file := Path(src) / str(facts.get("place", facts.get("file")))).is_file():
        origin = Origin(file)  # which a folder may have newer ones of
    else:
        commit = facts.get("commit") if str(src) == facts.get("hub_id") else None
        origin = find(src, kind, facts.get("variant"), commit)
    expected: ModelConfig | None = metadata.model
    begins, stage = "", provenance.get("autoencoder") or {}
    if (actual := origin.sha256()) != recorded:
        if actual != stage.get("source", {}).get("sha256") or not isinstance(metadata, Metadata):
            raise ConversionError(
                f"{ckpt} was not converted from {src}: its source has SHA-256 {recorded}, this file has {actual}"
            )
        provenance, begins, expected, kind = stage, FIRST_STAGE, metadata.autoencoder, None
    taken, told = provenance.get("taken") or kind, stage.get("set", {})
    opened = _open(origin, config, provenance.get("set", {}), None, taken, alone=not stage, of_stage=told)
    if opened.plan.model != expected:
        raise ConversionError(f"{ckpt} and {src} disagree about the model: {expected} and {opened.plan.model}")
    result = _verify(opened.family, opened.source, opened.plan, part_of(params, begins))
    if (beside := opened.stage) is None or beside.plan.model != metadata.networks.get(FIRST_STAGE):
        return result
    more = _verify(beside.family, beside.source, beside.plan, part_of(params, FIRST_STAGE))
    blocks = {FIRST_STAGE + name: error for name, error in more.blocks.items()} | dict(result.blocks)
    return dataclasses.replace(result, blocks=blocks)


def describe(
    src: str | os.PathLike[str],
    config: Paths | None = None,
    settings: Mapping[str, str] | None = None,
    preset: str | None = None,
    weights: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> list[str]:
    """What a PyTorch source is, what its conversion would need, and the command for it. Runs nothing in the file."""
    settings = settings or {}
    origin = find(src, weights, variant, revision)
    found = _read(origin, str(src), weights)
    family, source = found.family, found.source
    options = _words(config, settings, preset, weights, variant, revision)
    command = ["jddim", "convert", str(src), "DST"]
    contents, files = _configs(family, origin.file, config, source)
    source = as_asked(family.placed(source, origin.file, contents), weights, str(src))
    facts = [f"  config      {file}" for file in files] or ["  config      none beside it"]
    asks: tuple[str, ...] = ()
    try:
        told_settings = _with_preset(family, preset, settings)
        plan = family.plan(source.tensors, contents, told_settings)
        _params(family, source, plan)
        facts.append(f"  network     {plan.model.summary}")
        facts += [] if plan.schedule is None else [f"  schedule    {schedule_line(plan.schedule)}"]
        facts += [] if plan.sampler is None else [f"  sampler     {sampler_line(plan.sampler)}"]
        facts += [f"  assumed     {fact}" for fact in plan.assumed]
        asks = plan.asks
        if plan.unchecked:
            facts.append(f"  told        not checked by the file: {_pairs(plan.unchecked, told_settings)}")
        facts += [f"  note        {note}" for note in plan.notes]
        facts += [f"  WARNING     {warning}" for warning in plan.warnings]
        if plan.sampler is not None:
            lies = found.stage[1].taken if found.stage is not None else family.beside(origin.file)
            given = autoencoder or ("SRC" if found.several or (plan.latent and lies is None) else None)
            facts += [f"  needs       {found.several or _NO_STAGE}"] if given == "SRC" else []
            facts += [f"  first stage {given or lies}"] if lies or autoencoder else []
            options += ["--autoencoder", str(given)] if given else []
    except UnsettledError as error:
        facts.append(f"  needs       {error}")
        fitting, more, misfit = _way_on(error, family, source, contents, preset, settings)
        if misfit:
            facts.append(f"  refused     {misfit}")
            command = []
        if fitting:
            facts.append(f"  presets     the tensors agree with --preset {' or '.join(fitting)}")
            options += more
        else:
            asks = error.asks
    except ValueError as error:  # ConversionErrors, and what a network refuses when it is made
        facts.append(f"  refused     {error}")
        command = []
    if command and (untold := [key for key, _, what in (ask.partition("=") for ask in asks) if what == "VALUE"]):
        facts.append(
            f"  untold      {', '.join(untold)}: no tensor tells these; the source's defaults are assumed, where no "
            "--set says otherwise"
        )
    options += [part for ask in asks if not ask.endswith("=VALUE") for part in ("--set", ask)]
    return [
        f"{src}: {family.title}",
        *([f"  file        {origin.choice}"] if origin.choice else []),
        f"  sha256      {origin.sha256()}",
        f"  weights     {_weights(source)}",
        *([f"  taken       {_taken(source)}"] if source.taken else []),
        f"  parameters  {sum(np.size(value) for value in source.tensors.values()):,} in {len(source.tensors)} tensors",
        *facts,
        *([f"convert it:   {shlex.join([*command, *options])}"] if command else []),
    ]


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source read and understood, and lines on it.

    configs: the files that it took. given: --set's settings; settings: those over the preset's. stage: the first stage
    that lies with it. several: what to do where more than one does.
    """

    origin: Origin
    family: Family
    source: Source
    plan: Plan
    configs: tuple[Path, ...]
    preset: str | None
    given: Mapping[str, str]
    settings: Mapping[str, str]
    lines: tuple[str, ...]
    stage: _Opened | None = None
    several: str = ""


def _read(origin: Origin, name: str, weights: str | None) -> Recognised:
    return recognise(read_weights(origin.file), name, weights)


def _open(
    origin: Origin,
    config: Paths | None,
    settings: Mapping[str, str],
    preset: str | None,
    weights: str | None,
    *,
    alone: bool = False,
    of_stage: Mapping[str, str] = types.MappingProxyType({}),
) -> _Opened:
    """alone: without the first stage that lies with it, whose own settings are of_stage."""
    found = _read(origin, str(origin.file), weights)
    opened = _understood(found.family, found.source, origin, config, settings, preset, weights)
    if found.several:
        return dataclasses.replace(opened, several=found.several)
    folder = opened.family.beside(origin.file)
    if alone or opened.plan.sampler is None or (found.stage is None and folder is None):
        return opened
    try:
        if found.stage is not None:
            stage = _understood(*found.stage, origin, config, of_stage, None, None)
        else:
            stage = _open(find(str(folder)), None, of_stage, None, None)
    except UnsettledError as error:
        taken = [] if found.stage is None else ["--weights", str(found.stage[1].taken)]
        raise _of_stage(error, origin.file if folder is None else folder, taken) from error
    return dataclasses.replace(opened, stage=stage)


def _of_stage(error: UnsettledError, src: object, words: Iterable[str] = ()) -> ConversionError:
    """What a first stage has to be told, which the options of a network's conversion do not tell it."""
    command = shlex.join(["jddim", "convert", str(src), "STAGE", *words, *error.options])
    return ConversionError(
        f"{error}. This is of the first stage: convert it first, {command}, then give --autoencoder STAGE"
    )


def _understood(
    family: Family,
    source: Source,
    origin: Origin,
    config: Paths | None,
    settings: Mapping[str, str],
    preset: str | None,
    weights: str | None,
) -> _Opened:
    src = origin.file
    given = _given(config)
    contents, files = _configs(family, src, config, source)
    source = as_asked(family.placed(source, src, contents), weights, str(src))
    try:
        with refusing(src):
            told = _with_preset(family, preset, settings)
            plan = family.plan(source.tensors, contents, told)
    except UnsettledError as error:
        with refusing(src):
            fitting, words, misfit = _way_on(error, family, source, contents, preset, settings)
        if misfit:
            raise ConversionError(f"{error}; and whatever is told, {misfit}") from error
        said = f"{error}; the tensors agree with --preset {' or '.join(fitting)}" if fitting else str(error)
        raise UnsettledError(said, error.asks, words) from error
    if untold := [ask.partition("=")[0] for ask in plan.asks]:
        warning = (
            f"no tensor tells {', '.join(untold)}: if the network was trained with other values than those assumed, "
            "its samples are wrong, and a comparison of the networks does not see it"
        )
        plan = dataclasses.replace(plan, warnings=(*plan.warnings, warning))
    lines = [
        f"{src}: {family.title}",
        *([f"  file: {origin.choice}"] if origin.choice else []),
        f"  weights: {_weights(source)}",
        *([f"  taken: {_taken(source)}"] if source.taken else []),
        *(f"  config: {file}" + ("" if file in given else " (found)") for file in files),
        f"  model: {plan.model.summary}",
        *(f"  assumed: {fact}" for fact in plan.assumed),
        *([f"  told, not checked by the file: {_pairs(plan.unchecked, told)}"] if plan.unchecked else []),
        *(f"  ignored: {name}: {reason}" for name, reason in plan.ignored.items()),
        *(f"  note: {note}" for note in plan.notes),
        *(Warns(f"  WARNING: {warning}") for warning in plan.warnings),
    ]
    return _Opened(origin, family, source, plan, files, preset, settings, told, tuple(lines))


def _with_preset(family: Family, preset: str | None, settings: Mapping[str, str]) -> Mapping[str, str]:
    """The preset's settings, with `settings` over them."""
    if preset is None:
        return settings
    if not family.presets:
        raise ConversionError(f"this family has no presets, so no --preset {preset}; use --set KEY=VALUE")
    if preset not in family.presets:
        raise ConversionError(f"unknown preset {preset!r}{did_you_mean(preset, family.presets)}")
    return {**family.presets[preset], **settings}


def _words(
    config: Paths | None,
    settings: Mapping[str, str],
    preset: str | None,
    weights: str | None,
    variant: str | None,
    revision: str | None,
) -> list[str]:
    """What was told of a source, as the command line's words."""
    told = {"preset": preset, "weights": weights, "variant": variant, "revision": revision}
    words = [part for file in _given(config) for part in ("--config", str(file))]
    words += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return words + [part for name, value in told.items() if value for part in (f"--{name}", value)]


def _way_on(
    error: UnsettledError,
    family: Family,
    source: Source,
    contents: Mapping[str, Any] | None,
    preset: str | None,
    settings: Mapping[str, str],
) -> tuple[list[str], list[str], ConversionError | None]:
    """The presets that would do, the words for what must be told, and why the tensors would be refused even so."""
    fitting = [] if preset else _fitting_presets(family, source, contents, settings)
    words = [part for ask in error.asks if not ask.endswith("=VALUE") for part in ("--set", ask)]
    if fitting:
        words = ["--preset", fitting[0] if len(fitting) == 1 else "NAME"]
    told = {**_with_preset(family, preset, settings), **_tried(error.asks)}
    return fitting, words, _misfit(family, source, contents, told)


def _fitting_presets(
    family: Family, source: Source, contents: Mapping[str, Any] | None, settings: Mapping[str, str]
) -> list[str]:
    """The presets that neither the tensors nor what else is told contradict."""
    fitting = []
    for name in family.presets:
        with contextlib.suppress(ConversionError):
            family.plan(source.tensors, contents, _with_preset(family, name, settings))
            fitting.append(name)
    return fitting


def _tried(asks: Iterable[str]) -> dict[str, str]:
    """Settings with values that any tensors go with, in place of those that a person has to give."""
    neutral = {
        "SIDE": "512",
        "N": "1",
        "NUMBER": "1",
        "BOOLEAN": "False",
        "BETA": "0.01",
        "NAME": "linear",
        "MODE": "edm",
        "PRECOND": "EDMPrecond",
    }
    return {key: neutral[what] for key, _, what in (ask.partition("=") for ask in asks) if what in neutral}


def _misfit(
    family: Family, source: Source, contents: Mapping[str, Any] | None, settings: Mapping[str, str]
) -> ConversionError | None:
    """Why the tensors do not fit a network with such settings, if they do not."""
    with contextlib.suppress(ConversionError):  # of values tried that do not go with those told
        plan = family.plan(source.tensors, contents, settings)
        try:
            _params(family, source, plan)
        except ConversionError as error:
            return error
    return None


def _params(family: Family, source: Source, plan: Plan) -> dict[str, np.ndarray]:
    """The model's parameters. Raises ConversionError with every tensor that does not fit."""
    expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(plan.model)).items()}
    return fill({**source.tensors, **plan.implied}, expected, plan.rules, plan.ignored, family.pointwise)


def _told_times(plan: Plan) -> np.ndarray:
    """The first, the middle and the last t of a plan's schedule, as its network is told them."""
    T = 1000 if plan.schedule is None else plan.schedule.num_train_timesteps
    schedule = None if plan.schedule is None else make_schedule(plan.schedule)
    if plan.sampler is None or not isinstance(schedule, ContinuousSchedule):
        return np.array([0, T // 2, T - 1], np.int32)
    t = np.linspace(schedule.t_min, schedule.t_max, 3, dtype=np.float32)
    t = np.log(t) if plan.sampler.prediction_type == EDM else 1 - t if plan.sampler.reversed_time else t
    return t * np.float32(plan.sampler.timestep_scale)


def _verify(family: Family, source: Source, plan: Plan, params: Mapping[str, np.ndarray]) -> Verification:
    tensors = {n: value for n, value in {**source.tensors, **plan.implied}.items() if n not in plan.ignored}
    return verification.verify(
        build_model(plan.model, verification.in_place(params)),
        tensors,
        family,
        plan.model,
        _told_times(plan),
        reference_options=plan.reference_options,
    )


def _given(config: Paths | None) -> list[Path]:
    if config is None:
        return []
    files = [Path(config)] if isinstance(config, (str, os.PathLike)) else [Path(file) for file in config]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise ConversionError(f"no such config file: {', '.join(absent)}")
    return files


def _configs(
    family: Family, weights: Path, config: Paths | None, source: Source
) -> tuple[Mapping[str, Any] | None, tuple[Path, ...]]:
    """What `Family.plan` gets, and the files it is from: those given, then those found, one for each section.

    Without a file, it is what lies beside the weights (`Family.entry`).
    """
    section = family.config_section or (lambda contents: "")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in _given(config):
        contents = _read_config(file)
        if (key := section(contents)) in found:
            raise ConversionError(
                f"--config {found[key][0]} and {file} are both {key} configs; give one".replace("  ", " ")
            )
        found[key] = file, contents
    for file in family.config_files(weights):
        if file.is_file() and (family.config_section or not found):
            contents = _read_config(file)
            found.setdefault(section(contents), (file, contents))
    files = tuple(file for file, _ in found.values())
    if family.config_section is None:
        return next((contents for _, contents in found.values()), source.told or None), files
    return {key: contents for key, (_, contents) in found.items()}, files


class _ConfigLoader(yaml.SafeLoader):
    """Safe YAML, and argparse.Namespace read as a mapping: ermongroup's runner dumps its config as one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys, which no source writes: merged into each other, they double with every line."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "a merge key (<<)", node.start_mark)


def _namespace(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)  # type: ignore[arg-type]  # raises for another kind of node


def _yaml_integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return whole_number(str(loader.construct_yaml_int(node)) if len(node.value) <= 20 else node.value)


_ConfigLoader.add_constructor("tag:yaml.org,2002:int", _yaml_integer)
_ConfigLoader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", _namespace)


def _read_config(path: Path) -> dict[str, Any]:
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = read_regular(path, MOST_JSON).decode()
        if kind == "JSON":  # of which YAML 1.1 is no superset: it takes 1e-06 for text
            contents = parse_json(_COMMENT.sub(lambda found: found[1] or "", text))
        else:
            contents = _flags(text) or yaml.load(text, Loader=_ConfigLoader)
            contents = plain(contents, lambda leaf: leaf, 4 * len(text) + 1000)  # aliases of aliases
    except yaml.constructor.ConstructorError as error:
        raise ConversionError(
            f"{path} holds more than plain values, and jddim never runs code from a config: "
            f"{error.problem} ({str(error.problem_mark).strip()})"
        ) from error
    # PyYAML raises KeyError for `!!bool x`, AttributeError for `!!timestamp x`, IndexError and TypeError for others.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        raise ConversionError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(contents, dict):
        raise ConversionError(f"{path} holds no config: expected sections or keys, each with a value")
    return contents


_COMMENT = re.compile(r'("(?:\\.|[^"\\])*"?)|//.*')
"""A text, which may hold two slashes, or what Palette's configs have after two."""


def _flags(text: str) -> dict[str, Any]:
    """An absl flagfile's lines: `--name=value`, whose text is kept, or `--name`; a name that is repeated has a list."""
    found: dict[str, list[Any]] = {}
    for name, equals, value in re.findall(r"^--(\w+)(=?)(.*?)\r?$", text, re.MULTILINE):
        found.setdefault(name, []).append(value if equals else True)
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}


def _weights(source: Source) -> str:
    step = "" if source.step is None else f", step {source.step:,}"
    kind = "one set, which nothing calls ema or raw" if source.weights == "unstated" else source.weights
    return kind + step + (f" ({source.note})" if source.note else "")


def _taken(source: Source) -> str:
    return source.taken + (f", beside {source.beside}" if source.beside else "")


def _pairs(names: Iterable[str], settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {printable(settings[name], 80)}" for name in names)


def _versions() -> dict[str, str | None]:
    packages = ("jax", "flax", "orbax-checkpoint", "torch")
    installed: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # torch may be absent
            installed[name] = importlib.metadata.version(name)
    return {"jddim": jddim.__version__, "python": platform.python_version(), **installed}


__all__ = ["CheckpointError", "ConversionError", "convert", "describe", "verify"]
