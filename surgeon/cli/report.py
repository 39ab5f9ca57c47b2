"""`surgeon report`: one HTML file of what was done to a model."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import TrustModules
from surgeon.jobs.options import DataOptions


@command(order=65)
def report(
    run: Run,
    surgeries: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Saved surgeries, each as DIR or as NAME=DIR.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, which ends in .html.")] = Path(
        "report.html"
    ),
    data: DataOptions | None = None,
    trust_modules: TrustModules = None,
) -> None:
    """Write a report: the graph before and after every pass, costs and reasons, in one HTML file.

    With --data it also shows quality against cost, what tokens run, which layers quality depends on and what routers
    miss, measured on the held-out data. The file needs no network, and works without a server. Several surgeries stand
    side by side.

    Example: surgeon report bert-surgery --data reviews.csv -o report.html

    Example: surgeon report small=bert-small large=bert-large -o report.html
    """
    from surgeon.jobs.report import report as gather
    from surgeon.render.report import check_report, write_report

    check_report(out)
    found = gather(surgeries)
    if data is not None:
        from surgeon.jobs.open_model import open_model
        from surgeon.jobs.report import with_data

        for place, surgery in enumerate(found):
            opened = open_model(str(surgery.path), data=data, trust_modules=trust_modules or [], stage=run.screen.stage)
            found[place] = with_data(surgery, opened, run.screen.progress)

    write_report(found, out)
    run.screen.show(f"Written to {out}.")
    run.answer({"written": [out]})
