"""`jddim invert`: images to the x_T that DDIM samples them from, and back if asked."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jddim import __version__
from jddim.cli.options import SPACING_NAMES, fastest_batch_size, read_batch_size, read_labels
from jddim.config import counted


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "invert",
        _invert,
        "the x_T that the deterministic sampler leads from to given images (DDIM inversion)",
        "mnist digits.npy x_T.npy\nmnist grid.png x_T.npy --steps 100 --reconstruct again.png\n"
        "mnist folder x_T.npy --refine 5 --steps 20",
    )
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument(
        "images",
        type=Path,
        help=".npy (N, H, W, C) float32 in [-1, 1]; .npz arr_0, uint8; .png, one image of the checkpoint's size or a "
        "grid as jddim sample draws it; a folder of such PNGs, one image each",
    )
    sub.add_argument("out", type=Path, metavar="OUT.npy", help="x_T, float32, for jddim sample --x-T OUT.npy --eta 0")
    sub.add_argument("--steps", type=int, metavar="S", help="default: the checkpoint's; take the same for sampling")
    sub.add_argument("--spacing", metavar="NAME", help=f"{SPACING_NAMES}; default: the checkpoint's")
    sub.add_argument(
        "--convention",
        default="diffusers",
        metavar="NAME",
        help="where each step asks the network: diffusers, at the t it reaches (default); paper, at the t it leaves; "
        "openai, that too, from t = 0 on and one step beyond the last",
    )
    sub.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="K",
        help="K more evaluations a step, which solve for the x_T that sampling leads back from (default 0)",
    )
    sub.add_argument("--reconstruct", type=Path, metavar="FILE", help="sample x_T again into FILE, print the errors")
    sub.add_argument("--clip", action=argparse.BooleanOptionalAction, help="clamp x0; default: the checkpoint's")
    sub.add_argument("--labels", metavar="LABELS", help="of a class-conditional model, as for jddim sample")
    sub.add_argument("--guidance-scale", type=float, metavar="W", help="as for jddim sample")
    sub.add_argument("--null-label", type=int, metavar="N", help="as for jddim sample")
    sub.add_argument(
        "--batch-size", type=read_batch_size, default=64, metavar="B", help="images at a time (default 64), or auto"
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network's computation")
    sub.add_argument("--eta", type=float, default=0.0, help=argparse.SUPPRESS)  # to be refused with the reason


def _invert(args: argparse.Namespace) -> int:
    from jddim.checkpoint.folder import load_metadata
    from jddim.images import check_output, load_images, save_images

    metadata = load_metadata(args.ckpt)
    if args.out.suffix.lower() != ".npy":
        raise ValueError(f"{args.out}: x_T is written as .npy, exactly; end OUT in .npy")
    check_output(args.out, metadata.model.in_channels)
    if args.reconstruct is not None:
        if args.reconstruct.suffix.lower() == ".gif":
            raise ValueError(f"--reconstruct {args.reconstruct}: end it in .png, .npz, .npy, or name a folder")
        if args.reconstruct.absolute() == args.out.absolute():
            raise ValueError(f"--reconstruct {args.reconstruct} is OUT as well: name two files")
        check_output(args.reconstruct, metadata.model.in_channels)
    images = load_images(args.images, metadata.model.image_size)

    import numpy as np

    import jddim
    from jddim.inversion import reconstruction_error

    ddim = jddim.load(args.ckpt, dtype=args.dtype)
    if args.batch_size == "auto":
        args.batch_size = fastest_batch_size(args, ddim, len(images))
    how: dict[str, Any] = {
        "steps": args.steps,
        "spacing": args.spacing,
        "clip": args.clip,
        "labels": read_labels(args.labels, len(images)),
        "guidance_scale": args.guidance_scale,
        "null_label": args.null_label,
        "batch_size": args.batch_size,
        "progress": True,
    }
    started = time.perf_counter()
    x_T = ddim.invert(images, convention=args.convention, refine=args.refine, eta=args.eta, **how)
    seconds = time.perf_counter() - started
    again = None if args.reconstruct is None else np.asarray(ddim.sample(x_T=x_T, eta=0.0, **how))

    save_images(args.out, np.asarray(x_T), {})
    steps = ddim.table(args.steps, args.spacing).num_steps
    print(
        f"{counted(len(images), 'image')} in {counted(steps, 'step')} "
        f"({args.spacing or ddim.sampler.spacing}, {args.convention}, refine {args.refine}) -> {args.out}  "
        f"[{seconds:.1f} s with compiling]"
    )
    if again is not None:
        sampler = dataclasses.asdict(ddim.sampler) | {"num_steps": steps, "eta": 0.0}
        asked = {"spacing": args.spacing, "clip": args.clip, "labels": args.labels, "dtype": args.dtype}
        settings = {
            "checkpoint_sha256": metadata.sha256,
            "jddim": __version__,
            "inverted": args.images.name,
            "convention": args.convention,
            "refine": args.refine,
            **sampler,
            **{name: value for name, value in asked.items() if value is not None},
            "guidance_scale": args.guidance_scale,
            "null_label": args.null_label,
        }
        save_images(args.reconstruct, again, settings)
        errors = np.asarray(reconstruction_error(images, again))
        print("image  mean squared error, of pixels in [0, 1]")
        for i, error in enumerate(errors):
            print(f"{i:>5}  {error:.3e}")
        print(f" mean  {errors.mean():.3e} -> {args.reconstruct}")
    return 0
