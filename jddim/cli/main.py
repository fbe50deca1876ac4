"""The command line: parses, calls, reports. jax and torch are imported only by the commands that need them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from jddim import __version__, interrupt
from jddim.cli import (
    bulk,
    cache,
    completion,
    convert,
    doctor,
    edit,
    evaluate,
    export,
    info,
    interpolate,
    invert,
    known,
    sample,
    schedule,
    serve,
    sweep,
    train,
    warmup,
)
from jddim.cli.options import OneLineParser, one_line, silently, summary
from jddim.installing import install_line

GROUPS = {
    "Start": ("sample", "list", "info", "convert", "serve", "doctor"),
    "Sample": ("edit", "interpolate", "invert", "warmup"),
    "Research": ("schedule", "sweep", "evaluate", "train"),
    "Scale": ("bulk", "collect", "check", "reproduce", "export"),
    "Files": ("verify", "diff", "cite", "export-torch", "cache", "completion"),
}
"""The commands as `jddim --help` shows them, and the site."""

EXAMPLES = """\
examples:
  jddim sample google/ddpm-cifar10-32 a.png    of a hub id: needs the extra hub
  jddim sample ckpt.pth a.png      of a PyTorch file, which is converted once
  jddim info ckpt.pth              what the file is, and what it must be told
  jddim convert ckpt.pth mnist     a folder with the weights and their settings

`jddim COMMAND --help` has a command's options and examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. A user's mistake is one line on stderr and status 1 (2: bad options)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    try:
        args = _parser().parse_args(words)
        quiet, document = getattr(args, "quiet", False), getattr(args, "json", False)
        with silently(document=document) if quiet else contextlib.nullcontext():
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
        ways = f"{install_line('cuda12')} (on a TPU: [tpu])"
        return f"jax has no device for JAX_PLATFORMS={asked} here: unset it, or {ways}"
    return None


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="jddim",
        usage="jddim COMMAND ...",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jddim {__version__}")

    def entrance(args: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=entrance)  # of a bare `jddim`
    commands = parser.add_subparsers(prog="jddim", metavar="COMMAND", help=argparse.SUPPRESS)

    def command(name: str, run: Any, text: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
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
        known,
        cache,
    ):
        module.add(command)
    completion.add(command, commands.choices)
    lines = ["DDIM sampling in JAX for diffusion models trained in PyTorch."]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<12}  {summary(commands.choices[name])}" for name in names)]
    parser.description = "\n".join(lines)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
