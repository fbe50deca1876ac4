"""The site is whole: each page in a toctree, each public name in the reference, and pages import public modules.

`scripts/docs` builds it, in .github/workflows/ci.yml; Sphinx is not installed where the suite runs.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import jddim
from jddim import config
from jddim.cli.main import GROUPS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = (DOCS / "index.md").read_text()
PAGES = sorted(DOCS.rglob("*.md"))
PUBLIC = (
    "ddim",
    "sampling",
    "schedule",
    "timesteps",
    "timetables",
    "denoisers",
    "guidance",
    "solvers",
    "inversion",
    "editing",
    "restoration",
    "compat.diffusers_flax",
)


def test_each_page_is_in_one_toctree_and_nothing_else_is() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S)]
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


def test_the_reference_has_what_is_public_and_nothing_else() -> None:
    pages = {path.stem: path.read_text() for path in (DOCS / "reference").glob("*.md")}
    of_module = {name.rpartition(".")[2]: name for name in (*PUBLIC, "config")}
    assert pages.keys() == {"jddim", "conversion", *of_module}
    for page, name in of_module.items():
        assert re.findall(r"automodule:: ([\w.]+)", pages[page]) == [f"jddim.{name}"]
    listed = re.findall(r"\]\(reference/(\w+)\.md\)", (DOCS / "reference.md").read_text())
    assert listed == ["jddim", "conversion", *of_module]
    text = pages["jddim"]
    alone = re.findall(r"auto(?:class|data|function):: jddim\.(\w+)", text + pages["conversion"])
    alone = [name for name in alone if name != "models"]  # of a module that is not public: what a function returns
    elsewhere = [name for name, module in jddim._HOME.items() if module not in (*PUBLIC, "config")]
    assert sorted(alone) == sorted(elsewhere)  # each flat name is described once
    rows = re.findall(r"^\| \[jddim\.(\w+)\]\((\w+)\.md\) \| (.*) \|$", text, re.M)
    assert all(module == page for module, page, _ in rows)
    named = {name: module for module, _, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert named == {name: module for name, module in jddim._HOME.items() if name not in elsewhere}
    shown = re.search(r"jddim.config\n   :members: (.*)", pages["config"])[1].split(", ")
    assert shown == [name for name, value in vars(config).items() if dataclasses.is_dataclass(value)]


def test_the_pages_of_commands_are_the_groups_of_commands() -> None:
    pages = {path.stem: path.read_text() for path in (DOCS / "commands").glob("*.md")}
    assert {re.search(r"jddim-commands:: (\w+)", text)[1]: name for name, text in pages.items()} == {
        group: group.lower() for group in GROUPS
    }


def test_the_first_pages_command_is_the_readmes() -> None:
    (line,) = re.findall(r"```sh\n(.*)\n```", INDEX)
    assert f"\n{line}  #" in (ROOT / "README.md").read_text()


PYTHON = [ROOT / "README.md", *PAGES, DOCS / "notebooks" / "first_sampler.py"]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_imports_what_is_public_or_says_that_it_is_not(path: Path) -> None:
    text = path.read_text()
    blocks = [text] if path.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        lines = block.splitlines()
        for node in ast.walk(ast.parse(block)):
            for module in _modules(node):
                said = "# internal" in lines[node.lineno - 1]
                assert said != _is_public(module), (module, lines[node.lineno - 1])


def _modules(node: ast.AST) -> list[str]:
    """The modules of ours that a statement imports, or imports from."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        from_jddim = node.module == "jddim"
        found = [f"jddim.{alias.name}" for alias in node.names] if from_jddim else [node.module or ""]
    else:
        found = []
    return [name for name in found if name.split(".")[0] in ("jddim", "convert")]


def _is_public(module: str) -> bool:
    name = module.removeprefix("jddim.")
    return module == "jddim" or name in PUBLIC or name in jddim._HOME


@pytest.mark.parametrize("page", ["changelog", "contributing"])
def test_what_is_included_is_there(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    (name,) = re.findall(r"\{include\} (.*)", text)
    assert (DOCS / name).is_file()


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
