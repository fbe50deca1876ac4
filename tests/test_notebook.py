"""The notebook's cells run in order, and what they claim is so; the .ipynb holds the same cells."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "docs" / "notebooks" / "first_sampler.py"


@pytest.fixture
def cells() -> list[tuple[str, str]]:
    spec = importlib.util.spec_from_file_location("notebook", SOURCE.parents[2] / "scripts" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cells()


def check_claims(said: str) -> None:
    # jit of other programs: rounding through ten steps
    assert float(re.search(r"largest difference: (\S+)", said)[1]) < 1e-3
    assert float(re.search(r"from dpm\+\+2m: (\S+)", said)[1]) < 1e-2
    ddim, mine = (float(text) for text in re.findall(r"root mean square (\S+)", said))
    assert mine < ddim


@pytest.mark.unoptimised  # each program runs once
def test_the_cells_run(cells, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("ml_dtypes", reason="converting needs jddim[convert-core]")
    monkeypatch.chdir(SOURCE.parent)
    code = [source for kind, source in cells if kind == "code"]
    assert len(code) <= 10
    names: dict = {}
    for source in code:
        exec(source, names)
    check_claims(capsys.readouterr().out)
    assert names["digits"].shape == (8, 28, 28, 1)
    assert "jddim.show(digits, columns=8)" in "".join(code)


def test_the_ipynb_holds_the_same_cells_and_what_they_print_and_show(cells) -> None:
    path = SOURCE.with_suffix(".ipynb")
    assert path.stat().st_size < 100_000
    notebook = json.loads(path.read_text())
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells
    outputs = [(cell, output) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert {output["output_type"] for _, output in outputs} == {"stream", "display_data"}
    said = "".join(line for _, output in outputs for line in output.get("text", []))
    check_claims(said)
    assert not re.search(r"\s/|site-packages", said)  # no folder of a machine
    pictured = ["".join(cell["source"]) for cell, output in outputs if "image/png" in output.get("data", {})]
    assert pictured == [source for kind, source in cells if kind == "code" and "jddim.show(" in source]
