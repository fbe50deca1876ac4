"""The site is whole: each page in a toctree, each public name in the reference, what is included is there.

`scripts/docs` builds it, in .github/workflows/ci.yml; Sphinx is not installed where the suite runs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import jddim

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = (DOCS / "index.md").read_text()


def test_each_page_is_in_one_toctree_and_nothing_else_is() -> None:
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.S)
    listed = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    there = [
        str(path.relative_to(DOCS).with_suffix(""))
        for path in DOCS.rglob("*")
        if path.suffix in (".md", ".ipynb") and "_build" not in path.parts and path.name != "index.md"
    ]
    assert sorted(listed) == sorted(there)


def test_the_index_names_each_section_of_the_site() -> None:
    captions = re.findall(r":caption: (.*)", INDEX)
    assert captions == ["Start", "Tutorials", "How-to", "Explanation", "Reference", "Results", "Project"]
    for page in re.findall(r"\]\(((?!http)[^)]+)\)", INDEX):
        assert (DOCS / page).is_file(), page


def test_the_reference_names_modules_once_that_are_there() -> None:
    listed = re.findall(r"automodule:: ([\w.]+)", (DOCS / "reference.md").read_text())
    assert len(listed) == len(set(listed)) > 30
    for name in listed:  # conf.py adds those that are not placed
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
    assert {f"jddim.{module}" for module in jddim._HOME.values()} <= set(listed)


@pytest.mark.parametrize("page", ["start", "benchmarks", "changelog", "contributing"])
def test_what_is_included_is_there_once(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    (name,) = re.findall(r"\{include\} (.*)", text)
    included = (DOCS / name).read_text()
    ends = [included.index(ast.literal_eval(mark)) for mark in re.findall(r":(?:start-after|end-before): (.*)", text)]
    assert ends == sorted(ends)
    for mark in re.findall(r":(?:start-after|end-before): (.*)", text):
        assert included.count(ast.literal_eval(mark)) == 1, mark


def test_the_settings_compile_and_need_what_the_extra_has() -> None:
    tree = ast.parse((DOCS / "conf.py").read_text())
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    project = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^docs = \[(.*)\]$", project, re.M)
    for needed in [ast.literal_eval(values["html_theme"]), *ast.literal_eval(values["extensions"])]:
        package = needed.split(".")[0].replace("_", "-")
        assert f'"{package}>=' in extra, needed
