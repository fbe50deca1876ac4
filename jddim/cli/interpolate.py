"""`jddim interpolate`: images between those of two noises, or of four."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jddim.cli.options import (
    add_ckpt,
    add_request,
    check_num,
    classifier_of,
    condition_of,
    load_for,
    numbers,
    quiet,
    request_of,
    settings_of,
)
from jddim.run.request import whole_seed


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "interpolate",
        _interpolate,
        "sample between two noises, or four, by slerp of x_T",
        "mnist line.png --images 3,7 --num 11\nmnist plane.png --images 3,7,12,20 --num 7\n"
        "mnist line.gif --images 3,7 --num 60",
    )
    add_ckpt(sub)
    sub.add_argument("out", type=Path, help=".png, .jpg or .webp a picture; .npz the arrays; .gif an animation")
    sub.add_argument("--num", type=int, default=8, metavar="N", help="images on a side, ends included (default 8)")
    sub.add_argument(
        "--images",
        type=numbers(int),
        metavar="A,B[,C,D]",
        help="of this seed: the ends of a line, or the corners of a grid by row (default 0,1)",
    )
    sub.add_argument(
        "--seeds", type=numbers(whole_seed), metavar="A,B[,C,D]", help="instead: the first image of each of these seeds"
    )
    add_request(sub, "interpolate", eta="0 deterministic, 1 as noisy as DDPM; default 0")


def _interpolate(args: argparse.Namespace) -> int:
    if args.images is not None and args.seeds is not None:
        raise ValueError("give either --images, of one seed, or --seeds, the first image of each")
    if args.images is None and args.seeds is None:
        args.images = [0, 1]
    for option, given in (("--images", args.images), ("--seeds", args.seeds)):
        if given is not None and len(given) not in (2, 4):
            raise ValueError(f"{option} takes two numbers, or four, got {len(given)}")
    check_num(args.num, 2)
    if args.images is not None and min(args.images) < 0:
        raise ValueError(f"--images are numbered from 0, got {min(args.images)}")
    request = request_of(args, "interpolate")

    from jddim import images

    ddim = load_for(args, request, {**images.SHEETS, ".npz": "the arrays", ".gif": "an animation"})

    import jax
    import numpy as np

    from jddim.editing import slerp_grid, slerp_line
    from jddim.run.batches import run
    from jddim.run.plan import Inputs, plan
    from jddim.sampling import initial_noise, sample_keys

    request = quiet(request)
    assert ddim.metadata is not None
    size, seed = ddim.metadata.sampled_size(request.image_size), request.seed
    named = [(seed, i) for i in args.images] if args.seeds is None else [(other, 0) for other in args.seeds]
    keys = jax.numpy.stack([sample_keys(jax.random.key(one), 1, i)[0] for one, i in named])
    ends = initial_noise(keys, (*size, ddim.model.config.in_channels))
    if args.out.suffix.lower() != ".gif":
        pixels = request.image_size or ddim.metadata.image_shape[:2]
        images.check_sheet(args.out, args.num ** (len(named) // 2), pixels, args.num)
    if len(named) == 2:
        x_T = slerp_line(ends[0], ends[1], args.num)
    else:
        corners = ends.reshape(2, 2, *ends.shape[1:])
        x_T = slerp_grid(corners, args.num, args.num).reshape(-1, *ends.shape[1:])
    inputs = Inputs(jax.random.key(seed), x_T=x_T, condition=condition_of(args.condition, size, len(x_T)))
    inputs = inputs._replace(classifier=classifier_of(args, request))
    planned = plan(ddim, request, inputs, batch_size=64).check("interpolate")
    x_0 = np.asarray(run(planned, batch_size=64, progress=True)[0])
    settings = settings_of(args, request, ddim, planned, "interpolate")
    match args.out.suffix.lower():
        case ".gif":
            pictures = [images.grid(image[None], border=0) for image in x_0]
            images.save_gif(args.out, pictures, settings)
        case ".npz":
            with images.atomic(args.out) as staging:
                np.savez(staging, x_0=x_0, x_T=np.asarray(x_T))
        case _:
            images.save_picture(args.out, images.grid(x_0, columns=args.num), settings)
    if args.seeds is None:
        which = f"{', '.join(map(str, args.images))} of seed {seed}"
    else:
        which = f"the first of seeds {', '.join(map(str, args.seeds))}"
    print(f"{len(x_0)} images between {which} -> {args.out}")
    return 0
