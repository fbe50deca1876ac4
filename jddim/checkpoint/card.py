"""What a checkpoint folder's metadata says, for people: the model card in it, README.md, and the lines of `jddim info`.

Everything is taken from the metadata; nothing reads the card back. What a file or a user told is printed as code,
on one line, so that it cannot become markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from jddim.config import to_json

if TYPE_CHECKING:
    from jddim.checkpoint.metadata import Metadata

NAME = "README.md"


def card(metadata: Metadata, parameters: int) -> str:
    """The card's Markdown. parameters: how many numbers the network has."""
    facts = metadata.provenance
    trained = "training" in facts
    lines = [
        f"# {_code(_title(metadata))}",
        "",
        "A diffusion model's checkpoint for jddim (DDIM sampling in JAX), "
        + ("trained by it." if trained else "converted from PyTorch."),
        "",
        "```",
        f"jddim sample CKPT samples.png{_labels(metadata)}       # CKPT: this folder",
        "jddim info CKPT                     # all that is recorded of it",
        "jddim cite CKPT                     # what to cite",
        "```",
        "",
        f"- licence: {_code(facts['license']) if facts.get('license') else 'not stated'}",
        *(_trained(facts) if trained else _converted(facts)),
        f"- network: {metadata.model.summary}; {parameters:,} parameters",
        *_conventions(metadata),
        *_list("assumed", facts.get("assumed") or ()),
        f"- written by: {_pairs(facts.get('versions') or {})}",
        f"- SHA-256 of this checkpoint, as `jddim info` prints it: {_code(metadata.sha256)}",
    ]
    return "\n".join(lines) + "\n"


def lines(metadata: Metadata, parameters: int) -> list[str]:
    """All that is recorded, a fact a line. parameters: how many numbers the network has."""
    data = metadata.to_json()
    provenance = data.pop("provenance")
    wording = provenance.pop("wording", {})
    facts = {"sha256": metadata.sha256, "parameters": f"{parameters:,}", **data, **provenance}
    found = []
    for name, value in facts.items():
        if name == "verification" and isinstance(value, dict) and "output_error" in value:
            value = _compared(value)
        found.append(f"{name:<15} {json.dumps(value) if isinstance(value, (dict, list)) else value}")
        if name in ("schedule", "sampler") and wording.get(name):
            source = f"  in {provenance.get('family', '?')}"
            found.append(f"{source:<15} {_worded(wording[name], wording.get('told', {}))}")
    return found


def facts(metadata: Metadata) -> dict[str, str]:
    """Where the checkpoint comes from and how it was compared, in short: a name and plain text each."""
    said = metadata.provenance
    source, step = said.get("source") or {}, said.get("step")
    found = {
        "family": said.get("family", "jddim"),
        "source": source.get("hub_id") or source.get("file"),
        "SHA-256 of it": source.get("sha256"),
        "weights": said.get("weights"),
        "step": None if step is None else f"{step:,}",
        "verification": "trained by jddim" if "training" in said else _compared(said.get("verification")),
        "SHA-256": metadata.sha256,
    }
    return {name: _cut(str(fact)) for name, fact in found.items() if fact is not None}


def _compared(figure: Any) -> str:
    match figure:
        case {"output_error": float(error), "torch": str(torch)}:
            return f"{error:.1e} of the output's scale, against PyTorch {torch}"
    return "not verified when it was written"


def _worded(facts: Mapping[str, str], told: Mapping[str, str]) -> str:
    """Facts as their source spells them; those that --set or --preset told are marked so."""
    return ", ".join(f"{name}={value}" + (f" ({told[name]})" if name in told else "") for name, value in facts.items())


def _labels(metadata: Metadata) -> str:
    """The options that a network with classes needs."""
    classes, null_label = metadata.model.num_classes, metadata.null_label
    if classes is None:
        return ""
    if null_label is None or null_label != classes - 1:
        return " --labels 0"
    return f" --num {null_label} --labels 0:{null_label} --guidance-scale 3"


def _title(metadata: Metadata) -> str:
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
    return [*lines, f"- verification: {_verified(facts.get('verification') or {})}"]


def _verified(figure: Mapping[str, Any]) -> str:
    if "output_error" in figure:
        return (
            f"equal to PyTorch {_code(figure['torch'])}, block by block; largest error of the output "
            f"{figure['output_error']:.1e} of its scale (allowed: {figure['tolerance']:g})"
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


def _conventions(metadata: Metadata) -> list[str]:
    """The schedule and the sampler's defaults in the source's words; in jddim's, where there is no other source."""
    wording = metadata.provenance.get("wording") or {}
    if wording.get("schedule") or wording.get("sampler"):
        facts = ((name, wording.get(name) or {}) for name in ("schedule", "sampler"))
        where = " (in the source's words)"
    else:
        facts = ((name, to_json(getattr(metadata, name))) for name in ("schedule", "sampler"))
        where = ""
    return [f"- {name}{where}: {_pairs({k: v for k, v in pairs.items() if v is not None})}" for name, pairs in facts]


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
