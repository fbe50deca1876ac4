"""Guidance: functions around denoisers that steer them to a label, or along any gradient. The result is a denoiser.

Classifier-free guidance needs two predictions, with the label and without: a `Pair`. Classifier guidance adds a
gradient, such as that of log p(y | x_t), to the score.

A `scale` is a number, one value per sample `(b,)`, or a function of t `(b,)` that returns either (guidance in an
interval of t: arXiv:2404.07724). Scale 1 is the conditional model and 0 the unconditional one, as in diffusers, OpenAI
and lucidrains; Ho and Salimans' w (arXiv:2207.12598) is scale - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jddim import ddim
from jddim.ddim import StepTable, per_sample
from jddim.sampling import (
    Denoiser,
    Draws,
    Limits,
    Trajectory,
    as_eta,
    check_prediction,
    is_zero,
    limiter,
    update_loop,
)
from jddim.schedule import ContinuousSchedule, NoiseSchedule, Schedule

Scale = ArrayLike | Callable[[Array], ArrayLike]

Pair = Callable[[Array, Array], tuple[Array, Array]]
"""`pair(x_t, t)` -> (conditional, unconditional), two predictions of one type, each like x_t."""

CondFn = Callable[[Array, Array], Array]
"""`cond_fn(x_t, t)` -> the gradient with respect to x_t, and like it, of what should become more likely."""


def pair(conditional: Denoiser, unconditional: Denoiser) -> Pair:
    """Two denoisers, which may be two networks."""
    return lambda x_t, t: (conditional(x_t, t), unconditional(x_t, t))


def label_pair(model: Callable[..., Array], labels: Array, null_label: ArrayLike) -> Pair:
    """One class-conditional network `model(x_t, t, labels)`, called once with twice the batch.

    labels: `(b,)`. null_label: the number that stood for "no label" when it was trained.
    """
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def predict(x_t: Array, t: Array) -> tuple[Array, Array]:
        conditional, unconditional = jnp.split(
            model(jnp.tile(x_t, (2, *[1] * (x_t.ndim - 1))), jnp.tile(t, 2), both), 2
        )
        return conditional, unconditional

    return predict


def classifier_free(predict: Pair, scale: Scale, *, rescale: ArrayLike = 0.0) -> Denoiser:
    """(1 - scale) unconditional + scale conditional: classifier-free guidance, exactly the one at 0, the other at 1.

    rescale: phi in [0, 1], how far the standard deviation of each sample's prediction is taken back to the conditional
    one's (Lin et al., arXiv:2305.08891, Eq. 15 and 16, who use 0.7; `guidance_rescale` in diffusers).
    """

    def denoise(x_t: Array, t: Array) -> Array:
        conditional, unconditional = predict(x_t, t)
        return _rescaled(_between(unconditional, conditional, _at(scale, t, x_t)), conditional, rescale)

    return denoise


def projected(predict: Pair, scale: Scale, *, rescale: ArrayLike = 0.7, keep_parallel: ArrayLike = 0.0) -> Denoiser:
    """Classifier-free guidance without its part along the conditional prediction, which oversaturates.

    Adaptive projected guidance (arXiv:2410.02416) as lucidrains has it: conditional + (scale - 1) times the part of
    conditional - unconditional that is orthogonal to conditional, plus `keep_parallel` in [0, 1] of the parallel
    part; then `rescale` as in `classifier_free`. The defaults are lucidrains'.
    """

    def denoise(x_t: Array, t: Array) -> Array:
        conditional, unconditional = predict(x_t, t)
        update = conditional - unconditional
        axes = tuple(range(1, update.ndim))
        along = (update * conditional).sum(axes, keepdims=True) / jnp.square(conditional).sum(axes, keepdims=True)
        parallel = along * conditional
        update = update - parallel + keep_parallel * parallel
        return _rescaled(conditional + (_at(scale, t, x_t) - 1) * update, conditional, rescale)

    return denoise


def on_channels(predict: Pair, guide: Callable[[Pair], Denoiser], channels: int | None = None) -> Denoiser:
    """Guidance of the first channels alone; the rest is the conditional prediction's.

    So facebookresearch's DiT has it, of 3 channels, and so a learned variance is left as it is. guide: from a pair to a
    denoiser, `classifier_free` for instance. channels: None: half, where the rest is a learned variance.
    """

    def denoise(x_t: Array, t: Array) -> Array:
        conditional, unconditional = predict(x_t, t)
        first = conditional.shape[-1] // 2 if channels is None else channels
        guided = guide(lambda x_t, t: (conditional[..., :first], unconditional[..., :first]))(x_t, t)
        return jnp.concatenate([guided, conditional[..., first:]], axis=-1)

    return denoise


class GuidedOptions(Draws, total=False):
    """The keyword arguments of `cfg_plus_plus_loop`, but scale and trajectory_every."""

    eta: ArrayLike
    prediction_type: str
    clip_range: Limits | None


@overload
def cfg_plus_plus_loop(
    predict: Pair,
    x_T: Array,
    table: StepTable,
    *,
    scale: Scale,
    trajectory_every: None = None,
    **options: Unpack[GuidedOptions],
) -> Array: ...
@overload
def cfg_plus_plus_loop(
    predict: Pair,
    x_T: Array,
    table: StepTable,
    *,
    scale: Scale,
    trajectory_every: int,
    **options: Unpack[GuidedOptions],
) -> tuple[Array, Trajectory]: ...
def cfg_plus_plus_loop(
    predict: Pair,
    x_T: Array,
    table: StepTable,
    *,
    scale: Scale,
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Trajectory]:
    """DDIM with CFG++ (Chung et al., arXiv:2406.08070, Algorithm 2): x0 is guided, the direction term is not.

    scale: lambda in [0, 1], between the unconditional x0 and the conditional one. The direction's eps is the
    unconditional prediction's. The other arguments, the result and what raises are `jddim.sampling.sample_loop`'s.
    """
    check_prediction(table, prediction_type)
    return update_loop(
        cfg_plus_plus(predict, scale),
        cfg_plus_plus_update(eta=eta, prediction_type=prediction_type, clip_range=clip_range),
        x_T,
        table,
        key=key,
        noise=noise,
        deterministic=is_zero(eta),
        outputs=2,
        trajectory_every=trajectory_every,
    )


def cfg_plus_plus(predict: Pair, scale: Scale) -> Denoiser:
    """CFG++'s predictions, guided and then unconditional, as the channels of one, for `cfg_plus_plus_update`."""

    def denoise(x_t: Array, t: Array) -> Array:
        conditional, unconditional = predict(x_t, t)
        guided = _between(unconditional, conditional, _at(scale, t, x_t))
        return jnp.concatenate([guided, unconditional], axis=-1)

    return denoise


def cfg_plus_plus_update(
    *,
    eta: ArrayLike = 0.0,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
) -> Callable[..., tuple[Array, Array]]:
    """`cfg_plus_plus_loop`'s step, for a denoiser of `cfg_plus_plus`; what the arguments mean is said there."""
    limit = limiter(clip_range, threshold)

    def update(x_t: Array, output: Array, noise: Array, row: StepTable) -> tuple[Array, Array]:
        guided, unconditional = jnp.split(output, 2, axis=-1)
        x0, _ = ddim.predict_both(guided, x_t, row.alpha_t, row.sigma_t, prediction_type)
        _, eps = ddim.predict_both(unconditional, x_t, row.alpha_t, row.sigma_t, prediction_type)
        x0 = x0 if limit is None else limit(x0)
        return ddim.ddim_step(x0, eps, noise, **ddim.coefficients(row), eta=as_eta(eta, x_t)), x0

    return update


def classifier_guided(
    denoise: Denoiser,
    cond_fn: CondFn,
    schedule: NoiseSchedule | tuple[ArrayLike, ArrayLike],
    *,
    prediction_type: str = "epsilon",
    clip_range: Limits | None = None,
    threshold: Limits | None = None,
) -> Denoiser:
    """Eps - sigma_t cond_fn(x_t, t): Algorithm 2 of Dhariwal and Nichol (arXiv:2105.05233).

    denoise: predicts `prediction_type`; the result predicts eps. schedule: the training's, or alpha and sigma at each
    of its t, `(T,)` both. clip_range, threshold: as in `jddim.sampling.sample_loop`, of the denoiser's x0.
    OpenAI's `condition_score` takes the eps that x0 implies after clipping, and does not clip again what the gradient
    makes of it: give clip_range=(-1, 1) here, and sample with clip off, to do the same.
    What else the denoiser takes, such as a self-conditioned one's x0_hat, is passed on. Raises ValueError if it returns
    a learned variance too.
    """
    columns = schedule if isinstance(schedule, tuple) else schedule_columns(schedule)
    limit = limiter(clip_range, threshold)

    def guided(x_t: Array, t: Array, *rest: Array) -> Array:
        output = denoise(x_t, t, *rest)
        if output.shape != x_t.shape:
            raise ValueError(
                f"classifier_guided takes a denoiser that returns what is like x_t {x_t.shape}, it returned "
                f"{output.shape}: leave a learned variance out (jddim.denoisers.without_variance)"
            )
        alpha_t, sigma_t = (jnp.asarray(column, x_t.dtype)[t] for column in columns)
        x0, eps = ddim.predict_both(output.astype(x_t.dtype), x_t, alpha_t, sigma_t, prediction_type)
        if limit is not None:
            eps = ddim.predict_eps(x_t, limit(x0), alpha_t, sigma_t)
        return eps - per_sample(sigma_t, x_t) * cond_fn(x_t, t)

    return guided


def schedule_columns(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and sigma at each t of a schedule, float64 `(T,)`. Raises ValueError for a continuous one."""
    if isinstance(schedule, ContinuousSchedule):
        raise ValueError("this needs a schedule of T timesteps, whose t it looks alpha and sigma up by")
    every_t = np.arange(schedule.num_train_timesteps)
    return schedule.alpha(every_t), schedule.sigma(every_t)


def label_gradient(classifier: Callable[[Array, Array], Array], labels: Array, scale: Scale = 1.0) -> CondFn:
    """Scale times the gradient of log p(label | x_t): the `cond_fn` of a classifier of noisy images.

    classifier: `classifier(x_t, t)` -> logits `(b, classes)`. labels: `(b,)` integers.
    """

    def cond_fn(x_t: Array, t: Array) -> Array:
        def log_likelihood(x_t: Array) -> Array:
            log_p = jax.nn.log_softmax(classifier(x_t, t))
            return jnp.take_along_axis(log_p, labels[:, None], axis=1).sum()

        gradient: Array = jax.grad(log_likelihood)(x_t)
        return _at(scale, t, x_t) * gradient

    return cond_fn


def _at(scale: Scale, t: Array, x_t: Array) -> Array:
    return per_sample(jnp.asarray(scale(t) if callable(scale) else scale, x_t.dtype), x_t)


def _between(unconditional: Array, conditional: Array, scale: Array) -> Array:
    return (1 - scale) * unconditional + scale * conditional


def _rescaled(guided: Array, conditional: Array, phi: ArrayLike) -> Array:
    """Each sample of `guided` with a standard deviation that is phi of the way back to that of `conditional`."""
    if isinstance(phi, (int, float)) and phi == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return (1 + jnp.asarray(phi, guided.dtype) * (ratio - 1)) * guided
