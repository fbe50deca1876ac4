"""What is wrong with the arguments of `DDIM.sample` and `DDIM.invert`: each function returns sentences, or none.

Of traced values only shapes are looked at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import ModelConfig, SamplerConfig, size_problems
from jddim.ddim import StepTable, largest_eta
from jddim.sampling import check_prediction


def common_problems(
    config: ModelConfig,
    sampler: SamplerConfig,
    table: StepTable,
    num: int | None,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    x_T: Array | np.ndarray | None,
    key: Array | None = None,
    noise: Array | np.ndarray | None = None,
    needs_noise: bool = False,
    batch_size: int | None = None,
    start: str = "x_T",
) -> list[str]:
    """What is wrong with the arguments that all methods take, as sentences.

    shape: (h, w, c) of an image; x_T: `(num, h, w, c)`; noise: `(S, num, h, w, c)`, both of `dtype`; key: one, or
    `(num,)`; needs_noise: whether a step adds any. start: what x_T is called.
    """
    problems = size_problems(config, (shape[0], shape[1]))
    outputs = 2 if sampler.variance == "learned_range" else 1
    if outputs * config.in_channels != config.out_channels:
        problems.append(
            f"this model maps {config.in_channels} channels to {config.out_channels}; sampling needs "
            + ("twice as many out (its variance is learned)" if outputs == 2 else "both equal")
        )
    if num is None or num < 1:
        problems.append(f"num must be at least 1, got {num}")
        return problems
    if not (batch_size is None or (isinstance(batch_size, (int, np.integer)) and batch_size >= 1)):
        problems.append(f"batch_size must be a whole number, at least 1, or None; got {batch_size!r}")
    if key is None and (x_T is None or (noise is None and needs_noise)):
        what = "x_T" if x_T is None else "the noise of each step (eta > 0)"
        problems.append(f"a key is needed for {what}: jax.random.key(seed)")
    if key is not None and not (isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = f"{key.dtype}{list(key.shape)}" if isinstance(key, Array) else repr(key)
        problems.append(f"key must be jax.random.key(seed), got {got}")
    elif key is not None and key.shape not in ((), (num,)):
        problems.append(f"key must be one key, or one per image ({num},), got shape {key.shape}")
    low, high = sampler.clip_range
    if sampler.clip and not low < high:
        problems.append(f"clip_range must be (low, high) with low < high, got {sampler.clip_range}")
    if sampler.threshold_ratio is not None and not 0 < sampler.threshold_ratio <= 1:
        problems.append(f"threshold_ratio must lie in (0, 1], got {sampler.threshold_ratio}")
    try:
        check_prediction(table, sampler.prediction_type)
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
            if np.ndim(array) == len(expected) and channels_first(array, expected[-1]):
                problems.append(f"{name} looks like (N, C, H, W), got {np.shape(array)}: transpose it to (N, H, W, C)")
        elif array.dtype != dtype:
            problems.append(f"{name} must be {jnp.dtype(dtype)}, got {array.dtype}")
        elif not isinstance(array, jax.core.Tracer) and not _all_finite(array):
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
            problems.append(f"{name} holds a NaN or infinity, first at {where}")
    return problems


def guidance_problems(
    config: ModelConfig, sampler: SamplerConfig, scale: ArrayLike | None, null_label: int | None, num: int, method: str
) -> list[str]:
    """What is wrong with guidance of a network with this config, as sentences. scale: a scalar or `(num,)`, or None."""
    if scale is None:
        return [] if null_label is None else ["null_label is for guidance: give guidance_scale too, or leave it out"]
    if config.class_embedding != "learned":
        return ["guidance_scale needs a network with learned class labels; this one has none"]
    problems = []
    if null_label is None or not 0 <= null_label < (config.num_classes or 0):
        problems.append(
            f"guidance_scale needs null_label, the one of 0..{(config.num_classes or 1) - 1} that meant no label "
            f"in training; got {null_label}"
        )
    if np.shape(scale) not in ((), (num,)):
        problems.append(f"guidance_scale must be a scalar or one value per image ({num},), got shape {np.shape(scale)}")
    elif not isinstance(scale, jax.core.Tracer) and not np.isfinite(np.asarray(scale, float)).all():
        problems.append(f"guidance_scale must be finite, got {scale}")
    if method == "ddpm" and sampler.variance == "learned_range":
        problems.append("guidance of a learned variance is not defined: use method ddim, or a fixed variance")
    return problems


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


def range_problems(images: Array | np.ndarray) -> list[str]:
    """What is wrong with images to invert: unclipped samples overshoot [-1, 1] a little; [-2, 2] they do not leave."""
    if isinstance(images, jax.core.Tracer) or images.size == 0 or not _all_finite(images):
        return []
    low, high = float(images.min()), float(images.max())
    if low >= -2 and high <= 2:
        return []
    return [f"images must lie in [-1, 1], got {low:g}..{high:g}; of numbers in 0..255 take x / 127.5 - 1"]


def label_problems(config: ModelConfig, labels: Array | None, num: int) -> list[str]:
    """What is wrong with labels for a network with this config, `num` of them or None, as sentences."""
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


def channels_first(array: Array | np.ndarray, channels: int) -> bool:
    """Whether images (or noise) of so many channels have PyTorch's layout."""
    return array.shape[-3] == channels != array.shape[-1]


def _all_finite(array: Array | np.ndarray) -> bool:
    """Asked where the array is: what lies on a GPU is not fetched for it."""
    return bool((jnp if isinstance(array, Array) else np).isfinite(array).all())


def is_zero(eta: ArrayLike) -> bool:
    """Whether eta is known to be 0 for every image."""
    return not isinstance(eta, jax.core.Tracer) and not np.any(np.asarray(eta))
