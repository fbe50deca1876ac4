"""Published checkpoints: what they are, where they are from, and what their papers measured."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published checkpoint, as its source describes it. What is not stated there is None or empty.

    name: what `jddim.load` takes: a hub id, or a name for a file that is downloaded by hand. family: of
    `jddim convert`. image_size: the side, in pixels. classes: 0 where there are none. licence: the one that the source
    states. schedule, train_timesteps, prediction, variance: what it was trained with (Palette's: what its source
    samples by), and the variance of its ancestral sampler, as in `jddim.ScheduleConfig` and `jddim.SamplerConfig`.
    fid: what `fid_from` reports, of its own sampler.
    file, origin: of one that is no hub id: the file's name, and who publishes it. options: `jddim convert`'s for it.
    Schedules "flow" and "edm" have no train_timesteps.
    """

    name: str
    family: str
    image_size: int
    classes: int
    licence: str
    schedule: str = "linear"
    train_timesteps: int = 1000
    prediction: str = "epsilon"
    variance: str = ""
    fid: float | None = None
    fid_from: str = ""
    file: str = ""
    origin: str = ""
    options: str = ""

    @property
    def advice(self) -> str:
        """How to come by it; "" for a hub id, which is fetched by itself."""
        if not self.file:
            return ""
        return (
            f"{self.name} is downloaded by hand: {self.file}, of {self.origin}; then jddim convert {self.file} DST "
            f"{self.options}, and name DST in place of {self.name}"
        )


_DDPM, _PESSER = "arXiv:2006.11239", "pesser/pytorch_diffusion"
_ADM, _IDDPM = "openai/guided-diffusion", "openai/improved-diffusion"


def _hub(name: str, variance: str = "", fid: float | None = None, image_size: int = 256) -> Preset:
    """Of Google's: licence and scheduler_config.json as in the hub's repositories."""
    own = Preset(f"google/{name}", "diffusers", image_size, 0, "apache-2.0", variance=variance)
    return dataclasses.replace(own, fid=fid, fid_from=_DDPM if fid else "")


def _ho(preset: str, image_size: int, folder: str, step: int, fid: float, fid_from: str) -> Preset:
    return Preset(
        *(preset, "ho", image_size, 0, "MIT"),
        variance="fixed_large" if preset == "cifar10" else "fixed_small",
        fid=fid,
        fid_from=fid_from,
        file=f"{folder}/model-{step}.ckpt",
        origin=_PESSER,
        options=f"--preset {preset}",
    )


def _openai(
    name: str,
    file: str,
    image_size: int,
    classes: int = 0,
    fid: float | None = None,
    fid_from: str = "",
    *,
    preset: str = "",
    trained: tuple[str, int] = ("linear", 1000),
) -> Preset:
    return Preset(
        *(name, "openai", image_size, classes, "MIT", *trained),
        variance="learned_range",
        fid=fid,
        fid_from=fid_from,
        file=file,
        origin=_ADM if name.startswith("guided") else _IDDPM,
        options=f"--preset {preset or name}",
    )


def _palette(preset: str, epoch: int) -> Preset:
    """Of which the README publishes the weights."""
    return Preset(
        *(preset, "palette", 256, 0, "MIT"),
        variance="fixed_small",
        file=f"{epoch}_Network.pth",
        origin="Janspiry/Palette-Image-to-Image-Diffusion-Models",
        options=f"--preset {preset}",
    )


def _dit(name: str, image_size: int, fid: float | None = None) -> Preset:
    """Of pictures of this size, 8 times its latents'; diffusers' on the hub, and facebookresearch's files."""
    own = Preset(name, "diffusers_dit", image_size, 1000, "cc-by-nc-4.0", variance="learned_range")
    if fid is None:
        return own
    return dataclasses.replace(
        own,
        family="dit",
        fid=fid,
        fid_from="facebookresearch/DiT's README, with guidance",
        file=f"DiT-XL-2-{image_size}x{image_size}.pt",
        origin="facebookresearch/DiT",
        options=f"--preset DiT-XL/2-{image_size}",
    )


def _edm(name: str, image_size: int, classes: int, fid: float) -> Preset:
    """A snapshot of NVIDIA's, which holds the EMA alone."""
    return Preset(
        *(f"edm-{name}", "edm", image_size, classes, "cc-by-nc-sa-4.0", "edm", 0, "edm"),
        fid=fid,
        fid_from="NVlabs/edm's example.py, by Heun's method",
        file=f"edm-{name}.pkl",
        origin="NVlabs/edm",
        options="--weights ema",
    )


def _consistency(file: str, preset: str, image_size: int, classes: int = 0) -> Preset:
    """One step from noise, or an EDM network."""
    return Preset(
        *(
            file.removesuffix(".pt").replace("_", "-"),
            "consistency",
            image_size,
            classes,
            "MIT",
            "edm",
            0,
            "edm",
        ),
        file=file,
        origin="openai/consistency_models",
        options=f"--preset {preset}",
    )


_GUIDED = f"{_ADM}'s README, with its classifier"
_UNGUIDED = f"{_ADM}'s README"
_HYBRID, _IMPROVED = "arXiv:2102.09672", ("cosine", 4000)

presets: tuple[Preset, ...] = (
    _hub("ddpm-cifar10-32", "fixed_large", 3.17, 32),
    _hub("ddpm-bedroom-256"),
    _hub("ddpm-cat-256", "fixed_small"),
    _hub("ddpm-celebahq-256"),
    _hub("ddpm-church-256", "fixed_small"),
    _hub("ddpm-ema-bedroom-256", "fixed_small", 6.36),
    _hub("ddpm-ema-cat-256", "", 19.75),
    _hub("ddpm-ema-celebahq-256"),
    _hub("ddpm-ema-church-256", "", 7.89),
    _ho("cifar10", 32, "ema_diffusion_cifar10_model", 790000, 3.21, f"{_PESSER}'s README"),
    _ho("lsun_bedroom", 256, "ema_diffusion_lsun_bedroom_model", 2388000, 6.36, _DDPM),
    _ho("lsun_cat", 256, "ema_diffusion_lsun_cat_model", 1761000, 19.75, _DDPM),
    _ho("lsun_church", 256, "ema_diffusion_lsun_church_model", 4432000, 7.89, _DDPM),
    Preset(
        *("ddim-celeba-64", "ho", 64, 0, "MIT"),
        variance="fixed_large",
        file="ckpt.pth",
        origin="ermongroup/ddim, whose configs/celeba.yml goes with it",
        options="--config celeba.yml",
    ),
    _openai("guided-64", "64x64_diffusion.pt", 64, 1000, 2.07, _UNGUIDED, trained=("cosine", 1000)),
    _openai("guided-128", "128x128_diffusion.pt", 128, 1000, 2.97, _GUIDED),
    _openai("guided-256", "256x256_diffusion.pt", 256, 1000, 4.59, _GUIDED),
    _openai("guided-256-uncond", "256x256_diffusion_uncond.pt", 256),
    _openai("guided-512", "512x512_diffusion.pt", 512, 1000, 7.72, _GUIDED),
    _openai("guided-64-256-upsampler", "64_256_upsampler.pt", 256, 1000),
    _openai("guided-128-512-upsampler", "128_512_upsampler.pt", 512, 1000),
    _openai("guided-lsun-bedroom", "lsun_bedroom.pt", 256, 0, 1.90, _UNGUIDED, preset="guided-lsun"),
    _openai("guided-lsun-cat", "lsun_cat.pt", 256, 0, 5.57, _UNGUIDED, preset="guided-lsun"),
    _openai("guided-lsun-horse", "lsun_horse.pt", 256, 0, 2.57, _UNGUIDED, preset="guided-lsun"),
    _openai("improved-cifar10", "cifar10_uncond_50M_500K.pt", 32, 0, 3.19, _HYBRID, trained=_IMPROVED),
    _openai("improved-cifar10-vlb", "cifar10_uncond_vlb_50M_500K.pt", 32, trained=_IMPROVED),
    _openai("improved-imagenet64-uncond", "imagenet64_uncond_100M_1500K.pt", 64, 0, 19.2, _HYBRID, trained=_IMPROVED),
    _openai("improved-imagenet64-uncond-vlb", "imagenet64_uncond_vlb_100M_1500K.pt", 64, trained=_IMPROVED),
    _openai("improved-imagenet64-cond", "imagenet64_cond_270M_250K.pt", 64, 1000, trained=_IMPROVED),
    _openai("improved-lsun-bedroom", "lsun_uncond_100M_2400K_bs64.pt", 256),
    _palette("inpainting_celebahq", 200),
    _palette("inpainting_places2", 16),
    Preset(
        *("CompVis/ldm-celebahq-256", "diffusers", 256, 0, "apache-2.0", "scaled_linear"),
        fid=5.11,
        fid_from="arXiv:2112.10752",
    ),
    _dit("facebook/DiT-XL-2-256", 256),
    _dit("facebook/DiT-XL-2-512", 512),
    _dit("dit-xl-2-256", 256, 2.27),
    _dit("dit-xl-2-512", 512, 3.04),
    Preset(
        *("sit-xl-2-256", "dit", 256, 1000, "MIT", "flow", 0, "velocity"),
        fid=2.06,
        fid_from="willisma/SiT's README, with guidance, by its SDE",
        file="SiT-XL-2-256.pt",
        origin="willisma/SiT",
        options="--preset SiT-XL/2-256",
    ),
    _edm("cifar10-32x32-cond-vp", 32, 10, 1.79),
    _edm("ffhq-64x64-uncond-vp", 64, 0, 2.39),
    _edm("afhqv2-64x64-uncond-vp", 64, 0, 1.96),
    _edm("imagenet-64x64-cond-adm", 64, 1000, 1.36),
    _consistency("edm_imagenet64_ema.pt", "edm_imagenet64", 64, 1000),
    _consistency("cd_imagenet64_l2.pt", "cd_imagenet64", 64, 1000),
    _consistency("cd_imagenet64_lpips.pt", "cd_imagenet64", 64, 1000),
    _consistency("ct_imagenet64.pt", "ct_imagenet64", 64, 1000),
    *(
        _consistency(f"{kind.format(data)}.pt", f"{kind.partition('_')[0]}_lsun256", 256)
        for data in ("bedroom256", "cat256")
        for kind in ("edm_{}_ema", "cd_{}_l2", "cd_{}_lpips", "ct_{}")
    ),
)
"""The published checkpoints that jddim knows of; `jddim list` prints them."""


def published(name: str) -> Preset | None:
    """The published checkpoint of that name."""
    return next((each for each in presets if each.name == name), None)
