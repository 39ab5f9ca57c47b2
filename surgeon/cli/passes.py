"""`surgeon passes`: list the passes, or show the options of a pass."""

# The annotations are read when commands are made, so they are not postponed.
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import completion
from surgeon.cli.app import Run, command
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from surgeon.passes.about import About
    from surgeon.passes.report import PassDiff


@command(order=30, torch=False)
def passes(
    run: Run,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Show this pass and its options.", autocompletion=completion.one_pass),
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Also run the pass on a small model, and show what changes.")
    ] = False,
) -> None:
    """List the passes, or show one of them.

    For one pass, show what it does, what it needs, how it affects the output, and its options.

    Example: surgeon passes moeify --example
    """
    from surgeon.passes.catalogue import all_about, broken
    from surgeon.render.passes import pass_view, passes_view
    from surgeon.surgery.recipes import BY_FAMILY, RECIPES, all_recipes

    known = all_about()
    if name is None:
        if example:
            raise UsageError("--example runs one pass. Name it: surgeon passes moeify --example.")
        run.screen.show(passes_view(known.values(), all_recipes(), broken()))
        recipes = {
            name: {
                "summary": what,
                "passes": RECIPES[name][1] if name in RECIPES else None,
                "by_family": BY_FAMILY[name][1] if name in BY_FAMILY else None,
            }
            for name, what in all_recipes().items()
        }
        passes = [_plain(about) for about in known.values()]
        run.answer({"passes": passes, "recipes": recipes, "broken": broken()})
        return
    if name not in known:
        from surgeon.passes.about import describe
        from surgeon.surgery.recipe import find_pass

        about = describe(find_pass(name))  # one of the user's own
    else:
        about = known[name]
    run.screen.show(pass_view(about))
    changed = _example(run, name) if example else None
    run.answer({**_plain(about), "options": about.options, "example": changed})


def _plain(about: "About") -> dict[str, Any]:
    """A pass without its options."""
    return {key: value for key, value in vars(about).items() if key != "options"}


def _example(run: Run, name: str) -> "PassDiff":
    """Run a pass on a small model, and show what changes."""
    from surgeon.jobs.passes import example_of
    from surgeon.render.pass_example import example_view
    from surgeon.surgery.recipe import find_pass

    with run.screen.stage(f"running {name} on a small model"):
        changed = example_of(find_pass(name))
    run.screen.show(example_view(changed))
    return changed
