"""Has jddim become slower than it was? A report of scripts/bench beside an older one, as ratios to PyTorch eager.

Ratios, since both ran on machines of their own: whatever made one of them slow met jddim and torch alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

ALLOWED = 0.15
"""The loss from which on a check fails: medians on a shared machine differ by a tenth from run to run."""


class Change(NamedTuple):
    """A case measured twice. before, now: PyTorch eager's time over jddim's, the geometric mean of its two layouts."""

    case: str
    before: float
    now: float

    @property
    def lost(self) -> bool:
        """Whether jddim's share of the speed fell by more than is allowed."""
        return self.now < (1 - ALLOWED) * self.before

    def __str__(self) -> str:
        return f"{self.case}: {self.before:.2f} -> {self.now:.2f}{'  LOST' if self.lost else ''}"


def changes(stored: Mapping[str, Any], report: Mapping[str, Any]) -> list[Change]:
    """The cases that both have, on the same kind of device. Raises ValueError if there are none."""
    devices = [side["machine"]["device"] for side in (stored, report)]
    if devices[0] != devices[1]:
        raise ValueError(f"the stored table is of a {devices[0].upper()}, this run of a {devices[1].upper()}")
    before, now = _ratios(stored), _ratios(report)
    if not (both := [case for case in before if case in now]):
        raise ValueError(f"nothing to compare: stored are {', '.join(before)}; measured {', '.join(now)}")
    return [Change(case, before[case], now[case]) for case in both]


def _ratios(report: Mapping[str, Any]) -> dict[str, float]:
    ratios = {}
    for case in report["cases"]:
        eager = [row["time_over_jddim"] for row in case["rows"] if row["name"].startswith("torch") and _eager(row)]
        if eager:
            name = f"{case['title']}, {case['precision']}, batch {case['batch_size']}"
            ratios[name] = math.exp(sum(map(math.log, eager)) / len(eager))
    return ratios


def _eager(row: Mapping[str, Any]) -> bool:
    return row["name"] != "torch-compile" and "skipped" not in row
