"""`jddim export`: a checkpoint's sampler as a file that needs jax alone to run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from jddim.cli.options import add_ckpt, add_request, checkpoint, request_of
from jddim.run.request import taken_by


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "export",
        _export,
        "write the sampler, or a step, as StableHLO for jax alone\ndocs/scale.md says how it is run.",
        "mnist mnist.jddim --steps 30\nmnist step.jddim --step\n"
        "mnist exact.jddim --platforms cpu --batch-size 16 --weights-beside",
    )
    add_ckpt(sub)
    sub.add_argument("out", type=Path, metavar="OUT.jddim", help="the file to write")
    sub.add_argument("--step", action="store_true", help="one DDIM step instead, for a loop of your own")
    sub.add_argument("--batch-size", type=int, metavar="B", help="compiled in (default: any, said when it is run)")
    sub.add_argument(
        "--platforms", type=_platforms, default=("cpu", "cuda", "tpu"), metavar="LIST", help="default cpu,cuda,tpu"
    )
    sub.add_argument("--weights-beside", action="store_true", help="write them as OUT.weights.npz, not into OUT")
    add_request(sub, "export")


def _platforms(text: str) -> tuple[str, ...]:
    known, given = ("cpu", "cuda", "rocm", "tpu"), tuple(text.split(","))
    if not set(given) <= set(known) or len(set(given)) != len(given):
        raise argparse.ArgumentTypeError(f"takes some of {', '.join(known)}, separated by commas; got {text!r}")
    return given


def _export(args: argparse.Namespace) -> int:
    from jddim.images import check_output

    request = request_of(args, "export")
    taken = {"steps", "spacing", "dtype", *(o.name for o in taken_by("export") if o.convention)} - {"variance"}
    if args.step and (left := sorted(request.asked().keys() - taken)):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in left)
        raise ValueError(f"--step is DDIM's, without guidance: leave out {names}")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    check_output(args.out, formats={".jddim": "a sampler"}, overwrite=args.overwrite)
    metadata = checkpoint(args)
    check_output(args.out, metadata.model.in_channels, formats={".jddim": "a sampler"}, overwrite=args.overwrite)

    import jddim
    from jddim.scale import export

    rest, used = request.settled(metadata.sampler)
    ddim = dataclasses.replace(jddim.load(args.ckpt, dtype=request.dtype), sampler=used)
    if args.step:
        exported = export.export_step(ddim, batch_size=args.batch_size, platforms=args.platforms)
    else:
        exported = export.export_sampler(ddim, rest, batch_size=args.batch_size, platforms=args.platforms)
    written = export.save(args.out, exported, beside=args.weights_beside)
    takes = ", ".join(["weights", *(f"{name} {shape}" for name, shape in exported.about["arguments"].items())])
    print(f"{' and '.join(map(str, written))}: {exported.about['kind']} for {', '.join(args.platforms)}, takes {takes}")
    return 0
