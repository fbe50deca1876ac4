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
    """Module -> the modules it imports anywhere in it, lazily or not (type-checking blocks aside)."""
    graph = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        skipped = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        found: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
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
    assert users == {"convert.readers", "convert.writers", "convert.verify"} | references


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("jddim.config", set()),
        ("jddim.schedule", {"config"}),
        ("jddim.timesteps", {"config"}),
        ("jddim.ddim", {"config", "schedule", "timesteps"}),
        ("jddim.sampling", {"ddim"}),
        ("jddim.denoisers", {"sampling"}),
        ("jddim.guidance", {"ddim", "sampling", "schedule"}),
        ("jddim.editing", {"ddim", "sampling"}),
        ("jddim.likelihood", {"ddim", "sampling"}),
        ("jddim.padding", {"ddim", "sampling"}),
        ("jddim.metrics", set()),
        ("jddim.timetables", {"ddim", "schedule", "timesteps"}),
        ("jddim.mnist_cnn", set()),
        ("jddim.solvers", {"config", "ddim", "sampling"}),
        ("jddim.inversion", {"config", "ddim", "sampling"}),
        ("jddim.models.layers", set()),
        ("jddim.models.unet", {"config", "models"}),
        ("jddim.checkpoint", {"card", "config", "interrupt", "models"}),
        ("jddim.card", {"config"}),
        ("jddim.lean_layers", {"models"}),
        ("jddim.winograd", set()),
        ("jddim.compiling", {"lean_layers", "winograd"}),
        ("jddim.arguments", {"config", "ddim", "sampling"}),
        ("jddim.batches", {"ddim", "progress", "sampling"}),
        (
            "jddim.programs",
            {"compiling", "config", "ddim", "denoisers", "guidance", "inversion", "models", "sampling", "solvers"},
        ),
        ("jddim.task", {"config", "ddim", "models", "schedule"}),
        (
            "jddim.objective",
            {"checkpoint", "config", "ddim", "denoisers", "models", "sampling", "schedule", "task"},
        ),
        ("jddim.training", {"checkpoint", "compiling", "config", "models", "objective", "task"}),
        ("jddim.training_data", {"config", "images", "mnist_cnn"}),
        ("jddim.images", {"interrupt"}),
        ("jddim.shards", {"config", "images"}),
        ("jddim.progress", set()),
        ("jddim.interrupt", set()),
    ],
)
def test_layers_look_downwards_only(module: str, allowed: set[str]) -> None:
    own = {name.split(".")[1] for name in JDDIM[module] if name.startswith("jddim.")}
    assert own <= allowed


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
