"""Image files: exact pixels, metadata, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jddim.images import check_output, grid, read_metadata, save_images, to_uint8

pytestmark = pytest.mark.quick


def images(n: int = 5, c: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.2, 1.2, (n, 7, 11, c)).astype(np.float32)


def test_uint8_is_openais_truncation() -> None:
    values = np.array([-1.5, -1, -0.999, 0, 0.5, 0.999, 1, 1.5], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 0, 127, 191, 254, 255, 255]


@pytest.mark.parametrize("c", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(c: int) -> None:
    sheet = grid(images(5, c), columns=2, border=1)
    assert sheet.shape == (3 * 8 + 1, 2 * 12 + 1, c)
    for i, image in enumerate(to_uint8(images(5, c))):
        top, left = 1 + i // 2 * 8, 1 + i % 2 * 12
        np.testing.assert_array_equal(sheet[top : top + 7, left : left + 11], image)
    assert grid(images(9)).shape[:2] == (3 * 9 + 2, 3 * 13 + 2)  # nine: three by three


def test_every_format_holds_what_it_says(tmp_path: Path) -> None:
    x, settings = images(), {"seed": 3}
    for name in ("a.npy", "a.npz", "a.png", "a.gif", "folder"):
        save_images(tmp_path / name, x, settings, frames=[x, -x, x], start=7)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), x)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], to_uint8(x))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), grid(x))
    assert read_metadata(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
    pngs = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert pngs == [f"{7 + i:06d}.png" for i in range(5)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "folder" / "000009.png")), to_uint8(x[2]))
    assert read_metadata(tmp_path / "folder" / "000009.png") == {"seed": 3, "index": 9}
    assert len(list(tmp_path.iterdir())) == 5


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "folder"):
        with pytest.raises(TypeError, match="not JSON serializable"):
            save_images(tmp_path / name, images(), {"seed": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("a.jpg", 3, "unknown format '.jpg'"),
        ("a.png", 2, "1 or 3 channels"),
        ("full", 3, "not empty"),
        ("file", 3, "is a file"),
        ("file/a.png", 3, "not a writable folder"),
        ("dir.png", 3, "is a folder"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_sampling(
    tmp_path: Path, name: str, channels: int, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        check_output(tmp_path / name, channels)
