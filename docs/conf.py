"""The documentation site: MyST Markdown that GitHub shows as well, and a reference made from docstrings.

`scripts/docs` builds it. The pages' Python is run by tests/test_readme.py and test_tutorials.py, the notebook's by
test_notebook.py; JDDIM_DOCS_EXECUTE=force runs the notebook while building, for its pictures.
"""

import argparse
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, whatever else is installed

import jddim  # noqa: E402

project = "jddim"
author = copyright = "The jddim authors"
version = release = jddim.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "notebooks/*.py"]
nitpicky = False  # types in signatures name jax, flax and NumPy, whose inventories need a network

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("JDDIM_DOCS_EXECUTE", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

linkcheck_ignore = [r"^https?://(localhost|127\.0\.0\.1)"]

html_theme = "sphinx_book_theme"
html_title = f"jddim {release}"
html_copy_source = False


def _as_written(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in it, not reStructuredText: nothing else in them is markup."""
    shown = []
    for text in "\n".join(lines).split("\n\n"):
        items = re.split(r"\n(?=\S)", text)
        if text.lstrip().startswith(">>>"):
            shown.append(text)
        elif not re.search(r"^ {2,}\S", text, re.M):
            shown.append(_escaped(text))
        elif all(re.match(r"[\w.*`,; ()-]+: ", item) for item in items):  # names, each with a hanging explanation
            shown.append("\n".join(f"* {_escaped(item)}" for item in items))
        else:  # a table or a formula: as it stands
            shown.append("::\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    lines[:] = "\n\n".join(shown).split("\n")


def _escaped(text: str) -> str:
    parts = re.sub(r"\s*\n\s*", " ", text.strip()).split("`")
    if len(parts) % 2 == 0:  # a backtick that is no pair
        parts = [" ".join(parts)]
    return "".join(
        f"\\ ``{part}``\\ " if i % 2 else re.sub(r"([\\*|_])", r"\\\1", part) for i, part in enumerate(parts) if part
    )


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: object, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """Types as the source has them: `ArrayLike`, not the union that it stands for."""
    if what not in ("function", "method"):
        return None
    written = inspect.signature(obj)
    parameters = [p for p in written.parameters.values() if p.name not in ("self", "cls")]
    arguments, _, result = stringify_signature(written.replace(parameters=parameters)).rpartition(" -> ")
    return (arguments, result) if arguments else (result, "")


def _inside(app: Sphinx, docname: str, content: list[str]) -> None:
    """Links that lead out of docs/ on GitHub, to pages that are part of the site."""
    up = "../" * (docname.count("/") + 1)
    for outside in ("CHANGELOG", "CONTRIBUTING"):
        content[0] = content[0].replace(f"]({up}{outside}.md)", f"]({up[3:]}{outside.lower()}.md)")


def _skipped(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """A NamedTuple's fields are described by its class."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


class Commands(Directive):
    """`--help` of every command, as the parser prints it."""

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "100"
        from jddim.cli.main import GROUPS, _parser

        parser = _parser()
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        found: list[nodes.Node] = [nodes.literal_block("", parser.format_help(), language="text")]
        for group, names in GROUPS.items():
            outer = nodes.section(ids=[f"group-{group.lower()}"], names=[group])
            outer += nodes.title("", group)
            for name in names:
                section = nodes.section(ids=[f"jddim-{name}"], names=[f"jddim {name}"])
                section += nodes.title("", f"jddim {name}")
                section += nodes.literal_block("", commands.choices[name].format_help(), language="text")
                outer += section
            found.append(outer)
        return found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _inside)
    app.connect("autodoc-process-docstring", _as_written)
    app.connect("autodoc-skip-member", _skipped)
    app.add_directive("jddim-commands", Commands)
