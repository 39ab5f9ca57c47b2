"""The report of saved surgeries: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from surgeon.jobs.report import Reported
from surgeon.render.report.content import section, side_by_side
from surgeon.version import __version__


def report_html(surgeries: Sequence[Reported]) -> str:
    """Return the page. It asks for nothing from the network, and is readable without JavaScript."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("surgeon.render", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    own = files("surgeon.render.report")

    def asset(name: str) -> Any:
        # Ours, and holds neither `</script` nor `</style`, which would end it early.
        return Markup((own / name).read_text(encoding="utf-8"))

    sections = [section(surgery, f"surgery-{number}") for number, surgery in enumerate(surgeries, 1)]
    return environment.get_template("page.html.j2").render(
        title=" beside ".join(surgery.name for surgery in surgeries),
        version=__version__,
        surgeries=sections,
        side_by_side=side_by_side(surgeries),
        css=asset("report.css"),
        dagre=asset("dagre.min.js"),
        drawing_script=asset("drawing.js"),
        script=asset("report.js"),
    )
