"""`jddim info`, `diff` and `cite`: what a file is, what differs between two, and whose work it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jddim import converting
from jddim.cli.convert import settings, source_options
from jddim.cli.options import printable


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "diff",
        _diff,
        "what differs between two checkpoints, sets of samples or settings; exit status 0 if nothing, as diff's",
        "mnist mnist-raw\nmine.npy theirs.npy\na.png b.png",
    )
    sub.add_argument(
        "a", type=Path, help="a checkpoint folder, .npy or .npz samples, settings in .json or in a picture"
    )
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
    lines = converting.info(
        args.path,
        config=args.config,
        settings=settings(args.set),
        preset=args.preset,
        weights=args.weights,
        variant=args.variant,
        revision=args.revision,
    )
    print("\n".join(map(printable, lines)))
    return 0


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
