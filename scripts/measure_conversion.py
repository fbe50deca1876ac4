"""How much memory and time a large checkpoint's conversion takes, against torch.load + torch.save of the same file.

    .venv/bin/python scripts/measure_conversion.py [FOLDER] [--channels 288] [--no-verify]

Writes a file of this family with random weights (608M parameters by default) into FOLDER, which needs three times its
2.4 GB, and runs both in processes of their own. Memory is the peak of the resident set, mapped pages included, above
what the process had before it began (jax and torch imported).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = """
import json, os, resource, sys, threading, time
import jax, torch, convert.conversion, convert.reference.unet, orbax.checkpoint

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

stages, peak, recent, running = [], 0, 0, True
def watch():
    global peak, recent
    while running:
        recent = max(recent, resident())
        peak = max(peak, recent)
        time.sleep(0.01)

def say(line):
    global recent
    stages.append((round(time.perf_counter() - started, 1), round((recent - before) / 1e6), line[-70:]))
    recent = 0

before = resident()
thread = threading.Thread(target=watch)
thread.start()
started = time.perf_counter()
"""
FINISH = """
seconds = time.perf_counter() - started
running = False
thread.join()
print(json.dumps({"seconds": seconds, "before": before, "peak": peak, "stages": stages}))
"""
CONVERT = """
convert.conversion.convert(sys.argv[1], sys.argv[2], settings={"image_size": "64"}, verify=VERIFY, say=say)
"""
ROUND_TRIP = """
contents = torch.load(sys.argv[1], weights_only=True)
torch.save(contents, sys.argv[2])
"""


def write_source(path: Path, channels: int) -> None:
    import numpy as np
    import torch

    from convert.families.ho import source_shapes
    from jddim.config import UNetConfig

    config = UNetConfig(
        image_size=(64, 64),
        in_channels=3,
        out_channels=3,
        channels=channels,
        channel_mults=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_levels=(3, 4, 5),
    )
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in source_shapes(config).items():
        scale = 1 / np.sqrt(max(np.prod(shape[1:]), 1))
        state[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))
    torch.save(state, path)
    print(f"{sum(value.numel() for value in state.values()):,} parameters, {path.stat().st_size:,} bytes", flush=True)


def run(code: str, *arguments: Path) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", COMMON + code + FINISH, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default: a temporary one, removed at the end")
    parser.add_argument("--channels", type=int, default=288)
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source.pt"
        write_source(source, args.channels)
        size = source.stat().st_size
        torch = run(ROUND_TRIP, source, Path(folder) / "saved.pt")
        (Path(folder) / "saved.pt").unlink()
        ours = run(CONVERT.replace("VERIFY", str(args.verify)), source, Path(folder) / "converted")
        for name, figures in (("torch.load + torch.save", torch), ("jddim convert", ours)):
            above = figures["peak"] - figures["before"]
            print(f"{name:<24} {figures['seconds']:6.1f} s  {above / 1e6:8.0f} MB = {above / size:.2f} x the file")
        print("until, with a peak of, what was said then:")
        for seconds, megabytes, line in ours["stages"]:
            print(f"  {seconds:6.1f} s {megabytes:6d} MB  {line}")
        print(f"time: {ours['seconds'] / torch['seconds']:.2f} x torch.load + torch.save")


if __name__ == "__main__":
    main()
