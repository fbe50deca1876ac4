"""`jddim info`, `diff` and `cite`: what a file is, what differs between two, and whose work it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from jddim.cli.convert import convert_module, settings, source_options
from jddim.cli.options import printable


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "diff",
        _diff,
        "what differs between two checkpoints, sets of samples or settings; exit status 0 if nothing, as diff's",
        "mnist mnist-raw\nmine.npy theirs.npy\na.png b.png",
    )
    sub.add_argument("a", type=Path, help="a checkpoint folder, .npy or .npz samples, .json or .png settings")
    sub.add_argument("b", type=Path, help="another of the same kind")

    sub = command(
        "cite",
        _cite,
        "BibTeX of the method, the software and, of a checkpoint, where it comes from",
        "> jddim.bib\nmnist > mnist.bib",
    )
    sub.add_argument("ckpt", type=Path, nargs="?", help="a checkpoint folder; without one: the method and the software")

    sub = command(
        "info",
        _info,
        "what a checkpoint is: a jddim folder, or a PyTorch file (nothing in it is run)",
        "mnist\nckpt.pth",
    )
    sub.add_argument("path")
    source_options(sub)


def _info(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if (path / "metadata").is_dir():
        from jddim.checkpoint.folder import load_metadata
        from jddim.models.building import abstract_model, flat_params

        metadata = load_metadata(path)
        data = metadata.to_json()
        provenance = data.pop("provenance")
        wording = provenance.pop("wording", {})
        count = sum(leaf.size for leaf in flat_params(abstract_model(metadata.model)).values())
        lines = {"checkpoint": path, "sha256": metadata.sha256, "parameters": f"{count:,}", **data, **provenance}
        for name, value in lines.items():
            if name == "verification" and "blocks" in value:
                value = f"{value['output_error']:.1e} of the output's scale, against PyTorch {value['torch']}"
            shown = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            print(f"{name:<15} {printable(shown)}")
            if name in ("schedule", "sampler") and wording.get(name):
                print(printable(f"{'  in ' + provenance['family']:<15} {_worded(wording[name], wording['told'])}"))
        return 0
    lines = convert_module().describe(
        args.path, args.config, settings(args.set), args.preset, args.variant, args.revision
    )
    print("\n".join(map(printable, lines)))
    return 0


def _worded(facts: Mapping[str, str], told: Mapping[str, str]) -> str:
    """Facts as their source spells them; those that --set or --preset told are marked so."""
    return ", ".join(f"{name}={value}" + (f" ({told[name]})" if name in told else "") for name, value in facts.items())


def _diff(args: argparse.Namespace) -> int:
    from jddim.checkpoint.diff import diff, table

    rows = diff(args.a, args.b)
    print("\n".join(map(printable, [*table(rows).split("\n"), f"{len(rows)} differ"])) if rows else "equal")
    return int(bool(rows))


def _cite(args: argparse.Namespace) -> int:
    from jddim.checkpoint.cite import bibtex, citations

    provenance = None
    if args.ckpt is not None:
        from jddim.checkpoint.folder import load_metadata

        provenance = load_metadata(args.ckpt).provenance
    print(bibtex(*citations(provenance)), end="")
    return 0
