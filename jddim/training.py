"""Training by the DDPM objective: the losses, the optimizer and one step, pure functions of arrays. No files, no loop.

The network sees x_t of Eq. 4 (arXiv:2006.11239) and learns what `SamplerConfig.prediction_type` says; the result is
sampled with the same schedule and conventions. Weights, their average and Adam's moments are float32, whatever the
network computes in. What step n draws depends on (seed, n) alone, and what its sample i draws on (seed, n, i): a run
that was stopped goes on as if it had not been, and the number of devices changes nothing but the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jddim.checkpoint import build_model, flat_params
from jddim.compiling import Kind, compiler_options
from jddim.config import (
    PREDICTION_TYPES,
    VARIANCES,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    UNetConfig,
    did_you_mean,
    from_json,
    to_json,
)
from jddim.ddim import add_noise, per_sample, predict_both, sampler_table
from jddim.denoisers import with_scaled_time
from jddim.models import MODELS, build, wiring_of
from jddim.models.layers import at_least_float32
from jddim.sampling import sample_keys
from jddim.schedule import NoiseSchedule, make_schedule

Params = dict[str, Array]
"""Dotted name -> array, as `jddim.checkpoint.flat_params` has them."""

LOSSES = ("simple", "min_snr")
T_SAMPLINGS = ("uniform", "antithetic")
OPTIMIZERS = ("adam", "adamw")
LR_SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained; JSON by `jddim.config.to_json`.

    The defaults are Ho et al.'s for CIFAR-10, but theirs mirror images, have dropout, and no warm-up of the average.

    steps: batches in all, of `batch_size` images each; every `accumulate` of them are one update of the weights.
    seed: of fresh weights, the order of the images, flips, timesteps, noise and dropped labels.
    loss: "simple", Eq. 14 of arXiv:2006.11239; "min_snr", weighted by the clamped SNR (`snr_weights`), with
        `min_snr_gamma`. reduction: over the values of one image, "mean", or "sum" as ermongroup has it, which clipping
        and Adam's epsilon notice.
    vlb_weight: lambda of L_hybrid, Eq. 16 of arXiv:2102.09672, where the sampler's variance is "learned_range".
    t_sampling: "uniform" on 0..T-1, or "antithetic": the batch's second half has T - 1 - t of its first.
    label_dropout: the share of labels that become `null_label`, for classifier-free guidance (arXiv:2207.12598).
    optimizer: "adam", or "adamw" with weight_decay; lr, beta1, beta2, adam_epsilon as in PyTorch.
    lr_schedule: after `warmup_steps` updates that rise linearly from 0, "constant" or, on a cosine, to `final_lr`.
    clip_norm: the gradient's largest norm, over all weights; None: any.
    ema_decay: of the weights' average; with ema_warmup update n of 1, 2, ... has min(ema_decay, (1 + n) / (10 + n)).
    dtype: what the network computes in (float64 needs jax's x64 mode). remat: keep only the outputs of convolutions
        and matrix products for the backward pass, and compute the rest again.
    flip: mirror each image with probability 1/2.
    """

    steps: int = 800_000
    batch_size: int = 128
    seed: int = 0
    loss: str = "simple"
    min_snr_gamma: float = 5.0
    reduction: str = "mean"
    vlb_weight: float = 0.001
    t_sampling: str = "uniform"
    label_dropout: float = 0.0
    null_label: int | None = None
    optimizer: str = "adam"
    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 5000
    final_lr: float = 0.0
    clip_norm: float | None = 1.0
    accumulate: int = 1
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    dtype: str = "float32"
    remat: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong, and what would be right."""
        problems = [
            f"{name} {value!r} is unknown{did_you_mean(str(value), allowed)}"
            for name, value, allowed in (
                ("loss", self.loss, LOSSES),
                ("reduction", self.reduction, ("mean", "sum")),
                ("t_sampling", self.t_sampling, T_SAMPLINGS),
                ("optimizer", self.optimizer, OPTIMIZERS),
                ("lr_schedule", self.lr_schedule, LR_SCHEDULES),
                ("dtype", self.dtype, DTYPES),
            )
            if value not in allowed
        ]
        for names, kind, says, holds in (
            (("steps", "batch_size", "accumulate"), int, "a whole number, at least 1", lambda x: x >= 1),
            (("warmup_steps", "seed"), int, "a whole number, 0 or more", lambda x: 0 <= x < 2**32),
            (("lr", "min_snr_gamma", "adam_epsilon"), (int, float), "above 0", lambda x: 0 < x < math.inf),
            (("final_lr", "weight_decay", "vlb_weight"), (int, float), "0 or more", lambda x: 0 <= x < math.inf),
            (("beta1", "beta2", "ema_decay"), (int, float), "in [0, 1)", lambda x: 0 <= x < 1),
            (("label_dropout",), (int, float), "in [0, 1]", lambda x: 0 <= x <= 1),
            (("ema_warmup", "remat", "flip"), bool, "true or false", lambda x: True),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)) or not holds(value):
                    problems.append(f"{name} must be {says}, got {value!r}")
        number = isinstance(self.clip_norm, (int, float)) and not isinstance(self.clip_norm, bool)
        if self.clip_norm is not None and not (number and 0 < self.clip_norm < math.inf):
            problems.append(f"clip_norm must be above 0, or null for none, got {self.clip_norm!r}")
        whole = isinstance(self.null_label, int) and not isinstance(self.null_label, bool)
        if self.null_label is not None and not (whole and self.null_label >= 0):
            problems.append(f"null_label must be one of the labels, or null for none, got {self.null_label!r}")
        if not problems:
            if self.steps % self.accumulate:
                problems.append(f"steps must be a multiple of accumulate={self.accumulate}, got {self.steps}")
            if self.optimizer == "adam" and self.weight_decay:
                problems.append("weight_decay goes with optimizer='adamw'")
            if self.label_dropout and self.null_label is None:
                problems.append("label_dropout needs null_label, what a dropped label becomes")
        if problems:
            raise ValueError("train: " + "; ".join(problems))

    @property
    def updates(self) -> int:
        """How often the weights change."""
        return self.steps // self.accumulate


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained and how: the sections of a CONFIG file. The sampler's are the result's conventions."""

    model: ModelConfig
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Raise one ValueError that names what does not fit together."""
        problems = [
            f"{name} {value!r} is unknown{did_you_mean(value, known)}"
            for name, value, known in (
                ("prediction_type", self.sampler.prediction_type, PREDICTION_TYPES),
                ("variance", self.sampler.variance, VARIANCES),
            )
            if value not in known
        ]
        schedule, model, train = make_schedule(self.schedule), self.model, self.train
        if self.sampler.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
            problems.append("zero_terminal_snr needs prediction_type v_prediction or sample: eps tells nothing there")
        wanted = model.in_channels * (2 if self.learns_variance else 1)
        if model.out_channels != wanted:
            problems.append(f"out_channels must be {wanted} with variance {self.sampler.variance}: {model.in_channels}")
            problems[-1] += f" of x_t{', and as many of the variance' if self.learns_variance else ''}"
        try:
            sampler_table(schedule, self.sampler)
        except ValueError as error:
            problems.append(f"sampler: {error}")
        if self.learns_variance and schedule.num_train_timesteps < 2:
            problems.append("a learned variance needs at least two timesteps")
        if self.sampler.self_condition:
            problems.append("self-conditioned networks are sampled, but not trained here")
        if model.class_embedding not in (None, "learned"):
            problems.append(f"class_embedding {model.class_embedding!r} is sampled, but not trained here")
        if train.null_label is not None and not 0 <= train.null_label < (model.num_classes or 0):
            problems.append(f"null_label must be one of the network's {model.num_classes or 0} classes")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def learns_variance(self) -> bool:
        """Whether half of the network's channels are of the variance."""
        return self.sampler.variance == "learned_range"

    def to_json(self) -> dict[str, Any]:
        """The sections as JSON."""
        return {
            "model": {"type": wiring_of(self.model), **to_json(self.model)},
            "schedule": to_json(self.schedule),
            "sampler": to_json(self.sampler),
            "train": to_json(self.train),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Task:
        """The inverse; all but "model" may be left out. Raises ValueError on unknown sections and keys."""
        kinds = {"schedule": ScheduleConfig, "sampler": SamplerConfig, "train": TrainConfig}
        problems = [f"unknown section {name!r}{did_you_mean(name, ['model', *kinds])}" for name in data]
        problems = [p for p, name in zip(problems, data, strict=True) if name not in ("model", *kinds)]
        problems += [
            f"section {name!r} must be an object, got {section!r}"
            for name, section in data.items()
            if not isinstance(section, Mapping)
        ]
        if "model" not in data:
            problems.append("section 'model' is missing")
        if problems:
            raise ValueError("; ".join(problems))
        model = dict(data["model"])
        wiring = model.pop("type", "unet")
        if wiring not in MODELS:
            raise ValueError(f"unknown model type {wiring!r}{did_you_mean(str(wiring), MODELS)}")
        sections: dict[str, Any] = {name: from_json(cls, data.get(name, {})) for name, cls in kinds.items()}  # type: ignore[arg-type]
        return Task(from_json(MODELS[wiring][0], model), **sections)


# -- the objective ----------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """What the loss needs of each t, `(T,)`: computed in float64 on the host, cast once.

    weight: of L_simple. x0_factor: of x_0 in the posterior's mean, Eq. 7 of arXiv:2006.11239. log_small, log_large:
    the log-variances between which a learned one lies, the posterior's (at t = 0, where it is 0, that of t = 1) and
    beta (Eq. 15 of arXiv:2102.09672).
    """

    alpha_bar: Any
    weight: Any
    x0_factor: Any
    log_small: Any
    log_large: Any


def training_table(task: Task) -> Table:
    """The float64 table of a task's schedule and weights."""
    schedule = make_schedule(task.schedule)
    T, a, beta = schedule.num_train_timesteps, schedule.alphas_cumprod, schedule.betas
    a_prev = schedule.alpha_bar(np.arange(T) - 1)
    posterior = beta * (1 - a_prev) / (1 - a)
    weight = np.ones(T)
    if task.train.loss == "min_snr":
        weight = snr_weights(schedule, task.sampler.prediction_type, task.train.min_snr_gamma)
    log_small = np.log(np.append(posterior[1:2], posterior[1:])) if T > 1 else np.zeros(1)
    return Table(a, weight, np.sqrt(a_prev) * beta / (1 - a), log_small, np.log(beta))


def snr_weights(schedule: NoiseSchedule, prediction_type: str, gamma: float) -> NDArray[np.float64]:
    """min-SNR-gamma's weights `(T,)` of each prediction's squared error, section 3.4 of arXiv:2303.09556.

    min(SNR, gamma) for x_0, and what that is in terms of the others: / SNR for eps, / (SNR + 1) for v.
    """
    a = schedule.alphas_cumprod
    with np.errstate(divide="ignore"):
        snr, one_over = a / (1 - a), (1 - a) / a
    match prediction_type:
        case "epsilon":
            return np.minimum(1, gamma * one_over)
        case "sample":
            return np.minimum(snr, gamma)
        case "v_prediction":
            return np.minimum(a, gamma * (1 - a))  # SNR + 1 = 1 / (1 - alpha_bar)
    raise ValueError(f"unknown prediction_type {prediction_type!r}{did_you_mean(prediction_type, PREDICTION_TYPES)}")


def target_of(prediction_type: str, x_0: Array, noise: Array, alpha_bar_t: ArrayLike) -> Array:
    """What the network is to predict, like x_0: eps, x_0, or v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0."""
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            a = per_sample(alpha_bar_t, x_0)
            return jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x_0
    raise ValueError(f"unknown prediction_type {prediction_type!r}{did_you_mean(prediction_type, PREDICTION_TYPES)}")


class Draws(NamedTuple):
    """What is random in a step. t: `(b,)` int32 in 0..T-1; noise: like the images; drop: `(b,)` bool, or None."""

    t: Array
    noise: Array
    drop: Array | None = None


def draw(key: Array, task: Task, shape: tuple[int, ...], dtype: Any) -> Draws:
    """The draws of one step for a batch `shape`, `(b, h, w, c)`; key: the step's. Sample i's are of fold_in(key, i)."""
    b, T = shape[0], task.schedule.num_train_timesteps
    keys = jax.vmap(functools.partial(jax.random.split, num=3))(sample_keys(key, b))
    t = jax.vmap(lambda k: jax.random.randint(k, (), 0, T))(keys[:, 0])
    if task.train.t_sampling == "antithetic":
        t = antithetic(t, T)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(keys[:, 1])
    drop = None
    if task.model.class_embedding is not None and task.train.label_dropout:
        drop = jax.vmap(lambda k: jax.random.uniform(k))(keys[:, 2]) < task.train.label_dropout
    return Draws(t, noise, drop)


def antithetic(t: Array, T: int) -> Array:
    """T `(b,)` in 0..T-1 with the second half T - 1 minus the first; of an odd b, the middle one is alone.

    ermongroup's pairs, but all of them: it draws b // 2 + 1 and leaves two of an even batch alone.
    """
    half = (t.shape[0] + 1) // 2
    return jnp.concatenate([t[:half], T - 1 - t[: t.shape[0] - half]])


def losses(task: Task, table: Table, params: Params, batch: Mapping[str, Array], draws: Draws) -> tuple[Array, Array]:
    """(what is minimised, the loss per value): scalars. They differ by `reduction`'s factor alone.

    batch: images `(b, h, w, c)` in [-1, 1]; labels `(b,)` int32 if the network has classes.
    """
    dtype = at_least_float32(task.train.dtype)
    x_0, t = batch["images"].astype(dtype), draws.t
    x_t = add_noise(x_0, draws.noise, jnp.asarray(table.alpha_bar, dtype)[t])
    labels = batch.get("labels")
    if labels is not None and draws.drop is not None:
        labels = jnp.where(draws.drop, jnp.int32(task.train.null_label or 0), labels)
    output = _network(task)(params, x_t, t, labels).astype(dtype)
    loss = losses_of(task, table, output, x_0, x_t, draws).mean()
    return loss * (math.prod(x_0.shape[1:]) if task.train.reduction == "sum" else 1), loss


def losses_of(task: Task, table: Table, output: Array, x_0: Array, x_t: Array, draws: Draws) -> Array:
    """Each sample's loss per value, `(b,)`, of the network's output for it, `(b, h, w, c)`, or `2 c` channels with a
    learned variance: L_simple, weighted, and then L_hybrid.
    """
    kind, noise, t = task.sampler.prediction_type, draws.noise, draws.t
    row = Table(*(jnp.asarray(column, output.dtype)[t] for column in table))
    values = None
    if task.learns_variance:
        output, values = jnp.split(output, 2, axis=-1)
    loss = row.weight * _mean(jnp.square(output - target_of(kind, x_0, noise, row.alpha_bar)))
    if values is None:
        return loss
    x0_hat, _ = predict_both(lax.stop_gradient(output), x_t, row.alpha_bar, kind)
    bound = len(table.weight) * vlb_term(x_0, x0_hat, values, t, row)
    return loss + task.train.vlb_weight * bound


def vlb_term(x_0: Array, x0_hat: Array, values: Array, t: Array, row: Table) -> Array:
    """L_t of the variational bound, `(b,)`, in bits per value, for a learned variance; T of them are the bound.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) and, at t = 0, -log p(x_0 | x_1) of 8-bit images (section 3.3 of
    arXiv:2006.11239). x0_hat: the network's x_0, `(b, h, w, c)`, without its gradient: the bound is to teach the
    variance only (section 3.1 of arXiv:2102.09672). values: the network's v, about [-1, 1]; row: of each sample's t.
    """
    log_small, log_large = per_sample(row.log_small, x_0), per_sample(row.log_large, x_0)
    fraction = (values + 1) / 2
    log_variance = fraction * log_large + (1 - fraction) * log_small
    # The two means differ in their x_0 alone.
    difference = per_sample(row.x0_factor, x_0) * (x_0 - x0_hat)
    ratio = jnp.exp(log_small - log_variance)
    kl = 0.5 * (log_variance - log_small + ratio - 1 + jnp.square(difference) * jnp.exp(-log_variance))
    nll = -log_discretised_normal(x_0, x0_hat, 0.5 * log_variance)  # at t = 0 the mean is x0_hat itself
    return jnp.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)


def log_discretised_normal(x: Array, mean: Array, log_scale: Array) -> Array:
    """Log of the probability that N(mean, scale^2) has in the bin, 2 / 255 wide, of each 8-bit value x in [-1, 1].

    The first bin reaches to -infinity and the last to infinity. Like x; at least 1e-12 before the logarithm, as in
    OpenAI's.
    """
    inverse = jnp.exp(-log_scale)
    above = jax.scipy.stats.norm.cdf((x - mean + 1 / 255) * inverse)
    below = jax.scipy.stats.norm.cdf((x - mean - 1 / 255) * inverse)
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _mean(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def _network(task: Task) -> Callable[[Params, Array, Array, Array | None], Array]:
    """The network as a function of its parameters, with t as it takes it."""

    def apply(params: Params, x_t: Array, t: Array, labels: Array | None) -> Array:
        model = build_model(task.model, params, task.train.dtype)
        scale = task.sampler.timestep_scale
        denoise = model if scale == 1 else with_scaled_time(model, scale)
        return denoise(x_t, t) if labels is None else denoise(x_t, t, labels)

    if not task.train.remat:
        return apply
    kept = (lax.conv_general_dilated_p, lax.dot_general_p)
    return jax.checkpoint(apply, policy=lambda primitive, *_, **__: primitive in kept)


# -- the step ---------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that training goes on from, beside the task and the data.

    step: int32, batches seen. params, ema: float32 (see `Params`). opt_state: optax's.
    """

    step: Array
    params: Params
    ema: Params
    opt_state: Any


def fresh_params(config: ModelConfig, seed: int) -> Params:
    """A network's initial parameters, float32, in one compiled program: distributed as PyTorch's defaults are.

    Kernels and their biases are uniform within 1 / sqrt(fan_in), embeddings N(0, 1), norms 1 and 0. With flax's own
    defaults the loss on MNIST was 17 % above PyTorch's after 400 steps.
    """

    @functools.partial(jax.jit, compiler_options=compiler_options(Kind(jax.default_backend())))
    def make(key: Array) -> Params:
        return flat_params(build(config, dtype=jnp.float32, rngs=_Keys(key)))

    return make(jax.random.fold_in(jax.random.key(seed), 2**32 - 1))  # no step's key


def with_classes(
    config: ModelConfig, params: Mapping[str, Any], num_classes: int, *, null_label: int | None = None, seed: int = 0
) -> tuple[ModelConfig, dict[str, Any]]:
    """A network without classes and its parameters, given a table of classes: N(0, 1), as PyTorch has embeddings.

    null_label's row is 0: with it the network is what it was. (Were all rows 0, it would be so with every label, and
    training would hardly tell them apart: 900 steps on MNIST moved the table by 0.01, and guidance did nothing.)
    Raises ValueError for a network that has classes, or cannot have any, and for a null_label that is none of them.
    """
    if not isinstance(config, UNetConfig) or config.class_embedding is not None:
        what = "this wiring takes none" if not isinstance(config, UNetConfig) else "this network has classes"
        raise ValueError(f"classes cannot be added: {what}")
    if num_classes < 1:
        raise ValueError(f"classes must be at least 1, got {num_classes}")
    if null_label is not None and not 0 <= null_label < num_classes:
        raise ValueError(f"null_label must be one of the {num_classes} classes, 0..{num_classes - 1}, got {null_label}")
    table = np.random.default_rng(seed).standard_normal((num_classes, config.time_width), np.float32)
    if null_label is not None:
        table[null_label] = 0
    wider = dataclasses.replace(config, class_embedding="learned", num_classes=num_classes)
    return wider, {**params, "class_embed.embedding": table}


class _Keys:
    """Stands in for `nnx.Rngs`, whose traced counter makes tracing slow (see `jddim.checkpoint`)."""

    def __init__(self, key: Array):
        self.key = key
        self.count = 0

    def params(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def learning_rate(config: TrainConfig) -> Callable[[Any], Any]:
    """The learning rate as a function of the number of updates made."""
    optax = _optax()
    first, left = config.warmup_steps, max(config.updates - config.warmup_steps, 1)
    after = optax.constant_schedule(config.lr)
    if config.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, left, config.final_lr / config.lr)
    if not first:
        return after
    return optax.join_schedules([optax.linear_schedule(0, config.lr, first), after], [first])


def make_optimizer(task: Task) -> Any:
    """Clipping, then Adam; over `accumulate` batches' mean gradient. What a checkpoint's source keeps fixed, stays."""
    optax, config = _optax(), task.train
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    settings = {"b1": config.beta1, "b2": config.beta2, "eps": config.adam_epsilon}
    if config.optimizer == "adamw":
        parts.append(optax.adamw(learning_rate(config), **settings, weight_decay=config.weight_decay))
    else:
        parts.append(optax.adam(learning_rate(config), **settings))
    if isinstance(task.model, UNetConfig) and task.model.time_embedding == "fourier":
        parts.append(optax.masked(optax.set_to_zero(), lambda params: {name: name in FIXED for name in params}))
    optimizer = optax.chain(*parts)
    return optimizer if config.accumulate == 1 else optax.MultiSteps(optimizer, config.accumulate)


FIXED = ("time_proj.kernel",)
"""Random frequencies that diffusers draws once and does not train."""


def init_state(task: Task, params: Mapping[str, ArrayLike]) -> TrainState:
    """Before the first step: float32 copies of `params`, the average equal to them."""
    dtype = at_least_float32(task.train.dtype)
    weights = {name: jnp.array(value, dtype) for name, value in sorted(params.items())}
    ema = {name: jnp.array(value, dtype) for name, value in weights.items()}
    return TrainState(jnp.int32(0), weights, ema, make_optimizer(task).init(weights))


def update(
    task: Task, table: Table, optimizer: Any, state: TrainState, batch: Mapping[str, Array], draws: Draws
) -> tuple[TrainState, dict[str, Array]]:
    """One step with these draws. Returns the state and the step's loss (per value) and gradient norm, unclipped."""
    config = task.train
    gradient, loss = jax.grad(lambda params: losses(task, table, params, batch, draws), has_aux=True)(state.params)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradient.values()))
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = _optax().apply_updates(state.params, updates)
    step = state.step + 1
    # Between the updates of accumulation neither the weights nor their average change.
    decay = jnp.where(step % config.accumulate == 0, ema_decay(config, step // config.accumulate), 1.0)
    ema = {name: average + (1 - decay) * (params[name] - average) for name, average in state.ema.items()}
    return TrainState(step, params, ema, opt_state), {"loss": loss, "grad_norm": norm}


def ema_decay(config: TrainConfig, n: ArrayLike) -> Array:
    """The average's decay at update n = 1, 2, ...: TensorFlow's ExponentialMovingAverage with num_updates = n."""
    if not config.ema_warmup:
        return jnp.float32(config.ema_decay)
    n = jnp.asarray(n, jnp.float32)
    return jnp.minimum(config.ema_decay, (1 + n) / (10 + n))


TrainStep = Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, dict[str, Array]]]


def make_train_step(task: Task, mesh: Mesh | None = None) -> Any:
    """`train_step(state, batch, key)` -> (state, {"loss", "grad_norm"}), jitted; a `TrainStep`.

    key: `jax.random.key(seed)`, the same at every step. mesh: data parallel along its axis "data": the state is whole
    on every device and the batch cut, so batch_size must be a multiple of it (ValueError). The sums over the batch
    are then taken in another order: equal to rounding, with the same draws.
    """
    optimizer, table = make_optimizer(task), training_table(task)

    def train_step(state: TrainState, batch: Mapping[str, Array], key: Array) -> Any:
        dtype = at_least_float32(task.train.dtype)
        draws = draw(jax.random.fold_in(key, state.step), task, batch["images"].shape, dtype)
        return update(task, table, optimizer, state, batch, draws)

    if mesh is None:  # the platform alone, as below: what a kind of device has beside it was tried for sampling only
        options = compiler_options(Kind(jax.default_backend()))
        return jax.jit(train_step, compiler_options=options, donate_argnums=_donated(None))
    if task.train.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.shape['data']} devices, got {task.train.batch_size}"
        )
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        train_step,
        in_shardings=(whole, cut, whole),
        out_shardings=whole,
        compiler_options=compiler_options(Kind(platform)),
        donate_argnums=_donated(platform),
    )


def _donated(platform: str | None) -> tuple[int, ...]:
    """The state's memory is used again, but on a CPU, where a save under way may still be reading it."""
    return () if (platform or jax.default_backend()) == "cpu" else (0,)


def _optax() -> Any:
    try:
        import optax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("training needs optax: pip install 'jddim[train]'") from error
    return optax
