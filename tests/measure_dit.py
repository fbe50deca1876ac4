"""How far facebookresearch's DiT and diffusers' are apart on the same weights: the table of docs/dit.md.

    python tests/measure_dit.py

A DiT-S/2 of 256x256 pictures, every weight redrawn, so that nothing is 0. Both are jddim's networks, which equal their
sources' (tests/parity): what differs is the frequency shift of t, the epsilon before the MLPs, and guidance's channels.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jddim.config import DiTConfig, SamplerConfig
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.models.layers import timestep_embedding
from jddim.pipeline import DDIM
from jddim.schedule import linear_schedule

SOURCE = DiTConfig((32, 32), channels=384, depth=12, num_heads=6, num_classes=1001)
T, NUM, STEPS, SCALE = (1, 100, 500, 999), 2, 50, 4.0


def redrawn(config: DiTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor random, as large as keeps its input so; biases about 0."""
    rng, params = np.random.default_rng(seed), {}
    for name, leaf in flat_params(abstract_model(config)).items():
        scale = 0.2 if name.endswith("bias") else np.prod(leaf.shape[:-1]) ** -0.5
        params[name] = (scale * rng.standard_normal(leaf.shape)).astype(np.float32)
    return params


def apart(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> str:
    """The Euclidean norm of the difference over that of the first."""
    return f"{100 * np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(a)):.2g}%"


def main() -> None:
    """Print the figures."""
    params, rng = redrawn(SOURCE), np.random.default_rng(1)
    x = rng.standard_normal((NUM, 32, 32, 4)).astype(np.float32)
    labels = np.array([207, 360])
    changes = {"frequency_shift": {"frequency_shift": 1.0}, "epsilon": {"mlp_norm_epsilon": 1e-5}}
    changes["both"] = changes["frequency_shift"] | changes["epsilon"]
    model = build_model(SOURCE, params)
    others = {name: build_model(dataclasses.replace(SOURCE, **change), params) for name, change in changes.items()}
    run = jax.jit(lambda model, t: model(x, t, labels))
    for t in T:
        waves = [
            timestep_embedding(np.array([t]), 256, cosine_first=True, divide_last=True, shift=shift) for shift in (0, 1)
        ]
        eps = run(model, t)[..., :4]
        found = {name: apart(eps, run(other, t)[..., :4]) for name, other in others.items()}
        print(f"t {t}: sinusoid {apart(*waves)}, eps {found}")
    ends = {}
    for name, network, channels in (
        ("facebookresearch", model, 3),
        ("facebookresearch, 4 channels", model, 4),
        ("diffusers", others["both"], 4),
    ):
        sampler = SamplerConfig(spacing="leading", num_steps=STEPS, clip=False, variance="learned_range")
        ddim = DDIM(network, linear_schedule(), sampler)
        ends[name] = ddim.sample(x_T=x, labels=labels)
        guided = {"guidance_scale": SCALE, "null_label": 1000, "guidance_channels": channels}
        ends[f"{name}, guided"] = ddim.sample(x_T=x, labels=labels, **guided)
    for first, second in (
        ("facebookresearch", "diffusers"),
        ("facebookresearch, guided", "diffusers, guided"),
        ("facebookresearch, guided", "facebookresearch, 4 channels, guided"),
    ):
        print(f"latents, {first} and {second}: {apart(ends[first], ends[second])}")


if __name__ == "__main__":
    main()
