"""What is wrong with a request: each function returns (field, sentence) pairs, or none.

Of traced values only shapes are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import EDM, TWICE, AutoencoderConfig, ClassifierConfig, ModelConfig, SamplerConfig, size_problems
from jddim.ddim import StepTable, largest_eta
from jddim.run.request import CFG_PLUS_PLUS, Problems
from jddim.sampling import check_prediction
from jddim.schedule import EDMSchedule, FlowSchedule, Schedule


def sampler_problems(sampler: SamplerConfig, table: StepTable, schedule: Schedule) -> Problems:
    """What is wrong with the conventions, on this table of this schedule."""
    problems: Problems = []
    low, high = sampler.clip_range
    if sampler.clip and not low < high:
        problems.append(("clip_range", f"clip_range must be (low, high) with low < high, got {sampler.clip_range}"))
    if sampler.threshold_ratio is not None:
        if not 0 < sampler.threshold_ratio <= 1:
            problems.append(("threshold", f"threshold_ratio must lie in (0, 1], got {sampler.threshold_ratio}"))
        if not 1 <= sampler.threshold_max < np.inf:
            problems.append(("threshold", f"threshold_max must be a number >= 1, got {sampler.threshold_max}"))
    try:
        check_prediction(table, sampler.prediction_type)
    except ValueError as error:
        problems.append(("prediction_type", str(error)))
    problems += [("prediction_type", told) for told in denoiser_problems(sampler, schedule)]
    return problems


def denoiser_problems(sampler: SamplerConfig, schedule: Schedule) -> list[str]:
    """What is wrong with how a network is told t, on this schedule."""
    problems = []
    if not 1e-6 <= sampler.timestep_scale <= 1e6:
        problems.append(f"timestep_scale must be a number in 1e-6..1e6, got {sampler.timestep_scale}")
    if sampler.prediction_type == EDM:
        if not isinstance(schedule, EDMSchedule):
            problems.append("prediction_type edm is of the schedule edm, whose t is sigma")
        if not 1e-6 <= sampler.sigma_data <= 1e6:
            problems.append(f"sigma_data must be a number in 1e-6..1e6, got {sampler.sigma_data}")
    elif sampler.boundary:
        problems.append("boundary is of prediction_type edm")
    if sampler.reversed_time and (sampler.prediction_type != "velocity" or not isinstance(schedule, FlowSchedule)):
        problems.append("reversed_time is of the schedule flow and the prediction_type velocity")
    return problems


def stage_problems(name: str, array: Array | np.ndarray, channels: int, size: tuple[int, int]) -> Problems:
    """What is wrong with images to encode, or with z to decode; size: of images, where the array's own is none."""
    shape = np.shape(array)
    known = len(shape) == 4 and not channels_first(array, channels)
    expected = (max(shape[0], 1) if len(shape) == 4 else 1, *(shape[1:3] if known else size), channels)
    wide = isinstance(array, (Array, np.ndarray)) and array.dtype == np.float64  # under jax's x64
    problems = array_problems(name, array, expected, np.float64 if wide else np.float32)
    return problems + (range_problems(array) if name == "images" else [])


def decode_problems(size: int) -> Problems:
    """What is wrong with decoding so many latents at a time."""
    return [] if size >= 1 else [("decode_batch", f"decode_batch must be at least 1, got {size}")]


def latent_problems(stage: AutoencoderConfig, config: ModelConfig, image_size: tuple[int, int]) -> Problems:
    """What is wrong with images of (height, width) pixels for a first stage and the network of its latents."""
    return [("image_size", problem) for problem in size_problems(config, image_size, stage.size_factor)]


def pair_problems(stage: AutoencoderConfig, config: ModelConfig) -> Problems:
    """What is wrong with a first stage for a network of latents."""
    if stage.latent_channels == config.in_channels:
        return []
    told = f"the first stage has latents of {stage.latent_channels} channels, the network samples {config.in_channels}"
    return [("autoencoder", f"{told}: they do not belong together")]


def network_problems(config: ModelConfig, sampler: SamplerConfig, image_size: tuple[int, int]) -> Problems:
    """What is wrong with sampling this network at (height, width)."""
    problems: Problems = [("image_size", problem) for problem in size_problems(config, image_size)]
    outputs = 2 if sampler.variance in TWICE else 1
    if outputs * config.in_channels != config.out_channels:
        needs = f"twice as many out (its variance is {sampler.variance})" if outputs == 2 else "both equal"
        problems.append(
            (
                "variance",
                f"this model maps {config.in_channels} channels to {config.out_channels}; sampling needs {needs}",
            )
        )
    return problems


def num_problems(num: int) -> Problems:
    """What is wrong with the number of images."""
    if not isinstance(num, (int, np.integer)):
        return [("num", f"num must be a whole number, got {num!r}")]
    if 1 <= num <= 2**32:
        return []
    if num > 1:
        return [("num", f"num must be at most {2**32}, which images are kept apart in, got {num}")]
    return [("num", f"num must be at least 1, got {num}")]


def key_problems(key: Array | None, num: int, *, x_T: bool, noise: bool, needs_noise: bool) -> Problems:
    """What is wrong with the key. x_T, noise: whether they are given."""
    if key is None:
        if x_T and (noise or not needs_noise):
            return []
        what = "the noise of each step (eta > 0)" if x_T else "x_T"
        return [("key", f"a key is needed for {what}: jax.random.key(seed)")]
    if not (isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = f"{key.dtype}{list(key.shape)}" if isinstance(key, Array) else described(key)
        return [("key", f"key must be jax.random.key(seed), or the seed in 0..{2**32 - 1}, got {got}")]
    if key.shape not in ((), (num,)):
        return [("key", f"key must be one key, or one per image ({num},), got shape {key.shape}")]
    return []


def array_problems(
    name: str, array: Array | np.ndarray | None, expected: tuple[int, ...], dtype: DTypeLike, steps: int | None = None
) -> Problems:
    """What is wrong with images or noise. steps: how many rows noise has."""
    if array is None:
        return []
    if not isinstance(array, (Array, np.ndarray)):
        how = as_numpy(name, array, expected[-1])
        return [(name, f"{name} must be an array of jax or NumPy, got {described(array)}: give {how}")]
    problems: Problems = []
    if np.shape(array) != expected:
        of_steps = "" if steps is None else f", one row for each of {steps} steps"
        problems.append((name, f"{name} must have shape {expected}{of_steps}, got {np.shape(array)}"))
        if np.ndim(array) == len(expected) and channels_first(array, expected[-1]):
            told = f"{name} looks like (N, C, H, W), got {np.shape(array)}: transpose it to (N, H, W, C)"
            problems.append((name, told))
    elif array.dtype != dtype:
        wanted = jnp.dtype(dtype).name
        pictures = array.dtype == np.uint8 and name in ("images", "condition")
        how = f"{name} / 127.5 - 1 as {wanted}" if pictures else f"{name}.astype('{wanted}')"
        problems.append((name, f"{name} must be {wanted}, got {array.dtype}: give {how}"))
    elif not isinstance(array, jax.core.Tracer) and not _all_finite(array):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
        problems.append((name, f"{name} holds a NaN or infinity, first at {where}"))
    return problems


def described(value: object) -> str:
    """What is given in place of what is asked for: None, a number or text itself, else its type."""
    if value is None or isinstance(value, (int, float, str, np.number)):
        return repr(value)
    module, name = type(value).__module__.partition(".")[0], type(value).__name__
    return f"a {name}" if module == "builtins" else f"{module}'s {name}"


def as_numpy(name: str, value: object, channels: int | None = None) -> str:
    """How an argument of this name, a PyTorch tensor mostly, becomes an array; with channels last, if it has any."""
    if type(value).__module__.partition(".")[0] != "torch":
        return f"numpy.asarray({name}, dtype='float32')"
    shape = tuple(value.shape)  # type: ignore[attr-defined]
    last = channels is not None and len(shape) > 3 and shape[-3] == channels != shape[-1]
    order = {4: ".permute(0, 2, 3, 1)", 5: ".permute(0, 1, 3, 4, 2)"}.get(len(shape), "") if last else ""
    return f"{name}{order}{'.float()' if channels is not None else ''}.numpy(force=True)"


def mask_problems(mask: Array | np.ndarray | None, shape: tuple[int, int, int]) -> Problems:
    """What is wrong with a mask for images of `shape` (h, w, c)."""
    if mask is None:
        return []
    if not isinstance(mask, (Array, np.ndarray)):
        return [
            ("mask", f"mask must be an array of jax or NumPy, got {described(mask)}: give {as_numpy('mask', mask)}")
        ]
    if np.shape(mask) not in ((*shape[:2], 1), shape):
        return [("mask", f"mask must have shape {(*shape[:2], 1)}, one for all images, got {np.shape(mask)}")]
    if isinstance(mask, jax.core.Tracer):
        return []
    values = np.asarray(mask)
    if not np.issubdtype(values.dtype, np.floating) or not ((values >= -1) & (values <= 1)).all():  # NaN neither
        told = "mask must be floats in [-1, 1], -1 where images stay and 1 where they are made anew, got "
        return [("mask", f"{told}{values.dtype} in {values.min()}..{values.max()}")]
    return []


def condition_problems(
    config: ModelConfig, condition: Array | np.ndarray | None, shape: tuple[int, int, int], dtype: DTypeLike
) -> Problems:
    """What is wrong with the images given beside x_t, for (num, h, w) of them."""
    channels = config.condition_channels
    if condition is None and channels:
        told = f"condition is needed, an image of {channels} channels for each: {(*shape, channels)}"
        return [("condition", f"{told}; this network is given one beside x_t")]
    if condition is not None and not channels:
        return [("condition", "this network is given no image beside x_t: leave condition out")]
    given = np.shape(condition) if condition is not None else ()
    if len(given) == 4 and min(given[1:3]) > 0 and shape[1] % given[1] == 0 and shape[2] % given[2] == 0:
        shape = (shape[0], given[1], given[2])  # smaller by whole factors: it is enlarged
    return array_problems("condition", condition, (*shape, channels), dtype)


def start_problems(start: int, num: int) -> Problems:
    """What is wrong with the number of the first image."""
    if 0 <= start <= 2**32 - num:
        return []
    return [("start", f"start must lie in 0..{2**32 - num}, which images are kept apart in, got {start}")]


def batch_size_problems(batch_size: int | None) -> Problems:
    """What is wrong with the number of images at a time."""
    if batch_size is None or (isinstance(batch_size, (int, np.integer)) and batch_size >= 1):
        return []
    return [("batch_size", f"batch_size must be a whole number, at least 1, or None; got {batch_size!r}")]


def guidance_problems(
    config: ModelConfig,
    scale: ArrayLike | None,
    null_label: int | None,
    num: int,
    *,
    kind: str | None = None,
    rescale: float | None = None,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
    takes_eta: bool = True,
) -> Problems:
    """What is wrong with guidance of a network with this config. scale: a scalar or `(num,)`, or None: no guidance.

    channels: those that it changes. takes_eta: the steps are DDIM's.
    """
    others = {"guidance": kind, "guidance_rescale": rescale, "guidance_interval": interval, "null_label": null_label}
    if scale is None:
        return [
            (name, f"{name} is for guidance: give guidance_scale too, or leave it out")
            for name, value in others.items()
            if value is not None
        ]
    if config.class_embedding != "learned":
        told = "guidance_scale needs a network with learned class labels; this one has none"
        return [("guidance_scale", told)]
    problems: Problems = []
    if null_label is None or not 0 <= null_label < (config.num_classes or 0):
        told = f"guidance_scale needs null_label, the one of 0..{(config.num_classes or 1) - 1} that meant no label "
        problems.append(("null_label", f"{told}in training; got {null_label}"))
    known = not isinstance(scale, jax.core.Tracer)
    if wrong := _scale_problems("guidance_scale", scale, num):
        problems += wrong
    elif known and kind == CFG_PLUS_PLUS and not ((np.asarray(scale) >= 0) & (np.asarray(scale) <= 1)).all():
        problems.append(("guidance_scale", f"guidance_scale of cfg++ must lie in 0..1, got {scale}"))
    if channels is not None and not 1 <= channels <= config.in_channels:
        told = f"guidance_channels must lie in 1..{config.in_channels}, x_t's channels, got {channels}"
        problems.append(("guidance_channels", told))
    if kind == CFG_PLUS_PLUS and channels not in (None, config.in_channels):
        told = f"guidance cfg++ changes all channels, this checkpoint's {channels} alone: give guidance_channels "
        problems.append(("guidance", f"{told}{config.in_channels} too, or take another kind"))
    if kind == CFG_PLUS_PLUS and not takes_eta:
        problems.append(("guidance", "guidance cfg++ is of sampling by method ddim alone"))
    if kind == CFG_PLUS_PLUS and rescale is not None:
        problems.append(("guidance_rescale", "guidance cfg++ has no rescaling: leave guidance_rescale out"))
    if rescale is not None and not 0 <= rescale <= 1:
        problems.append(("guidance_rescale", f"guidance_rescale must lie in [0, 1], got {rescale}"))
    if interval is not None and not interval[0] <= interval[1]:
        problems.append(("guidance_interval", f"guidance_interval must be (low, high), low <= high, got {interval}"))
    return problems


def reuse_problems(
    config: ModelConfig,
    *,
    reuse: int | None,
    center: int | None,
    blocks: int | None,
    num_steps: int,
    beside: Mapping[str, bool],
) -> Problems:
    """What is wrong with reusing the deep half of a network with this config.

    num_steps: evaluations. beside: what it does not go with, by name, and whether that is there.
    """
    if reuse is None:
        others = {"reuse_center": center, "reuse_blocks": blocks}
        told = "is for reuse: give reuse too, or leave it out"
        return [(name, f"{name} {told}") for name, value in others.items() if value is not None]
    if not config.up_blocks:
        told = "reuse is of UNets of Ho et al.'s wiring, whose last blocks can be asked alone; this network is none"
        return [("reuse", f"{told}: leave it out")]
    problems: Problems = []
    if reuse < 1:
        problems.append(("reuse", f"reuse must be at least 1, which asks all of the network at each step; got {reuse}"))
    if center is not None and not 0 <= center < num_steps:
        problems.append(("reuse_center", f"reuse_center must be a step in 0..{num_steps - 1}, got {center}"))
    if blocks is not None and not 1 <= blocks <= config.up_blocks:
        told = f"reuse_blocks must lie in 1..{config.up_blocks}, the blocks of the network's way up"
        problems.append(("reuse_blocks", f"{told}, got {blocks}"))
    return problems + [
        ("reuse", f"reuse does not go with {name}: leave reuse out") for name, is_there in beside.items() if is_there
    ]


def classifier_problems(
    config: ModelConfig,
    classifier: ClassifierConfig | None,
    scale: ArrayLike | None,
    null_label: int | None,
    num: int,
    *,
    shape: tuple[int, int, int],
    table: StepTable,
    method: str,
    takes_variance: bool = False,
    kind: str | None = None,
) -> Problems:
    """What is wrong with guiding a network with this config by a classifier, if there is one.

    null_label: the network's, as told or recorded. shape: of the images. takes_variance: of the method. kind: of the
    other guidance.
    """
    if classifier is None:
        told = "classifier_scale is of a classifier: give classifier too, or leave it out"
        return [] if scale is None else [("classifier_scale", told)]
    problems: Problems = []
    if scale is None:
        problems.append(("classifier_scale", "classifier_scale is needed beside a classifier, 1 for instance"))
    else:
        problems += _scale_problems("classifier_scale", scale, num)
    looked, made = ("x".join(map(str, one)) for one in ((*classifier.image_size, classifier.in_channels), shape))
    if shape[2] != classifier.in_channels or (classifier.pool == "attention" and shape[:2] != classifier.image_size):
        problems.append(("classifier", f"classifier looks at images of {looked}, these are {made}"))
    else:
        problems += [("classifier", f"classifier: {problem}") for problem in size_problems(classifier, shape[:2])]
    told = f"classifier tells {classifier.num_classes} classes apart, and this network "
    if config.class_embedding not in (None, "learned"):
        problems.append(("classifier", f"{told}takes labels that are no classes ({config.class_embedding} embedding)"))
    elif config.num_classes is not None:
        classes = config.num_classes - (null_label == config.num_classes - 1)
        if classes != classifier.num_classes:
            problems.append(("classifier", f"{told}has {classes}: they have to be the same"))
    if takes_variance:
        told = (
            f"method {method!r} would have its mean shifted by its variance times the classifier's gradient (OpenAI's "
        )
        problems.append(("method", f"{told}condition_mean), which is not built here: take method ddim"))
    if np.asarray(table.t).dtype != np.int32:
        told = "classifier looks alpha and sigma up by whole timesteps, which this table's t are not"
        problems.append(("classifier", told))
    if kind == CFG_PLUS_PLUS:
        problems.append(("guidance", "guidance cfg++ goes without a classifier: take classifier-free or projected"))
    if not isinstance(table.alpha_t, jax.core.Tracer) and np.asarray(table.alpha_t)[0] == 0:
        told = "classifier guides eps, which tells nothing of x0 at alpha_bar 0, where this table starts"
        problems.append(("classifier", told))
    return problems


def _scale_problems(name: str, scale: ArrayLike, num: int) -> Problems:
    """What is wrong with the scale of a guidance, a scalar or `(num,)`."""
    if np.shape(scale) not in ((), (num,)):
        return [(name, f"{name} must be a scalar or one value per image ({num},), got shape {np.shape(scale)}")]
    if not isinstance(scale, jax.core.Tracer) and not np.isfinite(np.asarray(scale, float)).all():
        return [(name, f"{name} must be finite, got {scale}")]
    return []


def eta_problems(eta: ArrayLike, num: int, table: StepTable) -> Problems:
    """What is wrong with eta, a scalar or `(num,)`, for this table."""
    if np.shape(eta) not in ((), (num,)):
        return [("eta", f"eta must be a scalar or one value per image ({num},), got shape {np.shape(eta)}")]
    if isinstance(eta, jax.core.Tracer):
        return []
    etas = np.asarray(eta, float)
    bad = ~((etas >= 0) & np.isfinite(etas))
    if bad.any():
        return [("eta", f"eta must be a finite number >= 0, got {etas[bad].flat[0]}")]
    if np.max(etas) > (limit := largest_eta(table)):
        told = f"eta {np.max(etas):g} is too large for this table: above {limit:g} a step would "
        return [("eta", f"{told}add more noise than the sample it leads to has")]
    return []


def range_problems(images: Array | np.ndarray) -> Problems:
    """What is wrong with images to edit, encode or invert: values beyond -2..2. Samples overshoot [-1, 1] a little."""
    if not isinstance(images, (Array, np.ndarray)) or isinstance(images, jax.core.Tracer):
        return []
    if images.size == 0 or not _all_finite(images):
        return []
    low, high = float(images.min()), float(images.max())
    if low >= -2 and high <= 2:
        return []
    told = f"images must lie in [-1, 1], got {low:g}..{high:g}, beyond what samples overshoot it by (to -2..2)"
    told += "; of numbers in 0..255 take x / 127.5 - 1"
    return [("images", told)]


def label_problems(
    config: ModelConfig, labels: Array | np.ndarray | None, num: int, classifier: ClassifierConfig | None = None
) -> Problems:
    """What is wrong with labels for a network with this config and for its classifier, `num` of them or None."""
    told = _label_problem(config, labels, num, classifier)
    return [] if told is None else [("labels", told)]


def _label_problem(
    config: ModelConfig, labels: Array | np.ndarray | None, num: int, classifier: ClassifierConfig | None
) -> str | None:
    kind, classes = config.class_embedding, config.num_classes or 1
    who = "this network is class-conditional"
    if classifier is not None:
        who = who if kind else "the classifier leads to labels"
        kind, classes = kind or "learned", classifier.num_classes
    if kind is None:
        return None if labels is None else "this network has no classes: leave labels out"
    if labels is None:
        what = f"integers in 0..{classes - 1}" if kind == "learned" else f"for a {kind} embedding"
        return f"{who}: give labels, one for all or one an image, {what}"
    shape = labels.shape
    if kind == "identity":
        fits = len(shape) == 2 and shape[0] == num
        return None if fits else f"labels must have shape ({num}, width), got {shape}"
    if shape != (num,):
        return f"labels must have shape ({num},), one an image, got {shape}"
    if kind == "timestep" or isinstance(labels, jax.core.Tracer):
        return None
    if labels.dtype.kind in "OUS":
        return "labels must be integers; DDIM.label_names has each name's number"
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return f"labels must be integers, got {labels.dtype}"
    outside = [int(label) for label in np.asarray(labels) if not 0 <= label < classes]
    return f"labels must lie in 0..{classes - 1}, got {outside[0]}" if outside else None


def channels_first(array: Array | np.ndarray, channels: int) -> bool:
    """Whether images (or noise) of so many channels have PyTorch's layout."""
    shape: tuple[int, ...] = np.shape(array)
    return shape[-3] == channels != shape[-1]


def _all_finite(array: Array | np.ndarray) -> bool:
    """Asked where the array is: what lies on a GPU is not fetched for it. Under a transformation nobody asks."""
    finite: Array | np.ndarray = (jnp if isinstance(array, Array) else np).isfinite(array).all()
    return True if isinstance(finite, jax.core.Tracer) else bool(finite)
