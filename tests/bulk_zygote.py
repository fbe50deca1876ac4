"""Runs of `jddim.bulk.run` to be killed: a small process without jax, which forks one for each.

Reads a JSON list of runs a line, does them at once, and answers with a JSON list of their ends: an exit status, or
minus the signal. A run: {"out", "format", "worker": [i, n], and perhaps "event": k, SIGKILL at the k-th file that it
opens, makes, renames or removes in OUT; "after": seconds, SIGKILL then; "limit": bytes that a file may have; "nobody":
true, as the user who may do little}. Tests use `Zygote`, `manifest` and `make`; the child is this file as a script.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jddim.bulk import run as bulk
from jddim.bulk.manifest import BulkConfig, Manifest
from jddim.config import SamplerConfig
from jddim.run.request import Request, options

NUM, BATCH, SIZE = 43, 3, 6  # the last batch and the last shard are not whole


def LABELS(numbers: range) -> np.ndarray:
    return (np.array(numbers) % 5).astype(np.int32)


def manifest(format: str = "npz", **changes: Any) -> Manifest:
    asked = {o.name: changes.pop(o.name) for o in options() if o.name in changes}
    sizes = {"num": NUM, "batch_size": BATCH, "shard_size": SIZE, "format": format} | changes
    config = BulkConfig(**sizes, request=Request(**asked))
    return Manifest("../ckpt", "0" * 64, config, SamplerConfig(eta=0.5), {"jax": "none"})


def make(first: int) -> np.ndarray:
    """Stands in for sampling: image i is a function of i."""
    time.sleep(0.001)
    return np.stack(
        [np.random.default_rng(i).integers(0, 256, (5, 7, 3), np.uint8) for i in range(first, first + BATCH)]
    )


class Zygote:
    """The process, from the tests' side."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )

    def run(self, *runs: dict[str, Any]) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([{**run, "out": str(run["out"])} for run in runs]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _kill_at(event: int, out: str) -> None:
    left = event

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and out in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _child(run: dict[str, Any]) -> None:
    try:
        if "event" in run:
            _kill_at(run["event"], run["out"])
        if "limit" in run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (run["limit"], run["limit"]))
        if run.get("nobody") and os.geteuid() == 0:
            os.setuid(65534)
        bulk.run(run["out"], manifest(run["format"]), make, LABELS, worker=tuple(run.get("worker", (0, 1))))
    except OSError as error:
        os._exit(error.errno or 1)
    except BaseException:
        os._exit(99)
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        runs, children = json.loads(line), []
        for run in runs:
            child = os.fork()
            if child == 0:
                _child(run)
            children.append(child)
        for run, child in zip(runs, children, strict=True):
            if "after" in run:
                time.sleep(run["after"])
                os.kill(child, signal.SIGKILL)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main()
