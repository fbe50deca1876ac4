"""Editing by sampling: interpolation between noises, image-to-image, inpainting. Short functions around the loop.

Image-to-image is the loop on the end of a table, from a noised image:

    rest = tail(table, strength=0.6)
    x_t = ddim.add_noise(images, noise, rest.alpha_bar_t[0])
    x_0 = sampling.sample_loop(denoise, x_t, rest)

Inpainting is the loop with a step that puts back what is known: `inpaint_loop`, or `keep_known` around any `Update`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim import ddim
from jddim.ddim import StepTable, per_sample
from jddim.sampling import Denoiser, Update, check_prediction, ddim_update, is_zero, update_loop


def slerp(a: Array, b: Array, fraction: ArrayLike) -> Array:
    """Spherical interpolation between two noises, Eq. 67 of arXiv:2010.02502 (appendix D.5).

    a, b: `(..., h, w, c)`, each image one vector; fraction: in [0, 1], broadcast against the leading axes. Exactly a at
    0 and b at 1. A straight line keeps no norm: halfway between two Gaussian noises it has 0.7 of theirs, which no x_T
    has. Where the two point the same way, or opposite ways, no arc is determined, and the straight line is taken.
    """
    axes = (-3, -2, -1)
    fraction = jnp.asarray(fraction, a.dtype)[..., None, None, None]
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


def inpaint_loop(
    denoise: Denoiser,
    x_T: Array,
    table: StepTable,
    known: Array,
    keep: ArrayLike,
    *,
    eta: ArrayLike = 0.0,
    resample: int = 1,
    key: Array | None = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: tuple[ArrayLike, ArrayLike] | None = None,
    threshold: tuple[ArrayLike, ArrayLike] | None = None,
    rederive_eps: bool = False,
    self_condition: bool = False,
    trajectory_every: int | None = None,
) -> Any:
    """DDIM that fills in what is not known of an image: after each step the known pixels are put back, noised.

    known: `(b, h, w, c)` in [-1, 1], of which the pixels count where `keep` is 1. keep: in [0, 1], broadcast against
    known (`(h, w, 1)`, `(b, h, w, 1)`): 1 where the image stays, 0 where it is made anew; between, a blend.
    resample: 1, the known pixels carry x_T's noise all the way, so that eta 0 is deterministic; r > 1, RePaint's
    resampling with jumps of one step (arXiv:2201.09865, Algorithm 1): every step but the last is taken r times, going
    back in between, with fresh noise throughout (a key is needed, or noise `((S - 1) r + 1, 2, b, h, w, c)`), which
    lets the two parts agree; r times the evaluations.
    The other arguments and the result are `jddim.sampling.sample_loop`'s. Raises ValueError on shapes that do not fit.
    """
    if known.shape != x_T.shape:
        raise ValueError(f"known must have x_T's shape {x_T.shape}, got {known.shape}")
    if resample < 1:
        raise ValueError(f"resample must be at least 1, got {resample}")
    check_prediction(table, prediction_type)
    update = ddim_update(
        eta=eta,
        prediction_type=prediction_type,
        clip_range=clip_range,
        threshold=threshold,
        rederive_eps=rederive_eps,
    )
    if resample == 1:
        update, draws, deterministic = keep_known(update, known, keep, x_T), None, is_zero(eta)
    else:
        update, draws, deterministic = repaint(update, known, keep, resample), 2, False
        table = repeated(table, resample)
    return update_loop(
        denoise,
        update,
        x_T,
        table,
        key=key,
        noise=noise,
        deterministic=deterministic,
        draws=draws,
        self_condition=self_condition,
        trajectory_every=trajectory_every,
    )


def keep_known(update: Update, known: Array, keep: ArrayLike, known_noise: Array) -> Update:
    """A step that ends with `known`, noised to where the step ends by always the same noise, wherever `keep` is 1.

    Any step, one with a memory too: a solver's pixels do not mix, only the network mixes them.
    """
    keep = _mask(keep, known)

    def kept(x_t: Array, output: Array, noise: Array, row: Any, *memory: Any) -> tuple[Any, ...]:
        x_prev, x0, *memory_next = update(x_t, output, noise, row, *memory)
        x_known = ddim.add_noise(known, known_noise, row.alpha_bar_prev)
        return keep * x_known + (1 - keep) * x_prev, x0, *memory_next

    return kept


def repaint(update: Update, known: Array, keep: ArrayLike, times: int) -> Update:
    """RePaint's step, for a table of `repeated` rows and two draws: `keep_known` with fresh noise, and the way back.

    The known and the unknown pixels share the first draw, being different pixels. All but the last of a row's
    repetitions go back to where it started: x_t ~ N(sqrt(a) x_prev, 1 - a), a = alpha_bar_t / alpha_bar_prev.
    Raises ValueError for a step with a memory.
    """

    def painted(x_t: Array, output: Array, noise: Array, row: StepTable, *memory: Any) -> tuple[Array, Array]:
        if memory:
            raise ValueError(
                "RePaint goes back to noisier samples, of which a solver's memory knows nothing: take a step without "
                "one (ddim_update, ancestral_update), or resample=1"
            )
        x_prev, x0 = keep_known(update, known, keep, noise[0])(x_t, output, noise[0], row)
        a = per_sample(row.alpha_bar_t / row.alpha_bar_prev, x_t)
        back = jnp.sqrt(a) * x_prev + jnp.sqrt(1 - a) * noise[1]
        again = (row.step % times < times - 1) & (row.t_prev >= 0)
        return jnp.where(again, back, x_prev), x0

    return painted


def repeated(table: StepTable, times: int) -> StepTable:
    """Every row but the last so many times, numbered anew. A table on the host."""
    rows = np.append(np.repeat(np.arange(table.num_steps - 1), times), table.num_steps - 1)
    again = StepTable(*(np.asarray(column)[rows] for column in table))
    return again._replace(step=np.arange(len(rows), dtype=np.int32))


def _mask(keep: ArrayLike, known: Array) -> Array:
    keep = jnp.asarray(keep, known.dtype)
    try:
        fits = jnp.broadcast_shapes(keep.shape, known.shape) == known.shape
    except ValueError:
        fits = False
    if not fits:
        example = (*known.shape[1:3], 1)
        raise ValueError(f"keep must broadcast to the images {known.shape}, e.g. {example}; got {keep.shape}")
    return keep
