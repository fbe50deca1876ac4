"""`jddim doctor`: what jddim runs on, whether compiled programs are kept. `jddim warmup`: compile beforehand."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from jddim.cli.options import read_labels
from jddim.config import counted

PACKAGES = ("jddim", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "torch", "diffusers")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    command("doctor", _doctor, "versions, devices, and whether the cache of compiled programs works", "")
    sub = command(
        "warmup",
        _warmup,
        "sample once for nothing, so that the next `jddim sample` with these options finds its programs compiled",
        "mnist\nmnist --num 256 --steps 50 --eta 0.5",
    )
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument("--num", type=int, default=64, metavar="N", help="images a call, as sample's (default 64)")
    sub.add_argument("--batch-size", type=int, default=64, metavar="B", help="as sample's (default 64)")
    sub.add_argument("--steps", type=int, metavar="S", help="default: the checkpoint's")
    sub.add_argument("--eta", type=float, metavar="E", help="any: all share a program")
    sub.add_argument("--spacing", metavar="NAME", help="only where it makes another number of steps")
    sub.add_argument("--labels", metavar="LIST", help="as sample's, for a class-conditional checkpoint")
    sub.add_argument("--guidance-scale", type=float, metavar="W", help="any: all share a program, none has another")
    sub.add_argument("--null-label", type=int, metavar="L", help="as sample's")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def _doctor(args: argparse.Namespace) -> int:
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:<17} {version}")
    print(f"{'python':<17} {platform.python_version()}, {platform.platform()}")
    import jax

    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        shown = "" if memory is None else f", {memory / 2**30:.0f} GiB"
        print(f"{'device':<17} {device.platform} {device.id}: {device.device_kind}{shown}")
    place = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not place:
        why = "JDDIM_CACHE or JAX_COMPILATION_CACHE_DIR is empty, or the folder cannot be written"
        print(f"{'compiled programs':<17} not kept ({why})")
        return 1
    files = [file for file in Path(place).glob("*-cache") if file.is_file()]
    print(f"{'compiled programs':<17} {len(files)}, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {place}")
    first, second = _trial(), _trial()
    if second["hits"] and second["requests"]:
        print(f"{'cache':<17} works: compiled in {first['seconds']:.2f} s, read in {second['seconds']:.2f} s")
        return 0
    print(f"{'cache':<17} DOES NOT WORK: what was just compiled was compiled again")
    return 1


def _trial() -> dict[str, Any]:
    """Compile a program that nobody else has, forgetting it first: whether jax found it in its cache."""
    import jax
    import jax.numpy as jnp

    counts = {"hits": 0, "requests": 0}

    def count(event: str, **_: Any) -> None:
        counts["hits"] += event == "/jax/compilation_cache/cache_hits"
        counts["requests"] += event == "/jax/compilation_cache/compile_requests_use_cache"

    own = float(os.getpid())  # in the program, so that the first trial of a process has to compile

    def program(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.sort(jnp.cos(y @ y) + own), x)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # this program is a quick one
    jax.clear_caches()
    jax.monitoring.register_event_listener(count)
    started = time.perf_counter()
    try:
        jax.block_until_ready(jax.jit(program)(jnp.ones((7, 7))))
    finally:
        jax.monitoring.unregister_event_listener(count)
    return {"seconds": time.perf_counter() - started, **counts}


def _warmup(args: argparse.Namespace) -> int:
    import jax

    import jddim

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        raise ValueError("compiled programs are not kept here, so there is nothing to warm: see jddim doctor")
    started = time.perf_counter()
    ddim = jddim.load(args.ckpt, dtype=args.dtype)
    num = min(args.num, args.batch_size)  # all batches of a run have one program, the last included
    labels = read_labels(args.labels, args.num)
    ddim.sample(
        jax.random.key(0),
        num,
        steps=args.steps,
        spacing=args.spacing,
        eta=args.eta,
        labels=None if labels is None else labels[:num],
        guidance_scale=args.guidance_scale,
        null_label=args.null_label,
        progress=True,  # cut into segments, as sample is
    )
    print(f"ready for {counted(num, 'image')} a call [{time.perf_counter() - started:.1f} s]")
    return 0
