"""Editing by sampling: interpolation between noises, image-to-image, inpainting. Short functions around the loop.

Image-to-image is the loop on the end of a table, from a noised image:

    rest = tail(table, strength=0.6)
    x_t = ddim.add_noise(images, noise, rest.alpha_t[0], rest.sigma_t[0])
    x_0 = sampling.sample_loop(denoise, x_t, rest)

Inpainting is the loop with a step that puts back what is known: `inpaint_loop`, or `keep_known` around any `Update`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim import ddim
from jddim.ddim import Column, StepTable
from jddim.sampling import (
    Denoiser,
    Limits,
    Memory,
    Rows,
    SampleOptions,
    Trajectory,
    Update,
    check_prediction,
    ddim_update,
    is_zero,
    update_loop,
)


def slerp(a: Array, b: Array, fraction: ArrayLike) -> Array:
    """Spherical interpolation between two noises, Eq. 67 of arXiv:2010.02502 (appendix D.5).

    a, b: `(..., h, w, c)`, each image one vector; fraction: in [0, 1], broadcast against the leading axes. Exactly a at
    0 and b at 1. A straight line keeps no norm: halfway between two Gaussian noises it has 0.7 of theirs, which no x_T
    has. Where the two point the same way, or opposite ways, no arc is determined, and the straight line is taken.
    """
    axes = (-3, -2, -1)
    fraction = jnp.asarray(fraction, a.dtype)[..., None, None, None]
    fraction = fraction.reshape((1,) * (a.ndim - fraction.ndim) + fraction.shape)
    norms = jnp.sqrt(jnp.square(a).sum(axes, keepdims=True) * jnp.square(b).sum(axes, keepdims=True))
    cosine = (a * b).sum(axes, keepdims=True) / norms
    line = 1 - jnp.abs(cosine) < 1e-6  # float32's rounding of the cosine
    theta = jnp.arccos(jnp.where(line, 0, jnp.clip(cosine, -1, 1)))
    of_a, of_b = jnp.sin((1 - fraction) * theta) / jnp.sin(theta), jnp.sin(fraction * theta) / jnp.sin(theta)
    line |= (fraction == 0) | (fraction == 1)  # where sin / sin may be a rounding off 1
    return jnp.where(line, 1 - fraction, of_a) * a + jnp.where(line, fraction, of_b) * b


def slerp_line(a: Array, b: Array, num: int) -> Array:
    """`num` noises from a to b, both included: `(h, w, c)` -> `(num, h, w, c)`."""
    return slerp(a[None], b[None], jnp.linspace(0, 1, num))


def slerp_grid(corners: Array, rows: int, columns: int) -> Array:
    """Noises between four: corners `(2, 2, h, w, c)`, by row and column -> `(rows, columns, h, w, c)`."""
    left, right = (slerp_line(corners[0, i], corners[1, i], rows) for i in (0, 1))
    return jax.vmap(lambda a, b: slerp_line(a, b, columns))(left, right)


def tail(table: StepTable, strength: float) -> StepTable:
    """The last int(S * strength) steps of `table`, at least one: how far an image is noised and sampled again.

    strength: in (0, 1], diffusers' image-to-image parameter; 1 is the whole table. The steps keep their numbers, so
    each draws the noise that it draws in the whole.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}: 1 starts from (almost) pure noise")
    kept = max(int(table.num_steps * strength), 1)
    return StepTable(*(column[table.num_steps - kept :] for column in table))


class InpaintOptions(SampleOptions, total=False):
    """The keyword arguments of `inpaint_loop`, but trajectory_every."""

    resample: int
    jump_length: int
    clean_known: bool


@overload
def inpaint_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    known: Array,
    keep: ArrayLike,
    *,
    trajectory_every: None = None,
    **options: Unpack[InpaintOptions],
) -> Array: ...
@overload
def inpaint_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    known: Array,
    keep: ArrayLike,
    *,
    trajectory_every: int,
    **options: Unpack[InpaintOptions],
) -> tuple[Array, Trajectory]: ...
def inpaint_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    known: Array,
    keep: ArrayLike,
    *,
    eta: ArrayLike = 0.0,
    resample: int = 1,
    jump_length: int = 1,
    clean_known: bool = False,
    key: Array | None = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
    rederive_eps: bool = False,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """DDIM that fills in what is not known of an image: after each step the known pixels are put back, noised.

    known: `(b, h, w, c)` in [-1, 1], of which the pixels count where `keep` is 1. keep: in [0, 1], broadcast against
    known (`(h, w, 1)`, `(b, h, w, 1)`): 1 where the image stays, 0 where it is made anew; between, a blend.
    resample: 1, the known pixels carry x_T's noise all the way, so that eta 0 is deterministic; r > 1, RePaint's
    resampling (arXiv:2201.09865, Algorithm 1; its jump_n_sample): every jump_length steps the sampler goes back as many
    and takes them again, r times in all, with fresh noise throughout, which lets the two parts agree; r times the
    evaluations. A key is needed, or noise `(N, 2, b, h, w, c)`, N the rows of `repaint_table`.
    clean_known: the known pixels are not noised, for a network that saw them clean in every x_t (Palette); resample 1.
    The other arguments and the result are `jddim.sampling.sample_loop`'s. Raises ValueError on shapes that do not fit.
    """
    if known.shape != x_T.shape:
        raise ValueError(f"known must have x_T's shape {x_T.shape}, got {known.shape}")
    if resample < 1:
        raise ValueError(f"resample must be at least 1, got {resample}")
    if resample > 1 and clean_known:
        raise ValueError(f"resample is of known pixels that are noised, so not beside clean_known, got {resample}")
    if resample == 1 and jump_length != 1:
        raise ValueError(f"jump_length is of resampling: give resample too, at least 2, got jump_length={jump_length}")
    check_prediction(table, prediction_type)
    update = ddim_update(
        eta=eta,
        prediction_type=prediction_type,
        clip_range=clip_range,
        threshold=threshold,
        rederive_eps=rederive_eps,
    )
    if resample == 1:
        kept = keep_known(update, known, keep, None if clean_known else x_T)
        edit, draws, deterministic = kept, None, is_zero(eta)
    else:
        edit, draws, deterministic = repaint(update, known, keep), 2, False
    if clean_known:
        keep = _mask(keep, known)
        x_T = keep * known + (1 - keep) * x_T
    return update_loop(
        denoise,
        edit,
        x_T,
        table if resample == 1 else repaint_table(table, resample, jump_length),
        key=key,
        noise=noise,
        deterministic=deterministic,
        draws=draws,
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )


def keep_of(mask: Array | np.ndarray) -> Array | np.ndarray:
    """A mask picture `(h, w, c)` in [-1, 1], white where images are made anew -> how much stays, `(h, w, 1)`."""
    return 1 - (mask.mean(axis=-1, keepdims=True) + 1) / 2


def keep_known(update: Update, known: Array, keep: ArrayLike, known_noise: Array | None) -> Update:
    """A step that ends with `known`, noised to where the step ends by always the same noise, wherever `keep` is 1.

    known_noise: None: not noised, for a network that saw it clean in every x_t (Palette); then x_T has it too.
    Any step, one with a memory too: a solver's pixels do not mix, only the network mixes them.
    """
    keep = _mask(keep, known)

    def kept(
        x_t: Array, output: Array, noise: Array, row: Rows, *memory: Memory
    ) -> tuple[Array, Array, *tuple[Memory, ...]]:
        x_prev, x0, *memory_next = update(x_t, output, noise, row, *memory)
        x_known = known
        if known_noise is not None:
            x_known = ddim.add_noise(known, known_noise, row.alpha_prev, row.sigma_prev)
        return keep * x_known + (1 - keep) * x_prev, x0, *memory_next

    return kept


def repaint(update: Update, known: Array, keep: ArrayLike) -> Update:
    """RePaint's step, for a `repaint_table` and two draws: `keep_known` with fresh noise, and the way back.

    The known and the unknown pixels share the first draw, being different pixels. Back to a noisier sample, however
    many steps away, is one draw, the table's.
    Raises ValueError for a step with a memory.
    """

    def painted(x_t: Array, output: Array, noise: Array, row: RepaintTable, *memory: Memory) -> tuple[Array, Array]:
        if memory:
            raise ValueError(
                "RePaint goes back to noisier samples, of which a solver's memory knows nothing: take a step without "
                "one (ddim_update, ancestral_update), or resample=1"
            )
        x_prev, x0, *_ = keep_known(update, known, keep, noise[0])(x_t, output, noise[0], row)
        return jnp.asarray(row.back_x) * x_prev + jnp.asarray(row.back_noise) * noise[1], x0

    return painted


class RepaintTable(NamedTuple):
    """A `StepTable` whose rows come again. back_x, back_noise: the next row starts from back_x x_prev + back_noise z.

    1 and 0 where a row follows that starts where this one ends; otherwise q(x_t | x_prev) of a noisier t.
    """

    step: Column
    t: Column
    t_prev: Column
    alpha_t: Column
    sigma_t: Column
    alpha_prev: Column
    sigma_prev: Column
    fresh: Column
    back_x: Column
    back_noise: Column

    @property
    def num_steps(self) -> int:
        """N, the number of rows, repetitions included."""
        return self.t.shape[0]


def repaint_table(table: StepTable, resample: int, jump_length: int = 1) -> RepaintTable:
    """The rows of `table` in RePaint's order (that of its published code), numbered anew. A table on the host.

    Of the S samples that rows start from, numbered from 0, the cleanest, each whose number is a multiple of
    jump_length, and below S - jump_length, is gone back from resample - 1 times, by jump_length.
    """
    S = table.num_steps
    if resample < 1 or not 1 <= jump_length < S:
        raise ValueError(
            f"resample must be at least 1 and jump_length lie in 1..{S - 1}, below the {S} steps of this table, got "
            f"{resample} and {jump_length}"
        )
    host = StepTable(*map(np.asarray, table))
    alpha_t, sigma_t, alpha_prev, sigma_prev = (np.asarray(column, np.float64) for column in host[3:7])

    def noisier(end: int, start: int) -> tuple[float, float]:
        """q(x_t | x_prev) from where the row `end` ends to where the row `start` starts: its factor and deviation."""
        factor = alpha_t[start] / alpha_prev[end]
        q = factor * sigma_prev[end] / sigma_t[start]
        return factor, sigma_t[start] * math.sqrt((1 - q) * (1 + q))

    rows: list[int] = []
    back: list[tuple[float, float]] = []
    for row in range(S):
        reached = S - 2 - row
        stops = reached % jump_length == 0 and 0 <= reached < S - jump_length
        block = list(range(row - jump_length + 1, row + 1))
        taken = [row, *(resample - 1 if stops else 0) * block]
        rows += taken
        for i, r in enumerate(taken):
            stays = r != row or i == len(taken) - 1
            back.append((1.0, 0.0) if stays else noisier(r, block[0]))
    again = StepTable(*(column[rows] for column in host))
    return RepaintTable(np.arange(len(rows), dtype=np.int32), *again[1:], *np.array(back, host.alpha_t.dtype).T)


def _mask(keep: ArrayLike, known: Array) -> Array:
    keep = jnp.asarray(keep, known.dtype)
    try:
        fits = jnp.broadcast_shapes(keep.shape, known.shape) == known.shape
    except ValueError:
        fits = False
    if not fits:
        example = (*known.shape[1:3], 1)
        raise ValueError(f"keep must broadcast to the images {known.shape}, e.g. {example}; got {keep.shape}")
    return keep.reshape((1,) * (known.ndim - keep.ndim) + keep.shape)
