"""Pictures as text: every pixel is there, in its colour."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_checkpoint

from jddim.cli.terminal import RESET, UPPER_HALF, blocks
from jddim.images import to_uint8

pytestmark = pytest.mark.unoptimised
ROOT = Path(__file__).parent.parent
CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m" + UPPER_HALF)


def read(text: str) -> np.ndarray:
    """The picture `(h, w, 3)` that a terminal would show, spaces left out."""
    rows = []
    for line in text.split("\n"):
        cells = np.array([[int(number) for number in cell] for cell in CELL.findall(line)], np.uint8)
        rows += [cells[:, :3], cells[:, 3:]]
    return np.stack(rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_side_by_side(channels: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (5, 6, 7, channels)).astype(np.float32)
    text = blocks(x, 23)  # two of 7 columns and one between fit twice: 7 + 1 + 7 + 1 + 7
    expected = np.broadcast_to(np.concatenate(to_uint8(x[:3]), axis=1), (6, 21, 3))
    np.testing.assert_array_equal(read(text), expected)
    assert {line.count(RESET) for line in text.split("\n")} == {3}
    assert read(blocks(x, 22)).shape == (6, 14, 3)


def test_one_that_is_too_wide_is_made_smaller_and_odd_heights_end_in_black() -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (2, 10, 11, 1)).astype(np.float32)
    shown = read(blocks(x, 6))
    np.testing.assert_array_equal(shown[:5], np.broadcast_to(to_uint8(x[0, ::2, ::2]), (5, 6, 3)))
    assert shown.shape == (6, 6, 3)
    assert not shown[5].any()


def test_sample_draws_in_a_terminal_and_says_if_there_is_none(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="terminals are tried where there are pseudo-terminals")
    ckpt = write_checkpoint(tmp_path / "ckpt")
    command = ["sample", str(ckpt), str(tmp_path / "x.npy"), "--num", "2", "--preview", "-"]
    words = [sys.executable, "-m", "jddim", *command]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **os.environ}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "draws in the terminal, but stderr is no terminal; name a FILE.png" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.npy").exists()

    ours, theirs = pty.openpty()
    run = subprocess.Popen([*words, "--steps", "2"], env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    told = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side has ended
            break
        if not part:
            break
        told += part
    assert run.wait(60) == 0, told
    text = told.decode()
    assert len(CELL.findall(text)) >= 2 * 3 * 10  # of two segments, each with one picture of 3 x 10 cells at least
    shown = [line for line in text.splitlines() if UPPER_HALF in line][-3:]  # the last segment's x0_hat is the result
    last = read("\n".join(shown))[:, :10]
    np.testing.assert_array_equal(last, np.broadcast_to(to_uint8(np.load(tmp_path / "x.npy")[0]), (6, 10, 3)))
