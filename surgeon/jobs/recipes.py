"""Read the passes of a recipe: one of ours or of the published ones by name, or what a saved surgery recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError, first_line
from surgeon.jobs.open_model import Opened
from surgeon.passes import Pass
from surgeon.surgery.families import choose
from surgeon.surgery.recipe import build
from surgeon.surgery.recipes import BY_FAMILY, RECIPES, all_recipes
from surgeon.surgery.record import RECORD, Recipe, Step, validated
from surgeon.tracing.trace import TraceInfo


def read_recipe(name: str, settings: Mapping[str, Mapping[str, Any]]) -> tuple[list[Pass[Any]], int | None]:
    """The passes of a recipe and its seed.

    Args:
        name: of a recipe, or the path of a saved surgery, its `surgery.json`, or a file with the `recipe` in it. Of a
            recipe that depends on the model, any of those that it stands for: see `recipe_for`.
        settings: options by pass, which replace those of the recipe.

    Raises:
        UsageError: there is no such recipe or file, the file has no recipe, or a pass or an option does not exist.
    """
    seed = None
    name = next(iter(BY_FAMILY[name][1].values())) if name in BY_FAMILY else name
    if name in RECIPES:
        steps = tuple(Step(*step) for step in RECIPES[name][1])
    else:
        recorded = _recorded_recipe(name)
        steps, seed = recorded.passes, recorded.seed
    unused = settings.keys() - {step.name for step in steps}
    if unused:
        raise UsageError(f"Options were given for '{min(unused)}', which recipe {name} does not run.")
    return [build([step.name], {step.name: {**step.options, **settings.get(step.name, {})}})[0] for step in steps], seed


def missing_teacher(name: str) -> str | None:
    """What to tell the user about a recorded recipe that had a teacher, where none is given now; None without one."""
    if name in RECIPES or name in BY_FAMILY:
        return None
    teacher = _recorded_recipe(name).teacher
    if teacher is None:
        return None
    where = "made in Python" if teacher.path is None else teacher.path
    return f"The recipe's passes learned from a teacher ({where}). Without --teacher they learn from the model itself."


def recipe_for(
    opened: Opened, name: str, settings: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Pass[Any]], Opened] | None:
    """The passes of a recipe that depends on the model, and the model with a note that says which recipe it is.

    Returns:
        None for a recipe that does not depend on the model.

    Raises:
        UsageError: nothing was published for such a model.
    """
    if name not in BY_FAMILY:
        return None
    info: TraceInfo = opened.graph.meta["trace"]
    chosen, why = choose(name, opened.graph, info.task or opened.task, opened.inputs)
    return read_recipe(chosen, settings)[0], replace(opened, notes=(*opened.notes, why))


def _recorded_recipe(name: str) -> Recipe:
    """The recipe in a file, or in the record of a saved surgery."""
    path = Path(name)
    try:
        content = json.loads((path / RECORD if path.is_dir() else path).read_text(encoding="utf-8"))
        return validated(Recipe, content.get("recipe", content) if isinstance(content, dict) else content)
    except FileNotFoundError:
        raise UsageError(
            f"--recipe {name}: there is no recipe and no file of that name. Recipes: {', '.join(all_recipes())}."
        ) from None
    except OSError as error:
        raise UsageError(f"--recipe {name} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--recipe {name} is not a valid recipe: {first_line(error)}.") from error
