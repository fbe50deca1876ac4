"""The emoji data: a picture a motif, variants on one side of the split, categories of one size, signs not mirrored."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "emoji_data.py"
    spec = importlib.util.spec_from_file_location("emoji_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rgba(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 4), np.uint8)


def write_package(folder: Path) -> None:
    """21 animals, of which two look alike and two are mirror images; 13 flags, of which two are; a few of others."""
    entries: list[dict] = []
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)

    def add(code: str, name: str, category: str, sub: str, pixels: np.ndarray | None = None, **more) -> None:
        entry = {"unified": code, "image": f"{code.lower()}.png", "short_name": name}
        entries.append(entry | {"category": category, "subcategory": sub, "has_img_google": True, **more})
        Image.fromarray(rgba(len(entries)) if pixels is None else pixels).save(pictures / entry["image"])

    for i in range(19):
        add(f"1F4{i:02}", f"animal-{i}", "Animals & Nature", "animal-bug", rgba(1000 + i))
    add("1F500", "double", "Animals & Nature", "animal-bug", rgba(1000))
    add("1F501", "turned", "Animals & Nature", "animal-bug", rgba(1001)[:, ::-1])
    for i in range(12):
        add(f"1F1E6-1F1{i:02}", f"flag-{i}", "Flags", "country-flag", rgba(2000 + i))
    add("1F1E7-1F100", "turned-flag", "Flags", "country-flag", rgba(2000)[:, ::-1])
    for code, name in (("1F468", "man"), ("1F469", "woman"), ("1F9D1", "person")):
        toned = {"1F3FB": {"unified": f"{code}-1F3FB", "image": f"{code.lower()}-1f3fb.png"}}
        add(f"{code}-200D-1F33E", f"{name}-farmer", "People & Body", "person-role", skin_variations=toned)
        Image.fromarray(rgba(3000)).save(pictures / toned["1F3FB"]["image"])
    add("1F44D", "thumbs-up", "People & Body", "hand-fingers-closed")
    add("1F947", "medal", "Activities", "award-medal")
    add("1F3C0", "ball", "Activities", "sport")
    add("1F3FB", "tone", "Component", "skin-tone")
    add("1F9FF", "elsewhere", "Objects", "other-object", has_img_google=False)
    (folder / "emoji.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def made(script, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("emoji")
    write_package(folder / "package")
    assert script.main([str(folder / "package"), str(folder / "data")]) == 0
    return {file.stem: dict(np.load(file)) for file in sorted((folder / "data").iterdir())}


def test_every_motif_once_averaged_on_white(made) -> None:
    assert list(made) == ["all", "held-out", "train"]
    everything = made["all"]
    assert everything["categories"].tolist() == sorted(
        ["Activities", "Animals & Nature", "Flags", "Hands & Body Parts", "People & Body"]
    )
    farmers = {"man-farmer", "woman-farmer", "person-farmer"}
    wanted = {f"animal-{i}" for i in range(19)} | {f"flag-{i}" for i in range(12)} | farmers
    wanted |= {"turned-flag", "thumbs-up", "medal", "ball"}
    assert sorted(everything["names"]) == sorted(wanted)
    assert everything["arr_0"].shape == (len(wanted), 32, 32, 3)
    (i,) = np.flatnonzero(everything["names"] == "animal-3")
    source = rgba(1003).astype(float)
    opacity = source[..., 3:] / 255
    on_white = source[..., :3] * opacity + 255 * (1 - opacity)
    average = on_white.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(everything["arr_0"][i], average, atol=1.5)  # rounded twice, by compositing and averaging
    assert everything["categories"][everything["arr_1"][i]] == "Animals & Nature"


def test_the_split_is_by_motif_and_a_tenth(made) -> None:
    held, train = made["held-out"]["names"].tolist(), set(made["train"]["names"])
    assert held == ["flag-9", "animal-9"]
    assert not train & set(held)
    assert train | set(held) == set(made["all"]["names"])


def test_categories_are_of_one_size_and_only_what_may_be_is_mirrored(made) -> None:
    train = made["train"]
    assert np.bincount(train["arr_1"]).tolist() == [2 * 18] * 5  # the largest: 18 animals, both ways round
    for category in range(5):
        pictures = [x.tobytes() for x in train["arr_0"][train["arr_1"] == category]]
        often = [pictures.count(x) for x in set(pictures)]
        assert max(often) - min(often) <= 1
    for name, both in (("animal-0", True), ("flag-0", False), ("thumbs-up", True), ("medal", False), ("ball", True)):
        found = train["arr_0"][train["names"] == name]
        distinct = {x.tobytes() for x in found}
        assert len(distinct) == 1 + both, name
        assert ({found[0].tobytes(), found[0][:, ::-1].tobytes()} == distinct) is both


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F468-200D-1F33E", "1F9D1-200D-1F33E"),  # man and person, farmers
        ("1F3C3", "1F3C3-200D-2640-FE0F-200D-27A1-FE0F"),  # running, and a woman facing right
        ("1F46A", "1F468-200D-1F469-200D-1F467-200D-1F466"),  # families
        ("1F48F", "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468"),
        ("1F91B", "1F91C"),  # left- and right-facing fist
    ],
)
def test_variants_have_one_root(script, one: str, other: str) -> None:
    assert script.root_of(one) == script.root_of(other)
    assert script.root_of(one) != script.root_of("2640-FE0F") == "2640"


def test_larger_pictures_and_what_is_not_there(script, made, tmp_path: Path, capsys) -> None:
    write_package(tmp_path / "package")
    assert script.main([str(tmp_path / "package"), str(tmp_path / "data"), "--size", "64"]) == 0
    assert np.load(tmp_path / "data" / "all.npz")["arr_0"].shape == (len(made["all"]["names"]), 64, 64, 3)
    capsys.readouterr()
    assert script.main([str(tmp_path / "nothing"), str(tmp_path / "data")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_configuration_is_for_the_data(made) -> None:
    unet = json.loads((ROOT / "scripts" / "emoji.json").read_text())["unet"]
    _, height, width, channels = made["train"]["arr_0"].shape
    assert (unet["sample_size"], unet["sample_size"], unet["in_channels"]) == (height, width, channels)
    assert made["train"]["arr_1"].max() < unet["num_class_embeds"] - 1  # the last is the null label
