"""What scripts/bench.py times: the networks, and each contestant's way to sample them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim.config import AutoencoderConfig, DiTConfig, ScheduleConfig, UNetConfig, from_json, to_json
from jddim.schedule import noise_schedule

MNIST_SOURCE = Path(__file__).resolve().parent / "assets" / "mnist-ddpm"
CIFAR10 = UNetConfig(image_size=(32, 32))  # ch 128, mult 1,2,2,2, 2 blocks, attention at 16x16: Ho et al.'s
# Of pictures of 256x256, as diffusers has it; the first stage of Stable Diffusion, its decoder alone.
DIT_S_2 = DiTConfig((32, 32), channels=384, depth=12, num_heads=6, num_classes=1001, frequency_shift=1.0)
DIT_S_2 = dataclasses.replace(DIT_S_2, mlp_norm_epsilon=1e-5)
VAE = AutoencoderConfig((256, 256))
CONFIGS: dict[str, type[UNetConfig | DiTConfig | AutoencoderConfig]] = {
    "unet": UNetConfig,
    "dit": DiTConfig,
    "autoencoder": AutoencoderConfig,
}


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
    "dit-s-2": Size("DiT-S/2 for 256x256, random weights", {"cpu": (8,), "gpu": (256,)}, {"cpu": 4, "gpu": 10}),
    "vae": Size("AutoencoderKL's decoder, 256x256, random weights", {"cpu": (1,), "gpu": (16,)}, {"cpu": 1, "gpu": 1}),
}
DEFAULT = ("mnist", "cifar10")

PRECISIONS = ("float32", "tf32", "bfloat16")
"""What networks compute in: float32 throughout, its products in TF32 (GPUs), or bfloat16 within a float32 sampler."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What all contestants sample. params: the weights under jddim's names and in its layout.

    timesteps: int64 `(S,)`, descending. x_T: float32 `(b, h, w, c)`; of a first stage z, which is decoded once.
    precision: of PRECISIONS.
    """

    size: str
    config: UNetConfig | DiTConfig | AutoencoderConfig
    params: Mapping[str, NDArray[np.float32]]
    schedule: ScheduleConfig
    timesteps: NDArray[np.int64]
    x_T: NDArray[np.float32]
    precision: str = "float32"

    def save(self, path: Path) -> None:
        """Write to an `.npz` for a process of its own."""
        facts = {"size": self.size, "config": to_json(self.config), "schedule": to_json(self.schedule)}
        facts |= {
            "precision": self.precision,
            "kind": next(k for k, c in CONFIGS.items() if isinstance(self.config, c)),
        }
        arrays: dict[str, Any] = {f"params/{name}": value for name, value in self.params.items()}
        np.savez(path, facts=np.array(json.dumps(facts)), timesteps=self.timesteps, x_T=self.x_T, **arrays)

    @classmethod
    def load(cls, path: Path) -> Case:
        """The inverse of `save`."""
        with np.load(path) as file:
            facts = json.loads(str(file["facts"]))
            params = {name[7:]: file[name] for name in file.files if name.startswith("params/")}
            schedule = from_json(ScheduleConfig, facts["schedule"])
            config = from_json(CONFIGS[facts["kind"]], facts["config"])
            return cls(facts["size"], config, params, schedule, file["timesteps"], file["x_T"], facts["precision"])

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """A class for each image, of a network that takes some."""
        if not isinstance(self.config, DiTConfig):
            return None
        return np.arange(len(self.x_T)) * 97 % 1000


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
        config: Any = {"cifar10": CIFAR10, "dit-s-2": DIT_S_2, "vae": VAE}[size]
        schedule = ScheduleConfig("linear", 1000, 1e-4, 0.02)
        params = random_params(config)
    shape = (batch, *config.image_size, config.in_channels)
    if isinstance(config, AutoencoderConfig):
        side = config.latent_size(config.image_size)
        shape = (batch, *side, config.latent_channels)
    x_T = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    return Case(size, config, params, schedule, spaced(schedule.num_train_timesteps, steps), x_T, precision)


def spaced(T: int, steps: int) -> NDArray[np.int64]:
    """The timesteps of a case, descending: multiples of T // S, the one spacing that all contestants have."""
    return (np.arange(steps, dtype=np.int64) * (T // steps))[::-1].copy()


def random_params(config: Any, seed: int = 0) -> dict[str, NDArray[np.float32]]:
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
    """`DDIM.sample`, or `DDIM.decode`: the public entries."""
    import jax
    import jax.numpy as jnp

    from jddim.config import SamplerConfig
    from jddim.models.building import build_model
    from jddim.pipeline import DDIM

    on = jax.devices(device)[0]
    half = case.precision == "bfloat16"
    precision = "tensorfloat32" if case.precision == "tf32" else "highest"  # what CPUs and bfloat16 have either way
    with jax.default_device(on):
        model: Any = build_model(case.config, case.params, jnp.bfloat16 if half else jnp.float32)
        x_T = jax.device_put(case.x_T, on)
    sampler = SamplerConfig(variance="learned_range" if isinstance(case.config, DiTConfig) else "fixed_small")
    ddim = DDIM(model, noise_schedule(case.schedule), sampler)
    if decodes := isinstance(case.config, AutoencoderConfig):
        ddim = dataclasses.replace(ddim, autoencoder=model)
    how: Any = {"eta": 0.0, "clip": True, "progress": False, "labels": case.labels}

    def sample() -> Any:
        with jax.default_device(on), jax.default_matmul_precision(precision):
            if decodes:
                return ddim.decode(x_T, decode_batch=len(x_T)).block_until_ready()
            return ddim.sample(x_T=x_T, spacing=case.timesteps, **how).block_until_ready()

    return sample


def torch_reference(case: Case, device: str) -> Any:
    """The PyTorch reference with the case's weights, on the device."""
    from convert.families import autoencoder, diffusers_dit, ho

    if isinstance(case.config, AutoencoderConfig):
        module, rules = (of(case.config, compvis=True) for of in (autoencoder.reference, autoencoder.rules))
        return with_weights(module, rules, case, device)
    family: Any = diffusers_dit if isinstance(case.config, DiTConfig) else ho
    return with_weights(family.reference(case.config), family.rules(case.config), case, device)


def with_weights(model: Any, rules: Any, case: Case, device: str) -> Any:
    """A PyTorch module with the case's weights, by a family's rename table, on the device."""
    import torch

    from convert.engine import source_tensors

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # diffusers' DiT has copies of the first block's embedders in the others.
    first = {name: re.sub(r"(transformer_blocks\.)\d+(\.norm1\.emb\.)", r"\g<1>0\2", name) for name in shapes}
    own = {name: shape for name, shape in shapes.items() if first[name] == name}
    tensors = source_tensors(case.params, rules, own)
    tensors = {name: tensors[first[name]] for name in shapes}
    state = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False).to(torch_device(device), torch_dtype(case))


def as_denoiser(case: Case, network: Any, device: str) -> Callable[[Any, Any], Any]:
    """A torch network of the case's, labels given and a learned variance left out."""
    import torch

    if case.labels is None:
        return lambda x, t: sample_of(network(x, t))
    labels, half = torch.from_numpy(case.labels).to(torch_device(device)), case.x_T.shape[-1]
    return lambda x, t: sample_of(network(x, t.expand(len(x)).to(x.device), labels))[:, :half]


def torch_decoder(case: Case, decode: Callable[[Any], Any], device: str, *, channels_last: bool) -> Sampler:
    """The case's z as images, by a torch first stage's `decode`."""
    import torch

    assert isinstance(case.config, AutoencoderConfig)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.from_numpy(nchw(case.x_T)) / case.config.scaling_factor + case.config.shift_factor
    z = z.to(torch_device(device), torch_dtype(case), memory_format=layout)

    def sample() -> Any:
        with torch.inference_mode(), tf32(case):
            images = sample_of(decode(z)).float()
        finish(device)
        return images

    return sample


def sample_of(output: Any) -> Any:
    """The tensor of diffusers' outputs, or what is one already."""
    return getattr(output, "sample", output)


def decoder_of(model: Any) -> Callable[[Any], Any]:
    """The PyTorch reference's way back, z to images."""

    def decode(z: Any) -> Any:
        *_, (_, images) = model.decoded(z)
        return images

    return decode


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
    if isinstance(case.config, AutoencoderConfig):
        return torch_decoder(case, decoder_of(model), device, channels_last=channels_last)
    return torch_sampler(case, as_denoiser(case, model, device), device, channels_last=channels_last)


def compiled(model: Any, device: str) -> Any:
    """A network, or a method of one, compiled for one batch size: on CPU with constant weights, on GPU in graphs."""
    import torch
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()  # another batch size in the same process would make it compile for any, which is slower
    torch._inductor.config.freezing = device == "cpu"
    if device == "cpu":
        return torch.compile(model, dynamic=False)
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
    """The PyTorch reference's network under torch.compile."""
    import torch

    model, last = torch_reference(case, device), device == "gpu"
    if last:
        model = model.to(memory_format=torch.channels_last)
    if isinstance(case.config, AutoencoderConfig):
        return or_unavailable(torch_decoder(case, compiled(decoder_of(model), device), device, channels_last=last))
    denoise = as_denoiser(case, compiled(model, device), device)
    return or_unavailable(torch_sampler(case, denoise, device, channels_last=last))


def build_diffusers(case: Case, device: str, *, channels_last: bool, compile: bool = False) -> Sampler:
    """The network of diffusers with the case's weights, stepped by its DDIMScheduler as its pipelines do."""
    try:
        import diffusers
    except ImportError as error:
        raise UnavailableError("diffusers is not installed (pip install diffusers)") from error
    import torch

    diffusers.utils.logging.set_verbosity_error()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module, rules = diffusers_network(case, diffusers)
    model = with_weights(module, rules, case, device)
    model.to(memory_format=layout)
    if isinstance(case.config, AutoencoderConfig):
        decode = compiled(model.decode, device) if compile else model.decode
        sampler = torch_decoder(case, decode, device, channels_last=channels_last)
        return or_unavailable(sampler) if compile else sampler
    denoise = as_denoiser(case, compiled(model, device) if compile else model, device)
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


def diffusers_network(case: Case, diffusers: Any) -> tuple[Any, Any]:
    """(Its network of the case's config, the rename table of its tensors)."""
    from convert.engine import ConversionError
    from convert.families import autoencoder, diffusers_dit
    from convert.families import diffusers as of_unet
    from convert.families.diffusers_config import unet_json

    config = case.config
    if isinstance(config, AutoencoderConfig):
        kind = diffusers.AutoencoderKL.from_config(autoencoder.config_json(config))
        return kind, autoencoder.rules(config, compvis=False)
    if isinstance(config, DiTConfig):
        assert config.num_classes is not None
        kind = diffusers.DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.channels // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.image_size[0],
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes - 1,
        )
        return kind, diffusers_dit.rules(config)
    try:
        settings = unet_json(config)
    except ConversionError as error:
        raise UnavailableError(f"diffusers has no such UNet: {error}") from error
    return diffusers.UNet2DModel.from_config(settings), of_unet.rules(config)


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
