"""`surgeon diff`: what passes changed, or two models side by side."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import Arch, InputsOption, TrustModules, TrustPickle
from surgeon.errors import UsageError


@command(order=60)
def diff(
    run: Run,
    first: Annotated[str, typer.Argument(metavar="A", help="A saved surgery, or any model to compare with B.")],
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="Another model.", show_default=False)] = None,
    stat: Annotated[bool, typer.Option("--stat", help="Show totals only.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Show every site, node and parameter.")] = False,
    inputs: InputsOption = None,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
    arch: Arch = None,
) -> None:
    """Show what passes changed, or compare two models.

    For one saved surgery, show what each of its passes changed, and the trials of a search for settings. For two
    models, saved or not, show their sites side by side.

    Example: surgeon diff bert-surgery

    Example: surgeon diff path/to/bert bert-surgery --full

    JSON: {passes: [{report, graph: {removed, added, removed_parameters, added_parameters}, after}], nodes} for one, as
    in diff.json; {names, costs, sites, difference, note, nodes} for two
    """
    from surgeon.render.search import search_view
    from surgeon.surgery.artifact import load_diff
    from surgeon.surgery.record import read_record
    from surgeon.text.diff import diff_view

    if stat and full:
        raise UsageError("Give --stat or --full, not both.")
    detail: Any = "stat" if stat else "full" if full else "sites"
    if second is None:
        recorded, search = load_diff(first), read_record(Path(first)).search
        if search is not None:
            run.screen.show(search_view(search))
        run.screen.show(diff_view(recorded.passes, detail))
        run.screen.result(recorded)
        return
    from surgeon.jobs.diff import compare_models
    from surgeon.jobs.open_model import open_model
    from surgeon.render.diff import comparison_view

    opened = [
        open_model(
            spec,
            inputs=inputs,
            trust_pickle=trust_pickle,
            trust_modules=trust_modules or (),
            arch=arch,
            only_graph=True,
            stage=run.screen.stage,
        )
        for spec in (first, second)
    ]
    with run.screen.stage("comparing"):
        found = compare_models(*opened, with_nodes=full)
    run.screen.show(comparison_view(found, detail))
    run.screen.result(found)
