"""DDIM sampling in JAX for diffusion models trained in PyTorch (arXiv:2010.02502)."""

from jddim.config import SamplerConfig as SamplerConfig
from jddim.config import ScheduleConfig as ScheduleConfig
from jddim.config import UNetConfig as UNetConfig
from jddim.ddim import StepTable as StepTable
from jddim.ddim import ddim_sigma as ddim_sigma
from jddim.ddim import ddim_step as ddim_step
from jddim.ddim import ddpm_step as ddpm_step
from jddim.ddim import predict_eps as predict_eps
from jddim.ddim import predict_x0 as predict_x0
from jddim.ddim import step_table as step_table
from jddim.models.unet import UNet as UNet
from jddim.pipeline import DDIM as DDIM
from jddim.pipeline import load as load
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

__version__ = "0.1.0"
