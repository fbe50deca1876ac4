"""DDIM sampling in JAX for diffusion models trained in PyTorch (arXiv:2010.02502).

Names are imported on first use, so that `jddim --help` answers at once and Ctrl-C is heard while jax loads.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors read; the tables below say the same, a test compares them
    from jddim import ddim as ddim
    from jddim import denoisers as denoisers
    from jddim import editing as editing
    from jddim import guidance as guidance
    from jddim import inversion as inversion
    from jddim import restoration as restoration
    from jddim import sampling as sampling
    from jddim import schedule as schedule
    from jddim import solvers as solvers
    from jddim import timesteps as timesteps
    from jddim import timetables as timetables
    from jddim.checkpoint.folder import CheckpointError as CheckpointError
    from jddim.config import SamplerConfig as SamplerConfig
    from jddim.config import ScheduleConfig as ScheduleConfig
    from jddim.config import UNetConfig as UNetConfig
    from jddim.converting import ConversionError as ConversionError
    from jddim.converting import Verification as Verification
    from jddim.converting import convert as convert
    from jddim.converting import export_torch as export_torch
    from jddim.converting import info as info
    from jddim.converting import verify as verify
    from jddim.ddim import StepTable as StepTable
    from jddim.ddim import ddim_sigma as ddim_sigma
    from jddim.ddim import ddim_step as ddim_step
    from jddim.ddim import ddpm_step as ddpm_step
    from jddim.ddim import predict_eps as predict_eps
    from jddim.ddim import predict_x0 as predict_x0
    from jddim.ddim import step_table as step_table
    from jddim.images import show as show
    from jddim.images import to_pil as to_pil
    from jddim.inversion import invert_loop as invert_loop
    from jddim.known import Preset as Preset
    from jddim.known import presets as presets
    from jddim.models.unet import UNet as UNet
    from jddim.pipeline import DDIM as DDIM
    from jddim.pipeline import Preview as Preview
    from jddim.pipeline import load as load
    from jddim.pipeline import load_autoencoder as load_autoencoder
    from jddim.pipeline import load_classifier as load_classifier
    from jddim.sampling import Trajectory as Trajectory
    from jddim.sampling import ancestral_loop as ancestral_loop
    from jddim.sampling import initial_noise as initial_noise
    from jddim.sampling import sample_keys as sample_keys
    from jddim.sampling import sample_loop as sample_loop
    from jddim.schedule import NoiseSchedule as NoiseSchedule
    from jddim.schedule import cosine_schedule as cosine_schedule
    from jddim.schedule import from_betas as from_betas
    from jddim.schedule import linear_schedule as linear_schedule
    from jddim.schedule import scaled_linear_schedule as scaled_linear_schedule
    from jddim.schedule import sigmoid_schedule as sigmoid_schedule
    from jddim.timesteps import linspace_timesteps as linspace_timesteps
    from jddim.timesteps import make_timesteps as make_timesteps
    from jddim.timesteps import quad_timesteps as quad_timesteps
    from jddim.timesteps import uniform_timesteps as uniform_timesteps

_HOME = {
    name: module
    for module, names in {
        "config": "SamplerConfig ScheduleConfig UNetConfig",
        "checkpoint.folder": "CheckpointError",
        "converting": "ConversionError Verification convert export_torch info verify",
        "ddim": "StepTable ddim_sigma ddim_step ddpm_step predict_eps predict_x0 step_table",
        "images": "show to_pil",
        "inversion": "invert_loop",
        "known": "Preset presets",
        "models.unet": "UNet",
        "pipeline": "DDIM Preview load load_autoencoder load_classifier",
        "sampling": "Trajectory ancestral_loop initial_noise sample_keys sample_loop",
        "schedule": "NoiseSchedule cosine_schedule from_betas linear_schedule scaled_linear_schedule sigmoid_schedule",
        "timesteps": "linspace_timesteps make_timesteps quad_timesteps uniform_timesteps",
    }.items()
    for name in names.split()
}

_MODULES = (
    *("ddim", "sampling", "schedule", "timesteps", "timetables"),
    *("denoisers", "guidance", "solvers", "inversion", "editing", "restoration"),
)

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"jddim.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jddim' has no attribute {name!r}")
    value: object = getattr(import_module(f"jddim.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
