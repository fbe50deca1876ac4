"""The queue: turns, bounds, cancellation, failures. With runs that only count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from jddim.images import to_uint8
from jddim.serve import jobs
from jddim.serve.jobs import FRAMES, Busy, Job, Queue, status

ZEROS = np.zeros((1, 2, 3, 1), np.float32)


class Counting:
    """A run that notes its name at each call, once its gate is open."""

    def __init__(self, name: str, total: int, calls: list[str], gate: threading.Event | None = None):
        self.name, self.total, self.calls, self.gate = name, total, calls, gate
        self.done, self.rows = 0, total

    @property
    def row(self) -> int:
        return self.done

    def step(self) -> None:
        if self.gate is not None:
            assert self.gate.wait(20)
        self.calls.append(self.name)
        self.done += 1

    def x_t(self) -> np.ndarray:
        return ZEROS + self.done / 100

    def x0_hat(self) -> np.ndarray:
        return -self.x_t()

    start = noise = x_t


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue(waiting=3, at_once=2)
    yield queue
    queue.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def quiet() -> None:
    pass


def test_runs_take_turns_and_later_ones_wait(queue: Queue) -> None:
    calls: list[str] = []
    gate = threading.Event()
    jobs = [Job(Counting(name, 3, calls, gate), quiet) for name in "ab"]
    for job in jobs:
        queue.submit(job)
    wait_for(lambda: queue.counts() == {"running": 2, "waiting": 0} or queue.counts()["waiting"] == 1)
    third = Job(Counting("c", 2, calls), quiet)
    queue.submit(third)
    gate.set()
    wait_for(lambda: third.finished)
    assert sorted(calls) == sorted("aaabbbcc")
    assert "".join(calls[:4]) in ("abab", "aaba", "aabb", "baba")  # b may have come after a's first calls
    assert calls.index("c") > calls.index("b")
    assert all(job.finished and job.error is None for job in jobs)


def test_a_full_queue_says_so_and_room_is_made_by_cancelling(queue: Queue) -> None:
    calls: list[str] = []
    gate = threading.Event()
    never = lambda: False  # noqa: E731  # its program is not compiled
    blocked = [Job(Counting("w", 1, calls), quiet, never) for _ in range(3)]
    running = Job(Counting("r", 50, calls, gate), quiet)
    queue.submit(running)
    wait_for(lambda: queue.counts()["running"] == 1)
    for job in blocked:
        queue.submit(job)
    assert [queue.position(job) for job in blocked] == [0, 1, 2]
    assert status(blocked[2], queue) == {"state": "compiling", "before": 2}
    with pytest.raises(Busy, match="3 runs are waiting already"):
        queue.submit(Job(Counting("x", 1, calls), quiet))
    blocked[0].cancel()
    late = Job(Counting("l", 1, calls), quiet)
    queue.submit(late)
    running.cancel()
    gate.set()
    wait_for(lambda: late.finished)  # overtakes those whose programs are not ready
    wait_for(lambda: queue.counts()["running"] == 0)
    assert calls.count("r") <= 1  # the call that was being made
    assert not running.finished
    assert "w" not in calls


def test_a_job_begins_once_its_program_is_there(queue: Queue) -> None:
    ready = threading.Event()
    job = Job(Counting("a", 1, []), quiet, ready.is_set)
    queue.submit(job)
    assert status(job, queue)["state"] == "compiling"
    ready.set()
    queue.wake()
    wait_for(lambda: job.finished)


def test_failures_are_the_jobs_own(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Counting):
        def step(self) -> None:
            raise {"nan": FloatingPointError("a NaN"), "bug": RuntimeError("/secret")}[self.name]

    jobs = [Job(Failing("nan", 2, []), quiet), Job(Failing("bug", 2, []), quiet), Job(Counting("ok", 2, []), quiet)]
    for job in jobs:
        queue.submit(job)
    wait_for(lambda: all(job.finished for job in jobs))
    assert [job.error for job in jobs] == ["a NaN", "the server failed; its terminal says how", None]
    assert "/secret" in capsys.readouterr().err


def test_frames_are_spread_over_the_way_and_bounded(queue: Queue) -> None:
    for total in (1, 7, 5 * FRAMES + 1):
        job = Job(Counting("a", total, []), quiet)
        queue.submit(job)
        wait_for(lambda job=job: job.finished)
        assert len(job.frames) == min(total, FRAMES)
        rows = [frame.row for frame in job.frames]
        assert rows == sorted({0, *rows})
        for frame in job.frames[1:]:  # a step's x_t, and the x0_hat that it predicts
            np.testing.assert_array_equal(frame.x_t, to_uint8(ZEROS + frame.row / 100))
            np.testing.assert_array_equal(frame.x0_hat, to_uint8(ZEROS - (frame.row + 1) / 100))


def test_a_frame_is_of_a_step_that_all_images_have_made(queue: Queue) -> None:
    class Grouped(Counting):
        @property
        def row(self) -> int:
            return self.done // 3

    run = Grouped("a", 15, [])
    run.rows = 5
    job = Job(run, quiet)
    queue.submit(job)
    wait_for(lambda: job.finished)
    assert [frame.row for frame in job.frames] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(job.frames[2].x_t, to_uint8(ZEROS + 0.06))
    np.testing.assert_array_equal(job.frames[2].x0_hat, to_uint8(ZEROS - 0.09))


def test_what_a_run_waits_for_is_compiled_first_and_the_rest_while_nothing_runs(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "REST", 0.3)
    a, b, c = (("one", part, False) for part in "abc")
    assert queue.to_compile([a, b]) == a
    waiting = Job(Counting("w", 1, []), quiet, lambda: False, {b})
    queue.submit(waiting)
    assert queue.to_compile([a, b]) == b
    waiting.cancel()
    gate, found = threading.Event(), []
    queue.submit(Job(Counting("r", 3, [], gate), quiet))
    wait_for(lambda: queue.counts()["running"] == 1)
    thread = threading.Thread(target=lambda: found.append((queue.to_compile([a, b]), time.monotonic())))
    thread.start()
    time.sleep(0.1)
    assert not found
    released = time.monotonic()
    gate.set()
    thread.join(20)
    assert found[0][0] == a
    assert found[0][1] - released >= 0.3
    queue.close()
    assert queue.to_compile([c]) is None


def test_closed_it_takes_nothing() -> None:
    queue = Queue()
    queue.close()
    with pytest.raises(Busy, match="stopping"):
        queue.submit(Job(Counting("a", 1, []), quiet))
