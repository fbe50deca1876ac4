"""Many images into a folder of shards, by one run or by several at once, stopped and gone on with at will.

`run` asks a function for batches and writes them; it knows no network (`sampler` makes that function of a `DDIM`). The
folder's manifest says what was asked. Whatever ends a run (SIGKILL included), the same call again completes the set,
and the images are those of a run that nothing disturbed: image i depends on (seed, i) alone, and each batch of the set
is always computed as it is here, in the same place of a batch of the same size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jddim import shards
from jddim.config import METHODS, SamplerConfig, did_you_mean, first_few, from_json, to_json
from jddim.images import atomic, to_uint8
from jddim.shards import Layout

if TYPE_CHECKING:
    import jax

    from jddim.checkpoint import Metadata
    from jddim.pipeline import DDIM, Preview

FORMAT_VERSION = 1
PATIENCE = 10.0
"""Seconds to wait for another run that is just beginning in the same folder."""

Make = Callable[[int], NDArray[np.uint8]]
"""`make(first)` -> images first..first+batch_size-1 of the seed, uint8 `(batch_size, h, w, c)`."""


class BulkError(ValueError):
    """A folder of shards that cannot be used as asked, with what to do about it."""


@dataclasses.dataclass(frozen=True)
class BulkConfig:
    """What a set is: how many images of which seed, made and kept how.

    labels: None; "balanced", image i of class i modulo their number, the null label left out; "3"; or "0:10", 0 to 9
    over and over. shard_size: images a shard, a multiple of batch_size; None: the one nearest below 1024, or one batch.
    The sampler's conventions, steps and eta are the `DDIM`'s, and stand beside this in the manifest.
    """

    num: int
    seed: int = 0
    method: str = "ddim"
    labels: str | None = None
    guidance_scale: float | None = None
    null_label: int | None = None
    dtype: str = "float32"
    batch_size: int = 64
    shard_size: int | None = None
    format: str = "npz"

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong; fill in shard_size."""
        problems = []
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        elif self.shard_size is None:
            object.__setattr__(self, "shard_size", max(1024 // self.batch_size, 1) * self.batch_size)
        elif self.shard_size % self.batch_size:
            problems.append(
                f"shard_size must be a multiple of the batch size {self.batch_size}, so that every batch is whole; "
                f"got {self.shard_size}"
            )
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed must lie in 0..{2**32 - 1}, got {self.seed}")
        if self.method not in METHODS:
            problems.append(f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}")
        try:
            Layout(self.num, self.shard_size or 1, self.format)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def layout(self) -> Layout:
        """How the set is cut into shards."""
        assert self.shard_size is not None
        return Layout(self.num, self.shard_size, self.format)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards says of itself.

    checkpoint: where it was, seen from the folder; it may move, and is no part of what identifies the run.
    checkpoint_sha256: `Metadata.sha256`. sampler: the conventions used. versions: of what the images' bits depend on.
    """

    checkpoint: str
    checkpoint_sha256: str
    bulk: BulkConfig
    sampler: SamplerConfig
    versions: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All that identifies the run, as JSON; every picture says it too."""
        return {
            "checkpoint_sha256": self.checkpoint_sha256,
            "bulk": to_json(self.bulk),
            "sampler": to_json(self.sampler),
            "versions": self.versions,
        }

    @property
    def run(self) -> str:
        """The run's identity: a digest of `settings`."""
        return _sha256(self.settings)

    def text(self) -> str:
        """The file's contents, whose last entry is a digest of the rest."""
        data = {"format": "jddim-bulk", "format_version": FORMAT_VERSION, "checkpoint": self.checkpoint}
        data |= self.settings
        return json.dumps({**data, "sha256": _sha256(data)}, indent=2) + "\n"

    @staticmethod
    def of(settings: Mapping[str, Any], checkpoint: str = "") -> Manifest:
        """The manifest with these `settings`. Raises ValueError or KeyError if they are none."""
        return Manifest(
            checkpoint,
            settings["checkpoint_sha256"],
            from_json(BulkConfig, settings["bulk"]),
            from_json(SamplerConfig, settings["sampler"]),
            dict(settings["versions"]),
        )


def manifest_path(folder: Path) -> Path:
    """Where a folder's manifest is."""
    return folder / "manifest.json"


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest. Raises BulkError if there is none, or a byte of it is not what was written."""
    path = manifest_path(folder)
    try:
        said = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BulkError(f"{folder} has no manifest.json: it is no folder that jddim bulk wrote") from None
    again = "remove it, and the jddim bulk command that the shards were made with writes it anew and keeps them"
    try:
        data = json.loads(said)
        if data["format_version"] != FORMAT_VERSION and data["sha256"] == _sha256(data):
            raise BulkError(f"{path} has format {data['format_version']}, this jddim reads {FORMAT_VERSION}")
        manifest = Manifest.of(data, data["checkpoint"])
    except BulkError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BulkError(f"{path} is damaged ({type(error).__name__}): {again}") from error
    if said != manifest.text().encode():
        raise BulkError(f"{path} was damaged or edited after it was written: {again}")
    return manifest


def _sha256(data: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_settings(folder: Path, asked: Manifest) -> None:
    """Raise BulkError, with what differs, unless the folder's manifest says what is asked."""
    there = read_manifest(folder)
    if there.run != asked.run:
        from jddim.diff import diff_mappings

        rows = diff_mappings(there.settings, asked.settings)
        raise BulkError(
            f"{folder} was begun with other settings: "
            + "; ".join(f"{row.name.removeprefix('bulk.')} is {row.a} there, {row.b} here" for row in rows)
            + ". Ask for what it was begun with, or name a new folder"
        )


def check_folder(folder: Path) -> None:
    """Raise BulkError if `folder`, which has no manifest, holds what is not of a set of shards."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BulkError(f"{folder} is a file; name a folder")
    strange = [p.name for p in folder.iterdir() if not p.name.startswith(("shard-", ".shard-", ".lock", ".manifest."))]
    if strange:
        raise BulkError(f"{folder} holds other things ({', '.join(sorted(strange)[:3])}); name a new folder")


@contextlib.contextmanager
def locked(folder: Path, manifest: Manifest, worker: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """The folder, with its manifest, to be written to by worker i of n, and until then by no other worker i.

    All n may be at work at once; a run that cuts the set for another number of workers may not. The locks are the
    kernel's (`flock`): they end with the process however it ends, so none is ever stale. The files `.lock*` stay.
    Raises BulkError if the folder is in use, or was begun with other settings.
    """
    i, n = worker
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        everyone = held.enter_context(_open(folder / ".lock"))
        until = time.monotonic() + PATIENCE
        if _lock(everyone, fcntl.LOCK_EX):  # alone: whoever else has come is waiting below
            for left in folder.glob(".manifest.*"):
                left.unlink()
            if manifest_path(folder).exists():
                check_settings(folder, manifest)
            else:
                check_folder(folder)
                with atomic(manifest_path(folder)) as staging:
                    staging.write_text(manifest.text())
            _write(everyone, f"{n} workers")
        while not _lock(everyone, fcntl.LOCK_SH):
            if time.monotonic() > until:
                raise BulkError(f"{folder} is in use by a run that has been beginning for {PATIENCE:.0f} s")
            time.sleep(0.02)
        if (there := _read(everyone)) != f"{n} workers":
            raise BulkError(f"{folder} is in use by a run of {there}: wait for its end, or join it as one of them")
        check_settings(folder, manifest)
        own = held.enter_context(_open(folder / f".lock-{i}-of-{n}"))
        if not _lock(own, fcntl.LOCK_EX):
            which = "" if n == 1 else f" as worker {i}/{n}"
            raise BulkError(f"{folder} is in use{which} by {_read(own) or 'another run'}: wait for its end, or stop it")
        _write(own, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield


def _open(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def _lock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(f"cannot lock {file.name} ({error.strerror}): this file system has no locks") from error
    return True


def _write(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _read(file: Any) -> str:
    file.seek(0)
    return file.read(200)


class Writer:
    """A thread that encodes and writes shards, one waiting while another is written: a slow disk slows the caller.

    `with Writer(folder, manifest) as writer: writer.put(k, images, labels)`. On leaving, what was put is written, after
    an error or Ctrl-C too. What fails in the thread is raised by the next `put`, `check` or on leaving.
    """

    def __init__(self, folder: Path, manifest: Manifest, written: Callable[[int], None] = lambda k: None):
        self._folder, self._manifest, self._written = folder, manifest, written
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="jddim-writer", daemon=True)

    def put(self, k: int, images: NDArray[np.uint8], labels: NDArray[np.int32] | None) -> None:
        """Hand over shard k; waits while one is waiting already."""
        self._hand((k, images, labels))
        self.check()

    def check(self) -> None:
        """Raise what has failed, if anything has."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hand(None)
        self._thread.join()
        if kind is None:
            self.check()

    def _hand(self, item: Any) -> None:
        while self._error is None:
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return

    def _work(self) -> None:
        try:
            settings, run, layout = self._manifest.settings, self._manifest.run, self._manifest.bulk.layout
            while (item := self._queue.get()) is not None:
                k, images, labels = item
                del item  # or it would stay until the next one comes
                shards.write(self._folder, layout, k, shards.encode(layout, k, images, labels, settings), run)
                del images
                self._written(k)
        except BaseException as error:
            self._error = error


class Done(NamedTuple):
    """What a run did: how many shards are its, how many of them were whole already, the images it made."""

    shards: int
    whole: int
    images: int


def run(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    make: Make,
    labels: NDArray[np.int32] | None = None,
    *,
    worker: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = lambda line: None,
    made: Callable[[int], None] = lambda images: None,
) -> Done:
    """Make and write what is not there and whole yet of the shards i, i + n, i + 2n, ... of worker i of n.

    make: see `Make`; it is called for every batch of a shard. labels: as `label_cycle` gives them. say: hears of each
    shard; made: is told how many images of the set were made, or found.
    Raises BulkError if the folder is in use, or holds another set; OSError if the disk is full or read-only. Then, as
    after any other end, all shards that are attested are whole.
    """
    out, bulk = Path(folder), manifest.bulk
    layout = bulk.layout
    i, n = worker
    if not 0 <= i < n:
        raise ValueError(f"worker {i}/{n}: the first of {n} is 0, the last {n - 1}")
    own = range(i, layout.count, n)
    with locked(out, manifest, worker):
        missing = []
        for k in own:
            wrong = shards.problem(out, layout, k, manifest.run)
            if wrong is None:
                made(len(layout.images(k)))
                continue
            if not wrong.endswith("is missing"):
                say(f"{wrong}; it is made again")
            shards.remove(out, layout, k)
            missing.append(k)
        with Writer(out, manifest, lambda k: say(f"{layout.path(out, k).name} written")) as writer:
            for k in missing:
                numbers, batches = layout.images(k), []
                for first in range(numbers.start, numbers.stop, bulk.batch_size):
                    batch = make(first)[: numbers.stop - first]
                    made(len(batch))
                    batches.append(batch)
                    writer.check()
                writer.put(k, np.concatenate(batches), labels_of(labels, numbers))
    return Done(len(own), len(own) - len(missing), sum(len(layout.images(k)) for k in missing))


def labels_of(cycle: NDArray[np.int32] | None, numbers: range) -> NDArray[np.int32] | None:
    """The labels of these images: image i has the i-th of the cycle, over and over."""
    return None if cycle is None else cycle[np.arange(numbers.start, numbers.stop) % len(cycle)]


def label_cycle(labels: str | None, num_classes: int | None, null_label: int | None = None) -> NDArray[np.int32] | None:
    """The labels that images take in turn: `BulkConfig.labels`, read. Raises ValueError if it says none."""
    if labels is None:
        return None
    if labels == "balanced":
        if num_classes is None:
            raise ValueError("labels balanced: this network has no classes")
        given = [label for label in range(num_classes) if label != null_label]
    else:
        try:
            low, colon, high = labels.partition(":")
            given = list(range(int(low), int(high))) if colon else [int(low)]
        except ValueError:
            given = []
    if not given:
        raise ValueError(f"labels are balanced, one number, or a range such as 0:10; got {labels!r}")
    return np.array(given, np.int32)


def null_label_of(bulk: BulkConfig, metadata: Metadata | None) -> int | None:
    """The label that means none, and so is not among the balanced."""
    return metadata.null_label if bulk.null_label is None and metadata is not None else bulk.null_label


def sampler(ddim: DDIM, bulk: BulkConfig, on_segment: Callable[[Preview], Any] | None = None) -> Make:
    """`make` for `run`: batches of `ddim`, whose conventions are the run's. on_segment: as in `DDIM.sample`."""
    import jax

    key, size = jax.random.key(bulk.seed), bulk.batch_size
    cycle = label_cycle(bulk.labels, ddim.model.config.num_classes, null_label_of(bulk, ddim.metadata))

    def make(first: int) -> NDArray[np.uint8]:
        images = ddim.sample(
            key,
            size,
            start=first,
            method=bulk.method,
            labels=labels_of(cycle, range(first, first + size)),
            guidance_scale=bulk.guidance_scale,
            null_label=bulk.null_label,
            on_segment=on_segment,
        )
        return to_uint8(images)

    return make


def sampler_on(devices: Sequence[jax.Device], ddim: DDIM, bulk: BulkConfig, worker: tuple[int, int] = (0, 1)) -> Make:
    """`make` for `run` on several devices: as many batches of worker i of n at a time, one on each.

    Every batch is computed as on one device of the kind, and those ahead are kept until they are asked for.
    """
    import jax

    from jddim.sharding import Sharded, make_mesh

    key, size, sharded = jax.random.key(bulk.seed), bulk.batch_size, Sharded(ddim, make_mesh(devices=devices))
    cycle = label_cycle(bulk.labels, ddim.model.config.num_classes, null_label_of(bulk, ddim.metadata))
    held: dict[int, NDArray[np.uint8]] = {}

    def make(first: int) -> NDArray[np.uint8]:
        if first not in held:
            firsts = following(bulk, first, len(devices), worker)
            labels = [labels_of(cycle, range(f, f + size)) for f in firsts]
            images = sharded.sample_parts(
                key,
                firsts,
                size,
                labels=None if cycle is None else np.concatenate(labels),  # type: ignore[arg-type]
                method=bulk.method,
                guidance_scale=bulk.guidance_scale,
                null_label=bulk.null_label,
            )
            held.clear()
            held.update(zip(firsts, to_uint8(images).reshape(len(firsts), size, *images.shape[1:]), strict=True))
        return held.pop(first)

    return make


def following(bulk: BulkConfig, first: int, count: int, worker: tuple[int, int] = (0, 1)) -> list[int]:
    """The first images of `count` batches that worker i of n makes from `first` on; past its last, the last again."""
    layout, firsts = bulk.layout, [first]
    while len(firsts) < count:
        k = firsts[-1] // layout.size
        after = firsts[-1] + bulk.batch_size
        if after >= layout.images(k).stop:
            after = layout.images(k + worker[1]).start if k + worker[1] < layout.count else firsts[-1]
        firsts.append(after)
    return firsts


def versions() -> dict[str, Any]:
    """What the bits of an image depend on beside the settings."""
    import jax

    from jddim import __version__, cache

    on_cpu = jax.default_backend() == "cpu"  # its kernels, and so rounding, depend on the processor's instructions
    return {
        "jddim": __version__,
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "platform": jax.default_backend(),
        "device": f"cpu {cache.processor()}" if on_cpu else jax.local_devices()[0].device_kind,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }


def problems(folder: str | os.PathLike[str]) -> list[str]:
    """What is missing or damaged in a set, by name; nothing if it is complete. Raises BulkError without a manifest."""
    out = Path(folder)
    manifest = read_manifest(out)
    layout, found = manifest.bulk.layout, []
    for k in range(layout.count):
        try:
            wrong = shards.problem(out, layout, k, manifest.run)
        except shards.OtherRunError as error:
            wrong = str(error)
        if wrong is not None:
            found.append(wrong)
    expected = {p.name for k in range(layout.count) for p in (layout.path(out, k), layout.receipt(out, k))}
    strange = sorted(p.name for p in out.glob("shard-*") if p.name not in expected)
    return found + [f"{name} is none of this set's {layout.count} shards" for name in strange]


def collect(folders: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str]) -> tuple[int, int]:
    """All images, in order, as the file that FID evaluators read: `arr_0` uint8 NHWC, and `arr_1` labels if any.

    folders: one, or what workers made into one each. Every shard is checked, and held one at a time. Returns (images,
    how many of them equal an earlier one in every pixel). Raises BulkError, naming them, if shards are missing, damaged
    or there twice, or the folders' settings differ; then nothing is written.
    """
    outs = [Path(folder) for folder in folders]
    manifest = read_manifest(outs[0])
    for other in outs[1:]:
        check_settings(other, manifest)
    layout, wrong, home = manifest.bulk.layout, [], {}
    for k in range(layout.count):
        states = {out: shards.problem(out, layout, k, manifest.run) for out in outs}
        whole = [out for out, state in states.items() if state is None]
        there = [out for out in outs if layout.path(out, k).exists() or layout.receipt(out, k).exists()]
        wrong += [f"{out}: {states[out]}" for out in there if states[out] is not None]
        if not there:
            wrong.append(f"{layout.path(outs[0], k).name} is missing")
        if len(whole) > 1:
            wrong.append(f"{layout.path(outs[0], k).name} is in {' and in '.join(map(str, whole))}")
        if whole:
            home[k] = whole[0]
    if wrong:
        raise BulkError(
            f"{len(wrong)} of {layout.count} shards: {first_few(wrong, 8)}. Run jddim bulk again, it makes them"
        )
    seen: set[bytes] = set()
    labels: list[NDArray[np.int32]] = []

    def images() -> Iterator[NDArray[np.uint8]]:
        for k in range(layout.count):
            held, own_labels = shards.read(home[k], layout, k)
            seen.update(hashlib.sha256(image.tobytes()).digest() for image in held)
            if own_labels is not None:
                labels.append(own_labels)
            yield held

    with atomic(Path(target)) as staging:
        _save_npz(staging, images(), layout.num, labels)
    return layout.num, layout.num - len(seen)


def _save_npz(path: Path, parts: Iterator[np.ndarray], num: int, labels: list[np.ndarray]) -> None:
    """What np.savez would write, with arr_0 given in parts; labels: filled as the parts are asked for."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        first = next(parts)
        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *first.shape[1:])}
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            entry.write(first.tobytes())
            for part in parts:
                entry.write(part.tobytes())
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.concatenate(labels))


class Comparison(NamedTuple):
    """An image made again beside the one that is kept: how many of its values differ, by how many of 255 at most."""

    number: int
    differing: int
    values: int
    largest: int

    def __str__(self) -> str:
        if not self.differing:
            return f"image {self.number}: identical"
        return f"image {self.number}: {self.differing} of {self.values} values differ, by at most {self.largest} of 255"


def compare(kept: NDArray[np.uint8], again: NDArray[np.uint8], index: int) -> Comparison:
    """How far `again` is from `kept`. Raises ValueError if their shapes differ."""
    if kept.shape != again.shape:
        raise ValueError(f"image {index} is kept as {kept.shape}, made again it is {again.shape}")
    apart = np.abs(kept.astype(int) - again.astype(int))
    return Comparison(index, int((apart > 0).sum()), apart.size, int(apart.max()))


def remake(make: Make, bulk: BulkConfig, index: int) -> NDArray[np.uint8]:
    """Image `index` of the set alone, `(h, w, c)`: at its place of its batch, the others of which are dropped.

    Computed alone or elsewhere in a batch it would be the same up to rounding: kernels are chosen by shape.
    """
    if not 0 <= index < bulk.num:
        raise ValueError(f"the set's images are 0..{bulk.num - 1}, got {index}")
    first = index - index % bulk.batch_size
    return make(first)[index - first]


def kept(folder: Path, manifest: Manifest, index: int) -> NDArray[np.uint8]:
    """Image `index` as it lies in the folder, `(h, w, c)`. Raises BulkError if its shard is missing or damaged."""
    bulk = manifest.bulk
    if not 0 <= index < bulk.num:
        raise ValueError(f"the set's images are 0..{bulk.num - 1}, got {index}")
    k, place = divmod(index, bulk.layout.size)
    if (wrong := shards.problem(folder, bulk.layout, k, manifest.run)) is not None:
        raise BulkError(f"{folder}: {wrong}")
    return shards.read(folder, bulk.layout, k)[0][place]
