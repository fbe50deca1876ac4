"""`jddim invert`: each flag reaches `DDIM.invert`, sampling takes the file back, and mistakes write nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import SIZE, tree, write_checkpoint

import jddim
from jddim.cli.main import main
from jddim.images import load_images, read_metadata, save_images
from jddim.inversion import reconstruction_error

pytestmark = pytest.mark.unoptimised

X_0 = np.random.default_rng(4).uniform(-0.9, 0.9, (3, *SIZE, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with five classes."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "ckpt", class_embedding="learned", num_classes=5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", X_0)
    return tmp_path / "images.npy"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("--labels 4,0,3", {"labels": [4, 0, 3]}),
        ("--labels 1:3 --refine 2 --steps 4", {"labels": [1, 2, 1], "refine": 2, "steps": 4}),
        ("--labels 2 --convention paper --clip", {"labels": [2, 2, 2], "convention": "paper", "clip": True}),
        (
            "--labels 2 --convention openai --spacing linspace --guidance-scale 2.5 --null-label 4",
            {"labels": [2, 2, 2], "convention": "openai", "spacing": "linspace"}
            | {"guidance_scale": 2.5, "null_label": 4},
        ),
    ],
)
def test_each_flag_is_the_argument_of_its_name(
    conditional: Path, images: Path, tmp_path: Path, options: str, arguments: dict
) -> None:
    assert main(["invert", str(conditional), str(images), str(tmp_path / "x_T.npy"), *options.split()]) == 0
    expected = jddim.load(conditional).invert(X_0, **arguments)
    np.testing.assert_array_equal(np.load(tmp_path / "x_T.npy"), np.asarray(expected))
    plain = jddim.load(conditional).invert(X_0, labels=[0, 0, 0])
    assert jax.numpy.abs(expected - plain).max() > 1e-4


def test_the_way_back_is_samples_and_its_errors_are_printed(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    words = ["invert", str(ckpt), str(images), str(tmp_path / "x_T.npy"), "--refine", "1"]
    assert main([*words, "--reconstruct", str(tmp_path / "again.npy")]) == 0
    said = capsys.readouterr().out
    assert main(["sample", str(ckpt), str(tmp_path / "s.npy"), "--x-T", str(tmp_path / "x_T.npy"), "--eta", "0"]) == 0
    again = np.load(tmp_path / "again.npy")
    np.testing.assert_array_equal(again, np.load(tmp_path / "s.npy"))
    errors = np.asarray(reconstruction_error(X_0, again))
    printed = [float(number) for number in re.findall(r"^ +(?:\d+|mean)  (\S+)", said, re.M)]
    np.testing.assert_allclose(printed, [*errors, errors.mean()], rtol=1e-3)  # four digits are printed
    assert errors.max() > 1e-6
    capsys.readouterr()
    assert (
        main([*words, "--reconstruct", str(tmp_path / "again.npy"), "--batch-size", "auto", "--json", "--overwrite"])
        == 0
    )
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert main([*words, "--json", "--quiet", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3
    assert "batch size" in told.err  # progress, which is no part of the document
    np.testing.assert_allclose(found["errors"], errors, rtol=1e-5)
    assert (found["x_T"], found["images"]) == (str(tmp_path / "x_T.npy"), 3)


def test_pictures_are_read_and_the_reconstruction_says_how_it_was_made(tmp_path: Path) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    save_images(tmp_path / "grid.png", X_0, {})
    words = ["invert", str(ckpt), str(tmp_path / "grid.png"), str(tmp_path / "x_T.npy"), "--steps", "4", "--clip"]
    assert main([*words, "--reconstruct", str(tmp_path / "again.png")]) == 0
    expected = jddim.load(ckpt).invert(load_images(tmp_path / "grid.png", SIZE), steps=4, clip=True)
    np.testing.assert_array_equal(np.load(tmp_path / "x_T.npy"), np.asarray(expected))
    said = read_metadata(tmp_path / "again.png")
    wanted = {"inverted": "grid.png", "convention": "diffusers", "refine": 0, "num_steps": 4, "clip": True, "eta": 0.0}
    assert {name: said[name] for name in wanted} == wanted
    assert load_images(tmp_path / "again.png", SIZE).shape == X_0.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("x_T.npy", "class-conditional: give --labels, one for all or one an image, integers in 0..4"),
        ("x_T.npy --labels 5", "labels must lie in 0..4, got 5"),
        ("x_T.npy --labels 1,2", "--labels names 2 labels for 3 images"),
        ("x_T.npy --labels 1 --convention ddim", "unknown convention 'ddim'"),
        ("x_T.npy --labels 1 --refine -1", "refine must be at least 0"),
        ("x_T.png --labels 1", "end it in .npy (x_T, exactly)"),
        ("x_T.npy --labels 1 --reconstruct a.gif", "a.gif: end it in .png (exact), "),
        ("x_T.npy --labels 1 --reconstruct x_T.npy", "is OUT as well"),
        ("x_T.npy --labels 1 --reconstruct a.bmp", "a.bmp: end it in .png (exact), "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    conditional: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert main(["invert", str(conditional), str(images), *options.split()]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (X_0 * 127.5 + 127.5, "must lie in [-1, 1], got"),
        (X_0[..., 0], "must hold images (N, H, W, C), it holds an array of shape (3, 6, 10)"),
        (X_0.repeat(3, axis=-1), "images must have shape (3, 6, 10, 1), got (3, 6, 10, 3)"),
        (X_0.astype(np.float64), "images must be float32, got float64"),
    ],
)
def test_arrays_that_are_no_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], array: np.ndarray, message: str
) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    np.save(tmp_path / "images.npy", array)
    assert main(["invert", str(ckpt), str(tmp_path / "images.npy"), str(tmp_path / "x_T.npy")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x_T.npy").exists()
