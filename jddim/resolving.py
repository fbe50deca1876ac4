"""Whatever names a checkpoint becomes a jddim folder: a PyTorch source is converted once, into the cache.

An entry's key is made of the bytes and names of all files that its conversion may read, of what was told, of the hub's
commit and of jddim's version; it is computed before the conversion and after it. To compute it, large files are read
once: a receipt keeps a file's digest for as long as its path, size, time and inode stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

from jddim import __version__, converting
from jddim.config import printable
from jddim.converting import Located, Told, UnsettledError, Warns, as_text
from jddim.files import atomic, lock, open_lock, open_regular, recover, remove
from jddim.known import published
from jddim.run import cache, progress

LARGE = 2**20
"""Bytes of a file from which on a receipt is kept of its digest."""

FRESH = 2.0
"""Seconds for which a file counts as just written: it might change again within one tick of its file system's clock."""


def to_stderr(line: str) -> None:
    """Print a line of what is found; under `progress.silence` only if it warns."""
    if isinstance(line, Warns) or not progress.silent():
        print(printable(line), file=sys.stderr, flush=True)


_made: set[Path] = set()
"""The entries that this process took for other names."""


def resolve(
    src: str | os.PathLike[str],
    say: Callable[[str], None] = to_stderr,
    *,
    check: converting.Check | None = None,
    **told: Unpack[Told],
) -> Path:
    """The jddim folder of what names a checkpoint; a PyTorch source is converted into the cache if it is not there.

    src: a jddim folder; or, as `jddim.convert` takes it, a file, a folder or a hub id, also OWNER/NAME@REVISION; or a
    name of `jddim.presets`. What lies here comes before a hub id of the same name. told: arguments of `jddim.convert`.
    say: is given what is found and assumed, line by line. check: `jddim.convert`'s, if one is needed.

    Raises CheckpointError if there is nothing, or nowhere to keep the result; what `jddim.convert` raises, and
    UnsettledError with the command that settles it.
    """
    from jddim.checkpoint.folder import CheckpointError

    name, path = os.fspath(src), Path(src)
    if not os.path.lexists(path):
        recover(path.absolute())
    if note := converting.shadowed(name):
        say(note)
    if (path / "metadata").is_dir() or (path / "params").is_dir():
        shown = {"settings": "settings (--set)"}
        if given := [shown.get(option, option) for option, value in told.items() if value is not None]:
            raise CheckpointError(f"{name} is converted already, so it takes no {' or '.join(given)}")
        return path
    if not path.exists() and published(name) is None and converting.hub_id(name) is None:
        raise CheckpointError(f"no checkpoint at {name}{converting.not_asked(name) or converting.near(name)}")
    folder = _converted(name, say, check, told)
    _made.add(folder)
    return folder


def forget(folder: Path) -> bool:
    """Remove a folder if it is an entry of the cache that was taken for another name: whether it was."""
    if folder not in _made or cache.kind(folder) != "checkpoints":
        return False
    remove(folder)
    return True


def _converted(name: str, say: Callable[[str], None], check: converting.Check | None, told: Told) -> Path:
    from jddim.checkpoint.folder import CheckpointError

    root = cache.checkpoints()
    if root is None:
        raise CheckpointError(
            f"{name} must be converted, and there is no cache to keep the result in (JDDIM_CACHE is empty): jddim "
            f"convert {name} DST, then name DST in place of {name}"
        )
    where = {option: told.get(option) for option in ("config", "weights", "variant", "revision")}
    found: Located = converting.locate(name, **where)  # type: ignore[arg-type]
    try:
        root.mkdir(parents=True, exist_ok=True)
        key = _key(found, told, root)
        new = root / f"{re.sub(r'[^A-Za-z0-9-]+', '-', found.name)[:60]}-{key}"
        alike = (path for path in root.glob(f"*-{key}") if cache.kind(path) == "checkpoints")
        folder = next(alike, new)  # of the same contents, under another name
        if _usable(folder, name, say):
            return folder
        with _alone(root / f".{key}.lock", say):
            if not _usable(folder, name, say, alone=True):  # by now
                _convert(name, found, folder, say, check, told)
                same = False
                with contextlib.suppress(OSError, converting.ConversionError):  # it is gone
                    again = found if found.hub_id is not None else converting.locate(name, **where)  # type: ignore[arg-type]
                    same = _key(again, told, root) == key
                if not same:
                    remove(folder)
                    raise CheckpointError(
                        f"{name} changed while it was converted, so the result is not kept; the same call converts it "
                        "again"
                    )
                with atomic(cache.source_of(folder)) as staging:
                    staging.write_text(os.path.abspath(name) if found.hub_id is None else name)
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(root):
            raise
        raise CheckpointError(
            f"{name} must be converted, and the cache cannot keep the result ({error.strerror}: {error.filename}); "
            f"JDDIM_CACHE names another folder"
        ) from error
    return folder


def _convert(
    name: str,
    found: Located,
    folder: Path,
    say: Callable[[str], None],
    check: converting.Check | None,
    told: Told,
) -> None:
    source, options = name, {**told}
    head = [f"{name} is converted once, into {folder}"]

    def tell(line: str) -> None:  # nothing before there is something to convert
        while head:
            say(head.pop())
        say(line)

    if found.hub_id is not None:  # of the same commit, whatever the hub has by now
        source, options["revision"] = found.hub_id, found.commit
    try:
        converting.convert(source, folder, overwrite=True, say=tell, check=check, **options)  # type: ignore[arg-type]
    except UnsettledError as error:
        said = f"{error}; convert it once: {error.command}, then name DST in place of {name}"
        raise UnsettledError(said, error.asks, error.options) from error


def _usable(folder: Path, name: str, say: Callable[[str], None], *, alone: bool = False) -> bool:
    """Whether the entry is there, whole, and verified where it can be.

    alone: no other process makes it, so why it is not is said, and what is damaged goes.
    """
    from jddim.checkpoint.folder import CheckpointError, load_recorded

    if not folder.exists():
        return False
    try:
        checked = load_recorded(folder).provenance.get("verification", {})
    except CheckpointError as error:
        if alone:
            say(Warns(f"note: the copy in the cache is damaged, and made anew: {error}"))
            remove(folder)
        return False
    unverified = checked.get("skipped") is True
    if unverified and converting.can_verify():
        if alone:
            say("note: the copy in the cache was made without PyTorch, which is here: it is made anew, and verified")
        return False
    before = f"{name}: converted before, {folder}"
    say(Warns(f"{before} (not verified: PyTorch is not installed)") if unverified else before)
    return True


def _key(found: Located, told: Told, root: Path) -> str:
    settings = sorted(as_text(told.get("settings")).items())
    options = [settings, *(told.get(option) for option in ("preset", "weights", "variant"))]
    # The names of a file and its folder say what is in it: ema_x/model-1.ckpt.
    files = [[*file.absolute().parts[-2:], _sha256(file, root)] for file in found.files]
    facts = [__version__, found.hub_id, found.commit, options, files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _sha256(file: Path, root: Path) -> str:
    """A file's digest, by the receipt if one is kept."""
    with open_regular(file) as opened:
        seen = os.fstat(opened.fileno())
        facts = (os.path.realpath(file), seen.st_size, seen.st_mtime_ns, seen.st_dev, seen.st_ino)
        receipt = root / ".receipts" / hashlib.sha256(repr(facts).encode()).hexdigest()
        if seen.st_size >= LARGE:
            with contextlib.suppress(OSError):
                if re.fullmatch(r"[0-9a-f]{64}", kept := receipt.read_text()):
                    return kept
        digest = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]  # BinaryIO has no readinto
    if seen.st_size >= LARGE and time.time() - seen.st_mtime > FRESH:
        with contextlib.suppress(OSError), atomic(receipt) as staging:  # the receipt saves time, no more
            staging.write_text(digest)
    return digest


@contextlib.contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While no other process converts the same."""
    waited = False
    while True:
        with open_lock(path) as held:
            if lock(held):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        if not waited:
            say("another process is converting the same: waiting for it")
        waited = True
        time.sleep(0.2)
