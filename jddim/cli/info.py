"""`jddim info`, `diff` and `cite`: what a file is, what differs between two, and whose work it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jddim import converting
from jddim.cli.options import CKPT, add_ckpt, add_json, print_json, refuse_told, resolved, source_options, told_of
from jddim.config import printable


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "diff",
        _diff,
        "compare two checkpoints, sets of samples, or settings\nExit status 0 if nothing differs, 1 if something does.",
        "mnist mnist-raw\nmine.npy theirs.npy\na.png b.png",
    )
    sub.add_argument(
        "a", type=Path, help="a checkpoint folder, .npy or .npz samples, settings in .json or in a picture"
    )
    sub.add_argument("b", type=Path, help="another of the same kind")
    add_json(sub)

    sub = command(
        "cite",
        _cite,
        "print BibTeX of the method, the software and a checkpoint",
        "> jddim.bib\nmnist > mnist.bib",
    )
    add_ckpt(sub, "?", f"{CKPT}; without one: the method and the software")

    sub = command(
        "info",
        _info,
        "say what a checkpoint is, and how to convert it\nA jddim folder, or a PyTorch file; nothing in it is run.",
        "mnist\nmnist --json\nckpt.pth",
    )
    sub.add_argument("path")
    add_json(sub)
    source_options(sub)


def _info(args: argparse.Namespace) -> int:
    if args.json and (found := converting.recorded(args.path)) is not None:
        print_json(found)
        return 0
    lines = converting.info(
        args.path,
        **told_of(args),
    )
    if args.json:
        print_json({"source": args.path, "lines": lines})
    else:
        print("\n".join(map(printable, lines)))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from jddim.checkpoint.diff import diff, table

    rows = diff(args.a, args.b)
    if args.json:
        print_json({"a": str(args.a), "b": str(args.b), "differences": [row._asdict() for row in rows]})
        return int(bool(rows))
    print("\n".join(map(printable, [*table(rows).split("\n"), f"{len(rows)} differ"])) if rows else "equal")
    return int(bool(rows))


def _cite(args: argparse.Namespace) -> int:
    from jddim.checkpoint.cite import bibtex, citations

    provenance = None
    if args.ckpt is None:
        refuse_told(args)
    else:
        from jddim.checkpoint.folder import load_recorded

        provenance = load_recorded(resolved(args.ckpt, args)).provenance
    print(bibtex(*citations(provenance)), end="")
    return 0
