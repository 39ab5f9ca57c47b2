"""`surgeon demo`: every step on a small model."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.app import Run, command


@command(order=10)
def demo(
    run: Run,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the result.")] = Path("surgeon-demo"),
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Train very little, to see that everything runs.")] = False,
) -> None:
    """Show every step on a small model.

    A vision transformer is trained on digits, sparsified, split into experts, lowered and measured. This takes two
    minutes.

    Example: surgeon demo
    """
    from surgeon.jobs import demo as story
    from surgeon.jobs.store import check_target
    from surgeon.render.demo import demo_view
    from surgeon.render.numbers import quality_line
    from surgeon.text.diff import pass_view

    check_target(directory, overwrite=True)
    made = story.make_demo(
        directory,
        seed=seed,
        quick=quick,
        progress=run.screen.progress,
        on_dense=lambda quality: run.screen.show(quality_line("dense model", quality)),
        on_pass=lambda pass_: run.screen.show(pass_view(pass_, "sites", gap=True)),
    )
    run.screen.show(demo_view(made))
    run.answer(
        {
            "dense": made.dense,
            "passes": made.surgery.reports,
            "points": made.points,
            "directory": made.directory,
        }
    )
