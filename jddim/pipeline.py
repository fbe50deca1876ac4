"""What `jddim.load` returns: a model, its schedule and its source's sampling conventions, ready to sample."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.checkpoint import Metadata, build_model, load_metadata, load_params
from jddim.config import SamplerConfig, size_problems
from jddim.ddim import StepTable, largest_eta, step_table
from jddim.models import Network
from jddim.models.layers import at_least_float32
from jddim.progress import Progress
from jddim.sampling import State, Trajectory, ddim_steps, init_state, initial_noise, sample_keys, segments
from jddim.schedule import NoiseSchedule, make_schedule
from jddim.timesteps import make_timesteps


def load(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> DDIM:
    """A checkpoint written by `jddim convert`, ready to sample.

    dtype: the network's compute dtype, float32 or bfloat16; the sampler's state, the norms and the softmax stay
    float32. Raises `jddim.checkpoint.CheckpointError` if the folder is absent, incomplete, edited or too new.
    """
    metadata = load_metadata(path)
    model = build_model(metadata.model, load_params(path, metadata), dtype)
    return DDIM(model, make_schedule(metadata.schedule), metadata.sampler, metadata)


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

    def table(
        self,
        steps: int | None = None,
        spacing: str | Sequence[int] | np.ndarray | None = None,
        dtype: DTypeLike = np.float32,
    ) -> StepTable:
        """The step table of `steps` with a named spacing, or of an explicit descending list of timesteps.

        Defaults come from the checkpoint. The table has the source's number of rows, which "uniform" and "quad" do
        not always make equal to `steps` (see `jddim.timesteps`).
        """
        spacing = self.sampler.spacing if spacing is None else spacing
        if steps is None and isinstance(spacing, str):
            steps = self.sampler.num_steps
        return step_table(self.schedule, make_timesteps(spacing, self.schedule.num_train_timesteps, steps), dtype)

    def sample(
        self,
        key: Array | None = None,
        num: int | None = None,
        *,
        steps: int | None = None,
        eta: ArrayLike | None = None,
        spacing: str | Sequence[int] | np.ndarray | None = None,
        clip: bool | None = None,
        clip_range: tuple[float, float] | None = None,
        rederive_eps: bool | None = None,
        x_T: Array | np.ndarray | None = None,
        noise: Array | np.ndarray | None = None,
        image_size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        start: int = 0,
        trajectory_every: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Images `(num, h, w, c)` float32, nominally in [-1, 1] (not clamped unless x0 is clipped).

        key: `jax.random.key(seed)`. Image i of the result is image `start + i` of the seed: it depends on nothing
            else, so `num=7` and then `num=9, start=7` make the images of `num=16`. Not needed if x_T is given, and
            eta is 0 or noise is given.
        steps: S; spacing: a name in `jddim.timesteps.SPACINGS`, or a descending list of timesteps (then no steps).
        eta: 0 deterministic ... 1 as noisy as DDPM; a scalar or one value per image, `(num,)`. May be traced.
        clip: clamp x0 to clip_range at each step; rederive_eps: use the clipped x0's eps in the direction term.
        x_T: `(num, h, w, c)` float32 start; noise: `(S, num, h, w, c)` float32, row s used in the s-th step taken.
        image_size: (height, width) other than the checkpoint's. batch_size: images per compiled call, default all.
        trajectory_every: k returns `(images, Trajectory)` with every k-th step. progress: a bar on stderr.

        Everything that is None comes from the checkpoint. Works inside `jit`, `vmap` and `grad`, where values are
        traced and only shapes are checked; outside, one compiled program serves every eta, seed and set of weights
        of a shape and S.

        Raises ValueError with everything wrong in one message; FloatingPointError if a NaN or infinity appears,
        naming the image and the step (outside tracing only).
        """
        dtype = at_least_float32(self.model.dtype)
        table = self.table(steps, spacing, dtype)
        eta = self.sampler.eta if eta is None else eta
        clip = self.sampler.clip if clip is None else clip
        clip_range = self.sampler.clip_range if clip_range is None else clip_range
        rederive_eps = self.sampler.rederive_eps if rederive_eps is None else rederive_eps
        if num is None and x_T is not None:
            num = x_T.shape[0] if x_T.ndim else None
        if image_size is None:
            image_size = self.model.config.image_size
            if x_T is not None and x_T.ndim == 4:
                image_size = (x_T.shape[1], x_T.shape[2])
        shape = (*image_size, self.model.config.in_channels)
        problems = self._problems(
            key, num, table, eta, clip_range if clip else None, x_T, noise, shape, batch_size, dtype
        )
        if problems:
            raise ValueError("sample: " + "; ".join(problems))
        assert num is not None

        batch_size = min(batch_size or num, num)
        bounds = tuple(jnp.asarray(v, dtype) for v in clip_range) if clip else None
        etas = jnp.broadcast_to(jnp.asarray(eta, dtype), (num,))
        images: list[Array] = []
        trajectories: list[Trajectory] = []
        with Progress(num, f"{table.num_steps} steps", enabled=progress) as bar:
            for low in range(0, num, batch_size):
                rows = slice(low, min(low + batch_size, num))
                taken = rows.stop - low
                pad = partial(_pad, to=batch_size)  # the last batch has the others' shape, so their program
                keys = None if key is None else _keys(key, start + low, batch_size)
                x = _initial_noise(keys, shape, dtype) if x_T is None else pad(jnp.asarray(x_T)[rows])
                state = init_state(x, table, trajectory_every)
                for segment in segments(table) if bar.enabled else [table]:
                    noise_rows = None
                    if noise is not None:
                        first = int(segment.step[0])
                        noise_rows = pad(jnp.asarray(noise[first : first + segment.num_steps, rows]), axis=1)
                    state = _steps(
                        self.model,
                        state,
                        segment,
                        pad(etas[rows]),
                        keys if noise is None else None,
                        noise_rows,
                        bounds,
                        rederive_eps=rederive_eps,
                        trajectory_every=trajectory_every,
                    )
                    if bar.enabled:
                        _raise_if_bad(state, table, start + low, taken)
                        bar.add(taken * segment.num_steps / table.num_steps)
                _raise_if_bad(state, table, start + low, taken)
                images.append(state.x_t[:taken])
                if state.trajectory is not None:
                    t, x_t, x0_hat = state.trajectory
                    trajectories.append(Trajectory(t, x_t[:, :taken], x0_hat[:, :taken]))
        x_0 = images[0] if len(images) == 1 else jnp.concatenate(images)
        if trajectory_every is None:
            return x_0
        x_ts, x0_hats = (jnp.concatenate([part[i] for part in trajectories], axis=1) for i in (1, 2))
        return x_0, Trajectory(trajectories[0].t, x_ts, x0_hats)

    def _problems(
        self,
        key: Array | None,
        num: int | None,
        table: StepTable,
        eta: ArrayLike,
        clip_range: tuple[float, float] | None,
        x_T: Array | np.ndarray | None,
        noise: Array | np.ndarray | None,
        shape: tuple[int, ...],
        batch_size: int | None,
        dtype: DTypeLike,
    ) -> list[str]:
        """Everything wrong with `sample`'s arguments, as sentences."""
        config = self.model.config
        problems = size_problems(config, (shape[0], shape[1]))
        if config.in_channels != config.out_channels:
            problems.append(
                f"this model maps {config.in_channels} channels to {config.out_channels}; sampling needs both equal"
            )
        if num is None or num < 1:
            problems.append(f"num must be at least 1, got {num}")
            return problems
        if batch_size is not None and batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {batch_size}")
        if key is None and (x_T is None or (noise is None and not _is_zero(eta))):
            problems.append("a key is needed for " + ("x_T" if x_T is None else "eta > 0") + ": jax.random.key(seed)")
        if clip_range is not None and not clip_range[0] < clip_range[1]:
            problems.append(f"clip_range must be (low, high) with low < high, got {clip_range}")
        if np.shape(eta) not in ((), (num,)):
            problems.append(f"eta must be a scalar or one value per image ({num},), got shape {np.shape(eta)}")
        elif not isinstance(eta, jax.core.Tracer):
            bad = ~(np.asarray(eta) >= 0) | ~np.isfinite(np.asarray(eta, float))
            if bad.any():
                problems.append(f"eta must be a finite number >= 0, got {np.asarray(eta)[bad].flat[0]}")
            elif np.max(np.asarray(eta)) > (limit := largest_eta(table)):
                problems.append(
                    f"eta {np.max(np.asarray(eta)):g} is too large for this table: above {limit:g} a step's "
                    "1 - alpha_bar_prev - sigma^2 is negative"
                )
        for name, array, expected in (
            ("x_T", x_T, (num, *shape)),
            ("noise", noise, (table.num_steps, num, *shape)),
        ):
            if array is None:
                continue
            if np.shape(array) != expected:
                of_steps = f", one row for each of {table.num_steps} steps" if name == "noise" else ""
                problems.append(f"{name} must have shape {expected}{of_steps}, got {np.shape(array)}")
            elif array.dtype != dtype:
                problems.append(f"{name} must be {jnp.dtype(dtype)}, got {array.dtype}")
            elif not isinstance(array, jax.core.Tracer) and not np.isfinite(array).all():
                where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
                problems.append(f"{name} holds a NaN or infinity, first at {where}")
        return problems


@partial(jax.jit, static_argnames=("rederive_eps", "trajectory_every"))
def _steps(
    model: Network,
    state: State,
    table: StepTable,
    eta: Array,
    keys: Array | None,
    noise: Array | None,
    clip_range: tuple[Array, Array] | None,
    *,
    rederive_eps: bool,
    trajectory_every: int | None,
) -> State:
    """One segment of the scan, the program that `sample` compiles. Everything that may change is an argument."""
    return ddim_steps(
        model,
        state,
        table,
        eta=0.0 if keys is None and noise is None else eta,  # without noise eta is 0: `sample` has checked
        key=keys,
        noise=noise,
        clip_range=clip_range,
        rederive_eps=rederive_eps,
        trajectory_every=trajectory_every,
    )


_keys = jax.jit(lambda key, start, num: sample_keys(key, num, start), static_argnums=2)
_initial_noise = jax.jit(initial_noise, static_argnums=(1, 2))


def _pad(x: Array, to: int, axis: int = 0) -> Array:
    """`x` with its last sample repeated to make a full batch; the copies are dropped afterwards."""
    missing = to - x.shape[axis]
    return (
        x if not missing else jnp.concatenate([x, jnp.repeat(jnp.take(x, jnp.array([-1]), axis), missing, axis)], axis)
    )


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
