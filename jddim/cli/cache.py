"""`jddim cache`: what is kept of converted checkpoints and compiled programs, and emptying it."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jddim.cli.options import add_json, print_json
from jddim.config import counted, printable
from jddim.run import cache


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "cache",
        _cache,
        "list what is kept of checkpoints and programs, or remove it\n"
        "They are in JDDIM_CACHE, or jddim in the user's cache folder; all can be made again.",
        "\n--empty\n--empty checkpoints",
    )
    sub.add_argument(
        "--empty", nargs="?", const="all", choices=("checkpoints", "programs", "all"), help="remove them (default all)"
    )
    add_json(sub)


def _cache(args: argparse.Namespace) -> int:
    from jddim.files import remove

    root = cache.root()
    kept = _entries()
    removed = [entry for entry in kept if args.empty in ("all", entry["kind"])]
    for entry in removed:
        remove(Path(entry["folder"]))
    if args.empty in ("all", "checkpoints"):
        _sweep()
    if args.json:
        left = [entry for entry in kept if entry not in removed]
        print_json({"folder": None if root is None else str(root), "removed": removed, "kept": left})
    elif root is None:
        print("no cache: JDDIM_CACHE is empty")
    else:
        shown = removed if args.empty else kept
        for entry in shown:
            print(printable(f"{entry['bytes'] / 1e6:>9.1f} MB  {Path(entry['folder']).name}{_from(entry)}"))
        total = sum(entry["bytes"] for entry in shown) / 1e6
        print(f"{'removed: ' if args.empty else ''}{counted(len(shown), 'folder')}, {total:.1f} MB in {root}")
    return 0


def _entries() -> list[dict[str, Any]]:
    """The folders of the cache: their kind, size and, of a checkpoint, what it was converted from."""
    return [
        {
            "kind": kind,
            "folder": str(folder),
            "bytes": sum(map(_size, folder.rglob("*"))),
            "from": _source(kind, folder),
        }
        for kind in ("checkpoints", "programs")
        for folder in cache.found(kind)
    ]


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # a living process removes some
        return path.lstat().st_size if path.is_file() else 0
    return 0


def _sweep() -> None:
    """Remove receipts, and what killed processes left; what a living one works on is locked, and stays."""
    from jddim.files import lock, remove

    for path in cache.found("left"):
        with contextlib.suppress(FileNotFoundError):  # a living process is done with it
            held = os.open(path, os.O_RDONLY)
            try:
                if lock(held):
                    remove(path)
            finally:
                os.close(held)


def _source(kind: str, folder: Path) -> str | None:
    """What a checkpoint was converted from, as its metadata says, but a file by its path; None: it cannot be told."""
    if kind == "programs":
        return None
    from jddim.checkpoint.folder import CheckpointError, load_recorded
    from jddim.files import read_regular

    try:
        source = load_recorded(folder).provenance.get("source", {})
    except CheckpointError:
        return None
    if "hub_id" in source:
        return f"{source['hub_id']}@{source['commit']}"
    with contextlib.suppress(OSError, ValueError):
        return read_regular(cache.source_of(folder)).decode()
    return str(source.get("file"))


def _from(entry: dict[str, Any]) -> str:
    if entry["kind"] == "programs":
        return "  compiled programs"
    return f"  from {entry['from']}" if entry["from"] else "  damaged"
