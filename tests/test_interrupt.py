"""Ctrl-C at any time: exit status 130, one line, no traceback, nothing written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MNIST_SOURCE, ROOT
from tiny import SETTING_OPTIONS, state_dict, tree, write_checkpoint

from jddim import interrupt

# Presses Ctrl-C when the interpreter announces EVENT (see sys.addaudithook) about something whose name holds WORD:
# at a known moment, where a timer would hit another one on each machine.
PRESS = """
import os, signal, sys
event, word, *command = sys.argv[1:]
def hook(name, arguments):
    global event
    if name == event and word in str(arguments[0]):
        event = None
        for _ in range(2):  # nervous fingers
            os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["jddim", *command]
from jddim.__main__ import run
sys.addaudithook(hook)
run()
"""


def press(folder: Path, event: str, word: str, *command: object) -> None:
    before = tree(folder)
    done = subprocess.run(
        [sys.executable, "-c", PRESS, event, word, *map(str, command)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (130, "jddim: interrupted; nothing half-written was left\n"), done
    assert tree(folder) == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupt")
    write_checkpoint(path / "ckpt")
    return path


@pytest.mark.parametrize(
    ("event", "word"),
    [("import", "jddim.cli.main"), ("import", "numpy._core._multiarray_umath"), ("import", "jax._src.xla")],
)
def test_while_importing(folder: Path, event: str, word: str) -> None:
    press(folder, event, word, "sample", folder / "ckpt", folder / "out.npy")


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("numpy", ["schedule", "--steps", "5"]),
        ("flax", ["info", "ckpt"]),
        ("flax", ["diff", "ckpt", "ckpt"]),
    ],
)
def test_every_command_that_needs_no_torch(folder: Path, word: str, command: list[str]) -> None:
    press(folder, "import", word, *[folder / name if name == "ckpt" else name for name in command])


@pytest.mark.parametrize("name", ["out.npy", "out.png", "folder", "new/deep/out.npz"])
def test_while_writing_samples(folder: Path, name: str) -> None:
    # The files that it writes are named after OUT's stem, with a dot before.
    press(folder, "open", f".{Path(name).stem}.", "sample", folder / "ckpt", folder / name, "--num", 2, "--steps", 2)


@pytest.mark.parametrize(
    ("event", "word", "options"),
    [
        ("import", "torch._C", []),  # which is imported to verify with
        ("os.mkdir", ".dst.", ["--no-verify"]),
        ("open", "_CHECKPOINT_METADATA", ["--no-verify"]),
        ("open", "ocdbt", ["--no-verify"]),
        ("os.rename", ".dst.", ["--no-verify"]),
    ],
)
def test_while_converting(tmp_path: Path, event: str, word: str, options: list[str]) -> None:
    torch = pytest.importorskip("torch", reason="converting needs torch")
    torch.save(state_dict(), tmp_path / "model.ckpt")
    press(tmp_path, event, word, "convert", tmp_path / "model.ckpt", tmp_path / "dst", *SETTING_OPTIONS, *options)


def test_from_outside_while_computing(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="converting needs torch")
    process = subprocess.Popen(
        [sys.executable, "-m", "jddim", "convert", MNIST_SOURCE / "ckpt.pth", tmp_path / "dst"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    while "parameters filled" not in process.stdout.readline():  # next, it compiles and compares
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "jddim: interrupted; nothing half-written was left\n")
    assert tree(tmp_path) == {}


def test_deferred_notes_the_first_and_hears_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_heard", None), ("_signal", 2), ("SAME", -1.0)):
        monkeypatch.setattr(interrupt, name, value)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupt.deferred() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        assert (stopped(), interrupt.heard(), interrupt.status()) == (True, True, 143)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
