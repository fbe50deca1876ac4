"""A small task to train, for the tests of the objective and of the step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from tiny import small_config

from jddim.config import SamplerConfig, ScheduleConfig
from jddim.train import objective
from jddim.train.task import Task, TrainConfig

draw = jax.jit(objective.draw, static_argnums=(1, 2, 3))
SMALLEST: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
SHORT = ScheduleConfig("linear", 50, 1e-3, 0.2)


def task(
    model: dict | None = None, sampler: dict | None = None, schedule: ScheduleConfig = SHORT, **train: Any
) -> Task:
    config = TrainConfig(**({"steps": 12, "batch_size": 5, "warmup_steps": 0, "lr": 0.01} | train))
    return Task(small_config(**SMALLEST, **(model or {})), schedule, SamplerConfig(**(sampler or {})), config)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
