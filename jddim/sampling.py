"""The sampling loops: one `lax.scan` over a step table, for any denoiser. The only user of random keys.

A denoiser is a function `denoise(x_t, t) -> output`: x_t `(b, ..., c)` float, t `(b,)` as in the table (int32; float on
a continuous schedule or off the grid), the output like x_t: what
the network predicts, the noise unless `prediction_type` says otherwise. Labels, guidance, rescaled t and the like are
functions around it (`jddim.denoisers`). The loops are traceable and hold no jit of their own: wrap them as you like,
and pass a model to the jitted function as an argument (closing over it compiles every weight in as a constant).

Randomness is per sample: sample i of a seed draws from `fold_in(key, i)`, x_T from its fold 0 and the noise of
step s from its fold s + 1. Its image depends on (seed, i) alone, whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jddim import ddim
from jddim.ddim import Column, StepTable

Denoiser = Callable[..., Array]

Memory = object
"""What a step hands to the next: any pytree of arrays, or None."""

Update = Callable[..., tuple[Array, Array, *tuple[Memory, ...]]]
"""`update(x_t, output, noise, row)` -> (x_prev, x0): a sampler's step, from the denoiser's output at a table's row.

One with a memory, such as a multistep solver, is `update(x_t, output, noise, row, memory)` -> (x_prev, x0, memory).
"""

Limits = tuple[ArrayLike, ArrayLike]


class Rows(Protocol):
    """A `StepTable`, or a named tuple of its columns and more, as an update may need."""

    @property
    def step(self) -> Column: ...
    @property
    def t(self) -> Column: ...
    @property
    def t_prev(self) -> Column: ...
    @property
    def alpha_t(self) -> Column: ...
    @property
    def sigma_t(self) -> Column: ...
    @property
    def alpha_prev(self) -> Column: ...
    @property
    def sigma_prev(self) -> Column: ...
    @property
    def fresh(self) -> Column: ...
    @property
    def num_steps(self) -> int: ...
    def __iter__(self) -> Iterator[Column]: ...


Table = TypeVar("Table", bound=Rows)


class Trajectory(NamedTuple):
    """The way from x_T to x_0, kept every k steps; n = ceil(S / k).

    t: `(n,)`, the timestep reached, of the table's dtype (-1, on a continuous schedule 0, is x_0); x_t: `(n, b, ...)`,
    the sample there; x0_hat: `(n, b, ...)`, the clean image predicted by the step that led there (clipped, if the
    sampler clips). The last entry is the end.
    """

    t: Array
    x_t: Array
    x0_hat: Array


class State(NamedTuple):
    """What the scan carries from step to step.

    x_t: `(b, ...)`. first_bad: int32 `(b,)`, the index of the step after which a sample first held a NaN or an
    infinity, or -1. trajectory: filled as the steps are taken, or None. x0_hat: the last step's x0, zeros at first.
    memory: what a step hands to the next, or None. deep: what the denoiser hands to its next evaluation, or None.
    """

    x_t: Array
    first_bad: Array
    trajectory: Trajectory | None
    x0_hat: Array
    memory: Memory = None
    deep: Array | None = None


class Draws(TypedDict, total=False):
    """Where the noise of the steps comes from: one of the two."""

    key: Array | None
    noise: Array | None


class Conventions(TypedDict, total=False):
    """What makes x0 and eps of a network's output: a source's conventions, as in `sample_loop`."""

    prediction_type: str
    clip_range: Limits | None
    threshold: Limits | None


class AncestralOptions(Draws, Conventions, total=False):
    """The keyword arguments of `ancestral_loop`, but trajectory_every."""

    variance: str
    self_condition: bool


class SampleOptions(Draws, Conventions, total=False):
    """The keyword arguments of `sample_loop`, but trajectory_every."""

    eta: ArrayLike
    rederive_eps: bool
    self_condition: bool


class UpdateOptions(Draws, total=False):
    """The keyword arguments of `update_loop`, but trajectory_every."""

    deterministic: bool
    draws: int | None
    outputs: int
    memory: Memory
    self_condition: bool


def sample_keys(key: Array, num: int, start: int = 0) -> Array:
    """The keys `(num,)` of samples start..start+num-1 of a seed: `fold_in(key, i)`."""
    return numbered_keys(key, start + jnp.arange(num, dtype=jnp.uint32))


def numbered_keys(key: Array, numbers: Array) -> Array:
    """The keys `(b,)` of the samples of a seed with these numbers, uint32 `(b,)`: `fold_in(key, i)`."""
    return jax.vmap(partial(jax.random.fold_in, key))(numbers)


def initial_noise(keys: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """x_T ~ N(0, I), `(b, *shape)`, for the samples with these keys `(b,)`."""
    return _normal(keys, 0, shape, dtype)


@overload
def sample_loop(
    denoise: Denoiser, x_T: Array, table: Rows, *, trajectory_every: None = None, **options: Unpack[SampleOptions]
) -> Array: ...
@overload
def sample_loop(
    denoise: Denoiser, x_T: Array, table: Rows, *, trajectory_every: int, **options: Unpack[SampleOptions]
) -> tuple[Array, Trajectory]: ...
def sample_loop(
    denoise: Denoiser,
    x_T: Array,
    table: Rows,
    *,
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """DDIM from x_T to x_0 (Eq. 12 of arXiv:2010.02502 at every row of `table`). Traceable.

    denoise: see the module's docstring. x_T: `(b, ...)` float, standard normal; on EDM's path, that times the first
    sigma_t. table: `jddim.ddim.step_table`.
    eta: >= 0, scalar or `(b,)`, may be traced; 0 is deterministic, 1 has the DDPM posterior's variance.
    key: one key, whose sample i then draws from `fold_in(key, i)`, or one key per sample `(b,)`; or
    noise: `(S, b, ...)`, row s used in the s-th step taken. One of the two is needed unless `is_zero(eta)`.
    prediction_type: what the denoiser returns (`jddim.ddim.predict_both`).
    clip_range: clamp x0 to (low, high) at each step, or None. threshold: instead, (ratio, largest) of
    `jddim.ddim.dynamic_threshold`. rederive_eps: recompute eps from the x0 so limited for the direction term (OpenAI,
    lucidrains); False keeps the network's (the walk-through, ermongroup, diffusers).
    self_condition: call `denoise(x_t, t, x0_hat)` with the x0 of the step before, zeros at first (lucidrains;
    arXiv:2208.04202).
    trajectory_every: also return the `Trajectory` kept every so many steps.

    Returns x_0 `(b, ...)`, in x_T's dtype, or (x_0, trajectory). Raises ValueError on shapes that do not agree, and
    where the table starts at alpha_t = 0 and the denoiser predicts eps, which tells nothing of x0 there.
    A NaN from the denoiser propagates to that sample alone.
    """
    check_prediction(table, prediction_type)
    update = ddim_update(
        eta=eta,
        prediction_type=prediction_type,
        clip_range=clip_range,
        threshold=threshold,
        rederive_eps=rederive_eps,
    )
    return update_loop(
        denoise,
        update,
        x_T,
        table,
        key=key,
        noise=noise,
        deterministic=is_zero(eta),
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )


@overload
def ancestral_loop(
    denoise: Denoiser, x_T: Array, table: Rows, *, trajectory_every: None = None, **options: Unpack[AncestralOptions]
) -> Array: ...
@overload
def ancestral_loop(
    denoise: Denoiser, x_T: Array, table: Rows, *, trajectory_every: int, **options: Unpack[AncestralOptions]
) -> tuple[Array, Trajectory]: ...
def ancestral_loop(
    denoise: Denoiser,
    x_T: Array,
    table: Rows,
    *,
    key: Array | None = None,
    noise: Array | None = None,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip_range: Limits | None = (-1.0, 1.0),
    threshold: Limits | None = None,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """DDPM ancestral sampling from x_T to x_0 (Algorithm 2 of arXiv:2006.11239), on any table. Traceable.

    variance: "fixed_small" or "fixed_large" (`jddim.ddim.ddpm_step`; "fixed_large" on a shortened table is ermongroup's
    `ddpm_noisy`), or "learned_range": the denoiser returns twice x_T's channels, of which the second half is the v that
    interpolates between the two. Clips x0 to [-1, 1] by default, as Ho et al. do.
    The other arguments and the result are `sample_loop`'s.
    """
    check_prediction(table, prediction_type)
    update = ancestral_update(
        variance=variance, prediction_type=prediction_type, clip_range=clip_range, threshold=threshold
    )
    return update_loop(
        denoise,
        update,
        x_T,
        table,
        key=key,
        noise=noise,
        outputs=2 if variance == "learned_range" else 1,
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )


def init_state(x_T: Array, table: Rows, trajectory_every: int | None = None) -> State:
    """The state before the first step of `table` (the whole one: it sizes the trajectory).

    All of it is made from x_T, so it lies where x_T does, and varies over the devices that x_T varies over.
    """
    trajectory = None
    if trajectory_every is not None:
        if trajectory_every < 1:
            raise ValueError(f"trajectory_every must be at least 1, got {trajectory_every}")
        slots = -(-table.num_steps // trajectory_every)
        empty = jnp.broadcast_to(jnp.zeros_like(x_T), (slots, *x_T.shape))
        trajectory = Trajectory(jnp.zeros_like(x_T, table.t_prev.dtype, shape=slots), empty, empty)
    return State(x_T, jnp.full_like(_all_finite(x_T), -1, jnp.int32), trajectory, jnp.zeros_like(x_T))


def result(state: State) -> Array | tuple[Array, Trajectory]:
    """What a loop returns of its last state: the samples, or (samples, trajectory)."""
    return state.x_t if state.trajectory is None else (state.x_t, state.trajectory)


def ddim_update(
    *,
    eta: ArrayLike = 0.0,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
) -> Callable[..., tuple[Array, Array]]:
    """`sample_loop`'s step, for `update_loop`; what the arguments mean is said there."""
    predict = predictor(prediction_type, clip_range, threshold, rederive_eps=rederive_eps)

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        x0, eps = predict(output, x_t, row)
        return ddim.ddim_step(x0, eps, noise, **ddim.coefficients(row), eta=as_eta(eta, x_t)), x0

    return update


def consistency_update(
    *,
    least_sigma: float = 0.0,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
) -> Callable[..., tuple[Array, Array]]:
    """Multistep consistency sampling (Song et al., arXiv:2303.01469, Algorithm 1), for `update_loop`.

    Each step's x0 is noised anew, to where the step ends; no eps is kept. least_sigma: where the network takes x_t for
    clean; a step adds noise of sqrt(sigma_prev^2 - least_sigma^2). The other arguments are `sample_loop`'s.
    """
    limit = limiter(clip_range, threshold)

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        x0, _ = ddim.predict_both(output, x_t, row.alpha_t, row.sigma_t, prediction_type)
        x0 = x0 if limit is None else limit(x0)
        added = jnp.maximum((row.sigma_prev - least_sigma) * (row.sigma_prev + least_sigma), 0)
        return ddim.add_noise(x0, noise, row.alpha_prev, ddim.root(added)), x0

    return update


def ancestral_update(
    *,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip_range: Limits | None = (-1.0, 1.0),
    threshold: Limits | None = None,
) -> Callable[..., tuple[Array, Array]]:
    """`ancestral_loop`'s step, for `update_loop`; what the arguments mean is said there."""
    limit = limiter(clip_range, threshold)

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        v: Array | None = None
        if variance == "learned_range":
            output, v = jnp.split(output, 2, axis=-1)
        x0, _ = ddim.predict_both(output, x_t, row.alpha_t, row.sigma_t, prediction_type)
        x0 = x0 if limit is None else limit(x0)
        return ddim.ddpm_step(x_t, x0, noise, **ddim.coefficients(row), variance=variance if v is None else v), x0

    return update


@overload
def update_loop(
    denoise: Denoiser,
    update: Update,
    x_T: Array,
    table: Rows,
    *,
    trajectory_every: None = None,
    **options: Unpack[UpdateOptions],
) -> Array: ...
@overload
def update_loop(
    denoise: Denoiser,
    update: Update,
    x_T: Array,
    table: Rows,
    *,
    trajectory_every: int,
    **options: Unpack[UpdateOptions],
) -> tuple[Array, Trajectory]: ...
@overload
def update_loop(
    denoise: Denoiser,
    update: Update,
    x_T: Array,
    table: Rows,
    *,
    trajectory_every: int | None,
    **options: Unpack[UpdateOptions],
) -> Array | tuple[Array, Trajectory]: ...
def update_loop(
    denoise: Denoiser,
    update: Update,
    x_T: Array,
    table: Rows,
    *,
    key: Array | None = None,
    noise: Array | None = None,
    deterministic: bool = False,
    draws: int | None = None,
    outputs: int = 1,
    memory: Memory = None,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """The loop around any step that looks at one evaluation of the denoiser: a sampler of one's own. Traceable.

    update: see `Update`. deterministic: it uses no noise, so neither key nor noise is needed. draws: it takes so many
    independent noises a step, `(draws, b, ...)`, and `noise` has rows of that shape; None: one, `(b, ...)`. outputs:
    how many times x_T's channels the denoiser returns. memory: the first step's, for an update with one; None: without.
    The table may have more columns than a `StepTable`. The other arguments and the result are `sample_loop`'s.
    """
    state = update_steps(
        denoise,
        update,
        init_state(x_T, table, trajectory_every)._replace(memory=memory),
        table,
        key=key,
        noise=noise,
        deterministic=deterministic,
        draws=draws,
        outputs=outputs,
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )
    return result(state)


def update_steps(
    denoise: Denoiser,
    update: Update,
    state: State,
    table: Rows,
    *,
    key: Array | None = None,
    noise: Array | None = None,
    deterministic: bool = False,
    draws: int | None = None,
    outputs: int = 1,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> State:
    """The rows of `table`, which may be a segment of the whole, from `state`. Arguments as in `update_loop`.

    `noise`, if given, has one row for each row of this table. Taking a table's segments one after the other gives,
    to the bit, what the whole gives; that is how progress is shown.
    """
    noise_at = _noise_source(state.x_t, table, key, noise, deterministic=deterministic, draws=draws)
    return _scan(denoise, state, table, noise_at, update, trajectory_every, outputs, self_condition)


def is_zero(eta: ArrayLike) -> bool:
    """Whether eta is known to be 0 for every sample, so that no noise is needed. What is traced is not known."""
    return not isinstance(eta, jax.core.Tracer) and not np.any(np.asarray(eta))


def as_eta(eta: ArrayLike, x_t: Array) -> Array:
    """Eta in x_t's dtype. Raises ValueError unless it is a scalar or one value per sample."""
    eta = jnp.asarray(eta, x_t.dtype)
    if eta.shape not in ((), x_t.shape[:1]):
        raise ValueError(f"eta must be a scalar or one value per sample {x_t.shape[:1]}, got shape {eta.shape}")
    return eta


def check_prediction(table: Rows, prediction_type: str) -> None:
    """Raise ValueError if the table's path has no such prediction. Only a table on the host is looked at.

    It has none where x0 would be divided by alpha_t = 0, and no v where alpha_t^2 + sigma_t^2 is not 1.
    """
    if prediction_type == "v_prediction" and isinstance(table.alpha_t, np.ndarray):
        alpha, sigma = table.alpha_t.astype(np.float64), table.sigma_t.astype(np.float64)
        if np.abs(alpha**2 + sigma**2 - 1).max() > 1e-3:
            raise ValueError(
                "v is of paths with alpha_t^2 + sigma_t^2 = 1, which this table's is not: such networks predict the "
                "velocity eps - x0, prediction_type velocity"
            )
    if prediction_type == "epsilon" and isinstance(table.alpha_t, np.ndarray) and (table.alpha_t == 0).any():
        raise ValueError(
            "a predicted eps tells nothing of x0 at alpha_t = 0, where this table starts (a flow, zero terminal SNR); "
            "such models predict v, x0 or a velocity: set prediction_type to what this one does"
        )


def segments(table: Table, at_least: int = 8, every: int | None = None) -> list[Table]:
    """`table` cut into equal segments, at least so many if S allows, so that they share one compiled program.

    every: a segment also ends wherever that many steps have been taken.
    """
    S = table.num_steps
    if every is not None and every < 1:
        raise ValueError(f"trajectory_every must be at least 1, got {every}")
    both = S if every is None else math.gcd(S, min(every, S))
    length = max(n for n in range(1, max(S // at_least, 1) + 1) if both % n == 0)
    return [jax.tree.map(lambda column, i=i: column[i : i + length], table) for i in range(0, S, length)]


# What the scan runs over beside the table (rows of explicit noise, or None), and the noise of one step from both.
NoiseSource = tuple[Array | None, Callable[[ArrayLike, Array | None], Array]]


def _noise_source(
    x: Array,
    table: Rows,
    key: Array | None,
    noise: Array | None,
    *,
    deterministic: bool = False,
    draws: int | None = None,
) -> NoiseSource:
    if deterministic and key is None and noise is None:
        return None, lambda step, _: jnp.zeros((), x.dtype)
    if noise is not None:
        if key is not None:
            raise ValueError("give either key or noise, not both")
        expected = (table.num_steps, *(() if draws is None else (draws,)), *x.shape)
        if noise.shape != expected:
            raise ValueError(
                f"noise must have one row per step: expected {expected} for {table.num_steps} steps, got {noise.shape}"
            )
        return noise.astype(x.dtype), lambda step, row: row
    if key is None:
        raise ValueError("give either key or noise: eta > 0 adds noise at each step")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be made by jax.random.key, got an array of {key.dtype}")
    if key.shape not in ((), x.shape[:1]):
        raise ValueError(f"key must be one key or one per sample {x.shape[:1]}, got shape {key.shape}")
    keys = sample_keys(key, x.shape[0]) if key.shape == () else key
    shape = x.shape[1:]
    if draws is None:
        return None, lambda step, _: _normal(keys, step + 1, shape, x.dtype)
    return None, lambda step, _: jnp.moveaxis(_normal(keys, step + 1, (draws, *shape), x.dtype), 1, 0)


def _normal(keys: Array, fold: ArrayLike, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, fold), shape, dtype))(keys)


def predictor(
    prediction_type: str, clip_range: Limits | None, threshold: Limits | None, *, rederive_eps: bool
) -> Callable[[Array, Array, StepTable], tuple[Array, Array]]:
    """`predict(output, x_t, row)` -> (x0, eps), x0 limited; what the arguments mean is said at `sample_loop`."""
    limit = limiter(clip_range, threshold)

    def predict(output: Array, x_t: Array, row: StepTable) -> tuple[Array, Array]:
        x0, eps = ddim.predict_both(output, x_t, row.alpha_t, row.sigma_t, prediction_type)
        if limit is not None:
            x0 = limit(x0)
            if rederive_eps:
                eps = ddim.predict_eps(x_t, x0, row.alpha_t, row.sigma_t)
        return x0, eps

    return predict


def limiter(clip_range: Limits | None, threshold: Limits | None) -> Callable[[Array], Array] | None:
    """What keeps x0 in range: dynamic thresholding if asked, else the clamp, else nothing."""
    if threshold is not None:
        return lambda x0: ddim.dynamic_threshold(x0, *threshold)
    return None if clip_range is None else lambda x0: jnp.clip(x0, *clip_range)


def _scan(
    denoise: Denoiser,
    state: State,
    table: Rows,
    noise_at: NoiseSource,
    update: Update,
    trajectory_every: int | None,
    outputs: int,
    self_condition: bool,
) -> State:
    """The one loop: each row asks the denoiser, for `outputs` times x_t's channels, and takes `update`'s step."""
    noise_rows, noise_of = noise_at

    def step(state: State, row_and_noise: tuple[Rows, Array | None]) -> tuple[State, None]:
        # Behind the barrier a step is the same program in every segment, also where XLA removes the loop of one step.
        state, (row, noise_row) = lax.optimization_barrier((state, row_and_noise))
        x_t = state.x_t
        t = jnp.broadcast_to(row.t, x_t.shape[:1])
        deep = state.deep
        if deep is not None:
            output, deep = denoise(x_t, t, deep, row.step)
        else:
            output = denoise(x_t, t, state.x0_hat) if self_condition else denoise(x_t, t)
        expected = (*x_t.shape[:-1], outputs * x_t.shape[-1])
        if output.shape != expected:
            raise ValueError(f"denoise must return {expected} for an x_t like {x_t.shape}, it returned {output.shape}")
        carried = [] if state.memory is None else [state.memory]
        x_prev, x0, *carried = update(x_t, output.astype(x_t.dtype), noise_of(row.step, noise_row), row, *carried)
        x_prev, x0 = x_prev.astype(x_t.dtype), x0.astype(x_t.dtype)  # a float32 table may not widen a bfloat16 state
        newly_bad = ~_all_finite(x_prev) & (state.first_bad < 0)
        first_bad = jnp.where(newly_bad, row.step, state.first_bad)
        trajectory = _record(state.trajectory, row, x_prev, x0, trajectory_every)
        return State(x_prev, first_bad, trajectory, x0, carried[0] if carried else None, deep), None

    state, _ = lax.scan(step, state, (jax.tree.map(jnp.asarray, table), noise_rows))
    return state


def _all_finite(x: Array) -> Array:
    """Whether each sample of x `(b, ...)` is finite, `(b,)`."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def _record(trajectory: Trajectory | None, row: Rows, x_t: Array, x0: Array, every: int | None) -> Trajectory | None:
    """Write this step into its slot; a slot's last write, its k-th step or the table's end, is what remains."""
    if trajectory is None or every is None:
        return None
    slot = row.step // every
    values = (row.t_prev, x_t, x0)
    return Trajectory(
        *(lax.dynamic_update_index_in_dim(b, v, slot, 0) for b, v in zip(trajectory, values, strict=True))
    )
