"""jddim.checkpoint.diff: every kind of thing compared, what is equal and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import write_checkpoint

from jddim.checkpoint.diff import Difference, diff, diff_mappings
from jddim.cli.main import main
from jddim.images import save_images

pytestmark = pytest.mark.quick


def test_equal_checkpoints_have_no_rows(tmp_path: Path) -> None:
    a, b = (write_checkpoint(tmp_path / name, seed=3) for name in "ab")
    assert diff(a, b) == []


def test_checkpoints_by_entry_and_block(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", norm_epsilon=1e-6)
    b = write_checkpoint(
        tmp_path / "b",
        norm_epsilon=1e-5,
        edit=lambda name, value: value * np.float32(1.5) if name == "conv_in.kernel" else value,
    )
    rows = {row.name: row for row in diff(a, b)}
    assert rows["model.norm_epsilon"] == Difference("model.norm_epsilon", "1e-06", "1e-05")
    weights = [name for name in rows if name.startswith("weights.")]
    assert weights == ["weights.conv_in"]
    # half of the largest weight, over the largest number of that block (its kernel or its bias)
    assert "differs by" in rows["weights.conv_in"].b
    assert set(rows) == {"model.norm_epsilon", "params_sha256", "weights.conv_in"}


def test_checkpoints_of_other_shapes(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", attention_levels=(0,))
    b = write_checkpoint(tmp_path / "b", attention_levels=())
    rows = {row.name: row for row in diff(a, b)}
    assert rows["model.attention_levels"][1:] == ("[0]", "[]")
    assert rows["weights.down.0.attentions.0.q"].b == "(absent)"


def test_samples(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 7, 1)).astype(np.float32)
    y = x.copy()
    y[2, 1, 4, 0] += 0.5
    for name, value in (("x", x), ("same", x), ("y", y), ("wide", x.astype(np.float64))):
        np.save(tmp_path / f"{name}.npy", value)
    assert diff(tmp_path / "x.npy", tmp_path / "same.npy") == []
    (row,) = diff(tmp_path / "x.npy", tmp_path / "y.npy")
    assert row.a == "4 of 5 equal"
    assert row.b.startswith("differ by 0.5, ")
    (row,) = diff(tmp_path / "x.npy", tmp_path / "wide.npy")
    assert row[1:] == ("float32 (5, 3, 7, 1)", "float64 (5, 3, 7, 1)")


def test_entries_that_are_no_arrays_of_numbers(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros(3), seed=seed, settings=json.dumps({"seed": seed}))
    rows = [("seed", "1", "2"), ("settings", '{"seed": 1}', '{"seed": 2}')]
    assert diff(tmp_path / "a.npz", tmp_path / "b.npz") == rows


def test_settings_in_pictures_and_json(tmp_path: Path) -> None:
    for name, eta in (("a", 0.0), ("b", 0.25)):
        for suffix in ("png", "jpg", "webp"):
            save_images(tmp_path / f"{name}.{suffix}", np.zeros((2, 3, 5, 1)), {"eta": eta, "seed": 7})
        (tmp_path / f"{name}.json").write_text(json.dumps({"sampler": {"eta": eta, "clip": True}, "only": name}))
    for suffix in ("png", "jpg", "webp"):
        assert diff(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}") == [("eta", "0.0", "0.25")]
    assert diff(tmp_path / "a.json", tmp_path / "b.json") == [("sampler.eta", "0.0", "0.25"), ("only", "a", "b")]


def test_pictures_by_their_pixels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 7, 1)).astype(np.float32)
    for name, images in (("a", x), ("b", x), ("c", -x), ("d", x[:1])):
        save_images(tmp_path / f"{name}.png", images, {"seed": 3})
    assert diff(tmp_path / "a.png", tmp_path / "b.png") == []
    save_images(tmp_path / "a.webp", x, {"seed": 3})
    assert diff(tmp_path / "a.png", tmp_path / "a.webp") == []
    (row,) = diff(tmp_path / "a.png", tmp_path / "c.png")
    assert (row.name, row.a) == ("pixels", "0 of 1 equal")
    (row,) = diff(tmp_path / "a.png", tmp_path / "d.png")
    assert row.a != row.b


def test_entries_of_one_side() -> None:
    assert diff_mappings({"x": 1}, {"y": None}) == [("x", "1", "(absent)"), ("y", "(absent)", "null")]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("x.npy", "s.json", "x.npy is a set of samples, .*s.json is a file of settings"),
        ("x.npy", "absent.npy", "no such file or folder"),
        ("x.txt", "x.npy", "compare checkpoint folders"),
        ("bad.npy", "x.npy", "holds no arrays"),
        ("bad.json", "s.json", "holds no settings"),
        ("list.json", "s.json", "expected a JSON object"),
        (".", "x.npy", "is a checkpoint, "),
        ("zip.npy", "x.npy", "holds no arrays"),
        ("photo.png", "s.json", "holds no settings"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, a: str, b: str, message: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "bad.npy").write_bytes(b"not numpy")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04, and no more")
    Image.new("L", (3, 5)).save(tmp_path / "photo.png", "JPEG")
    for name, text in (("s.json", "{}"), ("bad.json", "{"), ("list.json", "[]"), ("x.txt", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        diff(tmp_path / a, tmp_path / b)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    np.save(tmp_path / "b.npy", np.ones((2, 3)))
    paths = [str(tmp_path / name) for name in ("a.npy", "b.npy")]
    assert main(["diff", paths[0], paths[0]]) == 0
    assert capsys.readouterr().out == "equal\n"
    assert main(["diff", *paths]) == 1
    told = capsys.readouterr().out
    assert "0 of 2 equal" in told
    assert told.endswith("1 differ\n")
    assert main(["diff", *paths, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"a": paths[0], "b": paths[1], "differences": [row._asdict() for row in diff(*paths)]}
    assert main(["diff", paths[0], paths[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []
    assert main(["diff", paths[0], str(tmp_path / "c.npy")]) == 1
    assert "no such file" in capsys.readouterr().err
