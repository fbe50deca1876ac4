"""`jddim invert`: images to the x_T that DDIM samples them from, and back if asked."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jddim import __version__
from jddim.cli.options import (
    add_ckpt,
    add_json,
    add_request,
    checkpoint,
    classifier_of,
    condition_of,
    decoding,
    fastest_batch_size,
    given_classifier,
    given_file,
    print_json,
    read_batch_size,
    request_of,
)
from jddim.config import counted


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "invert",
        _invert,
        "find the x_T from which DDIM samples given images",
        "mnist digits.npy x_T.npy\nmnist grid.png x_T.npy --steps 100 --reconstruct again.png\n"
        "mnist folder x_T.npy --refine 5 --steps 20",
    )
    add_ckpt(sub)
    sub.add_argument(
        "images",
        type=Path,
        help=".npy (N, H, W, C) float32 in [-1, 1]; .npz arr_0, uint8; .png, one image of the checkpoint's size or a "
        "grid as jddim sample draws it; a folder of such PNGs, one image each",
    )
    sub.add_argument("out", type=Path, metavar="OUT.npy", help="x_T, float32, for jddim sample --x-T OUT.npy --eta 0")
    sub.add_argument("--reconstruct", type=Path, metavar="FILE", help="sample x_T again into FILE, print the errors")
    sub.add_argument(
        "--batch-size", type=read_batch_size, default=64, metavar="B", help="images at a time (default 64), or auto"
    )
    add_json(sub)
    add_request(sub, "invert")


def _invert(args: argparse.Namespace) -> int:
    from jddim.images import STILLS, check_output, check_sheet, load_images, save_images

    check_output(args.out, formats={".npy": "x_T, exactly"}, overwrite=args.overwrite)
    metadata = checkpoint(args)
    overwrite = args.overwrite
    check_output(args.out, metadata.model.in_channels, formats={".npy": "x_T, exactly"}, overwrite=overwrite)
    if args.reconstruct is not None:
        if args.reconstruct.absolute() == args.out.absolute():
            raise ValueError(f"--reconstruct {args.reconstruct} is OUT as well: name two files")
        check_output(args.reconstruct, metadata.image_shape[2], formats=STILLS, overwrite=overwrite)
    images = load_images(args.images, metadata.image_shape[:2])
    if args.reconstruct is not None:
        check_sheet(args.reconstruct, len(images), images.shape[1:3])

    import numpy as np

    import jddim
    from jddim.inversion import reconstruction_error
    from jddim.run.batches import run
    from jddim.run.plan import Inputs, plan

    request = request_of(args, "invert")
    ddim = jddim.load(args.ckpt, dtype=request.dtype)
    if args.batch_size == "auto":
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            args.batch_size = fastest_batch_size(request, ddim, len(images))
    condition = condition_of(args.condition, metadata.sampled_size(images.shape[1:3]), len(images))
    beside = Inputs(condition=condition, classifier=classifier_of(args, request))
    up = plan(ddim, request, beside._replace(images=images), batch_size=args.batch_size).check("invert")
    started = time.perf_counter()
    x_T, _ = run(up, batch_size=args.batch_size, progress=True)
    seconds = time.perf_counter() - started
    again = None
    if args.reconstruct is not None:
        back = dataclasses.replace(request, eta=0.0)
        down = plan(ddim, back, beside._replace(x_T=x_T), batch_size=args.batch_size)
        again = np.asarray(run(down.check("sample"), batch_size=args.batch_size, progress=True)[0])

    save_images(args.out, np.asarray(x_T), {})
    steps = up.table.num_steps
    found: dict[str, Any] = {"x_T": str(args.out), "images": len(images), "steps": steps, "seconds": seconds}
    if not args.json:
        how = f"{up.sampler.spacing}, {request.convention}, refine {request.refine}"
        done = f"{counted(len(images), 'image')} in {counted(steps, 'step')}"
        print(f"{done} ({how}) -> {args.out}  [{seconds:.1f} s with compiling]")
    if again is not None:
        settings = {
            "checkpoint_sha256": metadata.sha256,
            "jddim": __version__,
            "inverted": args.images.name,
            **({"condition": given_file(args.condition)} if args.condition else {}),
            **given_classifier(args),
            **request.described(up.sampler, steps, "invert"),
            **decoding(down),
            "eta": 0.0,
        }
        save_images(args.reconstruct, again, settings)
        errors = np.asarray(reconstruction_error(images, again))
        found |= {"reconstructed": str(args.reconstruct), "errors": errors.tolist(), "mean_error": float(errors.mean())}
        if not args.json:
            print("image  mean squared error, of pixels in [0, 1]")
            for i, error in enumerate(errors):
                print(f"{i:>5}  {error:.3e}")
            print(f" mean  {errors.mean():.3e} -> {args.reconstruct}")
    if args.json:
        print_json(found)
    return 0
