"""The lucidrains wiring against the PyTorch reference: every option of its config, redrawn weights, odd sizes.

Imported by the float32 tests in pytest's own process and by `lucidrains_float64.py` in one with JAX_ENABLE_X64=1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from parity_cases import apply, relative_error, to_numpy, to_torch

import jddim
from convert.conversion import convert
from convert.engine import fill
from convert.families.lucidrains import buffers, reference, rules
from jddim.config import LucidrainsConfig, ScheduleConfig
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.schedule import make_schedule

torch = pytest.importorskip("torch", reason="parity is with PyTorch")
sys.path.append(str(Path(__file__).parent.parent))

from lucidrains_files import diffusion, draw, small_config, write  # noqa: E402


class Case(NamedTuple):
    config: LucidrainsConfig
    size: tuple[int, int]  # (height, width) of the input, not always the config's
    t: tuple[float, ...]


def _case(size: tuple[int, int], t: tuple[float, ...] = (0, 499, 999), **fields: Any) -> Case:
    return Case(LucidrainsConfig(**({"image_size": size, "in_channels": 1, "out_channels": 1} | fields)), size, t)


CASES = {
    "self-conditioned, both attentions, each level its own": _case(
        (12, 20),
        in_channels=2,
        out_channels=2,
        self_condition=True,
        channels=6,
        channel_mults=(1, 2, 3),
        stem_channels=10,
        full_attention=(True, False, True),
        num_heads=(1, 2, 3),
        head_channels=(5, 7, 3),
    ),
    "one level, learned features of t": _case(
        (7, 11),
        (0.25, 1),  # through learned frequencies, t = 999 has an angle of thousands, of which float32 knows 4e-4
        channels=4,
        channel_mults=(2,),
        full_attention=(False,),
        num_heads=(2,),
        head_channels=(3,),
        memory=3,
        time_embedding="learned",
        time_features=6,
    ),
    "learned variance, another theta, not the config's size": _case(
        (6, 14),
        (999, 0),
        image_size=(8, 8),
        in_channels=3,
        out_channels=6,
        channels=10,
        channel_mults=(2, 1),
        full_attention=(False, False),
        num_heads=(3, 1),
        head_channels=(2, 5),
        theta=100.0,
    ),
}


def params_of(config: LucidrainsConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the converter makes of a Unet's state dict."""
    expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}
    return fill(tensors, expected, rules(config))


def error(name: str, dtype: Any, seed: int = 3) -> float:
    """Largest error of jddim's output over the reference's largest output, for a case of CASES."""
    config, size, t = CASES[name]
    tensors = draw(config, seed)
    model = reference(config).eval().requires_grad_(False)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    model.to(torch.float64 if dtype == np.float64 else torch.float32)
    unet = build_model(config, {key: value.astype(dtype) for key, value in params_of(config, tensors).items()}, dtype)
    shape = (len(t), *size, config.input_channels)
    x_t = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)
    times = np.array(t, dtype if any(value != int(value) for value in t) else np.int32)
    return relative_error(apply(unet, x_t, times), to_numpy(model(to_torch(x_t), torch.tensor(times))))


# -- sampling ---------------------------------------------------------------------------------------------------------


def network(config: LucidrainsConfig, unet: dict[str, np.ndarray], dtype: Any = np.float32) -> Callable[..., Any]:
    """`model(x, t, x_self_cond)` of the source with these weights, computing in dtype."""
    model = reference(config).eval().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in unet.items()})
    model.to(torch.float64 if dtype == np.float64 else torch.float32)

    def call(x: Any, t: int, condition: Any) -> Any:
        if config.self_condition:
            x = torch.cat([torch.zeros_like(x) if condition is None else condition, x], dim=1)
        return model(x, torch.full((x.shape[0],), t))

    return call


def predictions(output: Any, x: Any, a: Any, objective: str, *, learned: bool = False) -> tuple[Any, Any]:
    """x0, clamped, and eps: model_predictions with clip_x_start and rederive_pred_noise.

    eps is what the clamped x0 implies; of LearnedGaussianDiffusion, which has a model_predictions of its own, what the
    network said.
    """

    def implied(x0: Any) -> Any:
        return ((1 / a).sqrt() * x - x0) / (1 / a - 1).sqrt()

    match objective:
        case "pred_noise":
            x0, eps = (1 / a).sqrt() * x - (1 / a - 1).sqrt() * output, output
        case "pred_x0":
            x0, eps = output, implied(output)
        case _:
            x0, eps = a.sqrt() * x - (1 - a).sqrt() * output, None  # the learned one knows no pred_v
    x0 = x0.clamp(-1, 1)
    return x0, eps if learned else implied(x0)


def ddim_sample(
    model: Callable[[Any, Any, Any], Any],
    alpha_bar: Any,
    x: Any,
    noise: Any,
    *,
    steps: int,
    eta: float,
    objective: str,
    learned: bool,
) -> Any:
    """What GaussianDiffusion.ddim_sample computes, in [-1, 1]; noise: one `(b, c, h, w)` for each step."""
    times = torch.linspace(-1, len(alpha_bar) - 1, steps + 1).int().tolist()[::-1]
    x0 = None
    for step, (t, t_next) in enumerate(pairwise(times)):
        output = model(x, t, x0)
        a = alpha_bar[t]
        if learned:
            output = output.chunk(2, dim=1)[0]
        x0, eps = predictions(output, x, a, objective, learned=learned)
        if t_next < 0:
            return x0
        b = alpha_bar[t_next]
        sigma = eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
        x = x0 * b.sqrt() + (1 - b - sigma**2).sqrt() * eps + sigma * noise[step]
    raise AssertionError("the last time is -1")


def p_sample_loop(
    model: Callable[[Any, Any, Any], Any], buffer: dict[str, Any], x: Any, noise: Any, *, objective: str, learned: bool
) -> Any:
    """What GaussianDiffusion.p_sample_loop computes, in [-1, 1]."""
    x0 = None
    for step, t in enumerate(reversed(range(len(buffer["betas"])))):
        output = model(x, t, x0)
        log_variance = buffer["posterior_log_variance_clipped"][t]
        if learned:
            output, v = output.chunk(2, dim=1)
            weight = (v + 1) / 2
            log_variance = weight * buffer["betas"][t].log() + (1 - weight) * log_variance
        x0, _ = predictions(output, x, buffer["alphas_cumprod"][t], objective)
        x = buffer["posterior_mean_coef1"][t] * x0 + buffer["posterior_mean_coef2"][t] * x
        x = x + (0.5 * log_variance).exp() * noise[step] * (t > 0)
    return x


# One level: the wiring is compared above, and compiling it is most of these tests' time.
ONE = {"channel_mults": (2,), "full_attention": (False,), "num_heads": (2,), "head_channels": (3,)}
PLAIN, SELF_CONDITIONED = small_config(**ONE), small_config(**ONE, self_condition=True)
LEARNED = small_config(**ONE, out_channels=2)
LINEAR = ScheduleConfig("linear", 1000, 1e-4, 0.02)
SIGMOID = ScheduleConfig("sigmoid_alpha_bar", 1000)


class Sampled(NamedTuple):
    config: LucidrainsConfig
    schedule: ScheduleConfig
    objective: str
    steps: int = 7  # no divisor of T
    gain: float = 1.0  # of the last convolution, over `draw`'s


SAMPLED = {
    "plain, v": Sampled(PLAIN, SIGMOID, "pred_v"),
    "self-conditioned, noise": Sampled(SELF_CONDITIONED, LINEAR, "pred_noise"),
    "self-conditioned, x0": Sampled(SELF_CONDITIONED, ScheduleConfig("cosine", 300), "pred_x0"),
    "learned variance": Sampled(LEARNED, LINEAR, "pred_noise"),
    "learned variance, all of an untrained network's output": Sampled(LEARNED, LINEAR, "pred_noise", 7, 1 / 0.3),
    "learned variance, more steps": Sampled(LEARNED, SIGMOID, "pred_noise", 30, 1 / 0.3),
    "learned variance, x0": Sampled(LEARNED, LINEAR, "pred_x0"),
}


def sampling_errors(name: str, folder: Path, dtype: Any) -> list[float]:
    """Largest difference of a converted checkpoint's images from the source's loop's, for eta 0 and 0.5.

    In float64 the loop has alpha_bar in float64 too, where the source rounds its buffers to float32.
    """
    case = SAMPLED[name]
    config, steps = case.config, case.steps
    unet = draw(config, 1)
    unet |= {key: (value * case.gain).astype(np.float32) for key, value in unet.items() if key.startswith("final_conv")}
    source = write(folder / "model.pt", diffusion(unet, case.schedule, case.objective))
    settings = {"image_size": "6x10", "sampling_timesteps": str(steps), "objective": case.objective}
    convert(source, folder / "out", settings=settings, verify=False)
    ddim = jddim.load(folder / "out", dtype=dtype)
    rng = np.random.default_rng(11)
    shape = (2, *config.image_size, config.in_channels)
    x_T, noise = (rng.standard_normal(s, np.float32).astype(dtype) for s in (shape, (steps, *shape)))
    alpha_bar = torch.from_numpy(
        make_schedule(case.schedule).alphas_cumprod.copy()
        if dtype == np.float64
        else buffers(case.schedule, case.objective)["alphas_cumprod"]
    )
    errors = []
    for eta in (0.0, 0.5):
        expected = ddim_sample(
            network(config, unet, dtype),
            alpha_bar,
            to_torch(x_T),
            to_torch(noise),
            steps=steps,
            eta=eta,
            objective=case.objective,
            learned=config.out_channels == 2 * config.in_channels,
        )
        actual = np.asarray(ddim.sample(x_T=x_T, noise=noise, eta=eta))
        assert actual.dtype == dtype
        assert (expected.abs() < 0.99).float().mean() > 0.05  # not all clamped
        errors.append(float(np.abs(actual - to_numpy(expected)).max()))
    return errors
