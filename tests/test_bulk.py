"""Sets of shards: whatever kills a run, the next completes it to the bit; what is damaged is found and named."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_zygote import BATCH, LABELS, NUM, SIZE, Zygote, make, manifest
from tiny import tree

from jddim.bulk import collecting, shards
from jddim.bulk import run as bulk
from jddim.bulk.lock import locked
from jddim.bulk.manifest import BulkConfig, BulkError, Manifest, manifest_path, read_manifest
from jddim.bulk.shards import FORMATS, Layout
from jddim.images import save_picture

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A set in each format, made in one go."""
    folder = tmp_path_factory.mktemp("bulk")
    for format in FORMATS:
        assert bulk.run(folder / format, manifest(format), make, LABELS).images == NUM
    return {format: folder / format for format in FORMATS}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {name: value for name, value in tree(folder).items() if not name.startswith(".lock")}


@pytest.mark.parametrize("format", FORMATS)
def test_a_set_is_read_as_it_was_made(undisturbed: dict[str, Path], tmp_path: Path, format: str) -> None:
    assert collecting.problems(undisturbed[format]) == []
    assert collecting.collect([undisturbed[format]], tmp_path / "all.npz") == (NUM, 0)
    with np.load(tmp_path / "all.npz") as held:
        images, labels = held["arr_0"], held["arr_1"]
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, np.concatenate([make(i) for i in range(0, NUM, BATCH)])[:NUM])
    np.testing.assert_array_equal(labels, np.arange(NUM) % 5)
    np.testing.assert_array_equal(collecting.kept(undisturbed[format], manifest(format), 17), images[17])


@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_any_moment_it_is_completed_to_the_bit(
    zygote: Zygote, undisturbed: dict[str, Path], tmp_path: Path, format: str
) -> None:
    rng = random.Random(format)
    kills, out = 0, tmp_path / "out"
    # the first moments of a folder one after the other, then any
    for event in [*range(1, 8), *(rng.randrange(1, 30) for _ in range(12))]:
        kills += zygote.run({"out": out, "format": format, "event": event}) == [-signal.SIGKILL]
    for _ in range(2):
        kills += zygote.run({"out": out, "format": format, "after": rng.uniform(0, 0.03)}) == [-signal.SIGKILL]
    assert kills >= 10
    assert zygote.run({"out": out, "format": format}) == [0]
    assert contents(out) == contents(undisturbed[format])


@pytest.mark.parametrize("format", ["npz", "png"])
def test_two_workers_killed_at_any_moment(
    zygote: Zygote, undisturbed: dict[str, Path], tmp_path: Path, format: str
) -> None:
    rng = random.Random(format)
    out = tmp_path / "out"
    pair = [{"out": out, "format": format, "worker": [i, 2]} for i in range(2)]
    ends = [end for _ in range(8) for end in zygote.run(*({**run, "event": rng.randrange(1, 30)} for run in pair))]
    assert ends.count(-signal.SIGKILL) >= 8
    assert 99 not in ends  # neither was kept out by the other, dead or alive
    assert zygote.run(*pair) == [0, 0]
    assert contents(out) == contents(undisturbed[format])
    # with the workers gone, another number of them finds nothing to do
    assert bulk.run(out, manifest(format), make, LABELS, worker=(2, 3)).images == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["flipped", "cut short", "gone", "another's"])
def test_a_damaged_shard_is_named_and_made_again(
    undisturbed: dict[str, Path], tmp_path: Path, format: str, damage: str
) -> None:
    out = shutil.copytree(undisturbed[format], tmp_path / "out")
    layout, told = manifest(format).bulk.layout, []
    path = layout.path(out, 4)
    file = path / "00000026.png" if format == "png" else path
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[random.Random(format).randrange(len(content))] ^= 8
        file.write_bytes(content)
    elif damage == "cut short":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "gone":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(layout.path(out, 3), path) if format == "png" else shutil.copy(layout.path(out, 3), path)
    (problem,) = collecting.problems(out)
    assert path.name in problem
    with pytest.raises(BulkError, match=path.name):
        collecting.collect([out], tmp_path / "all.npz")
    assert not (tmp_path / "all.npz").exists()
    done = bulk.run(out, manifest(format), make, LABELS, say=told.append)
    assert (done.whole, done.images) == (7, SIZE)
    assert f"{problem}; it is made again" in told
    assert contents(out) == contents(undisturbed[format])


def test_each_byte_of_receipt_and_manifest_counts(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed["npz"], tmp_path / "out")
    asked = manifest()
    layout = asked.bulk.layout
    for path, wrong in (
        (layout.receipt(out, 2), lambda: shards.problem(out, layout, 2, asked.run)),
        (manifest_path(out), lambda: read_manifest(out)),
    ):
        whole = path.read_bytes()
        for spoiled in [*(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))), whole[:-1]]:
            path.write_bytes(spoiled)
            try:
                problem = wrong()
            except ValueError as error:
                problem = error
            assert "shard-00002" in str(problem) or "manifest.json" in str(problem), spoiled
        path.write_bytes(whole)
    # a damaged manifest is not written over; removed, it comes back, and the shards are kept
    manifest_path(out).write_bytes(b"{")
    with pytest.raises(BulkError, match=r"manifest.json is damaged .*remove it"):
        bulk.run(out, asked, make, LABELS)
    manifest_path(out).unlink()
    with pytest.raises(ValueError, match=r"shard-00000.npz was made by a run with other settings"):
        bulk.run(out, manifest(seed=1), make, LABELS)
    manifest_path(out).unlink()
    assert bulk.run(out, asked, make, LABELS).images == 0
    assert contents(out) == contents(undisturbed["npz"])


def test_other_settings_are_refused_with_what_differs(undisturbed: dict[str, Path]) -> None:
    before = tree(undisturbed["npz"])
    with pytest.raises(
        BulkError, match=r"seed is 0 there, 7 here; batch_size is 3 there, 2 here\. Ask for what it was begun with"
    ):
        bulk.run(undisturbed["npz"], manifest(seed=7, batch_size=2), make, LABELS)
    assert tree(undisturbed["npz"]) == before


def test_two_runs_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out, manifest()):
        with pytest.raises(BulkError, match=rf"in use by process {os.getpid()} on .*, since"):
            bulk.run(out, manifest(), make)
        with pytest.raises(BulkError, match="in use by a run of 1 workers"):
            bulk.run(out, manifest(), make, worker=(1, 2))
        with pytest.raises(BulkError, match="seed is 0 there, 1 here"):
            bulk.run(out, manifest(seed=1), make)
    with (
        locked(out, manifest(), (0, 2)),
        locked(out, manifest(), (1, 2)),
        pytest.raises(BulkError, match="in use as worker 1/2 by process"),
    ):
        bulk.run(out, manifest(), make, worker=(1, 2))
    assert bulk.run(out, manifest(), make).images == NUM


def test_a_full_disk_stops_cleanly_and_the_run_goes_on(
    zygote: Zygote, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    room = shards.Layout(NUM, SIZE).path(undisturbed["npz"], 0).stat().st_size - 1
    assert zygote.run({"out": out, "format": "npz", "limit": room}) == [errno.EFBIG]
    assert set(contents(out)) == {"manifest.json"}
    assert zygote.run({"out": out, "format": "npz"}) == [0]
    assert contents(out) == contents(undisturbed["npz"])


def test_a_read_only_folder_is_refused(zygote: Zygote) -> None:
    folder = Path(tempfile.mkdtemp())  # tmp_path is closed to other users, as whom root becomes bound by permissions
    try:
        folder.chmod(0o755)
        bulk.run(folder / "out", manifest(), make, LABELS, worker=(1, 2))
        before = tree(folder)
        (folder / "out").chmod(0o555)
        for file in (folder / "out").iterdir():
            file.chmod(0o444)
        assert zygote.run({"out": folder / "out", "format": "npz", "nobody": True}) == [errno.EACCES]
        assert tree(folder) == before
    finally:
        (folder / "out").chmod(0o755)
        shutil.rmtree(folder)


def test_a_slow_disk_slows_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk, written = threading.Event(), []
    monkeypatch.setattr(shards, "write", lambda folder, layout, k, files, run: (disk.wait(), written.append(k)))
    asked = []

    def slow(first: int) -> np.ndarray:
        asked.append(first)
        return make(first)

    runner = threading.Thread(target=lambda: bulk.run(tmp_path / "out", manifest(), slow))
    runner.start()
    runner.join(0.5)
    # one shard is being written, one waits, one is made: no more are held
    assert runner.is_alive()
    assert len(asked) == 3 * SIZE // BATCH
    disk.set()
    runner.join(60)
    assert written == list(range(8))


def test_what_a_writer_fails_of_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr(shards, "write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        bulk.run(tmp_path / "out", manifest(), make)


def test_workers_folders_are_collected_without_gaps_and_doubles(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    outs = [tmp_path / f"worker-{i}" for i in range(3)]
    for i, out in enumerate(outs):
        bulk.run(out, manifest(), make, LABELS, worker=(i, 3))
    collecting.collect(outs, tmp_path / "all.npz")
    collecting.collect([undisturbed["npz"]], tmp_path / "one.npz")
    assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    with pytest.raises(BulkError, match=r"3 of 8 shards: .*0001.npz is missing; .*0004.npz is missing; .*0007"):
        collecting.collect([outs[0], outs[2]], tmp_path / "gaps.npz")
    with pytest.raises(BulkError, match=r"shard-00000.npz is in .*worker-0 and in .*npz"):
        collecting.collect([*outs, undisturbed["npz"]], tmp_path / "doubles.npz")
    assert not list(tmp_path.glob("gaps*")) + list(tmp_path.glob("doubles*"))


def test_equal_images_are_counted(tmp_path: Path) -> None:
    bulk.run(
        tmp_path / "out", manifest(), lambda first: np.stack([make(i % 9)[0] for i in range(first, first + BATCH)])
    )
    assert collecting.collect([tmp_path / "out"], tmp_path / "all.npz") == (NUM, NUM - 9)


def test_a_shard_of_no_set_is_named(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed["npz"], tmp_path / "out")
    shutil.copy(out / "shard-00001.npz", out / "shard-00008.npz")
    assert collecting.problems(out) == ["shard-00008.npz is none of this set's 8 shards"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 0, "batch_size": 0}, "batch_size must be at least 1, got 0; num must be at least 1, got 0"),
        ({"shard_size": 7}, "multiple of the batch size 3"),
        ({"format": "tiff"}, "unknown format 'tiff' .allowed: npz, png, tar."),
        ({"method": "ddmp"}, "did you mean 'ddpm'"),
        ({"seed": -1}, "seed must lie in"),
        ({"labels": "1,2"}, "labels are balanced, one number, or a range"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manifest(**changes)


def test_old_and_new_manifests_are_read(tmp_path: Path) -> None:
    asked = manifest(method="ddpm", guidance="projected", guidance_interval=(100.0, 900.0))
    again = Manifest.of(json.loads(asked.text()), "../ckpt")
    assert again == asked
    assert again.bulk.request.guidance_interval == (100.0, 900.0)
    old = (
        '{"num": 43, "seed": 0, "method": "ddim", "labels": null, "guidance_scale": null, "null_label": null, '
        '"dtype": "float32", "batch_size": 3, "shard_size": 6, "format": "npz"}'
    )
    assert json.dumps(manifest().bulk.to_json()) == old  # word for word what it was before a request had more fields
    with pytest.raises(ValueError, match="guidance_interval must be tuple"):
        BulkConfig.from_json(json.loads(old) | {"guidance_interval": [1, "x"]})


def test_the_default_shard_is_whole_batches() -> None:
    assert [BulkConfig(9, batch_size=b).shard_size for b in (64, 100, 3000)] == [1024, 1000, 3000]
    assert [len(Layout(43, 6).images(k)) for k in (0, 7)] == [6, 1]


# -- a set of somebody else's -----------------------------------------------------------------------------------------


def sealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it its digest again."""
    data = json.loads(manifest_path(folder).read_text())
    change(data)
    rest = {name: value for name, value in data.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    manifest_path(folder).write_text(json.dumps({**rest, "sha256": digest}, indent=2) + "\n")


WRONG: list[Any] = [None, True, -1, 0, 2**40, 2**62, 1e999, "", "9" * 5000, [], {}, [[1]], {"a": [None]}]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", ["", "bulk", "sampler", "versions"])
def test_a_manifest_of_other_types(undisturbed: dict[str, Path], tmp_path: Path, part: str) -> None:
    out = shutil.copytree(undisturbed["npz"], tmp_path / "out")
    text, refused = manifest_path(out).read_text(), 0
    data = json.loads(text)
    for name in data[part] if part else data:
        for value in WRONG:
            manifest_path(out).write_text(text)
            sealed(out, lambda data, name=name, value=value: (data[part] if part else data).update({name: value}))
            try:
                collecting.problems(out)
            except BulkError as error:
                assert len(str(error)) < 1000  # noqa: PT017
                refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": True}, "num must be int, got True"),
        ({"num": 2**62}, "more than 100000"),
        ({"batch_size": 2**40, "shard_size": 2**40}, "batch_size must be at most 1048576"),
        ({"labels": 3}, "labels must be str or None, got 3"),
        ({"format": []}, r"format must be str, got \(\)"),
    ],
)
def test_a_manifest_edited_and_sealed_again(
    undisturbed: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = shutil.copytree(undisturbed["npz"], tmp_path / "out")
    sealed(out, lambda data: data["bulk"].update(change))
    with pytest.raises(BulkError, match=f"manifest.json is damaged .*{message}"):
        read_manifest(out)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("format", FORMATS)
def test_shards_and_receipts_that_are_no_files(undisturbed: dict[str, Path], tmp_path: Path, format: str) -> None:
    out = shutil.copytree(undisturbed[format], tmp_path / "out")
    layout = manifest(format).bulk.layout
    places = [layout.path(out, k) / f"{6 * k:08d}.png" if format == "png" else layout.path(out, k) for k in range(2)]
    for place in (*places, layout.receipt(out, 2), layout.receipt(out, 3)):
        place.unlink()
    for place in (places[0], layout.receipt(out, 2)):
        os.mkfifo(place)
    for place in (places[1], layout.receipt(out, 3)):
        place.symlink_to("/dev/zero")
    assert len(collecting.problems(out)) == 4
    for k in range(2):
        with pytest.raises(ValueError, match="cannot be read"):
            shards.read(out, layout, k)
    for other in (manifest_path(out), out / "shard-00004.json"):
        other.unlink()
        os.mkfifo(other)
    with pytest.raises(OSError, match=r"manifest\.json"):
        read_manifest(out)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "receipt", ["[" * 90_000, "[]", "null", '{"run": 1}', '{"run": "x", "bytes": "1", "sha256": 2}', "9" * 9000, "\xff"]
)
def test_receipts_of_other_types(undisturbed: dict[str, Path], tmp_path: Path, receipt: str) -> None:
    out = shutil.copytree(undisturbed["npz"], tmp_path / "out")
    (out / "shard-00002.json").write_text(receipt, encoding="latin1")
    assert collecting.problems(out) == ["shard-00002.json is damaged"]


@pytest.mark.timeout(60)
def test_tars_of_other_members(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed["tar"], tmp_path / "out")
    layout = manifest("tar").bulk.layout
    path, first = layout.path(out, 0), "00000000.png"
    whole = path.read_bytes()

    def member(name: str, kind: bytes, size: int = 0, **more: Any) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        for field, value in more.items():
            setattr(info, field, value)
        return info.tobuf(tarfile.PAX_FORMAT if "pax_headers" in more else tarfile.GNU_FORMAT)

    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,1"}
    for content in (
        *(member(first, kind, linkname="/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE)),
        *(member(first, kind) for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE)),
        member(first, tarfile.REGTYPE, 2**40),
        member(first, tarfile.REGTYPE, 0, pax_headers=sparse),
        member(first, tarfile.GNUTYPE_LONGNAME, 2**40),
        gzip.compress(whole),
        whole[:5000],
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            shards.read(out, layout, 0)
    label = whole.replace(b"00000000.cls", b"00000000.clx")
    path.write_bytes(label)
    with pytest.raises(ValueError, match="cannot be read"):
        shards.read(out, layout, 0)


@pytest.mark.parametrize("index", [True, None, "1", -1, NUM, 10**15, [1]])
def test_a_picture_that_is_no_image_of_its_set(tmp_path: Path, fails: Callable[..., str], index: Any) -> None:
    path = tmp_path / "a.png"
    save_picture(path, make(0)[0], {**manifest("png").settings, "index": index})
    assert "is no picture that jddim bulk wrote: index must be one of its set's 43" in fails("reproduce", path)


@pytest.mark.parametrize(
    "change",
    [{"bulk": None}, {"bulk": {"num": "x"}}, {"versions": {"jax": []}}, {"checkpoint_sha256": 3}, {"sampler": [1]}],
)
def test_a_picture_that_says_nothing_of_a_set(
    tmp_path: Path, fails: Callable[..., str], change: dict[str, Any]
) -> None:
    save_picture(tmp_path / "a.png", make(0)[0], {**manifest("png").settings, "index": 1, **change})
    assert "is no picture that jddim bulk wrote: " in fails("reproduce", tmp_path / "a.png")
