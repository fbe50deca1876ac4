"""`jddim convert`, `export-torch` and `verify`: what reads and writes PyTorch's checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from jddim import converting
from jddim.cli.options import add_ckpt, add_json, print_json, resolved, say, source_options, told_of


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "convert",
        _convert,
        "convert a PyTorch checkpoint into a jddim folder, and verify it",
        "ckpt.pth mnist\nckpt.pth mnist-raw --weights raw\nema_diffusion.ckpt cifar10 --set image_size=32\n"
        "google/ddpm-cifar10-32 cifar10\nunet/model.safetensors x --config config.json --config scheduler_config.json",
    )
    sub.add_argument(
        "src",
        help="a checkpoint file, a folder (a run's, a diffusers pipeline's), or a hub id: google/ddpm-cifar10-32",
    )
    sub.add_argument("dst", type=Path, help="folder to write")
    source_options(sub)
    sub.add_argument(
        "--license", metavar="NAME", help="the weights', such as MIT: recorded, and said by the model card"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it is a jddim checkpoint")
    sub.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with PyTorch (recorded)")

    sub = command(
        "export-torch",
        _export_torch,
        "write a checkpoint in the format of a PyTorch source\nThe source's own loader reads the result.",
        "mnist ckpt-folder\nmnist pipeline --format diffusers",
    )
    add_ckpt(sub)
    sub.add_argument("dst", type=Path, help="file or folder to write")
    sub.add_argument("--format", metavar="NAME", help="ermongroup, pesser, ...; default: where it came from")
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it is a file")

    sub = command("verify", _verify, "compare a checkpoint with its PyTorch source, block by block", "mnist ckpt.pth")
    sub.add_argument("ckpt", type=Path)
    sub.add_argument("src", help="the file, folder or hub id that it was converted from")
    sub.add_argument("--config", type=Path, action="append", metavar="FILE", help="as given to convert")
    add_json(sub)


def _convert(args: argparse.Namespace) -> int:
    if note := converting.shadowed(args.src):
        say(note)
    converting.convert(
        args.src,
        args.dst,
        **told_of(args),
        license=args.license,
        verify=args.verify,
        overwrite=args.overwrite,
        say=say,
    )
    return 0


def _export_torch(args: argparse.Namespace) -> int:
    from jddim.files import check_free

    check_free(args.dst, overwrite=args.overwrite)
    name = converting.export_torch(resolved(args.ckpt, args), args.dst, args.format, overwrite=args.overwrite)
    print(f"wrote {args.dst} ({name})")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from jddim.checkpoint.card import unchecked
    from jddim.checkpoint.folder import load_recorded
    from jddim.files import atomic

    result = converting.verify(args.ckpt, args.src, config=args.config)
    if args.json:
        print_json(result.to_json())
    else:
        print(result)
    with atomic(Path(args.ckpt) / "verify.json") as staging:
        staging.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if result.first_bad is not None:
        print(
            f"jddim: error: {args.ckpt} differs from PyTorch by more than {result.tolerance:g} of a block's scale, "
            f"first at {result.first_bad}",
            file=sys.stderr,
        )
        return 1
    if args.json:
        return 0
    print(f"equal: largest error of the output {result.output_error:.1e} of its scale; kept in {args.ckpt}/verify.json")
    if told := unchecked(load_recorded(args.ckpt).provenance):
        say(f"told, not checked by the file: {', '.join(f'{name} = {value}' for name, value in told.items())}")
    return 0
