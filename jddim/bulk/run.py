"""Many images into a folder of shards, by one run or by several at once, stopped and gone on with at will.

`run` asks a function for batches and writes them; it knows no network (`sampler` makes that function of a `DDIM`). The
folder's manifest says what was asked. Whatever ends a run (SIGKILL included), the same call again completes the set,
and the images are those of a run that nothing disturbed: image i depends on (seed, i) alone, and each batch of the set
is always computed as it is here, in the same place of a batch of the same size.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jddim.bulk import shards
from jddim.bulk.lock import locked
from jddim.bulk.manifest import BulkConfig, Manifest
from jddim.images import to_uint8
from jddim.run import batches, plan
from jddim.run.request import RequestError

if TYPE_CHECKING:
    import jax

    from jddim.pipeline import DDIM
    from jddim.run.batches import Preview

Make = Callable[[int], NDArray[np.uint8]]
"""`make(first)` -> images first..first+batch_size-1 of the seed, uint8 `(batch_size, h, w, c)`."""


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
    labels: Callable[[range], NDArray[np.int32] | None] = lambda numbers: None,
    *,
    worker: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = lambda line: None,
    made: Callable[[int], None] = lambda images: None,
) -> Done:
    """Make and write what is not there and whole yet of the shards i, i + n, i + 2n, ... of worker i of n.

    make: see `Make`; it is called for every batch of a shard. labels: those of the images with these numbers
    (`labels_of`). say: hears of each shard; made: is told how many images of the set were made, or found.
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
            if layout.path(out, k).exists() or layout.receipt(out, k).exists():
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
                writer.put(k, np.concatenate(batches), labels(numbers))
    return Done(len(own), len(own) - len(missing), sum(len(layout.images(k)) for k in missing))


def labels_of(ddim: DDIM, bulk: BulkConfig, numbers: range) -> NDArray[np.int32] | None:
    """The labels of these images of the set. Raises RequestError if the request's text says none."""
    labels, problems = plan.labels_of(ddim, bulk.request, np.array(numbers))
    if problems:
        raise RequestError(problems, "bulk")
    return labels


def sampler(
    ddim: DDIM,
    bulk: BulkConfig,
    condition: NDArray[np.float32] | None = None,
    on_segment: Callable[[Preview], object] | None = None,
) -> Make:
    """`make` for `run`: batches of `ddim`, whose conventions are the run's.

    condition: the set's images beside x_t, one each, or one for all. on_segment: as in `DDIM.sample`.
    """
    import jax

    key, size = jax.random.key(bulk.request.seed), bulk.batch_size

    def make(first: int) -> NDArray[np.uint8]:
        numbers = np.arange(first, first + size)
        inputs = plan.Inputs(key, numbers=numbers.astype(np.uint32), condition=_rows(condition, numbers))
        return to_uint8(
            batches.run(plan.plan(ddim, bulk.request, inputs, size).check("bulk"), on_segment=on_segment)[0]
        )

    return make


def sampler_on(
    devices: Sequence[jax.Device],
    ddim: DDIM,
    bulk: BulkConfig,
    condition: NDArray[np.float32] | None = None,
    worker: tuple[int, int] = (0, 1),
) -> Make:
    """`make` for `run` on several devices: as many batches of worker i of n at a time, one on each.

    condition: as in `sampler`. Every batch is computed as on one device of the kind, and those ahead are kept until
    they are asked for.
    """
    import jax

    from jddim.scale.sharding import Sharded, make_mesh

    key, size = jax.random.key(bulk.request.seed), bulk.batch_size
    sharded = Sharded(ddim, make_mesh(devices=devices))
    held: dict[int, NDArray[np.uint8]] = {}

    def make(first: int) -> NDArray[np.uint8]:
        if first not in held:
            firsts = following(bulk, first, len(devices), worker)
            numbers = np.concatenate([np.arange(f, f + size) for f in firsts])
            images = sharded.sample_request(bulk.request, key, firsts, size, condition=_rows(condition, numbers))
            held.clear()
            held.update(zip(firsts, to_uint8(images).reshape(len(firsts), size, *images.shape[1:]), strict=True))
        return held.pop(first)

    return make


def _rows(condition: NDArray[np.float32] | None, numbers: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """The condition of each of these images; the last's for what a last batch makes beyond the set."""
    return None if condition is None else condition[np.minimum(numbers, len(condition) - 1)]


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

    from jddim import __version__
    from jddim.run import cache

    on_cpu = jax.default_backend() == "cpu"  # its kernels, and so rounding, depend on the processor's instructions
    return {
        "jddim": __version__,
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "platform": jax.default_backend(),
        "device": f"cpu {cache.processor()}" if on_cpu else jax.local_devices()[0].device_kind,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }
