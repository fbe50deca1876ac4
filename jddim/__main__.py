"""The `jddim` command and `python -m jddim`: the command line, with Ctrl-C heard at any time.

Python's own KeyboardInterrupt is not enough. Raised inside an extension module's import it comes out as an ImportError,
inside a finaliser it is printed and lost, in a second Ctrl-C it cuts short the clearing up after the first, and
while the interpreter ends it leaves a traceback. So this module remembers that it came, and imports little itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

NERVOUS = 2.0
"""Seconds in which a second Ctrl-C is the same one; afterwards it is for something that swallowed the first."""

_heard: float | None = None


def run() -> NoReturn:
    """Run the command in sys.argv and end the process."""
    signal.signal(signal.SIGINT, _on_interrupt)
    sys.unraisablehook = _on_unraisable
    status: Any = 1
    try:
        from jddim.cli import main

        status = main()
    except SystemExit as stop:  # argparse's
        status = stop.code
    except BaseException:
        if _heard is None:
            raise
        status = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that the command had to do is done
    if _heard is not None and status != 0:
        print("jddim: interrupted; nothing half-written was left", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for the threads of what was given up
    raise SystemExit(status)


def interrupted() -> bool:
    """Whether Ctrl-C was heard: then whatever is raised is its consequence."""
    return _heard is not None


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    global _heard
    if _heard is None or time.monotonic() - _heard > NERVOUS:
        _heard = time.monotonic()
        raise KeyboardInterrupt


def _on_unraisable(unraisable: Any) -> None:
    """A finaliser or callback that KeyboardInterrupt landed in goes on; raise it again, in the program proper."""
    global _heard
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _heard = None
    again = threading.Timer(0.02, signal.raise_signal, [signal.SIGINT])
    again.daemon = True
    again.start()


if __name__ == "__main__":
    run()
