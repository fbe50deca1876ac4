"""Images: [-1, 1] <-> uint8, grids, and files whose suffix chooses the format. NumPy and Pillow only."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from jddim.files import atomic, beside, check_free, open_regular, parse_json, read_arrays, write_array

SHEETS = {".png": "exact", ".jpg": "quality 95", ".jpeg": "quality 95", ".webp": "lossless"}
"""Suffixes of a picture, such as a grid, and how its pixels are kept."""

STILLS = {**SHEETS, ".npz": "uint8", ".npy": "float32", "": "a folder of PNGs"}

FORMATS = {**STILLS, ".gif": "trajectory"}
"""What `save_images` writes."""

_LONGEST = {".gif": 65535, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}  # pixels a side


def to_uint8(images: ArrayLike) -> NDArray[np.uint8]:
    """[-1, 1] -> 0..255: (x + 1) * 127.5, clamped and truncated, as OpenAI's samplers write for FID evaluators."""
    levels: NDArray[np.float32] = np.clip((np.asarray(images, np.float32) + 1) * 127.5, 0, 255)
    return levels.astype(np.uint8)


SEEN = 128
"""About how many pixels a picture gives to an image that has fewer."""


def grid(images: ArrayLike, columns: int | None = None, border: int = 2, side: int = SEEN) -> NDArray[np.uint8]:
    """`(n, h, w, c)` in [-1, 1], or uint8, c 1 or 3 -> one uint8 picture `(H, W, c)`, by row, as square as n allows.

    side: each pixel, the border's too, becomes a square of the whole number of pixels that brings an image's longer
    side nearest to `side`, of fewer where the picture would pass 8 million pixels or 16,000 a side. 1: it stays one.
    """
    pixels = np.asarray(images)
    pixels = pixels if pixels.dtype == np.uint8 else to_uint8(pixels)
    n, h, w, c = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    H, W = _extent(n, (h, w), columns, border)
    sheet = np.full((H, W, c), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (border + (i // columns) * (h + border), border + (i % columns) * (w + border))
        sheet[top : top + h, left : left + w] = image
    return _enlarged(sheet, max(1, min(round(side / max(h, w)), math.isqrt(2**23 // (H * W)), 16000 // max(H, W))))


def _extent(n: int, size: tuple[int, int], columns: int, border: int) -> tuple[int, int]:
    return math.ceil(n / columns) * (size[0] + border) + border, columns * (size[1] + border) + border


def _enlarged(picture: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def to_pil(images: ArrayLike, columns: int | None = None, *, side: int = SEEN) -> Image.Image:
    """One picture of jax or NumPy images `(n, h, w, c)`, by row, or of one image `(h, w, c)`; c 1 or 3.

    images: floats in [-1, 1], clamped to that, or uint8 in 0..255. columns: as square as n allows by default.
    side: small images are enlarged by the whole factor that brings their longer side nearest to it, so that each pixel
    becomes a square (of less where the picture would pass 8 million pixels); 1: they are not. None is shrunk.
    Raises ValueError, with everything wrong in one message, for other shapes and dtypes, floats in 0..255, NaN or
    infinity, and for torch tensors.
    """
    if type(images).__module__.partition(".")[0] == "torch":
        way = "x.detach().cpu().float().movedim(-3, -1).numpy()"
        raise ValueError(f"images are jax or NumPy arrays; of a torch tensor x, (n, c, h, w), {way} makes one")
    try:
        pixels = np.asarray(images)
    except ValueError as error:
        raise ValueError(
            f"images are one array (n, h, w, c); what the {type(images).__name__} given holds has several shapes"
        ) from error
    problems, many = [], pixels if pixels.ndim == 4 else pixels[None]
    if many.ndim != 4 or many.size == 0 or many.shape[3] not in (1, 3):
        problems.append(
            f"images are (n, h, w, c), or one (h, w, c), of 1 or 3 channels, got shape {pixels.shape}: x[..., None] "
            "adds a last axis of one channel, np.moveaxis(x, -3, -1) moves the channels there"
        )
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f" and pixels.dtype.name != "bfloat16":
        problems.append(f"images are floats in [-1, 1], or uint8 in 0..255, got {pixels.dtype}")
    elif not (finite := np.isfinite(many)).all():
        bad = int((~finite).reshape(len(many), -1).any(axis=1).sum())
        problems.append(f"{bad} of {len(many)} images hold a NaN or infinity")
    elif pixels.dtype != np.uint8 and pixels.size and pixels.min() >= 0 and pixels.max() > 2:
        problems.append(f"images are floats in [-1, 1], got up to {pixels.max():g}: x / 127.5 - 1 makes them of 0..255")
    for name, number in (("columns", columns), ("side", side)):
        if number is not None and (not isinstance(number, int | np.integer) or number < 1):
            problems.append(f"{name} must be a whole number of at least 1, got {number!r}")
    if problems:
        raise ValueError("; ".join(problems))
    return _to_pillow(grid(many, columns, border=2 if pixels.ndim == 4 else 0, side=side))


def show(images: ArrayLike, columns: int | None = None, *, side: int = SEEN) -> Image.Image | None:
    """Display `to_pil(images, columns, side=side)` if this is a notebook, and return None; elsewhere return it.

    In a notebook the picture stands under the cell wherever the call stands in it, and once; `to_pil` displays nothing.
    Elsewhere no window opens: the picture's own `.show()` and `.save(...)` are for that.
    """
    picture = to_pil(images, columns, side=side)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):  # IPython in a terminal has none
        return picture
    sys.modules["IPython.display"].display(picture)
    return None


def labelled(picture: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.uint8]:
    """`picture` with a margin to its left, in which `labels` stand from top to bottom, one for each of as many rows."""
    height, _, channels = picture.shape
    size = min(max(height // len(labels) // 3, 10), 24)
    font = ImageFont.load_default(size)
    width = math.ceil(max(font.getlength(label) for label in labels)) + size
    margin = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(margin)
    for i, label in enumerate(labels):
        middle = (i + 0.5) * height / len(labels)
        draw.text((width - size / 2, middle), label, fill=0, font=font, anchor="rm")
    beside = np.repeat(np.asarray(margin)[..., None], channels, axis=2)
    return np.concatenate([beside, picture], axis=1)


def _all_levels() -> NDArray[np.float32]:
    levels = (np.arange(256) / 127.5 - 1).astype(np.float32)
    # Rounding puts 63 of them below what `to_uint8` cuts at: read and written again, they would darken.
    return np.where(to_uint8(levels) == np.arange(256), levels, np.nextafter(levels, np.float32(2)))


_FROM_UINT8 = _all_levels()


def from_uint8(pixels: ArrayLike) -> NDArray[np.float32]:
    """0..255 -> [-1, 1]: pixels / 127.5 - 1, as OpenAI's loaders do; its last bit such that `to_uint8` leads back."""
    levels: NDArray[np.uint8] = np.asarray(pixels)
    return _FROM_UINT8[levels]


def cut_grid(picture: NDArray[np.uint8], size: tuple[int, int], border: int = 2) -> NDArray[np.uint8] | None:
    """The images `(n, h, w, c)` of a picture `(H, W, c)` that `grid` drew of images of `size`; None if it is none.

    One image of that size is its own grid. The least enlargement that fits is undone. For images of more than 20 pixels
    a side no other than that of `grid` fits; for smaller ones it may, if they are white wherever its borders would be.
    Cells at the end that are white all over are taken for the empty ones of the last row.
    """
    for factor in range(1, max(1, min(picture.shape[:2]) // min(size)) + 1):
        if picture.shape[0] % factor or picture.shape[1] % factor:
            continue
        least = picture[::factor, ::factor]
        images = least[None] if least.shape[:2] == size else _cut(least, size, border)
        if images is not None and np.array_equal(_enlarged(least, factor), picture):
            return images
    return None


def _cut(picture: NDArray[np.uint8], size: tuple[int, int], border: int) -> NDArray[np.uint8] | None:
    (h, w), (H, W) = size, picture.shape[:2]
    rows, columns = (H - border) // (h + border), (W - border) // (w + border)
    if rows < 1 or columns < 1 or (rows * (h + border) + border, columns * (w + border) + border) != (H, W):
        return None
    cells = picture[border:, border:].reshape(rows, h + border, columns, w + border, -1).swapaxes(1, 2)
    lines = np.concatenate([cells[:, :, h:].ravel(), cells[:, :, :, w:].ravel()])
    if (picture[:border] != 255).any() or (picture[:, :border] != 255).any() or (lines != 255).any():
        return None
    images = cells[:, :, :h, :w].reshape(rows * columns, h, w, -1)
    drawn = np.flatnonzero((images != 255).any(axis=(1, 2, 3)))
    return images[: drawn[-1] + 1] if len(drawn) else images[:1]


def load_images(path: str | os.PathLike[str], size: tuple[int, int]) -> NDArray[np.float32]:
    """Images `(n, h, w, c)` float32 in [-1, 1] from what `save_images` writes, or other pictures of `size` (h, w).

    .npy: as they are. .npz: `arr_0`, uint8. .png: one picture of that size, or a grid of such, their pixels possibly
    enlarged as `grid` enlarges them. A folder: every .png in it, by name. Raises ValueError, or OSError, for anything
    else, naming the file; channels are not looked at.
    """
    target = Path(path)
    if target.is_dir():
        files = sorted(file for file in target.iterdir() if file.suffix.lower() == ".png")
        if not files:
            raise ValueError(f"{path}: a folder without .png files")
        pictures = [_read_png(file) for file in files]
        wrong = [f.name for f, p in zip(files, pictures, strict=True) if p.shape != (*size, pictures[0].shape[-1])]
        if wrong:
            raise ValueError(
                f"{path}: pictures must all be {size[0]}x{size[1]} and as many-coloured as the first; not so: "
                + ", ".join(wrong[:5])
                + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )
        return from_uint8(np.stack(pictures))
    if not target.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    match target.suffix.lower():
        case ".png":
            picture = _read_png(target)
            images = cut_grid(picture, size)
            if images is None:
                raise ValueError(
                    f"{path}: {picture.shape[0]}x{picture.shape[1]} is neither {size[0]}x{size[1]}, as this checkpoint "
                    "makes, nor a grid of such with borders of 2, nor either of them enlarged by a whole factor; other "
                    "sizes can be given as .npy"
                )
            return from_uint8(images)
        case ".npy" | ".npz":
            try:
                held = read_arrays(target, ["arr_0"])
            except ValueError as error:
                raise ValueError(f"{path} holds no images: {error}") from error
            array = held.get("arr_0") if isinstance(held, dict) else held
            if array is None or array.ndim != 4:
                what = "an archive without arr_0" if array is None else f"an array of shape {array.shape}"
                raise ValueError(f"{path} must hold images (N, H, W, C), it holds {what}")
            return from_uint8(array) if array.dtype == np.uint8 else array
    raise ValueError(f"{path}: images are read from .npy, .npz, .png or a folder of .png files")


def _read_png(path: Path) -> NDArray[np.uint8]:
    """`(h, w, 1 or 3)`."""
    try:
        with open_picture(path) as opened:
            image: Image.Image = opened
            if "A" in image.getbands() or "transparency" in image.info:
                if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                    raise ValueError("it is transparent in places: flatten it first")
                if "A" in image.getbands():
                    image = image.convert("L" if image.mode == "LA" else "RGB")
            grey = image.mode in ("1", "L")
            if not grey and image.mode not in ("P", "RGB"):
                raise ValueError(f"it has the mode {image.mode}; convert it to 8-bit grey or RGB")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


PICTURES = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
"""What is opened of Pillow's formats; for some of the others it starts a program."""


_opening = threading.Lock()  # filters of warnings are the whole process's


@contextmanager
def open_picture(source: Path | bytes) -> Iterator[Image.Image]:
    """A picture of anybody's. Raises ValueError, without its name, for what is none of `PICTURES`, for damage that is
    found while the picture is used, and for more pixels than Pillow warns of; OSError for what is no regular file.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            with _opening, warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
                opened = Image.open(file, formats=PICTURES)
            with opened as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError("it is not a picture") from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


_BROKEN = (  # what Pillow raises for damaged files
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def settings_of(image: Image.Image) -> dict[str, Any]:
    """What a picture of ours says of how it was made. Raises ValueError if it does not."""
    said = getattr(image, "text", {}).get("jddim") or image.getexif().get(ExifTags.Base.ImageDescription)
    if not isinstance(said, str):
        raise ValueError("it does not say how it was made")
    settings = parse_json(said)
    if not isinstance(settings, dict):
        raise ValueError("what it says of itself is no JSON object")
    return settings


def check_output(
    path: str | os.PathLike[str],
    channels: int | None = None,
    *,
    formats: Mapping[str, str] = FORMATS,
    overwrite: bool = False,
) -> None:
    """Raise ValueError or OSError if samples of `channels` channels cannot be written to `path`.

    channels: None, as long as the checkpoint is not known, which may have to be converted first.
    formats: the suffixes allowed, and what each stands for. overwrite: a file that is there may be replaced, never a
    folder. To be called before sampling.
    Numbered PNGs are only written into a folder that is new or empty.
    """
    target, suffix = Path(path), _suffix(path, formats)
    if suffix in (*SHEETS, "", ".gif", ".html") and channels not in (None, 1, 3):
        raise ValueError(f"{path}: pictures need 1 or 3 channels, the samples have {channels}; write .npz or .npy")
    if suffix and target.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if suffix:
        check_free(path, overwrite=overwrite)
    if not suffix and target.exists():
        if not target.is_dir():
            raise FileExistsError(f"{path} is a file; give its format as a suffix, or name a folder")
        if any(target.iterdir()):
            raise FileExistsError(f"{path} is a folder that is not empty; choose a new one")
    if suffix and target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {parent} is not a writable folder")
    # Only trying tells: permissions do not bind root, and file systems refuse for reasons of their own.
    probe = parent / beside(target).name
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error} in {parent}") from error
    finally:  # after Ctrl-C too
        with suppress(OSError):
            probe.unlink()


def _suffix(path: str | os.PathLike[str], formats: Mapping[str, str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        allowed = ", ".join(f"{name or 'no suffix'} ({what})" for name, what in formats.items())
        raise ValueError(f"{path}: end it in {allowed}")
    return suffix


def check_sheet(path: str | os.PathLike[str], num: int, size: tuple[int, int], columns: int | None = None) -> None:
    """Raise ValueError if what `path` names holds no grid of `num` images of `size`, before they are sampled."""
    _check_extent(path, *_extent(num, size, columns or math.ceil(math.sqrt(num)) or 1, 2))


def _check_extent(path: str | os.PathLike[str], H: int, W: int) -> None:
    suffix = Path(path).suffix.lower()
    if max(H, W) > (most := _LONGEST.get(suffix, math.inf)):
        raise ValueError(
            f"{path}: a picture of {H}x{W} pixels, where {suffix} holds {most} a side; take .png, or fewer images"
        )


def save_images(
    path: str | os.PathLike[str],
    images: ArrayLike,
    metadata: Mapping[str, Any],
    frames: Sequence[ArrayLike] = (),
    start: int = 0,
) -> None:
    """Write samples `(n, h, w, c)` float32 in the format that the suffix of `path` names, whole or not at all.

    A suffix of `SHEETS`: one `grid`. .gif: `frames`, each `(n, h, w, c)`, as an animated one. .npz: `arr_0`, uint8
    NHWC, as FID evaluators read it. .npy: the float32 samples themselves. No suffix: a folder of PNGs numbered from
    `start`.
    metadata: JSON, kept as `save_picture` keeps it (a folder's PNGs add their `index`), and in the GIF's comment.
    """
    target = Path(path)
    images = np.asarray(images, np.float32)
    match _suffix(path, FORMATS):
        case "":
            with atomic(target) as staging:
                staging.mkdir()
                for i, image in enumerate(to_uint8(images)):
                    encoded = encode_png(image, {**metadata, "index": start + i})
                    (staging / f"{start + i:06d}.png").write_bytes(encoded)
        case ".gif":
            save_gif(target, [grid(frame) for frame in frames], metadata)
        case ".npz":
            with atomic(target) as staging:
                np.savez(staging, arr_0=to_uint8(images))
        case ".npy":
            with atomic(target) as staging:
                write_array(staging, images)
        case _:
            save_picture(target, grid(images), metadata)


def save_picture(path: str | os.PathLike[str], picture: NDArray[np.uint8], metadata: Mapping[str, Any]) -> None:
    """Write one uint8 picture `(h, w, 1 or 3)` in the format of `SHEETS` that `path` names, whole or not at all.

    metadata: JSON, in a PNG's text "jddim", in the others' EXIF as the image's description.
    Raises ValueError for another format, and for more pixels a side, or a longer description, than it holds.
    """
    suffix, encoded = _suffix(path, SHEETS), io.BytesIO()
    _check_extent(path, *picture.shape[:2])
    if suffix == ".png":
        encoded.write(encode_png(picture, metadata))
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(metadata)
        how = {"lossless": True} if suffix == ".webp" else {"quality": 95, "subsampling": 0}
        _to_pillow(picture).save(encoded, "WEBP" if suffix == ".webp" else "JPEG", exif=exif, **how)
    with atomic(Path(path)) as staging:
        staging.write_bytes(encoded.getvalue())


def save_gif(
    path: str | os.PathLike[str],
    pictures: Sequence[NDArray[np.uint8]],
    metadata: Mapping[str, Any],
    *,
    milliseconds: int = 80,
    hold: int = 1500,
) -> None:
    """Write uint8 pictures as an endless GIF that rests `hold` milliseconds on the last, whole or not at all."""
    with atomic(Path(path)) as staging:
        staging.write_bytes(encode_gif(pictures, metadata, milliseconds=milliseconds, hold=hold))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a picture of ours. Raises ValueError for what is none; OSError as `open_picture`."""
    with open_picture(Path(path)) as image:
        return settings_of(image)


def encode_png(picture: NDArray[np.uint8], metadata: Mapping[str, Any]) -> bytes:
    """One uint8 picture `(h, w, 1 or 3)` as the bytes of a PNG, `metadata` as JSON in its text."""
    text, encoded = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("jddim", json.dumps(metadata))
    _to_pillow(picture).save(encoded, "PNG", pnginfo=text)
    return encoded.getvalue()


def encode_gif(
    pictures: Sequence[NDArray[np.uint8]], metadata: Mapping[str, Any], *, milliseconds: int = 80, hold: int = 1500
) -> bytes:
    """What `save_gif` writes."""
    first, *rest = [_to_pillow(picture) for picture in pictures]
    encoded = io.BytesIO()
    first.save(
        encoded,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=[milliseconds] * len(rest) + [hold],
        loop=0,
        comment=json.dumps(metadata).encode(),
    )
    return encoded.getvalue()


def _to_pillow(picture: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
