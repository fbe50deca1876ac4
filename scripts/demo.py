"""The whole way, on the checkpoint in scripts/assets: PyTorch DDPM -> `jddim convert` -> DDIM samples -> pictures.

Run by scripts/demo, which makes the environment. Writes out/demo/digits.png, eta-strip.png and trajectory.gif, and
keeps the converted checkpoint in out/demo/mnist for the next run.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import jddim
from jddim.checkpoint.folder import CheckpointError
from jddim.cli.options import OneLineParser
from jddim.images import grid, save_gif, save_picture

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "scripts" / "assets" / "mnist-ddpm"
GUIDED = ROOT / "scripts" / "assets" / "mnist-guided"
ASKED = ("--num", "10", "--labels", "0:10", "--guidance-scale", "3")
OUT = ROOT / "out" / "demo"
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 30
# The walk-through's conventions; the checkpoint's own defaults are those of the code that trained it.
WALK_THROUGH: dict[str, Any] = {"steps": STEPS, "spacing": "linspace", "clip": True}
SIDE = 3 * 28  # a 28-pixel digit is small on a screen


def shown(path: Path) -> str:
    """The path as seen from where the user is."""
    return os.path.relpath(path)


@contextmanager
def timed(what: str) -> Iterator[None]:
    print(what, flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def load_or_convert() -> jddim.DDIM:
    """The converted checkpoint in out/demo/mnist, converted now unless it is there, whole and of this source."""
    checkpoint, config, source = OUT / "mnist", SOURCE / "config.yml", SOURCE / "ckpt.pth"
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, config)]
    if checkpoint.exists():
        try:
            ddim = jddim.load(checkpoint)
            assert ddim.metadata
            provenance = ddim.metadata.provenance
            if [part.get("sha256") for part in (provenance["source"], *provenance["config"])] == expected:
                print(f"1. {shown(checkpoint)} is already the conversion of {shown(source)}: kept")
                return ddim
            print(f"   {shown(checkpoint)} was converted from another file: converting again")
        except CheckpointError as error:
            print(f"   {shown(checkpoint)} cannot be used ({error}): converting again")
        shutil.rmtree(checkpoint)
    command = ["convert", shown(source), shown(checkpoint), "--config", shown(config)]
    print("1. Converting the PyTorch checkpoint, and comparing the two networks")
    with timed(f"   $ {shlex.join(['jddim', *command])}"):
        converted = subprocess.run([sys.executable, "-m", "jddim", *command])
    if converted.returncode:
        sys.exit(converted.returncode)  # it has said why
    return jddim.load(checkpoint)


def labelled(rows: NDArray[np.uint8], labels: list[str], width: int = 110) -> NDArray[np.uint8]:
    """A one-channel picture of equally high rows with a label on the left of each."""
    height = rows.shape[0] // len(labels)
    margin = Image.new("L", (width, rows.shape[0]), 255)
    draw, font = ImageDraw.Draw(margin), ImageFont.load_default(size=20)
    for i, label in enumerate(labels):
        draw.text((width - 12, (i + 0.5) * height), label, fill=0, font=font, anchor="rm")
    return np.concatenate([np.asarray(margin)[..., None], rows], axis=1)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="scripts/demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, metavar="I", help="other digits (default 0)")
    args = parser.parse_args(argv)

    OUT.mkdir(parents=True, exist_ok=True)
    # Compiling the two programs takes about as long as running them; the next run finds them here.
    jax.config.update("jax_compilation_cache_dir", str(OUT / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    print("jddim: a DDPM trained in PyTorch on MNIST, sampled with DDIM in JAX. No retraining.\n")
    ddim = load_or_convert()
    key = jax.random.key(args.seed)
    settings = {**WALK_THROUGH, "seed": args.seed, "checkpoint_sha256": ddim.metadata and ddim.metadata.sha256}

    T = ddim.schedule.num_train_timesteps
    with timed(f"2. Sampling 64 digits in {STEPS} steps of the {T} it was trained with, eta 0"):
        x_0, trajectory = ddim.sample(key, num=64, eta=0.0, trajectory_every=1, progress=True, **WALK_THROUGH)
        save_picture(OUT / "digits.png", grid(x_0, columns=8, side=SIDE), {**settings, "eta": 0.0})

    with timed("3. Drawing the way from noise to the first 16 of them"):
        x_T = jddim.initial_noise(jddim.sample_keys(key, 16), x_0.shape[1:])
        x_t, x0_hat = np.asarray(trajectory.x_t)[:, :16], np.asarray(trajectory.x0_hat)[:, :16]
        # Each frame: x_t, and beside it the image that the network predicts from it; last, the result and itself.
        left, right = [np.asarray(x_T), *x_t], [*x0_hat, x_t[-1]]
        pairs = zip(left, right, strict=True)
        frames = [np.concatenate([grid(a, side=SIDE), grid(b, side=SIDE)], axis=1) for a, b in pairs]
        save_gif(OUT / "trajectory.gif", frames, {**settings, "eta": 0.0})

    with timed(f"4. Sampling the first 8 again with the same noise and eta {', '.join(f'{eta:g}' for eta in ETAS)}"):
        # The key fixes x_T and the noise of every step, so eta alone differs between the rows.
        rows = [np.asarray(ddim.sample(key, num=8, eta=eta, progress=True, **WALK_THROUGH)) for eta in ETAS]
        strip = grid(np.concatenate(rows), columns=8, side=SIDE)
        save_picture(OUT / "eta-strip.png", labelled(strip, [f"eta {eta:g}" for eta in ETAS]), settings)

    command = [shown(Path(sys.executable).parent / "jddim"), "sample", shown(OUT / "mnist"), "more.png"]
    print(f"""
Pictures:
   {shown(OUT / "digits.png")}      64 digits, {STEPS} steps, eta 0
   {shown(OUT / "eta-strip.png")}   the same noise with more and more of it added on the way (top: eta 0)
   {shown(OUT / "trajectory.gif")}  left x_t, right the digit predicted from it, step by step
Sample it yourself:
   $ {shlex.join([*command, "--eta", "0.5", "--seed", "1"])}
Digits that you ask for, by a checkpoint trained further with jddim train:
   $ {shlex.join([command[0], "sample", shown(GUIDED), "asked.png", *ASKED])}""")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
