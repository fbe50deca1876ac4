"""`jddim sample`: images from a checkpoint into a file or a folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jddim import __version__
from jddim.cli.options import (
    add_ckpt,
    add_request,
    checkpoint,
    classifier_of,
    condition_of,
    decoding,
    fastest_batch_size,
    given_classifier,
    given_file,
    read_batch_size,
    request_of,
)
from jddim.config import counted

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike

    from jddim.run.batches import Preview


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "sample",
        _sample,
        "sample images from a checkpoint",
        "mnist digits.png\nmnist path.gif --num 16 --steps 50 --spacing linspace --clip\n"
        "mnist samples.npz --num 50000 --batch-size 256\n"
        "classes.ckpt 3s.png --labels 3 --guidance-scale 2 --null-label 10\n"
        "imagenet dogs.png --labels 207 --classifier clf --classifier-scale 1\n"
        "mnist exact.npy --x-T x_T.npy --noise noise.npy --eta 1",
    )
    add_ckpt(sub)
    sub.add_argument(
        "out",
        type=Path,
        help=".png, .jpg or .webp a grid; .gif trajectory; .npz arr_0 uint8 NHWC, for FID evaluators; .npy float32 "
        "NHWC in [-1, 1], exactly the sampler's result; no suffix: a folder of numbered PNGs",
    )
    sub.add_argument("--num", type=int, metavar="N", help="images (default 64, or as many as --x-T holds)")
    sub.add_argument(
        "--batch-size",
        type=read_batch_size,
        default=64,
        metavar="B",
        help="images at a time (default 64); auto: tries which is fastest and fits",
    )
    sub.add_argument(
        "--x-T", dest="x_T", type=Path, metavar="FILE.npy", help="start from this noise, (N, H, W, C) float32"
    )
    sub.add_argument(
        "--noise", type=Path, metavar="FILE.npy", help="(S, N, H, W, C) float32; row s is used in the s-th step taken"
    )
    sub.add_argument(
        "--preview",
        type=Path,
        metavar="FILE.png",
        help="what the images are going to be, drawn anew as they are made; - for the terminal",
    )
    sub.add_argument(
        "--trajectory",
        action="store_true",
        help="every step too: a picture of a row of x0_hat an image; .npz t, x_t, x0_hat; .npy x_t, (S, N, H, W, C)",
    )
    add_request(sub, "sample")


def _sample(args: argparse.Namespace) -> int:
    x_T = _load_array(args.x_T, "--x-T")
    noise = _load_array(args.noise, "--noise")
    num = args.num if args.num is not None else 64 if x_T is None else len(x_T)
    suffix = args.out.suffix.lower()
    if args.trajectory and not suffix:
        raise ValueError("--trajectory goes with one file, not with a folder of PNGs: give OUT a suffix")

    from jddim.files import atomic, write_array
    from jddim.images import FORMATS, SHEETS, check_output, check_sheet, save_images, save_picture

    check_output(args.out, overwrite=args.overwrite)
    metadata = checkpoint(args)
    height, width, channels = metadata.image_shape
    formats = {".npy": "latents are no pictures"} if args.latents and metadata.autoencoder is not None else FORMATS
    check_output(args.out, channels, formats=formats, overwrite=args.overwrite)
    in_terminal = args.preview == Path("-")
    if in_terminal and (not sys.stderr.isatty() or channels not in (1, 3)):
        why = "stderr is no terminal" if not sys.stderr.isatty() else "pictures have 1 or 3 channels"
        raise ValueError(f"--preview - draws in the terminal, but {why}; name a FILE.png, or leave it out")
    if args.preview is not None and not in_terminal:
        check_output(args.preview, channels, formats=SHEETS, overwrite=args.overwrite)

    import jax
    import numpy as np

    import jddim
    from jddim import images
    from jddim.run.batches import run
    from jddim.run.plan import Batch, Inputs, plan

    request = request_of(args, "sample")
    ddim = jddim.load(args.ckpt, dtype=request.dtype)
    if args.batch_size == "auto":
        args.batch_size = fastest_batch_size(request, ddim, num)
    key = jax.random.key(request.seed)
    size = metadata.sampled_size(request.image_size)
    condition = condition_of(args.condition, size if x_T is None else x_T.shape[1:3], num)
    files = {"x_T": given_file(args.x_T), "noise": given_file(args.noise)}
    files |= {} if condition is None else {"condition": given_file(args.condition)}
    classifier = classifier_of(args, request)
    inputs = Inputs(key, x_T=x_T, noise=noise, condition=condition, classifier=classifier)
    planned = plan(ddim, request, inputs, num, args.batch_size).check("sample")
    table, used = planned.rows, planned.sampler
    across = 12 if args.trajectory and suffix in SHEETS else None
    check_sheet(args.out, num * (across or 1), request.image_size or (height, width), across)
    keep = suffix == ".gif" or args.trajectory
    every = max(1, table.num_steps // 40) if suffix == ".gif" else 1

    def to_file(now: Preview) -> None:
        save_picture(args.preview, images.grid(planned.images(now.x0_hat)), {})

    def to_terminal(now: Preview) -> None:
        _in_terminal(planned.images(now.x0_hat))

    started = time.perf_counter()
    made, trajectory = run(
        planned,
        batch_size=args.batch_size,
        trajectory_every=every if keep else None,
        progress=True,
        on_segment=None if args.preview is None else to_terminal if in_terminal else to_file,
    )
    x_0 = np.asarray(made)
    seconds = time.perf_counter() - started

    settings = {
        "checkpoint_sha256": metadata.sha256,
        "jddim": __version__,
        "num": num,
        **request.described(used, table.num_steps, "sample"),
        **decoding(planned),
        **files,
        **given_classifier(args),
        "trajectory": args.trajectory,
    }
    if not planned.program.method.takes_eta:
        settings["eta"] = None
    if trajectory is None:
        save_images(args.out, x_0, settings)
    elif suffix == ".gif":
        first = planned.part(Batch(0, num, num)).x_T
        frames = [np.asarray(planned.images(x_t)) for x_t in (first, *trajectory.x_t)]
        save_images(args.out, x_0, settings, frames=frames)
    elif suffix in SHEETS:  # one row an image, the predicted x_0 from left to right, at most 12 columns
        columns = np.unique(np.linspace(0, len(trajectory.t) - 1, 12).round().astype(int))
        x0_hat = np.stack([np.asarray(planned.images(trajectory.x0_hat[i])) for i in columns], axis=1)
        save_picture(args.out, images.grid(x0_hat.reshape(-1, *x_0.shape[1:]), columns=len(columns)), settings)
    else:
        arrays = {name: np.asarray(value) for name, value in trajectory._asdict().items()}
        with atomic(args.out) as staging:
            if suffix == ".npz":
                np.savez(staging, allow_pickle=False, arr_0=images.to_uint8(x_0), **arrays)
            else:
                write_array(staging, arrays["x_t"])
    steps = planned.table.num_steps
    if request.steps is not None and steps != request.steps:
        print(f"note: {used.spacing} spacing makes {steps} steps of {request.steps}, as its source does")
    spacing = used.spacing
    if spacing.isdigit() and "openai_ddim" in (request.spacing, ddim.sampler.spacing):
        spacing = f"{spacing} sectioned, as no stride makes ddim{spacing}"
    how = "" if settings["eta"] is None else f", eta {settings['eta']}"
    print(
        f"{counted(num, 'image')} in {counted(table.num_steps, f'{request.method} step')} "
        f"({spacing}{how}) -> {args.out}  "
        f"[{seconds:.1f} s with compiling, {num / seconds:.1f} images/s]"
    )
    return 0


def _in_terminal(images: ArrayLike) -> None:
    from tqdm import tqdm

    from jddim.cli.terminal import blocks

    width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0 where a terminal does not know
    tqdm.write(blocks(images, width), file=sys.stderr)


def _load_array(path: Path | None, option: str) -> np.ndarray | None:
    if path is None:
        return None
    from jddim.files import read_arrays

    try:
        array = read_arrays(path)
    except ValueError as error:
        raise ValueError(f"{option} {path} is not an .npy file of numbers ({error}); numpy.save writes one") from error
    if isinstance(array, dict):
        raise ValueError(
            f"{option} {path} is an .npz archive of {', '.join(array) or 'nothing'}; save one array as .npy"
        )
    if array.ndim != {"--x-T": 4, "--noise": 5}[option]:
        wanted = {"--x-T": "(N, H, W, C)", "--noise": "(S, N, H, W, C)"}[option]
        raise ValueError(f"{option} {path} must have shape {wanted}, got {array.shape}")
    return array
