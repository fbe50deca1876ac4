"""convert.families.consistency: told from guided-diffusion's files, what only flags tell; there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import named
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import small_config

import jddim
from convert.conversion import convert, describe
from convert.engine import ConversionError, UnsettledError
from convert.export import export, formats
from convert.families import Plan, consistency, openai
from convert.recognition import recognise
from jddim.checkpoint.folder import load_params, save_checkpoint
from jddim.checkpoint.metadata import Metadata
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

pytestmark = pytest.mark.unoptimised

CONFIG = UNetConfig(
    **{"image_size": (6, 10), "channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_levels": (0,)},
    **{"num_heads": 2, "downsample": ("resnet",), "upsample": ("resnet",), "scale_shift": True},
    **{"class_embedding": "learned", "num_classes": 5},
    **openai._FIXED,
)
FLAGS = {"image_size": "6x10", "num_heads": "2"}


def state(seed: int = 1, config: UNetConfig = CONFIG) -> dict[str, np.ndarray]:
    return named.state_dict(consistency, config, seed)


def planned(**given: str) -> Plan:
    return consistency.plan(state(), None, FLAGS | given)


def test_the_mode_tells_the_sampling() -> None:
    edm = planned(training_mode="edm")
    assert (edm.model, edm.schedule) == (CONFIG, ScheduleConfig("edm", t_min=0.002, t_max=80.0))
    assert edm.sampler == SamplerConfig(
        spacing="karras", num_steps=40, rederive_eps=True, prediction_type="edm", timestep_scale=250.0
    )
    assert [ask.partition("=")[0] for ask in edm.asks] == [
        *("num_head_channels", "num_heads_upsample", "sigma_min", "sigma_max")
    ]
    assert edm.unchecked == (*FLAGS, "training_mode")
    for mode in ("consistency_distillation", "consistency_training"):
        plan = planned(training_mode=mode, sigma_max="7", clip_denoised="no")
        assert plan.sampler == dataclasses.replace(edm.sampler, num_steps=1, clip=False, boundary=True)
        assert plan.schedule == ScheduleConfig("edm", t_min=0.002, t_max=7.0)
        assert any("--method consistency" in note for note in plan.notes)


def test_without_the_mode_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnsettledError, match=r"--set training_mode=edm \(edm_ files\), consistency_dis") as caught:
        planned()
    assert caught.value.asks[0] == "training_mode=MODE"
    save_file(state(), tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors")[-1].endswith(
        "--set image_size=SIDE --set num_heads=N --set training_mode=MODE"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"training_mode": "progdist"}, "training_mode must be one of edm, consistency_distillation, consistency_tr"),
        ({"sigma_min": "0"}, "sigma_min must be a number above 0"),
        ({"sigma_min": "90"}, "the noise schedule cannot be built"),
        ({"learn_sigma": "True"}, "learn_sigma must be False"),
        ({"diffusion_steps": "1000"}, "unknown --set key 'diffusion_steps'"),
        (
            {"class_cond": "False", "num_channels": "64"},
            "num_channels is 64 .*class_cond is False by the flags, but True",
        ),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, str], told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        planned(**({"training_mode": "edm"} | given))


def test_a_variance_of_its_own_is_refused() -> None:
    twice = state(config=dataclasses.replace(CONFIG, out_channels=6))
    with pytest.raises(ConversionError, match="twice as many channels come out as go in, for a variance"):
        consistency.plan(twice, None, FLAGS | {"training_mode": "edm"})


def test_most_projections_tell_the_files_from_guided_diffusions() -> None:
    """In one attention alone it is damage, whichever of the two the file is."""
    flat = named.state_dict(openai, CONFIG, 1, use_new_attention_order=True)
    square = state()
    assert (recognise(flat, "a").family.name, recognise(square, "a").family.name) == ("openai", "consistency")
    name = "middle_block.1.qkv.weight"
    assert recognise(flat | {name: square[name]}, "a").family.name == "openai"
    assert recognise(square | {name: flat[name]}, "a").family.name == "consistency"


def test_a_file_is_converted_verified_sampled_and_written_back(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="verification is PyTorch's: pip install 'jddim[convert]'")
    save_file(state(), tmp_path / "a.safetensors")
    given = FLAGS | {"training_mode": "consistency_training", "weight_schedule": "uniform", "use_fp16": "True"}
    metadata = convert(tmp_path / "a.safetensors", tmp_path / "ckpt", settings=given)
    assert isinstance(metadata, Metadata)
    verification = metadata.provenance["verification"]
    assert verification["output_error"] <= 2e-5
    np.testing.assert_allclose(verification["t"], 250 * np.log([0.002, 40.001, 80]), rtol=1e-6)
    assert any("weight_schedule: without effect" in note for note in metadata.provenance["notes"])
    ddim = jddim.load(tmp_path / "ckpt")
    assert ddim.sample(3, 2, labels=4).shape == (2, 6, 10, 3)
    listed = ddim.sample(3, 2, labels=4, method="consistency", spacing=[80.0, 0.66])
    assert (listed == ddim.sample(3, 2, labels=4, method="consistency", spacing="80,0.66")).all()
    with pytest.raises(ValueError, match="an explicit list of 2 timesteps does not take num_steps=3"):
        ddim.sample(3, 2, labels=4, method="consistency", spacing="80,0.66", steps=3)
    with pytest.raises(
        ValueError, match=r"timesteps must strictly descend within 0\.002\.\.80, above 0, got 0\.66, 80"
    ):
        ddim.sample(3, 2, labels=4, spacing="0.66,80")
    with pytest.raises(ValueError, match=r"is not of continuous schedules .*T,T,..."):
        ddim.sample(3, 2, labels=4, spacing="80,x")
    assert export(tmp_path / "ckpt", tmp_path / "b.pt") == "consistency"
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in back.items()} == {n: v.shape for n, v in state().items()}
    again = convert(tmp_path / "b.pt", tmp_path / "again", settings=given, verify=False)
    own, other = load_params(tmp_path / "ckpt", metadata), load_params(tmp_path / "again", again)
    assert own.keys() == other.keys()
    assert all(np.array_equal(value, other[name]) for name, value in own.items())


def test_no_other_format_holds_such_a_sampler(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="formats are PyTorch's: pip install 'jddim[convert]'")
    plan = planned(training_mode="edm")
    for name, model in (("theirs", CONFIG), ("ho", small_config())):
        params = {leaf: np.zeros(value.shape, np.float32) for leaf, value in flat_params(abstract_model(model)).items()}
        save_checkpoint(tmp_path / name, params, Metadata(model, plan.schedule, plan.sampler, {}))
        for format in formats():
            if (name, format) in (("theirs", "consistency"), ("ho", "pesser")):
                continue
            with pytest.raises(ConversionError, match=f"cannot be written as {format}: "):
                export(tmp_path / name, tmp_path / "out", format)
