"""convert.families.openai: what the tensors tell, what the flags must, what is refused; there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import small_config

torch = pytest.importorskip("torch", reason="the OpenAI networks are built in torch: pip install 'jddim[convert]'")

from convert.conversion import convert, describe, verify  # noqa: E402
from convert.engine import ConversionError, UnsettledError  # noqa: E402
from convert.export import export  # noqa: E402
from convert.families import openai  # noqa: E402
from convert.families.openai import SETTINGS, infer, placed, plan, read_settings, write_openai  # noqa: E402
from convert.recognition import as_asked, recognise  # noqa: E402
from convert.reference.openai_unet import OpenAIUNet  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.checkpoint.folder import load_metadata  # noqa: E402
from jddim.checkpoint.metadata import Metadata  # noqa: E402
from jddim.cli.main import main  # noqa: E402
from jddim.config import SamplerConfig, ScheduleConfig  # noqa: E402
from jddim.models.building import abstract_model, flat_params  # noqa: E402
from jddim.schedule import make_schedule  # noqa: E402

pytestmark = pytest.mark.unoptimised

# 32 channels: the sources' group norms have 32 groups. Two heads, so that the order of q, k and v matters.
SMALL: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "model_channels": 32,
    "widths": (32, 64),
    "num_res_blocks": 1,
    "attention_levels": (1,),
    "heads": (2, 2),
    "heads_up": (2, 2),
}
ONE_LEVEL = {"widths": (32,), "attention_levels": (0,), "heads": (2,), "heads_up": (2,)}
FLAGS = {"image_size": "6x10", "num_heads": "2"}


def state_dict(seed: int = 1, **changes: Any) -> dict[str, Any]:
    model = OpenAIUNet(**(SMALL | changes))
    redraw_(model, seed)
    return dict(model.state_dict())


def shapes(**network: Any) -> dict[str, np.ndarray]:
    """A state dict of this network's names and shapes, which takes no memory."""
    with torch.device("meta"):
        state = OpenAIUNet(**network).state_dict()
    return {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in state.items()}


def small_shapes(**changes: Any) -> dict[str, np.ndarray]:
    return shapes(**(SMALL | changes))


def test_the_flags_that_the_sources_have() -> None:
    theirs = (
        "image_size num_channels num_res_blocks num_heads num_heads_upsample num_head_channels attention_resolutions "
        "channel_mult dropout class_cond use_checkpoint use_scale_shift_norm resblock_updown use_fp16 "
        "use_new_attention_order learn_sigma diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart "
        "rescale_timesteps rescale_learned_sigmas sigma_small"
    )
    assert set(theirs.split()) <= set(SETTINGS)


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "step"),
    [
        ("ema_0.9999_200000.pt", "ema", 200000),
        ("model000300.pt", "raw", 300),
        ("256x256_diffusion.pt", "unstated", None),
        ("cifar10_uncond_50M_500K.pt", "unstated", None),
    ],
)
def test_the_name_says_which_weights(name: str, weights: str, step: int | None) -> None:
    source = placed(recognise(small_shapes(), name)[1], Path(name), None)
    assert (source.weights, source.step) == (weights, step)
    other = "raw" if weights == "ema" else "ema"
    with pytest.raises(ConversionError, match=f"{name} has one set of weights"):
        as_asked(source, other, name)


def test_networks_of_other_kinds_are_refused_with_the_reason() -> None:
    small = small_shapes()
    half = {name: value for name, value in small.items() if not name.startswith("output_blocks.")}
    cross = {**small, "input_blocks.1.1.transformer_blocks.0.norm1.weight": np.ones(3, np.float32)}
    for tensors, reason in (
        (half, r"has the first half of OpenAI's UNet \(no output_blocks\) and no classifier's pooling"),
        (cross, "latent-diffusion"),
        ({**small, "step": 3}, r"not tensors: step \(int\)"),
    ):
        with pytest.raises(ConversionError, match=f"x.pt .*{reason}"):
            recognise(tensors, "x.pt")


def test_an_upsampler_is_told_by_its_channels() -> None:
    flags = {name: value for name, value in FLAGS.items() if name != "image_size"} | {"large_size": "16"}
    for told in (flags, flags | {"small_size": "4"}, flags | {"image_size": "16"}):
        model = plan(small_shapes(in_channels=6, out_channels=3), None, told).model
        assert (model.in_channels, model.condition_channels, model.input_channels, model.out_channels) == (3, 3, 6, 3)
        assert model.image_size == (16, 16)
    with pytest.raises(ConversionError, match="large_size is an upsampler's name of image_size, but the two differ"):
        plan(small_shapes(in_channels=6, out_channels=3), None, flags | {"image_size": "32"})
    with pytest.raises(ConversionError, match=r"small_size is of an upsampler, .* but 1 go in and 1 come out"):
        plan(small_shapes(), None, FLAGS | {"small_size": "4"})


def test_six_channels_on_both_sides_are_what_one_says() -> None:
    six = small_shapes(in_channels=6, out_channels=6)
    with pytest.raises(UnsettledError, match=r"an upsampler of 3 .* or a network of 6-channel images") as caught:
        plan(six, None, FLAGS)
    assert caught.value.asks[0] == "small_size=SIDE"
    learned = plan(six, None, FLAGS | {"small_size": "4"})
    assert (learned.model.in_channels, learned.model.condition_channels, learned.model.out_channels) == (3, 3, 6)
    assert learned.sampler.variance == "learned_range"
    model = plan(six, None, FLAGS | {"learn_sigma": "False"}).model
    assert (model.in_channels, model.out_channels) == (6, 6)
    with pytest.raises(ConversionError, match="learn_sigma is True by the flags, but False"):
        plan(six, None, FLAGS | {"learn_sigma": "True"})


def test_a_file_without_its_end_does_not_pass_for_a_smaller_network() -> None:
    for gone in ("output_blocks.3.", "input_blocks.3.", "time_embed."):
        tensors = {name: value for name, value in small_shapes().items() if not name.startswith(gone)}
        with pytest.raises(ConversionError, match="is the file whole"):
            infer(tensors)


def test_a_block_with_a_huge_number_costs_nothing() -> None:
    far = {f"{side}_blocks.999998.0.in_layers.0.bias": np.ones(32, np.float32) for side in ("input", "output")}
    with pytest.raises(ConversionError, match="is the file whole"):
        infer(small_shapes() | far)
    endless = {f"input_blocks.{'9' * 5000}.0.in_layers.0.bias": np.ones(32, np.float32)}
    assert infer(small_shapes() | endless) == infer(small_shapes())  # `fill` then reports it as unexpected


def test_one_missing_or_misshapen_tensor_is_not_another_network() -> None:
    small = small_shapes(num_classes=3)
    whole = infer(small)
    read_once = ("input_blocks.0.0.weight", "out.2.bias", "label_emb.weight")
    for name in small:
        if name not in read_once:
            assert infer({other: value for other, value in small.items() if other != name}) == whole, name
            assert infer({**small, name: np.ones((5, 7), np.float32)}) == whole, name


# -- the flags --------------------------------------------------------------------------------------------------------


def test_what_no_tensor_tells_is_asked_for_in_one_message() -> None:
    with pytest.raises(ConversionError) as caught:
        plan(small_shapes(), None, {"diffusion_steps": "4000"})
    for flag in ("--set image_size=", "--set num_heads=4", "--set num_head_channels=64", "--set rescale_timesteps="):
        assert flag in str(caught.value)
    with pytest.raises(ConversionError, match="--set image_size=64"):  # widths 1, 2, 3, 4 are that size's
        plan(small_shapes(widths=(32, 64, 96, 128), heads=(1,) * 4, heads_up=(1,) * 4), None, {})


def test_defaults_of_the_sources_are_listed_as_assumed() -> None:
    made = plan(small_shapes(), None, FLAGS)
    facts = [fact.partition(" (")[0] for fact in made.assumed]
    assert facts == [
        "diffusion_steps = 1000",
        "norm_groups = 32",
        "num_head_channels = -1",
        "num_heads_upsample = -1",
        "use_new_attention_order = False",
        "noise_schedule = linear",
        "predict_xstart = False",
        "sigma_small = False",
    ]
    assert (made.sampler.spacing, made.sampler.rederive_eps, made.sampler.clip) == ("openai_ddim", True, True)
    one_head = plan(small_shapes(heads=(1, 1), heads_up=(1, 1)), None, FLAGS | {"num_heads": "1"})
    assert not any("attention_order" in fact for fact in (*one_head.assumed, *one_head.asks))  # it makes no difference


def test_flags_that_a_default_stands_for_are_asked_for() -> None:
    asks = "num_head_channels num_heads_upsample use_new_attention_order diffusion_steps noise_schedule"
    asks += " rescale_timesteps predict_xstart"
    assert plan(small_shapes(), None, FLAGS).asks == tuple(f"{key}=VALUE" for key in asks.split())
    told = FLAGS | {"num_head_channels": "16", "diffusion_steps": "1000", "use_new_attention_order": "False"}
    assert plan(small_shapes(), None, told).asks == ("noise_schedule=VALUE", "predict_xstart=VALUE")
    with pytest.raises(UnsettledError) as caught:
        plan(small_shapes(), None, {"image_size": "6x10", "num_head_channels": "-1", "diffusion_steps": "1000"})
    assert caught.value.asks[:3] == ("num_heads=N", "num_heads_upsample=VALUE", "use_new_attention_order=VALUE")
    assert "rescale_timesteps=VALUE" not in caught.value.asks


def test_flags_that_contradict_the_tensors_are_all_named() -> None:
    told = {
        "num_channels": "64",
        "channel_mult": "1,2,2",
        "num_res_blocks": "3",
        "class_cond": "True",
        "learn_sigma": "yes",
        "use_scale_shift_norm": "False",
        "resblock_updown": "t",
        "attention_resolutions": "6",
    }
    with pytest.raises(ConversionError) as caught:
        plan(small_shapes(), None, FLAGS | told)
    message = str(caught.value)
    for part in (
        "num_channels is 64 by the flags, but 32 by the tensors",
        "channel_mult is 1,2,2 by the flags, but 1,2 by the tensors",
        "num_res_blocks is 3",
        "class_cond is True",
        "learn_sigma is True",
        "use_scale_shift_norm is False",
        "resblock_updown is True",
        "attention_resolutions is 6 at image size 6, but the tensors have attention at 3",
    ):
        assert part in message
    assert plan(small_shapes(), None, FLAGS | {"attention_resolutions": "3,1"}).model.attention_levels == (1,)


def test_flags_without_effect_on_sampling_are_taken_and_said() -> None:
    told = {"dropout": "0.3", "use_kl": "True", "use_fp16": "True", "use_checkpoint": "False"}
    made = plan(small_shapes(), None, FLAGS | told)
    assert len(made.notes) == 2
    assert "dropout, use_checkpoint, use_kl: of training only" in made.notes[0]
    assert "float16" in made.notes[1]


@pytest.mark.parametrize(
    ("respacing", "expected"), [("", ("openai_ddim", 50)), ("250", ("openai", 250)), ("ddim25", ("ddim25", 25))]
)
def test_respacing_becomes_the_default_timetable(respacing: str, expected: tuple[str, int]) -> None:
    sampler = plan(small_shapes(), None, FLAGS | {"timestep_respacing": respacing}).sampler
    assert (sampler.spacing, sampler.num_steps) == expected


def test_sections_say_their_own_number_of_steps() -> None:
    sampler = plan(small_shapes(), None, FLAGS | {"timestep_respacing": "10,15,20"}).sampler
    assert (sampler.spacing, sampler.num_steps) == ("10,15,20", 45)


# the last are numbers that Python does not turn into integers
@pytest.mark.parametrize("respacing", ["ddim60", "1001", "10,501", "0", "9" * 5000, f"ddim{'9' * 5000}"])
def test_a_respacing_that_the_source_refuses_is_refused_at_once(respacing: str) -> None:
    with pytest.raises(ConversionError, match="timestep_respacing: "):
        plan(small_shapes(), None, FLAGS | {"timestep_respacing": respacing})


@pytest.mark.parametrize("T", [1000, 4000, 300])
def test_the_schedules_are_the_sources(T: int) -> None:
    told = FLAGS | {"diffusion_steps": str(T), "rescale_timesteps": "True"}
    made = plan(small_shapes(), None, told)
    scale = 1000 / T
    np.testing.assert_array_equal(make_schedule(made.schedule).betas, np.linspace(scale * 1e-4, scale * 0.02, T))
    assert made.sampler.timestep_scale == 1000 / T
    cosine = make_schedule(plan(small_shapes(), None, told | {"noise_schedule": "cosine"}).schedule).betas

    def alpha_bar(t: float) -> float:
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    expected = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]
    np.testing.assert_allclose(cosine, expected, rtol=1e-9)  # two roundings of a difference of near-equal numbers


def test_what_cannot_be_read_is_named_with_what_can() -> None:
    told = {
        "num_head": "4",
        "class_cond": "maybe",
        "num_channels": "12.5",
        "diffusion_steps": "0",
        "noise_schedule": "sqrt",
        "channel_mult": "1,inf",
        "timestep_respacing": "ddim",
        "image_size": "6x",
        "num_head_channels": "-2",
        "dropout": "much",
    }
    with pytest.raises(ConversionError) as caught:
        read_settings(None, told)
    message = str(caught.value)
    assert "unknown --set key 'num_head' (did you mean 'num_heads'?)" in message
    assert "class_cond must be True or False, got 'maybe'" in message
    assert "noise_schedule must be linear or cosine, got 'sqrt'" in message
    assert all(f"{key} must be" in message for key in told if key not in ("num_head", "image_size"))


def test_a_config_file_of_flags_is_read_too() -> None:
    told = read_settings({"attention_resolutions": [16, 8], "class_cond": True, "lr": 1e-4}, {"class_cond": "False"})
    assert told == {"attention_resolutions": (16, 8), "class_cond": False}


def test_flags_in_sections_are_read_and_the_rest_is_said() -> None:
    """A YAML file as DDRM has for guided-diffusion's networks."""
    config = {
        "data": {"dataset": "ImageNet", "image_size": 6, "rescaled": True},
        "model": {"type": "openai", "image_size": 6, "num_heads": 2, "channel_mult": "", "attention_resolutions": "3"},
        "diffusion": {"beta_schedule": "linear", "num_diffusion_timesteps": 1000},
        "sampling": {"batch_size": 1, "diffusion_steps": 7},
    }
    made = plan(small_shapes(), config, {})
    assert made.model.image_size == (6, 6)
    assert made.notes[-1] == ("config: not read: data.dataset; data.rescaled; model.type; diffusion; sampling")
    config["data"]["image_size"] = 32
    with pytest.raises(ConversionError, match="config: image_size is 32 in one section and 6 in another"):
        plan(small_shapes(), config, {})


# -- from end to end --------------------------------------------------------------------------------------------------


def test_convert_verify_and_info(tmp_path: Path) -> None:
    file = tmp_path / "ema_0.9999_000300.pt"
    changes = {"num_classes": 5, "out_channels": 2, "new_order": True, **ONE_LEVEL}
    torch.save({name: value.half() for name, value in state_dict(**changes).items()}, file)
    flags = FLAGS | {"use_new_attention_order": "True", "diffusion_steps": "4000", "rescale_timesteps": "True"}

    lines = "\n".join(describe(file))
    assert lines.endswith(" DST --set image_size=SIDE --set num_heads=N")
    assert "rescale_timesteps, predict_xstart: no tensor tells these" in lines
    lines = "\n".join(describe(file, None, flags | {"dropout": "0.1"}))
    assert "note        dropout: of training only" in lines
    assert "weights     ema, step 300" in lines

    options = [part for key, value in flags.items() for part in ("--set", f"{key}={value}")]
    assert main(["convert", str(file), str(tmp_path / "out"), "--no-verify", *options]) == 0
    metadata = load_metadata(tmp_path / "out")
    assert metadata.provenance["reference_options"] == {"use_new_attention_order": True}
    assert metadata.provenance["set"] == flags
    assert metadata.model.num_classes == 5
    assert verify(tmp_path / "out", file).output_error < 2e-5  # of q, k and v mixed up: 1e-1


def test_what_is_told_and_the_file_cannot_check_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt"
    torch.save(state_dict(**ONE_LEVEL), file)
    flags = {"num_res_blocks": "1", **FLAGS, "dropout": "0.1", "timestep_respacing": "7"}
    said = "not checked by the file: image_size = 6x10, num_heads = 2"
    assert f"  told        {said}" in describe(file, None, flags)
    options = [part for key, value in flags.items() for part in ("--set", f"{key}={value}")]
    assert main(["convert", str(file), str(tmp_path / "out"), *options]) == 0
    assert f"\n  told, {said}\n" in capsys.readouterr().out
    assert load_metadata(tmp_path / "out").provenance["unchecked"] == ["image_size", "num_heads"]
    assert "- told, not checked by the file: `image_size=6x10, num_heads=2`" in (tmp_path / "out/README.md").read_text()
    assert main(["verify", str(tmp_path / "out"), str(file)]) == 0
    assert capsys.readouterr().out.endswith(f"\ntold, {said}\n")


def test_a_flag_that_another_overrides_is_not_among_them() -> None:
    flags = {"image_size": "6x10", "num_heads": "3", "num_head_channels": "16", "num_heads_upsample": "-1"}
    assert plan(small_shapes(), None, flags).unchecked == ("image_size", "num_head_channels")
    flags |= {"num_heads": "2", "num_head_channels": "-1"}
    assert plan(small_shapes(), None, flags).unchecked == ("image_size", "num_heads")


def test_the_wrong_attention_order_does_not_verify_as_another_networks(tmp_path: Path) -> None:
    # Both sides follow the flag, so only the flag can tell: it must reach the reference as well as the rules.
    tensors = {name: value.numpy() for name, value in state_dict(new_order=True).items()}
    new = plan(tensors, None, FLAGS | {"use_new_attention_order": "True"})
    legacy = plan(tensors, None, FLAGS)
    assert new.rules["middle_block.1.qkv"] != legacy.rules["middle_block.1.qkv"]
    x, t = torch.randn(2, 1, 6, 10), torch.tensor([3, 500])
    outputs = []
    for made in (new, legacy):
        module = openai.reference(made.model, **made.reference_options)
        module.load_state_dict(state_dict(new_order=True))
        outputs.append(module(x, t).detach())
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("new_order", [False, True])
def test_there_and_back_is_bit_identical(tmp_path: Path, new_order: bool) -> None:
    changes = {"resample": "resnet", "num_classes": 3} if new_order else ONE_LEVEL
    source = state_dict(new_order=new_order, **changes)
    torch.save(source, tmp_path / "model000007.pt")
    flags = FLAGS | {"use_new_attention_order": str(new_order)}
    first = convert(tmp_path / "model000007.pt", tmp_path / "first", settings=flags, verify=False)
    assert export(tmp_path / "first", tmp_path / "out.pt") == "openai"

    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(state) == list(source)
    assert all(torch.equal(state[name], value) for name, value in source.items())
    again = convert(tmp_path / "out.pt", tmp_path / "again", settings=flags, verify=False)
    assert again.params_sha256 == first.params_sha256
    assert (again.model, again.schedule, again.sampler) == (first.model, first.schedule, first.sampler)


def checkpoint(**fields: Any) -> Metadata:
    """The metadata of a checkpoint of the Ho et al. family; fields: of its config."""
    return Metadata(small_config(**fields), ScheduleConfig(), SamplerConfig(), {"family": "ho"})


def test_a_fitting_network_of_another_family_is_written_in_the_new_order(tmp_path: Path) -> None:
    fields = {"symmetric_padding": True, "norm_epsilon": 1e-5, "cosine_first": True, "frequency_shift": 0.0}
    metadata = checkpoint(**fields, norm_groups=32, channels=32, num_heads=2)
    rng = np.random.default_rng(0)
    params = {
        name: rng.standard_normal(leaf.shape, dtype=np.float32)
        for name, leaf in flat_params(abstract_model(metadata.model)).items()
    }
    write_openai(metadata, params, tmp_path / "out.pt")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    OpenAIUNet(**SMALL, new_order=True, scale_shift=False).load_state_dict(state, strict=True)
    query = params["mid.attention.q.kernel"]
    np.testing.assert_array_equal(state["middle_block.1.qkv.weight"].numpy()[:64, :, 0], query.T)


def test_what_the_sources_cannot_hold_is_refused_with_every_reason(tmp_path: Path) -> None:
    metadata = checkpoint(stem_channels=16, downsample=("resnet",), up_attention_levels=(0,), out_channels=3)
    metadata = dataclasses.replace(
        metadata,
        schedule=ScheduleConfig("scaled_linear"),
        sampler=SamplerConfig(prediction_type="v_prediction", timestep_scale=2.0, self_condition=True),
    )
    with pytest.raises(ConversionError) as caught:
        write_openai(metadata, {}, tmp_path / "out.pt")
    for reason in (
        "symmetric_padding is False, there always True",  # Ho et al.'s padding
        "norm_epsilon is 1e-06, there always 1e-05",
        "cosine_first is False, there always True",
        "frequency_shift is 1.0, there always 0.0",
        "norm_groups is 4, there always 32",
        "stem_channels is 16",
        "resampling is ('resnet',) and ('conv',)",
        "attention is at levels (1,) down and (0,) up",
        "out_channels is 3",
        "the schedule is scaled_linear (T = 1000), there linear from 0.0001 or cosine",
        "prediction_type is v_prediction",
        "self_condition is True",
        "timestep_scale is 2.0",
    ):
        assert reason in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


def test_presets_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state_dict(), tmp_path / "small.pt")
    for preset, message in (
        ("guided-265", "unknown preset 'guided-265' (did you mean 'guided-256"),
        ("guided-256", "num_channels is 256 by the flags, but 32 by the tensors"),
    ):
        assert main(["convert", str(tmp_path / "small.pt"), str(tmp_path / "out"), "--preset", preset]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- latent-diffusion's layout, in pixel space ------------------------------------------------------------------------

COMPVIS: dict[str, Any] = {
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"image_size": 8, "model_channels": 32, "attention_resolutions": [2], "num_heads": 2},
    },
    "timesteps": 30,
    "parameterization": "x0",
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
}


PLAIN = {"rescale_timesteps": "False"}


def test_a_run_of_latent_diffusions_is_converted_and_verified(tmp_path: Path) -> None:
    """In pixel space: the EMA without dots in its names, and the schedule from the betas beside it."""
    raw, ema = state_dict(1), state_dict(2)
    betas = torch.linspace(0.001**0.5, 0.2**0.5, 30, dtype=torch.float64).square().float()
    contents = {f"model.diffusion_model.{name}": value for name, value in raw.items()} | {"betas": betas}
    contents |= {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in ema.items()}
    torch.save({"state_dict": contents, "global_step": 3}, tmp_path / "last.ckpt")
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({"model": {"params": COMPVIS}}))
    metadata = convert(tmp_path / "last.ckpt", tmp_path / "out", config=tmp_path / "project.yaml")
    assert metadata.schedule == ScheduleConfig("scaled_linear", 30, 0.001, 0.2)
    assert metadata.sampler.prediction_type == "sample"
    assert (metadata.provenance["weights"], metadata.provenance["step"]) == ("ema", 3)
    assert metadata.provenance["ignored"] == {"betas": "no parameter; the noise schedule is taken from it"}
    assert metadata.model.image_size == (8, 8)
    assert not any("diffusion_steps" in fact or "noise_schedule" in fact for fact in metadata.provenance["assumed"])
    assert verify(tmp_path / "out", tmp_path / "last.ckpt", tmp_path / "project.yaml").first_bad is None


def test_betas_beside_the_weights_are_the_schedule() -> None:
    tensors = small_shapes()
    for config in (ScheduleConfig("linear", 50, 1e-3, 0.2), ScheduleConfig("cosine", 50)):
        betas = make_schedule(config).betas.astype(np.float32)
        for told in ({}, {"diffusion_steps": "50"}):
            assert plan({**tensors, "betas": betas}, None, FLAGS | PLAIN | told).schedule == config
    odd = np.array([0.1, 0.3, 0.2], np.float32)
    schedule = plan({**tensors, "betas": odd}, None, FLAGS | PLAIN).schedule
    assert (schedule.name, schedule.betas) == ("betas", tuple(odd.tolist()))
    for flag, why in (
        ({"diffusion_steps": "1000"}, "diffusion_steps is 1000 by the flags, but 50 by the betas in the file"),
        ({"noise_schedule": "linear"}, "noise_schedule is linear by the flags, but the betas in the file are others"),
    ):
        with pytest.raises(ConversionError, match=why):
            plan({**tensors, "betas": betas}, None, FLAGS | flag)
    for wrong in (np.ones((2, 2), np.float32), np.array(0.1, np.float32), np.arange(3)):
        with pytest.raises(ConversionError, match="the betas beside the weights are no list of T numbers"):
            plan({**tensors, "betas": wrong}, None, FLAGS)
    with pytest.raises(ConversionError, match="the noise schedule cannot be built"):
        plan({**tensors, "betas": np.array([0.1, 2, 0.3], np.float32)}, None, FLAGS | PLAIN)


def test_latent_diffusions_configs_have_other_names_for_flags() -> None:
    told = read_settings({"model": {"params": COMPVIS}}, {})
    assert told == {
        **{"image_size": (8, 8), "num_channels": 32, "num_heads": 2, "attention_resolutions": (4,)},
        **{"diffusion_steps": 30, "predict_xstart": True, "rescale_timesteps": False},
    }
    latent = COMPVIS | {"first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface"}}
    with pytest.raises(
        ConversionError, match=r"first stage \(ldm.*VQModelInterface\), so this is a network of latents"
    ):
        plan(small_shapes(), {"model": {"params": latent}}, FLAGS)
    with pytest.raises(ConversionError, match="read from the betas beside the weights; there are none"):
        plan(small_shapes(), {"model": {"params": COMPVIS}}, {})
    with pytest.raises(ConversionError, match="the config's parameterization must be eps or x0, got v"):
        read_settings({"model": {"params": COMPVIS | {"parameterization": "v"}}}, {})
    assert read_settings({"model": {"params": 3}}, {}) == {}
