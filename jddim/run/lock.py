"""Locks on files, the kernel's (`flock`): they end with the process however it ends, so none is ever stale."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def open_lock(path: Path) -> IO[str]:
    """A file to be locked, there from now on."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def lock(file: IO[str], *, shared: bool = False) -> bool:
    """Whether the file is locked now, by this process alone or shared. False, at once, if another's lock forbids it."""
    try:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(f"cannot lock {file.name} ({error.strerror}): this file system has no locks") from error
    return os.fstat(file.fileno()).st_nlink > 0  # whoever had it may have removed it at the end
