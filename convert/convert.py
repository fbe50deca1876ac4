"""The conversion, end to end: read, recognise, infer, fill, verify, write. What `jddim convert` and `info` call."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import jddim
from convert import verify as verification
from convert.engine import ConversionError, fill
from convert.families import Family, Plan, Source, recognise
from convert.readers import read, sha256
from jddim.checkpoint import (
    CheckpointError,
    Metadata,
    abstract_model,
    build_model,
    check_destination,
    flat_params,
    load_metadata,
    load_params,
    save_checkpoint,
)
from jddim.config import did_you_mean, to_json

Say = Callable[[str], None]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    settings: Mapping[str, str] | None = None,
    preset: str | None = None,
    weights: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Metadata:
    """Convert a PyTorch checkpoint into a jddim checkpoint folder.

    src: the file (or a folder that holds `ckpt.pth`); a `config.yml` beside it is used unless `config` names another.
    settings: facts under the family's own names, over the config's. preset: a name of the family's for a whole set of
    settings, which `settings` override. weights: "ema" or "raw"; by default the EMA's
    where there are any. verify: compare with the PyTorch reference, refuse above `convert.verify.TOLERANCE`; where
    PyTorch is not installed, say and record that it was not done.
    say: told what is found, line by line. Returns the metadata written.

    Raises ConversionError or CheckpointError, each with all that is wrong; nothing is then written.
    """
    check_destination(dst, overwrite=overwrite)
    src = _source_file(src)
    family, source, plan, config_file, settings = _open(src, config, settings or {}, preset, weights, say)
    expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(plan.model)).items()}
    try:
        params = fill(source.tensors, expected, plan.rules, plan.ignored)
    except ConversionError as error:
        raise ConversionError(f"{src}: {error}") from error
    say(f"  {len(params)} parameters filled, {sum(p.size for p in params.values()):,} numbers")

    figure: dict[str, Any] = {"skipped": True}
    if verify and not verification.can_verify():
        figure["reason"] = "PyTorch is not installed"
        say(f"  NOT VERIFIED: PyTorch is not installed; where it is, run: jddim verify {dst} {src}")
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
        figure = result.to_json()
    else:
        say("  not verified (--no-verify), and recorded as such")

    provenance = {
        "family": family.name,
        "source": {"file": src.name, "sha256": sha256(src)},
        "config": None if config_file is None else {"file": config_file.name, "sha256": sha256(config_file)},
        "preset": preset,
        "set": dict(settings),
        "weights": source.weights,
        "step": source.step,
        "assumed": list(plan.assumed),
        "ignored": dict(plan.ignored),
        "notes": list(plan.notes),
        "reference_options": dict(plan.reference_options),
        "verification": figure,
        "versions": _versions(),
    }
    metadata = save_checkpoint(
        dst, params, Metadata(plan.model, plan.schedule, plan.sampler, provenance), overwrite=overwrite
    )
    say(f"wrote {dst}")
    return metadata


def verify(
    ckpt: str | os.PathLike[str], src: str | os.PathLike[str], config: str | os.PathLike[str] | None = None
) -> verification.Verification:
    """Compare a converted checkpoint with the PyTorch file it came from, block by block.

    Raises ConversionError if `src` is not that file (by SHA-256).
    """
    metadata = load_metadata(ckpt)
    params = load_params(ckpt, metadata)
    src = _source_file(src)
    recorded = metadata.provenance.get("source", {}).get("sha256")
    if (actual := sha256(src)) != recorded:
        raise ConversionError(
            f"{ckpt} was not converted from {src}: its source has SHA-256 {recorded}, this file has {actual}"
        )
    weights = metadata.provenance["weights"]
    family, source, plan, _, _ = _open(
        src, config, metadata.provenance["set"], None, None if weights == "unstated" else weights, lambda line: None
    )
    if plan.model != metadata.model:
        raise ConversionError(f"{ckpt} and {src} disagree about the model: {metadata.model} and {plan.model}")
    return _verify(family, source, plan, params)


def describe(
    src: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    settings: Mapping[str, str] | None = None,
    preset: str | None = None,
) -> list[str]:
    """What a PyTorch file is, what its conversion would need, and the command for it. Runs nothing in the file."""
    src = _source_file(src)
    raw = read(src)
    family = recognise(raw, str(src))
    source = family.open_source(raw, None, src.name)
    lines = [
        f"{src}: {family.title}",
        f"  sha256      {sha256(src)}",
        f"  weights     {_weights(source)}",
        f"  parameters  {sum(np.size(value) for value in source.tensors.values()):,} in {len(source.tensors)} tensors",
    ]
    options = [f"--config {config}"] if config else []
    options += [f"--preset {preset}"] if preset else []
    options += [f"--set {key}={value}" for key, value in (settings or {}).items()]
    command = " ".join(["jddim convert", str(src), "DST", *options])
    try:
        config_file = _config_file(src, config)
        plan = family.plan(source.tensors, _read_config(config_file), _with_preset(family, preset, settings or {}))
        lines += [f"  config      {config_file}" if config_file else "  config      none beside it"]
        lines += [
            f"  {name:<11} {to_json(part)}"
            for name, part in (("model", plan.model), ("schedule", plan.schedule), ("sampler", plan.sampler))
        ]
        lines += [f"  assumed     {fact}" for fact in plan.assumed]
        lines += [f"  note        {note}" for note in plan.notes]
    except ConversionError as error:
        lines.append(f"  needs       {error}")
        if fitting := _fitting_presets(family, source):
            lines.append(f"  presets     the tensors agree with --preset {' or '.join(fitting)}")
        elif "image size" in str(error):
            command += " --set image_size=SIDE"
    return [*lines, f"convert it:   {command}"]


def _open(
    src: Path,
    config: str | os.PathLike[str] | None,
    settings: Mapping[str, str],
    preset: str | None,
    weights: str | None,
    say: Say,
) -> tuple[Family, Source, Plan, Path | None, Mapping[str, str]]:
    config_file = _config_file(src, config)
    contents = _read_config(config_file)
    raw = read(src)
    family = recognise(raw, str(src))
    source = family.open_source(raw, weights, src.name)
    say(f"{src}: {family.title}")
    say(f"  weights: {_weights(source)}")
    if config_file is not None:
        say(f"  config: {config_file}" + ("" if config else " (found beside the checkpoint)"))
    try:
        settings = _with_preset(family, preset, settings)
        plan = family.plan(source.tensors, contents, settings)
    except ConversionError as error:
        raise ConversionError(f"{src}: {error}") from error
    say(f"  model: {plan.model.summary}")
    for fact in plan.assumed:
        say(f"  assumed: {fact}")
    for name, reason in plan.ignored.items():
        say(f"  ignored: {name}: {reason}")
    for note in plan.notes:
        say(f"  note: {note}")
    return family, source, plan, config_file, settings


def _with_preset(family: Family, preset: str | None, settings: Mapping[str, str]) -> Mapping[str, str]:
    """The preset's settings, with `settings` over them."""
    if preset is None:
        return settings
    if not family.presets:
        raise ConversionError(f"this family has no presets, so no --preset {preset}; use --set KEY=VALUE")
    if preset not in family.presets:
        raise ConversionError(f"unknown preset {preset!r}{did_you_mean(preset, family.presets)}")
    return {**family.presets[preset], **settings}


def _fitting_presets(family: Family, source: Source) -> list[str]:
    """The presets that do not contradict the tensors."""
    fitting = []
    for name, settings in family.presets.items():
        with contextlib.suppress(ConversionError):
            family.plan(source.tensors, None, settings)
            fitting.append(name)
    return fitting


def _verify(family: Family, source: Source, plan: Plan, params: Mapping[str, np.ndarray]) -> verification.Verification:
    tensors = {name: value for name, value in source.tensors.items() if name not in plan.ignored}
    return verification.verify(
        build_model(plan.model, params),
        tensors,
        family,
        plan.model,
        plan.schedule.num_train_timesteps,
        reference_options=plan.reference_options,
    )


def _source_file(src: str | os.PathLike[str]) -> Path:
    path = Path(src)
    return path / "ckpt.pth" if path.is_dir() and (path / "ckpt.pth").is_file() else path


def _config_file(src: Path, config: str | os.PathLike[str] | None) -> Path | None:
    if config is None:
        beside = src.parent / "config.yml"
        return beside if beside.is_file() else None
    if not Path(config).is_file():
        raise ConversionError(f"no such config file: {config}")
    return Path(config)


class _ConfigLoader(yaml.SafeLoader):
    """Safe YAML, and argparse.Namespace read as a mapping: ermongroup's runner dumps its config as one."""


def _namespace(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)  # type: ignore[arg-type]  # raises for another kind of node


_ConfigLoader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", _namespace)


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        contents = yaml.load(path.read_text(), Loader=_ConfigLoader)
    except yaml.constructor.ConstructorError as error:
        raise ConversionError(
            f"{path} holds more than plain values, and jddim never runs code from a config: "
            f"{error.problem} ({str(error.problem_mark).strip()})"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(contents, dict):
        raise ConversionError(f"{path} holds no config: expected sections data, model, diffusion")
    return contents


def _weights(source: Source) -> str:
    step = "" if source.step is None else f", step {source.step:,}"
    return source.weights + step + (f" ({source.note})" if source.note else "")


def _versions() -> dict[str, str | None]:
    packages = ("jax", "flax", "orbax-checkpoint", "torch")
    installed: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # torch may be absent
            installed[name] = importlib.metadata.version(name)
    return {"jddim": jddim.__version__, "python": platform.python_version(), **installed}


__all__ = ["CheckpointError", "ConversionError", "convert", "describe", "verify"]
