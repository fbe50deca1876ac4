"""Checkpoints by hub id, `google/ddpm-cifar10-32`, through huggingface_hub: its cache, its offline mode, its login."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jddim.installing import install_line

from .engine import ConversionError


def is_id(src: str) -> bool:
    """Whether a name that is no path here may be a hub id: OWNER/NAME, not a weights file in a folder that exists."""
    owner, _, name = src.partition("/")
    if not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (owner, name)) or Path(owner).exists():
        return False
    return not name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yml", ".yaml"))


def snapshot(
    src: str, revision: str | None, patterns: Iterable[Sequence[str]], whole: Callable[[Path], bool]
) -> tuple[Path, str]:
    """A local folder with a repository's files, and the commit that they are of.

    patterns: sets of file patterns, downloaded in turn until `whole(folder)`. revision: a branch, tag or commit;
    None: main. Raises ConversionError without huggingface_hub, or if it has not, and cannot get, the repository.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConversionError(
            f"no such file or folder: {src}; if it is a hub id, fetching it needs huggingface_hub: "
            + install_line("hub")
        ) from error
    folder = None
    for wanted in patterns:
        try:
            folder = Path(snapshot_download(src, revision=revision, allow_patterns=list(wanted)))
        except Exception as error:  # of many kinds: no such repository, no network and not in the cache, gated, ...
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            at = "" if revision is None else f" at revision {revision}"
            raise ConversionError(
                f"no such file or folder: {src}, and as a hub id{at} it cannot be had: {reason[:200]}"
            ) from error
        revision = folder.name  # the commit: what follows is of the same
        if whole(folder):
            return folder, folder.name
    raise ConversionError(f"the hub's {src} ({revision}) holds no weights that jddim knows; name a file of it")
