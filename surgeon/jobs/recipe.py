"""What `surgeon apply --recipe` and `surgeon recipe` do: read recipes, check, write and show them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from surgeon.dynamic.knobs import get_rule, get_tau, set_rule, set_tau
from surgeon.errors import UsageError, some
from surgeon.graph.patterns import matches
from surgeon.jobs.open_model import Opened
from surgeon.passes import Pass
from surgeon.surgery.families import choose
from surgeon.surgery.load_recipe import load_recipe
from surgeon.surgery.recipe import Recipe, Step
from surgeon.surgery.recipe_file import check_recipe_file
from surgeon.surgery.recipe_yaml import Problem
from surgeon.surgery.recipes import BY_FAMILY
from surgeon.tracing.trace import TraceInfo

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Checked:
    """What is wrong in a recipe file. passes: their names, if nothing is."""

    file: Path
    problems: tuple[Problem, ...]
    passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe file that was written. passes: their names."""

    file: Path
    passes: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A recipe, or one that stands for others: by_family has those, by the kind of model."""

    name: str
    summary: str
    passes: tuple[Step, ...]
    recipe: Recipe | None
    by_family: Mapping[str, str] = field(default_factory=dict)


def read_recipe(name: str, settings: Settings) -> tuple[list[Pass[Any]], Recipe]:
    """The passes of a recipe, and the recipe.

    Args:
        name: as `load_recipe` takes it. Of a recipe that depends on the model, any of those that it stands for is
            returned: see `recipe_for`.
        settings: options by pass, which replace those of the recipe.

    Raises:
        UsageError, LoadError: as `load_recipe` and `Recipe.build`.
    """
    recipe = load_recipe(next(iter(BY_FAMILY[name][1].values())) if name in BY_FAMILY else name)
    return recipe.build(settings), recipe


def recipe_for(opened: Opened, name: str, settings: Settings) -> tuple[list[Pass[Any]], Opened] | None:
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


def differences(recipe: Recipe, opened: Opened, *, has_teacher: bool) -> list[str]:
    """What differs from the run that a recipe recorded, as sentences for people."""
    found = []
    if recipe.teacher is not None and not has_teacher:
        where = "made in Python" if recipe.teacher.path is None else recipe.teacher.path
        found.append(
            f"The recipe's passes learned from a teacher ({where}). Without --teacher they learn from the model itself."
        )
    if recipe.model is not None and recipe.model.sha256 not in (None, opened.origin.sha256):
        found.append(f"The recipe was recorded for another model ({recipe.model.path}), so results will differ.")
    if opened.data is not None and recipe.fingerprint not in (None, opened.data.fingerprint):
        found.append(f"The recipe was recorded with other data ({recipe.data}), so results will differ.")
    return found


def set_recorded(recipe: Recipe, graph: GraphModule, *, fitted: bool, with_tau: bool) -> list[str]:
    """Set the knobs that a recipe recorded, and return notes for people.

    Args:
        fitted: whether the routers were fitted; else nothing may be skipped. with_tau: whether its tau counts.
    """
    notes: list[str] = []
    layers: dict[str, Collection[str]] = {"tau": get_tau(graph), "rule": get_rule(graph)}
    if with_tau and recipe.tau and not fitted:
        notes.append("tau of the recipe was not set, because no routers were fitted.")
    for name, values in (("tau", recipe.tau if with_tau and fitted else {}), ("rule", recipe.rule)):
        fit = {key: one for key, one in values.items() if any(matches([key], *_names(path)) for path in layers[name])}
        if fit:
            setter: Any = set_tau if name == "tau" else set_rule
            setter(graph, fit)
        if missing := [pattern for pattern in values if pattern not in fit]:
            notes.append(f"The recipe has a {name} for layers that are not there: {some(missing)}.")
    return notes


def _names(path: str) -> tuple[str, str]:
    return path, path.rpartition(".")[0]


def check_recipe(file: Path) -> Checked:
    """Say what is wrong in a recipe file. Passes of one's own are imported.

    Raises:
        UsageError: the file cannot be read.
    """
    recipe, problems = check_recipe_file(file)
    return Checked(file, tuple(problems), () if recipe is None else tuple(step.name for step in recipe.passes))


def write_recipe(name: str | None, surgery: Path | None, out: Path, *, overwrite: bool) -> Recipe:
    """Write a recipe by name, or that of a saved surgery, to a YAML file.

    Raises:
        UsageError: neither or both are given, there is no such recipe, or the file has another ending.
        SaveError: the file exists and is not to be overwritten, or cannot be written.
    """
    if (name is None) == (surgery is None):
        raise UsageError("Name a recipe (surgeon passes lists them), or give --from DIR, a saved surgery.")
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"Cannot write {out}: give a name that ends in .yaml.")
    recipe = load_recipe(name or str(surgery))
    recipe.save(out, complete=surgery is not None, overwrite=overwrite)
    return recipe


def show_recipe(name: str) -> Shown:
    """Find a recipe for `surgeon recipe show`.

    Raises:
        UsageError, LoadError: as `load_recipe`.
    """
    if name in BY_FAMILY:
        summary, members = BY_FAMILY[name]
        return Shown(name, summary, (), None, {str(family): member for family, member in members.items()})
    recipe = load_recipe(name)
    return Shown(name, recipe.summary.removeprefix(f"{name}: "), recipe.passes, recipe)
