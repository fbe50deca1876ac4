"""The command line: parses, calls, reports. jax and torch are imported only by the commands that need them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from jddim import __version__, interrupt
from jddim.cli import (
    bulk,
    convert,
    doctor,
    edit,
    evaluate,
    export,
    info,
    interpolate,
    invert,
    sample,
    schedule,
    serve,
    sweep,
    train,
    warmup,
)
from jddim.cli.options import OneLineParser, one_line

EXAMPLES = """\
examples:
  jddim convert ckpt.pth mnist                      ermongroup's ckpt.pth; config.yml is found beside it
  jddim convert model-790000.ckpt cifar10 --set image_size=32
  jddim sample mnist digits.png                     64 images in a grid
  jddim sample mnist digits.npz --num 50000 --batch-size 256 --steps 50 --seed 1
  jddim bulk mnist fifty --num 50000                in shards, and goes on where it was stopped
  jddim sample mnist path.gif --num 16 --eta 0.5    the way from noise to image
  jddim invert mnist digits.png x_T.npy             images to the noise that they are sampled from
  jddim schedule --spacing quad --steps 20          the table of steps, for any spacing
  jddim info ckpt.pth                               what a file is, and how to convert it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. A user's mistake is one line on stderr and status 1 (2: bad options)."""
    try:
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        return status
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or interrupt.heard():
            print(interrupt.MESSAGE, file=sys.stderr)
            return interrupt.status()
        if told := _no_device():
            print(f"jddim: error: {told}", file=sys.stderr)
            return 1
        mistakes = (ValueError, OSError, ArithmeticError, MemoryError, ModuleNotFoundError)
        if os.environ.get("JDDIM_DEBUG") or not isinstance(error, mistakes):
            raise
        print(f"jddim: error: {one_line(error)}", file=sys.stderr)
        return 1


def _no_device() -> str | None:
    """What to say if jax has no device because of JAX_PLATFORMS, whatever failed for that."""
    asked, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not asked or jax is None:
        return None
    try:
        jax.devices()
    except Exception:  # a RuntimeError, an AssertionError without a word
        return f"jax has no device for JAX_PLATFORMS={asked} here: unset it, or pip install 'jddim[cuda12]' or [tpu]"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="jddim",
        description="DDIM sampling in JAX for diffusion models trained in PyTorch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jddim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="examples:\n" + "".join(f"  jddim {name} {line}\n" for line in examples.split("\n")),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    for module in (
        convert,
        sample,
        invert,
        sweep,
        edit,
        interpolate,
        evaluate,
        doctor,
        warmup,
        bulk,
        export,
        train,
        serve,
        schedule,
        info,
    ):
        module.add(command)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
