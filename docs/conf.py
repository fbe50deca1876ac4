"""The documentation site: MyST Markdown that GitHub shows as well, and a reference made from docstrings.

`scripts/docs` builds it. The pages' Python is run by tests/test_readme.py and test_tutorials.py, the notebook's by
test_notebook.py; the notebook's outputs are those that its file holds.
"""

import argparse
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any, get_overloads, is_typeddict

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import desc, desc_content
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

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
nb_execution_mode = "off"
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90

linkcheck_ignore = [r"^https?://(localhost|127\.0\.0\.1)"]

html_theme = "sphinx_book_theme"
html_title = f"jddim {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navbar_persistent": []}  # the search that stands in the sidebar is enough


def _as_written(app: Sphinx, what: str, name: str, obj: Any, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in it, not reStructuredText: nothing else in them is markup."""
    shown = []
    if is_typeddict(obj):
        lines += ["", ", ".join(f"`{key}: {kind.__forward_arg__}`" for key, kind in obj.__annotations__.items())]
    overloads = [inspect.signature(one) for one in get_overloads(obj)] if what in ("function", "method") else []
    for one in overloads:  # what tells them apart, and what each returns
        told = [p for p in one.parameters.values() if len({o.parameters[p.name].annotation for o in overloads}) > 1]
        lines += ["", f"`{', '.join(map(str, told))}` returns `{one.return_annotation}`.".replace("'", "")]
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
    if what == "class":
        obj = vars(obj).get("__init__") or vars(obj).get("__new__")
    if signature is None or obj is None or what not in ("function", "method", "class"):
        return None
    written = inspect.signature(obj)
    parameters = [p for p in written.parameters.values() if p.name not in ("self", "cls", "_cls")]
    if [p.name for p in parameters] == ["args", "kwargs"]:  # a protocol's
        return "", ""
    if what == "class":
        written = written.replace(return_annotation=inspect.Signature.empty)
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


def _without_overloads(app: Sphinx) -> None:
    """A function with overloads is shown as it is defined, with all its options; `_as_written` tells of them."""
    for name in (*jddim._MODULES, "pipeline"):
        analyzer = ModuleAnalyzer.for_module(f"jddim.{name}")
        analyzer.analyze()
        analyzer.overloads.clear()


def _listed(app: Sphinx, page: nodes.document) -> None:
    """Before the first description on a page, links to all of them, each with its first sentence."""
    top = [found for found in page.findall(desc) if not isinstance(found.parent, desc_content)]
    descriptions = [found for found in page.findall(desc) if found in top or found["objtype"] == "method"]
    links = nodes.bullet_list()
    for found in descriptions:
        signature, told = found[0], found[-1].next_node(nodes.paragraph)
        name = nodes.literal("", signature["fullname"])
        link = nodes.reference("", "", name, internal=True, refid=signature["ids"][0])
        sentence = re.split(r"\.(?= [A-Z]|$)", told.astext() if told else "")[0]
        links += nodes.list_item("", nodes.paragraph("", "", link, nodes.Text(f" {sentence}")))
    if top:
        top[0].parent.insert(top[0].parent.index(top[0]), links)


def _math(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, which browsers show without a script from elsewhere."""
    block = isinstance(node, nodes.math_block)
    # docutils would set the index of `\bar x_t` below the x, as if it were a limit
    written = re.sub(r"(\\(?:bar|hat)\s*(?:\\[a-z]+|\w))_", r"{\1{}}_", node.astext())
    try:
        # a bar that is an accent touches its letter where a browser has no font for mathematics
        formula = tex2mathml(written, as_block=block).replace(' accent="true"', "")
    except MathError as error:
        getLogger(__name__).warning("%s: %s", error, node.astext(), location=node)
        formula = self.encode(node.astext())
    self.body.append(f'<div class="formula">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


class Commands(Directive):
    """What `jddim --help` prints, or `--help` of every command of a group."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "100"
        from jddim.cli.main import GROUPS, _parser

        parser = _parser()
        if not self.arguments:
            return [nodes.literal_block("", parser.format_help(), language="text")]
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        found: list[nodes.Node] = []
        for name in GROUPS[self.arguments[0]]:
            section = nodes.section(ids=[f"jddim-{name}"], names=[f"jddim {name}"])
            section += nodes.title("", f"jddim {name}")
            section += nodes.literal_block("", commands.choices[name].format_help(), language="text")
            found.append(section)
        return found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("builder-inited", _without_overloads)
    app.connect("doctree-read", _listed)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _inside)
    app.connect("autodoc-process-docstring", _as_written)
    app.connect("autodoc-skip-member", _skipped)
    app.add_directive("jddim-commands", Commands)
