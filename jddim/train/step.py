"""Training by the DDPM objective: the optimizer and one step, pure functions of arrays. No files, no loop.

The result is sampled with the same schedule and conventions. Weights, their average and Adam's moments are float32,
whatever the network computes in. A run that was stopped goes on as if it had not been, and the number of devices
changes nothing but the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jddim.config import ModelConfig, UNetConfig
from jddim.installing import install_line
from jddim.models import build
from jddim.models.building import flat_params
from jddim.models.layers import at_least_float32
from jddim.run.compiling import Kind, compiler_options
from jddim.train.objective import Draws, Params, Table, draw, losses, training_table
from jddim.train.task import Task, TrainConfig


class TrainState(NamedTuple):
    """All that training goes on from, beside the task and the data.

    step: int32, batches seen. params, ema: float32 (see `Params`). opt_state: optax's.
    """

    step: Array
    params: Params
    ema: Params
    opt_state: Any


class Optimizer(Protocol):
    """What optax's transformations and its `MultiSteps` have in common."""

    def init(self, params: Params) -> object:
        """The state before the first update."""

    def update(self, updates: Params, state: object, params: Params) -> tuple[Params, object]:
        """What a gradient changes of the parameters, and the next state."""


def fresh_params(config: ModelConfig, seed: int) -> Params:
    """A network's initial parameters, float32, in one compiled program: distributed as PyTorch's defaults are.

    Kernels and their biases are uniform within 1 / sqrt(fan_in), embeddings N(0, 1), norms 1 and 0. With flax's own
    defaults the loss on MNIST was 17 % above PyTorch's after 400 steps.
    """

    @functools.partial(jax.jit, compiler_options=compiler_options(Kind(jax.default_backend())))
    def make(key: Array) -> Params:
        return flat_params(build(config, dtype=jnp.float32, rngs=_Keys(key)))

    params: Params = make(jax.random.fold_in(jax.random.key(seed), 2**32 - 1))  # no step's key
    return params


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
    """Stands in for `nnx.Rngs`, whose traced counter makes tracing slow (see `jddim.checkpoint.folder`)."""

    def __init__(self, key: Array):
        self.key = key
        self.count = 0

    def params(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def learning_rate(config: TrainConfig) -> Callable[[ArrayLike], Array | float]:
    """The learning rate as a function of the number of updates made."""
    optax = _optax()
    first, left = config.warmup_steps, max(config.updates - config.warmup_steps, 1)
    after: Callable[[ArrayLike], Array | float] = optax.constant_schedule(config.lr)
    if config.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, left, config.final_lr / config.lr)
    if first:
        after = optax.join_schedules([optax.linear_schedule(0, config.lr, first), after], [first])
    return after


def make_optimizer(task: Task) -> Optimizer:
    """Clipping, then Adam; over `accumulate` batches' mean gradient. What a checkpoint's source keeps fixed, stays."""
    optax, config = _optax(), task.train
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    settings = {"b1": config.beta1, "b2": config.beta2, "eps": config.adam_epsilon}
    if config.optimizer == "adamw":
        parts.append(optax.adamw(learning_rate(config), **settings, weight_decay=config.weight_decay))
    else:
        parts.append(optax.adam(learning_rate(config), **settings))
    if isinstance(task.model, UNetConfig) and task.model.time_embedding in ("fourier", "frequencies"):
        parts.append(optax.masked(optax.set_to_zero(), lambda params: {name: name in FIXED for name in params}))
    optimizer: Optimizer = optax.chain(*parts)
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
    task: Task, table: Table | None, optimizer: Optimizer, state: TrainState, batch: Mapping[str, Array], draws: Draws
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
        decay: Array = jnp.float32(config.ema_decay)
        return decay
    n = jnp.asarray(n, jnp.float32)
    return jnp.minimum(config.ema_decay, (1 + n) / (10 + n))


TrainStep = Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, dict[str, Array]]]


def make_train_step(task: Task, mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """`train_step(state, batch, key)` -> (state, {"loss", "grad_norm"}), jitted; a `TrainStep`.

    key: `jax.random.key(seed)`, the same at every step. mesh: data parallel along its axis "data": the state is whole
    on every device and the batch cut, so batch_size must be a multiple of it (ValueError). The sums over the batch
    are then taken in another order: equal to rounding, with the same draws.
    """
    optimizer, table = make_optimizer(task), training_table(task)

    def train_step(state: TrainState, batch: Mapping[str, Array], key: Array) -> tuple[TrainState, dict[str, Array]]:
        dtype = at_least_float32(task.train.dtype)
        draws = draw(jax.random.fold_in(key, state.step), task, batch["images"].shape, dtype)
        return update(task, table, optimizer, state, batch, draws)

    if mesh is not None and task.train.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.shape['data']} devices, got {task.train.batch_size}"
        )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options: dict[str, Any] = {
        "compiler_options": compiler_options(Kind(platform)),  # what a kind of device has beside was tried for sampling
        # The state's memory is used again, but on a CPU, where a save under way may still be reading it.
        "donate_argnums": () if platform == "cpu" else (0,),
    }
    if mesh is None:
        return jax.jit(train_step, **options)
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return jax.jit(train_step, in_shardings=(whole, cut, whole), out_shardings=whole, **options)


def _optax() -> Any:
    try:
        import optax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"training needs optax: {install_line('train')}") from error
    return optax
