"""Build passes from what a user typed."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from surgeon.errors import UsageError
from surgeon.passes.base import Pass
from surgeon.passes.options import option_types
from surgeon.passes.registry import all_passes, broken_passes


def find_pass(name: str) -> type[Pass[Any]]:
    """The pass of this name.

    Raises:
        UsageError: there is no such pass; the message suggests the nearest name.
    """
    known = all_passes()
    if name in known:
        return known[name]
    if name in broken_passes():
        raise UsageError(f"The pass '{name}' of another package cannot be used: {broken_passes()[name]}.")
    raise UsageError(f"No pass '{name}'.{_suggest(name, known)}")


def build(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> list[Pass[Any]]:
    """Build passes from names and `{pass: {option: value}}`. Values may be strings, as typed on a command line.

    Values that differ between sites are typed as `*.0.*:8,*:4`.

    Raises:
        UsageError: an unknown pass or option, a value of the wrong type, or options for a pass that is not run.
    """
    options = options or {}
    for name in options:
        find_pass(name)
        if name not in names:
            raise UsageError(f"Options were given for '{name}', which is not among the passes: {', '.join(names)}.")
    return [with_options(find_pass(name), options.get(name, {})) for name in names]


def with_options(kind: type[Pass[Any]], options: Mapping[str, Any]) -> Pass[Any]:
    """Build a pass with options. Values may be strings, as typed on a command line.

    Raises:
        UsageError: an unknown option, or a value of the wrong type or out of range.
    """
    return kind(**_values(kind, options))


def _values(kind: type[Pass[Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    types = option_types(kind)
    values = {}
    for key, value in given.items():
        if key not in types:
            raise UsageError(f"{kind.name} has no option '{key}'.{_suggest(key, types)}")
        if isinstance(value, str):
            if typing.get_origin(types[key]) is tuple:
                value = tuple(part.strip() for part in value.split(",") if part.strip())
            elif value.lower() in ("none", "") and type(None) in typing.get_args(types[key]):
                value = None
            elif ":" in value and any(typing.get_origin(part) is dict for part in typing.get_args(types[key])):
                value = parse_by_site(f"{kind.name}.{key}=", value)
        try:
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{kind.name}.{key}={value}: {reason[0].lower()}{reason[1:]}.") from None
    return values


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
