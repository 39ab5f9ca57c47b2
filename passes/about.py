"""A pass in words and plain values, as `surgeon passes` shows it."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from surgeon.passes.options import Limits, limits_of, option_types

if TYPE_CHECKING:
    from surgeon.passes.contract import Contract

GROUP = "surgeon.passes"
"""The entry points by which other packages offer passes."""


@dataclass(frozen=True)
class Option:
    """An option of a pass: its name, type in words, default, and what it does."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class About:
    """A pass in words and plain values: see `surgeon.passes.contract.Contract`.

    summary: the first paragraph of the description, whose paragraphs are separated by empty lines. output: how the pass
    affects the model's output. options: its own first, then those that all passes share.
    """

    name: str
    summary: str
    description: str
    works_on: str
    makes: str | None
    must_precede: tuple[str, ...]
    preserves: bool
    needs_data: bool
    trains: bool
    calibrates: bool
    untrained: str
    output: Literal["changes", "stays", "stays until trained"]
    options: tuple[Option, ...]


def describe(kind: type[Contract[Any, Any]]) -> About:
    """Describe a pass."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(kind.__doc__ or "").split("\n\n")]
    return About(
        name=kind.name,
        summary=paragraphs[0],
        description="\n\n".join(paragraphs),
        works_on=kind.works_on,
        makes=kind.makes,
        must_precede=tuple(sorted(kind.must_precede)),
        preserves=kind.preserves,
        needs_data=kind.needs_data,
        trains=kind.trains,
        calibrates=kind.calibrates,
        untrained=kind.untrained,
        output=("changes" if not kind.preserves else "stays" if kind().keeps_output(True) else "stays until trained"),
        options=_options(kind),
    )


def _options(kind: type[Contract[Any, Any]]) -> tuple[Option, ...]:
    types, own = option_types(kind), list(vars(kind).get("__annotations__", {}))
    shared = ("only", "skip")
    fields = sorted(
        dataclasses.fields(kind),
        key=lambda item: (item.name in shared, own.index(item.name) if item.name in own else len(own)),
    )
    limits = limits_of(kind)
    return tuple(
        Option(item.name, _typed(types[item.name], limits[item.name]), item.default, item.metadata["help"])
        for item in fields
    )


def _typed(kind: Any, limits: Limits) -> str:
    """The type in words: `integer at least 1`, `number from 0 to 1 or none`, or the choices."""
    if limits.choices:
        by_site = any(get_origin(part) is dict for part in get_args(kind))
        return "|".join(map(str, limits.choices)) + (" or PATTERN:...,..." if by_site else "")
    words = str(limits)
    first, *rest = _type(kind).split(" or ")
    return " or ".join([f"{first} {words}".rstrip(), *rest])


def _type(kind: Any) -> str:
    """A type in words: `integer or none`, `constant|linear|cosine`, `number or PATTERN:number,...`."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(map(str, arguments))
    if get_origin(kind) is tuple:
        return "list"
    if get_origin(kind) is dict:
        return f"PATTERN:{_type(arguments[1])},..."
    if arguments:
        return " or ".join(map(_type, arguments))
    names = {"str": "text", "float": "number", "int": "integer", "bool": "true|false", "NoneType": "none"}
    return names.get(getattr(kind, "__name__", ""), str(kind))
