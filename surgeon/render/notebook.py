"""How results look in a notebook: as on the command line, and a graph as the drawing of the report.

IPython asks these functions for values of types that it knows by name, so nothing is imported before one is shown.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

_WIDTH = 126  # letters; what is wider than the page scrolls
# Pages set other letters for what is in a <pre>, and columns only line up in these.
_LETTERS = "font: 13px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# Black, red, green, yellow, blue, magenta, cyan and white, neither dark nor light.
COLOURS = [
    (110, 110, 110), (205, 70, 60), (40, 140, 75), (155, 115, 0), (70, 120, 215), (180, 85, 175), (0, 135, 150),
    (128, 128, 128),
]  # fmt: skip


def register(shell: Any) -> None:
    """Tell an IPython shell how to show results."""
    # tqdm, which others import, asks for widgets. Nothing here needs them.
    warnings.filterwarnings("ignore", message="IProgress not found")
    formatter = shell.display_formatter.formatters["text/html"]
    for (module, name), show in VIEWS.items():
        formatter.for_type_by_name(module, name, show)


def surgery(value: Any) -> str:
    """The graph after the passes and before them, and what each pass did, in a line each."""
    diff = value.diff()
    return _text(_stat(diff)) + _drawing(diff)


def diff(value: Any) -> str:
    """What each pass changed."""
    from surgeon.text.diff import diff_view

    return _text(diff_view(value.passes, "sites"))


def pass_report(value: Any) -> str:
    """What one pass did to every site."""
    from surgeon.graph.snapshot import GraphDiff
    from surgeon.passes.report import PassDiff
    from surgeon.text.diff import pass_view

    return _text(pass_view(PassDiff(value, GraphDiff()), "sites"))


def graph(value: Any) -> str:
    """The graph as a drawing."""
    from surgeon.graph.snapshot import snapshot
    from surgeon.surgery.diff import Diff

    return _drawing(Diff((), tuple(snapshot(value).nodes.values())))


def comparison(value: Any) -> str:
    """What each surgery costs to keep the quality."""
    from surgeon.jobs.compare import Compared
    from surgeon.render.compare import compared_view

    return _text(compared_view(Compared({}, "", value)))


def points(value: Any) -> str:
    """Quality and cost at every setting of a sweep."""
    from surgeon.measure.sweep import Dense
    from surgeon.render.sweep import sweep_view

    return _text(sweep_view(value, Dense(None))) if value else _text("No settings.")


def tuned(value: Any) -> str:
    """A tau for each layer, and what they cost."""
    from surgeon.text.layout import grid
    from surgeon.text.summary import percent

    table = grid("left", "right", "right", header=("layer", "tau", "ran"))
    for path, tau in value.taus.items():
        table.add_row(path, f"{tau:.3g}", percent(value.shares[path]))
    table.add_row("whole model", "", percent(value.cost))
    return _text(table)


def _stat(value: Any) -> Any:
    from surgeon.text.diff import stat_view

    return stat_view([pass_.report for pass_ in value.passes])


def _text(view: Any) -> str:
    """A view of the command line, in colours that suit light and dark pages."""
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme

    theme = TerminalTheme((255, 255, 255), (0, 0, 0), COLOURS)
    console = Console(record=True, file=io.StringIO(), width=_WIDTH, highlight=False, emoji=False, force_jupyter=False)
    console.print(view)
    form = f'<pre style="{_LETTERS}; white-space: pre; overflow-x: auto; line-height: 1.35">{{code}}</pre>'
    return console.export_html(theme=theme, inline_styles=True, code_format=form)


def _drawing(value: Any) -> str:
    """A drawing in a frame of its own, so that its styles and those of the notebook stay apart."""
    from surgeon.render.report import graph_html

    page = html.escape(graph_html(value), quote=True)
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 37rem; border: none" title="graph"></iframe>'


VIEWS: Mapping[tuple[str, str], Callable[[Any], str]] = {
    ("surgeon.surgery.surgery", "Surgery"): surgery,
    ("surgeon.surgery.diff", "Diff"): diff,
    ("surgeon.passes.report", "PassReport"): pass_report,
    ("surgeon.graph.traced", "TracedGraph"): graph,
    ("surgeon.measure.compare", "Comparison"): comparison,
    ("surgeon.measure.sweep", "Points"): points,
    ("surgeon.measure.tuning", "Tuned"): tuned,
}
"""What shows values of a type, by the module and the name of the type."""
