"""Progress in images, for loops driven from Python: a bar in a notebook or a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

EVERY = 10.0
"""Seconds from one line to the next, where there is no bar."""

_silent = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No progress is shown inside, whatever is asked for."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


def silent() -> bool:
    """Whether this runs inside `silence`."""
    return _silent.get()


def place() -> str:
    """Where stderr is read: in a "notebook", at a "terminal", or later, in "lines"."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if sys.stderr is not None and sys.stderr.isatty() else "lines"


class Progress:
    """`with Progress(num_images, "30 steps") as progress:`; then `compiling()`, and `add(images)` as they are done.

    shown: whether; None: in a notebook or at a terminal alone. What is added before `compiling` was found, not made:
    images/s and time left start at the first `add` after it.
    """

    def __init__(self, num_images: int, label: str = "", *, shown: bool | None = True):
        self.num_images = num_images
        self.label = label
        self._place = place()
        self.shown = shown is not False and not silent() and (shown is True or self._place != "lines")
        self._done = 0.0
        self._begun = False
        self._bar: Any = None
        self._started = self._last = 0.0  # at the first image made, and at the line before
        self._first = 0.0

    def __enter__(self) -> Progress:
        return self

    def compiling(self) -> None:
        """Say that the first program is made now, unless it has been said."""
        if self._begun or not self.shown:
            return
        self._begun = True
        if self._place == "notebook":
            self._bar = self._new_bar()
            self._bar.set_postfix_str("compiling ...")
        else:
            what = f"compiling {self.label}, or reading what was compiled before ..."
            print(what, end="\r" if self._place == "terminal" else "\n", file=sys.stderr, flush=True)

    def add(self, images: float) -> None:
        """Count images done; a segment of k of S steps over b images counts b * k / S."""
        self._done += images
        if not self._begun:
            return
        if self._place == "lines":
            self._line()
        elif self._bar is None:
            self._bar = self._new_bar()
        else:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.update(images)

    def _new_bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=self.num_images,
            initial=self._done,
            desc=self.label,
            unit="image",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            file=sys.stderr,
        )

    def _line(self) -> None:
        now = time.monotonic()
        if not self._started:
            self._started = self._last = now
            self._first = self._done
        elif now - self._last >= EVERY and self._done > self._first:
            self._last = now
            rate = (self._done - self._first) / (now - self._started)
            left = max(self.num_images - self._done, 0) / rate
            told = f"{self.label}: {self._done:.0f}/{self.num_images} images, {rate:.3g} images/s, {left:.0f} s left"
            print(told, file=sys.stderr, flush=True)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
