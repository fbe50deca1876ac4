"""What is trained and how: a network, its schedule and conventions, and the settings of training. Goes through JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jddim.config import (
    PREDICTION_TYPES,
    VARIANCES,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    did_you_mean,
    from_json,
    later,
    to_json,
)
from jddim.ddim import sampler_table
from jddim.models import MODELS, wiring_of
from jddim.run.problems import denoiser_problems
from jddim.sampling import check_prediction
from jddim.schedule import ContinuousSchedule, EDMSchedule, FlowSchedule, make_schedule

LOSSES = ("simple", "min_snr")
T_SAMPLINGS = ("uniform", "antithetic", LOG_NORMAL := "log_normal", LOGIT_NORMAL := "logit_normal")
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
    t_sampling: "uniform" on 0..T-1, or on t_min..t_max of a continuous schedule; "antithetic": the batch's second half
        has T - 1 - t (t_min + t_max - t) of its first; "log_normal", of the schedule edm: log t is normal (arXiv:
        2206.00364, Table 1); "logit_normal", of flow: log(t / (1 - t)) is (arXiv:2403.03206, Eq. 19). t_mean, t_std: of
        that normal distribution; None: -1.2 and 1.2 for edm, 0 and 1 for flow, those papers'.
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
    t_mean: float | None = later(None)
    t_std: float | None = later(None)

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
        problems += [
            f"{name} must be {says}, or null, got {value!r}"
            for name, value, says, least in (
                ("t_mean", self.t_mean, "in -20..20", -20),
                ("t_std", self.t_std, "in 0.01..20", 0.01),
            )
            if value is not None and not least <= value <= 20
        ]
        if not problems:
            if (self.t_mean, self.t_std) != (None, None) and self.t_sampling not in (LOG_NORMAL, LOGIT_NORMAL):
                problems.append(f"t_mean and t_std are of t_sampling {LOG_NORMAL} and {LOGIT_NORMAL}")
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
        if isinstance(schedule, ContinuousSchedule):
            problems += self._continuous_problems(schedule)
        else:
            if self.sampler.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
                told = "zero_terminal_snr needs prediction_type v_prediction or sample: eps tells nothing there"
                problems.append(told)
            if self.learns_variance and schedule.num_train_timesteps < 2:
                problems.append("a learned variance needs at least two timesteps")
            if train.t_sampling in (LOG_NORMAL, LOGIT_NORMAL):
                problems.append(f"t_sampling {train.t_sampling} is of a continuous schedule")
        problems += [f"sampler: {told}" for told in denoiser_problems(self.sampler, schedule)]
        wanted = model.in_channels * (2 if self.learns_variance else 1)
        if model.out_channels != wanted:
            problems.append(f"out_channels must be {wanted} with variance {self.sampler.variance}: {model.in_channels}")
            problems[-1] += f" of x_t{', and as many of the variance' if self.learns_variance else ''}"
        try:
            check_prediction(sampler_table(schedule, self.sampler), self.sampler.prediction_type)
        except ValueError as error:
            problems.append(f"sampler: {error}")
        if model.condition_channels:
            problems.append(
                "a network that is given an image beside x_t is not trained here: condition_channels must be 0"
            )
        if getattr(model, "time_embedding", None) == "noise_level":
            problems.append("a network that is told the noise level in place of t is sampled, but not trained here")
        if self.sampler.self_condition:
            problems.append("self-conditioned networks are sampled, but not trained here")
        if model.class_embedding not in (None, "learned"):
            problems.append(f"class_embedding {model.class_embedding!r} is sampled, but not trained here")
        if train.null_label is not None and not 0 <= train.null_label < (model.num_classes or 0):
            problems.append(f"null_label must be one of the network's {model.num_classes or 0} classes")
        if problems:
            raise ValueError("; ".join(problems))

    def _continuous_problems(self, schedule: ContinuousSchedule) -> list[str]:
        """What of a task is not of a continuous schedule."""
        flow, edm = isinstance(schedule, FlowSchedule), isinstance(schedule, EDMSchedule)
        how = self.train.t_sampling
        problems = []
        if self.train.loss == "min_snr":
            problems.append("loss min_snr is of schedules with T timesteps: take simple")
        if self.sampler.variance != "fixed_small":
            problems.append("variance is fixed_small on a continuous schedule")
        if (how == LOG_NORMAL and not edm) or (how == LOGIT_NORMAL and not flow):
            problems.append(f"t_sampling {how} is of the schedule {'edm' if how == LOG_NORMAL else 'flow'}")
        return problems

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
