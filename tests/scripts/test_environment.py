"""scripts/environment.sh, around a Python whose venv and pip only note what they are asked; .ci/run has real ones."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"""case "$*" in
  *"-m venv "*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python"; : >"${{@: -1}}/pyvenv.cfg" ;;
  *"-m pip --version") ;;
  *"-m pip "*) echo "${{@: -1}}" >>"$HOME/asked"; echo "${{PIP_SAYS:-}}"; exit "${{PIP_STATUS:-0}}" ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""


def fake(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}")
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path):
    """Sets up an extra in a checkout: gives (exit status, what pip was asked for, stderr)."""
    for folder in ("a clone/scripts", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/environment.sh", "scripts/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "a clone" / name)
    for name in ["bash", "cat", "cksum", "cp", "cut", "dirname", "env", "grep", "head", "mkdir", "mv", "rm", "tail"]:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    fake(tmp_path / "bin" / "python3", PYTHON)

    def script(extra: str, **settings: str) -> tuple[int, str, str]:
        code = f'set -euo pipefail; . "{tmp_path}/a clone/scripts/environment.sh"; jddim_environment {extra}'
        environment = {"PATH": f"{tmp_path}/bin", "HOME": str(tmp_path), **settings}
        (tmp_path / "asked").write_text("")
        done = subprocess.run(["bash", "-c", code], env=environment, cwd="/", capture_output=True, text=True)
        return done.returncode, (tmp_path / "asked").read_text().replace(f"{tmp_path}/a clone", "").strip(), done.stderr

    return script


def test_installs_once_and_again_after_a_change(run, tmp_path: Path) -> None:
    assert run("test", PYTHONPATH="/stray", PYTHONHOME="/stray") == (0, "[test]", "")
    for contained in ("test", "convert-core", "convert,export,hub,web"):  # the last is what scripts/demo asks for
        assert run(contained) == (0, "", "")
    (tmp_path / "a clone" / "scripts" / "constraints.txt").write_text("changed\n")
    assert run("test", PIP_STATUS="1")[0] == 1  # an update that fails leaves .venv as it was, and is tried again
    assert run("test")[1].startswith("[test,")
    assert run("docs,test")[1].endswith(",docs,test]")
    assert run("docs") == run("test,docs") == (0, "", "")


@pytest.mark.parametrize("broken", ["bin/python", "pyvenv.cfg", "No space left on device", "interrupted"])
def test_a_half_made_environment_is_made_anew(run, tmp_path: Path, broken: str) -> None:
    status = {"interrupted": 130, "No space left on device": 1}.get(broken, 0)
    code, _, error = run("test", PIP_STATUS=str(status), PIP_SAYS=broken)
    assert (code, broken in error, error.count("\n")) == (status, status > 0, int(status > 0))
    (tmp_path / "a clone" / ".venv" / broken).unlink(missing_ok=True)
    (tmp_path / "a clone" / ".venv" / "left over").touch()
    assert run("test") == (0, "[test]", "")
    assert not list(tmp_path.rglob("left over"))


def test_which_python(run, tmp_path: Path) -> None:
    for text, found in (("exit 1", "does not run"), ("echo 3.9.2; exit 1", "3.9.2"), ("echo 3.14.0", "3.14.0")):
        fake(tmp_path / "bin" / "python3", text)
        code, asked, error = run("test")
        assert (code, asked, error.count("\n"), f"python3 ({found})" in error) == (1, "", 1, True)
    assert "names other; found: none" in run("test", JDDIM_PYTHON_BASE="other")[2]
    fake(tmp_path / "bin" / "python3.11", PYTHON)
    assert "cannot be reached; log: " in run("test", PIP_STATUS="1", PIP_SAYS="connection broken by")[2]
    assert run("test") == (0, "[test]", "")
