"""`jddim bulk`, `collect`, `check`, `reproduce`: many images in shards, and what there is to do with them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim.bulk import distributed
from jddim.cli.options import (
    CKPT,
    add_ckpt,
    add_overwrite,
    add_request,
    checkpoint,
    condition_of,
    digest_of,
    fastest_batch_size,
    read_batch_size,
    refuse_told,
    request_of,
    resolved,
    say,
    source_options,
)
from jddim.config import counted, first_few

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jddim.bulk.manifest import Manifest
    from jddim.bulk.run import Make


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "bulk",
        _bulk,
        "sample many images into a folder of checked shards\nThe same command again goes on where it was stopped.",
        "mnist fifty --num 50000 --steps 50\nclasses.ckpt set --num 50000 --labels balanced --format tar\n"
        "mnist fifty --num 50000 --shard 0/4    # one of four that may run at once",
    )
    add_ckpt(sub)
    sub.add_argument("out", type=Path, help="a new folder, or one that the same command began")
    sub.add_argument("--num", type=int, required=True, metavar="N", help="images in the whole set")
    sub.add_argument(
        "--batch-size",
        type=read_batch_size,
        default=64,
        metavar="B",
        help="images at a time (default 64); auto: tries which is fastest and fits, once for the set",
    )
    sub.add_argument("--shard-size", type=int, metavar="M", help="images a shard (default: about 1024, whole batches)")
    sub.add_argument(
        "--format",
        choices=("npz", "png", "tar"),
        default="npz",
        help="of a shard: npz, uint8 arrays (default); png, a folder of pictures; tar, for WebDataset",
    )
    sub.add_argument(
        "--shard",
        type=_worker,
        default=(0, 1),
        metavar="I/N",
        help="as worker I of 0..N-1, who make every N-th shard each; in one folder, or in one each (see collect)",
    )
    sub.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,N,I",
        help="as process I of N that jax.distributed joins, none of which goes on if one dies; without a value: as "
        "SLURM, Open MPI or a TPU pod says",
    )
    add_request(sub, "bulk")

    sub = command(
        "collect",
        _collect,
        "join the shards of jddim bulk into one .npz for FID evaluators\nThey are checked for gaps and doubles.",
        "fifty samples.npz\nworker-a worker-b samples.npz",
    )
    sub.add_argument("folders", type=Path, nargs="+", metavar="OUT", help="the set's folder, or its workers' folders")
    sub.add_argument("target", type=Path, metavar="samples.npz", help="arr_0 uint8 NHWC; arr_1 labels, if any")
    add_overwrite(sub)

    sub = command(
        "check",
        _check,
        "compare a set's checksums, and a few images made again\nExit status 0 if all agree.",
        "fifty\nfifty --resample 0",
    )
    sub.add_argument("out", type=Path, help="a folder that jddim bulk wrote")
    sub.add_argument("--resample", type=int, default=3, metavar="K", help="images to make again (default 3)")
    sub.add_argument("--seed", type=int, metavar="I", help="which ones (default: others each time)")
    _sources(sub)

    sub = command(
        "reproduce",
        _reproduce,
        "make one image of a set again, and compare it\nExit status 0 if it is identical.",
        "fifty --index 48213\nset/shard-00047/00048213.png\nalone.png --ckpt mnist",
    )
    sub.add_argument("source", type=Path, metavar="OUT|FILE.png", help="a folder of jddim bulk, or one of its PNGs")
    sub.add_argument("--index", type=int, metavar="I", help="which image of the folder")
    sub.add_argument("--out", type=Path, metavar="FILE.png", help="write it there as well")
    add_overwrite(sub)
    _sources(sub)


def _sources(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--ckpt", help=f"the checkpoint, if it is not where it was when the set was made: {CKPT}")
    sub.add_argument("--condition", type=Path, help="the images beside x_t, if not where they were then")
    source_options(sub)


def _worker(text: str) -> tuple[int, int]:
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        i, n = -1, 0
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"takes I/N with I from 0 to N-1, such as 0/4; got {text!r}")
    return i, n


def _bulk(args: argparse.Namespace) -> int:
    from jddim.bulk import run as bulk
    from jddim.bulk.manifest import BulkConfig, Manifest, check_folder, manifest_path, read_manifest
    from jddim.images import check_output
    from jddim.run.progress import Progress

    if args.distributed is not None:
        if args.shard != (0, 1):
            raise ValueError("--distributed says which worker this is: leave --shard out")
        args.shard = _join(args.distributed)
    automatic = args.batch_size == "auto"
    begun = manifest_path(args.out).exists()
    if automatic and not begun and (args.shard != (0, 1) or args.shard_size is not None):
        raise ValueError(
            "--batch-size auto tries sizes that workers would not agree on, nor a --shard-size fit: begin the set "
            "without them, or give a number"
        )
    if automatic:
        args.batch_size = read_manifest(args.out).bulk.batch_size if begun else 1
    if not begun:
        check_folder(args.out)
    metadata = checkpoint(args)
    asked = request_of(args, "bulk")
    request, used = asked.settled(metadata.sampler)
    config = BulkConfig(args.num, request, args.batch_size, args.shard_size, args.format)
    if begun:
        read_manifest(args.out)
    else:
        # Another worker may be looking at the folder now: what is tried must look like a part of a shard.
        probe = args.out / ("shard-.npz" if args.format == "npz" else "shard-.png")
        check_output(probe, metadata.model.in_channels, overwrite=True)

    import jax
    import numpy as np

    import jddim
    from jddim.run import plan
    from jddim.run.problems import condition_problems
    from jddim.run.request import RequestError

    ddim = dataclasses.replace(jddim.load(args.ckpt, dtype=request.dtype), sampler=used)
    condition = condition_of(args.condition, asked.image_size or metadata.model.image_size)
    if condition is not None and len(condition) not in (1, args.num):
        raise ValueError(f"--condition holds {counted(len(condition), 'image')}: give {args.num}, or one for all")
    shape = (args.num if condition is None else len(condition), *(asked.image_size or metadata.model.image_size))
    if problems := condition_problems(metadata.model, condition, shape, np.float32):
        raise RequestError(problems, "bulk")
    first = plan.Inputs(jax.random.key(asked.seed), condition=None if condition is None else condition[:1])
    plan.plan(ddim, asked, first, 1, args.batch_size).check("bulk")  # raises before anything is written
    if automatic and not begun:
        size = fastest_batch_size(request, ddim, args.num)
        config = dataclasses.replace(config, batch_size=size, shard_size=args.shard_size)
    beside = None
    if args.condition is not None:
        beside = _relative(args.condition, args.out)
        config = dataclasses.replace(config, condition_sha256=digest_of(args.condition))
    where = _relative(args.ckpt, args.out)
    manifest = Manifest(where, metadata.sha256, config, ddim.sampler, bulk.versions(), beside)
    if args.distributed is not None:
        distributed.check_same(manifest.run)
    (i, n), layout = args.shard, config.layout
    devices = jax.local_devices()
    total = sum(len(layout.images(k)) for k in range(i, layout.count, n))
    started = time.perf_counter()
    with Progress(total, f"{ddim.table().num_steps} steps") as bar:
        if len(devices) > 1:
            make = bulk.sampler_on(devices, ddim, config, condition, args.shard)
        else:  # between segments, signals are heard: a batch may take minutes
            make = bulk.sampler(ddim, config, condition, on_segment=lambda now: jax.block_until_ready(now.x_t))
        labels = functools.partial(bulk.labels_of, ddim, config)

        def told(first: int) -> NDArray[np.uint8]:
            bar.compiling()
            return make(first)

        done = bulk.run(args.out, manifest, told, labels, worker=args.shard, say=say, made=bar.add)
    seconds = time.perf_counter() - started
    if args.distributed is not None:
        distributed.wait_for_all()  # or the first to end would end the others
    which = "" if n == 1 else f", worker {i} of {n}"
    speed = f"  [{counted(done.images, 'image')} in {seconds:.1f} s, {done.images / seconds:.1f} images/s]"
    whole = f"{counted(done.shards, 'shard')} whole, {done.whole} of them before{which}"
    print(f"{args.out}: {whole}{speed if done.images else ''}")
    return 0


def _join(where: str) -> tuple[int, int]:
    i, n = distributed.join(where)
    say(
        f"process {i} of {n}; should one die, jax ends the others within {distributed.HEARTBEAT} s (SIGABRT), and the "
        "same command goes on, with as many processes as you like"
    )
    return i, n


def _relative(ckpt: Path, out: Path) -> str:
    return os.path.relpath(ckpt.resolve(), out.resolve())


def _maker(manifest: Manifest, folder: Path | None, args: argparse.Namespace) -> tuple[Make, list[str]]:
    """`make` as the set was made, and what is another here. folder: the set's, from which its sources are seen."""
    import jddim
    from jddim.bulk import run as bulk
    from jddim.checkpoint.diff import diff_mappings
    from jddim.checkpoint.folder import load_metadata

    if args.ckpt is None:
        refuse_told(args)
    named = None if args.ckpt is None else resolved(args.ckpt, args)
    path = _found(named, folder, manifest.checkpoint, "checkpoint", "--ckpt CKPT")
    sha256 = load_metadata(path, args.ckpt).sha256
    if sha256 != manifest.checkpoint_sha256:
        raise ValueError(
            f"{path} is another checkpoint: its SHA-256 is {sha256[:12]}..., the images were made with "
            f"{manifest.checkpoint_sha256[:12]}..."
        )
    ddim = dataclasses.replace(jddim.load(path, dtype=manifest.bulk.request.dtype), sampler=manifest.sampler)
    condition, request = None, manifest.bulk.request
    if manifest.bulk.condition_sha256 is not None:
        beside = _found(args.condition, folder, manifest.condition, "condition", "--condition FILE")
        if digest_of(beside) != manifest.bulk.condition_sha256:
            raise ValueError(f"{beside} holds other images than those that the set was made with")
        condition = condition_of(beside, request.image_size or ddim.model.config.image_size)
    elif args.condition is not None:
        raise ValueError("the set was made without a condition: leave --condition out")
    rows = diff_mappings(manifest.versions, bulk.versions())
    return bulk.sampler(ddim, manifest.bulk, condition), [f"{row.name} was {row.a}, here it is {row.b}" for row in rows]


def _found(given: Path | None, folder: Path | None, there: str | None, what: str, option: str) -> Path:
    """Where something that the set was made with is: as given, or as the folder's manifest says."""
    if given is not None:
        return given
    if folder is None or there is None:
        raise ValueError(f"name the {what} by {option}: the picture only says its SHA-256")
    if not (path := folder / there).exists():
        raise ValueError(f"the {what} is not at {path} any more: say where it is, {option}")
    return path


def _collect(args: argparse.Namespace) -> int:
    from jddim.bulk import collecting
    from jddim.files import check_free

    check_free(args.target, overwrite=args.overwrite)
    if args.target.suffix.lower() != ".npz":
        raise ValueError(f"{args.target}: the evaluators' file ends in .npz")
    num, doubles = collecting.collect(args.folders, args.target)
    note = f"; {doubles} of them equal an earlier one in every pixel" if doubles else ""
    print(f"{counted(num, 'image')} -> {args.target}{note}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from jddim.bulk import collecting
    from jddim.bulk.manifest import read_manifest

    manifest = read_manifest(args.out)
    wrong = collecting.problems(args.out)
    if wrong:
        raise ValueError(f"{args.out}: {first_few(wrong, 8)}. Run jddim bulk again, it makes them anew")
    made = f"{counted(manifest.bulk.layout.count, 'shard')}, {counted(manifest.bulk.num, 'image')}"
    print(f"{made}: every checksum agrees", flush=True)
    if args.resample < 1:
        return 0
    make, elsewhere = _maker(manifest, args.out, args)
    chosen = random.Random(args.seed).sample(range(manifest.bulk.num), min(args.resample, manifest.bulk.num))
    return _compare(make, manifest, elsewhere, {i: collecting.kept(args.out, manifest, i) for i in chosen})


def _reproduce(args: argparse.Namespace) -> int:
    from jddim.bulk import collecting
    from jddim.bulk.manifest import Manifest, manifest_path, read_manifest
    from jddim.bulk.shards import decode
    from jddim.files import read_regular
    from jddim.images import check_output, read_metadata, save_picture

    folder: Path | None = args.source
    if args.source.is_dir():
        if args.index is None:
            raise ValueError("say which image of the folder: --index I")
        manifest, index = read_manifest(args.source), args.index
        pixels = collecting.kept(args.source, manifest, index)
    else:
        try:
            said = read_metadata(args.source)
            manifest, index = Manifest.of(said), said.get("index")
            if type(index) is not int or not 0 <= index < manifest.bulk.num:
                raise ValueError(f"index must be one of its set's {manifest.bulk.num}")
            pixels, _ = decode(read_regular(args.source))
        except ValueError as error:
            raise ValueError(f"{args.source} is no picture that jddim bulk wrote: {error}") from error
        if args.index not in (None, index):
            raise ValueError(f"{args.source} is image {index}, not {args.index}")
        folder = args.source.absolute().parent.parent
        if manifest_path(folder).exists():
            seen = read_manifest(folder)
            manifest = dataclasses.replace(manifest, checkpoint=seen.checkpoint, condition=seen.condition)
        else:
            folder = None
    if args.out is not None:
        check_output(args.out, pixels.shape[-1], formats={".png": "exact"}, overwrite=args.overwrite)
    make, elsewhere = _maker(manifest, folder, args)
    keep = None
    if args.out is not None:
        keep = lambda image: save_picture(args.out, image, {**manifest.settings, "index": index})  # noqa: E731
    return _compare(make, manifest, elsewhere, {index: pixels}, keep)


def _compare(
    make: Make,
    manifest: Manifest,
    elsewhere: list[str],
    kept: dict[int, Any],
    keep: Callable[[Any], None] | None = None,
) -> int:
    """Make these images again and print how far they are from those kept; 1 if any is."""
    from jddim.bulk import collecting

    apart = 0
    for index, pixels in kept.items():
        again = collecting.remake(make, manifest.bulk, index)
        found = collecting.compare(pixels, again, index)
        apart += found.differing > 0
        print(found, flush=True)
        if keep is not None:
            keep(again)
    if apart and elsewhere:
        print("rounding may differ: " + "; ".join(elsewhere))
    return int(apart > 0)
