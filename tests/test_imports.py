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
        folder = path.relative_to(ROOT).parts[:-1]
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = folder[: len(folder) + 1 - node.level] if node.level else ()
                source = ".".join([*above, *([node.module] if node.module else [])])
                found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        graph[name] = found
    return graph


JDDIM, CONVERT = imports("jddim"), imports("convert")


def test_jddim_never_imports_torch_nor_convert() -> None:
    for module, found in JDDIM.items():
        tops = {name.partition(".")[0] for name in found}
        assert not tops & {"torch", "convert", "safetensors", "yaml"}, module


def test_only_converting_knows_the_package_convert() -> None:
    """It finds the package by its place; other modules import none by a name that they work out."""
    texts = {path: path.read_text() for path in (ROOT / "jddim").rglob("*.py")}
    users = {path.stem for path, text in texts.items() if "import_module(" in text or "__import__(" in text}
    assert users == {"__init__", "converting"}


def test_imports_within_convert_are_relative() -> None:
    """So that `jddim.converting` can import it by another name, where `convert` is another module's."""
    for path in (ROOT / "convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.partition(".")[0] == "convert" for name in names), path


def test_torch_is_imported_where_it_is_meant_to_be() -> None:
    users = {module for module, found in CONVERT.items() if any(name.partition(".")[0] == "torch" for name in found)}
    references = {module for module in CONVERT if module.startswith("convert.reference.")}
    assert users == {"convert.writers", "convert.verify"} | references


ROOMS = (
    *("__main__", "cli", "serve", "bulk", "train", "scale", "compat", "pipeline", "resolving", "converting", "run"),
    *("editing", "restoration", "inversion", "guidance", "solvers", "denoisers"),
    *("likelihood", "sampling", "timetables"),
    *("evaluate", "checkpoint", "images", "ddim", "schedule", "timesteps", "models", "config", "files", "interrupt"),
    *("curve", "installing", "known"),
)
"""From the top of the house to its ground: a room may import what stands after it, never what stands before."""

PURE = (
    *("ddim", "schedule", "timesteps", "timetables", "denoisers", "guidance", "solvers", "inversion"),
    *("editing", "restoration"),
)
FILES = {"cli", "serve", "bulk", "train", "scale", "pipeline", "resolving", "converting", "run"}
FILES |= {"checkpoint", "images", "evaluate", "files", "interrupt"}


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
    modules = {(name, "jddim") for name in jddim._MODULES}
    assert typed == modules | {(name, f"jddim.{module}") for name, module in jddim._HOME.items()}
    assert jddim.__all__ == sorted(name for name, _ in typed)
    for name in jddim.__all__:
        assert getattr(jddim, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = jddim.nothing


def test_public_are_the_names_of_all_and_no_others() -> None:
    code = """
import jddim
names = [name for name in dir(jddim) if not name.startswith("__")]
assert names == sorted(set(names)) == jddim.__all__, names
assert {"load", "convert", "ddim", "editing"} <= set(names)
assert not {"Any", "TYPE_CHECKING", "import_module"} & set(names)
import pydoc
text = pydoc.render_doc(jddim, renderer=pydoc.plaintext)
assert "load(" in text and "class DDIM" in text  # newer Pythons break a signature into lines
from jddim import *
assert load is jddim.load and "ddim" in globals()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_modules_are_there_without_an_import_of_their_own() -> None:
    for name in jddim._MODULES:  # by the function: once any code has imported a module, it is an attribute anyway
        assert jddim.__getattr__(name).__name__ == f"jddim.{name}"
    subprocess.run([sys.executable, "-c", "import jddim; jddim.editing.slerp"], check=True, cwd=ROOT)


def test_importing_jddim_is_light_and_torch_free() -> None:
    code = (
        "import sys, jddim; heavy = {'jax', 'flax', 'torch', 'PIL', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; jddim.load; assert 'torch' not in sys.modules and 'convert' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
