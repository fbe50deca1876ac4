"""How many images at a time: the batch that fits the device and makes most images a second, found by trying."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jddim.pipeline import DDIM
from jddim.run.compiling import compiler_options, faster

WORTH = 1.05
"""A larger batch must be so many times as fast as the best before, or it is not worth its memory."""


def best_batch_size(
    ddim: DDIM,
    num: int,
    *,
    memory: int | None = None,
    evaluations: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> int:
    """The batch size for `num` images: 8 doubled while that pays and the network fits, or halved until it does.

    What is timed is the network alone, which nearly all of sampling's time goes to; each size tried is compiled.
    memory: bytes that may be used; None: what the device has left. Where its compiler does not say what a program
    needs, time alone decides. evaluations: images the network sees for each one that is made (2 with classifier-free
    guidance). say: told of each size tried.
    Raises ValueError if num is below 1, MemoryError if one image does not fit.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    memory = free_memory() if memory is None else memory
    best, best_rate, size = 0, 0.0, min(8, num)
    while size:
        run, needed = _network(ddim, size * evaluations)
        if memory is not None and needed is not None and needed > memory:
            say(f"batch {size} needs {needed / 2**20:.0f} MiB, {memory / 2**20:.0f} are free")
            if best:
                break
            size //= 2
            continue
        rate = size / _seconds(run)
        taken = "memory not told" if needed is None else f"{needed / 2**20:.0f} MiB"
        say(f"batch {size}: {rate:.3g} images/s a step, {taken}")
        if rate < WORTH * best_rate:
            break
        best, best_rate = size, rate
        if size < 8 or size == num:  # it came down to this, or there are no more images
            break
        size = min(2 * size, num)
    if not best:
        raise MemoryError("the memory that is free does not hold one image's evaluation: see --dtype bfloat16")
    say(f"batch size {best}")
    return best


def free_memory() -> int | None:
    """Bytes that the default device has left; of a CPU, the machine. None if nobody says."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free: int = stats["bytes_limit"] - stats["bytes_in_use"]
        return free
    if jax.default_backend() == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _network(ddim: DDIM, size: int) -> tuple[Callable[[], Array], int | None]:
    """A call of the network with so many images, and the bytes that it needs beside the weights; None: not told."""
    config = ddim.model.config
    x_t = jnp.zeros((size, *config.image_size, config.input_channels), jnp.float32)
    t = jnp.broadcast_to(jnp.asarray(ddim.table().t[0]), size)
    labels = {
        None: None,
        "learned": jnp.zeros(size, jnp.int32),
        "timestep": jnp.ones(size, jnp.float32),
        "identity": jnp.zeros((size, getattr(config, "time_width", 1)), jnp.float32),
    }[config.class_embedding]
    model = faster(ddim.model)  # once for all steps, so not among what is timed; but it takes memory
    more = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - sum(
        leaf.nbytes for leaf in jax.tree.leaves(ddim.model)
    )
    given = (model, x_t, t) if labels is None else (model, x_t, t, labels)
    program = jax.jit(lambda model, *inputs: model(*inputs)).lower(*given).compile(compiler_options())
    sizes: Any = program.memory_analysis()  # None where a device's compiler does not say
    needed = None if sizes is None else sizes.temp_size_in_bytes + sizes.output_size_in_bytes + more + x_t.nbytes
    return lambda: program(*given), needed


def _seconds(run: Callable[[], Array]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
