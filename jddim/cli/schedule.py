"""`jddim schedule`: the table of steps of any spacing, and its plot."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim.cli.options import CKPT, add_ckpt, add_json, add_overwrite, checkpoint, print_json, refuse_told
from jddim.installing import install_line
from jddim.run.request import SPACING_NAMES

if TYPE_CHECKING:
    import numpy as np

    from jddim.ddim import StepTable

PLOTS = (".png", ".svg", ".pdf")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "schedule",
        _schedule,
        "print and plot the table of steps of any spacing",
        "--spacing quad --steps 20\nmnist --steps 10 --eta 1\n--spacing linspace --compare leading --steps 10\n"
        "--schedule cosine --steps 50 --plot cosine.png",
    )
    add_ckpt(sub, "?", f"take the schedule and defaults from a checkpoint: {CKPT}")
    sub.add_argument("--schedule", default="linear", metavar="NAME", help="without a checkpoint: linear, cosine, ...")
    sub.add_argument(
        "--train-timesteps", type=int, default=1000, metavar="T", help="without a checkpoint (default 1000)"
    )
    sub.add_argument("--spacing", metavar="NAME", help=SPACING_NAMES)
    sub.add_argument("--steps", type=int, metavar="S", help="default: the checkpoint's, or 50")
    sub.add_argument("--eta", type=float, default=1.0, metavar="E", help="for sigma (default 1)")
    sub.add_argument(
        "--compare", metavar="NAME", help="another spacing's table beside it: what the paper does, what diffusers does"
    )
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs jddim[plot])")
    add_overwrite(sub)
    add_json(sub)


def _schedule(args: argparse.Namespace) -> int:
    import numpy as np

    from jddim.config import SamplerConfig, ScheduleConfig
    from jddim.ddim import largest_eta, sampler_table
    from jddim.schedule import make_schedule
    from jddim.timetables import traps

    if args.ckpt is not None:
        metadata = checkpoint(args)
        config, sampler = metadata.schedule, metadata.sampler
    else:
        refuse_told(args)
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
    if args.plot is not None:
        from jddim.files import check_free

        check_free(args.plot, overwrite=args.overwrite)
    if args.plot is not None and args.plot.suffix.lower() not in PLOTS:
        raise ValueError(f"--plot {args.plot}: end it in {', '.join(PLOTS)}")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"--plot needs matplotlib: {install_line('plot')}")
    tables = [(sampler.spacing, table), *([] if other is None else [(args.compare, other)])]
    found: dict[str, Any] = {
        "schedule": config.name,
        "train_timesteps": schedule.num_train_timesteps,
        "eta": args.eta,
        "tables": [
            {"spacing": name, **_table(each, args.eta), "notes": traps(each, schedule, sampler.prediction_type)}
            for name, each in tables
        ],
        "plot": None if args.plot is None else str(args.plot),
    }
    if args.plot is not None:
        sigma = [row["added"] for row in found["tables"][0]["steps"]]
        _plot(args.plot, schedule.alphas_cumprod, table, sigma, f"{config.name}, {sampler.spacing}, eta {args.eta:g}")
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _table(table: StepTable, eta: float) -> dict[str, Any]:
    """A table's rows, in the order in which they are taken. sigma is None where eta is too large for the table."""
    from jddim.ddim import ddim_sigma, largest_eta

    limit = largest_eta(table)
    columns = {name: getattr(table, name).tolist() for name in ("t", "t_prev", "alpha_bar_t", "alpha_bar_prev")}
    columns["added"] = [None] * table.num_steps
    if eta <= limit:
        columns["added"] = ddim_sigma(sigma_prev=table.sigma_prev, fresh=table.fresh, eta=eta).tolist()
    return {
        "largest_eta": limit,
        "steps": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    }


def _lines(found: dict[str, Any]) -> list[str]:
    """What `--json` prints, for people."""
    first, *others = found["tables"]
    rows = first["steps"]
    lines = [
        f"{found['schedule']}, T = {found['train_timesteps']}; {first['spacing']}, {len(rows)} steps; "
        f"eta {found['eta']:g} (at most {first['largest_eta']:.4g})",
        f"{'step':>5} {'t':>5} {'t_prev':>6} {'alpha_bar_t':>12} {'alpha_bar_prev':>14} {'added':>10}",
    ]
    for i, row in enumerate(rows, 1):
        ends = f"{row['alpha_bar_t']:>12.6g} {row['alpha_bar_prev']:>14.6g}"
        lines.append(f"{i:>5} {row['t']:>5} {row['t_prev']:>6} {ends} {row['added']:>10.5f}")
    lines += [f"note: {note}" for note in first["notes"]]
    for other in others:
        lines += ["", f"{first['spacing']} beside {other['spacing']}: where they are in each step, t (alpha_bar_t)"]
        for i, pair in enumerate(itertools.zip_longest(rows, other["steps"]), 1):
            a, b = (f"{row['t']:>5} ({row['alpha_bar_t']:.4g})" if row else "-" for row in pair)
            lines.append(f"{i:>5} {a:<22} {b:<22}{'' if a == b else '  differs'}".rstrip())
        lines += [f"note ({other['spacing']}): {note}" for note in other["notes"]]
    return [*lines, f"plot: {found['plot']}"] if found["plot"] else lines


def _plot(path: Path, alphas_cumprod: np.ndarray, table: StepTable, sigma: Sequence[float], title: str) -> None:
    """alpha_bar and log SNR over t with the visited timesteps marked, and sigma of each step."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jddim.files import atomic

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
