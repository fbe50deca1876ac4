"""The cache: converted checkpoints, and the command line's compiled programs, in one folder of the user's.

That folder is `JDDIM_CACHE`, or jddim in the user's cache folder; `JDDIM_CACHE=` (empty) goes without.
The programs are in jax's own cache, chosen through jax's environment variables, before jax is imported: what the user
has set there stays. The library never does this: there the program around it decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

LARGEST = 2**30
"""Bytes; with a limit jax drops the entries used longest ago, and takes a lock for each one read or written."""

_CHECKPOINT = r"[A-Za-z0-9-]*-[0-9a-f]{16}"
_LEFT = re.compile(rf"\.(receipts|sources|[0-9a-f]{{16}}\.lock|{_CHECKPOINT}\.[0-9a-f]{{8}}\.tmp)")
_PROGRAMS = re.compile(r"jaxlib-.+-[0-9a-f]{8}")
_PROGRAM = re.compile(r".+-(cache|atime)|\.lockfile|xla_gpu_.+")  # jax's names


def root() -> Path | None:
    """The cache's folder, or None: there is none."""
    chosen = os.environ.get("JDDIM_CACHE")
    if chosen == "":
        return None
    home = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or home) / "jddim"
    return base.expanduser().absolute()


def checkpoints() -> Path | None:
    """Where converted checkpoints are kept: `jddim.resolving` writes them."""
    base = root()
    return None if base is None else base / "jddim-checkpoints"


def kind(path: Path) -> str | None:
    """What a path of the cache is; None: not the cache's, though it may lie there, and nothing here removes it.

    By its place and name, "checkpoints" or "left" (receipts, sources, locks, what is not whole); by its contents too,
    "programs".
    """
    if path.parent == checkpoints():
        if _LEFT.fullmatch(path.name):
            return "left"
        return "checkpoints" if re.fullmatch(_CHECKPOINT, path.name) and _is_folder(path) else None
    if path.parent == root() and _PROGRAMS.fullmatch(path.name) and _is_folder(path):
        with contextlib.suppress(OSError):
            return "programs" if all(_PROGRAM.fullmatch(name) for name in os.listdir(path)) else None
    return None


def source_of(entry: Path) -> Path:
    """The file that says which path an entry was converted from. An entry, which may be copied, does not say it."""
    return entry.parent / ".sources" / entry.name


def found(*kinds: str) -> list[Path]:
    """The paths of the cache that are of these kinds."""
    base, place = root(), checkpoints()
    there = [] if base is None or place is None else [*base.glob("*"), *place.glob("*")]
    return [path for path in sorted(there) if kind(path) in kinds]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def folder() -> Path | None:
    """Where the programs are kept.

    One for each version of jaxlib and each kind of processor: XLA's programs for a CPU run where they were made.
    """
    base = root()
    return None if base is None else base / f"jaxlib-{metadata.version('jaxlib')}-{processor()}"


def use() -> Path | None:
    """Have the jax that is imported later keep its programs; where, or None: not wanted, or not writable."""
    if (told := os.environ.get("JAX_COMPILATION_CACHE_DIR")) is not None:
        return Path(told) if told else None
    place = folder()
    if place is None:
        return None
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            return None
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LARGEST))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    return place


def processor() -> str:
    """The instructions of this machine's processor, as a short word."""
    told = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            told += next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(told.encode()).hexdigest()[:8]
