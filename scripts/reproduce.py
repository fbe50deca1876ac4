"""The DDIM paper (arXiv:2010.02502) on MNIST: its Tables 1 and 2 and its figures, from the shipped checkpoint.

Run by scripts/reproduce, which makes the environment. Samples are made a batch at a time, and each batch is a file
named by a hash of the checkpoint and of everything that it was made with: kill the script anywhere, run it again with
the same or with larger sizes, and what is there is kept. Writes OUT/results.md, tables and all, and the pictures
beside it.

Examples:
  scripts/reproduce                     # the default size
  scripts/reproduce --dry-run           # how much is to be made, and how much is there already
  scripts/reproduce --num 1000          # more images a cell; those of the default are kept
  scripts/reproduce --full              # 10,000 images a cell, every eta at every S

"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim.cli.options import OneLineParser

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "scripts" / "assets" / "mnist-ddpm" / "ckpt.pth"
ETAS = ("0", "0.2", "0.5", "1", "sigma-hat")
SPACINGS = ("uniform", "quad")
LONG = 1000  # S from which --num-long counts
KEPT = 12  # images a row of the pictures
BETWEEN = 11  # images a row of the interpolation
SIDE = 2 * 28  # pixels that a digit has in them


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of Table 1. eta: a number, or "sigma-hat", DDPM's larger variance. num: images that count."""

    spacing: str
    steps: int
    eta: str
    num: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """A file's worth of a cell: images start..start+size-1 of the seed. Everything that decides them is a field."""

    spacing: str
    steps: int
    eta: str
    start: int
    size: int
    seed: int


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Table 1's cells, the cheap ones first."""
    cells = []
    for S in sorted(args.steps):
        for spacing in SPACINGS:
            etas = args.quad_etas if spacing == "quad" else args.etas
            if S >= LONG:
                etas = [eta for eta in args.long_etas if spacing == "uniform" or args.full]
            cells += [Cell(spacing, S, eta, args.num_long if S >= LONG else args.num) for eta in etas]
    return cells


def batches_of(cell: Cell, size: int, seed: int) -> Iterator[Batch]:
    for start in range(0, cell.num, size):
        yield Batch(cell.spacing, cell.steps, cell.eta, start, size, seed)


class Store:
    """Results as files of OUT/cells, each named by what it is of, written whole or not at all."""

    def __init__(self, folder: Path, checkpoint: str) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def path(self, kind: str, settings: dict[str, Any], suffix: str) -> Path:
        """Where a result with these settings is kept."""
        said = json.dumps({"kind": kind, "checkpoint": self.checkpoint, **settings}, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(said.encode()).hexdigest()[:20]}{suffix}"

    def arrays(self, kind: str, settings: dict[str, Any]) -> Path:
        return self.path(kind, settings, ".npz")


class Clock:
    """Progress: lines with the time left, from the work since the start, counted in evaluations of the network."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.started, self.seconds = total, 0.0, time.perf_counter(), 0.0

    def add(self, work: float, seconds: float, what: str) -> None:
        self.done, self.seconds = self.done + work, self.seconds + seconds
        left = self.seconds / self.done * (self.total - self.done)
        print(f"[{self.done / self.total:4.0%}] {what}  {seconds:.1f} s, about {minutes(left)} left", flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def sample(ddim: Any, eta: str, **options: Any) -> NDArray[np.float32]:
    """Images by the paper's samplers: eta a number (Eq. 16), or sigma-hat, whose mean is that of eta 1."""
    if eta == "sigma-hat":
        return np.asarray(ddim.with_sampler(variance="fixed_large").sample(method="ddpm", **options))
    return np.asarray(ddim.sample(eta=float(eta), **options))


def make_batch(ddim: Any, batch: Batch) -> dict[str, NDArray[Any]]:
    """The batch's images as bytes, and how long they took."""
    import jax

    start = time.perf_counter()
    x_0 = sample(
        ddim,
        batch.eta,
        key=jax.random.key(batch.seed),
        num=batch.size,
        start=batch.start,
        steps=batch.steps,
        spacing=batch.spacing,
    )
    seconds = time.perf_counter() - start
    from jddim.images import to_uint8

    return {"images": to_uint8(x_0), "seconds": np.float64(seconds)}


def make_reconstruction(ddim: Any, images: NDArray[np.float32], steps: int) -> dict[str, NDArray[Any]]:
    """Each image's error, x_0 to x_T to x_0 in S steps each way."""
    from jddim.inversion import reconstruction_error

    options = {"steps": steps, "spacing": "uniform", "eta": 0.0}
    x_T = ddim.invert(images, **options)
    again = ddim.sample(x_T=x_T, **options)
    return {"errors": np.asarray(reconstruction_error(images, again)), "again": np.asarray(again)}


def make_interpolation(ddim: Any, steps: int, seed: int) -> dict[str, NDArray[Any]]:
    """Rows of images between those of neighbouring x_T, by slerp."""
    import jax
    import jax.numpy as jnp

    from jddim.editing import slerp_line
    from jddim.sampling import initial_noise, sample_keys

    config = ddim.model.config
    x_T = initial_noise(sample_keys(jax.random.key(seed), 6), (*config.image_size, config.in_channels))
    lines = jnp.concatenate([slerp_line(x_T[i], x_T[i + 1], BETWEEN) for i in (0, 2, 4)])
    return {"images": sample(ddim, "0", x_T=lines, steps=steps, spacing="uniform")}


def keep(path: Path, make: Any) -> bool:
    """Whether the file had to be made."""
    from jddim.files import atomic

    if path.exists():
        return False
    made = make()
    with atomic(path) as staging:
        np.savez(staging, **made)
    return True


def read(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def load_or_convert(ckpt: Path | None, out: Path) -> Any:
    """--ckpt, or the shipped checkpoint, converted into OUT/mnist unless it is there."""
    import jddim

    path = ckpt or out / "mnist"
    if ckpt is None and not path.exists():
        print(f"converting {SOURCE.relative_to(ROOT)}", flush=True)
        jddim.convert(SOURCE, path)
    return jddim.load(path)


def table_1(cells: list[Cell], images: dict[Cell, NDArray[np.uint8]], real: NDArray[Any]) -> list[str]:
    """FD and KD by S and eta, as Markdown, a table a spacing."""
    from jddim.evaluate import metrics, mnist_cnn
    from jddim.images import from_uint8

    moments = metrics.Moments.of(real)
    fewest = min(cell.num for cell in cells)
    found = {}
    for cell in cells:
        made = mnist_cnn.features(from_uint8(images[cell][: cell.num]))
        kernel, _ = metrics.kernel_distance(made, real)
        fd = {n: metrics.frechet_distance(metrics.Moments.of(made[:n]), moments) for n in {cell.num, fewest}}
        found[cell.spacing, cell.steps, cell.eta] = (cell.num, fd, kernel)
    lines = []
    counts = sorted({cell.num for cell in cells}, reverse=True)  # the larger, and the one that all cells have
    for spacing in SPACINGS:
        of = {(S, eta): value for (where, S, eta), value in found.items() if where == spacing}
        if not of:
            continue
        steps, etas = sorted({S for S, _ in of}), [eta for eta in ETAS if any(e == eta for _, e in of)]

        def rows(entry: Any, of: Any = of, steps: Any = steps, etas: Any = etas) -> list[str]:
            head = [f"| eta | {' | '.join(f'S = {S}' for S in steps)} |", "|---|" + "---:|" * len(steps)]
            return head + [
                f"| {eta} | {' | '.join(entry(of[S, eta]) if (S, eta) in of else '' for S in steps)} |" for eta in etas
            ]

        for n in counts:
            shown = lambda value, n=n: f"{value[1][n]:.2f}" if n in value[1] else ""  # noqa: E731
            lines += [f"`{spacing}`, FD ({mnist_cnn.NAME}) of {n} images:", "", *rows(shown), ""]
        lines += [f"`{spacing}`, KD ({mnist_cnn.NAME}), unbiased whatever the number of images:", ""]
        lines += [*rows(lambda value: f"{value[2]:.4g}"), ""]
    return lines


def floor(data: Path, cells: list[Cell], real: NDArray[Any]) -> str:
    """Mean and deviation of the FD of as many real images as each cell has."""
    from jddim.evaluate import metrics, mnist_cnn

    features = mnist_cnn.features(mnist_cnn.read_mnist(data, "t10k")[0])
    moments, said = metrics.Moments.of(real), []
    for n in sorted({cell.num for cell in cells}, reverse=True):
        parts = [features[i : i + n] for i in range(0, len(features) - n + 1, n)][:20]
        if n < 2 or not parts:
            continue
        fd = [metrics.frechet_distance(metrics.Moments.of(part), moments) for part in parts]
        said.append(f"{np.mean(fd):.2f} +- {np.std(fd):.2f} ({n} images)")
    return ", ".join(said) or "no meaning: too few"


def draw(out: Path, cells: list[Cell], images: dict[Cell, NDArray[np.uint8]], between: NDArray[np.float32]) -> None:
    """samples.png, consistency.png, interpolation.png."""
    from jddim.images import from_uint8, grid, labelled, save_picture

    def sheet(name: str, rows: list[tuple[str, NDArray[np.float32]]]) -> None:
        columns = min(len(row) for _, row in rows)
        picture = grid(np.concatenate([row[:columns] for _, row in rows]), columns=columns, side=SIDE)
        save_picture(out / name, labelled(picture, [label for label, _ in rows]), {})

    uniform = [cell for cell in cells if cell.spacing == "uniform"]
    row = lambda cell: from_uint8(images[cell][:KEPT])  # noqa: E731
    sheet("samples.png", [(f"S {c.steps}, {named(c.eta)}", row(c)) for c in uniform if c.eta != "0.2"])
    if same := [cell for cell in uniform if cell.eta == "0"]:
        sheet("consistency.png", [(f"S {cell.steps}", row(cell)) for cell in same])
    lines = np.split(between, len(between) // BETWEEN)
    save_picture(out / "interpolation.png", grid(np.concatenate(lines), columns=BETWEEN, side=SIDE), {})


def named(eta: str) -> str:
    return eta if eta == "sigma-hat" else f"eta {eta}"


def plot_seconds(path: Path, seconds: dict[int, float]) -> bool:
    """Seconds an image by S, on logarithmic axes; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jddim.files import atomic

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.loglog(list(seconds), list(seconds.values()), "o-")
    axes.set(xlabel="S", ylabel="seconds an image", title="time by the number of steps")
    axes.grid(alpha=0.3, which="both")
    with atomic(path) as staging:
        figure.savefig(staging, dpi=120)
    plt.close(figure)
    return True


def write_results(args: argparse.Namespace, cells: list[Cell], store: Store, *, clip: bool) -> None:
    """OUT/results.md and the pictures, from the files alone."""
    from jddim.evaluate import mnist_cnn
    from jddim.files import atomic

    images, seconds = {}, {}
    for cell in cells:
        found = [
            read(store.arrays("batch", dataclasses.asdict(b))) for b in batches_of(cell, args.batch_size, args.seed)
        ]
        images[cell] = np.concatenate([part["images"] for part in found])
        # The first batch of a program compiles it, so the quickest tells.
        per_image = min(float(part["seconds"]) for part in found) / args.batch_size
        if cell.spacing == "uniform" and cell.eta == "0":
            seconds[cell.steps] = per_image
    between = read(store.arrays("interpolation", interpolation(args)))["images"]
    draw(args.out, cells, images, between)
    drawn = plot_seconds(args.out / "seconds.png", seconds)
    errors = {S: read(store.arrays("reconstruction", reconstruction(args, S)))["errors"] for S in args.table2_steps}

    real = reference(args.data, store)
    command = shlex.join(["scripts/reproduce", *args.given])
    lines = [
        "# The DDIM paper's tables on MNIST",
        "",
        f"Made by `{command}` from the checkpoint {store.checkpoint[:16]}, seed {args.seed}; x0 is "
        f"{'' if clip else 'not '}clipped, as the checkpoint has it. {args.num} images a cell, {args.num_long} from "
        f"S = {LONG} on. FD is of features {mnist_cnn.NAME} against MNIST's {len(real):,} training images; it falls "
        "with the number of images: compare it within a table only.",
        "",
        "## Table 1",
        "",
        *table_1(cells, images, real),
        f"MNIST's own test images, as many at a time, have an FD of {floor(args.data, cells, real)}: less is chance.",
        "",
        "## Table 2",
        "",
        f"Mean squared error, pixels in [0, 1], of {args.table2_num} test digits after x_0 to x_T to x_0 in S steps "
        "each way.",
        "",
        f"| S | {' | '.join(map(str, errors))} |",
        "|---|" + "---:|" * len(errors),
        f"| error | {' | '.join(f'{error.mean():.2e}' for error in errors.values())} |",
        "",
        "## Figures",
        "",
        "Samples by S and eta, each column one x_T:",
        "",
        "![](samples.png)",
        "",
        *(["The same x_T at every S, eta 0:", "", "![](consistency.png)", ""] if seconds else []),
        f"Between two x_T by slerp, {args.interpolation_steps} steps:",
        "",
        "![](interpolation.png)",
        "",
        "## Time",
        "",
        f"Seconds an image, eta 0, `uniform`, batches of {args.batch_size}, the quickest of each:",
        "",
        f"| S | {' | '.join(map(str, seconds))} |",
        "|---|" + "---:|" * len(seconds),
        f"| seconds | {' | '.join(f'{value:.3g}' for value in seconds.values())} |",
        "",
        *(["![](seconds.png)", ""] if drawn else []),
    ]
    with atomic(args.out / "results.md") as staging:
        staging.write_text("\n".join(lines))


def reference(data: Path, store: Store) -> NDArray[Any]:
    """The features of MNIST's training images, kept."""
    from jddim.evaluate import mnist_cnn

    images, _ = mnist_cnn.read_mnist(data, "train")
    path = store.arrays("reference", {"images": hashlib.sha256(images.tobytes()).hexdigest(), "by": mnist_cnn.NAME})
    keep(path, lambda: {"features": mnist_cnn.features(images)})
    return read(path)["features"]


def reconstruction(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    return {"steps": steps, "images": args.digits}


def interpolation(args: argparse.Namespace) -> dict[str, Any]:
    return {"steps": args.interpolation_steps, "seed": args.seed}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def etas(text: str) -> list[str]:
    given = text.split(",")
    for eta in given:
        if eta not in ETAS:
            raise argparse.ArgumentTypeError(f"takes of {', '.join(ETAS)}, got {eta!r}")
    return given


def parse(argv: list[str]) -> argparse.Namespace:
    first, _, examples = (__doc__ or "").partition("Examples:\n")
    parser = OneLineParser(
        prog="scripts/reproduce",
        description=first.strip(),
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "out" / "reproduce", metavar="DIR", help="default out/reproduce")
    add(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "mnist", metavar="DIR", help="MNIST's four files"
    )
    add("--ckpt", type=Path, metavar="DIR", help="a converted checkpoint (default: the shipped one, converted)")
    add("--steps", type=numbers, default=[10, 20, 50, 100, 1000], metavar="LIST", help="S of Table 1")
    add("--etas", type=etas, default=list(ETAS), metavar="LIST", help="of the spacing uniform (default all five)")
    add("--quad-etas", type=etas, default=["0", "1"], metavar="LIST", help="of the spacing quad (default 0,1)")
    add("--long-etas", type=etas, default=["0", "sigma-hat"], metavar="LIST", help="from S = 1000 on, uniform alone")
    add("--num", type=int, default=160, metavar="N", help="images a cell of Table 1 (default 160)")
    add("--num-long", type=int, default=32, metavar="N", help="from S = 1000 on (default 32)")
    add("--batch-size", type=int, default=32, metavar="N", help="images a file (default 32)")
    add("--table2-steps", type=numbers, default=[10, 20, 50, 100, 200, 500, 1000], metavar="LIST", help="S of Table 2")
    add("--table2-num", type=int, default=8, metavar="N", help="digits of Table 2 (default 8)")
    add("--interpolation-steps", type=int, default=50, metavar="S", help="default 50")
    add("--seed", type=int, default=0, metavar="I", help="default 0")
    add("--full", action="store_true", help="10,000 images a cell, every eta at every S and spacing")
    add("--dry-run", action="store_true", help="say what is to be made, and convert the checkpoint, no more")
    args = parser.parse_args(argv)
    args.given = argv
    if args.full:
        args.num = args.num_long = 10_000
        args.quad_etas = args.long_etas = args.etas
    least = {"--num": args.num, "--num-long": args.num_long}
    wrong = [f"{name} must be at least 2, got {value}" for name, value in least.items() if value < 2]
    rest = {"--batch-size": args.batch_size, "--table2-num": args.table2_num}
    wrong += [f"{name} must be at least 1, got {value}" for name, value in rest.items() if value < 1]
    if wrong:
        parser.error("; ".join(wrong))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if not any((args.data / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz")):
        raise ValueError(f"{args.data} does not hold train-images-idx3-ubyte (or .gz): name MNIST's folder with --data")
    cells = cells_of(args)
    args.out.mkdir(parents=True, exist_ok=True)

    import jax

    from jddim.evaluate import mnist_cnn

    # The next run, or the rest of this one, finds the programs compiled.
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    ddim = load_or_convert(args.ckpt, args.out)
    store = Store(args.out / "cells", ddim.metadata.sha256)
    digits = mnist_cnn.read_mnist(args.data, "t10k")[0][: args.table2_num]
    args.digits = hashlib.sha256(digits.tobytes()).hexdigest()

    # (work in evaluations of the network, file, what it is, how to make it)
    tasks: list[tuple[float, Path, str, Any]] = []
    for cell in cells:
        for batch in batches_of(cell, args.batch_size, args.seed):
            what = (
                f"{cell.spacing} S {cell.steps} {named(cell.eta)} images {batch.start}..{batch.start + batch.size - 1}"
            )
            path = store.arrays("batch", dataclasses.asdict(batch))
            tasks.append((cell.steps * batch.size, path, what, lambda batch=batch: make_batch(ddim, batch)))
    for S in args.table2_steps:
        path = store.arrays("reconstruction", reconstruction(args, S))
        what = f"reconstruction S {S}"
        tasks.append((2 * S * args.table2_num, path, what, lambda S=S: make_reconstruction(ddim, digits, S)))
    path = store.arrays("interpolation", interpolation(args))
    S, seed = args.interpolation_steps, args.seed
    tasks.append((S * 3 * BETWEEN, path, f"interpolation S {S}", lambda: make_interpolation(ddim, S, seed)))

    todo = [task for task in tasks if not task[1].exists()]
    work = sum(task[0] for task in todo)
    print(
        f"{len(cells)} cells of Table 1, {len(tasks)} files in all, {len(tasks) - len(todo)} of them there already; "
        f"{work:,.0f} evaluations of the network to go (at 10 ms each, {minutes(work / 100)})",
        flush=True,
    )
    if args.dry_run:
        return 0
    clock = Clock(work)
    for size, path, what, make in todo:
        started = time.perf_counter()
        keep(path, make)
        clock.add(size, time.perf_counter() - started, what)
    write_results(args, cells, store, clip=ddim.sampler.clip)
    print(f"wrote {args.out / 'results.md'} and the pictures beside it")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
