"""What `DDIM.sample` and `DDIM.invert` compile: a segment of the scan each, around the network as the scan takes it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from jax import Array

from jddim.config import PREDICTION_TYPES, VARIANCES, did_you_mean
from jddim.ddim import StepTable
from jddim.denoisers import with_labels, with_scaled_time, with_self_condition, without_variance
from jddim.guidance import classifier_free, label_pair
from jddim.inversion import invert_steps
from jddim.models import Network
from jddim.models.layers import cast_kernels
from jddim.run.compiling import Jit
from jddim.sampling import Denoiser, State, ancestral_steps, ddim_steps, initial_noise, sample_keys, update_steps
from jddim.solvers import Solver, solver_update


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled segment of sampling depends on beside shapes: static, hashable."""

    method: str
    solver: Solver | None
    prediction_type: str
    timestep_scale: float
    rederive_eps: bool
    variance: str
    self_condition: bool
    trajectory_every: int | None

    def __post_init__(self) -> None:
        """Raise ValueError for a name that is not known."""
        for name, value, known in (
            ("prediction_type", self.prediction_type, PREDICTION_TYPES),
            ("variance", self.variance, VARIANCES),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}{did_you_mean(value, known)}")


@partial(Jit, static_argnames=("program",))
def sample_segment(
    model: Network,
    state: State,
    table: StepTable,
    eta: Array,
    keys: Array | None,
    noise: Array | None,
    limits: dict[str, tuple[Array, Array]],
    labels: Array | None,
    guidance: tuple[Array, Array] | None = None,
    *,
    program: Program,
) -> State:
    """One segment of the scan, the program that `sample` compiles. Everything that may change is an argument."""
    denoise = network_denoiser(cast_kernels(model), program, labels, guidance)
    common: dict[str, Any] = {
        "key": keys,
        "noise": noise,
        "prediction_type": program.prediction_type,
        "trajectory_every": program.trajectory_every,
        "clip_range": None,
        **limits,
    }
    if program.solver is not None:
        update = solver_update(program.solver, prediction_type=program.prediction_type, **limits)
        return update_steps(
            denoise,
            update,
            state,
            table,
            key=keys,
            noise=noise,
            deterministic=not program.solver.stochastic,
            trajectory_every=program.trajectory_every,
        )
    if program.method == "ddpm":
        return ancestral_steps(denoise, state, table, variance=program.variance, **common)
    return ddim_steps(
        denoise,
        state,
        table,
        eta=0.0 if keys is None and noise is None else eta,  # without noise eta is 0: `sample` has checked
        rederive_eps=program.rederive_eps,
        **common,
    )


@partial(Jit, static_argnames=("program", "refine"))
def invert_segment(
    model: Network,
    state: State,
    rows: StepTable,
    limits: dict[str, tuple[Array, Array]],
    labels: Array | None,
    guidance: tuple[Array, Array] | None,
    *,
    program: Program,
    refine: int,
) -> State:
    """One segment of inversion, the program that `invert` compiles."""
    denoise = network_denoiser(cast_kernels(model), program, labels, guidance)
    conventions: dict[str, Any] = {
        "prediction_type": program.prediction_type,
        "rederive_eps": program.rederive_eps,
        **limits,
    }
    return invert_steps(denoise, state, rows, refine=refine, **conventions)


def network_denoiser(
    model: Denoiser, program: Program, labels: Array | None, guidance: tuple[Any, Any] | None
) -> Denoiser:
    """The network as the loops take it: given t as it was trained with, at these labels or guided by them."""
    denoise = model if program.timestep_scale == 1 else with_scaled_time(model, program.timestep_scale)
    if labels is not None and guidance is not None:
        scale, null_label = guidance
        denoise = classifier_free(label_pair(denoise, labels, null_label), scale)
    elif labels is not None:
        denoise = with_labels(denoise, labels)
    if program.variance == "learned_range" and program.method != "ddpm":
        denoise = without_variance(denoise)
    return with_self_condition(denoise) if program.self_condition else denoise


draw_keys = jax.jit(lambda key, start, num: sample_keys(key, num, start), static_argnums=2)
draw_noise = jax.jit(initial_noise, static_argnums=(1, 2))
