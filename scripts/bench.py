"""Times jddim's jitted sampler against the PyTorch reference and, where installed, diffusers. Run by scripts/bench.

Prints a Markdown table and writes it, and every sample taken, to out/bench/. What makes the comparison fair:

- Every contestant has the same weights, x_T and timesteps, eta 0, x0 clipped, and the same precision: float32, with
  products in TF32 where asked (GPUs), or the network in bfloat16 within a float32 sampler. Before anything is timed
  their x_0 must agree with jddim's (float32: to 3e-3 of its largest magnitude); the table says how closely they do.
- What is timed is sampling as a user calls it, from x_T to a finished x_0 on the device. jddim includes its checks of
  the arguments and the result. torch runs under inference_mode, in both memory layouts; torch.compile keeps the
  weights constant on CPU, which lets it lay them out beforehand, and uses channels_last and CUDA graphs on GPU.
- Arithmetic is what the network's convolutions and matrix products need, whoever runs it (torch counts it); the peak
  that it is compared with is that of a 8192^3 matrix product in the same precision, timed here.
- One process, one call of each contestant in turn, in rounds that each start with another one, so that whatever else
  the machine does meets all of them. Before each call the process sleeps, so that no other framework's threads still
  spin, as threads do for a while after their work.
- OMP_WAIT_POLICY is PASSIVE: torch's threads sleep at their barriers and do not spin. On a machine that other programs
  use too, spinning makes torch up to 20 times slower, which says nothing about either. Set OMP_WAIT_POLICY=ACTIVE to
  see torch with it; jax does not use OpenMP.
- All have the same number of threads: the process is bound to so many cores, and torch is told the number.
- On CPU, page faults would dominate large buffers: glibc gives every one back to the system and fetches it again. The
  run restarts itself once with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised, for all contestants.
- The first call (compilation, autotuning) is kept apart, without any persistent compilation cache; one more warms up.
- Peak memory is that of a process of its own for each contestant, which imports its framework alone, loads the
  weights, and samples twice, with glibc's normal thresholds. On a GPU the device's peak stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # so that it also runs where jddim is not installed
    sys.path.insert(0, str(ROOT))

import jddim  # noqa: E402
from jddim.cli.options import OneLineParser  # noqa: E402
from jddim.config import AutoencoderConfig, to_json  # noqa: E402
from jddim.installing import install_line  # noqa: E402
from scripts.contestants import (  # noqa: E402
    CONTESTANTS,
    DEFAULT,
    PRECISIONS,
    QUICK,
    SIZES,
    BenchError,
    Case,
    Sampler,
    UnavailableError,
    as_denoiser,
    decoder_of,
    make_case,
    spaced,
    to_numpy,
    torch_reference,
)
from scripts.regression import ALLOWED, changes  # noqa: E402

OUT = ROOT / "out" / "bench"
STORED = ROOT / "scripts" / "assets" / "bench.json"
# What x_0 may differ by: the largest difference over jddim's largest magnitude in float32; root mean squares otherwise,
# since a network with random weights amplifies 8 bits of mantissa to 0.3 in ten steps. A wrong weight or step makes 1.
# In float32 torch's own two layouts differ by 1e-3 in a batch of 64: the first step multiplies rounding by 100.
TOLERANCE = {"float32": 3e-3, "tf32": 0.2, "bfloat16": 0.5}
# Above glibc's 32 MiB limit for growing its threshold by itself; larger than any buffer here.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
OPENMP = {"OMP_WAIT_POLICY": "PASSIVE"}
SETTLE_S = 0.05

# -- measuring --------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def timed(sample: Sampler) -> tuple[float, Any]:
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    result = sample()
    return time.perf_counter() - start, result


def agreement(results: Mapping[str, NDArray[np.float32]], precision: str) -> dict[str, float]:
    """The difference of each x_0 from jddim's, over jddim's: in float32 the largest, otherwise root mean squares.

    Raises BenchError if any is above the precision's TOLERANCE, or not a number.
    """

    def size(x: NDArray[np.float32]) -> float:
        return float(np.abs(x).max() if precision == "float32" else np.sqrt(np.mean(np.square(x))))

    ours = results["jddim"]
    scale = size(ours)
    errors = {}
    for name, theirs in results.items():
        if theirs.shape != ours.shape:
            raise BenchError(f"{name} made x_0 of shape {theirs.shape}, jddim of {ours.shape}; nothing was timed")
        errors[name] = size(theirs - ours) / scale
    bad = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[precision]]
    if bad:
        raise BenchError(
            f"the contestants do not make the same x_0 from the same x_T: {', '.join(bad)} of its scale (allowed: "
            f"{TOLERANCE[precision]:g}); nothing was timed"
        )
    return errors


def measure(case: Case, names: Sequence[str], device: str, repeats: int, asked: bool) -> dict[str, Any]:
    """One case's rows: first call, agreement, then the interleaved rounds.

    asked: the user named the contestants, so one that cannot take part is an error and not a note.
    """
    samplers: dict[str, Sampler] = {}
    rows: list[dict[str, Any]] = []
    results: dict[str, NDArray[np.float32]] = {}
    first: dict[str, float] = {}
    for name in names:
        row: dict[str, Any] = {"name": name, "label": CONTESTANTS[name].label}
        rows.append(row)
        try:
            sample = CONTESTANTS[name].build(case, device)
            first[name], x_0 = timed(sample)
        except UnavailableError as error:
            if asked:
                raise BenchError(f"{name}: {error}") from error
            row["skipped"] = str(error)
            say(f"  {name}: left out: {error}")
            continue
        samplers[name], results[name] = sample, to_numpy(x_0)
        say(f"  {name}: first call {first[name]:.2f} s")
    errors = agreement(results, case.precision)
    say("  same x_0: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if name != "jddim"))
    for sample in samplers.values():
        timed(sample)
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    for turn in range(repeats):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(timed(samplers[name])[0])
    steps, batch = len(case.timesteps), len(case.x_T)
    for row in rows:
        if (name := row["name"]) in samplers:
            median = statistics.median(seconds[name])
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["jddim"], strict=True)]
            row |= {
                "max_difference": errors[name],
                "first_call_s": first[name],
                "seconds": seconds[name],
                "seconds_per_step": median / steps,
                "images_per_s": batch / median,
                "time_over_jddim": statistics.median(ratios),
            }
            say(f"  {name}: {1e3 * median / steps:.2f} ms/step")  # also if a later case is cut off
    return {
        "size": case.size,
        "title": SIZES[case.size].title,
        "precision": case.precision,
        "model": to_json(case.config),
        "parameters": sum(value.size for value in case.params.values()),
        "batch_size": batch,
        "steps": steps,
        "flops_per_image": arithmetic(case),
        "x_0_scale": float(np.abs(results["jddim"]).max()),
        "rows": rows,
    }


def add_memory(result: dict[str, Any], case: Case, device: str, threads: int, folder: Path) -> None:
    """Fill in each row's memory, measured in a process of its own. Two steps use what any number does."""
    path = folder / "case.npz"
    two = spaced(case.schedule.num_train_timesteps, 2)  # diffusers takes no others than its own
    dataclasses.replace(case, timesteps=two).save(path)
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC}
    for row in result["rows"]:
        if "skipped" in row:
            continue
        options = ["--memory-of", row["name"], "--case", str(path), "--device", device, "--threads", str(threads)]
        command = [sys.executable, str(Path(__file__).resolve()), *options]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"measuring the memory of {row['name']} failed (exit {child.returncode}): {last}")
        row["memory"] = json.loads(child.stdout.strip().splitlines()[-1])
        say(f"  {row['name']}: peak memory {row['memory']['peak_mib']:.0f} MiB")


def memory_of(name: str, case_path: Path, device: str, threads: int) -> dict[str, float | None]:
    """Memory of the running process in MiB: before sampling, at its peak in two calls, and the GPU's peak."""
    use_threads(name, threads)
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    case = Case.load(case_path)
    sample = CONTESTANTS[name].build(case, device)
    del case
    before, _ = resident_mib()
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak covers the loading too, for everyone
        Path("/proc/self/clear_refs").write_text("5")
    sample()
    sample()
    _, peak = resident_mib()
    return {
        "before_mib": before,
        "peak_mib": peak,
        "device_peak_mib": device_peak_mib(name) if device == "gpu" else None,
    }


def resident_mib() -> tuple[float | None, float]:
    """The process's resident memory and its peak."""
    try:
        status = Path("/proc/self/status").read_text()
        now, peak = (int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) / 1024 for field in ("VmRSS", "VmHWM"))
        return now, peak
    except (OSError, IndexError):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def device_peak_mib(name: str) -> float | None:
    """The peak of what the framework has had allocated on the GPU."""
    if name == "jddim":
        import jax

        stats = jax.devices("gpu")[0].memory_stats() or {}
        return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


# -- the machine ------------------------------------------------------------------------------------------------------


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(name: str | None, threads: int) -> None:
    """Bind to so many cores, which is what XLA counts, and tell torch unless `name` is a contestant without it."""
    if threads < cores():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if name != "jddim":
        import torch

        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
    if name in (None, "jddim"):
        import jax

        jax.config.update("jax_enable_compilation_cache", False)


def choose_device() -> tuple[str, str]:
    """("gpu", its name) if both frameworks have one, else ("cpu", a note if only one has)."""
    import jax
    import torch

    theirs = torch.cuda.is_available()
    try:
        ours = jax.devices("gpu")
    except RuntimeError:
        ours = []
    if ours and theirs:
        return "gpu", torch.cuda.get_device_name(0)
    if ours or theirs:
        return "cpu", f"only {'jax' if ours else 'torch'} has a GPU here, so all ran on the CPU"
    return "cpu", ""


def arithmetic(case: Case) -> int:
    """Floating-point operations of the network's convolutions and products for one image and step.

    Products with the padding's zeros are among them: 7 % at CIFAR-10 size.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    plain = dataclasses.replace(case, precision="float32")
    model = torch_reference(plain, "cpu")
    height, width, channels = case.x_T.shape[1:]
    counter = FlopCounterMode(display=False)
    one = dataclasses.replace(plain, x_T=case.x_T[:1])
    with counter, torch.inference_mode():
        if isinstance(case.config, AutoencoderConfig):
            decoder_of(model)(torch.zeros(1, channels, height, width))
        else:
            as_denoiser(one, model, "cpu")(torch.zeros(1, channels, height, width), torch.zeros(1, dtype=torch.int64))
    return int(counter.get_total_flops())


def matmul_peak(precision: str) -> float:
    """Operations a second of a large matrix product on torch's GPU."""
    import torch

    size, calls = 8192, 10
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(size, size, dtype=dtype, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            a @ a
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * size**3 / min(seconds)


def cpu_model() -> str:
    """The CPU's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything timed."""
    found = {"jddim": jddim.__version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "torch", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- the report -------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The tables, with what a reader needs to know about them."""
    machine, settings = report["machine"], report["settings"]
    lines = [
        f"{report['date']}. {machine['cpu']}, {settings['threads']} of {machine['cores']} cores"
        + (f", {machine['gpu']}" if machine["gpu"] else "")
        + f"; {', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
        "",
        f"`{report['command']}`: eta 0, medians of {settings['repeats']} interleaved calls. Time/jddim above "
        "1 means that jddim is faster (median of the rounds' ratios). First call: with compilation. Difference: the "
        "largest of x_0 from jddim's, over jddim's largest magnitude; outside float32, of root mean squares.",
    ]
    if machine["load"] > 0.25 * machine["cores"]:
        lines += [
            "",
            f"Note: the machine was not idle (load average {machine['load']:.1f} at the start, {machine['cores']} "
            "cores), so the milliseconds are too many; the ratios suffer less.",
        ]
    if machine["note"]:
        lines += ["", f"Note: {machine['note']}."]
    for case in report["cases"]:
        gpu = any((row.get("memory") or {}).get("device_peak_mib") for row in case["rows"])
        columns = ["", "ms/step", "images/s", "time/jddim", "first call, s", "peak memory, MiB", "difference"]
        columns += ["GPU peak, MiB"] if gpu else []
        peak = report["machine"]["matmul_peak"].get(case["precision"])
        columns += ["TFLOP/s", "of the peak"] if peak else []
        lines += [
            "",
            f"**{case['title']}** ({case['parameters'] / 1e6:.1f}M parameters, {'x'.join(map(str, shape_of(case)))}), "
            f"{case['precision']}, batch {case['batch_size']}, {case['steps']} steps",
            "",
            f"| {' | '.join(columns)} |",
            "|---" + "|---:" * (len(columns) - 1) + "|",
        ]
        for row in case["rows"]:
            if "skipped" in row:
                continue
            memory = row.get("memory") or {}
            cells = [
                row["label"],
                f"{1e3 * row['seconds_per_step']:.1f}",
                f"{row['images_per_s']:.3g}",
                f"{row['time_over_jddim']:.2f}",
                f"{row['first_call_s']:.1f}",
                f"{memory['peak_mib']:.0f}" if memory else "not measured",
                "" if row["name"] == "jddim" else f"{row['max_difference']:.0e}",
            ]
            if gpu:
                cells.append(f"{memory['device_peak_mib']:.0f}" if memory.get("device_peak_mib") else "not measured")
            if peak:
                rate = row["images_per_s"] * case["steps"] * case["flops_per_image"]
                cells += [f"{rate / 1e12:.0f}", f"{rate / peak:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"\n{row['label']}: left out; {row['skipped']}." for row in case["rows"] if "skipped" in row]
    return "\n".join(lines) + "\n"


def shape_of(case: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = case["model"]["image_size"]
    return height, width, case["model"]["in_channels"]


# -- the command ------------------------------------------------------------------------------------------------------


def number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number in low..high."""

    def parse(text: str) -> int:
        allowed = f"a whole number of at least {low}" if high is None else f"a whole number in {low}..{high}"
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def names(allowed: Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        if unknown := [name for name in found if name not in allowed]:
            raise argparse.ArgumentTypeError(f"knows {', '.join(allowed)}; got {', '.join(map(repr, unknown))}")
        if not found:
            raise argparse.ArgumentTypeError(f"needs at least one of {', '.join(allowed)}")
        return found

    return parse


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: batch sizes separated by commas."""
    return tuple(number(1)(part.strip()) for part in text.split(","))


def destination(text: str) -> Path:
    """An argparse type: a file that can be written, asked before the work and not after it."""
    path = Path(text)
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"cannot write {text}: it must be a file in a folder that is there and writable"
        )
    return path


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = OneLineParser(
        prog="scripts/bench",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = "; ".join(f"{name} {','.join(map(str, size.batch_sizes['cpu']))}" for name, size in SIZES.items())
    steps = "; ".join(f"{name} {size.steps['cpu']}" for name, size in SIZES.items())
    parser.add_argument(
        "--sizes",
        type=names(SIZES),
        metavar="LIST",
        help=f"networks, of {','.join(SIZES)} (default: {','.join(DEFAULT)})",
    )
    parser.add_argument(
        "--batch-sizes", type=numbers, metavar="LIST", help=f"for every size (default on CPU: {defaults})"
    )
    parser.add_argument(
        "--steps", type=number(1, 1000), metavar="S", help=f"steps of one call (default on CPU: {steps})"
    )
    parser.add_argument(
        "--precisions",
        type=names(dict.fromkeys(PRECISIONS)),
        metavar="LIST",
        help=f"of {','.join(PRECISIONS)} (default: float32 on CPU, all on a GPU; tf32 is for GPUs)",
    )
    parser.add_argument("--repeats", type=number(1), metavar="N", help="timed rounds (default: 7)")
    parser.add_argument(
        "--threads", type=number(1, cores()), metavar="N", help=f"cores and threads for all (default: {cores()})"
    )
    parser.add_argument(
        "--contestants",
        type=names(CONTESTANTS),
        metavar="LIST",
        help=f"of {','.join(CONTESTANTS)} (default: all there are; jddim always)",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--json", type=destination, metavar="FILE", help="(default: out/bench/bench.json)")
    parser.add_argument("--markdown", type=destination, metavar="FILE", help="(default: out/bench/bench.md)")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="?",
        const=STORED,
        metavar="FILE",
        help=f"compare with an earlier report (default: {STORED.relative_to(ROOT)}), as ratios to PyTorch eager; exit "
        f"status 1 where jddim has lost more than {ALLOWED:.0%}%",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a trial in seconds: mnist, batch 4, 2 steps, 1 round, {' and '.join(QUICK)}; other options still hold",
    )
    parser.add_argument("--memory-of", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "gpu"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < cores() and not hasattr(os, "sched_setaffinity"):
        parser.error("argument --threads: this system cannot bind a process to some cores, which is how jax is limited")
    return args


def run(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The whole bench; returns the report."""
    threads = args.threads or cores()
    all_cores = cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BenchError(f"the comparison needs torch: {install_line('convert')}") from error
    use_threads(None, threads)
    device, note = choose_device()
    sizes = args.sizes or (("mnist",) if args.quick else DEFAULT)
    contestants = args.contestants or (QUICK if args.quick else tuple(CONTESTANTS))
    contestants = ("jddim", *(name for name in contestants if name != "jddim"))
    repeats = args.repeats or (1 if args.quick else 7)
    precisions = args.precisions or (PRECISIONS if device == "gpu" and not args.quick else ("float32",))
    if device == "cpu" and "tf32" in precisions:
        raise BenchError(f"CPUs have no TF32, only float32 and bfloat16{f' ({note})' if note else ''}")
    peaks = {precision: matmul_peak(precision) for precision in precisions} if device == "gpu" else {}

    cases = []
    with tempfile.TemporaryDirectory(prefix="jddim-bench-") as folder:
        # A fresh one, so that first calls compile; the memory measurements then find the program here.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        for size in sizes:
            steps = args.steps or (2 if args.quick else SIZES[size].steps[device])
            batches = args.batch_sizes or ((4,) if args.quick else SIZES[size].batch_sizes[device])
            for batch, precision in itertools.product(batches, precisions):
                say(f"{SIZES[size].title}, {precision}, batch {batch}, {steps} steps")
                case = make_case(size, batch, steps, precision)
                result = measure(case, contestants, device, repeats, asked=args.contestants is not None)
                if not args.no_memory:
                    add_memory(result, case, device, threads, Path(folder))
                cases.append(result)
    return {
        "format": 2,
        "date": datetime.date.today().isoformat(),
        "command": command_line(argv),
        "machine": {
            "cpu": cpu_model(),
            "cores": all_cores,
            "system": f"{platform.system()} {platform.machine()}",
            "device": device,
            "gpu": note if device == "gpu" else "",
            "note": note if device == "cpu" else "",
            "load": load,
            "matmul_peak": peaks,
        },
        "versions": versions(),
        "settings": {
            "threads": threads,
            "repeats": repeats,
            "tolerance": TOLERANCE,
            "environment": {name: os.environ.get(name) for name in MALLOC | OPENMP},
        },
        "cases": cases,
    }


def command_line(argv: Sequence[str]) -> str:
    """What was run, without where the results went: that is the machine's own business."""
    kept, skip = ["scripts/bench"], False
    for word in argv:
        if skip or word.startswith(("--json=", "--markdown=")):
            skip = False
        elif word in ("--json", "--markdown"):
            skip = True
        else:
            kept.append(word)
    return shlex.join(kept)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch room on a shared GPU
    try:
        if args.memory_of:
            print(json.dumps(memory_of(args.memory_of, args.case, args.device, args.threads)))
            return 0
        if args.check is not None:
            stored(args.check)  # before minutes go by
        report = run(args, argv)
    except BenchError as error:
        say(f"scripts/bench: {error}")
        return 1
    if args.json is None or args.markdown is None:
        OUT.mkdir(parents=True, exist_ok=True)
    table = markdown(report)
    (args.json or OUT / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.markdown or OUT / "bench.md").write_text(table)
    print(table, end="")
    return 0 if args.check is None else check(args.check, report)


def stored(path: Path) -> Any:
    """An earlier report. Raises BenchError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"--check {path} cannot be read: {error}") from error


def check(path: Path, report: Mapping[str, Any]) -> int:
    """Print the cases beside those of a stored report; 1 if any has lost too much."""
    try:
        found = changes(stored(path), report)
    except (BenchError, KeyError, ValueError) as error:
        say(f"scripts/bench: --check {path}: {error}")
        return 1
    print("\nPyTorch eager's time over jddim's, then and now:")
    print("\n".join(map(str, found)))
    return int(any(change.lost for change in found))


if __name__ == "__main__":
    # Read once, when a process starts. The children that measure memory run without glibc's.
    missing = {name: value for name, value in (MALLOC | OPENMP).items() if name not in os.environ}
    if missing and "--memory-of" not in sys.argv and not {"-h", "--help"} & set(sys.argv):
        parse(sys.argv[1:])
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
