"""`surgeon inspect`: show the sites of a model."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import (
    Arch,
    InputsOption,
    Model,
    Task,
    TrustModules,
    TrustPickle,
)
from surgeon.cli.reading import check_no_pass


@command(order=20)
def inspect(
    run: Run,
    model: Model,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the graph, by module path.")] = False,
    inputs: InputsOption = None,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
    arch: Arch = None,
    task: Task = None,
) -> None:
    """Show a model's layers and what they cost.

    It lists feed-forward, expert and standalone linear layers, and linear layers that skip inputs, each with its share
    of the multiply-adds.

    Example: surgeon inspect path/to/bert
    """
    from surgeon.jobs.inspect import inspect as look
    from surgeon.jobs.open_model import open_model
    from surgeon.render.inspect import inspection_view

    check_no_pass(model)
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
    with run.screen.stage("measuring"):
        found = look(opened, with_graph=graph)
    run.screen.show(inspection_view(found))
    run.answer(found)
