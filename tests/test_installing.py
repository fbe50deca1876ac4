"""What messages say to install is a line that works here: this Python, and where this jddim came from."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from jddim import installing
from jddim.installing import install_line

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_checkouts_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "find_spec", lambda name: object())  # pip is there
    assert shlex.split(install_line("web")) == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[web]"]
    monkeypatch.setattr(installing, "_ROOT", tmp_path / "a clone")
    monkeypatch.setattr(sys, "executable", "/a venv/bin/python")
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a clone" / "pyproject.toml").write_text('[project]\nname = "jddim"\n')
    monkeypatch.setattr(installing, "find_spec", lambda name: None)  # an environment that uv made
    words = ["uv", "pip", "install", "-p", "/a venv/bin/python", "-e", f"{tmp_path}/a clone[hub]"]
    assert shlex.split(install_line("hub")) == words


@pytest.mark.parametrize(
    ("origin", "what"),
    [
        (None, "jddim[web]"),
        ({"url": "file://HERE/a%20wheel.whl", "archive_info": {}}, "HERE/a wheel.whl[web]"),
        ({"url": "file://HERE/gone.whl", "archive_info": {}}, "jddim[web]"),
        ({"url": "https://host/jddim.whl", "archive_info": {}}, "jddim[web] @ https://host/jddim.whl"),
        (
            {"url": "https://host/jddim", "vcs_info": {"vcs": "git", "commit_id": "4e5f"}},
            "jddim[web] @ git+https://host/jddim@4e5f",
        ),
    ],
)
def test_an_installed_jddims_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: dict | None, what: str
) -> None:
    (tmp_path / "a wheel.whl").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')  # some wheels leave one in site-packages
    info = tmp_path / "jddim-0.1.0.dist-info"
    info.mkdir()
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin).replace("HERE", str(tmp_path)))
    monkeypatch.setattr(installing, "_ROOT", tmp_path)
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(info))
    assert shlex.split(install_line("web"))[-1] == what.replace("HERE", str(tmp_path))


def test_a_copy_that_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_ROOT", tmp_path)
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **_: iter([]))
    assert shlex.split(install_line("web"))[-1] == "jddim[web]"


def test_every_message_asks_here_and_for_an_extra_that_there_is() -> None:
    code = {path: path.read_text() for top in ("jddim", "convert", "scripts") for path in (ROOT / top).rglob("*.py")}
    assert not [path for path, text in code.items() if re.search(r"pip install ['\"]?jddim", text)]
    asked = {extra for text in code.values() for extra in re.findall(r"install_line\(['\"]([\w-]+)", text)}
    assert asked >= {"convert", "hub", "web", "export", "train"}
    assert asked <= EXTRAS.keys()


def test_all_is_what_any_command_may_ask_for() -> None:
    (told,) = re.findall(r"\[(.*)\]", *EXTRAS["all"])
    elsewhere = {"all", "convert-core", "cuda12", "tpu", "test-core", "test", "docs", "dev"}
    assert set(told.split(",")) == EXTRAS.keys() - elsewhere
