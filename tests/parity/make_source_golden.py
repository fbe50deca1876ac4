"""Writes golden/SOURCE.npz from a source's own code: `source_cases` says what is in it.

    python tests/parity/make_source_golden.py pytorch_ddpm CHECKOUT    # w86763777/pytorch-ddpm at f804ccb
    python tests/parity/make_source_golden.py monai CHECKOUT CHECKOUT  # MONAI at d388d1c, GenerativeModels at 7428fce
    python tests/parity/make_source_golden.py openai CHECKOUT CHECKOUT    # CompVis/latent-diffusion at a506df5,
                                                                          # openai/guided-diffusion at 22e0df8
    python tests/parity/make_source_golden.py palette CHECKOUT            # Janspiry/Palette-... at 136b29f
    python tests/parity/make_source_golden.py openai_classifier CHECKOUT  # openai/guided-diffusion at 22e0df8
    python tests/parity/make_source_golden.py dit CHECKOUT CHECKOUT       # facebookresearch/DiT at ed81ce2,
                                                                          # willisma/SiT at 947f95b (and torchdiffeq)
    python tests/parity/make_source_golden.py consistency CHECKOUT  # openai/consistency_models at e32b69e
    python tests/parity/make_source_golden.py edm CHECKOUT                # NVlabs/edm at 008a4e5
    python tests/parity/make_source_golden.py score_sde CHECKOUT          # yang-song/score_sde_pytorch at cb1f359
    python tests/parity/make_source_golden.py lucidrains CHECKOUT         # lucidrains/denoising-... at faed4db (2.3.1)

CHECKOUT: the source's files, whose own requirements have to be there. Needs to be run again only if a case changes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from source_cases import (
    CFG_SCALE,
    CLASSES,
    DIFFUSION,
    ETA,
    GOLDEN,
    GUIDED,
    INPAINTER,
    OBJECTIVES,
    SCALE,
    SDE_TIMES,
    SOURCES,
    STEPS,
    UPSAMPLER,
    VISITED,
    SourceCase,
    drawn,
    images,
    mask_of,
)

NOT_OF_THE_SCHEDULER = ("image_size", "num_head_channels", "norm_num_groups")


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x.numpy(), -3, -1)) if x.ndim > 2 else x.numpy()


def redrawn(network: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network with every tensor drawn, and its tensors' shapes."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict({name: torch.tensor(drawn(name, shape)) for name, shape in shapes.items()})
    return network.eval().requires_grad_(False), shapes


def pytorch_ddpm(name: str, case: SourceCase) -> dict[str, Any]:
    from diffusion import GaussianDiffusionSampler
    from model import UNet

    network, shapes = redrawn(UNet(**case.network))
    found = {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t))}
    if name == "one block":
        T = case.network["T"]
        betas = float(case.settings["beta_1"]), float(case.settings["beta_T"])
        for var_type in ("fixedlarge", "fixedsmall"):
            sampler = GaussianDiffusionSampler(network, *betas, T, mean_type="epsilon", var_type=var_type)
            noise = iter(nchw(images(case, T, 2, seed=3)))
            torch.randn_like = lambda x, noise=noise: next(noise)
            torch.clip = lambda x, *limits: x  # of the result alone: an untrained network's is far outside
            found[var_type] = sampler(nchw(images(case, 2, seed=2)))
    return found


def monai(name: str, case: SourceCase) -> dict[str, Any]:
    if name == "Generative":
        from generative.networks.nets import DiffusionModelUNet
        from generative.networks.schedulers import DDIMScheduler
    else:
        from monai.networks.nets import DiffusionModelUNet
        from monai.networks.schedulers import DDIMScheduler

    network, shapes = redrawn(DiffusionModelUNet(**case.network))
    labels = None if case.labels is None else torch.tensor(case.labels)
    x_t = nchw(images(case, len(case.t), seed=1))
    found = {"shapes": shapes, "eps": network(x_t, torch.tensor(case.t), class_labels=labels)}
    if labels is not None:
        told = {key: yaml.safe_load(value) for key, value in case.settings.items() if key not in NOT_OF_THE_SCHEDULER}
        scheduler = DDIMScheduler(**told)
        scheduler.set_timesteps(STEPS)
        noise = iter(nchw(images(case, STEPS, len(labels), seed=3)))
        torch.randn = lambda *shape, noise=noise, **options: next(noise)
        x = nchw(images(case, len(labels), seed=2))
        for t in scheduler.timesteps:
            output = network(x, t.expand(len(labels)), class_labels=labels)
            x, _ = scheduler.step(output, int(t), x, eta=ETA)
        found["DDIM"] = x
    return found


def openai(name: str, case: SourceCase) -> dict[str, Any]:
    return super_resolution(case) if name == UPSAMPLER else latent_diffusion(case)


def super_resolution(case: SourceCase) -> dict[str, Any]:
    from guided_diffusion.script_util import create_gaussian_diffusion
    from guided_diffusion.unet import SuperResModel

    network, shapes = redrawn(SuperResModel(**case.network))
    x_t, labels = nchw(images(case, len(case.t), seed=1)), torch.tensor(case.labels)
    found = {"shapes": shapes, "eps": network(x_t[:, :3], torch.tensor(case.t), low_res=x_t[:, 3:], y=labels)}
    told = {key: case.settings[key] for key in ("noise_schedule", "timestep_respacing")}
    diffusion = create_gaussian_diffusion(steps=int(case.settings["diffusion_steps"]), learn_sigma=True, **told)
    x_T, beside = nchw(images(case, 2, seed=2)).chunk(2, dim=1)
    how = {"noise": x_T, "device": "cpu", "model_kwargs": {"low_res": beside[:, :, ::2, ::2], "y": labels}}
    for run, loop in (
        ("ancestral", partial(diffusion.p_sample_loop, **how)),
        ("DDIM, eta 0", partial(diffusion.ddim_sample_loop, **how, eta=0.0)),
        ("DDIM", partial(diffusion.ddim_sample_loop, **how, eta=ETA)),
    ):
        noise = iter(nchw(images(case, diffusion.num_timesteps, 2, seed=3)[..., :3]))
        torch.randn_like = lambda x, noise=noise: next(noise)
        found[run] = loop(network, x_T.shape)
    return found


def latent_diffusion(case: SourceCase) -> dict[str, Any]:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    network, shapes = redrawn(UNetModel(**case.network))
    return {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t))}


def palette(name: str, case: SourceCase) -> dict[str, Any]:
    from models.network import Network

    beta_schedule = {key: yaml.safe_load(case.settings[key]) for key in ("schedule", "n_timestep")}
    beta_schedule |= {key: float(case.settings[key]) for key in ("linear_start", "linear_end")}
    whole = Network(case.network, {"test": beta_schedule}, "guided_diffusion")
    whole.set_new_noise_schedule(torch.device("cpu"), "test")
    network, shapes = redrawn(whole.denoise_fn)
    levels = whole.gammas[list(case.t)]
    found = {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), levels)}
    beside, x_T = nchw(images(case, 2, seed=2)).chunk(2, dim=1)
    mask, y_0 = nchw(np.broadcast_to(mask_of(case), (2, *case.size, 1))), beside.clamp(-1, 1)
    masked = y_0 * (1 - mask) + mask * x_T
    for run, condition, options in (
        ("restoration", beside, {"y_t": x_T}),
        *([("inpainting", masked, {"y_t": masked, "y_0": y_0, "mask": mask})] if name == INPAINTER else []),
    ):
        noise = iter(nchw(images(case, beta_schedule["n_timestep"], 2, seed=3)[..., : x_T.shape[1]]))
        torch.randn_like = lambda x, noise=noise: next(noise)
        found[run], _ = whole.restoration(condition, **options)
    return found


def classifier(name: str, case: SourceCase) -> dict[str, Any]:
    """And DDIM's loop with condition_score, of networks that take labels and that take none."""
    from guided_diffusion.script_util import create_gaussian_diffusion
    from guided_diffusion.unet import EncoderUNetModel, UNetModel

    network, shapes = redrawn(EncoderUNetModel(**case.network))
    found = {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t))}
    if not name.startswith("attention"):
        return found
    network.requires_grad_(True)  # which the source's checkpointing asks for
    labels, diffusion = torch.tensor(CLASSES), create_gaussian_diffusion(**DIFFUSION)

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = network(x, t).log_softmax(dim=1)
            return SCALE * torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]

    for classes in (None, 7):
        unet, found[f"{classes} classes/shapes"] = redrawn(UNetModel(**GUIDED, num_classes=classes))
        model = lambda x, t, y, unet=unet: unet(x, t, y if unet.num_classes else None)  # noqa: E731
        for eta in (0.0, ETA):
            noise = iter(nchw(images(case, diffusion.num_timesteps, len(CLASSES), seed=3)))
            torch.randn_like = lambda x, noise=noise: next(noise)
            x_T = nchw(images(case, len(CLASSES), seed=2))
            options = {"noise": x_T, "cond_fn": cond_fn, "model_kwargs": {"y": labels}, "device": "cpu", "eta": eta}
            found[f"{classes} classes/{eta}"] = diffusion.ddim_sample_loop(model, x_T.shape, **options)
    return found


def dit(name: str, case: SourceCase) -> dict[str, Any]:
    """The network, whose positions stay as they are; its loops, a SiT's ODE, guided as sample.py does it and not."""
    checkout = Path(sys.path[0 if name == "DiT" else 1])
    spec = importlib.util.spec_from_file_location(name, checkout / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    network = getattr(models, name)(**case.network)
    fixed = network.pos_embed.clone()
    network, shapes = redrawn(network)
    network.pos_embed.copy_(fixed)
    del shapes["pos_embed"]
    x_t, t, labels = nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t), torch.tensor(case.labels)
    found = {"shapes": shapes, "eps": network(x_t, t, labels)}
    many = len(labels)
    x_T = nchw(images(case, many, seed=2))
    both = torch.cat([labels, torch.full_like(labels, case.network["num_classes"])])
    if name == "SiT":
        from transport import Sampler, create_transport

        ode = Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=STEPS + 1)
        found["ODE"] = ode(x_T, network, y=labels)[-1]
        guided = ode(torch.cat([x_T, x_T]), network.forward_with_cfg, y=both, cfg_scale=CFG_SCALE)[-1]
        found["ODE, guided"] = guided[:many]
        return found
    from diffusion import create_diffusion

    diffusion = create_diffusion(str(STEPS))
    for way, model, start, given in (
        ("", network, x_T, {"y": labels}),
        (", guided", network.forward_with_cfg, torch.cat([x_T, x_T]), {"y": both, "cfg_scale": CFG_SCALE}),
    ):
        how = {"noise": start, "clip_denoised": False, "model_kwargs": given, "device": "cpu"}
        for run, loop in (
            ("ancestral", partial(diffusion.p_sample_loop, **how)),
            ("DDIM, eta 0", partial(diffusion.ddim_sample_loop, **how, eta=0.0)),
            ("DDIM", partial(diffusion.ddim_sample_loop, **how, eta=ETA)),
        ):
            noise = iter(nchw(images(case, STEPS, many, seed=3)))
            torch.randn_like = lambda x, noise=noise: next(noise).repeat(len(x) // many, 1, 1, 1)
            found[run + way] = loop(model, start.shape)[:many]
    return found


class SlowAttention(torch.nn.Module):
    """What flash attention computes, which is of GPUs and float16 alone: qkv `(b, pixels, 3, heads, d)`."""

    def __init__(self, **options: Any):
        super().__init__()

    def forward(self, qkv: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None


class Noise:
    """The source's generator of noise: x_T, then a step's each."""

    def __init__(self, case: SourceCase, many: int):
        self.x_T, self.steps = nchw(images(case, many, seed=2)), iter(nchw(images(case, STEPS, many, seed=3)))

    def randn(self, *shape: int, **options: Any) -> torch.Tensor:
        return self.x_T

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.steps)


def consistency(name: str, case: SourceCase) -> dict[str, Any]:
    """The network, and runs of its samplers with their default settings."""
    sys.modules["flash_attn.flash_attention"] = types.ModuleType("flash_attention")
    sys.modules["flash_attn.flash_attention"].FlashAttention = SlowAttention
    from cm.karras_diffusion import KarrasDenoiser, karras_sample
    from cm.unet import UNetModel

    network, shapes = redrawn(UNetModel(**case.network))
    labels = {} if case.labels is None else {"y": torch.tensor(case.labels)}
    found = {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t), **labels)}
    ends = {key: float(case.settings[key]) for key in ("sigma_min", "sigma_max") if key in case.settings}
    diffusion = KarrasDenoiser(**ends, distillation=name != "edm", loss_norm="l2")
    for sampler in ("euler", "heun", "ancestral") if name == "edm" else ("onestep", "multistep"):
        many = len(case.labels or (0, 0))
        shape = (many, case.channels, *case.size)
        how = {"model_kwargs": labels, "generator": Noise(case, many), "ts": VISITED, **ends}
        found[sampler] = karras_sample(diffusion, network, shape, STEPS, sampler=sampler, **how)
    return found


def edm(name: str, case: SourceCase) -> dict[str, Any]:
    """The network, whose filters and frequencies stay as they are, and its sampler by Heun's method."""
    from generate import edm_sampler
    from training.networks import EDMPrecond

    torch.manual_seed(0)
    whole = EDMPrecond(**case.network)
    fixed = {key: value.clone() for key, value in whole.model.named_buffers()}
    network, shapes = redrawn(whole.model)
    network.load_state_dict(fixed, strict=False)
    labels = None if case.labels is None else torch.eye(case.network["label_dim"])[list(case.labels)]
    found = {"shapes": shapes, "fixed": {key: value.tolist() for key, value in fixed.items()}}
    found["eps"] = network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t), labels)
    x_T, drawn = (nchw(images(case, len(case.t), seed=2)), iter(images(case, STEPS, len(case.t), seed=3)))
    found["heun"] = edm_sampler(whole, x_T, labels, num_steps=STEPS).float()
    churn = {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    draw = lambda like: nchw(next(drawn)).to(like)  # noqa: E731
    found["churn"] = edm_sampler(whole, x_T, labels, draw, num_steps=STEPS, **churn).float()
    return found


def lucidrains(name: str, case: SourceCase) -> dict[str, Any]:
    """The network, for the null class too, and its two loops, guided by their defaults."""
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

    unet, shapes = redrawn(Unet(**case.network))
    x_t, t, labels = nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t), torch.tensor(case.labels)
    null = labels == case.network["num_classes"]
    given = unet(x_t, t, labels.where(~null, 0), cond_drop_prob=0.0)
    found = {"shapes": shapes, "eps": given.where(~null[:, None, None, None], unet(x_t, t, 0 * labels, 1.0))}
    labels, T = labels.where(~null, 1), int(case.settings["timesteps"])
    for objective in OBJECTIVES:
        for run, steps, eta in (("DDIM, eta 0", STEPS, 0.0), ("DDIM", STEPS, ETA), ("ancestral", T, 0.0)):
            told = {"timesteps": T, "sampling_timesteps": steps, "ddim_sampling_eta": eta, "objective": objective}
            diffusion = GaussianDiffusion(unet, image_size=case.size[0], **told)
            noise = iter(nchw(images(case, T, len(labels), seed=3)))
            torch.randn_like = lambda x, noise=noise: next(noise)
            x_T, real = nchw(images(case, len(labels), seed=2)), torch.randn
            torch.randn = lambda shape, x_T=x_T, **options: x_T
            loop = diffusion.p_sample_loop if run == "ancestral" else diffusion.ddim_sample
            found[f"{objective}, {run}"] = 2 * loop(labels, x_T.shape) - 1
            torch.randn = real
    return found


def score_sde(name: str, case: SourceCase) -> dict[str, Any]:
    """The network; runs of its ancestral predictor at whole timesteps, and of DDIM by its score function."""
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.load = lambda *args, **options: None  # of a GPU; on a CPU the source's own is in Python
    from models import ddpm, layerspp, ncsnpp, utils  # noqa: F401  # by which the classes get their names
    from sampling import AncestralSamplingPredictor
    from sde_lib import VPSDE

    told = {"num_scales": 1000, "beta_min": 0.1, "beta_max": 20.0, **case.network}
    fixed = {"sigma_min": 0.01, "sigma_max": 50, "dropout": 0.1, "resamp_with_conv": True, "conditional": True}
    fixed |= {"scale_by_sigma": False, "nonlinearity": "swish", "normalization": "GroupNorm", "init_scale": 0.0}
    fixed |= {"fir_kernel": [1, 3, 3, 1], "progressive": "none", "progressive_combine": "sum"}
    config = types.SimpleNamespace(
        model=types.SimpleNamespace(**fixed, **told, embedding_type="positional", fourier_scale=16),
        data=types.SimpleNamespace(image_size=told["image_size"], num_channels=told["num_channels"], centered=True),
        training=types.SimpleNamespace(continuous=told["continuous"]),
    )
    network, shapes = redrawn(utils.get_model(told["name"])(config))
    found = {"shapes": shapes, "eps": network(nchw(images(case, len(case.t), seed=1)), torch.tensor(case.t))}
    many, N = len(case.t), told["num_scales"]
    sde = VPSDE(told["beta_min"], told["beta_max"], N)
    score = utils.get_score_fn(sde, network, continuous=told["continuous"])
    whole = lambda k: torch.full((many,), (k + 1e-6) / (N - 1), dtype=torch.float64)  # noqa: E731  # it rounds down
    if not told["continuous"]:
        noise = iter(nchw(images(case, N, many, seed=3)))
        torch.randn_like = lambda x: next(noise)
        predictor, x = AncestralSamplingPredictor(sde, score), nchw(images(case, many, seed=2))
        for k in reversed(range(N)):
            x, mean = predictor.update_fn(x, whole(k))
        found["ancestral"] = mean
        levels = [(whole(k), sde.alphas_cumprod[k].double()) for k in SDE_TIMES]
    else:
        times = [torch.full((many,), t, dtype=torch.float64) for t in np.linspace(1, 1e-3, STEPS)]
        levels = [(t, sde.marginal_prob(torch.ones(many, 1, 1, 1), t)[0][0, 0, 0, 0] ** 2) for t in times]
    for run, eta in (("DDIM, eta 0", 0.0), ("DDIM", ETA)):
        x, noise = nchw(images(case, many, seed=2)).double(), iter(nchw(images(case, STEPS, many, seed=3)))
        for (t, alpha_bar), after in zip(levels, [*(level for _, level in levels[1:]), torch.tensor(1.0)], strict=True):
            std = (1 - alpha_bar).sqrt()
            eps = -score(x.float(), t.float() if told["continuous"] else t) * std
            x_0 = (x - std * eps) / alpha_bar.sqrt()
            sigma = eta * ((1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after)).sqrt()
            x = after.sqrt() * x_0 + (1 - after - sigma**2).clamp(min=0).sqrt() * eps + sigma * next(noise)
        found[run] = x.float()
    return found


MAKERS: dict[str, Callable[[str, SourceCase], dict[str, Any]]] = {
    "pytorch_ddpm": pytorch_ddpm,
    "openai": openai,
    "openai_classifier": classifier,
    "monai": monai,
    "palette": palette,
    "dit": dit,
    "consistency": consistency,
    "edm": edm,
    "score_sde": score_sde,
    "lucidrains": lucidrains,
}

if __name__ == "__main__":
    source, *checkouts = sys.argv[1:]
    sys.path[:0] = checkouts
    kept: dict[str, Any] = {}
    for name, case in SOURCES[source].items():
        for part, value in MAKERS[source](name, case).items():
            kept[f"{name}/{part}"] = nhwc(value.detach()) if isinstance(value, torch.Tensor) else json.dumps(value)
    path = GOLDEN / f"{source}.npz"
    np.savez_compressed(path, **kept)
    print(f"wrote {path.name}, {path.stat().st_size} bytes")
