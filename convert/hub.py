"""Checkpoints by hub id, `google/ddpm-cifar10-32`, through huggingface_hub: its cache, its offline mode, its login."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jddim.converting import near
from jddim.installing import install_line

from .engine import ConversionError


def snapshot(
    src: str, revision: str | None, patterns: Iterable[Sequence[str]], whole: Callable[[Path], bool]
) -> tuple[Path, str]:
    """A local folder with a repository's files, and the commit that they are of.

    patterns: sets of file patterns, downloaded in turn until `whole(folder)`. revision: a branch, tag or commit;
    None: main. Raises ConversionError without huggingface_hub, or if it has not, and cannot get, the repository.
    """
    try:
        from huggingface_hub import constants, snapshot_download
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
            at = "" if revision is None else f" at revision {revision}"
            raise ConversionError(
                f"no such file or folder: {src}, and as a hub id{at} it cannot be had: {_why(error)}{near(src)}"
            ) from error
        revision = folder.name  # the commit: what follows is of the same
        if whole(folder):
            return folder, folder.name
    if constants.HF_HUB_OFFLINE:
        raise ConversionError(f"the hub's cache holds no weights of {src} ({revision}), and {_OFFLINE}")
    raise ConversionError(f"the hub's {src} ({revision}) holds no weights that jddim knows; name a file of it")


_OFFLINE = "HF_HUB_OFFLINE is set, so it is not fetched"


def _why(error: Exception) -> str:
    """Why the hub gave nothing, in one line."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return "its owner asks for consent first: give it on the hub's page, then log in (hf auth login)"
        case errors.RevisionNotFoundError():
            return "it is there, but not that revision"
        case errors.RepositoryNotFoundError():
            return "the hub has none of that name, or it is private: log in (hf auth login)"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            offline = constants.HF_HUB_OFFLINE
            return f"it is not in the hub's cache, and {_OFFLINE if offline else 'the hub cannot be reached'}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return said[:200]
