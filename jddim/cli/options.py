"""What several commands take or print alike, and the parser that reports a mistake in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

    from jddim.pipeline import DDIM

SPACING_NAMES = "linspace, uniform, quad, leading, trailing, linspace_diffusers, openai, ddimN or N,N,..."


def read_labels(text: str | None, num: int) -> np.ndarray | None:
    """One label an image, from "3,977" (one each, or one for all) or "0:10" (0 to 9, over and over)."""
    if text is None:
        return None
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    import numpy as np

    try:
        if ":" in text:
            low, high = (int(part) for part in text.split(":"))
            given = list(range(low, high))
        else:
            given = [int(part) for part in text.split(",")]
    except ValueError:
        given = []
    if not given:
        raise ValueError(f"--labels takes integers, 3,977 or a range, 0:10; got {text!r}")
    if ":" not in text and len(given) not in (1, num):
        raise ValueError(
            f"--labels names {len(given)} labels for {num} images; give one for each, one for all, or a range"
        )
    return np.resize(np.array(given, np.int32), num)


def read_batch_size(text: str) -> int | str:
    """`--batch-size`: a number, or auto."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number of images, or auto; got {text!r}") from None


def fastest_batch_size(args: argparse.Namespace, ddim: DDIM, num: int) -> int:
    """What `--batch-size auto` stands for: tried, and told of, here."""
    from jddim.scale.batch_size import best_batch_size

    return best_batch_size(ddim, num, evaluations=1 + (args.guidance_scale is not None), say=say)


def read_seed(text: str) -> int:
    """`--seed`: what jax.random.key tells apart."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a whole number, got {text!r}") from None
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..{2**32 - 1}, which seeds are kept apart in")
    return number


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return printable(" ".join(str(error).split())) or type(error).__name__


def say(line: str) -> None:
    """Print a line of progress. Nobody reading it any more (head) does not stop the work."""
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(line: str) -> str:
    """A line that quotes a file, without the control characters that would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is left over: argparse would leave a command's unknown options for the whole program to refuse."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [name for action in shown for name in action.option_strings]
            close = difflib.get_close_matches(rest[0].split("=")[0], known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return namespace, rest
