"""One writer at a time in each worker's part of a set's folder."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jddim.bulk.manifest import BulkError, Manifest, check_folder, check_settings, manifest_path
from jddim.files import atomic, lock, open_lock

PATIENCE = 10.0
"""Seconds to wait for another run that is just beginning in the same folder."""


@contextlib.contextmanager
def locked(folder: Path, manifest: Manifest, worker: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """The folder, with its manifest, to be written to by worker i of n, and until then by no other worker i.

    All n may be at work at once; a run that cuts the set for another number of workers may not. The files
    `.lock*` stay.
    Raises BulkError if the folder is in use, or was begun with other settings.
    """
    i, n = worker
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        everyone = held.enter_context(open_lock(folder / ".lock"))
        until = time.monotonic() + PATIENCE
        if lock(everyone):  # alone: whoever else has come is waiting below
            for left in folder.glob(".manifest.*"):
                left.unlink()
            if manifest_path(folder).exists():
                check_settings(folder, manifest)
            else:
                check_folder(folder)
                with atomic(manifest_path(folder)) as staging:
                    staging.write_text(manifest.text())
            _write(everyone, f"{n} workers")
        while not lock(everyone, shared=True):
            if time.monotonic() > until:
                raise BulkError(f"{folder} is in use by a run that has been beginning for {PATIENCE:.0f} s")
            time.sleep(0.02)
        if (there := _read(everyone)) != f"{n} workers":
            raise BulkError(f"{folder} is in use by a run of {there}: wait for its end, or join it as one of them")
        check_settings(folder, manifest)
        own = held.enter_context(open_lock(folder / f".lock-{i}-of-{n}"))
        if not lock(own):
            which = "" if n == 1 else f" as worker {i}/{n}"
            raise BulkError(f"{folder} is in use{which} by {_read(own) or 'another run'}: wait for its end, or stop it")
        _write(own, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200)
