"""A sampler as a file that needs jax alone to run: StableHLO by `jax.export`, for cpu, cuda and tpu at once.

The file is an uncompressed zip: `program`, jax.export's bytes; `weights.npz`, the parameters by name (or beside the
file); `about.json`, what the program takes and how it was made. docs/scale.md has the ten lines that run it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from jddim import __version__
from jddim.checkpoint.folder import part_of
from jddim.checkpoint.metadata import FIRST_STAGE
from jddim.config import SamplerConfig, to_json
from jddim.ddim import StepTable
from jddim.images import atomic
from jddim.installing import install_line
from jddim.models.building import build_model, flat_params
from jddim.models.layers import at_least_float32, cast_kernels
from jddim.pipeline import DDIM
from jddim.run.compiling import Kind, compiler_options, faster
from jddim.run.methods import Given
from jddim.run.plan import Inputs, plan
from jddim.run.programs import by_parts, decode, draw_noise, segment
from jddim.run.request import Request, RequestError, left_out_problems
from jddim.sampling import ddim_update, init_state, numbered_keys

FORMAT_VERSION = 2
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program, the arrays that are its first argument, and what `about.json` says of it."""

    program: export.Exported
    weights: dict[str, np.ndarray]
    about: dict[str, Any]


def export_sampler(
    ddim: DDIM,
    request: Request | None = None,
    *,
    batch_size: int | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> Exported:
    """The whole sampler: `program(weights, seed, numbers[, eta][, labels])` -> images `(b, h, w, c)` float32.

    weights: float32 arrays by name. seed: uint32. numbers: uint32 `(b,)`, which images of the seed. eta: float32, for
    methods that take one. labels: int32 `(b,)`, for a network with classes. condition: float32 `(b, h, w, channels)`,
    for one that is given an image beside x_t. What `DDIM.sample` does with the conventions of `ddim` and what `request`
    asks, which are compiled in, with a first stage's decoder unless it asks for latents; values are not checked, a NaN
    is not looked for. batch_size: b; None leaves it open.
    Raises ValueError as `DDIM.sample` does, ModuleNotFoundError without flatbuffers.
    """
    _need_flatbuffers()
    _check_labels(ddim)
    request = request or Request()
    if problems := left_out_problems(request, "export"):
        raise RequestError(problems, "export")
    config, labelled = ddim.model.config, ddim.model.config.class_embedding is not None
    size = request.image_size
    if size is not None and ddim.autoencoder is not None:
        size = ddim.autoencoder.config.latent_size(size)
    beside = (*(size or config.image_size), config.condition_channels)
    one = Inputs(
        key=jax.random.key(0),
        labels=np.zeros(1, np.int32) if labelled else None,
        condition=np.zeros((1, *beside), at_least_float32(ddim.model.dtype)) if config.condition_channels else None,
    )
    planned = plan(ddim, request, one, 1).check("sample")
    method, dtype = planned.program.method, planned.dtype
    scale, stage = planned.scale, planned.autoencoder if planned.decodes else None

    def sample(weights: dict[str, Array], seed: Array, numbers: Array, *rest: Array) -> Array:
        given = dict(zip(names[3:], rest, strict=True))
        keys = numbered_keys(jax.random.key(seed), numbers)
        state = init_state(x_T := planned.noised(draw_noise(keys, planned.shape, dtype)), planned.rows)
        state = state._replace(memory=method.memory(planned.rows, x_T), deep=planned.deep(x_T.shape[0]))
        each = lambda value: jnp.broadcast_to(jnp.asarray(value, dtype), numbers.shape)  # noqa: E731
        rows = jax.tree.map(jnp.asarray, planned.rows)
        values = Given(
            each(given.get("eta", 0.0)),
            keys if method.takes_eta or method.stochastic else None,
            None,
            planned.limits,
            given.get("labels"),
            None if scale is None else planned.guidance(each(scale[0])),
            condition=given.get("condition"),
        )
        tuned = (lambda model: faster(model, Kind("cpu"))) if platforms == ("cpu",) else lambda model: model  # as there
        model = tuned(build_model(config, part_of(weights, ""), ddim.model.dtype))
        state = segment(model, state, rows, values, program=planned.program)
        if stage is None:
            return state.x_t
        decoder: Any = tuned(build_model(stage.config, part_of(weights, FIRST_STAGE), stage.dtype))
        return by_parts(decode.bound(decoder), state.x_t, 1)

    batch = _batch(batch_size)
    whole = dataclasses.replace(ddim, autoencoder=stage)
    takes = {"weights": _shapes(whole), "seed": _of((), jnp.uint32), "numbers": _of((batch,), jnp.uint32)}
    takes |= {"eta": _of((), jnp.float32)} if method.takes_eta else {}
    takes |= {"labels": _of((batch,), jnp.int32)} if labelled else {}
    takes |= {"condition": _of((batch, *beside), jnp.float32)} if config.condition_channels else {}
    names = list(takes)
    about = {"kind": "sampler", "request": request.to_json(), "num_steps": planned.rows.num_steps}
    return _exported(whole, sample, takes, about, platforms, planned.sampler)


def export_step(ddim: DDIM, *, batch_size: int | None = None, platforms: tuple[str, ...] = PLATFORMS) -> Exported:
    """One DDIM step: `program(weights, x_t, t, *ends, eta, noise[, labels][, x0_hat][, condition])` -> (x_prev, x0).

    x_t, noise: `(b, h, w, c)` float32. t: int32, float32 on a continuous schedule; ends: its row's
    `jddim.ddim.Coefficients`, in order, float32. labels: int32 `(b,)`, for a network with classes; x0_hat: the last
    step's x0, for a self-conditioned one. The rows of the `DDIM`'s table stand in `about.json`, and `prior_scale`, by
    which a standard normal x_T becomes the first x_t. The arguments and what is raised are `export_sampler`'s.
    """
    _need_flatbuffers()
    ddim = dataclasses.replace(ddim, autoencoder=None)  # a step is of latents
    config, dtype = ddim.model.config, at_least_float32(ddim.model.dtype)
    labelled = config.class_embedding is not None
    conventions = ddim.conventions(dtype)
    selfish = conventions.pop("self_condition", False)
    _check_labels(ddim)

    def step(weights: dict[str, Array], x_t: Array, *rest: Array) -> tuple[Array, Array]:
        given = dict(zip(names[2:], rest, strict=True))
        model = cast_kernels(build_model(config, weights, ddim.model.dtype))
        denoise = dataclasses.replace(ddim, model=model).denoiser(given.get("labels"), condition=given.get("condition"))
        t = jnp.broadcast_to(given["t"], x_t.shape[:1])
        output = denoise(x_t, t, given["x0_hat"]) if selfish else denoise(x_t, t)
        row = StepTable(
            jnp.zeros((), jnp.int32), given["t"], jnp.zeros_like(given["t"]), *(given[name] for name in ends)
        )
        update = ddim_update(eta=given["eta"], **conventions)
        x_prev, x0 = update(x_t, output.astype(x_t.dtype), given["noise"], row)
        return x_prev, x0

    batch, ends = _batch(batch_size), StepTable._fields[3:]
    image = _of((batch, *config.image_size, config.in_channels), jnp.float32)
    table = ddim.table()
    takes = {"weights": _shapes(ddim), "x_t": image, "t": _of((), table.t.dtype)}
    takes |= {name: _of((), jnp.float32) for name in (*ends, "eta")} | {"noise": image}
    takes |= {"labels": _of((batch,), jnp.int32)} if labelled else {}
    takes |= {"x0_hat": image} if selfish else {}
    beside = _of((batch, *config.image_size, config.condition_channels), jnp.float32)
    takes |= {"condition": beside} if config.condition_channels else {}
    names = list(takes)
    rows = {name: np.asarray(getattr(table, name)).tolist() for name in ("t", *ends)}
    scale = ddim.schedule.prior_scale(float(table.t[0]))
    return _exported(ddim, step, takes, {"kind": "step", "table": rows, "prior_scale": scale}, platforms, ddim.sampler)


def save(path: Path, exported: Exported, *, beside: bool = False) -> list[Path]:
    """Write OUT.jddim, and OUT.weights.npz if the weights are to lie beside it. Returns what was written."""
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **exported.weights)
    weights = packed.getvalue()
    apart = path.with_name(f"{path.stem}.weights.npz")
    about = {**exported.about, "weights": apart.name if beside else "weights.npz"}
    about["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    members = {"about.json": json.dumps(about, indent=2).encode(), "program": bytes(exported.program.serialize())}
    members |= {} if beside else {"weights.npz": weights}
    if beside:
        with atomic(apart) as staging:
            staging.write_bytes(weights)
    with atomic(path) as staging, zipfile.ZipFile(staging, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # with no time, so that equal exports are equal files
    return [path, apart] if beside else [path]


def _exported(
    ddim: DDIM,
    run: Any,
    takes: dict[str, Any],
    about: dict[str, Any],
    platforms: tuple[str, ...],
    sampler: SamplerConfig,
) -> Exported:
    program = export.export(jax.jit(run), platforms=platforms)(*takes.values())
    about = {
        "format": "jddim-export",
        "format_version": FORMAT_VERSION,
        **about,
        "arguments": {n: f"{v.dtype.name}{list(map(str, v.shape))}" for n, v in takes.items() if n != "weights"},
        "platforms": list(program.platforms),
        "compiler_options": {name: compiler_options(Kind(name)) for name in program.platforms},
        "checkpoint_sha256": None if ddim.metadata is None else ddim.metadata.sha256,
        "sampler": to_json(sampler),
        "dtype": jnp.dtype(ddim.model.dtype).name,
        "jddim": __version__,
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }
    return Exported(program, {name: np.asarray(value) for name, value in _params(ddim).items()}, about)


def _batch(size: int | None) -> Any:
    if size is not None:
        return size
    (batch,) = export.symbolic_shape("b", constraints=("b >= 1",))
    return batch


def _of(shape: tuple[Any, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(ddim: DDIM) -> Any:
    return {name: _of(value.shape, value.dtype) for name, value in _params(ddim).items()}


def _params(ddim: DDIM) -> dict[str, Array]:
    stage = {} if ddim.autoencoder is None else flat_params(ddim.autoencoder)
    return flat_params(ddim.model) | {FIRST_STAGE + name: value for name, value in stage.items()}


def _check_labels(ddim: DDIM) -> None:
    if ddim.model.config.class_embedding not in (None, "learned"):
        raise ValueError("export takes labels that are integers; this network's class embedding is another")


def _need_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"export writes by flatbuffers: {install_line('export')}") from error
