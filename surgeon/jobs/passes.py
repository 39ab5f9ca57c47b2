"""Describe a pass: what it does, its options, and what it changes in a small model."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from surgeon.passes import Moeify, Pass
from surgeon.passes.options import Limits, limits_of
from surgeon.passes.report import PassDiff
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import option_types


@dataclass(frozen=True)
class Option:
    """An option of a pass: its name, type and default, and what it does."""

    name: str
    type: str
    default: Any
    help: str


def describe(kind: type[Pass[Any]]) -> dict[str, Any]:
    """Describe a pass with plain values. Paragraphs of the description are separated by empty lines."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(kind.__doc__ or "").split("\n\n")]
    return {
        "name": kind.name,
        "summary": paragraphs[0],
        "description": "\n\n".join(paragraphs),
        "works_on": kind.works_on,
        "makes": kind.makes,
        "must_precede": sorted(kind.must_precede),
        "preserves": kind.preserves,
        "needs_data": kind.needs_data,
        "trains": kind.trains,
        "calibrates": kind.calibrates,
    }


def options_of(kind: type[Pass[Any]]) -> list[Option]:
    """The options of a pass: its own first, then those that all passes share."""
    types, own = option_types(kind), list(vars(kind).get("__annotations__", {}))
    shared = ("only", "skip")
    fields = sorted(
        dataclasses.fields(kind),
        key=lambda item: (item.name in shared, own.index(item.name) if item.name in own else len(own)),
    )
    limits = limits_of(kind)
    return [
        Option(item.name, _typed(types[item.name], limits[item.name]), item.default, item.metadata["help"])
        for item in fields
    ]


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


class _Example(nn.Module):
    """A projection and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 64] → [..., 64]."""
        return x + self.mlp(self.norm(self.query(x)))  # type: ignore[no-any-return]


def example_of(kind: type[Pass[Any]]) -> PassDiff:
    """What a pass changes in a small model, without data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = _Example().eval(), torch.randn(2, 4, 64)
    passes: list[Pass[Any]] = [Moeify()] if kind.works_on == "moe" else []
    return Pipeline([*passes, kind()]).run(model, inputs=inputs, dry_run=True).diff().passes[-1]
