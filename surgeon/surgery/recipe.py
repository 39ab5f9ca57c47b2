"""Recipes: passes with their options, as a user typed them, as a file has them, or as a saved surgery recorded them."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from surgeon.errors import SaveError, UsageError
from surgeon.graph.given import path_of
from surgeon.json_values import Plain
from surgeon.models.user_function import is_spec, load_spec, spec_of
from surgeon.passes.about import GROUP
from surgeon.passes.base import Pass
from surgeon.passes.options import check_value, option_types
from surgeon.passes.registry import all_passes, broken_passes, is_pass
from surgeon.surgery.recipe_text import recipe_text


@dataclass(frozen=True)
class InputFile:
    """A model that was read, such as the one that the surgery started from: see `surgeon.surgery.origin.Origin`."""

    path: str | None
    kind: str
    sha256: str | None


@dataclass(frozen=True)
class Step:
    """The name of a pass as `find_pass` takes it, and its options that differ from the default."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe(Plain):
    """Passes with their options, and what else it takes to repeat a surgery.

    >>> recipe = surgeon.load_recipe("recommended")  # doctest: +SKIP
    >>> surgery = surgeon.Pipeline(recipe.build()).run(model, data=batches)  # doctest: +SKIP

    seed: None for that of the run. data: in words. fingerprint: of the data; None if there was no data. teacher: the
    other model that passes learned from, if there was one. model: the one that the surgery started from, if this was
    recorded. tau, rule: knobs to set after the passes, by the path of a layer's experts or of what selects inputs.
    runs: how many of the passes each run had, if a saved surgery was gone on from. summary: what it is, for people.
    """

    passes: tuple[Step, ...]
    seed: int | None = None
    data: str | None = None
    fingerprint: str | None = None
    teacher: InputFile | None = None
    model: InputFile | None = None
    tau: dict[str, float] = field(default_factory=dict)
    rule: dict[str, str] = field(default_factory=dict)
    runs: tuple[int, ...] = ()
    summary: str = ""

    def build(self, settings: Mapping[str, Mapping[str, Any]] | None = None) -> list[Pass[Any]]:
        """Return the passes.

        Args:
            settings: `{pass: {option: value}}` in place of the recipe's own values.

        Raises:
            UsageError: a pass or an option does not exist, or a value does not fit.
        """
        settings, kinds = settings or {}, [find_pass(step.name) for step in self.passes]
        names = [{step.name, kind.name} for step, kind in zip(self.passes, kinds, strict=True)]
        for name in settings:
            if not any(name in own for own in names):
                find_pass(name)
                there = ", ".join(step.name for step in self.passes)
                raise UsageError(f"Options were given for '{name}', which is not among the passes: {there}.")
        return [
            with_options(kind, {**step.options, **{k: v for name in own for k, v in settings.get(name, {}).items()}})
            for step, kind, own in zip(self.passes, kinds, names, strict=True)
        ]

    def text(self, *, complete: bool = False) -> str:
        """Return what `save` writes."""
        keys: dict[str, Any] = {"seed": self.seed, "data": self.data, "fingerprint": self.fingerprint}
        for name, knobs in (("tau", self.tau), ("rule", self.rule)):
            keys[name] = knobs.get("*") if set(knobs) <= {"*"} else knobs
        keys |= {name: file and asdict(file) for name, file in (("model", self.model), ("teacher", self.teacher))}
        # Classes of one's own are not imported to be written.
        passes = [(step.name, step.options, all_passes().get(step.name)) for step in self.passes]
        return recipe_text(passes, keys, about=self._about(), complete=complete)

    def _about(self) -> list[str]:
        """What people should know who read the file."""
        found = [self.summary] if self.summary else []
        found += [
            "To check this file: surgeon recipe check FILE. To run it: surgeon apply, or in Python "
            "surgeon.load_recipe. All options of a pass: surgeon passes NAME."
        ]
        if len(self.runs) > 1:
            found.append(
                f"These passes had {len(self.runs)} runs. In one run, those that train may give other weights: all of "
                "them learn from the model before the first pass, on the same data."
            )
        return found

    def save(self, file: str | Path, *, complete: bool = False, overwrite: bool = False) -> Path:
        """Write a YAML file with a comment for every pass and option, which `surgeon.load_recipe` reads.

        Args:
            complete: write all options, also those that have their default.

        Raises:
            SaveError: the file exists, or cannot be written. UsageError: `file` is no path.
        """
        path = path_of(file)
        if path.exists() and not overwrite:
            raise SaveError(f"{path} exists. Give another file, or overwrite it.")
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_text(self.text(complete=complete), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise SaveError(f"Cannot write {path}: {error.strerror or error}.") from error
        return path


def find_pass(name: str) -> type[Pass[Any]]:
    """The pass of this name, or one's own as `module:Class` or `path/to/file.py:Class`, which imports it.

    Raises:
        UsageError: there is no such pass; the message suggests the nearest name.
    """
    known = all_passes()
    if name in known:
        return known[name]
    if is_spec(name):
        found = load_spec(name, UsageError)
        if not is_pass(found):
            raise UsageError(
                f"{name} is not a pass: it is no subclass of surgeon.passes.Pass, has no name or no rewrite."
            )
        return found
    if name in broken_passes():
        raise UsageError(f"The pass '{name}' of another package cannot be used: {broken_passes()[name]}.")
    raise UsageError(f"No pass '{name}'.{_suggest(name, known)}")


def name_of(pass_: Pass[Any]) -> str:
    """The name by which `find_pass` finds the class of a pass."""
    kind = type(pass_)
    if kind.__module__.startswith(f"{GROUP}.") or all_passes().get(pass_.name) is kind:
        return pass_.name
    return spec_of(kind)


def build(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> list[Pass[Any]]:
    """Build passes from names and `{pass: {option: value}}`. Values may be strings, as typed on a command line.

    Values that differ between sites are typed as `*.0.*:8,*:4`.

    Raises:
        UsageError: an unknown pass or option, a value of the wrong type, or options for a pass that is not run.
    """
    return Recipe(tuple(map(Step, names))).build(options)


def with_options(kind: type[Pass[Any]], options: Mapping[str, Any]) -> Pass[Any]:
    """Build a pass with options. Values may be strings, as typed on a command line.

    Raises:
        UsageError: an unknown option, or a value of the wrong type or out of range.
    """
    return kind(**{key: read_option(kind, key, value) for key, value in options.items()})


def read_option(kind: type[Pass[Any]], key: str, value: Any) -> Any:
    """Return the value of an option of a pass. Texts are converted to its type, other values have to have it.

    Raises:
        UsageError: there is no such option, or the value has another type or is out of range.
    """
    types = option_types(kind)
    if key not in types:
        raise UsageError(f"{kind.name} has no option '{key}'.{_suggest(key, types)}")
    if isinstance(value, str):
        if typing.get_origin(types[key]) is tuple:
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        elif value.lower() in ("none", "") and type(None) in typing.get_args(types[key]):
            value = None
        elif ":" in value and any(typing.get_origin(part) is dict for part in typing.get_args(types[key])):
            value = parse_by_site(f"{kind.name}.{key}=", value)
    if isinstance(value, str) or (isinstance(value, Mapping) and any(isinstance(v, str) for v in value.values())):
        try:
            value = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{kind.name}.{key}={value}: {reason[0].lower()}{reason[1:]}.") from None
    return check_value(kind, key, value)


def parse_by_site(name: str, text: str) -> dict[str, str]:
    """`"*.0.*:8,*:4"` → `{"*.0.*": "8", "*": "4"}`, in this order. If a pattern is given twice, the first value counts.

    name: of the option, for the message.

    Raises:
        UsageError: the text does not have this form.
    """
    values: dict[str, str] = {}
    for part in text.split(","):
        pattern, colon, value = (word.strip() for word in part.rpartition(":"))
        if not colon or not pattern or not value:
            raise UsageError(f"{name}{text}: write PATTERN:VALUE,PATTERN:VALUE, for example '*.0.*:8,*:4'.")
        values.setdefault(pattern, value)
    return values


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(known)}."
