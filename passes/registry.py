"""Find every pass by name, in this folder and in other packages.

A package offers a pass through an entry point in the group `surgeon.passes`:

    [project.entry-points."surgeon.passes"]
    clip-hidden = "my_package:ClipHidden"
"""

from __future__ import annotations

import functools
import graphlib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeGuard

from surgeon.errors import first_line
from surgeon.passes.about import GROUP
from surgeon.passes.base import Pass


def all_passes() -> Mapping[str, type[Pass[Any, Any]]]:
    """Return every pass by name, in the order in which they usually run."""
    return _found()[0]


def broken_passes() -> Mapping[str, str]:
    """Return why passes of other packages cannot be used, by the name of their entry point."""
    return _found()[1]


@functools.cache
def _found() -> tuple[dict[str, type[Pass[Any, Any]]], dict[str, str]]:
    own: dict[str, type[Pass[Any, Any]]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        for kind in vars(importlib.import_module(f"{GROUP}.{module.name}")).values():
            if is_pass(kind):
                own[kind.name] = kind
    offered: dict[str, type[Pass[Any, Any]]] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        found = _load(point)
        if isinstance(found, str):
            broken[point.name] = found
        elif found.name in own or found.name in offered:
            broken[point.name] = f"there is another pass called {found.name}"
        else:
            try:
                _ordered(own | offered | {found.name: found})
            except graphlib.CycleError:
                broken[point.name] = "its must_precede contradicts that of other passes"
            else:
                offered[found.name] = found
    return _ordered(own | offered), broken


def _load(point: EntryPoint) -> type[Pass[Any, Any]] | str:
    """The pass of an entry point, or why it cannot be used."""
    try:
        found = point.load()
    except Exception as error:  # code of others, which may raise anything
        return f"{point.value} cannot be imported ({type(error).__name__}: {first_line(error)})"
    return found if is_pass(found) else f"{point.value} is not a pass: it has no name, or a method is missing"


def is_pass(kind: object) -> TypeGuard[type[Pass[Any, Any]]]:
    """Whether it is the class of a pass, with a name and all methods."""
    return isinstance(kind, type) and issubclass(kind, Pass) and not inspect.isabstract(kind) and hasattr(kind, "name")


def _ordered(passes: Mapping[str, type[Pass[Any, Any]]]) -> dict[str, type[Pass[Any, Any]]]:
    """Sort the passes. Each comes before those that it must precede, and experts are made before they are used."""
    before: dict[str, set[str]] = {name: set() for name in passes}
    for name, kind in passes.items():
        for later in kind.must_precede & passes.keys():
            before[later].add(name)
    for name, kind in passes.items():
        for other, maker in passes.items():
            if maker.makes == kind.works_on and other != name and other not in kind.must_precede:
                before[name].add(other)
    sorter = graphlib.TopologicalSorter(before)
    sorter.prepare()
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    return {name: passes[name] for name in order}
