"""`surgeon report`: one HTML file of what was done to a model."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.app import Run, command


@command(order=65)
def report(
    run: Run,
    surgeries: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Saved surgeries, each as DIR or as NAME=DIR.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, which ends in .html.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a report: the graph before and after every pass, costs, reasons, in one HTML file.

    The file needs no network, and works without a server. Several surgeries stand side by side.

    Example: surgeon report bert-surgery -o report.html

    Example: surgeon report small=bert-small large=bert-large -o report.html

    JSON: {written}
    """
    from surgeon.jobs.report import report as gather
    from surgeon.render.files import check_files, write_result
    from surgeon.render.report import report_html

    check_files([out], {".html": "the report"})
    found = gather(surgeries)
    write_result(found, out, lambda file: file.write_text(report_html(found), encoding="utf-8"))
    run.screen.say(f"Written to {out}.")
    run.screen.result({"written": out})
