"""What several commands take or print alike, and the parser that reports a mistake in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jddim.config import printable
from jddim.converting import Check, Told, UnsettledError
from jddim.run.request import ELSEWHERE, ONE_NETWORK, OWN, Request, RequestError, of_peers, options, taken_by

if TYPE_CHECKING:
    import numpy as np

    from jddim.checkpoint.metadata import Metadata, Recorded
    from jddim.models.classifier import Classifier
    from jddim.pipeline import DDIM
    from jddim.run.plan import Plan


def add_request(sub: argparse.ArgumentParser, command: str, **told: str) -> None:
    """Give a command every option of `Request` that it takes, and have it refuse the others by their reasons.

    told: help in place of a field's. An option that has been defined before is left as it is. --condition and
    --classifier, which name files, are added here too.
    """
    if command not in ("serve", "bulk", "warmup"):  # which name no file, or go on with what is there
        add_overwrite(sub)
    if command != "serve":
        quiet = "print nothing but errors and warnings"
        sub.add_argument("-q", "--quiet", action="store_true", help=quiet)
    condition = (
        "for a network that is given an image beside x_t: one for each, or one for all; .npy, .npz, .png, a folder"
    )
    classifier = f"a classifier, which leads to --labels; with --classifier-scale; {CKPT}"
    for flag, text, metavar, reasons in (
        ("--condition", condition, "FILE", WITHOUT_CONDITION),
        ("--classifier", classifier, "CKPT", ONE_NETWORK),
    ):
        if why := reasons.get(command):
            sub.add_argument(flag, action=_Refused, why=why, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            sub.add_argument(flag, type=Path, metavar=metavar, help=text)
    defined = {name for action in sub._actions for name in action.option_strings}
    conventions = sub.add_argument_group("conventions", "each overrides the checkpoint's (`jddim info` shows them)")
    for name, default, option in options():
        reason = option.left_out.get(command)
        if option.flag in defined or reason == OWN:
            continue
        if reason is None:
            place = conventions if option.convention else sub
            place.add_argument(option.flag, dest=name, default=default, help=told.get(name, option.help), **option.how)
        elif not option.only:
            spellings = [option.flag]
            if option.how.get("action") is argparse.BooleanOptionalAction:
                spellings.append(f"--no-{option.flag[2:]}")
            sub.add_argument(*spellings, action=_Refused, why=reason, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


WITHOUT_CONDITION = {
    "warmup": "zeros stand for it, as large as the images: a smaller one is another program",
    "export": "the exported program takes it as an argument",
    "serve": "the page makes images from noise alone; give it to jddim sample",
}
"""Command -> why it has no --condition."""


def condition_of(path: Path | None, size: tuple[int, int], num: int = 1) -> np.ndarray | None:
    """The images of --condition, `(n, h, w, c)` float32; one alone is repeated `num` times.

    size: of the images made; pictures may be smaller by whole factors.
    """
    if path is None:
        return None
    import numpy as np

    from jddim.images import load_images

    refusals = []
    for factor in range(1, min(size) + 1):
        if size[0] % factor == size[1] % factor == 0:
            try:
                images = load_images(path, (size[0] // factor, size[1] // factor))
                return np.repeat(images, num, axis=0) if len(images) == 1 else images
            except ValueError as error:
                refusals.append(error)
    raise refusals[0]


def classifier_of(args: argparse.Namespace, request: Request) -> Classifier | None:
    """The network of --classifier, in the request's dtype."""
    if args.classifier is None:
        return None
    import jddim
    from jddim.checkpoint.folder import load_classifier_metadata
    from jddim.resolving import resolve

    named, args.classifier = args.classifier, resolve(args.classifier)
    load_classifier_metadata(args.classifier, named)
    return jddim.load_classifier(args.classifier, dtype=request.dtype)


def given_classifier(args: argparse.Namespace) -> dict[str, Any]:
    """--classifier, if it is given, as the settings record it: its name and the checkpoint's digest."""
    if args.classifier is None:
        return {}
    from jddim.checkpoint.folder import load_classifier_metadata

    digest = load_classifier_metadata(args.classifier).sha256
    return {"classifier": {"file": args.classifier.resolve().name, "sha256": digest}}


def given_file(path: Path | None) -> dict[str, str] | None:
    """A file or folder of arrays, as the settings record it: its name and the digest of its bytes."""
    return None if path is None else {"file": path.name, "sha256": digest_of(path)}


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, or of a folder's pictures', one after the other."""
    from jddim.files import read_regular

    digest = hashlib.sha256()
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() == ".png") if path.is_dir() else [path]
    for file in pictures:
        digest.update(read_regular(file))
    return digest.hexdigest()


def request_of(args: argparse.Namespace, command: str) -> Request:
    """The request that a command's options make."""
    asked: dict[str, Any] = {o.name: getattr(args, o.name) for o in taken_by(command)}
    asked = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    return Request(**asked)


def quiet(request: Request) -> Request:
    """The request at eta 0 where it says none, and its method takes one."""
    from jddim.run.methods import find

    return dataclasses.replace(request, eta=0.0) if request.eta is None and find(request.method).takes_eta else request


class _Refused(argparse.Action):
    """An option that a command does not take, with the reason."""

    def __init__(self, option_strings: Sequence[str], dest: str, why: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs="*", help=help)
        self.why = why

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Say why."""
        parser.error(f"{self.option_strings[0]} is not for {parser.prog}: {self.why}")


def add_overwrite(sub: argparse.ArgumentParser) -> None:
    """Give a command --overwrite, for the files that it writes."""
    sub.add_argument("--overwrite", action="store_true", help="replace files that are there, never folders")


CKPT = "a folder of jddim convert, a PyTorch checkpoint, a hub id (OWNER/NAME[@REVISION]), or a name of jddim list"


def add_ckpt(sub: argparse.ArgumentParser, nargs: str | None = None, text: str = CKPT) -> None:
    """Give a command CKPT, which `checkpoint` or `resolved` reads, and what its conversion may have to be told."""
    sub.add_argument("ckpt", nargs=nargs, help=text)
    source_options(sub)


def source_options(sub: argparse.ArgumentParser) -> None:
    """What is said of a PyTorch checkpoint beside its name: `told_of` reads it."""
    group = sub.add_argument_group("of a PyTorch checkpoint", "what its conversion must be told (`jddim info` says)")
    group.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="the source's config file; diffusers has two (default: those beside the weights)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a fact the tensors do not tell, under the source's own name; over the config's",
    )
    group.add_argument(
        "--preset", metavar="NAME", help="all that --set would say, for a published model (guided-256, ...)"
    )
    group.add_argument(
        "--weights",
        metavar="ema|raw|KEY",
        help="which of a file's: KEY is where they lie, such as state_dict.model (default: ema where there are any)",
    )
    group.add_argument("--variant", metavar="NAME", help="such as fp16: which of a folder's weights")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id (default: main)")


def told_of(args: argparse.Namespace) -> Told:
    """What the command line says of a PyTorch checkpoint. Raises ValueError for a --set that is not KEY=VALUE."""
    settings = {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
        settings[key] = value
    return {
        "config": args.config,
        "settings": settings or None,
        "preset": args.preset,
        "weights": args.weights,
        "variant": args.variant,
        "revision": args.revision,
    }


def resolved(named: str, args: argparse.Namespace, check: Check | None = None) -> Path:
    """The jddim folder of what names a checkpoint, which may first have to be converted, as the options say.

    check: `jddim.convert`'s.
    """
    from jddim.resolving import resolve

    try:
        return resolve(named, check=check, **told_of(args))
    except UnsettledError as error:
        if not error.options:
            raise
        said = f"{error}; or add to this command: {shlex.join(error.options)}"
        raise UnsettledError(said, error.asks, error.options) from error


def refuse_told(args: argparse.Namespace) -> None:
    """Raise ValueError for what is said of a PyTorch checkpoint where the command line names no checkpoint."""
    if given := [f"--{name}" for name in ("set", *told_of(args)) if getattr(args, name, None)]:
        raise ValueError(f"{' and '.join(given)}: said of a PyTorch checkpoint, and no checkpoint is named")


def checkpoint(args: argparse.Namespace) -> Metadata:
    """The metadata of CKPT, a jddim folder from here on. What the command lacks is said before a conversion."""
    from jddim.checkpoint.folder import load_metadata

    for name in ("images", "mask", "condition"):
        if isinstance(path := getattr(args, name, None), Path) and not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    named, args.ckpt = args.ckpt, resolved(args.ckpt, args, functools.partial(_check_given, args))
    return load_metadata(args.ckpt, named)


def _check_given(args: argparse.Namespace, metadata: Recorded) -> None:
    """Raise RequestError for what the network needs beside x_t and the command line does not give."""
    from jddim.checkpoint.metadata import Metadata
    from jddim.run.problems import condition_problems, label_problems

    if not isinstance(metadata, Metadata):
        return
    problems, model = [], metadata.model
    if getattr(args, "labels", "") is None:
        problems += label_problems(model, None, 1)
    if getattr(args, "condition", "") is None:
        problems += condition_problems(model, None, (getattr(args, "num", None) or 1, *model.image_size), "float32")
    if problems:
        raise RequestError(problems, "sample")


def load_for(args: argparse.Namespace, request: Request, formats: Mapping[str, str]) -> DDIM:
    """The checkpoint, once it is known that OUT can be written."""
    import jddim
    from jddim.images import check_output

    check_output(args.out, formats=formats, overwrite=args.overwrite)
    check_output(args.out, checkpoint(args).model.in_channels, formats=formats, overwrite=args.overwrite)
    return jddim.load(args.ckpt, dtype=request.dtype)


def settings_of(args: argparse.Namespace, request: Request, ddim: DDIM, planned: Plan, command: str) -> dict[str, Any]:
    """What a picture says of how it was made: the command's own options, and the request."""
    from jddim import __version__

    assert ddim.metadata is not None
    names = {o.name for o in taken_by(command)} | {"run", "ckpt", "out", "quiet", "overwrite", "set", *told_of(args)}
    own = {n: v.name if isinstance(v, Path) else v for n, v in vars(args).items() if n not in names}
    if own.pop("condition", None) is not None:
        own["condition"] = given_file(args.condition)
    if own.pop("classifier", None) is not None:
        own |= given_classifier(args)
    described = request.described(planned.sampler, planned.table.num_steps, command)
    return {"checkpoint_sha256": ddim.metadata.sha256, "jddim": __version__, **described, **own}


def check_num(num: int, least: int) -> None:
    """Raise ValueError for too few images."""
    if num < least:
        raise ValueError(f"--num must be at least {least}{', both ends' if least == 2 else ''}, got {num}")


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Argparse's type of a list of numbers, separated by commas."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"takes {what} separated by commas, got {text!r}") from None

    return parse


def read_batch_size(text: str) -> int | str:
    """`--batch-size`: a number, or auto."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number of images, or auto; got {text!r}") from None


def fastest_batch_size(request: Request, ddim: DDIM, num: int) -> int:
    """What `--batch-size auto` stands for: tried, and told of, here."""
    if request.classifier_scale is not None:
        raise ValueError("--batch-size auto tries the network alone, without a classifier: give a number")
    from jddim.scale.batch_size import best_batch_size

    return best_batch_size(ddim, num, evaluations=request.evaluations, say=say)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    said = "; ".join(map(_by_flag, error.problems)) if isinstance(error, RequestError) else str(error)
    return printable(" ".join(said.split())) or type(error).__name__


def _by_flag(problem: tuple[str, str]) -> str:
    """A problem's sentence with the options' names in place of the fields'."""
    name, sentence = problem
    flags = FLAGS | {o.name: o.option.flag for o in options()}
    begun = [own for own in flags if own == name or "_" in own]  # other fields' names are words, too
    sentence = re.sub(rf"^({'|'.join(begun)})(?= )", lambda found: flags[found[1]], sentence)
    asked = rf"\b(give|leave|needs) ({'|'.join(flags)})(?![.\w(])"
    return re.sub(asked, lambda found: f"{found[1]} {flags[found[2]]}", sentence)


FLAGS = {
    **{"x_T": "--x-T", "noise": "--noise", "condition": "--condition", "classifier": "--classifier"},
    **{"num": "--num", "batch_size": "--batch-size", "key": "--seed"},
}
"""The options of what is no field of `Request`, by its name in Python."""


def say(line: str) -> None:
    """Print a line of progress. Nobody reading it any more (head) does not stop the work."""
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def silently(*, document: bool) -> Iterator[None]:
    """What a command prints to stdout goes nowhere, unless that is a --json document, and it shows no progress."""
    from jddim.run.progress import silence

    with open(os.devnull, "w") as nowhere, silence(), contextlib.redirect_stdout(sys.stdout if document else nowhere):
        yield


def add_json(sub: argparse.ArgumentParser) -> None:
    """Give a command --json, with which `print_json` is all that it prints on stdout."""
    sub.add_argument("--json", action="store_true", help="print one JSON document instead, for programs")


def print_json(data: Any) -> None:
    """Print one JSON document. What JSON has no number for, NaN and infinity, is null."""
    plain = json.loads(json.dumps(data), parse_constant=lambda name: None)
    print(json.dumps(plain, indent=2))


def summary(command: argparse.ArgumentParser) -> str:
    """The first line of a command's description: what `jddim --help` says of it."""
    return (command.description or "").partition("\n")[0]


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line, and takes no abbreviation: --set is not --set-alpha-to-one."""

    def __init__(self, **how: Any):
        super().__init__(**{"allow_abbrev": False, **how})

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """With the nearest choice first, where argparse lists them all."""
        near = difflib.get_close_matches(str(value), list(map(str, action.choices or ())), 1)
        if near and value not in (action.choices or ()):
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; did you mean {near[0]!r}?")
        super()._check_value(action, value)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is left over: argparse would leave a command's unknown options for the whole program to refuse."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._hint(rest)}")
        return namespace, rest

    def _hint(self, rest: Sequence[str]) -> str:
        """What may have been meant by the first option that is none, in words that follow an error's."""
        word = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = {flag.lstrip("-").replace("-", "_"): flag for action in shown for flag in action.option_strings}
        name = word.lstrip("-").replace("-", "_")
        meant = of_peers(name)
        ours = FLAGS.get(meant or "", f"--{meant or name}").lstrip("-").replace("-", "_")
        if meant in ELSEWHERE and ours not in known:
            return f"; {ELSEWHERE[meant]}"
        near = [ours] if ours in known else difflib.get_close_matches(name, known, 1, 0.7)
        return f"; did you mean {known[near[0]]}?" if near else ""
