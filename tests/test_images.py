"""Image files: exact pixels, metadata, and nothing half-written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

import jddim
from jddim.images import (
    SHEETS,
    atomic,
    check_output,
    check_sheet,
    cut_grid,
    from_uint8,
    grid,
    load_images,
    read_metadata,
    save_images,
    save_picture,
    to_uint8,
)

pytestmark = pytest.mark.quick


def images(n: int = 5, c: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.2, 1.2, (n, 7, 11, c)).astype(np.float32)


def test_uint8_is_openais_truncation() -> None:
    values = np.array([-1.5, -1, -0.999, 0, 0.5, 0.999, 1, 1.5], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 0, 127, 191, 254, 255, 255]


@pytest.mark.parametrize("c", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(c: int) -> None:
    sheet = grid(images(5, c), columns=2, border=1, side=1)
    assert sheet.shape == (3 * 8 + 1, 2 * 12 + 1, c)
    for i, image in enumerate(to_uint8(images(5, c))):
        top, left = 1 + i // 2 * 8, 1 + i % 2 * 12
        np.testing.assert_array_equal(sheet[top : top + 7, left : left + 11], image)
    assert grid(images(9), side=1).shape[:2] == (3 * 9 + 2, 3 * 13 + 2)  # nine: three by three


@pytest.mark.parametrize(
    ("n", "size", "factor"),
    [
        (1, 7, 18),
        (2, 28, 5),
        (3, 32, 4),
        (1, 64, 2),
        (1, 85, 2),
        (1, 86, 1),
        (1, 256, 1),
        (961, 28, 4),
        (9999, 11, 2),
        (90000, 11, 1),
    ],
)
def test_small_images_are_drawn_at_a_size_one_can_see(n: int, size: int, factor: int) -> None:
    x = np.broadcast_to(
        np.random.default_rng(0).integers(0, 255, (1, size, size // 2 + 1, 3), np.uint8), (n, size, size // 2 + 1, 3)
    )
    plain = grid(x, side=1)
    np.testing.assert_array_equal(grid(x), plain.repeat(factor, 0).repeat(factor, 1))
    assert n < 900 or grid(x, columns=n).shape[1] == grid(x, columns=n, side=1).shape[1]  # long enough as it is
    if n == 1:
        np.testing.assert_array_equal(grid(x, border=0), x[0].repeat(factor, 0).repeat(factor, 1))


def test_to_pil_draws_a_grid_or_one_image() -> None:
    x = images(5)
    np.testing.assert_array_equal(np.asarray(jddim.to_pil(jnp.asarray(x), 5)), grid(x, 5))
    np.testing.assert_array_equal(np.asarray(jddim.to_pil(to_uint8(x))), grid(x))
    np.testing.assert_array_equal(np.asarray(jddim.to_pil(x[3], side=1)), to_uint8(x[3]))  # no border
    grey = jddim.to_pil(jnp.asarray(images(2, 1), jnp.bfloat16), side=22)
    assert (grey.mode, grey.size) == ("L", (2 * (2 * 13 + 2), 2 * (9 + 2)))
    noise = np.random.default_rng(0).normal(0, 3, (2, 7, 11, 1))
    np.testing.assert_array_equal(np.asarray(jddim.to_pil(noise)), grid(noise)[..., 0])  # clamped, float64


class Tensor:
    """As torch's, which this part of the suite runs without."""

    __module__ = "torch"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Tensor(), r"of a torch tensor x, \(n, c, h, w\), x\.detach\(\)"),
        (images()[..., :2], r"of 1 or 3 channels, got shape \(5, 7, 11, 2\): x\[\.\.\., None\] adds"),
        (images()[..., 0], r"got shape \(5, 7, 11\)"),
        (images()[0, ..., 0], r"got shape \(7, 11\)"),
        (images()[None], r"got shape \(1, 5, 7, 11, 3\)"),
        (images()[:0], r"got shape \(0, 7, 11, 3\)"),
        (images().transpose(0, 3, 1, 2).astype(int), r"shape \(5, 3, 7, 11\).*; images are floats .*, got int64"),
        (images() > 0, "or uint8 in 0..255, got bool"),
        ([images()[0], images()[1, 1:]], "what the list given holds has several shapes"),
        (None, "got object"),
        (np.where(np.arange(5)[:, None, None, None] < 2, np.nan, images()), "2 of 5 images hold a NaN or infinity"),
        (to_uint8(images()).astype(np.float32), r"got up to 255: x / 127\.5 - 1 makes them"),
    ],
)
def test_what_to_pil_does_not_draw(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jddim.to_pil(given)
    with pytest.raises(ValueError, match=message):
        jddim.show(given)


def test_to_pil_says_all_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"NaN.*; columns must .* got 0; side must be a whole number .* got 1\.5"):
        jddim.to_pil(images() * np.nan, 0, side=1.5)


def test_show_displays_in_a_notebook_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, displayed = types.SimpleNamespace(), []
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=displayed.append))
    picture = jddim.show(images(), columns=5, side=1)  # IPython in a terminal
    np.testing.assert_array_equal(np.asarray(picture), grid(images(), 5, side=1))
    shell.kernel = "a notebook's"
    assert jddim.show(images(), columns=5, side=1) is None
    assert displayed == [picture]
    monkeypatch.delitem(sys.modules, "IPython")
    assert jddim.show(images(), columns=5, side=1) == picture


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


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("suffix", SHEETS)
def test_each_picture_is_kept_as_is_said_of_its_format(tmp_path: Path, suffix: str, c: int) -> None:
    x, settings = images(5, c), {"seed": 3, "file": "Å.png"}
    path = tmp_path / f"a{suffix.upper()}"
    save_images(path, x, settings)
    assert read_metadata(path) == settings
    with Image.open(path) as picture:
        assert picture.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        off = np.abs(np.asarray(picture.convert("RGB")).astype(int) - grid(x))
    assert off.max() == 0 if suffix in (".png", ".webp") else 0 < off.mean() < 3  # JPEG's squares ring at their edges


def test_a_picture_that_its_format_cannot_hold(tmp_path: Path) -> None:
    for suffix, most in ((".webp", 16383), (".jpg", 65500), (".jpeg", 65500), (".gif", 65535)):
        check_sheet(tmp_path / f"a{suffix}", 1, (most - 4, 3))
        with pytest.raises(ValueError, match=f"of {most + 1}x7 pixels, where {suffix} holds {most} a side; take .png"):
            check_sheet(tmp_path / f"a{suffix}", 1, (most - 3, 3))
    check_sheet(tmp_path / "a.png", 99999, (28, 28), 1)
    check_sheet(tmp_path / "folder", 99999, (28, 28), 1)
    check_sheet(tmp_path / "a.webp", 0, (28, 28))  # refused as no images, elsewhere
    with pytest.raises(ValueError, match="16384x1 pixels"):
        save_picture(tmp_path / "a.webp", np.zeros((16384, 1, 1), np.uint8), {})
    with pytest.raises(ValueError, match=r"end it in \.png \(exact\), .*, \.webp \(lossless\)"):
        save_picture(tmp_path / "a.npz", np.zeros((2, 1, 1), np.uint8), {})
    with pytest.raises(ValueError, match="too long"):
        save_picture(tmp_path / "a.jpg", np.zeros((2, 1, 1), np.uint8), {"labels": "1," * 40000})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "a.webp", "folder"):
        with pytest.raises(TypeError, match="not JSON serializable"):
            save_images(tmp_path / name, images(), {"seed": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("a.bmp", 3, r"a\.bmp: end it in \.png \(exact\), .*, no suffix \(a folder of PNGs\), \.gif \(trajectory\)"),
        ("a.jpg", 4, "1 or 3 channels"),
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


@pytest.mark.parametrize("side", [1, 40, 128])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_a_grid_is_cut_into_the_images_it_was_drawn_of(n: int, c: int, side: int) -> None:
    cut = cut_grid(grid(images(n, c), side=side), (7, 11))
    assert cut is not None
    np.testing.assert_array_equal(cut, to_uint8(images(n, c)))
    alone = cut_grid(grid(images(1, c), border=0, side=side), (7, 11))
    np.testing.assert_array_equal(alone, to_uint8(images(1, c)))


@pytest.mark.parametrize("size", [22, 23, 28, 32, 37, 61])
def test_white_images_are_cut_as_they_were_drawn(size: int) -> None:
    """Where a smaller enlargement could fit, if its shape did."""
    x = np.full((7, size, size, 1), 255, np.uint8)
    x[:, size // 2, size // 3] = 0
    np.testing.assert_array_equal(cut_grid(grid(x), (size, size)), x)
    np.testing.assert_array_equal(cut_grid(grid(x[:1], border=0), (size, size)), x[:1])


def test_what_is_no_grid_is_not_cut() -> None:
    large = grid(images(5))
    assert cut_grid(large, (11, 7)) is None
    assert cut_grid(large[1:], (7, 11)) is None
    large[0, 0] = 254  # a pixel of a square
    assert cut_grid(large, (7, 11)) is None
    sheet = grid(images(5), side=1)
    assert cut_grid(sheet, (11, 7)) is None
    assert cut_grid(sheet[1:], (7, 11)) is None
    assert cut_grid(np.full((0, 0, 3), 255, np.uint8), (7, 11)) is None
    for row, column in ((0, 0), (9, 20), (-1, -1), (12, 13)):  # a mark on any border
        marked = sheet.copy()
        marked[row, column] = 254
        assert cut_grid(marked, (7, 11)) is None, (row, column)


@pytest.mark.parametrize("c", [1, 3])
def test_images_are_read_from_what_was_written(tmp_path: Path, c: int) -> None:
    x = images(5, c)
    for name in ("a.npy", "a.npz", "a.png", "folder"):
        save_images(tmp_path / name, x, {})
        read = load_images(tmp_path / name, (7, 11))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, x if name == "a.npy" else from_uint8(to_uint8(x)))
    one = load_images(tmp_path / "folder" / "000003.png", (7, 11))
    np.testing.assert_array_equal(one, from_uint8(to_uint8(x[3:4])))
    assert from_uint8([0, 255]).tolist() == [-1, 1]


def test_what_holds_no_images_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    Image.new("L", (11, 7)).save(tmp_path / "mixed" / "a.png")
    Image.new("L", (7, 11)).save(tmp_path / "mixed" / "b.png")
    Image.new("RGB", (11, 7)).save(tmp_path / "mixed" / "c.png")
    Image.new("RGBA", (11, 7)).save(tmp_path / "rgba.png")
    Image.new("I;16", (11, 7)).save(tmp_path / "deep.png")
    Image.new("L", (12, 7)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "a.jpg").touch()
    np.save(tmp_path / "number.npy", 3.0)
    np.savez(tmp_path / "other.npz", other=np.zeros(3))
    for name, message in (
        ("empty", "a folder without .png files"),
        ("mixed", r"7x11 and as many-coloured as the first; not so: b\.png, c\.png"),
        ("rgba.png", "transparent"),
        ("deep.png", "mode I;16"),
        ("wide.png", "7x12 is neither 7x11"),
        ("text.png", "is not a picture"),
        ("text.npy", "holds no images"),
        ("text.npz", "holds no images"),
        ("a.jpg", r"read from \.npy, \.npz, \.png or a folder"),
        ("number.npy", r"must hold images \(N, H, W, C\), it holds an array of shape \(\)"),
        ("other.npz", "it holds an archive without arr_0"),
        ("nothing.npy", "no such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            load_images(tmp_path / name, (7, 11))


def test_bytes_read_and_written_again_are_the_same() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)
    np.testing.assert_allclose(from_uint8(levels), levels / 127.5 - 1, atol=1.2e-7)  # a bit of float32
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_that_hides_nothing_is_dropped(tmp_path: Path, mode: str) -> None:
    picture = Image.new(mode, (5, 3), 200)
    picture.putalpha(255)
    picture.save(tmp_path / "opaque.png")
    images = load_images(tmp_path / "opaque.png", (3, 5))
    assert images.shape == (1, 3, 5, 3 if mode == "RGBA" else 1)
    picture.putalpha(254)
    picture.save(tmp_path / "hazy.png")
    with pytest.raises(ValueError, match="transparent in places"):
        load_images(tmp_path / "hazy.png", (3, 5))


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "a.npy"
    for name in (None, "staging"):
        with pytest.raises(OSError, match="No space") as caught, atomic(target) as staging:
            raise OSError(28, "No space left on device", *([] if name is None else [str(staging)]))
        assert caught.value.filename == str(target)
    assert not list(tmp_path.iterdir())


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of white pixels, 1 bit each, with these chunks before them."""
    rows = zlib.compress(b"".join([b"\0" + b"\xff" * -(-width // 8)] * min(height, 100)))
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\0\0\0\0"
    every = [(b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    parts = [len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in every]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def described(text: str) -> bytes:
    """A JPEG of another's, with this description."""
    exif, encoded = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.ImageDescription] = text
    Image.new("L", (7, 11)).save(encoded, "JPEG", exif=exif)
    return encoded.getvalue()


def told(text: bytes) -> tuple[bytes, bytes]:
    return b"tEXt", b"jddim\0" + text


@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(10_000, 9_000), "could be decompression bomb"),  # Pillow only warns of it
        (png(60_000, 60_000), "could be decompression bomb"),
        (png(7, 11)[:60], r"."),
        (png(7, 11)[:-30], r"."),
        (png(7, 11, (b"PLTE", b"ab")), r"."),
        (png(7, 11, (b"IHDR", b"")), r"."),
        (png(7, 11, (b"zTXt", b"jddim\0\0" + zlib.compress(bytes(10**8)))), r"too large|does not say"),
        (png(7, 11, told(b"[" * 90_000)), "deep in each other"),
        (png(7, 11, told(b"[1]")), "no JSON object"),
        (png(7, 11, told(b"{")), "Expecting"),
        (png(7, 11, told(b'{"seed": 1, "seed": 2}')), "occurs twice"),
        (png(7, 11), "does not say how it was made"),
        (described("OLYMPUS"), "Expecting value"),
        (described("[1]"), "no JSON object"),
        (described('{"seed": 1}')[:90], r"."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a picture"),
        (b"P5 9 9 255 ", "is not a picture"),
        (b"", "is not a picture"),
    ],
)
def test_pictures_that_are_none_of_ours(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "a.png")
    with contextlib.suppress(ValueError):
        load_images(tmp_path / "a.png", (11, 7))


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (read_metadata, lambda path: load_images(path, (7, 11))):
        with pytest.raises(OSError, match=r"a\.png"):
            read(tmp_path / "a.png")
