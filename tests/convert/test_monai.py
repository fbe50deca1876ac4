"""convert.families.monai: both namings, what tensors and settings tell, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import named
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.conversion import convert
from convert.engine import ConversionError, UnsettledError, fill
from convert.families import monai
from convert.recognition import recognise
from jddim.checkpoint.folder import load_params
from jddim.config import ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

pytestmark = pytest.mark.unoptimised

CONFIG = UNetConfig(
    **{"image_size": (6, 10), "in_channels": 1, "out_channels": 1, "channels": 4, "channel_mults": (1, 2)},
    **{"num_res_blocks": 1, "attention_levels": (1,), "head_channels": 4, "norm_groups": 2},
    **{"symmetric_padding": True, "cosine_first": True, "frequency_shift": 0.0, "divide_last": True},
    **{"class_embedding": "learned", "num_classes": 3},
)
SETTINGS = {"image_size": "6x10", "num_head_channels": "4", "norm_num_groups": "2"}
NAMINGS = {
    "core": {"core": True, "combined": False},
    "combined": {"core": True, "combined": True},
    "Generative": {"core": False, "combined": False},
}


def state(naming: str = "core", config: UNetConfig = CONFIG) -> dict[str, np.ndarray]:
    return named.state_dict(monai, config, 1, **NAMINGS[naming])


def planned(tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None, **given: str) -> monai.Plan:
    return monai.plan(tensors, config, SETTINGS | given)


def filled(tensors: dict[str, np.ndarray], plan: monai.Plan) -> dict[str, np.ndarray]:
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(plan.model)).items()}
    return fill({**tensors, **plan.implied}, expected, plan.rules, plan.ignored, monai.FAMILY.pointwise)


@pytest.mark.parametrize(
    ("naming", "projected"), [("core", True), ("combined", False), ("Generative", False), ("Generative", True)]
)
def test_a_file_is_converted_and_verified(tmp_path: Path, naming: str, projected: bool) -> None:
    pytest.importorskip("torch", reason="verifying needs torch: pip install 'jddim[convert]'")
    tensors, settings = state(naming), dict(SETTINGS)
    if naming == "Generative":
        settings |= {"include_fc": "true"} if projected else {}
    elif not projected:
        tensors = {name: value for name, value in tensors.items() if "out_proj" not in name}
    save_file(tensors, tmp_path / "a.safetensors")
    metadata = convert(tmp_path / "a.safetensors", tmp_path / "out", settings=settings)
    assert metadata.provenance["family"] == "monai"
    assert metadata.provenance["verification"]["output_error"] < 2e-5
    assert metadata.model == CONFIG
    assert metadata.schedule == ScheduleConfig("linear", 1000, 1e-4, 0.02)
    assert (metadata.sampler.spacing, metadata.sampler.clip, metadata.sampler.rederive_eps) == ("leading", True, False)
    params = load_params(tmp_path / "out", metadata)
    name = "middle_block.attention." + ("proj_attn" if naming == "Generative" else "attn.out_proj") + ".weight"
    for leaf in ("mid.attention.out.kernel", "down.1.attentions.0.out.kernel", "up.1.attentions.1.out.kernel"):
        assert np.array_equal(params[leaf], np.eye(8)) != projected
    np.testing.assert_array_equal(params["mid.attention.out.kernel"], tensors[name].T if projected else np.eye(8))
    assumed = [fact for fact in metadata.provenance["assumed"] if "include_fc" in fact]
    assert bool(assumed) == (naming == "Generative" and not projected)
    unchecked = [*SETTINGS, *(["include_fc"] if naming == "Generative" and projected else [])]  # core's tensors tell it
    assert metadata.provenance["unchecked"] == unchecked


def test_settings_become_the_schedule_and_sampler() -> None:
    plan = planned(
        state(),
        {"diffusion": {"channels": [4, 8], "attention_levels": [False, True], "num_res_blocks": [1, 1]}, "lr": 1},
        **{"schedule": "scaled_linear_beta", "beta_end": "0.03", "num_train_timesteps": "300", "clip_sample_min": "0"},
        **{"prediction_type": "v_prediction", "set_alpha_to_one": "false", "variance_type": "fixed_large"},
        **{"steps_offset": "1", "include_fc": "true", "num_res_blocks": "1", "norm_eps": "1e-5"},
    )
    assert plan.model == dataclasses.replace(CONFIG, norm_epsilon=1e-5)
    assert plan.schedule == ScheduleConfig("scaled_linear", 300, 1e-4, 0.03)
    sampler = plan.sampler
    assert (sampler.clip_range, sampler.steps_offset, sampler.set_alpha_to_one) == ((0.0, 1.0), 1, False)
    assert (sampler.prediction_type, sampler.variance) == ("v_prediction", "fixed_large")
    assert plan.notes[0].startswith("the range of the images is not told")
    assert plan.notes[1:] == ("config: not read: lr",)
    assert planned(state(), schedule="cosine").schedule == ScheduleConfig("cosine", 1000)


@pytest.mark.parametrize(
    ("told", "heads"),
    [("4", (1, 4)), ("3,4", (1, 4)), ("0,8", (1, None)), ("0,2", (1, 2))],
)
def test_head_channels_count_where_there_is_attention(told: str, heads: tuple[int, int | None]) -> None:
    model = planned(state(), num_head_channels=told).model
    assert (model.num_heads, model.head_channels) == heads


def test_heads_of_several_widths_are_refused_unless_each_attention_has_one() -> None:
    config = dataclasses.replace(CONFIG, attention_levels=(0, 1))
    tensors = state(config=config)
    assert planned(tensors, num_head_channels="4,8").model.heads(8) == 1
    for told, why in (
        ("2,4", r"num_head_channels is \(2, 4\): .* heads of one width in all levels, or one head each"),
        ("4,3", "num_head_channels 3 does not divide the width 8"),
        ("0", "num_head_channels 0 does not divide the width 4.*; num_head_channels 0 does not divide the width 8"),
        ("4,4,4", "num_head_channels has 3 numbers, the network 2 levels"),
    ):
        with pytest.raises(ConversionError, match=why):
            planned(tensors, num_head_channels=told)


def test_resampling_blocks_and_no_classes_are_told_by_the_tensors() -> None:
    config = dataclasses.replace(
        CONFIG, class_embedding=None, num_classes=None, downsample=("resnet",), upsample=("resnet",), num_res_blocks=2
    )
    assert planned(state("Generative", config)).model == config


def test_what_the_tensors_do_not_tell_is_asked_for() -> None:
    with pytest.raises(UnsettledError) as asked:
        monai.plan(state(), None, {})
    required = ("image_size=SIDE", "num_head_channels=N", "norm_num_groups=N")
    assert asked.value.asks[:3] == required
    untold = ("norm_eps", "num_train_timesteps", "schedule", "beta_start", "beta_end", "prediction_type")
    assert asked.value.asks[3:] == tuple(f"{key}=VALUE" for key in untold)
    assert "do not divide the widths [4, 8]" in str(asked.value)


def test_contradictions_are_in_one_report() -> None:
    uneven = named.state_dict(monai, dataclasses.replace(CONFIG, num_res_blocks=2), 1, **NAMINGS["core"])
    second = ("down_blocks.0.resnets.1.", "up_blocks.1.resnets.2.")
    uneven = {name: value for name, value in uneven.items() if not name.startswith(second)}
    uneven["out.2.conv.bias"] = uneven["out.2.conv.bias"].repeat(2)
    uneven["out.2.conv.weight"] = uneven["out.2.conv.weight"].repeat(2, axis=0)
    with pytest.raises(ConversionError) as caught:
        planned(uneven, num_channels="4,9", include_fc="false", num_class_embeds="4", resblock_updown="true")
    for part in (
        "num_channels is (4, 9) by the settings, but (4, 8) by the tensors",
        "include_fc is False by the settings, but True by the tensors",
        "num_class_embeds is 4 by the settings, but 3 by the tensors",
        "resblock_updown is True by the settings, but False by the tensors",
        "the levels have (1, 2) residual blocks; jddim's network has as many on each",
        "the network has 1 channels in and 2 out",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConversionError, match="Generative's cosine schedule begins at alpha_bar 1"):
        planned(state("Generative"), schedule="cosine")
    with pytest.raises(ConversionError, match=r"clip_sample_min 1\.0 is not below 1\.0"):
        planned(state(), clip_sample_min="1")
    with pytest.raises(ConversionError, match=r"attention_levels must be true or false.*unknown --set key 'channel'"):
        planned(state(), {"attention_levels": [0, 1]}, channel="1")


def test_damage_is_in_one_report_under_the_sources_names() -> None:
    tensors = state("Generative")
    del tensors["conv_in.conv.weight"]
    del tensors["up_blocks.0.upsampler.conv.conv.bias"]
    tensors["middle_block.attention.to_q.weight"] = tensors["middle_block.attention.to_q.weight"][..., None, None]
    tensors["down_blocks.0.resnets.0.norm1.spade.weight"] = np.zeros(3, np.float32)  # SPADE's
    tensors["out.2.conv.bias"][0] = np.inf
    family, source, _ = recognise(tensors, "file")
    assert family.name == "monai"
    with pytest.raises(ConversionError) as caught:
        filled(dict(source.tensors), planned(dict(source.tensors)))
    for part in (
        "missing conv_in.conv.weight",
        "missing up_blocks.0.upsampler.conv.conv.bias",
        "middle_block.attention.to_q.weight has shape (8, 8, 1, 1), expected (8, 8)",
        "unexpected down_blocks.0.resnets.0.norm1.spade.weight",
        "out.2.conv.bias holds NaN or infinity",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConversionError, match="too few tensors"):
        monai.infer(tensors | {"down_blocks.777.x": np.zeros(1)})


def test_other_networks_of_monais_are_refused_for_what_they_are() -> None:
    tensors = state()
    volumes = {name: value[..., None] if value.ndim == 4 else value for name, value in tensors.items()}
    encoder = {name: value for name, value in tensors.items() if not name.startswith("up_blocks")}
    context = tensors | {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": np.zeros((8, 3))}
    for contents, why in (
        (volumes, "file is a 3-D network, by the kernels of its convolutions; jddim's are of 2-D images"),
        (encoder, "file is an encoder"),
        (context, "file has cross-attention to a context"),
        (tensors | {"controlnet_mid_block.conv.weight": np.zeros(3)}, "file is a ControlNet"),
        ({"conv_in.conv.weight": np.zeros(3)}, "file is a network of MONAI's, but no whole DiffusionModelUNet"),
    ):
        with pytest.raises(ConversionError, match=f"^{why}"):
            recognise(contents, "file")
