"""`jddim serve`: started and ended as a command; mistakes are one line, before anything is compiled."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_checkpoint

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"jddim serve needs {package}: pip install 'jddim[web]'")

from web_server import events, made, post, send  # noqa: E402

from jddim.installing import install_line  # noqa: E402


def test_it_serves_until_ctrl_c(tmp_path: Path) -> None:
    small = {"channel_mults": (1,), "attention_levels": (), "middle": False}
    checkpoint = write_checkpoint(tmp_path / "tiny", **small)
    words = ["serve", str(checkpoint), "--port", "0", "--methods", "ddim", "--max-steps", "200", "--host", "0.0.0.0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-m", "jddim", *words], text=True, **pipes)
    try:
        assert process.stdout is not None
        address = process.stdout.readline()
        assert address.startswith("http://0.0.0.0:")
        port = int(address.split("/")[2].partition(":")[2])
        about = json.loads(send(port, "GET", "/api/about").read())
        assert about["bounds"] == {"steps": 200, "num": 16}
        assert [one["name"] for one in about["checkpoints"]] == ["tiny"]
        data = made(port, steps=3, num=2)  # waits for its program
        assert 'jddim.load("tiny")' in data["python"]  # where it lies is nobody else's business
        for host, status in (("192.168.0.7", 200), ("evil.example", 403), (socket.gethostname(), 200)):
            assert send(port, "GET", "/api/about", Host=host).status == status
        watched = events(post(port, "/api/run", {"steps": 200, "num": 16}))
        next(watched)
        process.send_signal(signal.SIGINT)
        assert [name for name, _ in watched][-1] == "failed"  # told, not cut off
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert error.count("\n") == 1
    assert "warning: --host 0.0.0.0: whoever can reach this machine can use the page" in error
    assert "compiled 1 of 3: ddim (tiny)" in out
    assert out.endswith("stopped\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-steps", "1"], "--max-steps must be at least 2, got 1"),
        (["--queue", "0"], "--queue must be at least 2"),
        (["--port", "65536"], "--port must lie in 0..65535"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_mistakes(tmp_path: Path, fails: Callable[..., str], options: list[str], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    assert message in fails("serve", checkpoint, *options)


def test_more_mistakes(tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    assert "takes ddim and others" in fails("serve", checkpoint, "--methods", "heun", status=2)
    assert "no checkpoint at" in fails("serve", tmp_path / "none")
    assert "names must differ" in fails("serve", checkpoint, checkpoint)
    wide = write_checkpoint(tmp_path / "wide", in_channels=4, out_channels=4)
    assert "1 or 3 channels, this one makes 4" in fails("serve", wide)
    beside = write_checkpoint(tmp_path / "beside", condition_channels=2)
    assert "draws a picture of 1 or 3 channels beside x_t, and this network is given 2" in fails("serve", beside)
    timed = write_checkpoint(tmp_path / "timed", class_embedding="timestep")
    assert "timestep embedding" in fails("serve", timed)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in fails(
            "serve", checkpoint, "--port", port
        )
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert install_line("web") in fails("serve", checkpoint)
