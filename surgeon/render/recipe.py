"""The views of `surgeon recipe`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.recipe import Checked, Shown
from surgeon.surgery.recipe import Recipe
from surgeon.text.layout import dim, grid, heading, indented


def written_view(file: Path) -> RenderableType:
    """Say what was written, and what to do with it."""
    table = grid("left", "left")
    table.add_row(dim("written"), str(file))
    table.add_row(dim("check"), f"surgeon recipe check {file}")
    table.add_row(dim("run"), f"surgeon apply MODEL --recipe {file} --data DATA")
    return table


def checked_view(found: Checked) -> RenderableType:
    """List what is wrong, each with its file and line."""
    if not found.problems:
        return Text(f"{found.file}: nothing is wrong. Passes: {', '.join(found.passes)}.")
    return Text("\n".join(f"{found.file}:{problem.line}: {problem.message}" for problem in found.problems))


def recipe_view(found: Shown) -> RenderableType:
    """Show what a recipe is, what it recorded, and its passes with the options that they have."""
    parts: list[RenderableType] = [heading(found.name)]
    if found.summary:
        parts.append(indented(Text(found.summary)))
    if found.recipe is not None and (facts := _facts(found.recipe)):
        table = grid("left", "left")
        for name, value in facts:
            table.add_row(dim(name), value)
        parts += [Text(""), indented(table)]
    if found.by_family:
        table = grid("left", "left", header=("kind of model", "recipe"))
        for family, member in found.by_family.items():
            table.add_row(family, Text(member, style="bold cyan"))
        parts += [Text(""), indented(table)]
    if found.passes:
        table = grid("left", "left", "left", header=("pass", "option", "value"))
        for step in found.passes:
            rows = list(step.options.items()) or [("", "")]
            for number, (option, value) in enumerate(rows):
                shown = Text("" if number else step.name, style="bold cyan")
                table.add_row(shown, Text(option, style="cyan"), _value(value))
        parts += [Text(""), indented(table)]
    return Group(*parts)


def _facts(recipe: Recipe) -> list[tuple[str, str]]:
    found = [("seed", "" if recipe.seed is None else str(recipe.seed)), ("data", recipe.data or "")]
    found += [(name, file.path or file.kind) for name in ("model", "teacher") if (file := getattr(recipe, name))]
    found += [(name, _value(values)) for name in ("tau", "rule") if (values := getattr(recipe, name))]
    return [(name, value) for name, value in found if value]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{pattern}: {one}" for pattern, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
