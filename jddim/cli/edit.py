"""`jddim edit`: images made anew from given ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jddim.cli.options import (
    add_ckpt,
    add_request,
    classifier_of,
    condition_of,
    load_for,
    quiet,
    request_of,
    settings_of,
)
from jddim.config import counted


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "edit",
        _edit,
        "change given images, all over or where a mask is white\nGive either --strength or --mask.",
        "mnist digits.png again.png --strength 0.5\n"
        "mnist digits.png filled.png --mask white-is-new.png --steps 100 --resample 5 --jump-length 10 --eta 1",
    )
    add_ckpt(sub)
    sub.add_argument("images", type=Path, help="as for jddim invert: .npy, .npz, .png, or a folder of PNGs")
    sub.add_argument("out", type=Path, help="as for jddim sample: .png, .jpg, .webp, .npz, .npy, or a folder")
    sub.add_argument(
        "--mask",
        type=Path,
        metavar="FILE.png",
        help="of the checkpoint's size: black stays, white is made anew, grey is a blend",
    )
    add_request(sub, "edit", eta="0 deterministic, 1 as noisy as DDPM; default 0")


def _edit(args: argparse.Namespace) -> int:
    request = request_of(args, "edit")
    if (request.strength is None) == (args.mask is None):
        raise ValueError("give either --strength, to change images all over, or --mask, to fill them in")
    if args.mask is None and (request.resample, request.jump_length) != (1, 1):
        raise ValueError("--resample and --jump-length are RePaint's: they go with --mask, not with --strength")

    from jddim.images import STILLS, check_sheet, load_images, save_images

    ddim = load_for(args, request, STILLS)

    import jax
    import numpy as np

    from jddim.run.batches import run
    from jddim.run.plan import Inputs, plan

    assert ddim.metadata is not None
    request, shape = quiet(request), ddim.metadata.image_shape
    known = load_images(args.images, shape[:2])
    if known.shape[1:] != shape or known.dtype != np.float32:
        raise ValueError(f"{args.images} must hold images {shape} float32, it holds {known.shape[1:]} {known.dtype}")
    if not np.isfinite(known).all():
        raise ValueError(f"{args.images} holds a NaN or infinity")
    check_sheet(args.out, len(known), shape[:2])
    mask = None
    if args.mask is not None:
        masks = load_images(args.mask, shape[:2])
        if len(masks) != 1 or masks.shape[1:3] != shape[:2]:
            raise ValueError(f"--mask {args.mask} must be one picture of {shape[:2]}, got {masks.shape[:3]}")
        mask = masks[0]
    condition = condition_of(args.condition, ddim.metadata.sampled_size(), len(known))
    inputs = Inputs(jax.random.key(request.seed), images=known, mask=mask, condition=condition)
    inputs = inputs._replace(classifier=classifier_of(args, request))
    planned = plan(ddim, request, inputs).check("edit")
    x_0 = np.asarray(run(planned, progress=True)[0])
    save_images(args.out, x_0, settings_of(args, request, ddim, planned, "edit"))
    print(f"{counted(len(x_0), 'image')} of {args.images} edited -> {args.out}")
    return 0
