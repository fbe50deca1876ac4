"""`jddim export`: a checkpoint's sampler as a file that needs jax alone to run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jddim.cli.options import SPACING_NAMES
from jddim.config import METHODS


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "export",
        _export,
        "the sampler, or one step of it, as StableHLO that runs with jax alone (docs/scale.md says how)",
        "mnist mnist.jddim --steps 30\nmnist step.jddim --step\n"
        "mnist exact.jddim --platforms cpu --batch-size 16 --weights beside",
    )
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument("out", type=Path, metavar="OUT.jddim", help="the file to write")
    sub.add_argument("--step", action="store_true", help="one DDIM step instead, for a loop of your own")
    sub.add_argument("--steps", type=int, metavar="S", help="default: the checkpoint's; eta is given when it is run")
    sub.add_argument("--spacing", metavar="NAME", help=f"{SPACING_NAMES}; default: the checkpoint's")
    sub.add_argument("--clip", action=argparse.BooleanOptionalAction, help="as in jddim sample")
    sub.add_argument("--method", choices=METHODS, default="ddim", help="as in jddim sample; default ddim")
    sub.add_argument("--guidance-scale", type=float, metavar="W", help="as in jddim sample; compiled in")
    sub.add_argument("--null-label", type=int, metavar="N", help="as in jddim sample")
    sub.add_argument("--batch-size", type=int, metavar="B", help="compiled in (default: any, said when it is run)")
    sub.add_argument(
        "--platforms", type=_platforms, default=("cpu", "cuda", "tpu"), metavar="LIST", help="default cpu,cuda,tpu"
    )
    sub.add_argument(
        "--weights", choices=("inside", "beside"), default="inside", help="beside: as OUT.weights.npz (default inside)"
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network's computation")


def _platforms(text: str) -> tuple[str, ...]:
    known, given = ("cpu", "cuda", "rocm", "tpu"), tuple(text.split(","))
    if not set(given) <= set(known) or len(set(given)) != len(given):
        raise argparse.ArgumentTypeError(f"takes some of {', '.join(known)}, separated by commas; got {text!r}")
    return given


def _export(args: argparse.Namespace) -> int:
    from jddim.checkpoint.folder import load_metadata
    from jddim.images import check_output

    if args.out.suffix != ".jddim":
        raise ValueError(f"{args.out}: end OUT in .jddim")
    if args.step and (args.method != "ddim" or args.guidance_scale is not None or args.null_label is not None):
        raise ValueError("--step is DDIM's, without guidance: leave out --method, --guidance-scale and --null-label")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    metadata = load_metadata(args.ckpt)
    check_output(args.out, metadata.model.in_channels, formats=(".jddim",))

    import jddim
    from jddim.scale import export

    asked = {"num_steps": args.steps, "spacing": args.spacing, "clip": args.clip}
    ddim = jddim.load(args.ckpt, dtype=args.dtype)
    ddim = ddim.with_sampler(**{name: value for name, value in asked.items() if value is not None})
    common = {"batch_size": args.batch_size, "platforms": args.platforms}
    if args.step:
        exported = export.export_step(ddim, **common)
    else:
        exported = export.export_sampler(
            ddim, method=args.method, guidance_scale=args.guidance_scale, null_label=args.null_label, **common
        )
    written = export.save(args.out, exported, beside=args.weights == "beside")
    takes = ", ".join(["weights", *(f"{name} {shape}" for name, shape in exported.about["arguments"].items())])
    print(f"{' and '.join(map(str, written))}: {exported.about['kind']} for {', '.join(args.platforms)}, takes {takes}")
    return 0
