"""What scripts/bench.py times: the networks, and each contestant's way to sample them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim.config import ScheduleConfig, UNetConfig, from_json, to_json
from jddim.schedule import noise_schedule

MNIST_SOURCE = Path(__file__).resolve().parent / "assets" / "mnist-ddpm"
CIFAR10 = UNetConfig(image_size=(32, 32))  # ch 128, mult 1,2,2,2, 2 blocks, attention at 16x16: Ho et al.'s


class BenchError(Exception):
    """What stops the bench, in one line."""


class UnavailableError(Exception):
    """Why a contestant cannot take part, in one line."""


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """A network to time, with the settings that suit it. batch_sizes, steps: the defaults, by kind of device."""

    title: str
    batch_sizes: Mapping[str, tuple[int, ...]]
    steps: Mapping[str, int]


SIZES = {
    "mnist": Size("MNIST size, the shipped checkpoint", {"cpu": (16, 64), "gpu": (512,)}, {"cpu": 10, "gpu": 10}),
    "cifar10": Size("CIFAR-10 size, random weights", {"cpu": (8,), "gpu": (256,)}, {"cpu": 4, "gpu": 10}),
}

PRECISIONS = ("float32", "tf32", "bfloat16")
"""What networks compute in: float32 throughout, its products in TF32 (GPUs), or bfloat16 within a float32 sampler."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What all contestants sample. params: the weights under jddim's names and in its layout.

    timesteps: int64 `(S,)`, descending. x_T: float32 `(b, h, w, c)`. precision: of PRECISIONS.
    """

    size: str
    config: UNetConfig
    params: Mapping[str, NDArray[np.float32]]
    schedule: ScheduleConfig
    timesteps: NDArray[np.int64]
    x_T: NDArray[np.float32]
    precision: str = "float32"

    def save(self, path: Path) -> None:
        """Write to an `.npz` for a process of its own."""
        facts = {"size": self.size, "config": to_json(self.config), "schedule": to_json(self.schedule)}
        facts["precision"] = self.precision
        arrays: dict[str, Any] = {f"params/{name}": value for name, value in self.params.items()}
        np.savez(path, facts=np.array(json.dumps(facts)), timesteps=self.timesteps, x_T=self.x_T, **arrays)

    @classmethod
    def load(cls, path: Path) -> Case:
        """The inverse of `save`."""
        with np.load(path) as file:
            facts = json.loads(str(file["facts"]))
            params = {name[7:]: file[name] for name in file.files if name.startswith("params/")}
            config, schedule = from_json(UNetConfig, facts["config"]), from_json(ScheduleConfig, facts["schedule"])
            return cls(facts["size"], config, params, schedule, file["timesteps"], file["x_T"], facts["precision"])


def make_case(size: str, batch: int, steps: int, precision: str = "float32") -> Case:
    """The case of a size: the shipped weights for "mnist", random ones (seeded) for "cifar10"."""
    if size == "mnist":
        from convert.engine import fill
        from convert.families import FAMILIES
        from convert.files.readers import read
        from jddim.models.building import abstract_model, flat_params

        family = FAMILIES["ho"]
        source = family.open_source(read(MNIST_SOURCE / "ckpt.pth")[4], "ckpt.pth")
        plan = family.plan(source.tensors, None, {"image_size": "28"})
        shapes = {name: leaf.shape for name, leaf in flat_params(abstract_model(plan.model)).items()}
        config, schedule = plan.model, plan.schedule
        params = fill(source.tensors, shapes, plan.rules, plan.ignored)
    else:
        config, schedule = CIFAR10, ScheduleConfig("linear", 1000, 1e-4, 0.02)
        params = random_params(config)
    shape = (batch, *config.image_size, config.in_channels)
    x_T = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    return Case(size, config, params, schedule, spaced(schedule.num_train_timesteps, steps), x_T, precision)


def spaced(T: int, steps: int) -> NDArray[np.int64]:
    """The timesteps of a case, descending: multiples of T // S, the one spacing that all contestants have."""
    return (np.arange(steps, dtype=np.int64) * (T // steps))[::-1].copy()


def random_params(config: UNetConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Parameters of which none is zero: kernels N(0, 1 / fan_in), norm scales N(1, 0.2^2), biases N(0, 0.2^2)."""
    from jddim.models.building import abstract_model, flat_params

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
    import jax.numpy as jnp

    from jddim.config import SamplerConfig
    from jddim.models.building import build_model
    from jddim.pipeline import DDIM

    on = jax.devices(device)[0]
    half = case.precision == "bfloat16"
    precision = "tensorfloat32" if case.precision == "tf32" else "highest"  # what CPUs and bfloat16 have either way
    with jax.default_device(on):
        model = build_model(case.config, case.params, jnp.bfloat16 if half else jnp.float32)
        x_T = jax.device_put(case.x_T, on)
    ddim = DDIM(model, noise_schedule(case.schedule), SamplerConfig())

    def sample() -> Any:
        with jax.default_device(on), jax.default_matmul_precision(precision):
            return ddim.sample(x_T=x_T, spacing=case.timesteps, eta=0.0, clip=True, progress=False).block_until_ready()

    return sample


def torch_reference(case: Case, device: str) -> Any:
    """The PyTorch reference with the case's weights, on the device."""
    from convert.families.ho import reference, rules

    return with_weights(reference(case.config), rules(case.config), case, device)


def with_weights(model: Any, rules: Mapping[str, str], case: Case, device: str) -> Any:
    """A PyTorch module with the case's weights, by a family's rename table, on the device."""
    import torch

    from convert.engine import source_tensors

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = source_tensors(case.params, rules, shapes)
    state = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False).to(torch_device(device), torch_dtype(case))


def torch_sampler(case: Case, denoise: Any, device: str, *, channels_last: bool) -> Sampler:
    """The walk-through's loop in PyTorch over this denoiser, in float32 around a network of any dtype."""
    import torch

    from convert.reference.ddim import ddim_sample

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_T = torch.from_numpy(nchw(case.x_T)).to(torch_device(device), memory_format=layout)
    alphas_cumprod = torch.tensor(noise_schedule(case.schedule).alphas_cumprod)
    timesteps = case.timesteps.tolist()

    network = denoise if case.precision != "bfloat16" else in_bfloat16(denoise)

    def sample() -> Any:
        with torch.inference_mode(), tf32(case):
            xs, _ = ddim_sample(network, x_T, alphas_cumprod, timesteps, eta=0.0, clip=(-1.0, 1.0))
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


def compiled(model: Any, device: str) -> Any:
    """A UNet compiled by torch.compile for one batch size: on CPU its weights constant, on GPU with CUDA graphs."""
    import torch
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()  # another batch size in the same process would make it compile for any, which is slower
    torch._inductor.config.freezing = device == "cpu"
    if device == "cpu":
        return torch.compile(model, dynamic=False)
    model.to(memory_format=torch.channels_last)
    return torch.compile(model, dynamic=False, mode="reduce-overhead")


def or_unavailable(sample: Sampler) -> Sampler:
    """A sampler whose failure leaves its contestant out: no C++ compiler, no Python headers, a graph not taken."""

    def sample_or_not() -> Any:
        try:
            return sample()
        except Exception as error:  # each of these is a class of its own
            raise UnavailableError(f"torch.compile failed: {one_line(error)}") from error

    return sample_or_not


def build_torch_compile(case: Case, device: str) -> Sampler:
    """The PyTorch reference's UNet under torch.compile."""
    denoise = compiled(torch_reference(case, device), device)
    return or_unavailable(torch_sampler(case, denoise, device, channels_last=device == "gpu"))


def build_diffusers(case: Case, device: str, *, channels_last: bool, compile: bool = False) -> Sampler:
    """The UNet2DModel of diffusers with the case's weights, stepped by its DDIMScheduler as its pipeline does."""
    try:
        import diffusers
    except ImportError as error:
        raise UnavailableError("diffusers is not installed (pip install diffusers)") from error
    import torch

    from convert.engine import ConversionError
    from convert.families.diffusers import rules
    from convert.families.diffusers_config import unet_json

    diffusers.utils.logging.set_verbosity_error()
    try:
        settings = unet_json(case.config)
    except ConversionError as error:
        raise UnavailableError(f"diffusers has no such UNet: {error}") from error
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet = with_weights(diffusers.UNet2DModel.from_config(settings), rules(case.config), case, device)
    unet.to(memory_format=layout)
    network = compiled(unet, device) if compile else unet

    def denoise(x: Any, t: Any) -> Any:
        return network(x, t).sample

    if case.precision == "bfloat16":
        denoise = in_bfloat16(denoise)

    scheduler: Any = diffusers.DDIMScheduler(
        num_train_timesteps=case.schedule.num_train_timesteps,
        trained_betas=noise_schedule(case.schedule).betas,
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
        with torch.inference_mode(), tf32(case):
            for t in scheduler.timesteps:
                x = scheduler.step(denoise(x, t), t, x, eta=0.0).prev_sample
        finish(device)
        return x

    return or_unavailable(sample) if compile else sample


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
    "diffusers-compile": Contestant(
        "diffusers, compiled",
        lambda case, device: build_diffusers(case, device, channels_last=device == "gpu", compile=True),
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


def torch_dtype(case: Case) -> Any:
    """The dtype of torch's weights."""
    import torch

    return torch.bfloat16 if case.precision == "bfloat16" else torch.float32


def in_bfloat16(denoise: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A denoiser that computes in bfloat16, for a loop in float32."""
    return lambda x, t: denoise(x.bfloat16(), t).float()


@contextlib.contextmanager
def tf32(case: Case) -> Iterator[None]:
    """Products in TF32 or not, as the case says."""
    import torch

    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for backend in backends:
        backend.allow_tf32 = case.precision == "tf32"
    try:
        yield
    finally:
        for backend in backends:
            backend.allow_tf32 = False


def torch_device(device: str) -> str:
    """A device kind under torch's name."""
    return "cuda" if device == "gpu" else "cpu"


def finish(device: str) -> None:
    """Wait for what torch has queued on a GPU; on CPU it queues nothing."""
    if device == "gpu":
        import torch

        torch.cuda.synchronize()


def one_line(error: BaseException) -> str:
    """An exception's class and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
