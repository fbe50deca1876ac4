"""What `jddim.load` returns: a model, its schedule and its source's sampling conventions, ready to sample."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.checkpoint.folder import load_metadata, load_params
from jddim.checkpoint.metadata import Metadata
from jddim.config import SamplerConfig
from jddim.ddim import StepTable, sampler_table
from jddim.guidance import Scale
from jddim.inversion import check_inversion, inversion_table
from jddim.models import Network
from jddim.models.building import build_model
from jddim.models.layers import at_least_float32
from jddim.run.batches import Batch, in_batches
from jddim.run.problems import (
    channels_first,
    common_problems,
    eta_problems,
    guidance_problems,
    is_zero,
    label_problems,
    range_problems,
)
from jddim.run.programs import Program, draw_keys, draw_noise, invert_segment, network_denoiser, sample_segment
from jddim.sampling import Denoiser, State, Trajectory, init_state
from jddim.schedule import NoiseSchedule, make_schedule
from jddim.solvers import cast, find, memory_of


def load(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> DDIM:
    """A checkpoint written by `jddim convert`, ready to sample.

    dtype: the network's compute dtype, float32 or bfloat16; the sampler's state, the norms and the softmax stay
    float32. Raises `jddim.checkpoint.folder.CheckpointError` if the folder is absent, incomplete, edited or too new.
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
            if x_T is not None and x_T.ndim == 4 and not channels_first(x_T, ddim.model.config.in_channels):
                image_size = (x_T.shape[1], x_T.shape[2])
        shape = (*image_size, ddim.model.config.in_channels)
        needs_noise = method == "ddpm" or (solver.stochastic if solver else not is_zero(eta))
        problems += common_problems(
            ddim.model.config,
            ddim.sampler,
            table,
            num,
            shape,
            dtype,
            x_T=x_T,
            key=key,
            noise=noise,
            needs_noise=needs_noise,
            batch_size=batch_size,
        )
        if num is not None and num >= 1:
            problems += eta_problems(eta, num, table) if method == "ddim" else []
            problems += label_problems(ddim.model.config, labels, num)
            null_label = ddim.null_label_for(guidance_scale, null_label)
            problems += guidance_problems(ddim.model.config, ddim.sampler, guidance_scale, null_label, num, method)
        if problems:
            raise ValueError("sample: " + "; ".join(problems))
        assert num is not None

        limits = ddim._limits(dtype)
        etas = jnp.broadcast_to(jnp.asarray(eta, dtype), (num,))
        scales = None if guidance_scale is None else jnp.broadcast_to(jnp.asarray(guidance_scale, dtype), (num,))

        def begin(batch: Batch) -> State:
            x = batch.of(x_T) if x_T is not None else draw_noise(keys_of(batch), shape, dtype)
            state = init_state(x, table, every, self_condition=ddim.sampler.self_condition)
            return state if solver is None else state._replace(memory=memory_of(table, x))

        def keys_of(batch: Batch) -> Array | None:
            if key is None or key.ndim:
                return None if key is None else batch.of(key)
            return draw_keys(key, start + batch.low, batch.size)

        def advance(batch: Batch, state: State, segment: Any) -> State:
            noise_rows = None
            if noise is not None:
                first = int(segment.step[0])
                noise_rows = batch.of(noise[first : first + segment.num_steps], axis=1)
            return sample_segment(
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

        def seen(batch: Batch, state: State, segment: Any) -> None:
            if on_segment is not None and state.trajectory is not None and every is not None:
                last = int(segment.step[-1])
                x_t, x0_hat = (x[: batch.taken] for x in (state.x_t, state.trajectory.x0_hat[last // every]))
                on_segment(Preview(start + batch.low, last + 1, table.num_steps, x_t, x0_hat))

        images: list[Array] = []
        trajectories: list[Trajectory] = []
        watch = None if on_segment is None else seen
        for taken, state in in_batches(num, batch_size, table, begin, advance, start, progress, watch):
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
        problems = common_problems(
            config, ddim.sampler, table, num, shape, dtype, x_T=images, batch_size=batch_size, start="images"
        )
        problems += label_problems(config, labels, num) + range_problems(images)
        null_label = ddim.null_label_for(guidance_scale, null_label)
        problems += guidance_problems(ddim.model.config, ddim.sampler, guidance_scale, null_label, num, "ddim")
        if not is_zero(eta):
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

        def begin(batch: Batch) -> State:
            return init_state(batch.of(images), rows)

        def advance(batch: Batch, state: State, segment: StepTable) -> State:
            return invert_segment(
                ddim.model,
                state,
                segment,
                limits,
                None if labels is None else batch.of(labels),
                None if scales is None else (batch.of(scales), jnp.asarray(null_label)),
                program=program,
                refine=refine,
            )

        batches = in_batches(num, batch_size, rows, begin, advance, 0, progress)
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
        problems = label_problems(self.model.config, labels, num)
        scale = 1.0 if callable(guidance_scale) else guidance_scale
        null_label = self.null_label_for(guidance_scale, null_label)
        problems += guidance_problems(self.model.config, self.sampler, scale, null_label, num, "ddim")
        if problems:
            raise ValueError("denoiser: " + "; ".join(problems))
        guidance = None if guidance_scale is None else (guidance_scale, null_label)
        return network_denoiser(self.model, self._program("ddim", None), labels, guidance)

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

    def _program(self, method: str, trajectory_every: int | None) -> Program:
        c = self.sampler
        return Program(
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
