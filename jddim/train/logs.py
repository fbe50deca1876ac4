"""Where a training's figures go beside the lines it prints: log.jsonl always, log.csv and TensorBoard's files if asked.

A run that goes on from a saved step leaves out of each what came after it: they say what one undisturbed run said.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from jddim.files import atomic, parse_json, read_regular

Record = Mapping[str, float]
"""What a line says: step, images, loss, grad_norm, lr, images_per_s, seconds."""


class Log:
    """One place for records, and for pictures if it shows them. `write` comes every `log_every` steps."""

    def write(self, record: Record) -> None:
        raise NotImplementedError

    def picture(self, step: int, path: Path) -> None:
        """A grid of samples was written to `path`: nothing to do for a log of figures."""

    def close(self) -> None:
        """The run has ended: nothing to do for a log whose file is closed after each record."""


def open_logs(folder: Path, step: int, *, csv: bool, tensorboard: bool) -> list[Log]:
    """The logs of a run in `folder` that goes on after `step`."""
    lines = JsonLines(folder / "log.jsonl", step)
    logs: list[Log] = [lines]
    if csv:
        logs.append(Csv(folder / "log.csv", lines.records))
    if tensorboard:
        logs.append(TensorBoard(folder / "tensorboard", step))
    return logs


class JsonLines(Log):
    """One record a line. records: those of the file that are not after `step`."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            try:
                lines = read_regular(path).split(b"\n")[:-1]  # the last may be cut short
                self.records = [record for record in map(parse_json, lines) if record["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged: move it away, and the run goes on with a new one") from error
            with atomic(path) as staging:
                staging.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Csv(Log):
    """A table with a header; it begins with the records that log.jsonl has, whether or not there was a table before."""

    def __init__(self, path: Path, records: list[Record]):
        self.path = path
        with atomic(path) as staging:
            _append(staging, records)

    def write(self, record: Record) -> None:
        _append(self.path, [record])


def _append(path: Path, records: list[Record]) -> None:
    with path.open("a", newline="") as file:
        for record in records:
            table = csv.DictWriter(file, list(record))
            if file.tell() == 0:
                table.writeheader()
            table.writerow(record)


class TensorBoard(Log):
    """Scalars and grids for `tensorboard --logdir`, by tensorboard's own writer, which needs no TensorFlow."""

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = event_pb2, summary_pb2
        self.writer = EventFileWriter(str(folder))
        if step:  # what an earlier part wrote from the next step on is not shown
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step + 1, session_log=start)

    def write(self, record: Record) -> None:
        values = [
            self.summary.Summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"
        ]
        self._add(int(record["step"]), summary=self.summary.Summary(value=values))

    def picture(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            shown = self.summary.Summary.Image(
                height=image.height,
                width=image.width,
                colorspace=len(image.getbands()),
                encoded_image_string=buffer.getvalue(),
            )
        self._add(step, summary=self.summary.Summary(value=[self.summary.Summary.Value(tag="samples", image=shown)]))

    def close(self) -> None:
        self.writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self.writer.add_event(self.event.Event(wall_time=time.time(), step=step, **content))
        self.writer.flush()
