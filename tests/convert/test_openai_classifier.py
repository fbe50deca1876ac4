"""convert.families.openai_classifier: what the tensors tell of a classifier, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the classifiers are built in torch: pip install 'jddim[convert]'")

from convert.conversion import describe, verify  # noqa: E402
from convert.engine import ConversionError, UnsettledError  # noqa: E402
from convert.families.openai_classifier import FAMILY, plan  # noqa: E402
from convert.recognition import recognise  # noqa: E402
from convert.reference.openai_unet import OpenAIClassifier  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.checkpoint.folder import CheckpointError, load_classifier_metadata, load_metadata  # noqa: E402
from jddim.cli.main import main  # noqa: E402
from jddim.config import ClassifierConfig  # noqa: E402
from jddim.converting import convert, info  # noqa: E402

pytestmark = pytest.mark.unoptimised

# 32 channels: the source's group norms have 32 groups. 3x5 positions at the lower level.
SMALL: dict[str, Any] = {
    **{"classes": 5, "positions": 15, "in_channels": 3, "model_channels": 32, "widths": (32, 64)},
    **{"num_res_blocks": 2, "attention_levels": (1,), "heads": (1, 2), "resample": "resnet"},
}
SETTINGS = {"image_size": "6x10", "num_head_channels": "32"}


def shapes(**changes: Any) -> dict[str, np.ndarray]:
    """A state dict of this classifier's names and shapes, which takes no memory."""
    with torch.device("meta"):
        state = OpenAIClassifier(**(SMALL | changes)).state_dict()
    return {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in state.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "6x10_classifier.pt"
    model = OpenAIClassifier(**SMALL)
    redraw_(model, 1)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def converted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "classifier"
    convert(file, path, settings=SETTINGS)
    return path


# What create_classifier makes of the image size and of the README's --classifier_depth; the model card's millions.
PUBLISHED = {
    64: ((1, 2, 3, 4), 4, (1, 2, 3), 65.4),
    128: ((1, 1, 2, 3, 4), 2, (2, 3, 4), 42.6),
    256: ((1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 54.1),
    512: ((0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), 54.4),
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_the_tensors_tell_a_published_classifier_whole(side: int) -> None:
    mults, depth, attended, millions = PUBLISHED[side]
    widths = [int(128 * mult) for mult in mults]
    tensors = shapes(
        classes=1000,
        positions=(side >> (len(mults) - 1)) ** 2,
        model_channels=128,
        widths=widths,
        num_res_blocks=depth,
        attention_levels=attended,
        heads=[width // 64 for width in widths],
    )
    assert round(sum(value.size for value in tensors.values()) / 1e6, 1) == millions
    made = plan(tensors, None, {})
    assert made.model == ClassifierConfig((side, side), 1000, 3, 128, mults, depth, attended)
    assert (made.schedule, made.sampler) == (None, None)
    assert made.assumed == ("num_head_channels = 64 (fixed in the source)", "norm_groups = 32 (fixed in the source)")


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_shift": False, "resample": "conv"},
        {"resample": "pool", "positions": None},
        {"widths": (32,), "attention_levels": (), "heads": (1,), "positions": 60, "num_res_blocks": 3},
        {"widths": (16, 32, 32), "attention_levels": (0, 2), "heads": (2, 1, 1), "positions": None, "groups": 8},
    ],
)
def test_other_wirings(changes: dict[str, Any]) -> None:
    network = SMALL | changes
    told = SETTINGS | {"image_size": "8x12" if len(network["widths"]) > 2 else "6x10"}
    told |= {"norm_groups": "8", "num_head_channels": "8"} if "groups" in changes else {}
    model = plan(shapes(**changes), None, told).model
    assert isinstance(model, ClassifierConfig)
    assert model.encoder.widths == network["widths"]
    assert (model.num_res_blocks, model.attention_levels) == (network["num_res_blocks"], network["attention_levels"])
    assert model.resample == ("conv" if len(network["widths"]) == 1 else network["resample"])
    assert (model.scale_shift, model.pool) == (
        changes.get("scale_shift", True),
        "attention" if network["positions"] else "adaptive",
    )


def test_blocks_that_fall_into_levels_in_two_ways() -> None:
    """Six blocks of one width without attention: two levels of two, or three of one; resampling blocks look alike."""
    alike = {"widths": (32, 32), "attention_levels": (), "heads": (1, 1), "positions": None}
    with pytest.raises(UnsettledError, match=r"--set classifier_depth=1 or 2.*nor the image size") as caught:
        plan(shapes(**alike), None, {})
    assert caught.value.asks == ("classifier_depth=N", "image_size=SIDE")
    for depth in (1, 2):
        told = {"classifier_depth": str(depth), "image_size": "24", "num_head_channels": "32"}
        model = plan(shapes(**alike), None, told).model
        assert (model.num_res_blocks, len(model.channel_mults)) == (depth, 6 // (depth + 1))
    tensors = shapes(**(alike | {"positions": 16}))  # positions and image size tell it too
    assert plan(tensors, None, {"image_size": "8", "num_head_channels": "32"}).model.num_res_blocks == 2
    with pytest.raises(ConversionError, match=r"the blocks and positions do not add up .* with classifier_depth 3"):
        plan(tensors, None, {"classifier_depth": "3"})


def test_what_is_no_whole_classifier() -> None:
    tensors = shapes()
    with pytest.raises(ConversionError, match=r"x.pt has the first half .* no classifier's pooling in out"):
        recognise({name: value for name, value in tensors.items() if not name.startswith("out.")}, "x.pt")
    spatial = {name: value for name, value in tensors.items() if not name.startswith("out.")}
    spatial |= {"out.0.weight": np.ones((2048, 96)), "out.2.weight": np.ones((5, 2048))}
    with pytest.raises(ConversionError, match=r"pools every block's mean \(spatial, spatial_v2\)"):
        recognise(spatial, "x.pt")
    with pytest.raises(ConversionError, match=r"not tensors: step \(int\)"):
        recognise({**tensors, "step": 3}, "x.pt")
    without = {name: value for name, value in tensors.items() if not name.startswith("input_blocks.2.0")}
    for lacking in (without, {**tensors, "input_blocks.999999.0.in_layers.2.bias": np.ones(32)}):
        with pytest.raises(ConversionError, match="do not add up to half of OpenAI's UNet with image_size"):
            plan(lacking, None, SETTINGS)
    for start in ("time_embed", "input_blocks.0", "out.2.c_proj"):
        with pytest.raises(ConversionError, match="too few tensors of the classifier"):
            plan({n: value for n, value in tensors.items() if not n.startswith(start)}, None, SETTINGS)
    with pytest.raises(ConversionError, match="do not add up to half of OpenAI's UNet with image_size"):
        plan(tensors, None, SETTINGS | {"image_size": "8"})
    with pytest.raises(ConversionError, match=r"no valid classifier.*cannot be split into heads of head_channels=48"):
        plan(tensors, None, SETTINGS | {"num_head_channels": "48"})
    with pytest.raises(ConversionError, match=r"unknown --set key 'depth'.*; --set: norm_groups must be an integer"):
        plan(tensors, None, {"depth": "3", "norm_groups": "many"})


def test_conversion_says_what_it_is(file: Path, converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = "\n".join(describe(file, settings=SETTINGS))
    assert "OpenAI (a classifier of guided-diffusion)" in described
    assert "schedule" not in described
    assert "convert it:   jddim convert" in described
    metadata = load_classifier_metadata(converted)
    assert metadata.provenance["unchecked"] == ["num_head_channels"]
    assert metadata.provenance["verification"]["output_error"] <= 2e-5
    assert verify(converted, file).output_error <= 2e-5
    lines = "\n".join(info(converted))
    assert "network         a classifier: 6x10x3, ch 32, mult 1,2, 2 blocks a level, attention at 3x5" in lines
    assert "classes         5, labels 0 to 4" in lines
    assert "schedule" not in lines
    assert "--classifier CKPT --classifier-scale 1" in (converted / "README.md").read_text()
    for command in (["cite", converted], ["diff", converted, converted]):
        assert main([*map(str, command)]) == 0
    said = capsys.readouterr().out
    assert "2105.05233" in said
    assert said.endswith("equal\n")


def test_a_wrapped_one_has_the_bare_files_parameters(file: Path, converted: Path, tmp_path: Path) -> None:
    state = torch.load(file)
    wrapped = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "global_step": 7}
    torch.save({**wrapped, "ema": {name: value * 2 for name, value in state.items()}}, tmp_path / "last.ckpt")
    made = convert(tmp_path / "last.ckpt", tmp_path / "raw", settings=SETTINGS, weights="raw", verify=False)
    assert made.params_sha256 == load_classifier_metadata(converted).params_sha256
    averaged = convert(tmp_path / "last.ckpt", tmp_path / "ema", settings=SETTINGS, verify=False)
    assert averaged.provenance["weights"] == "ema"
    assert averaged.params_sha256 != made.params_sha256


def test_every_other_door_says_what_it_is_for(converted: Path, fails: Any, tmp_path: Path) -> None:
    out, images = tmp_path / "out.png", tmp_path / "images.npy"
    images.touch()
    for command in (
        ["sample", converted, out],
        ["bulk", converted, tmp_path / "set", "--num", 2],
        ["sweep", converted, out],
        ["edit", converted, images, out, "--strength", 1],
        ["interpolate", converted, out],
        ["invert", converted, images, tmp_path / "x.npy"],
        ["export", converted, tmp_path / "e.jddim"],
        ["schedule", converted],
        ["train", converted, tmp_path, tmp_path / "trained"],
    ):
        assert f"{converted} is a classifier, which is not sampled but guides: jddim sample CKPT OUT" in fails(*command)
    with pytest.raises(CheckpointError, match="is a classifier, which is not sampled but guides"):
        load_metadata(converted)
    told = f"{converted} is a classifier, which no format here holds: it is not written back to PyTorch"
    assert told in fails("export-torch", converted, tmp_path / "again.pt")


def test_what_a_config_says_beside_it_is_listed() -> None:
    made = plan(shapes(), {"image_size": [6, 10], "num_head_channels": 32, "microbatch": 3}, {})
    assert made.notes == ("config: not read: microbatch",)


def test_the_family_is_asked_before_the_unets() -> None:
    assert recognise(shapes(), "x.pt")[0] is FAMILY
