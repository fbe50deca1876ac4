"""`jddim doctor`: what jddim runs on, and whether compiled programs are kept."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jddim", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "torch", "diffusers")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    command("doctor", _doctor, "show versions and devices, and try the cache of programs", "")


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
