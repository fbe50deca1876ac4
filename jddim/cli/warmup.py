"""`jddim warmup`: compile beforehand."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

from jddim.cli.options import add_ckpt, add_request, checkpoint, request_of
from jddim.config import counted


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "warmup",
        _warmup,
        "compile what `jddim sample` with the same options will run",
        "mnist\nmnist --num 256 --steps 50 --eta 0.5",
    )
    add_ckpt(sub)
    sub.add_argument("--num", type=int, default=64, metavar="N", help="images a call, as sample's (default 64)")
    sub.add_argument("--batch-size", type=int, default=64, metavar="B", help="as sample's (default 64)")
    add_request(sub, "warmup")


def _warmup(args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    import jddim
    from jddim.run.batches import run
    from jddim.run.plan import Inputs, plan

    if not _kept():
        raise ValueError("compiled programs are not kept here, so there is nothing to warm: see jddim doctor")
    started = time.perf_counter()
    request = request_of(args, "warmup")
    checkpoint(args)
    ddim = jddim.load(args.ckpt, dtype=request.dtype)
    config = ddim.model.config
    inputs = Inputs(jax.random.key(0))
    if config.condition_channels:
        beside = (max(args.num, 0), *(request.image_size or config.image_size), config.condition_channels)
        inputs = inputs._replace(condition=np.zeros(beside, np.float32))
    plan(ddim, request, inputs, args.num, args.batch_size).check("sample")
    num = min(args.num, args.batch_size)  # all batches of a run have one program, the last included
    if "," in (request.labels or ""):
        request = dataclasses.replace(request, labels=",".join((request.labels or "").split(",")[:num]))
    if inputs.condition is not None:
        inputs = inputs._replace(condition=inputs.condition[:num])
    jax.block_until_ready(run(plan(ddim, request, inputs, num).check("sample"))[0])
    print(f"ready for {counted(num, 'image')} a call [{time.perf_counter() - started:.1f} s]")
    return 0


def _kept() -> bool:
    """Whether compiled programs are kept here."""
    import jax

    return bool(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
