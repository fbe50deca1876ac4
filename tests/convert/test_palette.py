"""convert.families.palette: its runs' files, what their config, tensors and buffers tell, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import named
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.conversion import convert, describe
from convert.engine import ConversionError, UnsettledError, fill
from convert.export import export
from convert.families import openai, palette
from convert.recognition import recognise
from jddim.checkpoint.folder import load_params
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params
from jddim.schedule import from_betas, linear_schedule, make_schedule

pytestmark = pytest.mark.unoptimised

CONFIG = UNetConfig(
    **{"image_size": (6, 10), "in_channels": 2, "out_channels": 2, "condition_channels": 3, "condition_first": True},
    **{"channels": 4, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_levels": (), "norm_groups": 2},
    **{"head_channels": 4, "downsample": ("resnet",), "upsample": ("resnet",), "scale_shift": True},
    **{"time_embedding": "noise_level", "num_timesteps": 5},
    **openai._FIXED,
)
TEST = {"schedule": "linear", "n_timestep": 5, "linear_start": 1e-2, "linear_end": 0.6}
SETTINGS = {"image_size": "6x10", "num_head_channels": "4", "norm_groups": "2"}
TRAIN = linear_schedule(20, 1e-6, 0.01).betas
NETWORK = {
    **{"in_channel": 5, "out_channel": 2, "inner_channel": 4, "channel_mults": [1, 2], "attn_res": [16]},
    **{"num_head_channels": 4, "res_blocks": 1, "dropout": 0.2, "image_size": [6, 10]},
}


def run_config(**network: Any) -> str:
    """As the source writes it, with its comments."""
    args = {"module_name": "guided_diffusion", "unet": NETWORK | network, "beta_schedule": {"train": {}, "test": TEST}}
    found = {"name": 'a//b " c', "model": {"which_networks": [{"name": ["models.network", "Network"], "args": args}]}}
    return json.dumps(found, indent=1).replace('"model"', '// networks "and"\n "model"') + ' // the "end'


def state(seed: int = 1) -> dict[str, np.ndarray]:
    tensors = named.state_dict(palette, CONFIG, seed, use_new_attention_order=False)
    del tensors["noise_level.weight"]  # which the file's schedule, or a told one, has the effect of
    return tensors


def buffers(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Those that lie beside the network, in float32."""
    gammas = np.cumprod(1 - betas)
    before = np.append(1, gammas[:-1])
    found = {
        "gammas": gammas,
        "sqrt_recip_gammas": np.sqrt(1 / gammas),
        "sqrt_recipm1_gammas": np.sqrt(1 / gammas - 1),
        "posterior_log_variance_clipped": np.log(np.maximum(betas * (1 - before) / (1 - gammas), 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - gammas),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - gammas),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def file_of(tensors: dict[str, np.ndarray], betas: np.ndarray = TRAIN) -> dict[str, np.ndarray]:
    return {f"denoise_fn.{name}": value for name, value in tensors.items()} | buffers(betas)


def planned(betas: np.ndarray | None = TRAIN, config: dict[str, Any] | None = None, **given: str) -> palette.Plan:
    tensors = recognise(state() if betas is None else file_of(state(), betas), "file")[1].tensors
    return palette.plan(tensors, config, SETTINGS | given)


def test_a_run_is_converted_with_its_config_and_verified(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writing the run's files needs torch: pip install 'jddim[convert]'")
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)
    for seed, name in enumerate(("20_Network", "190_Network", "190_Network_ema"), 1):
        tensors = {key: torch.tensor(value) for key, value in file_of(state(seed)).items()}
        torch.save(tensors, folder / f"{name}.pth")
    assert any("--set image_size=SIDE --set num_head_channels=N" in line for line in describe(folder))
    (tmp_path / "run" / "config.json").write_text(run_config())
    metadata = convert(folder, tmp_path / "out", settings={"norm_groups": "2"})
    assert metadata.model == CONFIG
    assert metadata.schedule == ScheduleConfig("linear", 5, 1e-2, 0.6)
    assert metadata.sampler == SamplerConfig(num_steps=5, eta=1.0, rederive_eps=True, clean_known=True)
    provenance = metadata.provenance
    assert provenance["source"]["file"] == "190_Network_ema.pth"
    assert (provenance["weights"], provenance["step"], provenance["taken"]) == ("ema", None, "denoise_fn")
    assert provenance["config"][0]["file"] == "config.json"
    assert [fact.partition(" =")[0] for fact in provenance["assumed"]] == ["use_new_attention_order"]
    assert provenance["unchecked"] == ["norm_groups"]
    notes = "; ".join(provenance["notes"])
    assert "the file's gammas are another schedule's (T = 20, beta 1e-06 to 0.01)" in notes
    assert "3 channels in are an image's that the network is given beside x_t, before it" in notes
    assert "config: not read: dropout" in notes
    assert provenance["verification"]["output_error"] < 2e-5
    levels = load_params(tmp_path / "out", metadata)["time_proj.embedding"]
    np.testing.assert_array_equal(levels[:, 0], make_schedule(metadata.schedule).alphas_cumprod.astype(np.float32))
    raw = convert(folder, tmp_path / "raw", settings={"norm_groups": "2"}, weights="raw", verify=False)
    assert (raw.provenance["source"]["file"], raw.provenance["weights"]) == ("190_Network.pth", "raw")
    with pytest.raises(ConversionError, match="time_embedding is 'noise_level', there t is embedded"):
        export(tmp_path / "out", tmp_path / "pipeline", "diffusers")
    with pytest.raises(ConversionError, match="condition_first is True, there always False"):
        export(tmp_path / "out", tmp_path / "a.pt", "openai")


def test_without_a_config_the_schedule_is_the_files_and_that_is_said() -> None:
    plan = planned()
    assert plan.schedule == ScheduleConfig("linear", 20, 1e-6, 0.01)
    assert plan.sampler.num_steps == 20
    assert not [ask for ask in plan.asks if ask.partition("=")[0] in TEST]  # which the gammas tell
    assert "the schedule to sample by is that of the file's gammas (T = 20, beta 1e-06 to 0.01" in plan.assumed[-1]
    warm = np.append(np.linspace(1e-4, 0.1, 3), np.full(8, 0.1))  # the source's warmup and const have no name here
    found = make_schedule(planned(warm).schedule)
    np.testing.assert_allclose(found.alphas_cumprod, from_betas(warm).alphas_cumprod, rtol=1e-5)
    same = planned(linear_schedule(5, 1e-2, 0.6).betas, {**TEST})
    assert not [note for note in same.notes if "gammas" in note]
    cosine = planned(None, schedule="cosine", n_timestep="7")
    assert cosine.schedule == ScheduleConfig("cosine", 7)
    unused = planned(None, schedule="cosine", n_timestep="7", linear_end="0.1")
    assert unused.wording.schedule == {"schedule": "cosine", "n_timestep": "7"}
    assert "linear_end is not used: the schedule is cosine" in unused.notes
    with pytest.raises(UnsettledError, match="schedule of the schedule to sample by; nor n_timestep") as asked:
        planned(None)
    assert asked.value.asks == ("schedule=NAME", "n_timestep=N", "linear_start=BETA", "linear_end=BETA")
    with pytest.raises(UnsettledError, match="linear_end of the schedule to sample by; give the run's config") as asked:
        planned(n_timestep="5", schedule="quad", linear_start="0.1")
    assert asked.value.asks == ("linear_end=BETA",)
    together = "config, or leave schedule, n_timestep, linear_start, linear_end out together: the file's gammas"
    with pytest.raises(UnsettledError, match=together):
        planned(linear_end="0.1")
    with np.errstate(divide="ignore"), pytest.raises(ConversionError, match=r"betas must lie in \(0, 1\): 1 of 21"):
        planned(np.append(TRAIN, 1.0))  # the source's jsd ends so
    damaged = {"posterior_mean_coef1": TRAIN.reshape(4, 5), "sqrt_recipm1_gammas": TRAIN}
    with pytest.raises(ConversionError, match=r"no lists of T numbers: \(20,\), \(4, 5\)"):
        palette.plan(state() | damaged, None, SETTINGS)


def test_what_no_setting_mends_has_no_command(tmp_path: Path) -> None:
    for more, told in (({}, "convert it:"), ({"foreign": np.ones(3, np.float32)}, "  refused     ")):
        save_file(state() | more, tmp_path / "a.safetensors")
        lines = describe(tmp_path / "a.safetensors", settings=SETTINGS)
        (said,) = [line for line in lines if line.startswith(("convert it:", "  refused     "))]
        assert said.startswith(told)


def test_contradictions_are_in_one_report() -> None:
    with pytest.raises(ConversionError) as caught:
        planned(inner_channel="9", attn_res="1,2", out_channel="3", use_scale_shift_norm="false")
    for part in (
        "inner_channel is 9 by the settings, but 4 by the tensors",
        "attn_res is (1, 2) by the settings, but () by the tensors",
        "out_channel is 3 by the settings, but 2 by the tensors",
        "use_scale_shift_norm is False by the settings, but True by the tensors",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConversionError, match=r"schedule must be one of linear, quad, cosine.*unknown --set key 'T'"):
        planned(schedule="jsd", T="5")
    tensors = state() | {"input_blocks.0.0.weight": np.zeros((4, 2, 3, 3), np.float32)}
    with pytest.raises(ConversionError, match="has 2 channels in and 2 out; Palette's takes an image beside x_t"):
        palette.plan(tensors, None, SETTINGS)
    with pytest.raises(UnsettledError, match="the image size") as asked:
        palette.plan(recognise(file_of(state()), "file")[1].tensors, None, {"norm_groups": "2"})
    assert asked.value.asks == ("image_size=SIDE", "num_head_channels=N")


def test_damage_is_in_one_report_under_the_sources_names() -> None:
    tensors = state()
    del tensors["cond_embed.2.weight"]
    tensors["label_emb.weight"] = np.zeros((3, 16), np.float32)
    tensors["out.2.weight"][0, 0, 0, 0] = np.nan
    plan = palette.plan(tensors, TEST, SETTINGS)
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(plan.model)).items()}
    with pytest.raises(ConversionError) as caught:
        fill(tensors | plan.implied, expected, plan.rules, plan.ignored, palette.FAMILY.pointwise)
    for part in ("missing cond_embed.2.weight", "unexpected label_emb.weight", "out.2.weight holds NaN"):
        assert part in str(caught.value)


@pytest.mark.parametrize("preset", palette.FAMILY.presets)
def test_a_preset_settles_all_that_no_tensor_tells(preset: str) -> None:
    config = {name: str(value) for name, value in palette.FAMILY.presets[preset].items()}
    plan = palette.plan(state(), None, config | {"norm_groups": "2", "num_head_channels": "4"})
    assert (plan.assumed, plan.schedule) == ((), ScheduleConfig("linear", 1000, 1e-4, 0.09))
