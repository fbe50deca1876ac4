"""Orbax, the one place that knows it."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any


def is_full_disk(error: Exception) -> bool:
    """Whether this, whatever Orbax made of it, is a disk's being full."""
    return os.strerror(errno.ENOSPC) in str(error)


def orbax() -> Any:
    """Orbax, imported on first use (it takes half a second), without its notices: what fails in it is raised too."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint as ocp

    return ocp
