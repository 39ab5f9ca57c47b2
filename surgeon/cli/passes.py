"""`surgeon passes`: list the passes, or show the options of a pass."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.app import Run, command


@command(order=30)
def passes(
    run: Run,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this pass and its options.")] = None,
) -> None:
    """List the passes, or show one of them.

    For one pass, show what it does, what it needs, how it affects the output, its options, and an example.

    Example: surgeon passes moeify

    JSON: {passes: [{name, summary, description, works_on, makes, must_precede, preserves, needs_data, trains,
    calibrates}], recipes: {name: {summary, passes: [[name, options]]}}, broken: {name: why}}; for one pass {name, ...,
    options: [{name, type, default, help}], example}
    """
    from surgeon.jobs.passes import describe, example_of, options_of
    from surgeon.passes.registry import all_passes, broken_passes
    from surgeon.render.passes import pass_help_view, passes_view
    from surgeon.surgery.recipe import RECIPES, find_pass

    if name is None:
        run.screen.show(passes_view(all_passes().values(), RECIPES, broken_passes()))
        recipes = {name: {"summary": what, "passes": steps} for name, (what, steps) in RECIPES.items()}
        passes = [describe(kind) for kind in all_passes().values()]
        run.screen.result({"passes": passes, "recipes": recipes, "broken": broken_passes()})
        return
    kind = find_pass(name)
    with run.screen.stage(f"running {name} on a small model"):
        example = example_of(kind)
    about, options = describe(kind), options_of(kind)
    run.screen.show(pass_help_view(kind, about["description"], options, example))
    run.screen.result({**about, "options": options, "example": example})
