"""`jddim schedule`: the table of steps of any spacing, and its plot."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim.run.request import SPACING_NAMES

if TYPE_CHECKING:
    import numpy as np

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


def _schedule(args: argparse.Namespace) -> int:
    import numpy as np

    from jddim.checkpoint.folder import load_metadata
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
    sigma = np.asarray(ddim_sigma(sigma_prev=table.sigma_prev, fresh=table.fresh, eta=args.eta))
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


def _plot(path: Path, alphas_cumprod: np.ndarray, table: Any, sigma: np.ndarray, title: str) -> None:
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
