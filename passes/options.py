"""Declare the options of passes, check their values, and look up values that differ between sites."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from surgeon.errors import UsageError
from surgeon.graph.patterns import first_fit, matches

Value = TypeVar("Value")
PerSite: TypeAlias = Value | dict[str, Value]
"""An option with one value for all sites, or values by path. Patterns with * are allowed; the first match counts."""


def for_site(value: PerSite[Value] | None, path: str) -> Value | None:
    """Return the value of an option for one site, or None if it has none."""
    return first_fit(value, path) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Limits:
    """The values that an option accepts: numbers within bounds, or one of several choices. None: no such bound."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()

    def allow(self, value: Any) -> bool:
        """Whether the value is accepted. NaN is never within bounds."""
        if self.choices:
            return value in self.choices
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`at least 1`, `from 0 to 1`, `above 0 and below 1`, `one of max, top_k`; "" if every value is accepted."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[Any] = (),
) -> Any:
    """Declare a field of a pass that is also a command-line option.

    The bounds apply to every number in the value, also if it differs between sites. None is always accepted. A field
    whose type is a `Literal` needs no choices.

    Args:
        help: one or more sentences for `surgeon passes NAME`.
        least, most: bounds that are themselves accepted. above, below: bounds that are not.
        choices: the accepted values.
    """
    limits = Limits(least, most, above, below, tuple(choices))
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


def option_types(kind: type[Any]) -> dict[str, Any]:
    """The type of every option of a pass, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def limits_of(kind: Hashable) -> Mapping[str, Limits]:
    """The limits of every option of a pass, by name."""
    hints = typing.get_type_hints(kind)
    assert isinstance(kind, type)
    return {
        field.name: Limits(choices=choices) if (choices := _literals(hints[field.name])) else field.metadata["limits"]
        for field in dataclasses.fields(kind)
    }


def _literals(hint: Any) -> tuple[Any, ...]:
    """The values of the `Literal` in a type, () if there is none."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((found for part in typing.get_args(hint) if (found := _literals(part))), ())


def check_values(instance: Any) -> None:
    """Refuse a pass with an option of another type, or outside its limits. A list counts as a tuple.

    Raises:
        UsageError: names the pass, the option, its value and the accepted values.
    """
    for field in dataclasses.fields(instance):
        given = getattr(instance, field.name)
        checked = check_value(type(instance), field.name, given)
        if checked is not given:
            object.__setattr__(instance, field.name, checked)  # the dataclass is frozen


def check_value(kind: type[Any], name: str, given: Any) -> Any:
    """Return the value of an option of a pass, with lists as tuples and numbers of other libraries as Python's.

    Raises:
        UsageError: it has another type, or is outside the limits. Names the pass, the option, its value and the
            accepted values.
    """
    value, limits = _plain(given), limits_of(cast("Hashable", kind))[name]
    hint, reader = _readers(cast("Hashable", kind))[name]
    try:
        reader.validate_python(value)
    except ValidationError:
        accepted = str(limits) if limits.choices else _words(hint, limits)
        raise UsageError(f"{kind.name}: {name} is {given!r}, but must be {accepted}.") from None
    for one in value.values() if isinstance(value, dict) else [value]:
        if one is not None and not isinstance(one, tuple) and not limits.allow(one):
            raise UsageError(f"{kind.name}: {name} is {one!r}, but must be {limits}.")
    return value


@functools.cache
def _readers(kind: Hashable) -> Mapping[str, tuple[Any, TypeAdapter[Any]]]:
    """The type of every option of a pass, and what checks values for it without converting them, by name."""
    assert isinstance(kind, type)
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return {name: (hint, TypeAdapter(hint, config=strict)) for name, hint in option_types(kind).items()}


def _plain(value: Any) -> Any:
    """The value with numbers of other libraries as Python's own, and a list as a tuple."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int | float) else value


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}


def _words(hint: Any, limits: Limits) -> str:
    """The accepted values: `a whole number at least 1, a dict of such values by pattern of paths, or None`."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    found = []
    for part in parts:
        if typing.get_origin(part) is dict:
            found.append("a dict of such values by pattern of paths")
        elif typing.get_origin(part) is tuple:
            found.append("a tuple of texts")
        else:
            words = _KINDS.get(part, getattr(part, "__name__", str(part)))
            found.append(f"{words} {limits}".rstrip() if part in (int, float) else words)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])}{',' * (len(found) > 2)} or {found[-1]}"


def check_patterns(option: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Refuse an option with a pattern that matches none of the paths.

    Raises:
        UsageError: names the pattern and the paths.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(matches([pattern], path) for path in paths):
            there = ", ".join(filter(None, paths))
            raise UsageError(f"{option}: no site matches '{pattern}'. There are: {there}.")
