"""The documentation as a site: `sphinx-build -W -c docs . build/site`.

The top of the site is the top of the repository, so that links between pages and to files are the same on a forge.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import tables  # noqa: E402

project = "surgeon"
author = "the authors of surgeon"
html_title = "surgeon"
root_doc = "README"
include_patterns = [
    "README.md", "docs/**.md", "examples/surgery.ipynb", "examples/**/README.md", "CHANGELOG.md", "CONTRIBUTING.md",
]  # fmt: skip
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"  # a notebook has its outputs

# From the top of the repository.
NAVIGATION = {
    "Start": "docs/README docs/tutorial examples/surgery",
    "How to": """docs/own-model docs/own-data docs/choose docs/compare docs/hugging-face docs/engines docs/training
        docs/passes""",
    "Reference": """docs/cli docs/commands docs/passes-reference docs/options docs/api/README docs/api/measure
        docs/api/passes docs/refusals docs/files""",
    "Explanation": "docs/concepts docs/method docs/quality docs/speed docs/limits",
    "Studies": """examples/frontier/README examples/frontier/results/README examples/speed/README
        examples/compiled/README""",
    "The project": "CHANGELOG CONTRIBUTING",
}
# A comment on a page, and the table that stands in its place in the site.
TABLES = {"<!-- every command -->": tables.commands, "<!-- every option -->": tables.options}

# A name of the package, which is no file.
NAME = re.compile(r"surgeon(\.(?!json|mplstyle)\w+)+")
FIELD = re.compile(r"(?!Args|Returns|Raises)\w+(, \w+)*: \S")

# What makes a browser load a file, in pages and in style sheets.
LOADS = {
    ".html": re.compile(
        r"<(?:script|img|iframe|link(?! rel=\"(?:canonical|next|prev)))[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>"
    ),
    ".css": re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*"),
}
LOG = logging.getLogger(__name__)

# Markdown as a forge reads it.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
highlight_language = "text"
smartquotes = False  # it would make one dash of the two of an option

# Docstrings name code in single backticks. Names of the package have to be on one of the pages.
default_role = "py:obj"
nitpicky = True
# Names of schemas, such as surgeon.inspect.v1, are none of Python.
nitpick_ignore_regex = [("py:(?!obj).*", ".*"), ("py:obj", r"(?!surgeon\.).*|.*\.v\d")]
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_ivar = True

# Nothing comes from the network: no fonts, no scripts.
html_theme = "furo"
html_static_path = ["assets"]
html_css_files = ["site.css"]
html_favicon = "assets/icon.svg"
html_extra_path = ["assets/index.html"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00695c", "color-brand-content": "#00695c"},
    "dark_css_variables": {"color-brand-primary": "#4db6ac", "color-brand-content": "#4db6ac"},
}
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
html_math_renderer = "mathml"


def insert(app: Sphinx, name: str, source: list[str]) -> None:
    """Put tables in the place of their comments, and the navigation on the first page."""
    for comment, make in TABLES.items():
        if comment in source[0]:
            source[0] = source[0].replace(comment, make())
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            entries = "\n".join(f"/{page}" for page in pages.split())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def list_fields(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Make a list of the fields in the docstring of a class: lines that start with a name, and those after them."""
    if what not in ("class", "exception"):
        return
    made: list[str] = []
    inside = False
    for line in lines:
        text = line.strip()
        begins = bool(FIELD.match(text))
        if begins and not inside:
            made.append("")
        inside = begins or (inside and text != "")
        made.append(f":ivar {text}" if begins else f"    {text}" if inside else line)
    lines[:] = made


class LinkedNames(SphinxPostTransform):
    """Links names of the package that stand as code on a page to where the Python reference has them."""

    default_priority = 5

    def run(self, **options: object) -> None:
        """Make a reference of every such name."""
        for literal in self.document.findall(nodes.literal):
            name = literal.astext().partition("(")[0]
            linked = isinstance(literal.parent, nodes.reference | addnodes.pending_xref)
            if NAME.fullmatch(name) and not linked:
                link = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refdoc=self.env.docname
                )
                literal.replace_self(link)
                link += literal


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers draw without scripts."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def check_offline(app: Sphinx, error: Exception | None) -> None:
    """Warn of every file of the site that loads something from elsewhere."""
    for file in (one for one in Path(app.outdir).rglob("*") if one.suffix in LOADS and error is None):
        for match in LOADS[file.suffix].finditer(file.read_text(encoding="utf-8")):
            LOG.warning("%s loads from the network: %s", file.relative_to(app.outdir), match[0])


def setup(app: Sphinx) -> None:
    """Connect what stands above."""
    app.connect("source-read", insert)
    app.connect("build-finished", check_offline)
    app.connect("autodoc-process-docstring", list_fields)
    app.add_post_transform(LinkedNames)
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
