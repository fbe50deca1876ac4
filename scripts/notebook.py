"""Writes docs/notebooks/first_sampler.ipynb: the cells of first_sampler.py, run, with what they print and show.

`python scripts/notebook.py` takes a minute and needs jddim[docs].
"""

from __future__ import annotations

import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "first_sampler.py"


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


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    book = nbformat.v4.new_notebook(cells=[made[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(cells())])
    where = {"metadata": {"path": SOURCE.parent}}
    NotebookClient(book, record_timing=False, coalesce_streams=True, resources=where).execute(cwd=SOURCE.parent)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # the picture is there as a PNG
            if "text" in output:  # without the folders of this machine
                output.text = re.sub(r"/\S*/(?=scripts/assets/|mnist\n)", "", output.text)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(book, SOURCE.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
