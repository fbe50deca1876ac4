"""`jddim sweep`, `jddim interpolate`: their arrays are the library's, their pictures show them, mistakes are told."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from tiny import write_checkpoint

import jddim
from jddim import images
from jddim.cli.main import main
from jddim.ddim import add_noise
from jddim.editing import slerp, tail
from jddim.evaluate import metrics, mnist_cnn
from jddim.images import from_uint8, to_uint8
from jddim.sampling import initial_noise, sample_keys, sample_loop
from jddim.scale import atlas
from jddim.scale.sweeping import sweep

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("research") / "ckpt")


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_sweep_writes_the_arrays_and_draws_them(ckpt: Path, tmp_path: Path) -> None:
    options = ["--eta", "0,0.5,1", "--steps", "4,3", "--num", "2", "--seed", "5", "--spacing", "linspace", "--clip"]
    run("sweep", ckpt, tmp_path / "a.npz", *options)
    with np.load(tmp_path / "a.npz") as file:
        made = {name: file[name] for name in file.files}
    assert made["eta"].tolist() == [0, 0.5, 1]
    assert made["steps"].tolist() == [4, 3]
    ddim = jddim.load(ckpt).with_sampler(clip=True)
    for i, S in enumerate((4, 3)):
        expected = sweep(ddim, jax.random.key(5), 2, [0, 0.5, 1], steps=S, spacing="linspace")
        np.testing.assert_array_equal(made["x_0"][i], expected)

    options[3] = "4"
    run("sweep", ckpt, tmp_path / "a.png", *options, "--rows-at-once", "3")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    drawn = images.grid(made["x_0"][0].reshape(6, 6, 10, 1), columns=2)[..., 0]
    np.testing.assert_array_equal(picture[:, -drawn.shape[1] :], drawn)
    assert (picture[:, : -drawn.shape[1]] < 128).any()  # something is written in the margin
    settings = images.read_metadata(tmp_path / "a.png")
    assert (settings["eta"], settings["steps"], settings["seed"]) == ([0, 0.5, 1], [4], 5)
    assert settings["checkpoint_sha256"] == ddim.metadata.sha256


def test_an_atlas_of_digits(tmp_path: Path) -> None:
    small = {"channel_mults": (1,), "attention_levels": (), "image_size": (28, 28)}
    ckpt = write_checkpoint(tmp_path / "ckpt", **small)
    reference = np.random.default_rng(0).uniform(-1, 1, (20, 28, 28, 1)).astype(np.float32)
    np.save(tmp_path / "reference.npy", reference)
    options = ["--eta", "0,1", "--steps", "2,4", "--num", "5", "--show", "4", "--clip"]
    run("sweep", ckpt, tmp_path / "a.html", *options, "--reference", tmp_path / "reference.npy")
    page = (tmp_path / "a.html").read_text()
    made = [sweep(jddim.load(ckpt).with_sampler(clip=True), jax.random.key(0), 5, [0, 1], steps=S) for S in (2, 4)]
    real = metrics.Moments.of(mnist_cnn.features(reference))
    for S, column in zip((2, 4), made, strict=True):
        assert f"S {S}: {S} evaluations, " in page
        for x_0 in np.asarray(column):
            seen = mnist_cnn.features(from_uint8(to_uint8(x_0)))  # the bytes that evaluate would see
            distance = metrics.frechet_distance(metrics.Moments.of(seen), real)
            assert f"FD (mnist-cnn-v1) {distance:.3g}" in page
    assert float(re.search(r"evaluations, (\S+) s an image", page)[1]) > 0
    sources = re.findall(r'src="([^"]*)"', page)
    shown = [Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))) for s in sources]
    drawn = [images.grid(column[i][:4], columns=3, side=64)[..., 0] for i in (0, 1) for column in np.asarray(made[:1])]
    np.testing.assert_array_equal([np.asarray(picture) for picture in shown[::2]], drawn)  # rows eta, columns S
    assert len(shown) == 4
    assert not re.search(r"https?:|<script|<link", page)  # whole in itself


def test_an_atlas_as_a_picture() -> None:
    rng = np.random.default_rng(0)
    cells = rng.uniform(-1, 1, (3, 2, 5, 6, 10, 3)).astype(np.float32)
    columns = [atlas.Column(S, cells[i], 0.5, [1.0, 2.0]) for i, S in enumerate((10, 20, 50))]
    picture = atlas.picture(columns, [0.0, 1.0], "FD (x)", show=3)
    for column in cells:
        for images_ in column:
            sheet = images.grid(images_[:3], columns=3)
            height, width, _ = sheet.shape
            line, found = sheet[height // 2].tobytes(), 0
            for y in range(len(picture) - height + 1):
                x = picture[y + height // 2].tobytes().find(line) // 3
                found += x >= 0 and np.array_equal(picture[y : y + height, x : x + width], sheet)
            assert found == 1


def test_labels_stand_beside_their_rows() -> None:
    labelled = images.labelled(np.full((90, 20, 3), 7, np.uint8), ["", "row", ""])
    ink = np.flatnonzero((labelled[:, :-20] < 128).any(axis=(1, 2)))
    assert 30 <= ink.min() <= ink.max() < 60
    np.testing.assert_array_equal(labelled[:, -20:], 7)


def test_interpolate_between_two_and_four(ckpt: Path, tmp_path: Path) -> None:
    run("interpolate", ckpt, tmp_path / "a.npz", "--images", "3,8", "--num", "5", "--seed", "2", "--steps", "3")
    with np.load(tmp_path / "a.npz") as file:
        x_0, x_T = file["x_0"], file["x_T"]
    first, last = (initial_noise(sample_keys(jax.random.key(2), 1, i), (6, 10, 1))[0] for i in (3, 8))
    np.testing.assert_allclose(x_T[[0, -1]], [first, last], atol=5e-7)  # erfinv, compiled with more beside it or less
    chex.assert_trees_all_close(x_T[1], np.asarray(slerp(first, last, 0.25)), atol=1e-6)
    ddim = jddim.load(ckpt)
    np.testing.assert_array_equal(x_0, ddim.sample(x_T=x_T, steps=3, eta=0.0))

    run("interpolate", ckpt, tmp_path / "b.npz", "--images", "3,8,0,1", "--num", "3", "--seed", "2", "--steps", "3")
    with np.load(tmp_path / "b.npz") as file:
        corners = file["x_T"][[0, 2, 6, 8]]
    noises = [initial_noise(sample_keys(jax.random.key(2), 1, i), (6, 10, 1))[0] for i in (3, 8, 0, 1)]
    np.testing.assert_array_equal(corners, noises)


def test_labels(tmp_path: Path) -> None:
    conditional = write_checkpoint(tmp_path / "ckpt", class_embedding="learned", num_classes=3)
    ddim = jddim.load(conditional)
    run("sweep", conditional, tmp_path / "a.npz", "--eta", "0.5", "--num", "2", "--labels", "2,1", "--steps", "2")
    with np.load(tmp_path / "a.npz") as file:
        expected = sweep(ddim, jax.random.key(0), 2, [0.5], steps=2, labels=[2, 1])
        np.testing.assert_array_equal(file["x_0"][0], expected)
    run("interpolate", conditional, tmp_path / "b.npz", "--num", "3", "--labels", "1", "--steps", "2")
    with np.load(tmp_path / "b.npz") as file:
        np.testing.assert_array_equal(file["x_0"], ddim.sample(x_T=file["x_T"], labels=[1] * 3, steps=2, eta=0.0))


def test_guidance(tmp_path: Path) -> None:
    conditional = write_checkpoint(tmp_path / "ckpt", class_embedding="learned", num_classes=3)
    ddim, guided = jddim.load(conditional), {"guidance_scale": 1.5, "null_label": 2}
    options = ["--labels", "1", "--steps", "2", "--guidance-scale", "1.5", "--null-label", "2"]
    run("sweep", conditional, tmp_path / "a.npz", "--eta", "0.5", "--num", "2", *options)
    with np.load(tmp_path / "a.npz") as file:
        expected = sweep(ddim, jax.random.key(0), 2, [0.5], steps=2, labels=[1, 1], **guided)
        np.testing.assert_array_equal(file["x_0"][0], expected)
    run("interpolate", conditional, tmp_path / "b.npz", "--num", "2", *options)
    with np.load(tmp_path / "b.npz") as file:
        made = ddim.sample(x_T=file["x_T"], labels=[1, 1], steps=2, eta=0.0, **guided)
        np.testing.assert_array_equal(file["x_0"], made)
    known = np.random.default_rng(0).uniform(-1, 1, (2, 6, 10, 1)).astype(np.float32)
    np.save(tmp_path / "known.npy", known)
    run("edit", conditional, tmp_path / "known.npy", tmp_path / "c.npy", "--strength", "1", *options)
    noise = initial_noise(sample_keys(jax.random.key(0), 2), known.shape[1:])
    first = ddim.table(2)
    x_T = add_noise(known, noise, first.alpha_t[0], first.sigma_t[0])
    made = ddim.sample(x_T=x_T, labels=[1, 1], steps=2, eta=0.0, **guided)
    chex.assert_trees_all_close(np.load(tmp_path / "c.npy"), made, atol=1e-5)  # another program: rounding


@pytest.fixture
def given(tmp_path: Path) -> np.ndarray:
    known = np.random.default_rng(0).uniform(-1, 1, (3, 6, 10, 1)).astype(np.float32)
    np.save(tmp_path / "given.npy", known)
    return known


def test_edit_all_over(ckpt: Path, tmp_path: Path, given: np.ndarray) -> None:
    options = ["--steps", "5", "--eta", "0.5", "--seed", "3", "--clip"]
    run("edit", ckpt, tmp_path / "given.npy", tmp_path / "out.npy", "--strength", "0.6", *options)
    ddim = jddim.load(ckpt).with_sampler(clip=True)
    rest = tail(ddim.table(5), 0.6)
    keys = sample_keys(jax.random.key(3), 3)
    x_t = add_noise(given, initial_noise(keys, (6, 10, 1)), rest.alpha_t[0], rest.sigma_t[0])
    expected = sample_loop(ddim.denoiser(), x_t, rest, eta=0.5, key=keys, **ddim.conventions())
    chex.assert_trees_all_close(np.load(tmp_path / "out.npy"), np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize("resample", [1, 2])
def test_edit_keeps_what_is_black(ckpt: Path, tmp_path: Path, given: np.ndarray, resample: int) -> None:
    mask = np.zeros((6, 10), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--mask", tmp_path / "mask.png", "--steps", "3", "--resample", resample, "--eta", "1"]
    options += ["--jump-length", 2] if resample == 2 else []
    run("edit", ckpt, tmp_path / "given.npy", tmp_path / "out.npy", *options)
    made = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(made[:, :, :4], given[:, :, :4])
    assert np.abs(made[:, :, 4:] - given[:, :, 4:]).mean() > 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --strength"),
        (["--strength", "0.5", "--mask", "m.png"], "give either --strength"),
        (["--strength", "0.5", "--resample", "3"], "they go with --mask"),
        (["--strength", "1.5"], "strength must lie in (0, 1], got 1.5"),
        (["--strength", "0.5", "--eta", "-1"], "eta must be a finite number >= 0"),
        (["--mask", "none.png"], "none.png"),
        (["--mask", "WRONG"], "neither 6x10"),
    ],
)
def test_edits_mistakes(
    ckpt: Path, tmp_path: Path, given: np.ndarray, fails: Callable[..., str], options: list[str], said: str
) -> None:
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(tmp_path / "wrong.png")
    options = [str(tmp_path / "wrong.png") if option == "WRONG" else option for option in options]
    assert said in fails("edit", ckpt, tmp_path / "given.npy", tmp_path / "out.png", *options)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_interpolate_draws(ckpt: Path, tmp_path: Path, suffix: str) -> None:
    run("interpolate", ckpt, tmp_path / f"a.{suffix}", "--num", "4", "--steps", "2")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert picture.size == ((13 * 10, 13 * 6) if suffix == "gif" else (13 * 50, 13 * 10))
        assert getattr(picture, "n_frames", 1) == (4 if suffix == "gif" else 1)
        said = json.loads(picture.info["comment"]) if suffix == "gif" else images.settings_of(picture)
    assert [said[name] for name in ("images", "num_steps", "spacing", "clip")] == [[0, 1], 2, "uniform", False]


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["sweep", "CKPT", "OUT.gif"], "OUT.gif: end it in .png (exact), ", 1),
        (["sweep", "CKPT", "OUT.png", "--reference", "x.npy"], "--reference is for an atlas: OUT.html, or", 1),
        (["sweep", "CKPT", "OUT.html", "--reference", "x.npy"], "28x28x1, this checkpoint makes 6x10x1", 1),
        (["sweep", "CKPT", "OUT.html", "--show", "0"], "--show must be at least 1, got 0", 1),
        (["sweep", "CKPT", "OUT.png", "--eta", "0,x"], "takes numbers separated by commas, got '0,x'", 2),
        (["sweep", "CKPT", "OUT.png", "--eta", "0,-1"], "eta must be a finite number >= 0, got -1", 1),
        (["sweep", "CKPT", "OUT.png", "--steps", "5,0"], "must lie in 1..1000 (the training timesteps), got 0", 1),
        (["sweep", "CKPT", "OUT.png", "--num", "0"], "--num must be at least 1, got 0", 1),
        (["sweep", "CKPT", "OUT.png", "--rows-at-once", "0"], "rows_at_once must be at least 1", 1),
        (["sweep", "none", "OUT.png"], "none", 1),
        (["interpolate", "CKPT", "OUT.png", "--images", "3"], "--images takes two numbers, or four, got 1", 1),
        (
            ["interpolate", "CKPT", "OUT.png", "--seeds", "3,4", "--images", "0,1"],
            "either --images, of one seed, or --seeds",
            1,
        ),
        (["interpolate", "CKPT", "OUT.png", "--seeds", "3,4,5"], "--seeds takes two numbers, or four, got 3", 1),
        (["interpolate", "CKPT", "OUT.png", "--seeds", "3,-4"], "-4 is not in 0..4294967295", 2),
        (["interpolate", "CKPT", "OUT.png", "--images", "3,-1"], "numbered from 0, got -1", 1),
        (["interpolate", "CKPT", "OUT.png", "--num", "1"], "--num must be at least 2, both ends, got 1", 1),
        (["interpolate", "CKPT", "OUT.npy"], "OUT.npy: end it in .png (exact), ", 1),
    ],
)
def test_mistakes(
    ckpt: Path, tmp_path: Path, fails: Callable[..., str], words: list[str], said: str, status: int
) -> None:
    words = [str(ckpt) if w == "CKPT" else str(tmp_path / w) if w.startswith("OUT") else w for w in words]
    assert said in fails(*words, status=status)
