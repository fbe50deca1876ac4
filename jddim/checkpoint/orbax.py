"""Orbax, the one place that knows it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from types import ModuleType


def is_full_disk(error: Exception) -> bool:
    """Whether this, whatever Orbax made of it, is a disk's being full."""
    return os.strerror(errno.ENOSPC) in str(error)


def orbax() -> ModuleType:
    """Orbax, imported on first use (it takes half a second)."""
    import orbax.checkpoint as ocp

    module: ModuleType = ocp
    return module


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Meanwhile Orbax logs nothing: what fails in it is raised too. Its logger, absl, is others' too, and goes on."""

    def of_others(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(of_others)
    try:
        yield
    finally:
        logger.removeFilter(of_others)
