"""`surgeon sweep`: quality against cost at many settings."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.opening import open_saved
from surgeon.cli.options import DenseModel, Saved, TrustPickle
from surgeon.jobs.options import DataOptions

if TYPE_CHECKING:
    pass


@command
def sweep(
    run: Run,
    model: Saved,
    *,
    tau: Annotated[
        str | None,
        typer.Option(
            "--tau",
            metavar="T,T,...",
            help="Values of tau; 0, every expert, comes first. By default up to 0.5, with top_k up to 0.95.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule", metavar="R,R,...", help="Selection rules: max, cumulative, energy, top_k. By default the saved."
        ),
    ] = None,
    oracle: Annotated[
        bool, typer.Option(help="Also select by the true norms of the experts' outputs, the best a router could do.")
    ] = True,
    timed: Annotated[bool, typer.Option("--time", help="Also time a call at each setting.")] = False,
    dense: DenseModel = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", metavar="FILE", help="Also write the table (.json) or a plot (.png)."),
    ] = None,
    data: DataOptions,
    trust_pickle: TrustPickle = False,
) -> None:
    """Measure quality and cost at several tau.

    Quality is measured on the held-out part of the data, the same that apply holds out; with --eval-fraction 0 on all.

    Example: surgeon sweep bert-surgery --data reviews.csv --tau 0,0.05,0.1,0.2 -o sweep.png

    JSON: {model, data, task, dense: {multiply_adds, quality, milliseconds}, points: [{tau, quality, executed, layers,
    multiply_adds, relative, rule, router, milliseconds, shares}], notes}
    """
    from surgeon.jobs import sweep as measuring
    from surgeon.render.files import write_swept
    from surgeon.render.sweep import sweep_view
    from surgeon.text.layout import sentences

    taus, rules = measuring.parse_taus(tau), measuring.parse_rules(rule)
    measuring.check_files(out or [])
    opened, beside = open_saved(run, model, data, dense, trust_pickle=trust_pickle)
    swept = measuring.sweep(
        opened, taus, rules=rules, oracle=oracle, timed=timed, dense=beside, progress=run.screen.progress
    )
    run.screen.show(sweep_view(swept.points, swept.dense))
    if swept.notes:
        run.screen.show(sentences(swept.notes, indent=0))
    for file in out or []:
        write_swept(swept, file)
        run.screen.say(f"Written to {file}.")
    run.screen.result(swept)
