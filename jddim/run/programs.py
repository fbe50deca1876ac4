"""What is compiled: a segment of the scan, around the network as the scan takes it. One function for all doors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jddim.config import EDM, LEARNED, PREDICTION_TYPES, TWICE, VARIANCES, SamplerConfig, did_you_mean
from jddim.ddim import predict_both, rederive_eps
from jddim.denoisers import (
    with_condition,
    with_edm,
    with_labels,
    with_reversed_time,
    with_scaled_time,
    with_self_condition,
    without_variance,
)
from jddim.editing import keep_known, repaint
from jddim.guidance import (
    Pair,
    Scale,
    cfg_plus_plus,
    classifier_free,
    classifier_guided,
    label_gradient,
    label_pair,
    on_channels,
    projected,
)
from jddim.models import Network
from jddim.models.autoencoder import Autoencoder, Moments
from jddim.models.layers import cast_kernels
from jddim.run import request
from jddim.run.compiling import Bound, Jit, is_traced
from jddim.run.methods import Classified, Given, Guidance, Method
from jddim.sampling import Denoiser, State, Update, initial_noise, limiter, numbered_keys, update_steps
from jddim.schedule import EDMSchedule, Schedule

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled segment depends on beside shapes: static, hashable.

    guidance: its kind, or None. resampled: inpainting by RePaint, whose rows draw twice. guidance_channels,
    reversed_time: as in `SamplerConfig`. prediction_type: what the denoiser returns; edm: for a network of EDM's
    preconditioning, whose denoiser returns the velocity, its sigma_data and `with_edm`'s t_free. reuse: the steps that
    ask the whole network, where others ask the last `reuse_blocks` blocks of its way up; None: all ask the whole.
    """

    method: Method
    prediction_type: str
    timestep_scale: float
    rederive_eps: bool
    variance: str
    self_condition: bool
    guidance: str | None = None
    resampled: bool = False
    guidance_channels: int | None = None
    reversed_time: bool = False
    edm: tuple[float, float] | None = None
    reuse: tuple[int, ...] | None = None
    reuse_blocks: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a name that is not known."""
        for name, value, known in (
            ("prediction_type", self.prediction_type, PREDICTION_TYPES),
            ("variance", self.variance, VARIANCES),
            ("guidance", self.guidance or request.CLASSIFIER_FREE, request.GUIDANCES),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}{did_you_mean(value, known)}")

    @staticmethod
    def of(
        method: Method,
        sampler: SamplerConfig,
        schedule: Schedule,
        *,
        guidance: str | None = None,
        resampled: bool = False,
        guidance_channels: int | None = None,
    ) -> Program:
        """The program of a source's conventions on its schedule."""
        edm = None
        if sampler.prediction_type == EDM:
            edm = sampler.sigma_data, schedule.t_min if sampler.boundary and isinstance(schedule, EDMSchedule) else 0.0
        return Program(
            method=method,
            prediction_type=denoiser_returns(sampler),
            timestep_scale=sampler.timestep_scale,
            rederive_eps=sampler.rederive_eps,
            variance=sampler.variance,
            self_condition=sampler.self_condition,
            guidance=guidance,
            resampled=resampled,
            guidance_channels=guidance_channels,
            reversed_time=sampler.reversed_time,
            edm=edm,
        )

    @property
    def learned_variance(self) -> bool:
        """Whether a step reads the network's second half of channels."""
        return self.variance == LEARNED and self.method.takes_variance

    @property
    def outputs(self) -> int:
        """How many times x_t's channels the denoiser returns."""
        return 2 if self.learned_variance or self.guidance == request.CFG_PLUS_PLUS else 1


def denoiser_returns(sampler: SamplerConfig) -> str:
    """The prediction_type of `network_denoiser`'s output: the network's, but that of EDM's F the velocity."""
    return "velocity" if sampler.prediction_type == EDM else sampler.prediction_type


@partial(Jit, static_argnames=("program", "trajectory_every"))
def segment(
    model: Network, state: State, rows: Any, given: Given, *, program: Program, trajectory_every: int | None = None
) -> State:
    """The rows of a table, or of a part of it, from `state`. Everything that may change is an argument.

    trajectory_every: inside a transformation of the caller's, where the state holds the trajectory's buffers.
    """
    # What is constant (in a caller's jit, on a mesh, in an export) would be folded, and round otherwise.
    state, rows, given = lax.optimization_barrier((state, rows, given))
    ask = network_denoiser if program.reuse is None else reusing_denoiser
    denoise: Any = ask(cast_kernels(model), program, given.labels, given.guidance, given.condition)
    if given.classifier is None:
        update = program.method.update(denoise, given, program)
    else:
        update = _classified(denoise, given, given.classifier, program)
    if given.kept is not None:
        known, keep, noise = given.kept
        update = repaint(update, known, keep) if program.resampled else keep_known(update, known, keep, noise)
    return update_steps(
        denoise,
        update,
        state,
        rows,
        key=given.keys,
        noise=given.noise,
        deterministic=given.keys is None and given.noise is None,
        draws=2 if program.resampled else None,
        outputs=program.outputs,
        self_condition=program.self_condition,
        trajectory_every=trajectory_every,
    )


def network_denoiser(
    model: Network,
    program: Program,
    labels: jax.Array | None,
    guidance: Guidance | None,
    condition: jax.Array | None = None,
    call: Denoiser | None = None,
) -> Denoiser:
    """The network as the loops take it: given t as it was trained with, at these labels or guided by them.

    condition: `(b, h, w, channels)`, for a network that is given an image beside each x_t. call: what is asked in the
    model's place, with the model's arguments.
    """
    denoise = told_t(call or model, program)
    if program.variance in TWICE and not program.learned_variance:
        denoise = without_variance(denoise)
    if labels is not None and guidance is not None:
        denoise = _guided(denoise, labels, guidance, program)
    elif labels is not None:
        denoise = with_labels(denoise, labels)
    if condition is not None:
        denoise = with_condition(denoise, condition, first=model.config.condition_first)
    return with_self_condition(denoise) if program.self_condition else denoise


def reusing_denoiser(
    model: Network,
    program: Program,
    labels: jax.Array | None,
    guidance: Guidance | None,
    condition: jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`denoise(x_t, t, deep, step)` -> (output, deep): at the steps of `program.reuse` by the whole network.

    At the others its last blocks alone are asked, given the `deep` of the last whole step. The arguments are
    `network_denoiser`'s. A UNet's alone (`jddim.models.unet.UNet.shallow`).
    """
    unet: Any = model
    blocks = program.reuse_blocks

    def denoise(x_t: jax.Array, t: jax.Array, deep: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_whole, kept = jnp.isin(step, jnp.asarray(program.reuse)), [deep]

        def network(x_t: jax.Array, t: jax.Array, *labels: jax.Array) -> jax.Array:
            def shallow(deep: jax.Array) -> tuple[jax.Array, jax.Array]:
                return unet.shallow(x_t, t, *labels, deep=deep, blocks=blocks), deep

            output: jax.Array
            output, kept[0] = lax.cond(is_whole, lambda _: unet.whole(x_t, t, *labels, blocks=blocks), shallow, deep)
            return output

        output = network_denoiser(model, program, labels, guidance, condition, call=network)(x_t, t)
        return output, kept[0]

    return denoise


def told_t(model: Denoiser, program: Program) -> Denoiser:
    """The network given the loops' t, and returning what they expect. What else it takes is passed on."""
    denoise = model
    if program.edm is not None:
        sigma_data, t_free = program.edm
        denoise = with_edm(model, sigma_data, program.timestep_scale, t_free)
    elif program.timestep_scale != 1:
        denoise = with_scaled_time(model, program.timestep_scale)
    return with_reversed_time(denoise) if program.reversed_time else denoise


def _classified(denoise: Denoiser, given: Given, classifier: Classified, program: Program) -> Update:
    """The method's step from a guided eps, whose x0 is limited before the gradient and not again: condition_score.

    x_t has the row's alpha and sigma, which in inversion may be another t's than the one that is asked; what a step
    asks for again has its t's own. The gradient has the sigma of the t that is asked.
    """
    logits: Denoiser = cast_kernels(classifier.model)
    if program.timestep_scale != 1:
        logits = with_scaled_time(logits, program.timestep_scale)
    gradient = label_gradient(logits, classifier.labels, classifier.scale)
    kind, limits = program.prediction_type, given.limits
    limit = limiter(limits.get("clip_range"), limits.get("threshold"))
    columns = classifier.alpha, classifier.sigma
    again = classifier_guided(denoise, gradient, columns, prediction_type=kind, **limits)
    of_eps = dataclasses.replace(program, prediction_type="epsilon")
    update = program.method.update(again, given._replace(limits={}), of_eps)

    def guided(x_t: jax.Array, output: jax.Array, noise: jax.Array, row: Any, *memory: Any) -> Any:
        x0, eps = predict_both(output, x_t, row.alpha_t, row.sigma_t, kind)
        if limit is not None:
            eps = rederive_eps(x_t, limit(x0), eps, row.alpha_t, row.sigma_t)
        t = jnp.broadcast_to(row.t, x_t.shape[:1])
        return update(x_t, eps - classifier.sigma[row.t] * gradient(x_t, t), noise, row, *memory)

    return guided


def _guided(denoise: Denoiser, labels: jax.Array, guidance: Guidance, program: Program) -> Denoiser:
    pair, scale = label_pair(denoise, labels, guidance.null_label), guidance.scale
    if program.guidance == request.CFG_PLUS_PLUS:
        return cfg_plus_plus(pair, in_interval(scale, guidance.interval))
    rescale = {} if guidance.rescale is None else {"rescale": guidance.rescale}
    kind = projected if program.guidance == request.PROJECTED else classifier_free

    def guide(pair: Pair) -> Denoiser:
        return kind(pair, scale, **rescale)

    if program.guidance_channels is None and not program.learned_variance:
        guided = guide(pair)
    else:
        guided = on_channels(pair, guide, program.guidance_channels)
    if guidance.interval is None:
        return guided
    return only_in_interval(guided, with_labels(denoise, labels), guidance.interval)


def only_in_interval(guided: Denoiser, conditional: Denoiser, interval: tuple[jax.Array, jax.Array]) -> Denoiser:
    """Guidance where low <= t <= high (arXiv:2404.07724); elsewhere the network is asked once, with the label.

    t is one for all samples, as in the loops.
    """
    low, high = interval

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        output: jax.Array = lax.cond((low <= t[0]) & (t[0] <= high), guided, conditional, x_t, t)
        return output

    return denoise


def in_interval(scale: jax.Array, interval: tuple[jax.Array, jax.Array] | None) -> Scale:
    """A scale that guides where low <= t <= high and is 1 elsewhere; None: everywhere."""
    if interval is None:
        return scale
    low, high = interval
    return lambda t: jnp.where((low <= t) & (t <= high), scale, jnp.ones_like(scale))


@partial(Jit, static_argnames=())
def decode(autoencoder: Autoencoder, z: jax.Array) -> jax.Array:
    """Images of latents. Everything that may change is an argument."""
    return cast_kernels(autoencoder).decode(lax.optimization_barrier(z))


@partial(Jit, static_argnames=())
def encode(autoencoder: Autoencoder, images: jax.Array) -> jax.Array:
    """Latents of images, by the encoder's mean."""
    return cast_kernels(autoencoder).encode(lax.optimization_barrier(images))


@partial(Jit, static_argnames=())
def moments(autoencoder: Autoencoder, images: jax.Array) -> Moments:
    """The encoder's Gaussians of images."""
    return cast_kernels(autoencoder).moments(lax.optimization_barrier(images))


def by_parts(program: Bound[T], x: jax.Array, size: int) -> T:
    """`decode`, `encode` or `moments`, bound, of all of x, `size` at a time: in one program whatever their number.

    The last part is filled up with its last image, whose copies are dropped.
    """
    num = x.shape[0]
    missing = -num % size if size > 1 else 0  # an export's num may be a symbol
    x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
    parts = x.reshape(-1, size, *x.shape[1:])
    if is_traced([*program.leaves, x]):
        done = lax.map(program, parts)
    else:
        done = jax.tree.map(lambda *of: jnp.stack(of), *map(program, parts))
    whole: T = jax.tree.map(lambda of: of.reshape(-1, *of.shape[2:])[:num], done)
    return whole


def check_decoded(images: jax.Array, numbers: ArrayLike) -> None:
    """Raise FloatingPointError if a NaN or infinity is in an image that a decoder made of finite latents.

    numbers: which images they are, `(num,)`. Of traced images nothing is known.
    """
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    if isinstance(finite, jax.core.Tracer):
        return
    bad = np.flatnonzero(~np.asarray(finite))
    if bad.size:
        raise FloatingPointError(
            f"the first stage's decoder made a NaN or infinity of finite latents, in image "
            f"{np.asarray(numbers)[bad[0]]}, in {bad.size} of {len(finite)} images of this batch; check its weights "
            "(jddim verify), or look at the latents (latents=True, --latents), or use float32"
        )


draw_keys: Callable[[jax.Array, ArrayLike], jax.Array] = jax.jit(numbered_keys)
draw_noise = jax.jit(initial_noise, static_argnums=(1, 2))
