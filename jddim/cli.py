"""The command line: parses, calls, reports. jax and torch are imported only by the commands that need them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jddim import (
    __version__,
    cli_bulk,
    cli_doctor,
    cli_evaluate,
    cli_export,
    cli_invert,
    cli_research,
    cli_serve,
    cli_train,
    interrupt,
)
from jddim.config import METHODS, PREDICTION_TYPES, VARIANCES, counted

if TYPE_CHECKING:
    import numpy as np

    from jddim.pipeline import Preview

SPACING_NAMES = "linspace, uniform, quad, leading, trailing, linspace_diffusers, openai, ddimN or N,N,..."
PLOTS = (".png", ".svg", ".pdf")
EXAMPLES = """\
examples:
  jddim convert ckpt.pth mnist                      ermongroup's ckpt.pth; config.yml is found beside it
  jddim convert model-790000.ckpt cifar10 --set image_size=32
  jddim sample mnist digits.png                     64 images in a grid
  jddim sample mnist digits.npz --num 50000 --batch-size 256 --steps 50 --seed 1
  jddim bulk mnist fifty --num 50000                in shards, and goes on where it was stopped
  jddim sample mnist path.gif --num 16 --eta 0.5    the way from noise to image
  jddim invert mnist digits.png x_T.npy             images to the noise that they are sampled from
  jddim schedule --spacing quad --steps 20          the table of steps, for any spacing
  jddim info ckpt.pth                               what a file is, and how to convert it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. A user's mistake is one line on stderr and status 1 (2: bad options)."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or interrupt.heard():
            print(interrupt.MESSAGE, file=sys.stderr)
            return interrupt.status()
        mistakes = (ValueError, OSError, ArithmeticError, MemoryError, ModuleNotFoundError)
        if os.environ.get("JDDIM_DEBUG") or not isinstance(error, mistakes):
            raise
        print(f"jddim: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _convert(args: argparse.Namespace) -> int:
    convert = _convert_module()
    convert.convert(
        args.src,
        args.dst,
        config=args.config,
        settings=_settings(args.set),
        preset=args.preset,
        weights=args.weights,
        variant=args.variant,
        revision=args.revision,
        license=args.license,
        verify=args.verify,
        overwrite=args.overwrite,
        say=_say,
    )
    return 0


def _export_torch(args: argparse.Namespace) -> int:
    _convert_module()
    from convert.export import export

    name = export(args.ckpt, args.dst, args.format, overwrite=args.overwrite)
    print(f"wrote {args.dst} ({name})")
    return 0


def _sample(args: argparse.Namespace) -> int:
    x_T = _load_array(args.x_T, "--x-T")
    noise = _load_array(args.noise, "--noise")
    num = args.num if args.num is not None else 64 if x_T is None else len(x_T)
    suffix = args.out.suffix.lower()
    if args.trajectory and suffix not in (".png", ".gif", ".npz", ".npy"):
        raise ValueError("--trajectory goes with OUT ending in .png, .gif, .npz or .npy")

    from jddim.checkpoint import load_metadata
    from jddim.images import atomic, check_output, save_images, save_png

    metadata = load_metadata(args.ckpt)
    check_output(args.out, metadata.model.in_channels)
    in_terminal = args.preview == Path("-")
    if in_terminal and (not sys.stderr.isatty() or metadata.model.in_channels not in (1, 3)):
        why = "stderr is no terminal" if not sys.stderr.isatty() else "pictures have 1 or 3 channels"
        raise ValueError(f"--preview - draws in the terminal, but {why}; name a FILE.png, or leave it out")
    if args.preview is not None and not in_terminal:
        if args.preview.suffix.lower() != ".png":
            raise ValueError(f"--preview {args.preview}: end it in .png, or give - for the terminal")
        check_output(args.preview, metadata.model.in_channels)

    import jax
    import numpy as np

    import jddim
    from jddim import images
    from jddim.batch_size import best_batch_size

    asked = {
        "spacing": args.spacing,
        "steps_offset": args.steps_offset,
        "set_alpha_to_one": args.set_alpha_to_one,
        "clip": args.clip,
        "clip_range": None if args.clip_range is None else tuple(args.clip_range),
        "threshold_ratio": None if args.threshold is None else args.threshold[0],
        "threshold_max": None if args.threshold is None else args.threshold[1],
        "rederive_eps": args.rederive_eps,
        "variance": args.variance,
        "prediction_type": args.prediction_type,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    ddim = jddim.load(args.ckpt, dtype=args.dtype).with_sampler(**asked)
    if args.clip_range is not None and not ddim.sampler.clip:
        raise ValueError(
            "--clip-range without --clip: this checkpoint's x0 is not clipped; add --clip, or leave it out"
        )
    if args.batch_size == "auto":
        args.batch_size = best_batch_size(ddim, num, evaluations=1 + (args.guidance_scale is not None), say=_say)
    table = ddim.table(args.steps)
    keep = suffix == ".gif" or args.trajectory
    every = max(1, table.num_steps // 40) if suffix == ".gif" else 1

    def to_file(now: Preview) -> None:
        save_png(args.preview, images.grid(now.x0_hat), {})

    started = time.perf_counter()
    result = ddim.sample(
        jax.random.key(args.seed),
        num,
        method=args.method,
        steps=args.steps,
        eta=args.eta,
        labels=_labels(args.labels, num),
        guidance_scale=args.guidance_scale,
        null_label=args.null_label,
        x_T=x_T,
        noise=noise,
        batch_size=args.batch_size,
        trajectory_every=every if keep else None,
        progress=True,
        on_segment=None if args.preview is None else _in_terminal if in_terminal else to_file,
    )
    x_0, trajectory = result if keep else (result, None)
    x_0 = np.asarray(x_0)
    seconds = time.perf_counter() - started

    eta = None if args.method != "ddim" else ddim.sampler.eta if args.eta is None else args.eta
    settings = {
        "checkpoint_sha256": metadata.sha256,
        "jddim": __version__,
        "seed": args.seed,
        "num": num,
        "method": args.method,
        **dataclasses.asdict(ddim.sampler),
        "num_steps": table.num_steps,
        "eta": eta,
        "labels": args.labels,
        "guidance_scale": args.guidance_scale,
        "null_label": args.null_label,
        "dtype": args.dtype,
        "x_T": _given_array(args.x_T),
        "noise": _given_array(args.noise),
        "trajectory": args.trajectory,
    }
    if trajectory is None:
        save_images(args.out, x_0, settings)
    elif suffix == ".gif":
        first = x_T if x_T is not None else _initial(args.seed, num, x_0.shape[1:])
        save_images(args.out, x_0, settings, frames=[first, *np.asarray(trajectory.x_t)])
    elif suffix == ".png":  # one row an image, the predicted x_0 from left to right, at most 12 columns
        columns = np.unique(np.linspace(0, len(trajectory.t) - 1, 12).round().astype(int))
        x0_hat = np.asarray(trajectory.x0_hat)[columns].swapaxes(0, 1)
        save_png(args.out, images.grid(x0_hat.reshape(-1, *x_0.shape[1:]), columns=len(columns)), settings)
    else:
        arrays = {name: np.asarray(value) for name, value in trajectory._asdict().items()}
        with atomic(args.out) as staging:
            if suffix == ".npz":
                np.savez(staging, allow_pickle=False, arr_0=images.to_uint8(x_0), **arrays)
            else:
                np.save(staging, arrays["x_t"])
    if args.steps is not None and table.num_steps != args.steps:
        print(f"note: {ddim.sampler.spacing} spacing makes {table.num_steps} steps of {args.steps}, as its source does")
    how = {"ddim": f", eta {eta}", "ddpm": f", {ddim.sampler.variance}"}.get(args.method, "")
    print(
        f"{counted(num, 'image')} in {counted(table.num_steps, f'{args.method} step')} "
        f"({ddim.sampler.spacing}{how}) -> {args.out}  [{seconds:.1f} s with compiling, {num / seconds:.1f} images/s]"
    )
    return 0


def _in_terminal(now: Preview) -> None:
    from tqdm import tqdm

    from jddim.terminal import blocks

    width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0 where a terminal does not know
    tqdm.write(blocks(now.x0_hat, width), file=sys.stderr)


def _verify(args: argparse.Namespace) -> int:
    convert = _convert_module()
    from convert.verify import table
    from jddim.images import atomic

    result = convert.verify(args.ckpt, args.src, args.config)
    print(table(result))
    with atomic(Path(args.ckpt) / "verify.json") as staging:
        staging.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if result.first_bad is not None:
        print(
            f"jddim: error: {args.ckpt} differs from PyTorch by more than {result.tolerance:g} of a block's scale, "
            f"first at {result.first_bad}",
            file=sys.stderr,
        )
        return 1
    print(f"equal: largest error of the output {result.output_error:.1e} of its scale; kept in {args.ckpt}/verify.json")
    return 0


def _schedule(args: argparse.Namespace) -> int:
    import numpy as np

    from jddim.checkpoint import load_metadata
    from jddim.config import SamplerConfig, ScheduleConfig
    from jddim.ddim import ddim_sigma, largest_eta, sampler_table
    from jddim.schedule import make_schedule
    from jddim.timetables import traps

    if args.ckpt is not None:
        metadata = load_metadata(args.ckpt)
        config, sampler = metadata.schedule, metadata.sampler
    else:
        config, sampler = ScheduleConfig(args.schedule, args.train_timesteps), SamplerConfig()
    schedule = make_schedule(config)
    sampler = dataclasses.replace(
        sampler,
        spacing=args.spacing or sampler.spacing,
        num_steps=min(sampler.num_steps, schedule.num_train_timesteps),
    )
    table = sampler_table(schedule, sampler, args.steps, np.float64)
    other = None
    if args.compare is not None:
        other = sampler_table(schedule, dataclasses.replace(sampler, spacing=args.compare), args.steps, np.float64)
    if not args.eta >= 0:
        raise ValueError(f"--eta must be a number >= 0, got {args.eta}")
    if args.eta > (limit := largest_eta(table)):
        raise ValueError(f"--eta {args.eta:g} is too large for this table: at most {limit:.4g}")
    if args.plot is not None and args.plot.suffix.lower() not in PLOTS:
        raise ValueError(f"--plot {args.plot}: end it in {', '.join(PLOTS)}")
    sigma = np.asarray(ddim_sigma(np.asarray(table.alpha_bar_t), np.asarray(table.alpha_bar_prev), args.eta))
    print(
        f"{config.name}, T = {schedule.num_train_timesteps}; {sampler.spacing}, {table.num_steps} steps; "
        f"eta {args.eta:g} (at most {largest_eta(table):.4g})"
    )
    print(f"{'step':>5} {'t':>5} {'t_prev':>6} {'alpha_bar_t':>12} {'alpha_bar_prev':>14} {'sigma':>10}")
    columns = zip(table.t, table.t_prev, table.alpha_bar_t, table.alpha_bar_prev, sigma, strict=True)
    for i, (t, t_prev, a_t, a_prev, s) in enumerate(columns, 1):
        print(f"{i:>5} {t:>5} {t_prev:>6} {a_t:>12.6g} {a_prev:>14.6g} {s:>10.5f}")
    for note in traps(table, schedule, sampler.prediction_type):
        print(f"note: {note}")
    if other is not None:
        print(f"\n{sampler.spacing} beside {args.compare}: where they are in each step, t (alpha_bar_t)")
        for i in range(max(table.num_steps, other.num_steps)):
            cells = [f"{c.t[i]:>5} ({c.alpha_bar_t[i]:.4g})" if i < c.num_steps else "-" for c in (table, other)]
            print(f"{i + 1:>5} {cells[0]:<22} {cells[1]:<22}{'' if cells[0] == cells[1] else '  differs'}".rstrip())
        for note in traps(other, schedule, sampler.prediction_type):
            print(f"note ({args.compare}): {note}")
    if args.plot is not None:
        _plot(args.plot, schedule.alphas_cumprod, table, sigma, f"{config.name}, {sampler.spacing}, eta {args.eta:g}")
        print(f"plot: {args.plot}")
    return 0


def _info(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if (path / "metadata").is_dir():
        from jddim.checkpoint import abstract_model, flat_params, load_metadata

        metadata = load_metadata(path)
        data = metadata.to_json()
        provenance = data.pop("provenance")
        wording = provenance.pop("wording", {})
        count = sum(leaf.size for leaf in flat_params(abstract_model(metadata.model)).values())
        lines = {"checkpoint": path, "sha256": metadata.sha256, "parameters": f"{count:,}", **data, **provenance}
        for name, value in lines.items():
            if name == "verification" and "blocks" in value:
                value = f"{value['output_error']:.1e} of the output's scale, against PyTorch {value['torch']}"
            shown = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            print(f"{name:<15} {_printable(shown)}")
            if name in ("schedule", "sampler") and wording.get(name):
                print(_printable(f"{'  in ' + provenance['family']:<15} {_worded(wording[name], wording['told'])}"))
        return 0
    settings = _settings(args.set)
    lines = _convert_module().describe(args.path, args.config, settings, args.preset, args.variant, args.revision)
    print("\n".join(map(_printable, lines)))
    return 0


def _worded(facts: Mapping[str, str], told: Mapping[str, str]) -> str:
    """Facts as their source spells them; those that --set or --preset told are marked so."""
    return ", ".join(f"{name}={value}" + (f" ({told[name]})" if name in told else "") for name, value in facts.items())


def _cite(args: argparse.Namespace) -> int:
    from jddim.cite import bibtex, citations

    provenance = None
    if args.ckpt is not None:
        from jddim.checkpoint import load_metadata

        provenance = load_metadata(args.ckpt).provenance
    print(bibtex(*citations(provenance)), end="")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from jddim.diff import diff, table

    rows = diff(args.a, args.b)
    print("\n".join(map(_printable, [*table(rows).split("\n"), f"{len(rows)} differ"])) if rows else "equal")
    return int(bool(rows))


def _plot(path: Path, alphas_cumprod: np.ndarray, table: Any, sigma: np.ndarray, title: str) -> None:
    """alpha_bar and log SNR over t with the visited timesteps marked, and sigma of each step."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jddim.images import atomic

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(alphas_cumprod, color="0.6", label=r"$\bar\alpha_t$")
    left.plot(table.t, table.alpha_bar_t, "o", markersize=4, label="visited t")
    left.set(xlabel="t", ylabel=r"$\bar\alpha$", title=title)
    left.legend()
    with np.errstate(divide="ignore"):  # at zero terminal SNR log SNR is -inf, which is not drawn
        log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    middle.plot(log_snr, color="0.6")
    middle.plot(table.t, log_snr[table.t], "o", markersize=4)
    middle.set(xlabel="t", ylabel="log SNR", title="even steps here are even in lambda")
    right.plot(table.t, sigma, "o-", markersize=4)
    right.set(xlabel="t", ylabel=r"$\sigma$", title="noise added by the step from t")
    with atomic(path) as staging:
        figure.savefig(staging, dpi=120)
    plt.close(figure)


def _initial(seed: int, num: int, shape: tuple[int, ...]) -> np.ndarray:
    """The x_T that `DDIM.sample` drew, for the first frame."""
    import jax
    import numpy as np

    from jddim.sampling import initial_noise, sample_keys

    return np.asarray(initial_noise(sample_keys(jax.random.key(seed), num), shape))


def _labels(text: str | None, num: int) -> np.ndarray | None:
    """One label an image, from "3,977" (one each, or one for all) or "0:10" (0 to 9, over and over)."""
    if text is None:
        return None
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    import numpy as np

    try:
        if ":" in text:
            low, high = (int(part) for part in text.split(":"))
            given = list(range(low, high))
        else:
            given = [int(part) for part in text.split(",")]
    except ValueError:
        given = []
    if not given:
        raise ValueError(f"--labels takes integers, 3,977 or a range, 0:10; got {text!r}")
    if ":" not in text and len(given) not in (1, num):
        raise ValueError(
            f"--labels names {len(given)} labels for {num} images; give one for each, one for all, or a range"
        )
    return np.resize(np.array(given, np.int32), num)


def _load_array(path: Path | None, option: str) -> np.ndarray | None:
    if path is None:
        return None
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        told = " (it is cut short)" if path.stat().st_size and "pickle" not in str(error) else ""
        raise ValueError(f"{option} {path} is not an .npy file of numbers{told}; numpy.save writes one") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{option} {path} is an .npz archive of {', '.join(array.files) or 'nothing'}; save one array as .npy"
        )
    if array.ndim != {"--x-T": 4, "--noise": 5}[option]:
        wanted = {"--x-T": "(N, H, W, C)", "--noise": "(S, N, H, W, C)"}[option]
        raise ValueError(f"{option} {path} must have shape {wanted}, got {array.shape}")
    return array


def _batch_size(text: str) -> int | str:
    """`--batch-size`: a number, or auto."""
    return text if text == "auto" else int(text)


def _seed(text: str) -> int:
    """`--seed`: what jax.random.key tells apart."""
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..{2**32 - 1}, which seeds are kept apart in")
    return seed


def _given_array(path: Path | None) -> dict[str, str] | None:
    """A file of noise, as the settings record it."""
    return None if path is None else {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _convert_module() -> Any:
    try:
        from convert import convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this command reads PyTorch checkpoints and needs {error.name}: pip install 'jddim[convert]', or "
            "'jddim[convert-core]' to go without PyTorch and its verification"
        ) from error
    return convert


def _settings(pairs: Sequence[str]) -> Mapping[str, str]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
        settings[key] = value
    return settings


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return _printable(" ".join(str(error).split())) or type(error).__name__


def _say(line: str) -> None:
    """Print a line of progress. Nobody reading it any more (head) does not stop the work."""
    try:
        print(_printable(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _printable(line: str) -> str:
    """A line that quotes a file, without the control characters that would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is left over: argparse would leave a command's unknown options for the whole program to refuse."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [name for action in shown for name in action.option_strings]
            close = difflib.get_close_matches(rest[0].split("=")[0], known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return namespace, rest


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="jddim",
        description="DDIM sampling in JAX for diffusion models trained in PyTorch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jddim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="examples:\n" + "".join(f"  jddim {name} {line}\n" for line in examples.split("\n")),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    def source_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--config",
            type=Path,
            action="append",
            metavar="FILE",
            help="the source's config file; diffusers has two (default: those beside the weights)",
        )
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="a fact the tensors do not tell, under the source's own name; over the config's",
        )
        sub.add_argument(
            "--preset", metavar="NAME", help="all that --set would say, for a published model (guided-256, ...)"
        )
        sub.add_argument("--variant", metavar="NAME", help="such as fp16: which of a folder's weights")
        sub.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id (default: main)")

    sub = command(
        "convert",
        _convert,
        "convert a PyTorch checkpoint into a jddim checkpoint folder, verified",
        "ckpt.pth mnist\nckpt.pth mnist-raw --weights raw\nema_diffusion.ckpt cifar10 --set image_size=32\n"
        "google/ddpm-cifar10-32 cifar10\nunet/model.safetensors x --config config.json --config scheduler_config.json",
    )
    sub.add_argument(
        "src",
        help="a checkpoint file, a folder (a run's, a diffusers pipeline's), or a hub id: google/ddpm-cifar10-32",
    )
    sub.add_argument("dst", type=Path, help="folder to write")
    source_options(sub)
    sub.add_argument("--weights", choices=("ema", "raw"), help="default: ema where there are any")
    sub.add_argument(
        "--license", metavar="NAME", help="the weights', such as MIT: recorded, and said by the model card"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it is a jddim checkpoint")
    sub.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with PyTorch (recorded)")

    sub = command(
        "export-torch",
        _export_torch,
        "write a checkpoint in the format of a PyTorch source, for that source's own loader",
        "mnist ckpt-folder\nmnist pipeline --format diffusers",
    )
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument("dst", type=Path, help="file or folder to write")
    sub.add_argument("--format", metavar="NAME", help="ermongroup, pesser, ...; default: where it came from")
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it is a file")

    sub = command(
        "sample",
        _sample,
        "sample images from a converted checkpoint",
        "mnist digits.png\nmnist path.gif --num 16 --steps 50 --spacing linspace --clip\n"
        "mnist samples.npz --num 50000 --batch-size 256\n"
        "classes.ckpt 3s.png --labels 3 --guidance-scale 2 --null-label 10\n"
        "mnist exact.npy --x-T x_T.npy --noise noise.npy --eta 1",
    )
    sub.add_argument("ckpt", type=Path, help="a folder written by jddim convert")
    sub.add_argument(
        "out",
        type=Path,
        help=".png grid; .gif trajectory; .npz arr_0 uint8 NHWC, for FID evaluators; .npy float32 NHWC in [-1, 1], "
        "exactly the sampler's result; no suffix: a folder of numbered PNGs",
    )
    sub.add_argument("--num", type=int, metavar="N", help="images (default 64, or as many as --x-T holds)")
    sub.add_argument("--steps", type=int, metavar="S", help="default: the checkpoint's")
    sub.add_argument(
        "--eta", type=float, metavar="E", help="0 deterministic, 1 as noisy as DDPM; default: the checkpoint's"
    )
    sub.add_argument("--seed", type=_seed, default=0, metavar="I", help="image i depends on (seed, i) alone; default 0")
    sub.add_argument(
        "--batch-size",
        type=_batch_size,
        default=64,
        metavar="B",
        help="images at a time (default 64); auto: tries which is fastest and fits",
    )
    sub.add_argument("--spacing", metavar="NAME", help=f"{SPACING_NAMES}; default: the checkpoint's")
    sub.add_argument(
        "--method",
        choices=METHODS,
        default="ddim",
        help="ddpm: ancestral sampling, with the checkpoint's variance or --variance; the rest: other solvers "
        "(heun asks the network twice a step); default ddim",
    )
    sub.add_argument(
        "--labels",
        metavar="LABELS",
        help="of a class-conditional model: 3,977 (one an image, or one for all) or 0:10 (0 to 9, over and over)",
    )
    sub.add_argument(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="classifier-free guidance: 0 without the label, 1 with it, above 1 beyond; needs a null label",
    )
    sub.add_argument(
        "--null-label", type=int, metavar="N", help="what meant no label in training; default: as recorded"
    )
    sub.add_argument(
        "--x-T", dest="x_T", type=Path, metavar="FILE.npy", help="start from this noise, (N, H, W, C) float32"
    )
    sub.add_argument(
        "--noise", type=Path, metavar="FILE.npy", help="(S, N, H, W, C) float32; row s is used in the s-th step taken"
    )
    sub.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="clamp x0 to the clip range at each step; default: the checkpoint's",
    )
    conventions = sub.add_argument_group("conventions", "each overrides the checkpoint's (`jddim info` shows them)")
    conventions.add_argument("--clip-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="for --clip")
    conventions.add_argument(
        "--threshold",
        type=float,
        nargs=2,
        metavar=("RATIO", "MAX"),
        help="dynamic thresholding of x0 in place of --clip: diffusers' dynamic_thresholding_ratio, sample_max_value",
    )
    conventions.add_argument(
        "--rederive-eps",
        action=argparse.BooleanOptionalAction,
        help="the direction's eps from the clipped x0 (OpenAI, lucidrains)",
    )
    conventions.add_argument("--steps-offset", type=int, metavar="N", help="added to each t of the spacing leading")
    conventions.add_argument(
        "--set-alpha-to-one",
        action=argparse.BooleanOptionalAction,
        help="of diffusers' spacings: whether the last step ends at alpha_bar 1, or at that of t = 0",
    )
    conventions.add_argument("--variance", choices=VARIANCES, help="for ddpm")
    conventions.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="what the network predicts")
    sub.add_argument(
        "--preview",
        type=Path,
        metavar="FILE.png",
        help="what the images are going to be, drawn anew as they are made; - for the terminal",
    )
    sub.add_argument(
        "--trajectory",
        action="store_true",
        help="every step too: .png a row of x0_hat an image; .npz also t, x_t, x0_hat; .npy x_t, (S, N, H, W, C)",
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network's computation")

    cli_invert.add(command, _labels, SPACING_NAMES)
    cli_research.add(command, _seed, _labels)
    cli_evaluate.add(command)
    cli_doctor.add(command, _labels)
    cli_bulk.add(command, _seed, _batch_size, SPACING_NAMES, _say)
    cli_export.add(command, SPACING_NAMES)
    cli_train.add(command, _say)
    cli_serve.add(command, _say)

    sub = command("verify", _verify, "compare a checkpoint with its PyTorch source, block by block", "mnist ckpt.pth")
    sub.add_argument("ckpt", type=Path)
    sub.add_argument("src", help="the file, folder or hub id that it was converted from")
    sub.add_argument("--config", type=Path, action="append", metavar="FILE", help="as given to convert")

    sub = command(
        "schedule",
        _schedule,
        "print (and plot) the table of steps of any spacing",
        "--spacing quad --steps 20\nmnist --steps 10 --eta 1\n--spacing linspace --compare leading --steps 10\n"
        "--schedule cosine --steps 50 --plot cosine.png",
    )
    sub.add_argument("ckpt", type=Path, nargs="?", help="take the schedule and defaults from a checkpoint")
    sub.add_argument("--schedule", default="linear", metavar="NAME", help="without a checkpoint: linear, cosine, ...")
    sub.add_argument(
        "--train-timesteps", type=int, default=1000, metavar="T", help="without a checkpoint (default 1000)"
    )
    sub.add_argument("--spacing", metavar="NAME", help=SPACING_NAMES)
    sub.add_argument("--steps", type=int, metavar="S")
    sub.add_argument("--eta", type=float, default=1.0, metavar="E", help="for sigma (default 1)")
    sub.add_argument(
        "--compare", metavar="NAME", help="another spacing's table beside it: what the paper does, what diffusers does"
    )
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs jddim[plot])")

    sub = command(
        "diff",
        _diff,
        "what differs between two checkpoints, sets of samples or settings; exit status 0 if nothing, as diff's",
        "mnist mnist-raw\nmine.npy theirs.npy\na.png b.png",
    )
    sub.add_argument("a", type=Path, help="a checkpoint folder, .npy or .npz samples, .json or .png settings")
    sub.add_argument("b", type=Path, help="another of the same kind")

    sub = command(
        "cite",
        _cite,
        "BibTeX of the method, the software and, of a checkpoint, where it comes from",
        "> jddim.bib\nmnist > mnist.bib",
    )
    sub.add_argument("ckpt", type=Path, nargs="?", help="a checkpoint folder; without one: the method and the software")

    sub = command(
        "info",
        _info,
        "what a checkpoint is: a jddim folder, or a PyTorch file (nothing in it is run)",
        "mnist\nckpt.pth",
    )
    sub.add_argument("path")
    source_options(sub)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
