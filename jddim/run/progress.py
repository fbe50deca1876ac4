"""A progress bar in images, for loops driven from Python. Silent when stderr is not a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """`with Progress(num_images, "30 steps") as progress: progress.add(images_done)`.

    Until the first `add` it says that the program is compiling; the bar's images/s and time left start after it.
    """

    def __init__(self, num_images: int, label: str = "", *, enabled: bool = True):
        self.num_images = num_images
        self.label = label
        self.enabled = enabled and sys.stderr.isatty()
        self._done = 0.0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.enabled:
            print(f"compiling {self.label} ...", end="\r", file=sys.stderr, flush=True)
        return self

    def add(self, images: float) -> None:
        """Count images done; a segment of k of S steps over b images counts b * k / S."""
        self._done += images
        if not self.enabled:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.num_images,
                initial=self._done,
                desc=self.label,
                unit="image",
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
                file=sys.stderr,
            )
        else:
            self._bar.update(images)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
