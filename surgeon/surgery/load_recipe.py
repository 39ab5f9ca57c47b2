"""Load a recipe: one by name, one in a YAML file, or the one that a saved surgery recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from surgeon.errors import UsageError
from surgeon.graph.given import path_of
from surgeon.surgery.recipe import Recipe, Step
from surgeon.surgery.recipe_file import read_recipe_file
from surgeon.surgery.recipes import BY_FAMILY, RECIPES, all_recipes
from surgeon.surgery.record import RECORD, read_record, repeatable


def load_recipe(source: str | Path) -> Recipe:
    """Load a recipe.

    Args:
        source: the name of a recipe (`surgeon passes` lists them), a YAML file, or the directory of a saved surgery.

    Returns:
        The recipe. `Recipe.build` makes its passes.

    Raises:
        UsageError: there is no such recipe or file, something is wrong in the file (the message names the lines), or
            the recipe stands for others, one for each kind of model.
        LoadError: the saved surgery is damaged.
    """
    name = str(source)
    if name in BY_FAMILY:
        members = ", ".join(f"{member} ({family})" for family, member in BY_FAMILY[name][1].items())
        raise UsageError(f"The recipe {name} depends on the kind of model. Name one of those it stands for: {members}.")
    if name in RECIPES:
        summary, steps = RECIPES[name]
        return Recipe(tuple(Step(*step) for step in steps), summary=f"{name}: {summary}")
    path = path_of(source)
    if path.name == RECORD:
        path = path.parent
    if path.is_dir():
        record = read_record(path)
        about = f"What was done to make {path}."
        if record.compensated:
            about += (
                " Its experts are compensated, which is measured on data after the passes, by surgeon set or "
                "surgeon.compensate."
            )
        return replace(repeatable(record), summary=about)
    if not path.exists():
        raise UsageError(f"There is no recipe and no file {name}. Recipes: {', '.join(all_recipes())}.")
    return read_recipe_file(path)
