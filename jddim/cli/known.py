"""`jddim list`: the published checkpoints that jddim knows of."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from jddim.cli.options import add_json, print_json
from jddim.config import did_you_mean
from jddim.known import Preset, presets


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "list",
        _list,
        "list published checkpoints, and how to come by each\n"
        "FID is the paper's, of its own sampler. Nothing is downloaded.",
        "\nguided-256\n--json",
    )
    sub.add_argument("name", nargs="?", help="all that is known of one")
    add_json(sub)


def _list(args: argparse.Namespace) -> int:
    found = [each for each in presets if args.name in (None, each.name)]
    if not found:
        near = did_you_mean(args.name, [each.name for each in presets])
        raise ValueError(f"no published checkpoint is known as {args.name}{near}")
    if args.json:
        print_json([dataclasses.asdict(each) for each in found])
    elif args.name is not None:
        print("\n".join(_card(found[0])))
    else:
        heads = ("name", "family", "side", "classes", "licence", "schedule, T", "variance", "FID")
        rows = [heads, *(_row(each) for each in found)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        print("jddim list NAME says how to get one")
    return 0


def _row(known: Preset) -> tuple[str, ...]:
    fid = "" if known.fid is None else f"{known.fid:g}"
    trained = f"{known.schedule}, {known.train_timesteps}" if known.train_timesteps else known.schedule
    own = (known.name, known.family, str(known.image_size), str(known.classes or "-"), known.licence)
    return (*own, trained, known.variance, fid)


def _card(known: Preset) -> list[str]:
    facts = {
        "family": known.family,
        "images": f"{known.image_size}x{known.image_size}",
        "classes": str(known.classes or "none"),
        "licence": known.licence or "not stated",
    }
    discrete = f"{known.schedule} betas, T = {known.train_timesteps}"
    facts["schedule"] = f"{discrete if known.train_timesteps else known.schedule}, predicting {known.prediction}"
    if known.train_timesteps:
        facts["variance"] = known.variance or "as its config says"
    if known.fid is not None:
        facts["FID"] = f"{known.fid:g} ({known.fid_from})"
    facts["get it"] = known.advice or f"jddim sample {known.name} out.png"
    return [known.name, *(f"  {name:<13} {fact}" for name, fact in facts.items() if fact)]
