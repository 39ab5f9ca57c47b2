"""The report of saved surgeries: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgeon.jobs.report import Reported
from surgeon.render.files import check_files, write_result
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


def write_report(surgeries: Sequence[Reported], file: Path) -> None:
    """Write the page to an `.html` file.

    Raises:
        SaveError: it cannot be written.
    """

    def write(fresh: Path) -> None:
        fresh.write_text(report_html(surgeries), encoding="utf-8")

    write_result(surgeries, file, write)


def check_report(file: Path) -> None:
    """Refuse a file that the page cannot be written to, before any work.

    Raises:
        UsageError, SaveError: as `surgeon.render.files.check_files`.
    """
    check_files([file], {".html": "a page"})


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
