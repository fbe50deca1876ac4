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

from jddim.cli.options import add_json, print_json

PACKAGES = ("jddim", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "torch", "diffusers")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command("doctor", _doctor, "show versions and devices, and try the cache of programs", "--json")
    add_json(sub)


def _doctor(args: argparse.Namespace) -> int:
    found: dict[str, Any] = {"packages": {}, "devices": [], "programs": None, "cache": None}

    def show(name: str, text: str) -> None:  # at once: what comes next may fail
        if not args.json:
            print(f"{name:<17} {text}")

    for name in PACKAGES:
        try:
            found["packages"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["packages"][name] = None
        show(name, found["packages"][name] or "not installed")
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    show("python", f"{found['python']}, {found['platform']}")
    import jax

    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        kind = {"platform": device.platform, "id": device.id, "kind": device.device_kind, "memory": memory}
        found["devices"].append(kind)
        shown = "" if memory is None else f", {memory / 2**30:.0f} GiB"
        show("device", f"{device.platform} {device.id}: {device.device_kind}{shown}")
    if place := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        files = [file for file in Path(place).glob("*-cache") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        found["programs"] = {"folder": place, "number": len(files), "bytes": size}
        show("compiled programs", f"{len(files)}, {size / 1e6:.1f} MB in {place}")
        first, second = _trial(), _trial()
        works, (compiled, read) = bool(second["hits"] and second["requests"]), (first["seconds"], second["seconds"])
        found["cache"] = {"works": works, "compile_seconds": compiled, "read_seconds": read}
        broken = "DOES NOT WORK: what was just compiled was compiled again"
        show("cache", f"works: compiled in {compiled:.2f} s, read in {read:.2f} s" if works else broken)
    else:
        why = "JDDIM_CACHE or JAX_COMPILATION_CACHE_DIR is empty, or the folder cannot be written"
        show("compiled programs", f"not kept ({why})")
    if args.json:
        print_json(found)
    return 0 if found["cache"] and found["cache"]["works"] else 1


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
