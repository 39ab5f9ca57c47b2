"""The report of saved surgeries: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from surgeon.jobs.report import Reported
from surgeon.render.report.content import section, side_by_side
from surgeon.render.report.graph import drawing
from surgeon.surgery.diff import Diff
from surgeon.version import __version__


def report_html(surgeries: Sequence[Reported]) -> str:
    """Return the page. It asks for nothing from the network, and is readable without JavaScript."""
    return _page(
        "page.html.j2",
        title=" beside ".join(surgery.name for surgery in surgeries),
        surgeries=[section(surgery, f"surgery-{number}") for number, surgery in enumerate(surgeries, 1)],
        side_by_side=side_by_side(surgeries),
    )


def graph_html(diff: Diff) -> str:
    """Return a page with nothing but the drawing of a graph, before and after every pass."""
    return _page("graph.html.j2", surgery={"id": "graph", "drawing": drawing(diff)})


def _page(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("surgeon.render", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    own = files("surgeon.render.report")
    # Ours, and they hold neither `</script` nor `</style`, which would end them early.
    names = {"css": "report.css", "dagre": "dagre.min.js", "drawing_script": "drawing.js", "script": "report.js"}
    assets = {name: Markup((own / file).read_text(encoding="utf-8")) for name, file in names.items()}
    return environment.get_template(template).render(version=__version__, **assets, **values)
