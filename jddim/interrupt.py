"""Ctrl-C, heard at any time and only once; and SIGTERM, which a scheduler sends, likewise.

Python's KeyboardInterrupt alone is not enough for a command. Raised while an extension module is imported it may come
out as an ImportError, or crash the interpreter (jaxlib's); in a finaliser it is printed and lost; a second one cuts
short the clearing up after the first. This module imports little (not even logging: 6 ms), to be ready before the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

SAME = 2.0
"""Seconds within which a second Ctrl-C is taken for the first, lest it stop the clearing up."""

MESSAGE = "jddim: interrupted; nothing half-written was left"

_heard: float | None = None
_signal = int(signal.SIGINT)
_unwinding = False


def listen() -> None:
    """From now on, Ctrl-C or SIGTERM raises KeyboardInterrupt in the main thread, remembered. For a command's start."""
    signal.signal(signal.SIGINT, _on_interrupt)
    signal.signal(signal.SIGTERM, _on_interrupt)
    sys.unraisablehook = _on_unraisable
    sys.excepthook = _on_exception
    threading.excepthook = _on_thread_exception


def heard() -> bool:
    """Whether Ctrl-C was heard: then whatever was raised since is its consequence."""
    return _heard is not None


def status() -> int:
    """The exit status of what was interrupted, as shells count it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + _signal


def unwind() -> None:
    """From now on there are temporary files: an import that Ctrl-C strikes may not end the process at once."""
    global _unwinding
    _unwinding = True


def ignore() -> None:
    """From now on, Ctrl-C does nothing: the command has done all it had to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are only noted: gives a function that says whether one was, for a loop that saves and ends.

    Another, more than SAME seconds later, raises KeyboardInterrupt. Outside the main thread nothing is changed.
    """
    noted: list[float] = []

    def note(signum: int, frame: FrameType | None) -> None:
        global _heard, _signal
        now = time.monotonic()
        if not noted:
            noted.append(now)
            _heard, _signal = now, signum
        elif now - noted[0] > SAME:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    global _heard, _signal
    now = time.monotonic()
    if _heard is None or now - _heard > SAME:
        _heard, _signal = now, signum
        if logging := sys.modules.get("logging"):
            logging.disable(logging.CRITICAL)  # what threads log of the work that is given up
        if not _unwinding and _importing(frame):
            os.write(2, f"{MESSAGE}\n".encode())
            os._exit(status())
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _on_exception(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
    """After Ctrl-C, extension modules print what their initialisation runs into (numpy's does), and fail then."""
    if not heard() and not _beside():
        sys.__excepthook__(kind, value, traceback)


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    """After Ctrl-C, threads fail because what they worked on is being removed."""
    if not heard():
        threading.__excepthook__(args)


def _beside() -> bool:
    """Whether this is a thread of an extension module's own (tensorstore's, handing the rest of a failed restore to
    an event loop that has ended). What fails there, the main thread reports.
    """
    return threading.current_thread() is not threading.main_thread()


def _on_unraisable(unraisable: Any) -> None:
    """Where KeyboardInterrupt cannot leave the finaliser or callback that it struck, raise it again a little later."""
    global _heard
    if not heard() and not _beside():
        sys.__unraisablehook__(unraisable)
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        return  # after Ctrl-C, what finalisers say of half-made objects is of no interest
    _heard = None
    again = threading.Timer(0.02, signal.raise_signal, [_signal])
    again.daemon = True
    again.start()
