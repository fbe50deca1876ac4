"""convert.export: what the sources' own loaders load, and the way back is to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny import SETTINGS, SMALL, state_dict, tree, write_checkpoint

torch = pytest.importorskip("torch", reason="writing PyTorch files needs torch: pip install 'jddim[convert]'")

import jddim.checkpoint.folder  # noqa: E402
from convert.conversion import convert  # noqa: E402
from convert.engine import ConversionError  # noqa: E402
from convert.export import export, formats  # noqa: E402
from convert.reference.unet import ReferenceUNet  # noqa: E402
from jddim.checkpoint.folder import load_metadata, load_params, save_checkpoint  # noqa: E402
from jddim.cli.main import main  # noqa: E402

pytestmark = pytest.mark.unoptimised


def converted(folder: Path, settings: dict[str, str], **changes: object) -> Path:
    """A jddim checkpoint from a pesser-like file of SMALL with `changes`."""
    torch.save(state_dict(**changes), folder / "source.ckpt")
    convert(folder / "source.ckpt", folder / "first", settings=settings, verify=False)
    return folder / "first"


CASES = {
    "plain": ({}, {}),
    "pooled, 3x3 shortcuts": ({"resamp_with_conv": False, "conv_shortcut": True}, {}),
    "another schedule and sampler": (
        {"attn_levels": (), "in_channels": 3, "out_ch": 3},
        {"beta_schedule": "quad", "beta_start": "0.003", "num_diffusion_timesteps": "300", "var_type": "fixedsmall"}
        | {"spacing": "linspace", "num_steps": "7", "eta": "0.5", "clip": "true", "norm_eps": "0.00002"},
    ),
    "const betas": (
        {},
        {"beta_schedule": "const", "beta_end": "0.01", "num_diffusion_timesteps": "7", "num_steps": "3"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_identical(tmp_path: Path, name: str) -> None:
    changes, told = CASES[name]
    first = converted(tmp_path, {**SETTINGS, "image_size": "10", **told}, **changes)
    assert export(first, tmp_path / "out") == "ermongroup"
    again = convert(tmp_path / "out", tmp_path / "again")
    metadata = jddim.checkpoint.folder.load_metadata(first)
    assert again.params_sha256 == metadata.params_sha256
    assert (again.model, again.schedule, again.sampler) == (metadata.model, metadata.schedule, metadata.sampler)
    assert again.provenance["assumed"] == []


@pytest.mark.parametrize("format", ["ermongroup", "pesser", "diffusers"])
def test_every_file_has_the_mode_that_the_system_gives(tmp_path: Path, format: str) -> None:
    first = converted(tmp_path, {**SETTINGS, "image_size": "10"})
    (tmp_path / "plain").touch()
    export(first, tmp_path / "out", format)
    files = [path for path in [tmp_path / "out", *(tmp_path / "out").rglob("*"), *first.rglob("*")] if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_the_source_loads_it(tmp_path: Path) -> None:
    first = converted(tmp_path, {**SETTINGS, "image_size": "10"})
    export(first, tmp_path / "out")
    states = torch.load(tmp_path / "out" / "ckpt.pth", weights_only=True)
    model = torch.nn.DataParallel(ReferenceUNet(**SMALL))
    model.load_state_dict(states[0], strict=True)  # the runner's own call
    assert (len(states), states[2], states[3]) == (5, 0, 0)
    expected = state_dict()
    assert set(states[4]) == set(expected)
    assert all(torch.equal(states[4][key], value) for key, value in expected.items())


def test_pessers_file_is_a_bare_state_dict(tmp_path: Path) -> None:
    first = converted(tmp_path, SETTINGS)
    export(first, tmp_path / "out.ckpt", "pesser")
    state = torch.load(tmp_path / "out.ckpt", weights_only=True)
    expected = state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        (
            {"num_heads": 2, "scale_shift": True, "symmetric_padding": True},
            ["num_heads is 2, there always 1", "scale_shift is True", "symmetric_padding is True"],
        ),
        ({"up_attention_levels": ()}, ["attention is at levels (0,) down and () up"]),
        ({"downsample": ("resnet",)}, ["resampling is ('resnet',) and ('conv',)"]),
        ({"channel_mults": (1, 1.5)}, ["channel_mults is (1, 1.5), there integers"]),
        ({}, ["image size is 6x10, there square"]),
    ],
)
def test_what_the_source_cannot_hold_is_refused_with_every_reason(
    tmp_path: Path, fields: dict[str, object], reasons: list[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "ckpt", **fields)
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match="cannot be written as ermongroup") as caught:
        export(checkpoint, tmp_path / "deep" / "out", "ermongroup")
    for reason in reasons:
        assert reason in str(caught.value)
    assert "(other formats: pesser, diffusers, " in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"timestep_scale": 2.5}, "the network is given t times 2.5, there t itself"),
        ({"variance": "learned_range"}, "variance is learned_range, there fixed_small or fixed_large"),
        ({"prediction_type": "v_prediction"}, "prediction_type is v_prediction, there epsilon"),
    ],
)
def test_what_ermongroups_sampler_does_not_do_is_refused(tmp_path: Path, said: dict[str, Any], reason: str) -> None:
    square = write_checkpoint(tmp_path / "ckpt", image_size=(8, 8), middle=True)
    metadata = load_metadata(square)
    other = dataclasses.replace(metadata, sampler=dataclasses.replace(metadata.sampler, **said))
    save_checkpoint(tmp_path / "other", load_params(square, metadata), other)
    export(square, tmp_path / "file", "ermongroup")
    with pytest.raises(ConversionError, match=reason):
        export(tmp_path / "other", tmp_path / "out", "ermongroup")
    assert not (tmp_path / "out").exists()


def test_wrong_use_gets_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for arguments, message in (
        ([str(tmp_path / "out"), "--format", "pessr"], "unknown format 'pessr' (did you mean 'pesser'?"),
        ([str(tmp_path / "file")], "exists; choose another name, or pass --overwrite"),
        ([str(checkpoint), "--overwrite"], "exists; it is a folder; choose another name"),
    ):
        assert main(["export-torch", str(checkpoint), *arguments]) == 1
        assert message in capsys.readouterr().err
        assert tree(tmp_path) == before


def test_formats_have_names() -> None:
    assert {"ermongroup", "pesser"} <= set(formats())
