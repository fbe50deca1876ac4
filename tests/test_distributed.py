"""Workers that jax.distributed joins: killed, ended by one another, gone on with by another number of them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import tree, write_checkpoint

from jddim.bulk import distributed
from jddim.cli.main import main

pytestmark = pytest.mark.unoptimised

SETTINGS = ("--batch-size", "4", "--shard-size", "4", "--eta", "0.5")


def start(folder: Path, i: int, n: int, port: int, *more: str) -> subprocess.Popen[str]:
    words = ["bulk", "ckpt", "out", *SETTINGS, *more, "--distributed", f"127.0.0.1:{port},{n},{i}"]
    return subprocess.Popen(
        [sys.executable, "-m", "jddim", *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def set_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if ".lock" not in name}


def test_one_that_dies_ends_the_others_and_another_number_goes_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", channel_mults=(1,), attention_levels=(), middle=False)
    num = ("--num", "399")
    port = free_port()
    pair = [start(tmp_path, i, 2, port, *num) for i in range(2)]
    until = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("shard-*.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    pair[0].kill()  # the one that the others hear of one another by
    said = [process.communicate(timeout=distributed.HEARTBEAT + 60)[0] for process in pair]
    assert pair[0].returncode == -signal.SIGKILL
    assert pair[1].returncode not in (0, None), said[1]
    assert "process 1 of 2; should one die" in said[1]
    assert re.search("another (task )?died", said[1]), said[1]  # jax's words if it was at work, else ours
    attested = len(list((tmp_path / "out").glob("shard-*.json")))
    assert 3 <= attested < 100
    port = free_port()
    four = [start(tmp_path, i, 4, port, *num) for i in range(4)]
    said = [process.communicate(timeout=200)[0] for process in four]
    assert [process.returncode for process in four] == [0] * 4, said
    assert main(["bulk", str(tmp_path / "ckpt"), str(tmp_path / "undisturbed"), *SETTINGS, *num]) == 0
    assert set_of(tmp_path / "out") == set_of(tmp_path / "undisturbed")


def test_other_settings_are_refused_by_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt")
    port = free_port()
    pair = [start(tmp_path, i, 2, port, "--num", "9", "--seed", str(i)) for i in range(2)]
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [1, 1], said
    assert all("jddim: error: process 1 was given other settings than process 0" in text for text in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["here", "localhost,2,0", "localhost:1,2,2", "localhost:1,2"])
def test_where_is_checked(tmp_path: Path, where: str, fails: Callable[..., str]) -> None:
    write_checkpoint(tmp_path / "ckpt")
    words = ("bulk", tmp_path / "ckpt", tmp_path / "out", "--num", 9, "--distributed", where)
    assert "HOST:PORT,N,I" in fails(*words)
    assert "leave --shard out" in fails(*words, "--shard", "0/2")
