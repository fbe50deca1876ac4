"""diffusers' `FlaxDDIMScheduler`, `FlaxDDPMScheduler` and `FlaxAutoencoderKL`, in their calling form, on jddim's maths.

diffusers 0.39 was the last to have them; `docs/flax.md` says what to change, and what has no home. The schedulers'
methods work under `jit`, `scan` and `vmap`: states and results are pytrees. Their tables are float64 on the host, cast
once; `step` is `jddim.ddim`'s. Schedulers take any shape; the first stage has images `(b, c, h, w)` and a Gaussian
`(b, h, w, c)`, as in diffusers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import PREDICTION_TYPES, AutoencoderConfig, ScheduleConfig, did_you_mean, misfits
from jddim.converting import Told
from jddim.ddim import add_noise, coefficients, ddim_step, ddpm_step, predict_both, step_table
from jddim.files import read_json
from jddim.models.autoencoder import Autoencoder
from jddim.models.building import build_model, flat_params
from jddim.pipeline import load_autoencoder
from jddim.sampling import as_eta, is_zero
from jddim.schedule import NoiseSchedule, noise_schedule
from jddim.timesteps import leading_timesteps

# -- schedulers -------------------------------------------------------------------------------------------------------


@struct.dataclass
class CommonSchedulerState:
    """The schedule: alphas (1 - beta), betas, alphas_cumprod, `(T,)` each."""

    alphas: Array
    betas: Array
    alphas_cumprod: Array


@struct.dataclass
class SchedulerState:
    """A scheduler's state; a pytree, with the fields that diffusers' have, and coefficients.

    final_alpha_cumprod: alpha_bar where DDIM's last step ends. init_noise_sigma: 1. timesteps: int32, descending; all T
    before `set_timesteps`. num_inference_steps: None before it. coefficients: row t has the `jddim.ddim.Coefficients`
    of the step from t, `(T,)` each.
    """

    common: CommonSchedulerState
    final_alpha_cumprod: Array
    init_noise_sigma: Array
    timesteps: Array
    coefficients: dict[str, Array]
    num_inference_steps: int | None = None


class SchedulerOutput(NamedTuple):
    """What `step` returns. prev_sample: x_prev, like `sample`. state: the one given."""

    prev_sample: Array
    state: SchedulerState


_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_CHOICES = {
    "beta_schedule": [*_SCHEDULES],
    "prediction_type": [*PREDICTION_TYPES],
    "variance_type": ["fixed_small", "fixed_large"],
}
_OF_PYTORCH = {"timestep_spacing": "leading", "rescale_betas_zero_snr": False, "thresholding": False}


class _Scheduler:
    """What the two have in common; each is a dataclass whose fields are the arguments."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: ArrayLike | None
    set_alpha_to_one: bool
    prediction_type: str
    dtype: DTypeLike

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None
    ) -> tuple[Self, SchedulerState]:
        """The scheduler of the `scheduler_config.json` in a folder, and its state. Keys that are no arguments are left.

        Raises ValueError for a value of another type, and for a setting of diffusers' PyTorch schedulers that would
        sample otherwise; OSError if there is no such file.
        """
        file = Path(pretrained_model_name_or_path, subfolder or "", "scheduler_config.json")
        try:
            told = read_json(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if not isinstance(told, dict):
            raise ValueError(f"{file} holds no settings: it is a {type(told).__name__}")
        names = {field.name for field in dataclasses.fields(cls)} - {"dtype"}  # type: ignore[arg-type]
        given = {k: np.asarray(v) if isinstance(v, list) else v for k, v in told.items() if k in names}
        problems = misfits(given, cls) + [
            f"{name} is {told[name]!r}; {cls.__name__} has {plain!r} alone"
            for name, plain in _OF_PYTORCH.items()
            if told.get(name, plain) != plain
        ]
        if problems:
            raise ValueError(f"{file}: {'; '.join(problems)}")
        scheduler = cls(**given)
        return scheduler, scheduler.create_state()

    def __post_init__(self) -> None:
        problems = [
            f"unknown {name} {value!r}{did_you_mean(str(value), allowed)}"
            for name, allowed in _CHOICES.items()
            if (value := getattr(self, name, allowed[0])) not in allowed
        ]
        if problems:
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}")
        _ = self._schedule  # raises for betas that make none

    @property
    def config(self) -> Self:
        """The arguments, as attributes."""
        return self

    def __len__(self) -> int:
        """T."""
        return self.num_train_timesteps

    @functools.cached_property
    def _schedule(self) -> NoiseSchedule:
        T = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = tuple(np.asarray(self.trained_betas, np.float64).tolist())
            return noise_schedule(ScheduleConfig("betas", T, betas=betas))
        name = _SCHEDULES[self.beta_schedule]
        ends = (None, None) if name == "cosine" else (self.beta_start, self.beta_end)
        return noise_schedule(ScheduleConfig(name, T, *ends))

    def _coefficients(self, stride: int) -> dict[str, Array]:
        """Row t is the step from t to t - stride."""
        t = np.arange(self.num_train_timesteps)[::-1]
        table = step_table(
            *(self._schedule, t, np.dtype(self.dtype)),
            timesteps_prev=np.maximum(t - stride, -1),
            set_alpha_to_one=self.set_alpha_to_one,
        )
        return {name: jnp.asarray(np.asarray(column)[::-1]) for name, column in coefficients(table).items()}

    def create_state(self) -> SchedulerState:
        """The state that the other methods take."""
        schedule, T = self._schedule, self.num_train_timesteps
        common = CommonSchedulerState(
            *(jnp.asarray(x, self.dtype) for x in (1 - schedule.betas, schedule.betas, schedule.alphas_cumprod))
        )
        return SchedulerState(
            common=common,
            final_alpha_cumprod=jnp.ones((), self.dtype) if self.set_alpha_to_one else common.alphas_cumprod[0],
            init_noise_sigma=jnp.ones((), self.dtype),
            timesteps=jnp.arange(T, dtype=jnp.int32)[::-1],
            coefficients=self._coefficients(1),
        )

    def scale_model_input(self, state: SchedulerState, sample: Array, timestep: ArrayLike | None = None) -> Array:
        """`sample` as it is."""
        return sample

    def add_noise(self, state: SchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """`jddim.ddim.add_noise` at timesteps in 0..T-1, a scalar or `(b,)`; NaN at others."""
        row = _row(state, timesteps)
        return add_noise(original_samples, noise, row["alpha_t"], row["sigma_t"])

    def get_velocity(self, state: SchedulerState, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """The velocity alpha_t noise - sigma_t sample, which "v_prediction" predicts; timesteps as in `add_noise`."""
        row = _row(state, timesteps)
        return add_noise(noise, -sample, row["alpha_t"], row["sigma_t"])


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxDDIMScheduler(_Scheduler):
    """DDIM (arXiv:2010.02502) with leading spacing: the arguments, their order and defaults are diffusers'.

    Raises ValueError for an unknown name, and for betas that are no schedule.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: ArrayLike | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    dtype: DTypeLike = jnp.float32

    def set_timesteps(
        self, state: SchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> SchedulerState:
        """The state of a run of so many steps; shape is not used.

        Raises ValueError unless they are in 1..T, and if steps_offset takes the first beyond T-1.
        """
        timesteps = leading_timesteps(self.num_train_timesteps, num_inference_steps, self.steps_offset)
        return dataclasses.replace(
            state,
            num_inference_steps=num_inference_steps,
            timesteps=jnp.asarray(timesteps, jnp.int32),
            coefficients=self._coefficients(self.num_train_timesteps // num_inference_steps),
        )

    def step(
        self,
        state: SchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        eta: ArrayLike = 0.0,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        noise: Array | None = None,
    ) -> SchedulerOutput | tuple[Array, SchedulerState]:
        """`jddim.ddim_step` from `timestep` to timestep - T // S, or to the end below 0.

        model_output, sample: `(b, ...)`. timestep: in 0..T-1, a scalar or `(b,)`; NaN at others. eta: a scalar or
        `(b,)`. key, noise: exactly one where eta is not known to be 0; noise ~ N(0, I) like sample. diffusers'
        took neither and added no noise, whatever eta.
        Raises ValueError before `set_timesteps`, and for neither or both of key and noise.
        """
        if state.num_inference_steps is None:
            raise ValueError("step: the state has no steps yet: state = scheduler.set_timesteps(state, 50)")
        row = _row(state, timestep)
        x0, eps = predict_both(model_output, sample, row["alpha_t"], row["sigma_t"], self.prediction_type)
        if self.clip_sample:
            x0 = jnp.clip(x0, -self.clip_sample_range, self.clip_sample_range)
        z = 0.0 if is_zero(eta) else _noise(key, noise, sample, self.dtype, "eta > 0")
        prev_sample = ddim_step(x0, eps, z, **row, eta=as_eta(eta, sample))
        return SchedulerOutput(prev_sample, state) if return_dict else (prev_sample, state)


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxDDPMScheduler(_Scheduler):
    """DDPM (arXiv:2006.11239): the arguments, their order and defaults are diffusers'.

    variance_type: "fixed_small" or "fixed_large". diffusers' other four took the root of a negative logarithm,
    or split a learned variance of two channels alone; `jddim.ddpm_step` has the learned one.
    Raises ValueError for an unknown name, and for betas that are no schedule.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: ArrayLike | None = None
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    dtype: DTypeLike = jnp.float32

    set_alpha_to_one = True  # no argument

    def set_timesteps(
        self, state: SchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> SchedulerState:
        """The state with so many timesteps, T // S apart; shape is not used. `step` goes from t to t-1 all the same.

        Raises ValueError unless they are in 1..T.
        """
        timesteps = leading_timesteps(self.num_train_timesteps, num_inference_steps)
        return dataclasses.replace(
            state, num_inference_steps=num_inference_steps, timesteps=jnp.asarray(timesteps, jnp.int32)
        )

    def step(
        self,
        state: SchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        key: Array | None = None,
        return_dict: bool = True,
        *,
        noise: Array | None = None,
    ) -> SchedulerOutput | tuple[Array, SchedulerState]:
        """`jddim.ddpm_step` from `timestep` to timestep - 1.

        model_output, sample: `(b, ...)`. timestep: in 0..T-1, a scalar or `(b,)`; NaN at others. key, noise: exactly
        one; from a key the noise is what diffusers' drew. That took key 0 for none: the same noise in every step.
        Raises ValueError for neither or both of key and noise.
        """
        row = _row(state, timestep)
        x0, _ = predict_both(model_output, sample, row["alpha_t"], row["sigma_t"], self.prediction_type)
        if self.clip_sample:
            x0 = jnp.clip(x0, -1, 1)
        z = _noise(key, noise, sample, self.dtype, "a step of DDPM")
        prev_sample = ddpm_step(sample, x0, z, **row, variance=self.variance_type)
        return SchedulerOutput(prev_sample, state) if return_dict else (prev_sample, state)


def _row(state: SchedulerState, timesteps: ArrayLike) -> dict[str, Array]:
    """The coefficients of steps from these t; NaN outside 0..T-1, where jax would take another t."""
    t = jnp.asarray(timesteps)
    return {
        name: column.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        for name, column in state.coefficients.items()
    }


def _noise(key: Array | None, noise: Array | None, like: Array, dtype: DTypeLike, what: str) -> Array:
    if noise is not None and key is None:
        return noise
    if key is None or noise is not None:
        raise ValueError(f"step: {what} needs key= or noise=, one of them; got {'neither' if key is None else 'both'}")
    return jax.random.normal(jax.random.split(key, 1)[0], like.shape, dtype)


# -- the first stage --------------------------------------------------------------------------------------------------


class FlaxDiagonalGaussianDistribution(NamedTuple):
    """The encoder's Gaussian; mean, logvar: `(b, h, w, latent_channels)`, unscaled."""

    mean: Array
    logvar: Array

    @property
    def std(self) -> Array:
        """Its standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> Array:
        """Its variance."""
        return jnp.exp(self.logvar)

    def sample(self, key: Array) -> Array:
        """Latents from it; from the same key what diffusers' drew."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)

    def mode(self) -> Array:
        """The mean."""
        return self.mean


class FlaxAutoencoderKLOutput(NamedTuple):
    """What `encode` returns."""

    latent_dist: FlaxDiagonalGaussianDistribution


class FlaxDecoderOutput(NamedTuple):
    """What `decode` returns. sample: `(b, c, h, w)`."""

    sample: Array


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxAutoencoderKL:
    """A first stage in diffusers' calling form: `model.apply({"params": params}, x, method=model.encode)`.

    Made by `from_pretrained`. config: jddim's, with `scaling_factor`, `latent_channels`, `size_factor` (pixels a side
    of a latent). Latents are not scaled here. dtype: the compute dtype.
    """

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32
    network: Autoencoder | None = None
    key: Array | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: DTypeLike = jnp.float32,
        *,
        subfolder: str | None = None,
        from_pt: bool = False,
        **told: Unpack[Told],
    ) -> tuple[FlaxAutoencoderKL, dict[str, Array]]:
        """The model, and its parameters: jddim's names -> arrays.

        A folder with `config.json` and `diffusion_flax_model.msgpack`, which is read unless `from_pt`, or PyTorch's
        weights; or what `jddim.load_autoencoder` takes, whose options, `told`, and errors it has.
        Raises ValueError for a VQModel.
        """
        path = pretrained_model_name_or_path
        place = path if subfolder is None else Path(path, subfolder)
        weights = Path(place, "diffusion_flax_model.msgpack")
        network = load_autoencoder(weights if weights.is_file() and not from_pt else place, dtype=dtype, **told)
        if network.config.num_codes is not None:
            raise ValueError(f"{place} is a VQModel, which has no Gaussian: jddim.load_autoencoder loads it")
        return cls(network.config, dtype), flat_params(network)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        method: Any = None,
        rngs: Mapping[str, Array] | None = None,
        **options: Any,
    ) -> Any:
        """A method with these parameters: `model.encode`, `model.decode`, their names, or None for the call.

        variables: {"params": what `from_pretrained` gave}. rngs: {"gaussian": key}, for the call's sample_posterior.
        Raises ValueError for another method, and for parameters that are not the model's.
        """
        name = "__call__" if method is None else getattr(method, "__name__", method)
        if name not in ("__call__", "encode", "decode"):
            raise ValueError(f"apply: method must be model.encode, model.decode or None, got {method!r}")
        unscaled = dataclasses.replace(self.config, scaling_factor=1.0, shift_factor=0.0)
        network: Any = build_model(unscaled, variables["params"], self.dtype)
        bound = dataclasses.replace(self, network=network, key=(rngs or {}).get("gaussian"))
        return getattr(bound, name)(*args, **options)

    def encode(
        self, sample: Array, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxAutoencoderKLOutput | tuple[FlaxDiagonalGaussianDistribution]:
        """The Gaussian `(b, h / f, w / f, latent_channels)` of images `(b, c, h, w)`, within `apply`."""
        mean, logvar = self._network("encode").moments(jnp.moveaxis(sample, 1, -1))
        assert logvar is not None
        gaussian = FlaxDiagonalGaussianDistribution(mean, logvar)
        return FlaxAutoencoderKLOutput(gaussian) if return_dict else (gaussian,)

    def decode(
        self, latents: Array, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxDecoderOutput | tuple[Array]:
        """Images `(b, c, f h, f w)` of unscaled latents, within `apply`.

        latents: `(b, h, w, latent_channels)`, or `(b, latent_channels, h, w)` where w is not latent_channels.
        """
        if latents.shape[-1] != self.config.latent_channels:
            latents = jnp.moveaxis(latents, 1, -1)
        images = jnp.moveaxis(self._network("decode").decode(latents), -1, 1)
        return FlaxDecoderOutput(images) if return_dict else (images,)

    def __call__(
        self, sample: Array, sample_posterior: bool = False, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxDecoderOutput | tuple[Array]:
        """Images there and back, by the mean or, with sample_posterior, by a draw with the key of `apply`."""
        (gaussian,) = self.encode(sample)
        if sample_posterior and self.key is None:
            raise ValueError('apply: sample_posterior needs rngs={"gaussian": key}')
        latents = gaussian.mode() if self.key is None or not sample_posterior else gaussian.sample(self.key)
        return self.decode(latents, return_dict=return_dict)

    def _network(self, of: str) -> Autoencoder:
        if self.network is None:
            raise ValueError(f'{of}: call model.apply({{"params": params}}, x, method=model.{of})')
        return self.network
