"""What docs/serve.md says of time: python tests/measure_serve.py CKPT [--repeats 20]. Run it on a machine at rest.

Starts `jddim serve` twice, with an empty cache of programs and then with a full one, and asks it over HTTP what the
page asks for when it is opened, 4 images in 20 steps, and for 8. The clock starts before the request is sent.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from web_server import events, post


def run(port: int, **asked: Any) -> tuple[float, float]:
    """Seconds to the first preview, and to the last image."""
    start = time.perf_counter()
    first = None
    name = ""
    for name, said in events(post(port, "/api/run", asked)):  # noqa: B007
        if first is None and "images" in said:
            first = time.perf_counter() - start
    assert name == "done"
    whole = time.perf_counter() - start
    return first or whole, whole


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s (of {len(values)}: {min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as cache:
        for title in ("empty", "full"):
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "jddim", "serve", str(args.ckpt), "--port", "0"],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"JDDIM_CACHE": cache},
            )
            assert process.stdout is not None
            try:
                port = int(process.stdout.readline().split("/")[2].partition(":")[2])
                up = time.perf_counter() - start
                _, first = run(port, steps=1, num=1)
                print(f"cache {title}: page after {up:.1f} s, first image after {time.perf_counter() - start:.1f} s")
                while not (ready := re.match(r"ready \[(.*)\]", process.stdout.readline())):
                    pass
                print(f"cache {title}: everything compiled after {ready[1]}")
                if title == "full":
                    once = [run(port, seed=i) for i in range(args.repeats)]
                    print("first preview:", median([first for first, _ in once]))
                    print("4 images in 20 steps:", median([whole for _, whole in once]))
                    eight = [run(port, seed=i, num=8)[1] for i in range(args.repeats)]
                    print("8 images in 20 steps:", median(eight))
                    with concurrent.futures.ThreadPoolExecutor(10) as pool:
                        ten = list(pool.map(lambda i, port=port: run(port, seed=i), range(10)))
                    print("ten at once, first preview:", median([first for first, _ in ten]))
                    print("ten at once, 4 images in 20 steps:", median([whole for _, whole in ten]))
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
    print(f"load of the machine after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
