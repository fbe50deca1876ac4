"""The import graph: jddim never imports torch or convert, layers do not look upwards, nothing goes round."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jddim

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent


def imports(package: str) -> dict[str, set[str]]:
    """Module -> the modules it imports anywhere in it, lazily or not, for type checking alone or not."""
    graph = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = found
    return graph


JDDIM, CONVERT = imports("jddim"), imports("convert")


def test_jddim_never_imports_torch_and_only_the_cli_knows_convert() -> None:
    for module, found in JDDIM.items():
        tops = {name.partition(".")[0] for name in found}
        if module == "jddim.cli.convert":  # lazily, for `jddim convert`; it says what to install
            continue
        assert not tops & {"torch", "convert", "safetensors", "yaml"}, module


def test_torch_is_imported_where_it_is_meant_to_be() -> None:
    users = {module for module, found in CONVERT.items() if any(name.partition(".")[0] == "torch" for name in found)}
    references = {module for module in CONVERT if module.startswith("convert.reference.")}
    assert users == {"convert.files.readers", "convert.writers", "convert.verify"} | references


ROOMS = (
    *("__main__", "cli", "serve", "bulk", "train", "scale", "pipeline", "run"),
    *("editing", "inversion", "guidance", "solvers", "denoisers", "likelihood", "sampling", "timetables"),
    *("evaluate", "checkpoint", "images", "ddim", "schedule", "timesteps", "models", "config", "interrupt"),
)
"""From the top of the house to its ground: a room may import what stands after it, never what stands before."""

PURE = ("ddim", "schedule", "timesteps", "timetables", "denoisers", "guidance", "solvers", "inversion", "editing")
FILES = {"cli", "serve", "bulk", "train", "scale", "pipeline", "run", "checkpoint", "images", "evaluate", "interrupt"}


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_rooms_are_these() -> None:
    there = {room(module) for module in JDDIM if module != "jddim"}
    assert there == set(ROOMS)
    assert len(there - {"__main__"}) <= 34


@pytest.mark.parametrize("module", sorted(JDDIM.keys() - {"jddim"}))
def test_imports_go_down_the_house(module: str) -> None:
    names = {name for name in JDDIM[module] if name.startswith("jddim.") and name in JDDIM}
    up = {name for name in names if ROOMS.index(room(name)) < ROOMS.index(room(module))}
    assert not up, f"{module} looks up at {up}"
    if room(module) in PURE:
        assert not {room(name) for name in names} & FILES, "maths knows no files and no programs"


@pytest.mark.parametrize("graph", [JDDIM, CONVERT], ids=["jddim", "convert"])
def test_no_circles(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for name in graph[module] & graph.keys() - {module}:
                # a package's __init__ re-exports its members; members name siblings, not it
                if not module.startswith(f"{name}."):
                    visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_public_name_is_there_at_run_time_and_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "jddim" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {(node.names[0].name, node.module) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert typed == {(name, f"jddim.{module}") for name, module in jddim._HOME.items()}
    for name, _ in typed:
        assert name in dir(jddim)
        assert getattr(jddim, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = jddim.nothing


def test_importing_jddim_is_light_and_torch_free() -> None:
    code = (
        "import sys, jddim; heavy = {'jax', 'flax', 'torch', 'PIL', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; jddim.load; assert 'torch' not in sys.modules and 'convert' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
