"""No public function hides what it takes or returns behind `Any`, read from the source."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import jddim
from jddim.config import SamplerConfig
from jddim.pipeline import Conventions

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent / "jddim"


def is_any(annotation: ast.expr | None) -> bool:
    """`Any` alone, as a string, or as one of a union; not `list[Any]`."""
    match annotation:
        case ast.Constant(value=str(text)):
            return is_any(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            return is_any(left) or is_any(right)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name == "Any"
        case ast.Subscript(value=ast.Name(id="Optional" | "Union"), slice=part):
            return any(map(is_any, part.elts if isinstance(part, ast.Tuple) else [part]))
    return False


def functions(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The public functions of a module, and the public methods of its public classes (`C.method`)."""
    for node in body:
        special = isinstance(node, ast.FunctionDef) and node.name.startswith("__")
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and (special or not node.name.startswith("_")):
            if isinstance(node, ast.ClassDef):
                yield from functions(node.body, f"{within}{node.name}.")
            else:
                yield f"{within}{node.name}", node


def hidden(text: str) -> set[str]:
    """The public functions with a parameter or result that is `Any`."""
    found = set()
    for name, node in functions(ast.parse(text).body):
        a = node.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(each for each in (a.vararg, a.kwarg) if each)]
        if any(map(is_any, [node.returns, *(each.annotation for each in given)])):
            found.add(name)
    return found


def test_what_is_looked_for_is_found() -> None:
    for signature in ("x: Any", "*x: Any", "*, x: int | Any", "**x: 'Any'", "x: typing.Any", "x: Optional[Any]"):
        assert hidden(f"class C:\n def f(self, {signature}) -> int: ...") == {"C.f"}, signature
    assert hidden("def f() -> Any: ...") == {"f"}
    assert not hidden(
        "def f(x: list[Any]) -> dict[str, Any]: ...\ndef _f(x: Any): ...\nclass _C:\n def f(self: Any): ..."
    )


@pytest.mark.parametrize("module", jddim._MODULES)
def test_public_modules_say_their_types(module: str) -> None:
    assert not hidden((ROOT / f"{module}.py").read_text())


@pytest.mark.parametrize("module", sorted(set(jddim._HOME.values()) - set(jddim._MODULES)))
def test_public_names_say_their_types(module: str) -> None:
    names = {name for name, home in jddim._HOME.items() if home == module}
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert not {name for name in hidden(path.read_text()) if name.partition(".")[0] in names}


def test_with_sampler_takes_the_fields_of_the_sampler_config() -> None:
    assert typing.get_type_hints(Conventions) == typing.get_type_hints(SamplerConfig)
