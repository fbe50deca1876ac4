"""Times jddim's jitted sampler against the PyTorch reference and, where installed, diffusers. Run by scripts/bench.

Prints a Markdown table and writes it, and every sample taken, to out/bench/. What makes the comparison fair:

- Every contestant has the same weights, x_T and timesteps, float32 (no TF32), eta 0, x0 clipped; before anything is
  timed their x_0 must agree with jddim's to 1e-3 of its largest magnitude, and the table says how closely they do.
- What is timed is sampling as a user calls it, from x_T to a finished x_0 on the device. jddim includes its checks of
  the arguments and the result. torch runs under inference_mode, in both memory layouts; torch.compile keeps the
  weights constant, which lets it lay them out beforehand.
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
import json
import math
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
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # so that it also runs where jddim is not installed
    sys.path.insert(0, str(ROOT))

import jddim  # noqa: E402
from convert.rules import source_of  # noqa: E402
from jddim.config import ScheduleConfig, UNetConfig, from_json, to_json  # noqa: E402
from jddim.schedule import make_schedule  # noqa: E402

MNIST_SOURCE = ROOT / "scripts" / "assets" / "mnist-ddpm"
OUT = ROOT / "out" / "bench"
TOLERANCE = 1e-3
# Above glibc's 32 MiB limit for growing its threshold by itself; larger than any buffer here.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
OPENMP = {"OMP_WAIT_POLICY": "PASSIVE"}
SETTLE_S = 0.05
CIFAR10 = UNetConfig(image_size=(32, 32))  # ch 128, mult 1,2,2,2, 2 blocks, attention at 16x16: Ho et al.'s


class BenchError(Exception):
    """What stops the bench, in one line."""


class UnavailableError(Exception):
    """Why a contestant cannot take part, in one line."""


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """A network to time, with the settings that suit it. batch_sizes, steps: the defaults."""

    title: str
    batch_sizes: tuple[int, ...]
    steps: int


SIZES = {
    "mnist": Size("MNIST size, the shipped checkpoint", (16, 64), 10),
    "cifar10": Size("CIFAR-10 size, random weights", (8,), 4),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What all contestants sample. params: the weights under jddim's names and in its layout.

    timesteps: int64 `(S,)`, descending. x_T: float32 `(b, h, w, c)`.
    """

    size: str
    config: UNetConfig
    params: Mapping[str, NDArray[np.float32]]
    schedule: ScheduleConfig
    timesteps: NDArray[np.int64]
    x_T: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write to an `.npz` for a process of its own."""
        facts = {"size": self.size, "config": to_json(self.config), "schedule": to_json(self.schedule)}
        arrays: dict[str, Any] = {f"params/{name}": value for name, value in self.params.items()}
        np.savez(path, facts=np.array(json.dumps(facts)), timesteps=self.timesteps, x_T=self.x_T, **arrays)

    @classmethod
    def load(cls, path: Path) -> Case:
        """The inverse of `save`."""
        with np.load(path) as file:
            facts = json.loads(str(file["facts"]))
            params = {name[7:]: file[name] for name in file.files if name.startswith("params/")}
            config, schedule = from_json(UNetConfig, facts["config"]), from_json(ScheduleConfig, facts["schedule"])
            return cls(facts["size"], config, params, schedule, file["timesteps"], file["x_T"])


def make_case(size: str, batch: int, steps: int) -> Case:
    """The case of a size: the shipped weights for "mnist", random ones (seeded) for "cifar10".

    The timesteps are multiples of T // S, the one spacing that all contestants have.
    """
    if size == "mnist":
        from convert.engine import fill
        from convert.families import FAMILIES
        from convert.readers import read
        from jddim.checkpoint import abstract_model, flat_params

        family = FAMILIES["ho"]
        source = family.open_source(read(MNIST_SOURCE / "ckpt.pth"), None, "ckpt.pth")
        plan = family.plan(source.tensors, None, {"image_size": "28"})
        shapes = {name: leaf.shape for name, leaf in flat_params(abstract_model(plan.model)).items()}
        config, schedule = plan.model, plan.schedule
        params = fill(source.tensors, shapes, plan.rules, plan.ignored)
    else:
        config, schedule = CIFAR10, ScheduleConfig("linear", 1000, 1e-4, 0.02)
        params = random_params(config)
    shape = (batch, *config.image_size, config.in_channels)
    x_T = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    timesteps = (np.arange(steps, dtype=np.int64) * (schedule.num_train_timesteps // steps))[::-1].copy()
    return Case(size, config, params, schedule, timesteps, x_T)


def random_params(config: UNetConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Parameters of which none is zero: kernels N(0, 1 / fan_in), norm scales N(1, 0.2^2), biases N(0, 0.2^2)."""
    from jddim.checkpoint import abstract_model, flat_params

    rng = np.random.default_rng(seed)
    params = {}
    for name, leaf in sorted(flat_params(abstract_model(config)).items()):
        draw = rng.standard_normal(leaf.shape, dtype=np.float32)
        if name.endswith(".kernel"):
            draw /= np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
        else:
            draw = np.float32(0.2) * draw + np.float32(name.endswith(".scale"))
        params[name] = draw
    return params


# -- contestants ------------------------------------------------------------------------------------------------------

# Samples once, waits until the result is there, and returns it as `to_numpy` takes it.
Sampler = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """build: (case, device "cpu" or "gpu") -> a sampler; raises UnavailableError if it cannot be had here."""

    label: str
    build: Callable[[Case, str], Sampler]


def build_jddim(case: Case, device: str) -> Sampler:
    """`DDIM.sample`, the public entry."""
    import jax

    from jddim.checkpoint import build_model
    from jddim.config import SamplerConfig
    from jddim.pipeline import DDIM

    on = jax.devices(device)[0]
    with jax.default_device(on):
        model = build_model(case.config, case.params)
        x_T = jax.device_put(case.x_T, on)
    ddim = DDIM(model, make_schedule(case.schedule), SamplerConfig())

    def sample() -> Any:
        with jax.default_device(on):
            return ddim.sample(x_T=x_T, spacing=case.timesteps, eta=0.0, clip=True).block_until_ready()

    return sample


def torch_reference(case: Case, device: str) -> Any:
    """The PyTorch reference with the case's weights, on the device."""
    import torch

    from convert.families.ho import reference, rules

    model = reference(case.config)
    shapes, table = {name: value.shape for name, value in model.state_dict().items()}, rules(case.config)
    state = {}
    for name, value in case.params.items():
        source = source_of(name, table)
        turned = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T  # to torch's layout, one axis or two
        state[source] = torch.from_numpy(turned.reshape(shapes[source]).copy())
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False).to(torch_device(device))


def torch_sampler(case: Case, denoise: Any, device: str, *, channels_last: bool) -> Sampler:
    """The walk-through's loop in PyTorch over this denoiser."""
    import torch

    from convert.reference.ddim import ddim_sample

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_T = torch.from_numpy(nchw(case.x_T)).to(torch_device(device), memory_format=layout)
    alphas_cumprod = torch.tensor(make_schedule(case.schedule).alphas_cumprod)
    timesteps = case.timesteps.tolist()

    def sample() -> Any:
        with torch.inference_mode():
            xs, _ = ddim_sample(denoise, x_T, alphas_cumprod, timesteps, eta=0.0, clip=(-1.0, 1.0))
        finish(device)
        return xs[-1]

    return sample


def build_torch(case: Case, device: str, *, channels_last: bool) -> Sampler:
    """The PyTorch reference as it stands."""
    import torch

    model = torch_reference(case, device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return torch_sampler(case, model, device, channels_last=channels_last)


def build_torch_compile(case: Case, device: str) -> Sampler:
    """The PyTorch reference's UNet compiled by torch.compile, for this batch size, its weights constant."""
    import torch
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()  # another batch size in the same process would make it compile for any, which is slower
    torch._inductor.config.freezing = True
    denoise = torch.compile(torch_reference(case, device), dynamic=False)
    sample = torch_sampler(case, denoise, device, channels_last=False)

    def or_unavailable() -> Any:
        try:
            return sample()
        except Exception as error:  # no C++ compiler, no Python headers, a graph it cannot take: each its own class
            raise UnavailableError(f"torch.compile failed: {one_line(error)}") from error

    return or_unavailable


def build_diffusers(case: Case, device: str, *, channels_last: bool) -> Sampler:
    """The UNet2DModel of diffusers with the case's weights, stepped by its DDIMScheduler as its pipeline does."""
    try:
        import diffusers
    except ImportError as error:
        raise UnavailableError("diffusers is not installed (pip install diffusers)") from error
    import torch

    diffusers.utils.logging.set_verbosity_error()
    c = case.config
    if c.conv_shortcut or c.downsample != ("conv",):
        raise UnavailableError("diffusers has no such UNet (3x3 shortcuts, or resampling without convolutions)")
    attention = [level in c.attention_levels for level in range(len(c.channel_mults))]
    unet: Any = diffusers.UNet2DModel(
        sample_size=c.image_size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        flip_sin_to_cos=False,
        freq_shift=1,
        block_out_channels=tuple(c.channels * mult for mult in c.channel_mults),
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
        layers_per_block=c.num_res_blocks,
        downsample_padding=0,
        attention_head_dim=None,
        norm_num_groups=c.norm_groups,
        norm_eps=c.norm_epsilon,
    )
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    state = {}
    for name, value in torch_reference(case, "cpu").state_dict().items():
        renamed = diffusers_name(name, len(c.channel_mults))
        state[renamed] = value.reshape(shapes[renamed])  # attention's 1x1 convolutions are linears there
    unet.load_state_dict(state, strict=True)
    unet.eval().requires_grad_(False).to(torch_device(device))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet.to(memory_format=layout)

    scheduler: Any = diffusers.DDIMScheduler(
        num_train_timesteps=case.schedule.num_train_timesteps,
        trained_betas=make_schedule(case.schedule).betas,
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(len(case.timesteps), device=torch_device(device))
    if scheduler.timesteps.tolist() != case.timesteps.tolist():
        raise BenchError(f"diffusers' timesteps are {scheduler.timesteps.tolist()}, not {case.timesteps.tolist()}")
    x_T = torch.from_numpy(nchw(case.x_T)).to(torch_device(device), memory_format=layout)

    def sample() -> Any:
        x = x_T
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
        finish(device)
        return x

    return sample


_DIFFUSERS = {
    r"temb\.dense\.(\d)": lambda m, _: f"time_embedding.linear_{int(m[1]) + 1}",
    r"(down|up)\.(\d+)\.block\.(\d+)": lambda m, n: f"{_blocks(m[1], m[2], n)}.resnets.{m[3]}",
    r"(down|up)\.(\d+)\.attn\.(\d+)": lambda m, n: f"{_blocks(m[1], m[2], n)}.attentions.{m[3]}",
    r"(down|up)\.(\d+)\.(down|up)sample": lambda m, n: f"{_blocks(m[1], m[2], n)}.{m[3]}samplers.0",
    r"mid\.block_(\d)": lambda m, _: f"mid_block.resnets.{int(m[1]) - 1}",
    r"mid\.attn_1": lambda m, _: "mid_block.attentions.0",
    r"norm_out": lambda m, _: "conv_norm_out",
}
_DIFFUSERS_PARTS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def diffusers_name(name: str, levels: int) -> str:
    """The Ho et al. reference's parameter `name` as diffusers' UNet2DModel of so many levels names it."""
    for pattern, rename in _DIFFUSERS.items():
        if found := re.match(pattern, name):
            rest = [_DIFFUSERS_PARTS.get(part, part) for part in name[found.end() :].split(".")]
            return rename(found, levels) + ".".join(rest)
    return name


def _blocks(side: str, level: str, levels: int) -> str:
    # diffusers numbers the decoder's levels in the order computed, the deepest first
    return f"{side}_blocks.{level if side == 'down' else levels - 1 - int(level)}"


CONTESTANTS = {
    "jddim": Contestant("jddim", build_jddim),
    "torch": Contestant("PyTorch eager", lambda case, device: build_torch(case, device, channels_last=False)),
    "torch-nhwc": Contestant(
        "PyTorch eager, channels_last", lambda case, device: build_torch(case, device, channels_last=True)
    ),
    "torch-compile": Contestant("torch.compile", build_torch_compile),
    "diffusers": Contestant("diffusers", lambda case, device: build_diffusers(case, device, channels_last=False)),
    "diffusers-nhwc": Contestant(
        "diffusers, channels_last", lambda case, device: build_diffusers(case, device, channels_last=True)
    ),
}
QUICK = ("jddim", "torch")


def nchw(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """NHWC to NCHW, contiguous."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def to_numpy(x: Any) -> NDArray[np.float32]:
    """A sampler's result as NHWC."""
    if type(x).__module__.startswith("torch"):
        return x.cpu().numpy().transpose(0, 2, 3, 1)
    return np.asarray(x)


def torch_device(device: str) -> str:
    """A device kind under torch's name."""
    return "cuda" if device == "gpu" else "cpu"


def finish(device: str) -> None:
    """Wait for what torch has queued on a GPU; on CPU it queues nothing."""
    if device == "gpu":
        import torch

        torch.cuda.synchronize()


# -- measuring --------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """An exception's class and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def timed(sample: Sampler) -> tuple[float, Any]:
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    result = sample()
    return time.perf_counter() - start, result


def agreement(results: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """The largest difference of each x_0 from jddim's, over jddim's largest magnitude.

    Raises BenchError if any is above TOLERANCE, or not a number.
    """
    ours = results["jddim"]
    scale = float(np.abs(ours).max())
    errors = {}
    for name, theirs in results.items():
        if theirs.shape != ours.shape:
            raise BenchError(f"{name} made x_0 of shape {theirs.shape}, jddim of {ours.shape}; nothing was timed")
        errors[name] = float(np.abs(theirs - ours).max()) / scale
    bad = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if bad:
        raise BenchError(
            f"the contestants do not make the same x_0 from the same x_T: {', '.join(bad)} of its scale (allowed: "
            f"{TOLERANCE:g}); nothing was timed"
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
    errors = agreement(results)
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
    return {
        "size": case.size,
        "title": SIZES[case.size].title,
        "model": to_json(case.config),
        "parameters": sum(value.size for value in case.params.values()),
        "batch_size": batch,
        "steps": steps,
        "x_0_scale": float(np.abs(results["jddim"]).max()),
        "rows": rows,
    }


def add_memory(result: dict[str, Any], case: Case, device: str, threads: int, folder: Path) -> None:
    """Fill in each row's memory, measured in a process of its own. Two steps use what any number does."""
    path = folder / "case.npz"
    dataclasses.replace(case, timesteps=case.timesteps[:2]).save(path)
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
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    if name in (None, "jddim"):
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 either; CPU has but one precision
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
        f"`{report['command']}`: float32, eta 0, medians of {settings['repeats']} interleaved calls. Time/jddim above "
        "1 means that jddim is faster (median of the rounds' ratios). First call: with compilation. Difference: the "
        "largest of x_0 from jddim's, over jddim's largest magnitude.",
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
        lines += [
            "",
            f"**{case['title']}** ({case['parameters'] / 1e6:.1f}M parameters, {'x'.join(map(str, shape_of(case)))}), "
            f"batch {case['batch_size']}, {case['steps']} steps",
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
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"\n{row['label']}: left out; {row['skipped']}." for row in case["rows"] if "skipped" in row]
    return "\n".join(lines) + "\n"


def shape_of(case: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = case["model"]["image_size"]
    return height, width, case["model"]["in_channels"]


# -- the command ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


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
    parser = Parser(
        prog="scripts/bench",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = "; ".join(f"{name} {','.join(map(str, size.batch_sizes))}" for name, size in SIZES.items())
    steps = "; ".join(f"{name} {size.steps}" for name, size in SIZES.items())
    parser.add_argument(
        "--sizes", type=names(SIZES), metavar="LIST", help=f"networks, of {','.join(SIZES)} (default: all)"
    )
    parser.add_argument("--batch-sizes", type=numbers, metavar="LIST", help=f"for every size (default: {defaults})")
    parser.add_argument("--steps", type=number(1, 1000), metavar="S", help=f"steps of one call (default: {steps})")
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
        raise BenchError("the comparison needs torch: pip install 'jddim[convert]'") from error
    use_threads(None, threads)
    device, note = choose_device()
    sizes = args.sizes or (("mnist",) if args.quick else tuple(SIZES))
    contestants = args.contestants or (QUICK if args.quick else tuple(CONTESTANTS))
    contestants = ("jddim", *(name for name in contestants if name != "jddim"))
    repeats = args.repeats or (1 if args.quick else 7)

    cases = []
    with tempfile.TemporaryDirectory(prefix="jddim-bench-") as folder:
        # A fresh one, so that first calls compile; the memory measurements then find the program here.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        for size in sizes:
            steps = args.steps or (2 if args.quick else SIZES[size].steps)
            for batch in args.batch_sizes or ((4,) if args.quick else SIZES[size].batch_sizes):
                say(f"{SIZES[size].title}, batch {batch}, {steps} steps")
                case = make_case(size, batch, steps)
                result = measure(case, contestants, device, repeats, asked=args.contestants is not None)
                if not args.no_memory:
                    add_memory(result, case, device, threads, Path(folder))
                cases.append(result)
    return {
        "format": 1,
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
    return 0


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
