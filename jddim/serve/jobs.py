"""Runs that share one device: a bounded queue, of whose first few each makes one call in turn.

One thread makes the calls, so that none waits for a lock while the device works; every other thread only puts runs in,
looks at how far they are, and drops them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jddim.images import to_uint8
from jddim.scale.stepping import Decoded, Run

AT_ONCE = 12
"""Runs that take turns; the others wait, first come, first served."""

FRAMES = 24
"""Steps of its way whose pictures a run keeps."""

DECODED = 4
"""The same of a run of latents: these are its previews, too. To decode an image of 256x256 takes 616 GFLOP, and a call
of DiT-XL/2 for four of them 952: eight pictures an image are about 20 calls."""

REST = 2.0
"""Seconds without a call before anything is compiled that nobody waits for: more than between two moves of a slider."""

Key = tuple[str, str, bool]
"""Of a program: the checkpoint, the method or what else is done, whether there is guidance."""


class Busy(Exception):
    """The queue is full, or closed."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A step of a run: its number from 0, the samples before it, and the x0_hat that it predicts of them, as uint8."""

    row: int
    x_t: NDArray[np.uint8]
    x0_hat: NDArray[np.uint8]


class Job:
    """A run in the queue.

    needs: its programs; ready: whether they are compiled; it is not begun before. changed: called, from the queue's
    thread, when something is new. error: what it failed with, None so far. frames: of steps spread over its way.
    """

    def __init__(
        self,
        run: Run,
        changed: Callable[[], None],
        ready: Callable[[], bool] = lambda: True,
        needs: Set[Key] = frozenset(),
    ):
        self.run, self.changed, self.ready, self.needs = run, changed, ready, needs
        self.cancelled = False
        self.finished = False
        self.error: str | None = None
        self.frames: list[Frame] = []
        self._previewed = 0
        self._most = DECODED if isinstance(run, Decoded) else FRAMES
        self._before: tuple[int, NDArray[np.uint8] | None] | None = None
        self.started: float | None = None
        self.seconds = 0.0

    def cancel(self) -> None:
        """Have it dropped before its next call."""
        self.cancelled = True

    def advance(self) -> None:
        """One call of the run, and what it leaves behind."""
        if self.started is None:
            self.started = time.perf_counter()
        try:
            self._step()
            self.finished = self.run.done == self.run.total
        except Exception as error:
            known = isinstance(error, (ValueError, ArithmeticError))
            self.error = str(error) if known else "the server failed; its terminal says how"
            self.finished = True
            if not known:
                traceback.print_exc()
        self.seconds = time.perf_counter() - self.started
        self.changed()

    def preview(self) -> NDArray[np.uint8] | None:
        """The clean images predicted last; of latents those of the last frame, once: None until there is another."""
        if not isinstance(self.run, Decoded):
            return to_uint8(self.run.x0_hat())
        before, self._previewed = self._previewed, len(self.frames)
        return self.frames[-1].x0_hat if self._previewed > before else None

    def _step(self) -> None:
        row, rows, most = self.run.row, self.run.rows, self._most
        if self._before is None and row < rows and (row == 0 or row * most // rows > (row - 1) * most // rows):
            self._before = row, to_uint8(self.run.x_t()) if row else None
        self.run.step()
        if self._before is not None and self.run.row > self._before[0]:  # for all its images
            row, x_t = self._before
            x_t = to_uint8(self.run.start()) if x_t is None else x_t
            self.frames.append(Frame(row, x_t, to_uint8(self.run.x0_hat())))
            self._before = None


class Queue:
    """`submit` jobs; `close` drops them and ends the thread. waiting: how many may wait, beside those that run."""

    def __init__(self, waiting: int = 64, at_once: int = AT_ONCE):
        self.most, self.at_once = waiting, at_once
        self._running: collections.deque[Job] = collections.deque()
        self._waiting: list[Job] = []
        self._news = threading.Condition()
        self._closed = False
        self._last = -math.inf
        self._thread = threading.Thread(target=self._work, name="jddim serve", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in. Raises Busy if too many wait already."""
        with self._news:
            self._drop()
            if self._closed:
                raise Busy("the server is stopping")
            free = max(self.at_once - len(self._running), 0)  # whose turn it is at the next call does not wait
            waiting = len(self._waiting) - min(free, sum(other.ready() for other in self._waiting))
            if waiting >= self.most:
                raise Busy(f"{waiting} runs are waiting already, the most that may; try again in a while")
            self._waiting.append(job)
            self._news.notify_all()

    def position(self, job: Job) -> int:
        """How many wait before it; -1 if it does not wait."""
        with self._news:
            self._drop()
            return self._waiting.index(job) if job in self._waiting else -1

    def counts(self) -> dict[str, int]:
        """How many run and wait."""
        with self._news:
            self._drop()
            return {"running": len(self._running), "waiting": len(self._waiting)}

    def wake(self) -> None:
        """Look again whether waiting jobs are ready."""
        with self._news:
            self._news.notify_all()

    def to_compile(self, left: Sequence[Key]) -> Key | None:
        """Which of `left` to compile next, once it is time; None if the queue is closed.

        What a job waits for is compiled at once; else the first of `left`, when nothing has run for `REST` seconds.
        """
        with self._news:
            while not self._closed:
                self._drop()
                if wanted := [need for job in self._waiting for need in job.needs if need in left]:
                    return wanted[0]
                busy = bool(self._running) or any(job.ready() for job in self._waiting)
                still = self._last + REST - time.monotonic()
                if not busy and still <= 0:
                    return left[0]
                self._news.wait(None if busy else still)
        return None

    def close(self) -> None:
        """Drop everything and wait for the call being made."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join(timeout=30)

    def _drop(self) -> None:
        self._waiting = [job for job in self._waiting if not job.cancelled]

    def _next(self) -> Job | None:
        """The job whose turn it is, no longer in the queue; None when closed."""
        with self._news:
            while not self._closed:
                self._drop()
                free = self.at_once - len(self._running)
                admitted = [job for job in self._waiting if job.ready()][: max(free, 0)]
                self._waiting = [job for job in self._waiting if job not in admitted]
                self._running.extend(admitted)
                if self._running:
                    return self._running[0]
                self._news.wait()
        return None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.cancelled:
                job.advance()
            with self._news:
                self._running.popleft()
                self._last = time.monotonic()
                if not job.cancelled and not job.finished:
                    self._running.append(job)
                self._news.notify_all()


def status(job: Job, queue: Queue) -> dict[str, Any]:
    """How far a job is, for its page."""
    position = queue.position(job)
    if position >= 0:
        return {"state": "waiting" if job.ready() else "compiling", "before": position}
    run = job.run
    return {
        "state": "running",
        "done": run.done,
        "total": run.total,
        "row": run.row,
        "rows": run.rows,
        "seconds": round(job.seconds, 3),
    }
