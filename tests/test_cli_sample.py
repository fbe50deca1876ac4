"""`jddim sample`: each flag reaches `DDIM.sample`, the file says what was done, and mistakes write nothing."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tree, write_checkpoint

import jddim
from jddim import images
from jddim.cli.main import main
from jddim.run.request import SPACING_NAMES
from jddim.timesteps import SPACINGS

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with five classes."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "ckpt", class_embedding="learned", num_classes=5)


def sampled(ckpt: Path, folder: Path, *options: str) -> np.ndarray:
    words = ["sample", str(ckpt), str(folder / "out.npy"), "--num", "3", "--seed", "5", *options]
    assert main(words) == 0
    return np.load(folder / "out.npy")


@pytest.mark.parametrize(
    ("options", "conventions", "arguments"),
    [
        ("--labels 4,0,3 --eta 0.5", {}, {"labels": [4, 0, 3], "eta": 0.5}),
        ("--labels 2", {}, {"labels": [2, 2, 2]}),
        (
            "--labels 2 --guidance-scale 1.5 --null-label 4",
            {},
            {"labels": [2, 2, 2], "guidance_scale": 1.5, "null_label": 4},
        ),
        ("--labels 1:3 --method ddpm --variance fixed_large", {"variance": "fixed_large"}, {"labels": [1, 2, 1]}),
        (
            "--labels 1 --spacing leading --steps-offset 1 --no-set-alpha-to-one --clip --clip-range -0.5 0.7 "
            "--rederive-eps --prediction-type v_prediction --steps 3",
            {"spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip": True}
            | {"clip_range": (-0.5, 0.7), "rederive_eps": True, "prediction_type": "v_prediction"},
            {"labels": [1, 1, 1], "steps": 3},
        ),
        ("--labels 3 --method heun --steps 3", {}, {"labels": [3, 3, 3], "steps": 3, "method": "heun"}),
        ("--labels 1 --threshold 0.9 1.5", {"threshold_ratio": 0.9, "threshold_max": 1.5}, {"labels": [1, 1, 1]}),
    ],
)
def test_each_flag_is_the_argument_of_its_name(
    conditional: Path, tmp_path: Path, options: str, conventions: dict, arguments: dict
) -> None:
    given = sampled(conditional, tmp_path, *options.split())
    ddim = jddim.load(conditional).with_sampler(**conventions)
    arguments = {"method": "ddpm" if "ddpm" in options else "ddim", **arguments}
    expected = ddim.sample(jax.random.key(5), 3, **arguments)
    np.testing.assert_array_equal(given, np.asarray(expected))


def test_the_png_says_how_it_was_made(conditional: Path, tmp_path: Path) -> None:
    words = [
        "sample",
        str(conditional),
        str(tmp_path / "a.png"),
        "--num",
        "2",
        "--labels",
        "3",
        "--clip",
        "--eta",
        "0.3",
    ]
    assert main(words) == 0
    with Image.open(tmp_path / "a.png") as image:
        (text,) = [value for value in image.info.values() if isinstance(value, str) and value.startswith("{")]
    said = json.loads(text)
    expected = {"method": "ddim", "labels": "3", "clip": True, "eta": 0.3, "num_steps": 5, "spacing": "uniform"}
    assert {name: said[name] for name in expected} == expected


def test_a_spacing_that_makes_another_number_of_steps_says_so(
    conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled(conditional, tmp_path, "--labels", "3", "--spacing", "uniform", "--steps", "3")  # range(0, 1000, 333)
    assert "note: uniform spacing makes 4 steps of 3" in capsys.readouterr().out
    sampled(conditional, tmp_path, "--labels", "3", "--spacing", "uniform", "--steps", "4", "--overwrite")
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "class-conditional: give --labels, one for all or one an image, integers in 0..4"),
        ("--labels 5", "labels must lie in 0..4, got 5"),
        ("--labels 1,2", "--labels names 2 labels for 3 images"),
        (
            "--labels cat",
            "--labels are one number, several as in 207,388, a range as in 0:10, or balanced; got 'cat'; this",
        ),
        ("--labels 3:3", "--labels are one number"),
        ("--labels 3 --num -1", "--num must be at least 1, got -1"),
        ("--labels 1 --method ddpm --eta 1", "eta is DDIM's"),
        ("--labels 1 --threshold 2 1", "threshold_ratio must lie in (0, 1], got 2.0"),
        ("--labels 1 --clip --clip-range 1 -1", "low < high"),
        ("--labels 1 --spacing ddim60", "no integer stride makes 60"),
        ("--labels 1 --spacing trailing --steps 61", "num_steps = 61 rounds to 62 entries"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    words = ["sample", str(conditional), str(tmp_path / "out.npy"), "--num", "3", *options.split()]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert tree(tmp_path) == {}


def test_labels_of_a_model_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_checkpoint(tmp_path / "ckpt")
    assert main(["sample", str(plain), str(tmp_path / "out.npy"), "--num", "2", "--labels", "1"]) == 1
    assert "this network has no classes" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("steps", "said"), [("20", "(ddim20, eta "), ("60", "(60 sectioned, as no stride makes ddim60, eta ")]
)
def test_openais_spacing_is_said(
    conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: str, said: str
) -> None:
    options = ["--labels", "1", "--num", "1", "--spacing", "openai_ddim", "--steps", steps]
    assert main(["sample", str(conditional), str(tmp_path / "out.npy"), *options]) == 0
    assert said in capsys.readouterr().out


def test_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = capsys.readouterr().out
    assert [suffix for suffix in images.FORMATS if suffix not in said] == [".jpeg"]  # .jpg by its other name


def test_help_names_every_spacing() -> None:
    assert set(SPACINGS) <= set(SPACING_NAMES.replace(" or ", ", ").split(", "))


def test_quiet_prints_nothing_but_mistakes(
    conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(conditional), str(tmp_path / "out.png"), "--labels", "3", "--steps", "3", "--num", "2", "-q"]
    assert main(words) == 0
    assert capsys.readouterr() == ("", "")
    assert not {"quiet", "overwrite"} & images.read_metadata(tmp_path / "out.png").keys()
    before = (tmp_path / "out.png").read_bytes()
    assert main([*words, "--seed", "1"]) == 1
    assert "out.png exists; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.png").read_bytes() == before
    assert main([*words, "--overwrite", "--eta", "-1"]) == 1
    assert "--eta must be" in capsys.readouterr().err
    assert main([*words[:-1], "--overwrite", "--seed", "1"]) == 0
    assert (tmp_path / "out.png").read_bytes() != before
    told = capsys.readouterr()
    assert "2 images in 4 ddim steps" in told.out
    assert "compiling 4 steps" in told.err


def test_a_preview_is_drawn(conditional: Path, tmp_path: Path) -> None:
    given = sampled(conditional, tmp_path, "--labels", "1", "--steps", "8", "--preview", str(tmp_path / "now.webp"))
    with Image.open(tmp_path / "now.webp") as picture:
        drawn = np.asarray(picture)
    # the last step ends at the x0 that it predicts
    np.testing.assert_array_equal(drawn, images.grid(given).repeat(3, axis=-1))
