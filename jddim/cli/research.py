"""The commands of research: `jddim sweep`, `edit`, `interpolate`. What they run is in the library, in a few lines."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim.cli.options import read_labels, read_seed
from jddim.config import counted

if TYPE_CHECKING:
    from jddim.pipeline import DDIM


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "sweep",
        _sweep,
        "one x_T under many etas (and numbers of steps): a labelled grid, an atlas with costs, or the arrays",
        "mnist etas.png\nmnist atlas.html --eta 0,0.2,0.5,1 --steps 10,20,50,100 --num 12\n"
        "mnist atlas.png --steps 10,50 --eta 0,1 --num 1000 --rows-at-once 1 --reference ../shared/data/mnist\n"
        "mnist etas.npz --num 64 --rows-at-once 4",
    )
    _common(
        sub,
        "images a cell (default 8)",
        ".png a grid, of several --steps an atlas: columns S, rows eta, and what they cost; .html an atlas; .npz the "
        "arrays",
    )
    sub.add_argument(
        "--eta",
        type=_numbers(float),
        default=[i / 10 for i in range(11)],
        metavar="LIST",
        help="rows of the grid (default 0,0.1,...,1)",
    )
    sub.add_argument(
        "--steps", type=_numbers(int), metavar="LIST", help="each compiled once (default: the checkpoint's)"
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

    sub = command(
        "edit",
        _edit,
        "images made anew from given ones: all over (--strength), or where a mask is white (--mask)",
        "mnist digits.png again.png --strength 0.5\n"
        "mnist digits.png filled.png --mask white-is-new.png --steps 100 --resample 5 --jump-length 10 --eta 1",
    )
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument("images", type=Path, help="as for jddim invert: .npy, .npz, .png, or a folder of PNGs")
    sub.add_argument("out", type=Path, help="as for jddim sample: .png, .npz, .npy, or a folder")
    sub.add_argument("--strength", type=float, metavar="F", help="in (0, 1]: how far they are noised; 1 forgets them")
    sub.add_argument(
        "--mask",
        type=Path,
        metavar="FILE.png",
        help="of the checkpoint's size: black stays, white is made anew, grey is a blend",
    )
    sub.add_argument(
        "--resample", type=int, default=1, metavar="R", help="with --mask: each step R times, RePaint's (default 1)"
    )
    sub.add_argument(
        "--jump-length", type=int, default=1, metavar="J", help="with --resample: going back J steps (default 1)"
    )
    sub.add_argument("--steps", type=int, metavar="S", help="of the whole table; default: the checkpoint's")
    sub.add_argument("--eta", type=float, default=0.0, metavar="E", help="as in jddim sample; default 0")
    _sampling(sub)

    sub = command(
        "interpolate",
        _interpolate,
        "images between those of two noises, or of four, by slerp of x_T",
        "mnist line.png --images 3,7 --num 11\nmnist plane.png --images 3,7,12,20 --num 7\n"
        "mnist line.gif --images 3,7 --num 60",
    )
    _common(sub, "images on a side, ends included (default 8)")
    sub.add_argument(
        "--images",
        type=_numbers(int),
        metavar="A,B[,C,D]",
        help="of this seed: the ends of a line, or the corners of a grid by row (default 0,1)",
    )
    sub.add_argument(
        "--seeds", type=_numbers(read_seed), metavar="A,B[,C,D]", help="instead: the first image of each of these seeds"
    )
    sub.add_argument("--steps", type=int, metavar="S", help="default: the checkpoint's")


def _common(
    sub: argparse.ArgumentParser,
    num: str,
    outputs: str = ".png a picture; .npz the arrays; .gif (interpolate) an animation",
) -> None:
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument("out", type=Path, help=outputs)
    sub.add_argument("--num", type=int, default=8, metavar="N", help=num)
    _sampling(sub)


def _sampling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seed", type=read_seed, default=0, metavar="I", help="as in jddim sample; default 0")
    sub.add_argument("--spacing", metavar="NAME", help="as in jddim sample; default: the checkpoint's")
    sub.add_argument("--labels", metavar="LABELS", help="of a class-conditional model, as in jddim sample")
    sub.add_argument("--guidance-scale", type=float, metavar="W", help="as in jddim sample")
    sub.add_argument("--null-label", type=int, metavar="L", help="as in jddim sample")
    sub.add_argument("--clip", action=argparse.BooleanOptionalAction, help="as in jddim sample")


def _load(args: argparse.Namespace, formats: Sequence[str]) -> DDIM:
    """The checkpoint, once it is known that OUT can be written."""
    import jddim
    from jddim.checkpoint.folder import load_metadata
    from jddim.images import check_output

    if args.out.suffix.lower() not in formats:
        raise ValueError(f"{args.out}: end OUT in {' or '.join(filter(None, formats))}")
    check_output(args.out, load_metadata(args.ckpt).model.in_channels, formats=formats)
    ddim = jddim.load(args.ckpt)
    return ddim if args.clip is None else ddim.with_sampler(clip=args.clip)


def _edit(args: argparse.Namespace) -> int:
    if (args.strength is None) == (args.mask is None):
        raise ValueError("give either --strength, to change images all over, or --mask, to fill them in")
    if args.mask is None and (args.resample, args.jump_length) != (1, 1):
        raise ValueError("--resample and --jump-length are RePaint's: they go with --mask, not with --strength")
    ddim = _load(args, ("", ".png", ".npz", ".npy"))

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jddim.ddim import add_noise
    from jddim.editing import inpaint_loop, keep_of, tail
    from jddim.images import load_images, save_images
    from jddim.run.compiling import compiler_options, faster
    from jddim.run.problems import eta_problems
    from jddim.sampling import initial_noise, sample_keys, sample_loop

    config = ddim.model.config
    known = load_images(args.images, config.image_size)
    if known.shape[1:] != (*config.image_size, config.in_channels) or known.dtype != np.float32:
        raise ValueError(
            f"{args.images} must hold images {(*config.image_size, config.in_channels)} float32, it holds "
            f"{known.shape[1:]} {known.dtype}"
        )
    if not np.isfinite(known).all():
        raise ValueError(f"{args.images} holds a NaN or infinity")
    table = ddim.table(args.steps, args.spacing)
    if problems := eta_problems(args.eta, len(known), table):
        raise ValueError("; ".join(problems))
    keys = sample_keys(jax.random.key(args.seed), len(known))
    noise = initial_noise(keys, known.shape[1:])
    options = {"eta": args.eta, "key": keys, **ddim.conventions()}
    labels = read_labels(args.labels, len(known))
    guidance = {"guidance_scale": args.guidance_scale, "null_label": args.null_label}
    if args.mask is None:
        rest = tail(table, args.strength)
        x_t = add_noise(jnp.asarray(known), noise, rest.alpha_bar_t[0])

        def run(model: Any) -> Any:
            denoise = dataclasses.replace(ddim, model=faster(model)).denoiser(labels, **guidance)
            return sample_loop(denoise, x_t, rest, **options)

    else:
        mask = load_images(args.mask, config.image_size)
        if len(mask) != 1 or mask.shape[1:3] != config.image_size:
            raise ValueError(f"--mask {args.mask} must be one picture of {config.image_size}, got {mask.shape[:3]}")
        keep = keep_of(mask[0])

        def run(model: Any) -> Any:
            denoise = dataclasses.replace(ddim, model=faster(model)).denoiser(labels, **guidance)
            again = {"resample": args.resample, "jump_length": args.jump_length}
            return inpaint_loop(denoise, noise, table, jnp.asarray(known), keep, **again, **options)

    x_0 = np.asarray(jax.jit(run, compiler_options=compiler_options())(ddim.model))
    if not np.isfinite(x_0).all():
        raise FloatingPointError(f"a NaN or infinity appeared in image {np.argwhere(~np.isfinite(x_0))[0][0]}")
    save_images(args.out, x_0, _settings(args, ddim))
    print(f"{counted(len(x_0), 'image')} of {args.images} edited -> {args.out}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    suffix = args.out.suffix.lower()
    as_atlas = suffix == ".html" or (suffix == ".png" and args.steps is not None and len(args.steps) > 1)
    if args.reference is not None and not as_atlas:
        raise ValueError("--reference is for an atlas: OUT.html, or OUT.png of several --steps")
    _check_num(args.num, 1)
    if args.show < 1:
        raise ValueError(f"--show must be at least 1, got {args.show}")
    ddim = _load(args, (".png", ".npz", ".html"))

    import jax
    import numpy as np

    from jddim import images
    from jddim.scale import atlas
    from jddim.scale.sweeping import sweep

    steps = args.steps or [ddim.sampler.num_steps]
    tables = [ddim.table(S, args.spacing) for S in steps]  # all, before the first is run
    options: dict[str, Any] = {"rows_at_once": args.rows_at_once, "spacing": args.spacing}
    options["labels"] = read_labels(args.labels, args.num)
    options |= {"guidance_scale": args.guidance_scale, "null_label": args.null_label}
    distance, name = _distance(args, ddim)
    made: list[Any] = []
    for S, table in zip(steps, tables, strict=True):
        print(
            f"{counted(table.num_steps, 'step')}, {counted(len(args.eta), 'eta')}, {counted(args.num, 'image')} each",
            flush=True,
        )
        asked = (ddim, jax.random.key(args.seed), args.num, args.eta)
        if as_atlas:
            made.append(atlas.survey(*asked, S, distance=distance, **options))
        else:
            made.append(np.asarray(sweep(*asked, steps=S, **options)))
    drawn = {"etas": args.eta, "name": name, "show": args.show}
    match suffix:
        case ".npz":
            counts = np.array([table.num_steps for table in tables])
            with images.atomic(args.out) as staging:
                np.savez(staging, x_0=np.stack(made), eta=np.array(args.eta), steps=counts)
        case ".html":
            with images.atomic(args.out) as staging:
                staging.write_text(atlas.page(made, settings=_settings(args, ddim), **drawn))
        case _ if as_atlas:
            images.save_png(args.out, atlas.picture(made, **drawn), _settings(args, ddim))
        case _:
            picture = images.grid(made[0].reshape(-1, *made[0].shape[2:]), columns=args.num)
            labels = [f"eta {eta:g}" for eta in args.eta]
            images.save_png(args.out, images.labelled(picture, labels), _settings(args, ddim))
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

    config = ddim.model.config
    if (*config.image_size, config.in_channels) != (28, 28, 1):
        raise ValueError(
            f"--reference: {mnist_cnn.NAME} looks at images of 28x28x1, this checkpoint makes "
            f"{'x'.join(map(str, (*config.image_size, config.in_channels)))}; leave it out"
        )
    if args.num < 2:
        raise ValueError(f"--reference needs --num of at least 2, got {args.num}")
    real = metrics.Moments.of(digit_features(args.reference))
    seen = lambda x: mnist_cnn.features(from_uint8(to_uint8(x)))  # noqa: E731  # as the files would be evaluated
    far = lambda x: metrics.frechet_distance(metrics.Moments.of(seen(x)), real)  # noqa: E731
    return far, f"FD ({mnist_cnn.NAME})"


def _interpolate(args: argparse.Namespace) -> int:
    if args.images is not None and args.seeds is not None:
        raise ValueError("give either --images, of one seed, or --seeds, the first image of each")
    if args.images is None and args.seeds is None:
        args.images = [0, 1]
    for option, given in (("--images", args.images), ("--seeds", args.seeds)):
        if given is not None and len(given) not in (2, 4):
            raise ValueError(f"{option} takes two numbers, or four, got {len(given)}")
    _check_num(args.num, 2)
    if args.images is not None and min(args.images) < 0:
        raise ValueError(f"--images are numbered from 0, got {min(args.images)}")
    ddim = _load(args, (".png", ".npz", ".gif"))

    import jax
    import numpy as np

    from jddim import images
    from jddim.editing import slerp_grid, slerp_line
    from jddim.sampling import initial_noise, sample_keys

    c = ddim.model.config
    named = [(args.seed, i) for i in args.images] if args.seeds is None else [(seed, 0) for seed in args.seeds]
    keys = jax.numpy.stack([sample_keys(jax.random.key(seed), 1, i)[0] for seed, i in named])
    ends = initial_noise(keys, (*c.image_size, c.in_channels))
    if len(named) == 2:
        x_T = slerp_line(ends[0], ends[1], args.num)
    else:
        corners = ends.reshape(2, 2, *ends.shape[1:])
        x_T = slerp_grid(corners, args.num, args.num).reshape(-1, *ends.shape[1:])
    sample = {"steps": args.steps, "spacing": args.spacing, "eta": 0.0, "batch_size": 64, "progress": True}
    sample |= {"guidance_scale": args.guidance_scale, "null_label": args.null_label}
    x_0 = np.asarray(ddim.sample(x_T=x_T, labels=read_labels(args.labels, len(x_T)), **sample))
    match args.out.suffix.lower():
        case ".png":
            images.save_png(args.out, images.grid(x_0, columns=args.num), _settings(args, ddim))
        case ".gif":
            pictures = [images.to_uint8(image) for image in x_0]
            images.save_gif(args.out, pictures, _settings(args, ddim))
        case _:
            with images.atomic(args.out) as staging:
                np.savez(staging, x_0=x_0, x_T=np.asarray(x_T))
    if args.seeds is None:
        which = f"{', '.join(map(str, args.images))} of seed {args.seed}"
    else:
        which = f"the first of seeds {', '.join(map(str, args.seeds))}"
    print(f"{len(x_0)} images between {which} -> {args.out}")
    return 0


def _check_num(num: int, least: int) -> None:
    if num < least:
        raise ValueError(f"--num must be at least {least}{', both ends' if least == 2 else ''}, got {num}")


def _settings(args: argparse.Namespace, ddim: DDIM) -> dict[str, Any]:
    """What a picture says of how it was made."""
    from jddim import __version__

    assert ddim.metadata is not None
    asked = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("run", "ckpt", "out")
    }
    used = ddim.sampler
    asked |= {"steps": args.steps or used.num_steps, "spacing": args.spacing or used.spacing, "clip": used.clip}
    return {"checkpoint_sha256": ddim.metadata.sha256, "jddim": __version__, **asked}


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"takes {what} separated by commas, got {text!r}") from None

    return parse
