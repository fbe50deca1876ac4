"""What `jddim info` says of schedule and sampler in the source's own words, and who told it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.numpy import save_file

from convert.conversion import convert
from convert.families import diffusers_config, ho
from convert.families.base import Wording
from jddim.checkpoint.diff import diff
from jddim.checkpoint.folder import load_metadata
from jddim.cli.main import main

pytestmark = pytest.mark.unoptimised

NETWORK: dict[str, Any] = {
    **{"in_channels": 1, "out_channels": 1, "block_out_channels": [8], "norm_num_groups": 2, "sample_size": 6},
    **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(tiny.arrays(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_info_says_it_below_our_names_and_marks_what_was_told(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yml").write_text("diffusion: {beta_end: 0.03, num_diffusion_timesteps: 500}\n")
    # the preset's network is another: all of it is overridden, its schedule is not
    network = {**tiny.SETTINGS, "ch": "8", "ch_mult": "1,2", "num_res_blocks": "1", "attn_resolutions": "3"}
    told = [part for key, value in {**network, "spacing": "quad"}.items() for part in ("--set", f"{key}={value}")]
    options = ["--no-verify", "--preset", "cifar10", "--set", "beta_end=0.01", *told]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("schedule "))
    assert lines[at + 1] == (
        "  in ho         beta_schedule=linear (--preset cifar10), beta_start=0.0001 (--preset cifar10), "
        "beta_end=0.01 (--set), num_diffusion_timesteps=1000 (--preset cifar10)"
    )
    assert lines[at + 2].startswith("sampler ")
    assert lines[at + 3] == (
        "  in ho         skip_type=quad (--set), timesteps=50, eta=0.0, var_type=fixedlarge (--preset cifar10)"
    )
    assert not any(line.startswith("wording") for line in lines)
    assert f"{'sha256':<15} {load_metadata(tmp_path / 'out').sha256}" in lines  # wording, not shown, is part of it


def test_a_config_files_values_are_the_sources_own_and_bear_no_mark(tmp_path: Path, source: Path) -> None:
    (tmp_path / "config.yml").write_text("diffusion: {beta_end: 0.03, num_diffusion_timesteps: 500}\n")
    wording = convert(source, tmp_path / "out", settings=tiny.SETTINGS, verify=False).provenance["wording"]
    assert (wording["schedule"]["beta_end"], wording["schedule"]["num_diffusion_timesteps"]) == ("0.03", "500")
    assert wording["told"] == {}


def test_a_checkpoint_that_recorded_none_is_described_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_checkpoint(tmp_path / "out")
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "  in " not in capsys.readouterr().out


def test_diff_does_not_say_the_same_twice(tmp_path: Path, source: Path) -> None:
    for name, eta in (("a", "0"), ("b", "0.5")):
        convert(source, tmp_path / name, settings={**tiny.SETTINGS, "eta": eta}, verify=False)
    assert [row.name for row in diff(tmp_path / "a", tmp_path / "b")] == ["sampler.eta", "provenance.set.eta"]


def test_hos_other_spacings_are_no_skip_type() -> None:
    told = {**tiny.SETTINGS, "spacing": "linspace", "beta_schedule": "const"}
    wording = ho.plan(tiny.arrays(), None, told).wording
    assert "skip_type" not in wording.sampler
    assert wording.schedule["beta_schedule"] == "const"  # ours has only the betas


def diffusers(scheduler: dict[str, Any], **given: str) -> Wording:
    return diffusers_config.wording(diffusers_config.read_configs({"unet": NETWORK, "scheduler": scheduler}, given))


def test_diffusers_keys_are_those_with_an_effect() -> None:
    wording = diffusers({"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, eta="0.5")
    assert wording.schedule == {
        **{"num_train_timesteps": "1000", "beta_schedule": "linear", "beta_start": "0.0001", "beta_end": "0.02"},
        "rescale_betas_zero_snr": "false",
    }
    assert wording.sampler == {
        **{"timestep_spacing": "leading", "steps_offset": "1", "set_alpha_to_one": "false"},
        **{"prediction_type": "epsilon", "clip_sample": "false", "thresholding": "false"},
        **{"variance_type": "fixed_small", "num_inference_steps": "50", "eta": "0.5"},
        "use_clipped_model_output": "false",
    }
    sampler = diffusers({"timestep_spacing": "trailing", "thresholding": True}).sampler
    assert "steps_offset" not in sampler  # of leading spacing only
    assert "clip_sample_range" not in sampler  # thresholding goes before clipping
    assert (sampler["dynamic_thresholding_ratio"], sampler["sample_max_value"]) == ("0.995", "1.0")
    assert diffusers({}).sampler["clip_sample_range"] == "1.0"
    betas = diffusers({"num_train_timesteps": 9, "trained_betas": [0.1] * 9}).schedule
    assert betas == {"num_train_timesteps": "9", "trained_betas": "(9 numbers)", "rescale_betas_zero_snr": "false"}
    assert "beta_start" not in diffusers({"beta_schedule": "squaredcos_cap_v2"}).schedule


def test_openais_and_lucidrains_words() -> None:
    pytest.importorskip("torch", reason="their small networks are made with it")
    import lucidrains_files
    from test_openai import FLAGS, state_dict

    from convert.families import lucidrains, openai

    tensors = {name: value.numpy() for name, value in state_dict().items()}
    flags = {**FLAGS, "diffusion_steps": "4000", "rescale_timesteps": "true", "noise_schedule": "cosine"}
    wording = openai.plan(tensors, None, flags).wording
    assert wording.schedule == {"noise_schedule": "cosine", "diffusion_steps": "4000"}
    assert wording.sampler == {
        **{"timestep_respacing": '""', "clip_denoised": "True", "predict_xstart": "False", "learn_sigma": "False"},
        **{"sigma_small": "False", "rescale_timesteps": "True"},
    }
    told = {**FLAGS, "timestep_respacing": "ddim25"}
    assert openai.plan(tensors, None, told).wording.sampler["timestep_respacing"] == "ddim25"

    config = lucidrains_files.small_config()
    unet = lucidrains_files.draw(config, 1)
    state = lucidrains_files.diffusion(unet, lucidrains_files.COSINE, "pred_x0")
    tensors = lucidrains.open_source(state, "a.pt").tensors
    wording = lucidrains.plan(tensors, None, lucidrains_files.SETTINGS).wording
    assert wording.schedule == {"beta_schedule": "cosine", "timesteps": "100"}
    assert wording.sampler == {
        **{"objective": "pred_x0", "sampling_timesteps": "100", "ddim_sampling_eta": "0.0", "auto_normalize": "True"},
        **{"self_condition": "False", "learned_variance": "False"},
    }


def test_a_mark_follows_the_name_that_set_has() -> None:
    wording = Wording({"a": "1"}, {"skip_type": "quad", "b": "2"}, {"skip_type": "spacing"})
    told = wording.to_json({"spacing": "--set", "b": "--preset x", "elsewhere": "--set"})["told"]
    assert told == {"skip_type": "--set", "b": "--preset x"}
