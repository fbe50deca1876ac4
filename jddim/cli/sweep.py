"""`jddim sweep`: one x_T under many etas and numbers of steps."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim.cli.options import (
    add_ckpt,
    add_request,
    check_num,
    condition_of,
    load_for,
    numbers,
    request_of,
    settings_of,
)
from jddim.config import counted

if TYPE_CHECKING:
    from jddim.pipeline import DDIM


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "sweep",
        _sweep,
        "sample one x_T under many etas and numbers of steps\nOUT is a grid, an atlas with costs, or the arrays.",
        "mnist etas.png\nmnist atlas.html --eta 0,0.2,0.5,1 --steps 10,20,50,100 --num 12\n"
        "mnist atlas.png --steps 10,50 --eta 0,1 --num 1000 --rows-at-once 1 --reference ../shared/data/mnist\n"
        "mnist etas.npz --num 64 --rows-at-once 4",
    )
    add_ckpt(sub)
    sub.add_argument(
        "out",
        type=Path,
        help=".png, .jpg or .webp a grid, of several --steps an atlas: columns S, rows eta, and what they cost; .html "
        "an atlas; .npz the arrays",
    )
    sub.add_argument("--num", type=int, default=8, metavar="N", help="images a cell (default 8)")
    sub.add_argument(
        "--eta",
        type=numbers(float),
        default=[i / 10 for i in range(11)],
        metavar="LIST",
        help="rows of the grid (default 0,0.1,...,1)",
    )
    sub.add_argument(
        "--steps", type=numbers(int), metavar="LIST", help="each compiled once (default: the checkpoint's)"
    )
    sub.add_argument(
        "--rows-at-once", type=int, metavar="N", help="etas that share a call and its memory (default: all)"
    )
    sub.add_argument(
        "--reference",
        type=Path,
        metavar="DATA",
        help="for an atlas of digits: FD (mnist-cnn-v1) of each cell's images, as in jddim evaluate",
    )
    sub.add_argument("--show", type=int, default=8, metavar="N", help="images that an atlas draws a cell (default 8)")
    add_request(sub, "sweep")


def _sweep(args: argparse.Namespace) -> int:
    suffix = args.out.suffix.lower()
    as_atlas = suffix == ".html" or (suffix != ".npz" and args.steps is not None and len(args.steps) > 1)
    if args.reference is not None and not as_atlas:
        raise ValueError("--reference is for an atlas: OUT.html, or a picture of several --steps")
    check_num(args.num, 1)
    if args.show < 1:
        raise ValueError(f"--show must be at least 1, got {args.show}")
    request = request_of(args, "sweep")

    from jddim import images

    ddim = load_for(args, request, {**images.SHEETS, ".npz": "the arrays", ".html": "an atlas"})

    import jax
    import numpy as np

    from jddim.pipeline import SampleOptions
    from jddim.run.plan import Inputs, plan
    from jddim.scale import atlas
    from jddim.scale.sweeping import sweep

    assert ddim.metadata is not None
    steps = args.steps or [ddim.sampler.num_steps]
    key = jax.random.key(request.seed)
    condition = condition_of(args.condition, ddim.metadata.sampled_size(request.image_size), args.num)
    widest = Inputs(key, eta=max(args.eta), condition=condition)
    planned = [  # all, before the first is run
        plan(ddim, dataclasses.replace(request, steps=S), widest, args.num).check("sweep") for S in steps
    ]
    if not as_atlas:
        images.check_sheet(args.out, len(args.eta) * args.num, ddim.metadata.image_shape[:2], args.num)
    rest, used = request.settled(ddim.sampler)
    ddim = dataclasses.replace(ddim, sampler=used)
    options: dict[str, Any] = {n: v for n, v in rest.asked().items() if n in SampleOptions.__annotations__}
    options |= {"rows_at_once": args.rows_at_once, "labels": planned[0].inputs.labels, "condition": condition}
    distance, name = _distance(args, ddim)
    tables = [one.table for one in planned]
    made: list[Any] = []
    for S, table in zip(steps, tables, strict=True):
        print(
            f"{counted(table.num_steps, 'step')}, {counted(len(args.eta), 'eta')}, {counted(args.num, 'image')} each",
            flush=True,
        )
        asked = (ddim, key, args.num, args.eta)
        if as_atlas:
            made.append(atlas.survey(*asked, S, distance=distance, progress=True, **options))
        else:
            made.append(np.asarray(sweep(*asked, steps=S, progress=True, **options)))
    settings = settings_of(args, request, ddim, planned[0], "sweep") | {"steps": steps}
    drawn = {"etas": args.eta, "name": name, "show": args.show}
    match suffix:
        case ".npz":
            counts = np.array([table.num_steps for table in tables])
            with images.atomic(args.out) as staging:
                np.savez(staging, x_0=np.stack(made), eta=np.array(args.eta), steps=counts)
        case ".html":
            with images.atomic(args.out) as staging:
                staging.write_text(atlas.page(made, settings=settings, **drawn))
        case _ if as_atlas:
            images.save_picture(args.out, atlas.picture(made, **drawn), settings)
        case _:
            picture = images.grid(made[0].reshape(-1, *made[0].shape[2:]), columns=args.num)
            labels = [f"eta {eta:g}" for eta in args.eta]
            images.save_picture(args.out, images.labelled(picture, labels), settings)
    print(f"{counted(len(steps) * len(args.eta) * args.num, 'image')} -> {args.out}")
    if name is not None and args.num < 1000:
        print(f"note: {args.num} images are few: below 1,000 or so {name} says little, and it falls with their number")
    return 0


def _distance(args: argparse.Namespace, ddim: DDIM) -> tuple[Callable[[Any], float] | None, str | None]:
    """How far images are from --reference, and what that is called."""
    if args.reference is None:
        return None, None

    from jddim.cli.evaluate import digit_features
    from jddim.evaluate import metrics, mnist_cnn
    from jddim.images import from_uint8, to_uint8

    assert ddim.metadata is not None
    if (shape := ddim.metadata.image_shape) != (28, 28, 1):
        raise ValueError(
            f"--reference: {mnist_cnn.NAME} looks at images of 28x28x1, this checkpoint makes "
            f"{'x'.join(map(str, shape))}; leave it out"
        )
    if args.num < 2:
        raise ValueError(f"--reference needs --num of at least 2, got {args.num}")
    real = metrics.Moments.of(digit_features(args.reference))
    seen = lambda x: mnist_cnn.features(from_uint8(to_uint8(x)))  # noqa: E731  # as the files would be evaluated
    far = lambda x: metrics.frechet_distance(metrics.Moments.of(seen(x)), real)  # noqa: E731
    return far, f"FD ({mnist_cnn.NAME})"
