"""The `jddim` command, and `python -m jddim`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from jddim import interrupt
from jddim.run import cache


def run() -> NoReturn:
    """Run the command in sys.argv and end the process."""
    interrupt.listen()
    cache.use()
    try:
        from jddim.cli.main import main

        status = main()
    except KeyboardInterrupt:  # while cli itself is imported, or main is reporting something else
        print(interrupt.MESSAGE, file=sys.stderr)
        status = interrupt.status()
    interrupt.ignore()
    if status != 0:  # not waiting for threads whose work failed or was given up
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(interrupt.status() if interrupt.heard() else status)
    raise SystemExit(status)


if __name__ == "__main__":
    run()
