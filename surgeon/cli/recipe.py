"""`surgeon recipe`: write, check and show recipes."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import completion
from surgeon.cli.app import Run, command, group

recipe = group("recipe", order=35, help="Write, check or show a recipe: passes with their options in a YAML file.")


@command(order=10, under=recipe)
def init(
    run: Run,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A recipe by name (listed by surgeon passes).", autocompletion=completion.recipes
        ),
    ] = None,
    surgery: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="A saved surgery, whose recipe repeats it.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier file.")] = False,
) -> None:
    """Write a recipe to a YAML file, with a comment for every pass and option.

    With --from, the file has all options that a saved surgery was made with, its seed, and what identifies model and
    data. surgeon apply then makes the same weights again, on the same machine.

    Example: surgeon recipe init recommended -o recipe.yaml

    Example: surgeon recipe init --from bert-surgery -o recipe.yaml
    """
    from surgeon.jobs.recipe import WrittenRecipe, write_recipe
    from surgeon.render.recipe import written_view

    written = write_recipe(name, surgery, out, overwrite=overwrite)
    run.screen.show(written_view(out))
    run.answer(WrittenRecipe(out, tuple(step.name for step in written.passes)))


@command(order=20, under=recipe)
def check(run: Run, file: Annotated[Path, typer.Argument(metavar="FILE", help="A recipe in YAML.")]) -> None:
    """Check a recipe file: every key, pass, option and value, and the order of the passes.

    Passes that are named as module:Class are imported. The exit code is 1 if something is wrong.

    Example: surgeon recipe check recipe.yaml
    """
    from surgeon.jobs.recipe import check_recipe
    from surgeon.render.recipe import checked_view

    found = check_recipe(file)
    run.screen.show(checked_view(found))
    run.answer(found)
    if found.problems:
        raise typer.Exit(1)


@command(order=30, under=recipe)
def show(
    run: Run,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE|DIR",
            help="A recipe by name, in a YAML file, or of a saved surgery.",
            autocompletion=completion.recipes,
        ),
    ],
) -> None:
    """Show the passes of a recipe and the options that it sets.

    Example: surgeon recipe show recommended
    """
    from surgeon.jobs.recipe import show_recipe
    from surgeon.render.recipe import recipe_view

    found = show_recipe(name)
    run.screen.show(recipe_view(found))
    run.answer(found)
