"""The notebook's cells run in order, and what they claim is so; the .ipynb holds the same cells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "docs" / "notebooks" / "first_sampler.py"


def cells() -> list[tuple[str, str]]:
    """(kind, source) of each, of the py:percent format."""
    parts = re.split(r"^# %%(.*)\n", SOURCE.read_text(), flags=re.M)[1:]
    found = []
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in marker:
            found.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.M)))
        else:
            found.append(("code", body.strip()))
    return found


@pytest.mark.unoptimised  # each program runs once
def test_the_cells_run(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("ml_dtypes", reason="converting needs jddim[convert-core]")
    monkeypatch.chdir(SOURCE.parent)
    code = [source for kind, source in cells() if kind == "code"]
    assert len(code) <= 10
    names: dict = {}
    for source in code:
        exec(source, names)
    said = capsys.readouterr().out
    # jit of other programs: rounding through ten steps
    assert float(re.search(r"largest difference: (\S+)", said)[1]) < 1e-3
    assert float(re.search(r"from dpm\+\+2m: (\S+)", said)[1]) < 1e-2
    ddim, mine = (float(text) for text in re.findall(r"root mean square (\S+)", said))
    assert mine < ddim
    assert names["digits"].shape == (8, 28, 28, 1)
    assert "jddim.show(digits, columns=8)" in "".join(code)


def test_the_ipynb_holds_the_same_cells() -> None:
    notebook = json.loads(SOURCE.with_suffix(".ipynb").read_text())
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells()
    assert not any(cell.get("outputs") for cell in notebook["cells"])
