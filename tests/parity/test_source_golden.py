"""jddim against numbers that sources' own code left in files: the networks, from their tensors, and their samplers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from source_cases import (
    CFG_SCALE,
    ETA,
    INPAINTER,
    OBJECTIVES,
    SDE_TIMES,
    SOURCES,
    STEPS,
    UPSAMPLER,
    VISITED,
    converted,
    filled,
    golden,
    images,
    mask_of,
    source_tensors,
)

from convert.families import FAMILIES
from jddim.ddim import sampler_table, step_table
from jddim.models.building import build_model
from jddim.pipeline import DDIM
from jddim.run import batches
from jddim.run import plan as planning
from jddim.run.request import Request
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import make_schedule
from jddim.timesteps import make_timesteps, spaced_ratios

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]


def error(actual: jax.Array, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("source", "name"), [(source, name) for source, cases in SOURCES.items() for name in cases])
def test_output_equals_the_sources(source: str, name: str) -> None:
    case = SOURCES[source][name]
    plan, params = converted(source, name)
    labels = None if case.labels is None else jnp.array(case.labels)
    run = jax.jit(lambda model, *inputs: model(*inputs))
    eps = run(build_model(plan.model, params), images(case, len(case.t), seed=1), jnp.array(case.t), labels)
    expected = golden(source)[f"{name}/eps"]
    # float32 rounding through up to 30 convolutions; measured 1e-6. SiT drops the half that would be a variance.
    assert error(eps[..., : expected.shape[-1]], expected) <= 2e-5


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("run", "options"),
    [("ancestral", {"method": "ddpm"}), ("DDIM, eta 0", {"eta": 0.0}), ("DDIM", {"eta": ETA})],
)
def test_dit_samples_as_its_loops_do(run: str, options: dict[str, Any], guided: bool) -> None:
    """With a learned variance, and guidance of the first 3 channels; neither is clipped."""
    case = SOURCES["dit"]["DiT"]
    plan, params = converted("dit", "DiT")
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    given: dict[str, Any] = {"labels": np.array(case.labels), "x_T": images(case, 3, seed=2)}
    if guided:
        run, given = f"{run}, guided", given | {"guidance_scale": CFG_SCALE, "null_label": plan.null_label}
    x_0 = ddim.sample(noise=images(case, STEPS, 3, seed=3), **given, **options)
    expected = golden("dit")[f"DiT/{run}"]
    assert error(x_0, expected) <= 1e-4
    if guided:  # of all channels it is another sampler's result
        everywhere = ddim.sample(noise=images(case, STEPS, 3, seed=3), guidance_channels=4, **given, **options)
        assert error(everywhere, expected) > 1e-2


@pytest.mark.parametrize("guided", [False, True])
def test_sit_samples_as_its_ode_by_eulers_method_does(guided: bool) -> None:
    """From noise at its t = 0 to the image at 1; DDIM at eta 0 along the straight path."""
    case = SOURCES["dit"]["SiT"]
    plan, params = converted("dit", "SiT")
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    given: dict[str, Any] = {"labels": np.array(case.labels), "x_T": images(case, 3, seed=2)}
    if guided:
        given |= {"guidance_scale": CFG_SCALE, "null_label": plan.null_label}
    x_0 = ddim.sample(**given)
    expected = golden("dit")[f"SiT/ODE{', guided' if guided else ''}"]
    assert error(x_0, expected) <= 1e-4
    assert error(ddim.sample(**given, noise=images(case, STEPS, 3, seed=3), eta=0.5), expected) > 1e-2
    if not guided:
        known = images(case, 3, seed=4).clip(-1, 1)
        again = ddim.sample(x_T=ddim.invert(known, labels=given["labels"], refine=20), labels=given["labels"])
        assert error(again, known) <= 1e-3


@pytest.mark.parametrize(
    ("run", "options"),
    [("euler", {"eta": 0.0}), ("heun", {"method": "heun"}), ("ancestral", {"eta": 1.0})],
)
def test_edms_networks_sample_as_the_source_does(run: str, options: dict[str, Any]) -> None:
    """Each evaluation's x0 is clipped, and eps derived from it: Heun's two alike."""
    case = SOURCES["consistency"]["edm"]
    plan, params = converted("consistency", "edm")
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    noise = None if run == "heun" else images(case, STEPS, 3, seed=3)
    given: dict[str, Any] = {"labels": np.array(case.labels), "x_T": images(case, 3, seed=2), "steps": STEPS}
    x_0 = ddim.sample(**given, noise=noise, **options)
    expected = golden("consistency")[f"edm/{run}"]
    assert error(x_0, expected) <= 1e-4
    if run == "heun":
        assert error(ddim.sample(**given, **options, clip=False), expected) > 1e-2


@pytest.mark.parametrize("name", SOURCES["edm"])
def test_edms_own_sampler_is_heuns(name: str) -> None:
    """From 80 to 0.002; nothing is clipped. Its noise before a step is ours after the one before it."""
    case = SOURCES["edm"][name]
    plan, params = converted("edm", name)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    labels = None if case.labels is None else np.array(case.labels)
    x_T = images(case, len(case.t), seed=2)
    heun = partial(ddim.sample, x_T=x_T, labels=labels, steps=STEPS, method="heun")
    assert error(heun(), golden("edm")[f"{name}/heun"]) <= 1e-4
    noise = np.zeros((2 * STEPS - 1, *x_T.shape), np.float32)
    noise[1::2] = images(case, STEPS, len(case.t), seed=3)[1:]
    churned = heun(noise=noise, s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
    assert error(churned, golden("edm")[f"{name}/churn"]) <= 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lucidrains_classifier_free_guidance_samples_as_its_loops_do(objective: str) -> None:
    """With its cond_scale of 6 and rescaled_phi of 0.7; eps is taken from the clipped x0 but where it is predicted."""
    case = SOURCES["lucidrains"]["classifier-free"]
    tensors = source_tensors("lucidrains", "classifier-free")
    plan, params = filled(FAMILIES["lucidrains"], tensors, case.settings | {"objective": objective})
    assert (plan.null_label, plan.sampler.eta) == (3, 1.0)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    labels, T = np.array([2, 0, 1]), int(case.settings["timesteps"])
    given: dict[str, Any] = {"labels": labels, "null_label": 3, "x_T": images(case, 3, seed=2)}
    given |= {"guidance": "projected", "guidance_scale": 6.0, "guidance_rescale": 0.7}
    noise = images(case, T, 3, seed=3)
    for run, options in (
        ("DDIM, eta 0", {"eta": 0.0}),
        ("DDIM", {"eta": ETA}),
        ("ancestral", {"method": "ddpm", "steps": T}),
    ):
        x_0 = ddim.sample(noise=noise[: options.get("steps", STEPS)], **given, **options)
        assert error(x_0, golden("lucidrains")[f"classifier-free/{objective}, {run}"]) <= 1e-4


@pytest.mark.parametrize("name", ["ddpm", "DDPM++", "NCSN++"])
def test_score_sdes_networks_sample_by_its_score_functions(name: str) -> None:
    case = SOURCES["score_sde"][name]
    plan, params = converted("score_sde", name)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    x_T, noise = images(case, len(case.t), seed=2), images(case, STEPS, len(case.t), seed=3)
    table: dict[str, Any] = {"spacing": list(SDE_TIMES)} if name == "ddpm" else {"steps": STEPS}
    noise = noise[: len(SDE_TIMES)] if name == "ddpm" else noise
    for run, eta in (("DDIM, eta 0", 0.0), ("DDIM", ETA)):
        x_0 = ddim.sample(x_T=x_T, noise=noise, eta=eta, **table)
        assert error(x_0, golden("score_sde")[f"{name}/{run}"]) <= 1e-4


def test_score_sdes_ancestral_predictor() -> None:
    """Of a network that was trained at whole timesteps, at these."""
    case = SOURCES["score_sde"]["ddpm"]
    plan, params = converted("score_sde", "ddpm")
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    noise = images(case, case.network["num_scales"], len(case.t), seed=3)
    x_0 = ddim.sample(x_T=images(case, len(case.t), seed=2), noise=noise, method="ddpm", steps=len(noise))
    assert error(x_0, golden("score_sde")["ddpm/ancestral"]) <= 1e-4


def test_consistency_sample_as_the_source_does() -> None:
    case = SOURCES["consistency"]["consistency"]
    plan, params = converted("consistency", "consistency")
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    given: dict[str, Any] = {"x_T": images(case, 2, seed=2), "noise": images(case, STEPS, 2, seed=3)}
    expected = golden("consistency")
    for method in ("ddim", "consistency"):  # one step is the same by both
        first = ddim.sample(x_T=given["x_T"], noise=given["noise"][:1], method=method)
        assert error(first, expected["consistency/onestep"]) <= 1e-4
    every = spaced_ratios("karras", 0.02, 20.0, STEPS)
    spacing = ",".join(f"{every[i]:.9g}" for i in VISITED[:-1])
    given["noise"] = given["noise"][: len(VISITED) - 1]
    assert error(ddim.sample(**given, method="consistency", spacing=spacing), expected["consistency/multistep"]) <= 1e-4
    assert error(ddim.sample(**given, spacing=spacing), expected["consistency/multistep"]) > 1e-2
    unbound = DDIM(ddim.model, ddim.schedule, dataclasses.replace(plan.sampler, boundary=False))
    assert (
        error(unbound.sample(**given, method="consistency", spacing=spacing), expected["consistency/multistep"]) > 1e-2
    )


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_pytorch_ddpms_sampler(var_type: str) -> None:
    case = SOURCES["pytorch_ddpm"]["one block"]
    plan, params = converted("pytorch_ddpm", "one block")
    sampler, T = plan.sampler, case.network["T"]
    table = step_table(make_schedule(plan.schedule), make_timesteps(sampler.spacing, T, T))
    run = jax.jit(
        lambda model, x_T, noise: ancestral_loop(
            model,
            x_T,
            table,
            noise=noise,
            variance={"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}[var_type],
            clip_range=sampler.clip_range if sampler.clip else None,
        )
    )
    x_0 = run(build_model(plan.model, params), images(case, 2, seed=2), images(case, T, 2, seed=3))
    assert error(x_0, golden("pytorch_ddpm")[f"one block/{var_type}"]) <= 1e-4


def test_guided_diffusions_upsampler_samples_as_its_loops_do() -> None:
    """Given a smaller image beside x_t, with labels and a learned variance."""
    case = SOURCES["openai"][UPSAMPLER]
    plan, params = converted("openai", UPSAMPLER)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    x_T, beside = np.split(images(case, 2, seed=2), 2, axis=-1)
    given = {"labels": np.array(case.labels), "condition": beside[:, ::2, ::2]}
    noise = images(case, plan.sampler.num_steps, 2, seed=3)[..., :3]
    for run, options in (
        ("ancestral", {"method": "ddpm"}),
        ("DDIM, eta 0", {"eta": 0.0}),
        ("DDIM", {"eta": ETA}),
    ):
        x_0 = ddim.sample(x_T=x_T, noise=noise, **given, **options)
        assert error(x_0, golden("openai")[f"{UPSAMPLER}/{run}"]) <= 1e-4  # measured 8e-6


@pytest.mark.parametrize("name", SOURCES["palette"])
def test_palettes_restoration_is_what_sampling_does_by_default(name: str) -> None:
    case = SOURCES["palette"][name]
    plan, params = converted("palette", name)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    beside, x_T = np.split(images(case, 2, seed=2), 2, axis=-1)
    noise = images(case, int(case.settings["n_timestep"]), 2, seed=3)[..., : x_T.shape[-1]]
    x_0 = ddim.sample(x_T=x_T, condition=beside, noise=noise)
    assert error(x_0, golden("palette")[f"{name}/restoration"]) <= 1e-4  # measured 3e-6


def test_palettes_inpainting_keeps_what_is_known_clean() -> None:
    """In each x_t, the first one too, which its condition is as well."""
    case, name = SOURCES["palette"][INPAINTER], f"{INPAINTER}/inpainting"
    plan, params = converted("palette", INPAINTER)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    known, x_T = np.split(images(case, 2, seed=2), 2, axis=-1)
    noise = images(case, int(case.settings["n_timestep"]), 2, seed=3)[..., : x_T.shape[-1]]
    known, mask = known.clip(-1, 1), mask_of(case)
    inputs = planning.Inputs(images=known, mask=2 * mask - 1, x_T=x_T, noise=noise)
    inputs = inputs._replace(condition=known * (1 - mask) + mask * x_T)
    filled, _ = batches.run(planning.plan(ddim, Request(), inputs))
    assert error(filled, golden("palette")[name]) <= 1e-4  # measured 3e-6
    with pytest.raises(ValueError, match="resample is of known pixels that are noised; this network takes them clean"):
        planning.plan(ddim, Request(resample=2), inputs).check("edit")


@pytest.mark.parametrize("name", [name for name, case in SOURCES["monai"].items() if case.labels is not None])
def test_monais_ddim(name: str) -> None:
    case = SOURCES["monai"][name]
    plan, params = converted("monai", name)
    sampler = dataclasses.replace(plan.sampler, num_steps=STEPS)
    table = sampler_table(make_schedule(plan.schedule), sampler)
    labels = jnp.array(case.labels)
    run = jax.jit(
        lambda model, x_T, noise: sample_loop(
            lambda x_t, t: model(x_t, t, labels),
            x_T,
            table,
            eta=ETA,
            noise=noise,
            prediction_type=sampler.prediction_type,
            clip_range=sampler.clip_range,
        )
    )
    num = len(labels)
    x_0 = run(build_model(plan.model, params), images(case, num, seed=2), images(case, STEPS, num, seed=3))
    assert error(x_0, golden("monai")[f"{name}/DDIM"]) <= 1e-4
