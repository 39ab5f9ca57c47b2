"""`surgeon explain`: what passes would change, and why they leave the rest."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import Arch, InputsOption, Model, PassList, SetOption, Task, TrustModules, TrustPickle
from surgeon.cli.reading import build, check_no_pass


@command(order=40)
def explain(
    run: Run,
    model: Model,
    passes: PassList = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="PATH", help="Only candidates at or under this path; * is allowed."),
    ] = None,
    settings: SetOption = None,
    inputs: InputsOption = None,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
    arch: Arch = None,
    task: Task = None,
) -> None:
    """Say why a pass changes a site, or does not.

    For each candidate, show that the pass would change it, or the first condition that failed and the value found.
    Each pass gets the graph as the passes before it would leave it. Nothing is trained or saved.

    Example: surgeon explain path/to/bert --passes moeify --at "*.layer.0"
    """
    from surgeon.jobs.explain import explain as ask
    from surgeon.jobs.open_model import open_model
    from surgeon.render.explain import explanation_view
    from surgeon.surgery.pipeline import Pipeline

    check_no_pass(model)
    built = build(passes, settings)
    Pipeline(built).check(there=("moe", "dynamic"), has_data=True)  # a model may have experts already
    opened = open_model(
        model,
        inputs=inputs,
        trust_pickle=trust_pickle,
        trust_modules=trust_modules or (),
        arch=arch,
        task=task,
        only_graph=True,
        stage=run.screen.stage,
    )
    with run.screen.stage("explaining"):
        found = ask(opened, built, at)
    run.screen.show(explanation_view(found))
    run.answer({"passes": found})
