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
    from jddim.ddim import StepTable
    from jddim.schedule import Schedule

PLOTS = (".png", ".svg", ".pdf")
ENDS = ("alpha_t", "sigma_t", "alpha_prev", "sigma_prev")


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
    sub.add_argument(
        "--schedule", default="linear", metavar="NAME", help="without a checkpoint: linear, cosine, ..., flow, edm, vp"
    )
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
    from jddim.schedule import CONTINUOUS, make_schedule
    from jddim.timetables import traps

    if args.ckpt is not None:
        metadata = checkpoint(args)
        config, sampler = metadata.schedule, metadata.sampler
    else:
        refuse_told(args)
        config, sampler = ScheduleConfig(args.schedule, args.train_timesteps), SamplerConfig()
        if config.name in CONTINUOUS:
            sampler = dataclasses.replace(sampler, spacing="even" if config.name == "flow" else "karras")
    schedule = make_schedule(config)
    sampler = dataclasses.replace(
        sampler,
        spacing=args.spacing or sampler.spacing,
        num_steps=min(sampler.num_steps, schedule.most_steps),
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
        "times": schedule.summary,
        "eta": args.eta,
        "tables": [
            {"spacing": name, **_table(each, args.eta), "notes": traps(each, schedule, sampler.prediction_type)}
            for name, each in tables
        ],
        "plot": None if args.plot is None else str(args.plot),
    }
    if args.plot is not None:
        added = [row["added"] for row in found["tables"][0]["steps"]]
        _plot(args.plot, schedule, table, added, f"{config.name}, {sampler.spacing}, eta {args.eta:g}")
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _table(table: StepTable, eta: float) -> dict[str, Any]:
    """A table's rows, in the order in which they are taken. sigma is None where eta is too large for the table."""
    from jddim.ddim import ddim_sigma, largest_eta

    limit = largest_eta(table)
    columns = {
        name: getattr(table, name).tolist()
        for name in ("t", "t_prev", "alpha_t", "sigma_t", "alpha_prev", "sigma_prev")
    }
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
        f"{found['schedule']}, {found['times']}; {first['spacing']}, {len(rows)} steps; "
        f"eta {found['eta']:g} (at most {first['largest_eta']:.4g})",
        f"{'step':>5} {'t':>9} {'t_prev':>9} {' '.join(f'{name:>10}' for name in ENDS)} {'added':>10}",
    ]
    for i, row in enumerate(rows, 1):
        ends = " ".join(f"{row[name]:>10.6g}" for name in ENDS)
        lines.append(f"{i:>5} {row['t']:>9.6g} {row['t_prev']:>9.6g} {ends} {row['added']:>10.5f}")
    lines += [f"note: {note}" for note in first["notes"]]
    for other in others:
        lines += ["", f"{first['spacing']} beside {other['spacing']}: where they are in each step, t (alpha_t)"]
        for i, pair in enumerate(itertools.zip_longest(rows, other["steps"]), 1):
            a, b = (f"{row['t']:>5.6g} ({row['alpha_t']:.4g})" if row else "-" for row in pair)
            lines.append(f"{i:>5} {a:<22} {b:<22}{'' if a == b else '  differs'}".rstrip())
        lines += [f"note ({other['spacing']}): {note}" for note in other["notes"]]
    return [*lines, f"plot: {found['plot']}"] if found["plot"] else lines


def _plot(path: Path, schedule: Schedule, table: StepTable, added: Sequence[float], title: str) -> None:
    """Alpha, sigma and log SNR over t with the visited timesteps marked, and the noise that each step adds."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jddim.files import atomic

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    t = schedule.shown_times(1000)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    for name, curve, visited in ((r"\alpha_t", alpha, table.alpha_t), (r"\sigma_t", sigma, table.sigma_t)):
        line = left.plot(t, curve, label=f"${name}$")
        left.plot(table.t, visited, "o", markersize=4, color=line[0].get_color())
    left.set(xlabel="t", title=title)
    left.legend()
    with np.errstate(divide="ignore"):  # at zero terminal SNR log SNR is -inf, which is not drawn
        middle.plot(t, 2 * np.log(alpha / sigma), color="0.6")
        middle.plot(table.t, 2 * np.log(table.alpha_t / table.sigma_t), "o", markersize=4)
    middle.set(xlabel="t", ylabel="log SNR", title="even steps here are even in lambda")
    right.plot(table.t, added, "o-", markersize=4)
    right.set(xlabel="t", ylabel=r"$\sigma$", title="noise added by the step from t")
    with atomic(path) as staging:
        figure.savefig(staging, dpi=120)
    plt.close(figure)
