"""One writer at a time in each worker's part of a set's folder, by the kernel's locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jddim.bulk.manifest import BulkError, Manifest, check_folder, check_settings, manifest_path
from jddim.images import atomic

PATIENCE = 10.0
"""Seconds to wait for another run that is just beginning in the same folder."""


@contextlib.contextmanager
def locked(folder: Path, manifest: Manifest, worker: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """The folder, with its manifest, to be written to by worker i of n, and until then by no other worker i.

    All n may be at work at once; a run that cuts the set for another number of workers may not. The locks are the
    kernel's (`flock`): they end with the process however it ends, so none is ever stale. The files `.lock*` stay.
    Raises BulkError if the folder is in use, or was begun with other settings.
    """
    i, n = worker
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        everyone = held.enter_context(_open(folder / ".lock"))
        until = time.monotonic() + PATIENCE
        if _lock(everyone, fcntl.LOCK_EX):  # alone: whoever else has come is waiting below
            for left in folder.glob(".manifest.*"):
                left.unlink()
            if manifest_path(folder).exists():
                check_settings(folder, manifest)
            else:
                check_folder(folder)
                with atomic(manifest_path(folder)) as staging:
                    staging.write_text(manifest.text())
            _write(everyone, f"{n} workers")
        while not _lock(everyone, fcntl.LOCK_SH):
            if time.monotonic() > until:
                raise BulkError(f"{folder} is in use by a run that has been beginning for {PATIENCE:.0f} s")
            time.sleep(0.02)
        if (there := _read(everyone)) != f"{n} workers":
            raise BulkError(f"{folder} is in use by a run of {there}: wait for its end, or join it as one of them")
        check_settings(folder, manifest)
        own = held.enter_context(_open(folder / f".lock-{i}-of-{n}"))
        if not _lock(own, fcntl.LOCK_EX):
            which = "" if n == 1 else f" as worker {i}/{n}"
            raise BulkError(f"{folder} is in use{which} by {_read(own) or 'another run'}: wait for its end, or stop it")
        _write(own, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield


def _open(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def _lock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(f"cannot lock {file.name} ({error.strerror}): this file system has no locks") from error
    return True


def _write(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _read(file: Any) -> str:
    file.seek(0)
    return file.read(200)
