"""scripts/bench --check: what counts as a loss."""

import json
from pathlib import Path

import pytest

from scripts.regression import changes

ROOT = Path(__file__).parents[2]


def report(ratios: dict[str, float], device: str = "cpu", batch: int = 16) -> dict:
    rows = [{"name": name, "time_over_jddim": ratio} for name, ratio in ratios.items()]
    rows.append({"name": "diffusers", "skipped": "not installed"})
    case = {"title": "MNIST", "precision": "float32", "batch_size": batch, "rows": rows}
    return {"machine": {"device": device}, "cases": [case]}


@pytest.mark.parametrize(
    ("torch", "nhwc", "lost"), [(0.85, 1.0, False), (0.84, 0.84, True), (0.7, 1.0, True), (2, 2, False)]
)
def test_a_loss_is_of_the_mean_over_layouts_against_eager_alone(torch: float, nhwc: float, lost: bool) -> None:
    now = report({"jddim": 1.0, "torch": torch, "torch-nhwc": nhwc, "torch-compile": 0.1})
    (change,) = changes(report({"jddim": 1.0, "torch": 1.0, "torch-nhwc": 1.0, "torch-compile": 1.0}), now)
    assert change.lost is lost
    assert change.now == pytest.approx((torch * nhwc) ** 0.5)
    assert str(change).startswith("MNIST, float32, batch 16: 1.00 -> ")
    assert str(change).endswith("LOST") is lost


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="the stored table is of a GPU, this run of a CPU"):
        changes(report({"torch": 1.0}, "gpu"), report({"torch": 1.0}))
    with pytest.raises(ValueError, match=r"stored are MNIST, float32, batch 16; measured MNIST, float32, batch 4"):
        changes(report({"torch": 1.0}), report({"torch": 1.0}, batch=4))


def test_the_stored_table_is_one_and_has_lost_nothing_to_itself() -> None:
    stored = json.loads((ROOT / "scripts" / "assets" / "bench.json").read_text())
    found = changes(stored, stored)
    assert len(found) >= 3
    assert not any(change.lost for change in found)
