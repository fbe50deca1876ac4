"""A folder of each scheduler of diffusers gives DDIM its schedule, or one line that says why not."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import diffusers_cases as cases
import numpy as np
import pytest

from convert.conversion import _read_config
from convert.engine import ConversionError
from convert.families import diffusers as family
from jddim.schedule import make_schedule

diffusers = cases.diffusers

NETWORK = {"sample_size": 6, "block_out_channels": [4], "down_block_types": ["DownBlock2D"], "norm_num_groups": 2}
NETWORK |= {"up_block_types": ["UpBlock2D"], "attention_head_dim": None}
CHANGES: dict[str, Any] = {
    **{"beta_start": 0.002, "beta_end": 0.03, "beta_schedule": "scaled_linear", "num_train_timesteps": 300},
    **{"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
}
UNCLIP = {"num_train_timesteps": 300}  # its betas are the cosine's, its predictions eps or x0
# They have betas, but not DDIM's process.
OTHER = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LCMScheduler", "TCDScheduler")


def schedulers() -> dict[str, Any]:
    """Every scheduler of the diffusers installed by name; not those whose module needs what is not there."""
    found: dict[str, Any] = {}
    package = diffusers.schedulers
    for module in pkgutil.iter_modules(package.__path__):
        try:
            names = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        except ImportError:  # torchsde's
            continue
        kinds = {name: kind for name, kind in names.items() if name.endswith("Scheduler") and inspect.isclass(kind)}
        found |= {name: kind for name, kind in kinds.items() if issubclass(kind, diffusers.ConfigMixin)}
    return found


SCHEDULERS = schedulers()


def saved(kind: Any, folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A scheduler, None where it needs more to be made; and its folder's file as jddim reads it."""
    takes = inspect.signature(kind.__init__).parameters
    if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in list(takes.values())[1:]):
        return None, {"_class_name": kind.__name__}
    scheduler = kind(**{key: value for key, value in options.items() if key in takes})
    scheduler.save_config(folder)
    return scheduler, _read_config(folder / "scheduler_config.json")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_gives_its_schedule_or_one_line(tmp_path: Path, name: str) -> None:
    scheduler, contents = saved(SCHEDULERS[name], tmp_path, {})
    if getattr(scheduler, "alphas_cumprod", None) is None or name in OTHER:
        with pytest.raises(ConversionError) as caught:
            family.plan({}, {"unet": NETWORK, "scheduler": contents}, {})
        line = rf"scheduler_config\.json is a {name}'s: its process is [^;\n]{{1,60}}, not DDIM's"
        assert re.fullmatch(line, str(caught.value))
        return
    for options in ({}, UNCLIP if name == "UnCLIPScheduler" else CHANGES):
        scheduler, contents = saved(SCHEDULERS[name], tmp_path, options)
        plan = family.plan({}, {"unet": NETWORK, "scheduler": contents}, {})
        theirs = diffusers.DDIMScheduler.from_config(contents)
        ours = make_schedule(plan.schedule).alphas_cumprod
        for bars in (scheduler.alphas_cumprod, theirs.alphas_cumprod):
            np.testing.assert_allclose(ours, bars.numpy(), rtol=1e-4)  # diffusers multiplies up in float32
        assert plan.sampler.prediction_type == theirs.config.prediction_type
        assert plan.sampler.spacing.removesuffix("_diffusers") == theirs.config.timestep_spacing
        assert plan.sampler.clip == theirs.config.clip_sample
        assert plan.sampler.set_alpha_to_one == theirs.config.set_alpha_to_one
        said = [note for note in plan.notes if f"is a {name}'s: DDIM takes its betas" in note]
        assert len(said) == (name not in ("DDIMScheduler", "DDPMScheduler"))


def test_the_networks_of_diffusers_have_no_key_that_is_taken_for_a_misspelling() -> None:
    for kind in (diffusers.UNet2DConditionModel, diffusers.UNet2DModel):
        keys = inspect.signature(kind.__init__).parameters.keys() - {"self"} - NETWORK.keys()
        defaults = {key: inspect.signature(kind.__init__).parameters[key].default for key in keys}
        known = {key: value for key, value in defaults.items() if key not in family.configs.UNET}
        contents = json.loads(json.dumps({"unet": NETWORK | known}))
        family.plan({}, contents, {})
