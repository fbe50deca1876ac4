"""SIGKILL at random moments of `jddim bulk`, resumed each time; then compared with an undisturbed run, to the bit.

    python tests/measure_bulk_kills.py [--kills 20] [--workers 1] [--seed 0]

Each kill costs a start of jax, so the suite kills runs without it (tests/test_bulk.py) and this is run by hand.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny import tree, write_checkpoint

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="bulk-kills-"))
    write_checkpoint(folder / "ckpt")
    settings = ["--num", "1501", "--batch-size", "8", "--shard-size", "8", "--eta", "0.5", "--format", "tar"]

    def start(out: str, worker: int, workers: int) -> subprocess.Popen[str]:
        words = ["bulk", str(folder / "ckpt"), str(folder / out), *settings, "--shard", f"{worker}/{workers}"]
        return subprocess.Popen(
            [sys.executable, "-m", "jddim", *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    whole = start("undisturbed", 0, 1)
    whole.communicate()
    assert whole.returncode == 0
    kills = 0
    while kills < args.kills:
        runs = [start("out", i, args.workers) for i in range(args.workers)]
        for run in runs:
            assert run.stdout is not None
            run.stdout.readline()  # it is at work: its first shard is written, or all are
            time.sleep(rng.uniform(0, 0.15))
            run.kill()
            run.communicate()
            kills += run.returncode == -signal.SIGKILL
            assert run.returncode in (0, -signal.SIGKILL), run.returncode
        found = len(list((folder / "out").glob("shard-*.json")))
        print(f"{kills} kills, {found} of 188 shards attested", flush=True)
        if found == 188:
            break
    runs = [start("out", i, args.workers) for i in range(args.workers)]
    for run in runs:
        print(run.communicate()[0].splitlines()[-1])
        assert run.returncode == 0
    made, expected = (
        {name: value for name, value in tree(folder / out).items() if not name.startswith(".lock")}
        for out in ("out", "undisturbed")
    )
    assert made.keys() == expected.keys()
    assert made == expected
    print(f"{kills} kills on {args.workers} processes: {len(made)} files, each identical to the undisturbed run's")


if __name__ == "__main__":
    main()
