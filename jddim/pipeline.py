"""What `jddim.load` returns: a model, its schedule and its source's sampling conventions, ready to sample."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.checkpoint import Metadata, build_model, load_metadata, load_params
from jddim.compiling import Jit
from jddim.config import (
    PREDICTION_TYPES,
    VARIANCES,
    ModelConfig,
    SamplerConfig,
    did_you_mean,
    size_problems,
)
from jddim.ddim import StepTable, largest_eta, sampler_table
from jddim.denoisers import with_labels, with_scaled_time, with_self_condition, without_variance
from jddim.guidance import Scale, classifier_free, label_pair
from jddim.inversion import check_inversion, inversion_table, invert_steps
from jddim.models import Network
from jddim.models.layers import at_least_float32, cast_kernels
from jddim.progress import Progress
from jddim.sampling import (
    Denoiser,
    State,
    Trajectory,
    ancestral_steps,
    check_prediction,
    ddim_steps,
    init_state,
    initial_noise,
    sample_keys,
    segments,
    update_steps,
)
from jddim.schedule import NoiseSchedule, make_schedule
from jddim.solvers import Solver, cast, find, memory_of, solver_update


def load(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> DDIM:
    """A checkpoint written by `jddim convert`, ready to sample.

    dtype: the network's compute dtype, float32 or bfloat16; the sampler's state, the norms and the softmax stay
    float32. Raises `jddim.checkpoint.CheckpointError` if the folder is absent, incomplete, edited or too new.
    """
    metadata = load_metadata(path)
    model = build_model(metadata.model, load_params(path, metadata), dtype)
    return DDIM(model, make_schedule(metadata.schedule), metadata.sampler, metadata)


class Preview(NamedTuple):
    """What `sample` hands to `on_segment`: a batch on its way.

    start: the first image's number. done, total: evaluations taken, and in all. x_t, x0_hat: `(n, h, w, c)`, the
    samples now, and the clean images that the last step predicted.
    """

    start: int
    done: int
    total: int
    x_t: Array
    x0_hat: Array


@dataclasses.dataclass(frozen=True, eq=False)
class DDIM:
    """A diffusion model with everything that sampling it needs. Replace a part with `dataclasses.replace`.

    model: `model(x_t, t) -> eps`, a pytree. schedule: what it was trained with. sampler: the source's conventions,
    the defaults of `sample`. metadata: the checkpoint's own, None for a model built in memory.
    """

    model: Network
    schedule: NoiseSchedule
    sampler: SamplerConfig
    metadata: Metadata | None = None

    def with_sampler(self, **conventions: Any) -> DDIM:
        """The same model with other conventions: fields of `SamplerConfig`, e.g. `steps_offset=1`.

        To say `clip`, on or off, leaves the checkpoint's thresholding out, unless threshold_ratio is said as well.
        """
        if "clip" in conventions:
            conventions = {"threshold_ratio": None, **conventions}
        return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, **conventions))

    def table(
        self,
        steps: int | None = None,
        spacing: str | Sequence[int] | np.ndarray | None = None,
        dtype: DTypeLike = np.float32,
    ) -> StepTable:
        """The step table of `steps` with a named spacing, or of an explicit descending list of timesteps.

        Defaults come from the checkpoint. The table has the source's number of rows, which "uniform" does not always
        make equal to `steps` (see `jddim.timesteps`).
        """
        return sampler_table(self.schedule, self.sampler, steps, dtype, spacing)

    def sample(
        self,
        key: Array | None = None,
        num: int | None = None,
        *,
        method: str = "ddim",
        steps: int | None = None,
        eta: ArrayLike | None = None,
        spacing: str | Sequence[int] | np.ndarray | None = None,
        clip: bool | None = None,
        clip_range: tuple[float, float] | None = None,
        rederive_eps: bool | None = None,
        labels: ArrayLike | None = None,
        guidance_scale: ArrayLike | None = None,
        null_label: int | None = None,
        x_T: Array | np.ndarray | None = None,
        noise: Array | np.ndarray | None = None,
        image_size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        start: int = 0,
        trajectory_every: int | None = None,
        progress: bool = False,
        on_segment: Callable[[Preview], Any] | None = None,
    ) -> Any:
        """Images `(num, h, w, c)` float32, nominally in [-1, 1] (not clamped unless x0 is clipped).

        key: `jax.random.key(seed)`. Image i of the result is image `start + i` of the seed: it depends on nothing
            else, so `num=7` and then `num=9, start=7` make the images of `num=16`. Or one key per image `(num,)`,
            such as some of `jddim.sampling.sample_keys`. Not needed if x_T is given, and eta is 0 or noise is given.
        method: "ddim"; "ddpm", ancestral sampling with the checkpoint's variance (`SamplerConfig.variance`); or one of
            `jddim.solvers.SOLVERS`, such as "dpm++2m". `noise` then has one row an evaluation.
        steps: S; spacing: a name that `jddim.timesteps.make_timesteps` takes, or a descending list of timesteps (then
            no steps).
        eta: 0 deterministic ... 1 as noisy as DDPM; a scalar or one value per image, `(num,)`. May be traced. For
            "ddim" alone.
        clip: clamp x0 to clip_range at each step (then the checkpoint's thresholding, if it has one, is left out);
            rederive_eps: use the clipped x0's eps in the direction term.
        labels: for a network with classes, and only for one: `(num,)` integers in 0..num_classes-1 (or what its
            `class_embedding` takes, one row an image).
        guidance_scale: classifier-free guidance between `null_label`, the label that meant none in training (scale 0;
            by default what `jddim train` recorded), and `labels` (1), or beyond; a scalar or one value per image. Twice
            the evaluations. `jddim.guidance` has other kinds.
        x_T: `(num, h, w, c)` float32 start; noise: `(S, num, h, w, c)` float32, row s used in the s-th step taken.
        image_size: (height, width) other than the checkpoint's. batch_size: images per compiled call, default all.
        trajectory_every: k returns `(images, Trajectory)` with every k-th step. progress: run in segments,
            with a bar on stderr if that is a terminal; the same images to the bit.
        on_segment: called with a `Preview` after each segment, of which a batch has eight or more (or as many as it has
            evaluations); what it raises ends the run.

        Everything that is None comes from the checkpoint; `with_sampler` changes the rest of its conventions. Works
        inside `jit`, `vmap` and `grad`, where values are traced and only shapes are checked; outside, one compiled
        program serves every eta, seed, label and set of weights of a shape and S.

        Raises ValueError with everything wrong in one message; FloatingPointError if a NaN or infinity appears,
        naming the image and the step (outside tracing only).
        """
        asked: dict[str, Any] = {"clip": clip, "clip_range": clip_range, "rederive_eps": rederive_eps}
        ddim = self.with_sampler(**{name: value for name, value in asked.items() if value is not None})
        dtype = at_least_float32(ddim.model.dtype)
        program = ddim._program(method, trajectory_every)
        solver = program.solver
        table: Any = ddim.table(steps, spacing, np.float64 if solver else dtype)  # or a SolverTable, which has more
        if solver is not None:
            table = cast(solver.plan(table), dtype)
        every = trajectory_every
        if on_segment is not None and every is None:
            every = table.num_steps  # one slot, which holds the last step's x0_hat
        program = dataclasses.replace(program, trajectory_every=every)
        problems = [] if method == "ddim" or eta is None else [f"eta is DDIM's; method {method!r} takes none"]
        eta = ddim.sampler.eta if eta is None else eta
        labels = None if labels is None else jnp.asarray(labels)
        if num is None and x_T is not None:
            num = x_T.shape[0] if x_T.ndim else None
        if image_size is None:
            image_size = ddim.model.config.image_size
            if x_T is not None and x_T.ndim == 4 and not _channels_first(x_T, ddim.model.config.in_channels):
                image_size = (x_T.shape[1], x_T.shape[2])
        shape = (*image_size, ddim.model.config.in_channels)
        needs_noise = method == "ddpm" or (solver.stochastic if solver else not _is_zero(eta))
        problems += ddim._problems(key, num, table, x_T, noise, shape, batch_size, dtype, needs_noise=needs_noise)
        if num is not None and num >= 1:
            problems += eta_problems(eta, num, table) if method == "ddim" else []
            problems += _label_problems(ddim.model.config, labels, num)
            null_label = ddim.null_label_for(guidance_scale, null_label)
            problems += ddim._guidance_problems(guidance_scale, null_label, num, method)
        if problems:
            raise ValueError("sample: " + "; ".join(problems))
        assert num is not None

        limits = ddim._limits(dtype)
        etas = jnp.broadcast_to(jnp.asarray(eta, dtype), (num,))
        scales = None if guidance_scale is None else jnp.broadcast_to(jnp.asarray(guidance_scale, dtype), (num,))

        def begin(batch: _Batch) -> State:
            x = batch.of(x_T) if x_T is not None else _initial_noise(keys_of(batch), shape, dtype)
            state = init_state(x, table, every, self_condition=ddim.sampler.self_condition)
            return state if solver is None else state._replace(memory=memory_of(table, x))

        def keys_of(batch: _Batch) -> Array | None:
            if key is None or key.ndim:
                return None if key is None else batch.of(key)
            return _keys(key, start + batch.low, batch.size)

        def advance(batch: _Batch, state: State, segment: Any) -> State:
            noise_rows = None
            if noise is not None:
                first = int(segment.step[0])
                noise_rows = batch.of(noise[first : first + segment.num_steps], axis=1)
            return _steps(
                ddim.model,
                state,
                segment,
                batch.of(etas),
                keys_of(batch) if noise is None else None,
                noise_rows,
                limits,
                None if labels is None else batch.of(labels),
                None if scales is None else (batch.of(scales), jnp.asarray(null_label)),
                program=program,
            )

        def seen(batch: _Batch, state: State, segment: Any) -> None:
            if on_segment is not None and state.trajectory is not None and every is not None:
                last = int(segment.step[-1])
                x_t, x0_hat = (x[: batch.taken] for x in (state.x_t, state.trajectory.x0_hat[last // every]))
                on_segment(Preview(start + batch.low, last + 1, table.num_steps, x_t, x0_hat))

        images: list[Array] = []
        trajectories: list[Trajectory] = []
        watch = None if on_segment is None else seen
        for taken, state in _in_batches(num, batch_size, table, begin, advance, start, progress, watch):
            images.append(state.x_t[:taken])
            if state.trajectory is not None and trajectory_every is not None:
                t, x_t, x0_hat = state.trajectory
                trajectories.append(Trajectory(t, x_t[:, :taken], x0_hat[:, :taken]))
        x_0 = images[0] if len(images) == 1 else jnp.concatenate(images)
        if trajectory_every is None:
            return x_0
        x_ts, x0_hats = (jnp.concatenate([part[i] for part in trajectories], axis=1) for i in (1, 2))
        return x_0, Trajectory(trajectories[0].t, x_ts, x0_hats)

    def invert(
        self,
        images: Array | np.ndarray,
        *,
        steps: int | None = None,
        spacing: str | Sequence[int] | np.ndarray | None = None,
        convention: str = "diffusers",
        refine: int = 0,
        eta: ArrayLike = 0.0,
        clip: bool | None = None,
        clip_range: tuple[float, float] | None = None,
        rederive_eps: bool | None = None,
        labels: ArrayLike | None = None,
        guidance_scale: ArrayLike | None = None,
        null_label: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Array:
        """The x_T `(num, h, w, c)` float32 of `images`, of the same shape, float32 in [-1, 1]: DDIM inversion.

        `sample(x_T=..., eta=0)` with the same arguments then leads back to the images, about: the error falls as
        1 / steps, and with each refinement.

        convention: "paper", "diffusers" or "openai" (`jddim.inversion.inversion_table`). refine: k more evaluations a
            step, which solve for the x_T from which `sample` does lead back (`jddim.inversion.invert_loop`).
        eta: 0, the only one that can be inverted; the checkpoint's own plays no part.
        steps, spacing, clip, clip_range, rederive_eps, labels, guidance_scale, null_label, batch_size, progress: as
            for `sample`.

        Works inside `jit`, `vmap` and `grad`, as `sample` does. Raises ValueError with everything wrong in one message,
        images beyond -2..2 and self-conditioned networks included; FloatingPointError if a NaN or infinity appears.
        """
        asked: dict[str, Any] = {"clip": clip, "clip_range": clip_range, "rederive_eps": rederive_eps}
        ddim = self.with_sampler(**{name: value for name, value in asked.items() if value is not None})
        config = ddim.model.config
        if np.ndim(images) != 4 or not len(images):
            raise ValueError(
                f"invert: images must have shape (num, h, w, {config.in_channels}) with num at least 1, "
                f"got {np.shape(images)}"
            )
        dtype = at_least_float32(ddim.model.dtype)
        table = ddim.table(steps, spacing, dtype)
        labels = None if labels is None else jnp.asarray(labels)
        num, shape = len(images), (*images.shape[1:3], config.in_channels)
        problems = ddim._problems(
            None, num, table, images, None, shape, batch_size, dtype, needs_noise=False, start="images"
        )
        problems += _label_problems(config, labels, num) + _range_problems(images)
        null_label = ddim.null_label_for(guidance_scale, null_label)
        problems += ddim._guidance_problems(guidance_scale, null_label, num, "ddim")
        if not _is_zero(eta):
            problems.append(f"inversion is deterministic, so eta must be 0, got {eta}: added noise cannot be undone")
        if ddim.sampler.self_condition:
            problems.append(
                "this network is self-conditioned: a step depends on the x0 of the one before it, which inversion "
                "only comes to after it"
            )
        try:
            check_inversion(table, convention, refine, ddim.sampler.prediction_type)
        except ValueError as error:
            problems.append(str(error))
        program = ddim._program("ddim", None)
        if problems:
            raise ValueError("invert: " + "; ".join(problems))

        rows, limits = inversion_table(table, convention), ddim._limits(dtype)
        scales = None if guidance_scale is None else jnp.broadcast_to(jnp.asarray(guidance_scale, dtype), (num,))

        def begin(batch: _Batch) -> State:
            return init_state(batch.of(images), rows)

        def advance(batch: _Batch, state: State, segment: StepTable) -> State:
            return _invert_steps(
                ddim.model,
                state,
                segment,
                limits,
                None if labels is None else batch.of(labels),
                None if scales is None else (batch.of(scales), jnp.asarray(null_label)),
                program=program,
                refine=refine,
            )

        batches = _in_batches(num, batch_size, rows, begin, advance, 0, progress)
        inverted = [state.x_t[:taken] for taken, state in batches]
        return inverted[0] if len(inverted) == 1 else jnp.concatenate(inverted)

    def denoiser(
        self, labels: ArrayLike | None = None, *, guidance_scale: Scale | None = None, null_label: int | None = None
    ) -> Denoiser:
        """`denoise(x_t, t)`, the network as the loops of `jddim.sampling`, `jddim.editing` and the like take it.

        labels: `(b,)`, for a network with classes. guidance_scale, null_label: as in `sample`; the scale may also be a
        function of t (`jddim.guidance`). A learned variance is left out. Closes over the weights: under `jit`, pass
        the model to the jitted function and call this on `dataclasses.replace(ddim, model=model)`, or every weight
        becomes a constant of the program.
        Raises ValueError if labels or guidance are not this network's.
        """
        labels = None if labels is None else jnp.asarray(labels)
        num = 1 if labels is None or labels.ndim == 0 else labels.shape[0]
        problems = _label_problems(self.model.config, labels, num)
        scale = 1.0 if callable(guidance_scale) else guidance_scale
        null_label = self.null_label_for(guidance_scale, null_label)
        problems += self._guidance_problems(scale, null_label, num, "ddim")
        if problems:
            raise ValueError("denoiser: " + "; ".join(problems))
        guidance = None if guidance_scale is None else (guidance_scale, null_label)
        return _denoiser(self.model, self._program("ddim", None), labels, guidance)

    def conventions(self, dtype: DTypeLike = np.float32) -> dict[str, Any]:
        """The checkpoint's conventions as keyword arguments of `sample_loop`, and of `inpaint_loop` and `invert_loop`.

        invert_loop takes no self_condition, which is among them for a network that needs it alone.
        """
        options: dict[str, Any] = {
            "prediction_type": self.sampler.prediction_type,
            "rederive_eps": self.sampler.rederive_eps,
            **self._limits(dtype),
        }
        return options | ({"self_condition": True} if self.sampler.self_condition else {})

    @property
    def null_label(self) -> int | None:
        """The label that meant none in training, as the checkpoint records it; None: it does not."""
        return None if self.metadata is None else self.metadata.null_label

    def null_label_for(self, guidance_scale: Any, null_label: int | None) -> int | None:
        """The null label to guide with: the one given, else, where there is guidance, the checkpoint's own."""
        return null_label if guidance_scale is None or null_label is not None else self.null_label

    def _guidance_problems(self, scale: ArrayLike | None, null_label: int | None, num: int, method: str) -> list[str]:
        if scale is None:
            return (
                [] if null_label is None else ["null_label is for guidance: give guidance_scale too, or leave it out"]
            )
        config = self.model.config
        if config.class_embedding != "learned":
            return ["guidance_scale needs a network with learned class labels; this one has none"]
        problems = []
        if null_label is None or not 0 <= null_label < (config.num_classes or 0):
            problems.append(
                f"guidance_scale needs null_label, the one of 0..{(config.num_classes or 1) - 1} that meant no label "
                f"in training; got {null_label}"
            )
        if np.shape(scale) not in ((), (num,)):
            problems.append(
                f"guidance_scale must be a scalar or one value per image ({num},), got shape {np.shape(scale)}"
            )
        elif not isinstance(scale, jax.core.Tracer) and not np.isfinite(np.asarray(scale, float)).all():
            problems.append(f"guidance_scale must be finite, got {scale}")
        if method == "ddpm" and self.sampler.variance == "learned_range":
            problems.append("guidance of a learned variance is not defined: use method ddim, or a fixed variance")
        return problems

    def _program(self, method: str, trajectory_every: int | None) -> _Program:
        c = self.sampler
        return _Program(
            method=method,
            solver=None if method in ("ddim", "ddpm") else find(method, also=("ddpm",)),
            prediction_type=c.prediction_type,
            timestep_scale=c.timestep_scale,
            rederive_eps=c.rederive_eps,
            variance=c.variance,
            self_condition=c.self_condition,
            trajectory_every=trajectory_every,
        )

    def _limits(self, dtype: DTypeLike) -> dict[str, tuple[Array, Array]]:
        """What keeps x0 in range, as the loops' arguments."""
        c = self.sampler
        if c.threshold_ratio is not None:
            return {"threshold": (jnp.asarray(c.threshold_ratio, dtype), jnp.asarray(c.threshold_max, dtype))}
        if not c.clip:
            return {}
        return {"clip_range": (jnp.asarray(c.clip_range[0], dtype), jnp.asarray(c.clip_range[1], dtype))}

    def _problems(
        self,
        key: Array | None,
        num: int | None,
        table: StepTable,
        x_T: Array | np.ndarray | None,
        noise: Array | np.ndarray | None,
        shape: tuple[int, ...],
        batch_size: int | None,
        dtype: DTypeLike,
        *,
        needs_noise: bool,
        start: str = "x_T",
    ) -> list[str]:
        """Everything wrong with the arguments that all methods take, as sentences; `start`: what x_T is called."""
        config = self.model.config
        problems = size_problems(config, (shape[0], shape[1]))
        outputs = 2 if self.sampler.variance == "learned_range" else 1
        if outputs * config.in_channels != config.out_channels:
            problems.append(
                f"this model maps {config.in_channels} channels to {config.out_channels}; sampling needs "
                + ("twice as many out (its variance is learned)" if outputs == 2 else "both equal")
            )
        if num is None or num < 1:
            problems.append(f"num must be at least 1, got {num}")
            return problems
        if batch_size is not None and batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {batch_size}")
        if key is None and (x_T is None or (noise is None and needs_noise)):
            what = "x_T" if x_T is None else "the noise of each step (eta > 0)"
            problems.append(f"a key is needed for {what}: jax.random.key(seed)")
        if key is not None and not (isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
            got = f"{key.dtype}{list(key.shape)}" if isinstance(key, Array) else repr(key)
            problems.append(f"key must be jax.random.key(seed), got {got}")
        elif key is not None and key.shape not in ((), (num,)):
            problems.append(f"key must be one key, or one per image ({num},), got shape {key.shape}")
        low, high = self.sampler.clip_range
        if self.sampler.clip and not low < high:
            problems.append(f"clip_range must be (low, high) with low < high, got {self.sampler.clip_range}")
        if self.sampler.threshold_ratio is not None and not 0 < self.sampler.threshold_ratio <= 1:
            problems.append(f"threshold_ratio must lie in (0, 1], got {self.sampler.threshold_ratio}")
        try:
            check_prediction(table, self.sampler.prediction_type)
        except ValueError as error:
            problems.append(str(error))
        for name, array, expected in (
            (start, x_T, (num, *shape)),
            ("noise", noise, (table.num_steps, num, *shape)),
        ):
            if array is None:
                continue
            if np.shape(array) != expected:
                of_steps = f", one row for each of {table.num_steps} steps" if name == "noise" else ""
                problems.append(f"{name} must have shape {expected}{of_steps}, got {np.shape(array)}")
                if np.ndim(array) == len(expected) and _channels_first(array, expected[-1]):
                    problems.append(
                        f"{name} looks like (N, C, H, W), got {np.shape(array)}: transpose it to (N, H, W, C)"
                    )
            elif array.dtype != dtype:
                problems.append(f"{name} must be {jnp.dtype(dtype)}, got {array.dtype}")
            elif not isinstance(array, jax.core.Tracer) and not _all_finite(array):
                where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
                problems.append(f"{name} holds a NaN or infinity, first at {where}")
        return problems


@dataclasses.dataclass(frozen=True)
class _Program:
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
def _steps(
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
    program: _Program,
) -> State:
    """One segment of the scan, the program that `sample` compiles. Everything that may change is an argument."""
    denoise = _denoiser(cast_kernels(model), program, labels, guidance)
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
def _invert_steps(
    model: Network,
    state: State,
    rows: StepTable,
    limits: dict[str, tuple[Array, Array]],
    labels: Array | None,
    guidance: tuple[Array, Array] | None,
    *,
    program: _Program,
    refine: int,
) -> State:
    """One segment of inversion, the program that `invert` compiles."""
    denoise = _denoiser(cast_kernels(model), program, labels, guidance)
    conventions: dict[str, Any] = {
        "prediction_type": program.prediction_type,
        "rederive_eps": program.rederive_eps,
        **limits,
    }
    return invert_steps(denoise, state, rows, refine=refine, **conventions)


def _denoiser(model: Denoiser, program: _Program, labels: Array | None, guidance: tuple[Any, Any] | None) -> Denoiser:
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


_keys = jax.jit(lambda key, start, num: sample_keys(key, num, start), static_argnums=2)
_initial_noise = jax.jit(initial_noise, static_argnums=(1, 2))


class _Batch(NamedTuple):
    """Images low..low+taken-1 of a run, computed as `size` of them: the last batch too has the others' program."""

    low: int
    taken: int
    size: int

    def of(self, x: Array | np.ndarray, axis: int = 0) -> Array:
        """Its part of `x`; its last sample repeated to make a full batch, whose copies are dropped afterwards."""
        rows = jnp.asarray(x[(slice(None),) * axis + (slice(self.low, self.low + self.taken),)])
        missing = self.size - self.taken
        if not missing:
            return rows
        return jnp.concatenate([rows, jnp.repeat(jnp.take(rows, jnp.array([-1]), axis), missing, axis)], axis)


def _in_batches(
    num: int,
    batch_size: int | None,
    table: Any,
    begin: Callable[[_Batch], State],
    advance: Callable[[_Batch, State, Any], State],
    start: int,
    progress: bool,
    seen: Callable[[_Batch, State, Any], None] | None = None,
) -> Iterator[tuple[int, State]]:
    """Each batch from `begin` through the table by `advance`: (how many of its samples count, its last state).

    In segments if there is progress to show or `seen` wants to be called after each. start: the number of image 0.
    Raises FloatingPointError if a sample leaves the finite numbers.
    """
    size = min(batch_size or num, num)
    cut = segments(table) if progress or seen else [table]
    with Progress(num, f"{table.num_steps} steps", enabled=progress) as bar:
        for low in range(0, num, size):
            batch = _Batch(low, min(size, num - low), size)
            state = begin(batch)
            for segment in cut:
                state = advance(batch, state, segment)
                if progress:  # between segments Ctrl-C is heard, and a NaN seen, with a terminal or without
                    _raise_if_bad(state, table, start + low, batch.taken)
                    bar.add(batch.taken * segment.num_steps / table.num_steps)
                if seen is not None:
                    seen(batch, state, segment)
            _raise_if_bad(state, table, start + low, batch.taken)
            yield batch.taken, state


def eta_problems(eta: ArrayLike, num: int, table: StepTable) -> list[str]:
    """What is wrong with eta, a scalar or `(num,)`, for this table, as sentences."""
    if np.shape(eta) not in ((), (num,)):
        return [f"eta must be a scalar or one value per image ({num},), got shape {np.shape(eta)}"]
    if isinstance(eta, jax.core.Tracer):
        return []
    etas = np.asarray(eta, float)
    bad = ~((etas >= 0) & np.isfinite(etas))
    if bad.any():
        return [f"eta must be a finite number >= 0, got {etas[bad].flat[0]}"]
    if np.max(etas) > (limit := largest_eta(table)):
        return [
            f"eta {np.max(etas):g} is too large for this table: above {limit:g} a step's "
            "1 - alpha_bar_prev - sigma^2 is negative"
        ]
    return []


def _range_problems(images: Array | np.ndarray) -> list[str]:
    """Unclipped samples overshoot [-1, 1] a little; what leaves [-2, 2] is something else."""
    if isinstance(images, jax.core.Tracer) or images.size == 0 or not _all_finite(images):
        return []
    low, high = float(images.min()), float(images.max())
    if low >= -2 and high <= 2:
        return []
    return [f"images must lie in [-1, 1], got {low:g}..{high:g}; of numbers in 0..255 take x / 127.5 - 1"]


def _label_problems(config: ModelConfig, labels: Array | None, num: int) -> list[str]:
    kind = config.class_embedding
    if kind is None:
        return [] if labels is None else ["this network has no classes: leave labels out"]
    if labels is None:
        what = f"integers in 0..{(config.num_classes or 1) - 1}" if kind == "learned" else f"for a {kind} embedding"
        return [f"this network is class-conditional: give labels, one an image, {what}"]
    shape = labels.shape
    if kind == "identity":
        return [] if len(shape) == 2 and shape[0] == num else [f"labels must have shape ({num}, width), got {shape}"]
    if shape != (num,):
        return [f"labels must have shape ({num},), one an image, got {shape}"]
    if kind == "timestep" or isinstance(labels, jax.core.Tracer):
        return []
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return [f"labels must be integers, got {labels.dtype}"]
    outside = [int(label) for label in np.asarray(labels) if not 0 <= label < (config.num_classes or 1)]
    if outside:
        return [f"labels must lie in 0..{(config.num_classes or 1) - 1}, got {outside[0]}"]
    return []


def _channels_first(array: Array | np.ndarray, channels: int) -> bool:
    """Whether images (or noise) of so many channels have PyTorch's layout."""
    return array.shape[-3] == channels != array.shape[-1]


def _all_finite(array: Array | np.ndarray) -> bool:
    """Asked where the array is: what lies on a GPU is not fetched for it."""
    return bool((jnp if isinstance(array, Array) else np).isfinite(array).all())


def _is_zero(eta: ArrayLike) -> bool:
    return not isinstance(eta, jax.core.Tracer) and not np.any(np.asarray(eta))


def _raise_if_bad(state: State, table: StepTable, start: int, count: int) -> None:
    """Raise if any of the batch's first `count` samples has left the finite numbers."""
    if isinstance(state.first_bad, jax.core.Tracer):
        return
    first_bad = np.asarray(state.first_bad)[:count]
    bad = np.flatnonzero(first_bad >= 0)
    if bad.size:
        worst = bad[np.argmin(first_bad[bad])]
        step = int(first_bad[worst])
        raise FloatingPointError(
            f"a NaN or infinity appeared in image {start + worst} at step {step + 1} of {table.num_steps} "
            f"(t = {np.asarray(table.t)[step]}), in {bad.size} of {count} images of this batch; "
            "check the weights (jddim verify), or clip x0, or use float32"
        )
