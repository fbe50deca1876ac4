"""The command that adds what is missing to the environment that jddim runs in, for messages."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_ROOT = Path(__file__).resolve().parent.parent


def install_line(extra: str) -> str:
    """The command line that installs `jddim[extra]` for this interpreter, from where this jddim came.

    That is the checkout that it runs from, else the file, folder or repository that the installer noted (PEP 610,
    direct_url.json), else the package index. By uv where the environment has no pip.
    """
    by_pip = find_spec("pip") is not None
    install = [sys.executable, "-m", "pip", "install"] if by_pip else ["uv", "pip", "install", "-p", sys.executable]
    return shlex.join([*install, *_what(extra)])


def _what(extra: str) -> list[str]:
    project = _ROOT / "pyproject.toml"
    if project.is_file() and 'name = "jddim"' in project.read_text():
        return ["-e", f"{_ROOT}[{extra}]"]
    origin: dict[str, Any] = {}
    with contextlib.suppress(metadata.PackageNotFoundError):  # a copy of the folder that nothing installed
        origin = json.loads(metadata.distribution("jddim").read_text("direct_url.json") or "{}")
    address = urlsplit(url := origin.get("url", ""))
    if address.scheme == "file":
        path = Path(unquote(address.path))
        return [f"{path}[{extra}]" if path.exists() else f"jddim[{extra}]"]
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return [f"jddim[{extra}] @ {url}" if url else f"jddim[{extra}]"]
