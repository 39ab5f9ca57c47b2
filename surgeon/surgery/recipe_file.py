"""Read a recipe from a YAML file, and say for everything that is wrong in it on which line it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError

from surgeon.errors import UsageError
from surgeon.kernels.selection import check_rule
from surgeon.passes.base import Pass
from surgeon.passes.options import option_types
from surgeon.surgery.order import misplaced
from surgeon.surgery.recipe import InputFile, Recipe, Step, find_pass, read_option, with_options
from surgeon.surgery.recipe_yaml import Document, Place, Problem, read_document


def _by_layer(value: Any) -> Any:
    """Values by layer; a single one is for all."""
    return value if isinstance(value, dict) else {} if value is None else {"*": value}


def _rule(value: str) -> str:
    check_rule(value)
    return value


class _File(BaseModel):
    """What stands in a recipe file. passes: names, or names with options; their own form is checked afterwards."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    passes: list[Any]
    seed: StrictInt | None = None
    data: str | None = None
    fingerprint: str | None = None
    teacher: InputFile | None = None
    model: InputFile | None = None
    tau: Annotated[dict[str, Annotated[float, Field(ge=0, le=1)]], BeforeValidator(_by_layer)] = Field(
        default_factory=dict
    )
    rule: Annotated[dict[str, Annotated[str, AfterValidator(_rule)]], BeforeValidator(_by_layer)] = Field(
        default_factory=dict
    )


def read_recipe_file(path: Path) -> Recipe:
    """Read a recipe file. Passes that are named as `module:Class` are imported.

    Raises:
        UsageError: the file cannot be read, or something is wrong in it; the message has a line for each thing that is.
    """
    recipe, problems = check_recipe_file(path)
    if recipe is None:
        raise UsageError("\n".join(f"{path}:{problem.line}: {problem.message}" for problem in problems))
    return recipe


def check_recipe_file(path: Path) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe in a file, None if something is wrong in it, and all that is wrong, in the order of its lines.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        document = read_document(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8, so it is no recipe.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    problems = document.problems
    if document.value is None and not problems:
        problems.append(Problem(1, "the file is empty. It needs at least passes:, a list of passes."))
    steps: list[Step] = []
    if not problems:
        problems += _wrong_keys(document)
        steps = _steps(document)
    if problems:
        return None, sorted(problems, key=lambda problem: problem.line)
    file = _File.model_validate(document.value)
    found = file.model_dump(exclude={"passes", "teacher", "model"})
    return Recipe(tuple(steps), teacher=file.teacher, model=file.model, **found), []


def _wrong_keys(document: Document) -> Iterator[Problem]:
    """What does not have the form of a recipe, but for the passes themselves."""
    try:
        _File.model_validate(document.value)
    except ValidationError as error:
        for wrong in error.errors():
            place = wrong["loc"]
            line = document.line(place)
            if place not in document.lines and wrong["type"] != "missing":
                place = place[:-1]  # one value for all layers
            name = ".".join(map(str, place))
            if wrong["type"] == "extra_forbidden":
                yield Problem(line, f"there is no key '{name}'.{_near(name, _File.model_fields)}")
            elif wrong["type"] == "missing":
                yield Problem(line, f"the key '{name}' is missing.")
            elif not place:
                yield Problem(line, "a recipe is a mapping with the key passes, such as 'passes: [moeify, lower]'.")
            else:
                reason = wrong["msg"].removeprefix("Value error, ").rstrip(".")
                yield Problem(line, f"{name}: {reason[0].lower()}{reason[1:]}.")


def _steps(document: Document) -> list[Step]:
    """The passes of a document. What is wrong with them, or with their order, is added to its problems."""
    given = document.value.get("passes") if isinstance(document.value, dict) else None
    if given == []:
        document.problems.append(Problem(document.line(("passes",)), "no passes. `surgeon passes` lists them."))
    found: list[Step] = []
    kinds: list[tuple[Place, type[Pass[Any]]]] = []
    for index, item in enumerate(given if isinstance(given, list) else ()):
        place: Place = ("passes", index)
        options: Any = {}
        if isinstance(item, dict) and len(item) == 1:
            item, options = next(iter(item.items()))
            place = (*place, item)
        if not isinstance(item, str) or not isinstance(options, dict | None):
            what = "a pass is a name, such as '- lower', or a name with options, such as '- moeify: {experts: 8}'."
            document.problems.append(Problem(document.line(place), what))
            continue
        try:
            kind = find_pass(item)
        except UsageError as error:
            document.problems.append(Problem(document.line(place), str(error)))
            continue
        kinds.append((place, kind))
        found.append(Step(item, _options(document, place, kind, options or {})))
    # A model may have experts already.
    for index, what in misplaced([kind for _, kind in kinds], there=("moe", "dynamic")):
        document.problems.append(Problem(document.line(kinds[index][0]), what))
    return found


def _options(document: Document, place: Place, kind: type[Pass[Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a pass, of those given as they are in the file. What is wrong is added to the problems."""
    values, before = {}, len(document.problems)
    for key, value in given.items():
        try:
            values[key] = read_option(kind, key, value)
        except UsageError as error:
            wrong = list(_wrong_parts(document, (*place, key), kind, key, value))
            document.problems += wrong or [Problem(document.line((*place, key)), str(error))]
    if len(document.problems) == before:
        try:
            return with_options(kind, values).options()
        except UsageError as error:  # options that do not go together
            document.problems.append(Problem(document.line(place), str(error)))
    return {}


def _wrong_parts(document: Document, place: Place, kind: type[Pass[Any]], key: str, value: Any) -> Iterator[Problem]:
    """What is wrong with single ones of the values by site, or of a list."""
    parts: list[tuple[Any, Any]] = []
    if key not in option_types(kind):
        return
    if isinstance(value, dict):
        parts = [(pattern, {pattern: one}) for pattern, one in value.items()]
    elif isinstance(value, list):
        parts = [(index, [one]) for index, one in enumerate(value)]
    for name, part in parts:
        try:
            read_option(kind, key, part)
        except UsageError as error:
            yield Problem(document.line((*place, name)), str(error))


def _near(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(known)}."
