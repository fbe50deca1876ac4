"""What a checkpoint folder's metadata says, for people: the model card in it, README.md, and the lines of `jddim info`.

Everything is taken from the metadata; nothing reads the card back. What a file or a user told is printed as code,
on one line, so that it cannot become markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from jddim.checkpoint.metadata import Metadata, Recorded
from jddim.config import AutoencoderConfig, ClassifierConfig, SamplerConfig, ScheduleConfig, counted, to_json
from jddim.schedule import CONTINUOUS

NAME = "README.md"
ALL_ZERO = "its output is all zero: untrained?"


def card(metadata: Recorded, parameters: int) -> str:
    """The card's Markdown. parameters: how many numbers the network has."""
    facts = metadata.provenance
    trained = "training" in facts
    sampled = isinstance(metadata, Metadata)
    kind = (
        "diffusion model's checkpoint"
        if sampled
        else "classifier of noisy images, which guides a diffusion model,"
        if isinstance(metadata.model, ClassifierConfig)
        else "first stage, which makes images of a diffusion model's latents,"
    )
    lines = [
        f"# {_code(_title(metadata))}",
        "",
        f"A {kind} for jddim (DDIM sampling in JAX), {'trained by it' if trained else 'converted from PyTorch'}.",
        "",
        "```",
        f"{_command(metadata)}       # CKPT: this folder",
        "jddim info CKPT                     # what is known of it; --json: all that is recorded",
        "jddim cite CKPT                     # what to cite",
        "```",
        "",
        f"- licence: {_code(facts['license']) if facts.get('license') else 'not stated'}",
        *(_trained(facts) if trained else _converted(facts)),
        f"- network: {metadata.model.summary}; {parameters:,} parameters",
        *([] if (stage := _stage(metadata)) is None else [f"- its latents: of {stage.summary}"]),
        *_conventions(metadata),
        *_list("assumed", facts.get("assumed") or ()),
        *_list("WARNING", facts.get("warnings") or ()),
        f"- written by: {_pairs(facts.get('versions') or {})}",
        f"- SHA-256 of this checkpoint, as `jddim info` prints it: {_code(metadata.sha256)}",
    ]
    return "\n".join(lines) + "\n"


def lines(metadata: Recorded, parameters: int) -> list[str]:
    """What the checkpoint is, a fact a line. parameters: how many numbers the network has.

    What else is recorded is in `to_json`. Provenance may hold whatever an edited file holds, of any type.
    """
    provenance = dict(metadata.provenance)
    wording = provenance.pop("wording", {})
    told, source = wording.get("told", {}), f"  in {provenance.get('family', '?')}"
    facts = [("network", metadata.model.summary), ("parameters", f"{parameters:,}"), ("classes", _classes(metadata))]
    if isinstance(metadata, Metadata):
        summaries = {"schedule": schedule_line(metadata.schedule), "sampler": sampler_line(metadata.sampler)}
        for name, summary in summaries.items():
            facts += [(name, summary), *([(source, _worded(wording[name], told))] if wording.get(name) else [])]
        if metadata.autoencoder is not None:
            facts.append(("latents", f"of {metadata.autoencoder.summary}"))
    else:
        facts.append(("used by", _command(metadata)))
    for name, value in {**provenance, "license": provenance.get("license") or "not stated"}.items():
        match name, value:
            case "ignored" | "reference_options" | "null_label", _:  # for machines, or said above
                continue
            case "autoencoder", {**own}:
                kept = ("family", "source", "assumed", "weights")
                compared = _compared(own.get("verification") or {})
                value = [_text({key: own[key] for key in kept if own.get(key)})] + [compared] * bool(compared)
            case "label_names", {**names}:
                value = f"{counted(len(names), 'name')}, such as {', '.join(map(repr, list(names)[:3]))}"
            case "unchecked", [*names]:
                value = [f"{_text(each)}: told, not checked by the file" for each in names]
            case "verification", {"skipped": True, **rest}:
                value = f"skipped ({rest.get('reason', '--no-verify')}); jddim verify CKPT SRC does it"
            case "verification", _:
                value = _compared(value) or value
        items = value if isinstance(value, list) else [value]
        facts += [(name, _text(item)) for item in items if item not in (None, {})]
    return [f"{name:<15} {text}" for name, text in [*facts, ("sha256", metadata.sha256)]]


def _stage(metadata: Recorded) -> AutoencoderConfig | None:
    return metadata.autoencoder if isinstance(metadata, Metadata) else None


def _text(value: Any) -> str:
    """A value of JSON in one line: an object's entries as name=value."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(item)}" for name, item in value.items() if item is not None)
    return value if isinstance(value, str) else json.dumps(value)


def _classes(metadata: Recorded) -> str:
    model, null_label = metadata.model, metadata.null_label
    if model.num_classes is None:
        return "none" if model.class_embedding is None else f"labels are no numbers ({model.class_embedding} embedding)"
    null = "" if null_label is None else f"; {null_label} is the null label"
    return f"{model.num_classes}, labels 0 to {model.num_classes - 1}{null}"


def schedule_line(config: ScheduleConfig) -> str:
    """A schedule in one line, for people."""
    told = ("t_min", "t_max", "beta_start", "beta_end")
    ends = [f"{name} {value:g}" for name in told if (value := getattr(config, name)) is not None]
    zero = ["zero terminal SNR"] if config.zero_terminal_snr else []
    name = config.name if config.betas is None else "betas listed one by one"
    times = "continuous t" if config.name in CONTINUOUS else f"T = {config.num_train_timesteps}"
    return ", ".join([name, times, *ends, *zero])


def sampler_line(config: SamplerConfig) -> str:
    """The conventions that every source has, then those that are not the default."""
    low, high = config.clip_range
    x_0 = f"clipped to {low:g}..{high:g}" if config.clip else "not clipped"
    said = (
        f"{config.spacing}, {config.num_steps} steps, eta {config.eta:g}, predicts {config.prediction_type}, x_0 {x_0}"
    )
    named = ("spacing", "num_steps", "eta", "prediction_type", "clip", "clip_range")
    default, own = SamplerConfig(), to_json(config)
    rest = {name: value for name, value in own.items() if name not in named and value != getattr(default, name)}
    return f"{said}, {_text(rest)}" if rest else said


def facts(metadata: Recorded) -> dict[str, str]:
    """Where the checkpoint comes from and how it was compared, in short: a name and plain text each."""
    said = metadata.provenance
    source, step = said.get("source") or {}, said.get("step")
    found = {
        "family": said.get("family", "jddim"),
        "source": source.get("hub_id") or source.get("file"),
        "SHA-256 of it": source.get("sha256"),
        "weights": said.get("weights"),
        "step": None if step is None else f"{step:,}",
        "verification": "trained by jddim"
        if "training" in said
        else _compared(said.get("verification")) or "not verified when it was written",
        "SHA-256": metadata.sha256,
    }
    return {name: _cut(str(fact)) for name, fact in found.items() if fact is not None}


def _compared(figure: Any) -> str | None:
    """How a comparison with PyTorch came out; None for what is none."""
    match figure:
        case {"output_error": float(error), "torch": str(torch), **rest}:
            zero = f"; {ALL_ZERO}" if rest.get("all_zero") else ""
            return f"{error:.1e} of the output's scale, against PyTorch {torch}{zero}"
    return None


def _worded(facts: Mapping[str, str], told: Mapping[str, str]) -> str:
    """Facts as their source spells them; those that --set or --preset told are marked so."""
    return ", ".join(f"{name}={value}" + (f" ({told[name]})" if name in told else "") for name, value in facts.items())


def _command(metadata: Recorded) -> str:
    """How it is used: with the options that a network with classes needs; a part beside the network that it serves."""
    classes, null_label = metadata.model.num_classes, metadata.null_label
    if isinstance(metadata.model, AutoencoderConfig):
        return "jddim convert NETWORK DST --autoencoder CKPT"
    if not isinstance(metadata, Metadata):
        return "jddim sample MODEL samples.png --labels 0 --classifier CKPT --classifier-scale 1"
    out = "samples.png" if metadata.image_shape[2] in (1, 3) else "samples.npy"
    if classes is None:
        return f"jddim sample CKPT {out}"
    if null_label is None or null_label != classes - 1:
        return f"jddim sample CKPT {out} --labels 0"
    return f"jddim sample CKPT {out} --num {null_label} --labels 0:{null_label} --guidance-scale 3"


def _title(metadata: Recorded) -> str:
    facts = metadata.provenance
    source = facts.get("source") or {}
    size = "x".join(map(str, metadata.model.image_size))
    return source.get("hub_id") or source.get("file") or f"{size} images, {facts.get('step', 0):,} steps of training"


def _converted(facts: Mapping[str, Any]) -> list[str]:
    source = facts.get("source") or {}
    step = facts.get("step")
    told = ({"preset": facts["preset"]} if facts.get("preset") else {}) | (facts.get("set") or {})
    lines = [f"- family: {_code(facts.get('family'))}"]
    for name, key in (("file", "file"), ("SHA-256 of it", "sha256"), ("hub id", "hub_id"), ("commit", "commit")):
        lines += [f"- {name}: {_code(source[key])}"] if source.get(key) else []
    lines += _list("shards", source.get("shards") or ())
    lines += [f"- config: {_code(file['file'])}, SHA-256 {_code(file['sha256'])}" for file in facts.get("config") or ()]
    lines += [
        f"- weights: {_code(facts.get('weights', 'unstated'))}" + (f", step {step:,}" if step is not None else "")
    ]
    lines += [f"- told: {_pairs(told)}"] if told else []
    lines += [f"- told, not checked by the file: {_pairs(unchecked(facts))}"] if unchecked(facts) else []
    return [*lines, f"- verification: {_verified(facts.get('verification') or {})}"]


def unchecked(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What was told of a converted network that its file would not contradict if it were wrong."""
    told = provenance.get("set") or {}
    return {name: told[name] for name in provenance.get("unchecked") or () if name in told}


def _verified(figure: Mapping[str, Any]) -> str:
    if "output_error" in figure:
        return (
            f"equal to PyTorch {_code(figure['torch'])}, block by block; largest error of the output "
            f"{figure['output_error']:.1e} of its scale (allowed: {figure['tolerance']:g})"
            + (f"; {ALL_ZERO}" if figure.get("all_zero") else "")
        )
    why = f" ({figure['reason']})" if figure.get("reason") else ""
    return f"not verified when it was written{why}; `jddim verify CKPT SRC` does it, and leaves verify.json here"


def _trained(facts: Mapping[str, Any]) -> list[str]:
    data, parent = facts.get("data") or {}, facts.get("parent")
    train = {name: value for name, value in facts["training"].items() if value is not None}
    lines = [f"- training: {facts.get('step', 0):,} steps; averaged weights; {_pairs(train)}"]
    if data:
        number, *shape = data["shape"]
        lines += [f"- data: {_code(PurePath(data['source']).name)}, {number:,} images of {'x'.join(map(str, shape))}"]
    if parent:
        lines += [f"- begun from: a checkpoint of family {_code(parent['family'])}, SHA-256 {_code(parent['sha256'])}"]
    return lines


def _conventions(metadata: Recorded) -> list[str]:
    """The schedule and the sampler's defaults in the source's words; in jddim's, where there is no other source."""
    wording = metadata.provenance.get("wording") or {}
    if wording.get("schedule") or wording.get("sampler"):
        facts = {name: wording.get(name) or {} for name in ("schedule", "sampler")}
        where = " (in the source's words)"
    else:
        facts = metadata.conventions()
        where = ""
    return [
        f"- {name}{where}: {_pairs({k: v for k, v in pairs.items() if v is not None})}" for name, pairs in facts.items()
    ]


def _pairs(pairs: Mapping[str, Any]) -> str:
    return _code(", ".join(f"{name}={value}" for name, value in pairs.items())) if pairs else "not recorded"


def _list(name: str, items: Iterable[Any]) -> list[str]:
    return [f"- {name}: {_code(item)}" for item in items]


def _code(text: Any) -> str:
    """A code span of one line, cut where it is absurdly long (betas by the thousand)."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text)).replace("`", "'").strip() or "?"
    return f"`{_cut(shown)}`"


def _cut(text: str) -> str:
    return text if len(text) <= 500 else text[:480] + " ... (cut)"
