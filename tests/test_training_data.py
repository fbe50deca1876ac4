"""Images to train on: every source, what is left out and said, and an order that (seed, step) alone decides."""

from __future__ import annotations

import gzip
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE, small_config

from jddim.train import data as training_data
from jddim.train.data import Data, Order, batches, read

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (7, *SIZE, 1), dtype=np.uint8)
CLASSES = {"class_embedding": "learned", "num_classes": 3}


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    np.savez(tmp_path / "b.npz", PIXELS, np.array([0, 1, 2, 0, 1, 2, 0]))
    np.save(tmp_path / "f.npy", training_data.from_uint8(PIXELS))
    mapped = read(tmp_path / "a.npy", small_config())
    assert isinstance(mapped.pixels, np.memmap)
    labelled = read(tmp_path / "b.npz", small_config(**CLASSES))
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert read(tmp_path / "b.npz", small_config()).labels is None
    (first,), (again,), (floats,) = (
        islice(batches(data, batch_size=4, seed=1, flip=False), 1)
        for data in (mapped, labelled, read(tmp_path / "f.npy", small_config()))
    )
    np.testing.assert_array_equal(first["images"], floats["images"])
    np.testing.assert_array_equal(again["images"], first["images"])
    assert first["images"].dtype == np.float32
    assert again["labels"].dtype == np.int32


def test_pictures_of_all_kinds_and_bad_ones_by_name(tmp_path: Path) -> None:
    for name, mode, size in (("b/1.png", "L", (10, 6)), ("a/2.jpg", "RGB", (40, 31)), ("a/0.png", "P", (10, 12))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, size, 200).save(tmp_path / name)
    Image.fromarray(PIXELS[0, ..., 0]).save(tmp_path / "b" / "0.png")
    (tmp_path / "b" / "cut.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:-30])
    (tmp_path / "b" / "text.png").write_text("no picture")
    Image.new("LA", (10, 6)).save(tmp_path / "a" / "clear.png")
    Image.fromarray(np.full((6, 10), 40_000, np.uint16)).save(tmp_path / "b" / "deep.png")
    (tmp_path / "notes.txt").write_text("not a picture, nor taken for one")
    found = read(tmp_path, small_config(**CLASSES))
    assert [name.split(" (")[0] for name in found.bad] == ["a/clear.png", "b/cut.png", "b/deep.png", "b/text.png"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.pixels.shape == (4, *SIZE, 1)
    np.testing.assert_array_equal(found.pixels[2], PIXELS[0])
    assert (found.pixels[3] == 200).all()
    Image.fromarray(PIXELS[0, ..., 0]).save(tmp_path / "loose.png")
    assert read(tmp_path, small_config()).labels is None
    with pytest.raises(ValueError, match=r"loose\.png lies beside the folders of classes, and so has no label"):
        read(tmp_path, small_config(**CLASSES))
    (tmp_path / "loose.png").unlink()
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        path.write_text("no picture")
    with pytest.raises(ValueError, match="none of 8 pictures can be read: "):
        read(tmp_path, small_config())


def test_mnists_own_files(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05" + bytes([3, 1, 4, 1, 5]))
    found = read(tmp_path, small_config(image_size=(28, 28), class_embedding="learned", num_classes=10))
    np.testing.assert_array_equal(found.pixels[..., 0], pixels)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 1, 4, 1, 5]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (b"", "those start with 000008"),
        (b"\0\0\x08", "those start with 000008"),
        (b"\0\0\x08\xff", "no IDX file"),
        (b"\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "no IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05" + bytes(5), r"holds images \(5,\) and labels"),
        (b"\0\0\x08\x03" + b"\0\0\0\x06" + b"\0\0\0\x01" * 2 + bytes(6), r"holds images \(6, 1, 1\) and labels \(5,\)"),
    ],
)
def test_idx_files_that_are_none(tmp_path: Path, images: bytes, message: str) -> None:
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05" + bytes(5))
    for name, content in (("", images), (".gz", gzip.compress(images))):
        path = tmp_path / f"train-images-idx3-ubyte{name}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, small_config())
        path.unlink()


@pytest.mark.timeout(60)
def test_idx_files_that_cannot_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for content, message in (
        (gzip.compress(bytes(300_000_000), 1), "would unpack to more than"),
        (gzip.compress(bytes(9))[:-5], "is damaged"),
        (b"\x1f\x8b\x08" + bytes(30), "is damaged|those start"),
        (b"no gzip", "Not a gzipped file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, small_config())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="is a pipe or a device"):
        read(tmp_path, small_config())


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="reading Hugging Face datasets needs datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = {"label": [2, 0, 1], "image": [Image.fromarray(pixels[..., 0]) for pixels in PIXELS[:3]]}
    features = datasets.Features({"label": datasets.ClassLabel(3), "image": datasets.Image()})
    (tmp_path / "digits").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "digits" / "train-0.parquet")
    found = read(f"hf:{tmp_path}/digits", small_config(**CLASSES))
    np.testing.assert_array_equal(found.pixels, PIXELS[:3])
    assert found.labels is not None
    assert found.labels.tolist() == [2, 0, 1]
    assert read(Path(f"hf:{tmp_path}/digits@train[1:]"), small_config()).pixels.shape == (2, *SIZE, 1)
    with pytest.raises(ValueError, match=r"cannot be loaded .ValueError: Unknown split"):
        read(f"hf:{tmp_path}/digits@test", small_config())
    with pytest.raises(FileNotFoundError, match="no such file or folder: "):
        read(f"hf:{tmp_path}/none", small_config())
    with pytest.raises(ValueError, match="hf:@test names no dataset: give hf:NAME, "):
        read("hf:@test", small_config())
    (tmp_path / "numbers").mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features({**features, "label": datasets.Value("int64")})).to_parquet(
        tmp_path / "numbers" / "train-0.parquet"
    )
    assert read(f"hf:{tmp_path}/numbers", small_config()).labels is None
    with pytest.raises(ValueError, match=r"no column of classes \(ClassLabel\), .* its columns are label, image"):
        read(f"hf:{tmp_path}/numbers", small_config(**CLASSES))
    (tmp_path / "words").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "words" / "train-0.parquet")
    with pytest.raises(ValueError, match="no column of pictures, its columns are text"):
        read(f"hf:{tmp_path}/words", small_config())


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "far.npy", np.full((2, *SIZE, 1), 1.5, np.float32))
    np.save(tmp_path / "bytes.npy", PIXELS.astype(np.float32))
    np.save(tmp_path / "torch.npy", PIXELS.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "b.npz", PIXELS, np.full(7, 3))
    (tmp_path / "empty").mkdir()
    for name, fields, message in (
        (
            "a.npy",
            {"in_channels": 3, **CLASSES},
            r"images are 6x10x1, the network's are 6x10x3; the network has classes",
        ),
        ("far.npy", {}, r"floats must lie in \[-1, 1\]; those of image 0 do not$"),
        ("bytes.npy", {}, r"floats must lie in \[-1, 1\]; those of image 0 do not; save pixels of 0..255 as uint8$"),
        ("torch.npy", {}, r"images are 1x6x10, the network's are 6x10x1: channels come last, array.transpose"),
        ("b.npz", CLASSES, r"labels must lie in 0..2, got 3..3: the network has 3 classes"),
        ("empty", {}, r"neither MNIST's"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, small_config(**fields))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent", small_config())


def test_the_order_is_a_function_of_seed_and_step() -> None:
    order = Order(7, 5, seed=2)
    rows = [order.rows(step)[0].tolist() for step in range(14)]
    seen = [row for part in rows for row in part]
    for epoch in range(10):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert len({tuple(seen[7 * e : 7 * e + 7]) for e in range(10)}) > 8  # each is another
    assert [Order(7, 5, seed=2).rows(step)[0].tolist() for step in (9, 3)] == [rows[9], rows[3]]
    assert Order(7, 5, seed=3).rows(0)[0].tolist() != rows[0]
    # a batch larger than the set
    assert sorted(Order(3, 6, seed=0).rows(1)[0].tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_order_does_not_change_between_versions() -> None:
    """Kept, not computed: a run goes on after NumPy was upgraded."""
    assert Order(7, 7, seed=2).rows(0)[0].tolist() == [1, 4, 0, 6, 3, 5, 2]


def test_processes_share_the_batch() -> None:
    order = Order(7, 6, seed=2)
    for step in range(3):
        parts = [order.rows(step, (i, 3)) for i in range(3)]
        for whole, *split in zip(order.rows(step), *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(split), whole)
    with pytest.raises(ValueError, match="a batch of 6 has no part 0 of 4"):
        order.rows(0, (0, 4))


def test_half_are_mirrored_and_resuming_gives_the_same() -> None:
    data = Data(PIXELS, np.arange(7, dtype=np.int32))
    straight = list(islice(batches(data, batch_size=4, seed=5, flip=True), 50))
    resumed = list(islice(batches(data, batch_size=4, seed=5, flip=True, start=30), 20))
    for a, b in zip(straight[30:], resumed, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])
        np.testing.assert_array_equal(a["labels"], b["labels"])
    mirrored = 0
    for batch in straight:
        for image, label in zip(batch["images"], batch["labels"], strict=True):
            plain = training_data.from_uint8(PIXELS[label])
            mirrored += (image == plain[:, ::-1]).all()
            assert (image == plain).all() or (image == plain[:, ::-1]).all()
    assert abs(mirrored - 100) < 4 * 50**0.5
