"""scripts/environment.sh, on a small project of its own that installs without a network.

The project has the real one's name and extras but a build backend inside its tree, so a run makes a real
virtual environment with a real pip. PATH is a folder of links to the few tools that the script may use.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# The Python that this environment was made from, which can make others whatever installed this one.
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
TOOLS = ["bash", "cat", "cut", "dirname", "env", "grep", "mkdir", "rm", "sed", "sleep", "tail", "tr"]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "jddim"
version = "7.0"
dependencies = [{dependencies}]
[project.optional-dependencies]
convert = []
plot = []
test = ["jddim[convert]"]
"""

BACKEND = """
import os, zipfile

def build_editable(directory, settings=None, metadata=None):
    if os.environ.get("BUILD_PAUSE"):
        open(os.environ["BUILD_PAUSE"], "w").close()
        import time; time.sleep(60)
    info, needs = "jddim-7.0.dist-info", os.environ.get("BUILD_NEEDS", "")
    with zipfile.ZipFile(os.path.join(directory, "jddim-7.0-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("jddim.pth", os.getcwd())
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: jddim\\nVersion: 7.0\\n"
            "Provides-Extra: convert\\nProvides-Extra: plot\\nProvides-Extra: test\\n"
            + (f"Requires-Dist: {needs}\\n" if needs else ""))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return "jddim-7.0-py3-none-any.whl"
"""


class Checkout:
    """A project tree, and the way to source environment.sh in it."""

    def __init__(self, root: Path, tools: Path) -> None:
        self.root, self.tools, self.venv = root, tools, root / ".venv"
        (root / "scripts").mkdir(parents=True)
        for name in ("environment.sh", "environment_state.py", "uv_settings.py"):
            shutil.copy(SCRIPTS / name, root / "scripts")
        (root / "scripts" / "constraints.txt").write_text("")
        (root / "pyproject.toml").write_text(PYPROJECT.format(dependencies=""))
        (root / "backend.py").write_text(BACKEND)

    def command(self, code: str) -> list[str]:
        source = f'source "{self.root}/scripts/environment.sh"'
        return [str(self.tools / "bash"), "-c", f"set -euo pipefail; {source}; {code}", "scripts/demo"]

    def environment(self, **settings: str | Path) -> dict[str, str]:
        return {
            "PATH": str(self.tools),
            "HOME": str(self.root),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "JDDIM_PYTHON_BASE": str(BASE_PYTHON),
        } | {name: str(value) for name, value in settings.items()}

    def run(self, code: str, /, cwd: Path | None = None, **settings: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(code),
            env=self.environment(**settings),
            cwd=cwd or self.root.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @contextmanager
    def changed(self, name: str, text: str = "# changed\n") -> Iterator[None]:
        """Appends to a file of the project, for the time being."""
        path = self.root / name
        before = path.read_bytes()
        path.write_bytes(before + text.encode())
        yield
        path.write_bytes(before)

    def extras(self) -> set[str]:
        return set(json.loads((self.venv / "jddim-state.json").read_text())["extras"])


def link_tools(directory: Path) -> Path:
    directory.mkdir()
    for tool in [*TOOLS, *(["flock"] if shutil.which("flock") else [])]:
        path = shutil.which(tool)
        assert path, tool
        (directory / tool).symlink_to(path)
    return directory


def one_line(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout without a .venv."""
    return Checkout(tmp_path / "a clone", link_tools(tmp_path / "tools"))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with the extra `convert` installed: made once, every test leaves it complete."""
    pytest.importorskip("ensurepip", reason="this Python cannot make environments without uv")
    base = tmp_path_factory.mktemp("environment")
    checkout = Checkout(base / "a clone", link_tools(base / "tools"))
    result = checkout.run("jddim_environment convert")
    assert (result.returncode, result.stderr) == (0, ""), result
    assert "installing jddim[convert] into .venv" in result.stdout
    return checkout


def fake_python(directory: Path, name: str, answer: str) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!{shutil.which('bash')}\n{answer}\n")
    path.chmod(0o755)


# --------------------------------------------------------------------------------------------- which Python


FAILS = "echo 'pyenv: command not found' >&2; exit 127"


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "echo 3.11.5 venv", "python3.13": "echo 3.13.1 venv"}, "python3"),
        (
            {
                "python3": "echo 3.9.18 venv",
                "python3.12": "echo 3.12.2 venv",
                "python3.11": "echo 3.11.9 venv",
            },
            "python3.12",
        ),
        ({"python3": FAILS, "python3.13": FAILS, "python3.11": "echo 3.11.9 venv"}, "python3.11"),
        ({"python3": "echo 3.14.0 venv", "python3.12": "echo 3.12.2 venv"}, "python3.12"),
        ({"python3": "echo 3.14.0 venv"}, "python3"),
        ({"python3": "echo 3.12.3 -", "python3.11": "echo 3.11.2 venv"}, "python3.11"),
        ({"python": "echo 3.12.3 venv", "python3": "echo 2.7.18 venv"}, "python"),
    ],
)
def test_python_choice(checkout: Checkout, tmp_path: Path, pythons: dict[str, str], chosen: str) -> None:
    for name, answer in pythons.items():
        fake_python(tmp_path / "bin", name, answer)
    path = f"{tmp_path / 'bin'}:{checkout.tools}"
    result = checkout.run('jddim_find_python; printf "\\n%s" "$JDDIM_BASE"', PATH=path, JDDIM_PYTHON_BASE="")
    assert (result.returncode, result.stderr) == (0, ""), result
    assert result.stdout.splitlines()[-1] == str(tmp_path / "bin" / chosen)


def test_every_match_on_path_counts(checkout: Checkout, tmp_path: Path) -> None:
    fake_python(tmp_path / "shims", "python3", FAILS)
    fake_python(tmp_path / "bin", "python3", "echo 3.12.3 venv")
    path = f"{tmp_path / 'shims'}:{tmp_path / 'bin'}:{checkout.tools}"
    result = checkout.run('jddim_find_python; echo "$JDDIM_BASE"', PATH=path, JDDIM_PYTHON_BASE="")
    assert result.stdout.splitlines() == [str(tmp_path / "bin" / "python3")]


@pytest.mark.parametrize(
    ("pythons", "says"),
    [
        ({}, "needs Python 3.11, 3.12 or 3.13; found: no Python at all"),
        ({"python3": "echo 3.9.18 venv", "python3.12": FAILS}, "python3 is 3.9.18, "),
        ({"python3": "echo 3.11.2 -"}, "apt install python3.11-venv"),
    ],
)
def test_no_python(checkout: Checkout, tmp_path: Path, pythons: dict[str, str], says: str) -> None:
    for name, answer in pythons.items():
        fake_python(tmp_path / "bin", name, answer)
    result = checkout.run(
        "jddim_environment convert", PATH=f"{tmp_path / 'bin'}:{checkout.tools}", JDDIM_PYTHON_BASE=""
    )
    assert (result.returncode, result.stdout) == (1, "")
    line = one_line(result.stderr)
    assert says in line
    assert "python3.12" not in pythons or "python3.12 does not run" in line
    assert not checkout.venv.exists()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("echo 3.10.4 venv", "is Python 3.10.4; jddim needs 3.11"),
        ("exit 1", "does not run"),
        ("echo 3.13.0 -", "apt install python3.13-venv"),
    ],
)
def test_named_python_is_used_or_refused(checkout: Checkout, tmp_path: Path, answer: str, says: str) -> None:
    fake_python(tmp_path / "bin", "mine", answer)
    result = checkout.run("jddim_environment convert", JDDIM_PYTHON_BASE=tmp_path / "bin" / "mine")
    assert result.returncode == 1
    assert says in one_line(result.stderr)
    assert not checkout.venv.exists()


# ------------------------------------------------------------------------------------- a complete environment


def test_python_is_set_and_clean(ready: Checkout, tmp_path: Path) -> None:
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "tomllib.py").write_text("raise RuntimeError('a stray module was imported')")
    code = '"$JDDIM_PYTHON" -c "import backend; print(backend)"'
    result = ready.run(
        f'jddim_environment convert; echo "$JDDIM_PYTHON"; {code}',
        cwd=tmp_path,
        PYTHONPATH=tmp_path / "stray",
        PYTHONHOME=tmp_path,
        VIRTUAL_ENV=tmp_path / "other",
        PIP_TARGET=tmp_path / "target",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        str(ready.venv / "bin" / "python"),
        f"<module 'backend' from '{ready.root / 'backend.py'}'>",
    ]


def test_second_run_installs_nothing(ready: Checkout) -> None:
    before = (ready.venv / "install.log").stat().st_mtime_ns
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = ready.run("jddim_environment convert")
        seconds.append(time.perf_counter() - start)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (ready.venv / "install.log").stat().st_mtime_ns == before
    assert min(seconds) < 1  # 0.12 s on an idle machine; the best of three, since others may be at work


def test_extras_accumulate(ready: Checkout) -> None:
    for extra, installs in (("plot", True), ("test", True), ("convert", False), ("plot", False)):
        result = ready.run(f"jddim_environment {extra}")
        assert (result.returncode, result.stderr) == (0, "")
        assert ("installing" in result.stdout) == installs, extra
    assert ready.extras() == {"convert", "plot", "test"}


def test_changes_are_noticed(ready: Checkout) -> None:
    look = '_jddim_look convert; echo "$_jddim_found"'
    assert ready.run(look).stdout == "ready\n"
    for name in ("pyproject.toml", "scripts/constraints.txt"):
        with ready.changed(name):
            assert ready.run(look).stdout.startswith("install "), name
        assert ready.run(look).stdout == "ready\n"

    shutil.rmtree(next(ready.venv.glob("lib/python3*/site-packages/jddim-7.0.dist-info")))
    result = ready.run("jddim_environment convert")
    assert (result.returncode, result.stderr) == (0, "")
    assert "installing jddim[" in result.stdout
    assert "replaced" not in result.stdout
    assert ready.run(look).stdout == "ready\n"


# ------------------------------------------------------------------------------------ a half-made environment


def no_python(venv: Path) -> str:
    (venv / "bin").mkdir(parents=True)
    return "its Python does not run"


def dangling_python(venv: Path) -> str:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/nonexistent/python3")
    return "its Python does not run"


def no_configuration(venv: Path) -> str:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(BASE_PYTHON)  # pip would install into the system's Python
    return "it is not a virtual environment"


def no_pip(venv: Path) -> str:
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", venv], check=True)
    return "it has no working pip"


def unfinished(venv: Path) -> str:
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "jddim-unfinished").touch()
    return "its set-up did not finish"


def spoilt_state(venv: Path) -> str:
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "jddim-state.json").write_text('{"key": ')
    return "jddim-state.json in it cannot be read"


def old_python(venv: Path) -> str:
    fake_python(venv.parent / "venv-bin", "python", "echo 3.10.2 venv")
    venv.mkdir()
    (venv.parent / "venv-bin").rename(venv / "bin")
    return "it is made with Python 3.10.2"


@pytest.mark.parametrize(
    "spoil", [no_python, dangling_python, no_configuration, no_pip, unfinished, spoilt_state, old_python]
)
def test_half_made_environment_is_recognised(checkout: Checkout, spoil: Callable[[Path], str]) -> None:
    why = spoil(checkout.venv)
    result = checkout.run('_jddim_look convert; echo "$_jddim_found"')
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"broken {why}\n"


def test_killed_install_is_started_over_and_waited_for(ready: Checkout, tmp_path: Path) -> None:
    """Kills the script alone: its pip works on, and a second run must not touch .venv until that ends."""
    (ready.venv / "left over").touch()
    (ready.venv / "jddim-state.json").unlink()  # as if the user had made it: to be installed into
    paused = tmp_path / "paused"
    first = subprocess.Popen(
        ready.command("jddim_environment convert"),
        env=ready.environment(BUILD_PAUSE=paused),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(paused.exists)
        first.kill()
        first.wait()
        second = subprocess.Popen(
            ready.command("jddim_environment convert"),
            env=ready.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert second.stdout
        assert "another run is setting up this checkout; waiting for it" in second.stdout.readline()
        assert (ready.venv / "jddim-unfinished").exists()
    finally:
        os.killpg(first.pid, 9)
    rest = second.communicate(timeout=60)[0]
    assert second.returncode == 0
    assert "the .venv here cannot be used (its set-up did not finish) and is replaced" in rest
    assert not (ready.venv / "left over").exists()
    assert ready.run("jddim_environment convert").stdout == ""


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("lock", ["flock", "mkdir"])
def test_two_runs_take_turns(checkout: Checkout, tmp_path: Path, lock: str) -> None:
    tools = checkout.tools
    if lock == "mkdir":
        (tools / "flock").unlink(missing_ok=True)
    elif not (tools / "flock").exists():
        pytest.skip("no flock here")
    log = tmp_path / "log"
    code = f'work() {{ echo in >>"{log}"; sleep 0.3; echo out >>"{log}"; return 5; }}; _jddim_alone work'
    runs = [
        subprocess.Popen(checkout.command(code), env=checkout.environment(), stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [run.wait(timeout=30) for run in runs] == [5, 5, 5]
    assert log.read_text().split() == ["in", "out"] * 3
    assert not (checkout.root / ".venv.lock").exists()


def test_dead_owner_of_the_lock_is_passed_over(checkout: Checkout) -> None:
    (checkout.tools / "flock").unlink(missing_ok=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (checkout.root / ".venv.lock").mkdir()
    (checkout.root / ".venv.lock" / "pid").write_text(str(dead.pid))
    result = checkout.run("_jddim_alone echo done")
    assert (result.returncode, result.stdout) == (0, "done\n")


# -------------------------------------------------------------------------------------------------- the index


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_unreachable_index(ready: Checkout) -> None:
    index = f"http://127.0.0.1:{closed_port()}/simple"
    with ready.changed("pyproject.toml"):
        result = ready.run(
            "jddim_environment convert",
            PIP_NO_INDEX="",
            PIP_INDEX_URL=index,
            PIP_RETRIES="1",
            BUILD_NEEDS="no-such-package",
        )
    assert result.returncode == 1
    line = one_line(result.stderr)
    assert "the package index could not be reached (Connection refused)" in line
    assert str(ready.venv / "install.log") in line
    assert "WARNING" not in result.stdout


def test_failed_update_keeps_what_was_there(ready: Checkout) -> None:
    state = (ready.venv / "jddim-state.json").read_bytes()
    with ready.changed("pyproject.toml"):
        result = ready.run("jddim_environment convert", BUILD_NEEDS="no-such-package==7")
    assert result.returncode == 1
    assert "No matching distribution found for no-such-package==7" in one_line(result.stderr)
    assert (ready.venv / "jddim-state.json").read_bytes() == state
    assert ready.run("jddim_environment convert").stdout == ""


def test_unwritable_checkout(checkout: Checkout) -> None:
    (checkout.tools / "mkdir").unlink()
    fake_python(checkout.tools, "mkdir", "echo 'Read-only file system' >&2; exit 1")  # root may write anywhere
    result = checkout.run("jddim_environment convert")
    assert result.returncode == 1
    assert "cannot write" in one_line(result.stderr)


UV = r"""
case "$1" in
  venv) exec "$JDDIM_PYTHON_BASE" -m venv --without-pip "${@: -1}" ;;
  pip)
    env | grep -E '^(UV_|SSL_CERT_FILE|ALL_PROXY)' >"$HOME/uv-environment"
    printf '%s\n' "$@" >"$HOME/uv-arguments"
    echo 'error: Request failed after 3 retries in 8.5s
  cause: Failed to fetch: `http://index.invalid/simple/hatchling/`
  cause: client error (Connect)
  cause: failed to lookup address information: Name or service not known' >&2
    exit 2 ;;
esac
exit 7
"""


def test_uv_gets_the_settings_of_pip(checkout: Checkout, tmp_path: Path) -> None:
    fake_python(checkout.tools, "uv", UV)
    (tmp_path / "pip.conf").write_text(
        "[global]\nextra-index-url =\n    http://a.invalid/simple\n    http://b.invalid/simple\n"
        "timeout = 13\nfind-links = /global\n[install]\nfind-links = /install\n"
    )
    result = checkout.run(
        "jddim_environment convert",
        PIP_CONFIG_FILE=tmp_path / "pip.conf",
        PIP_INDEX_URL="http://index.invalid/simple",
        PIP_CERT="/ca.pem",
        PIP_PROXY="http://proxy.invalid:3128",
        UV_HTTP_TIMEOUT="17",
    )
    assert result.returncode == 1
    line = one_line(result.stderr)
    assert "the package index could not be reached (Name or service not known)" in line
    given = (checkout.root / "uv-environment").read_text().splitlines()
    settings = dict(pair.split("=", 1) for pair in given)
    assert settings["UV_DEFAULT_INDEX"] == "http://index.invalid/simple"
    assert settings["SSL_CERT_FILE"] == "/ca.pem"
    assert settings["ALL_PROXY"] == "http://proxy.invalid:3128"
    assert settings["UV_HTTP_TIMEOUT"] == "17"  # the user's own word for uv wins
    if subprocess.run([BASE_PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        assert settings["UV_INDEX"] == "http://a.invalid/simple http://b.invalid/simple"
        assert settings["UV_INDEX_STRATEGY"] == "unsafe-best-match"
        assert settings["UV_FIND_LINKS"] == "/install"
    arguments = (checkout.root / "uv-arguments").read_text().split("\n")
    assert arguments[:4] == ["pip", "install", "--python", str(checkout.venv / "bin" / "python")]
    assert "--no-index" in arguments
    assert ".[convert]" in arguments
