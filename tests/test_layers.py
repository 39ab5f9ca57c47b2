"""Imports point one way: from a folder only to those below it, and never in a circle. Lazy and type-only ones count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1] / "surgeon"
# From the top down. Folders on one line do not import one another.
LAYERS = (
    ("cli",),
    ("render",),
    ("jobs", "testing"),
    ("surgery",),
    ("text", "pretrained"),
    ("grafting",),
    ("passes", "bench"),
    ("training", "measure", "engines"),
    ("dynamic",),
    ("moe", "inputs", "exits", "data", "tracing"),
    ("models", "sites"),
    ("graph", "kernels"),
    ("collective", "display"),
    ("described", "directories", "errors", "json_values", "processes", "progress", "version"),
)
RANK = {folder: rank for rank, layer in enumerate(LAYERS) for folder in layer}
# The package's own face: they show what lies inside to users, and nothing inside imports them.
FACE = ("surgeon", "surgeon.__main__")


def modules() -> dict[str, Path]:
    """Every module of the package with its file, packages by their `__init__.py`."""
    found = {}
    # `rglob` does not follow the links to passes/ and kernels/.
    for top in [ROOT, *(path for path in ROOT.iterdir() if path.is_symlink())]:
        for file in sorted(top.resolve().rglob("*.py")):
            inside = file.relative_to(top.resolve())
            parts = ["surgeon", *([] if top == ROOT else [top.name]), *inside.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, at any depth of its code.

    An import of a name from a package is one of the module of that name, where there is one.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (module := inner if inner in known else node.module or "") in known:
                    yield module


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    """An arrow from each module to every one that it imports."""
    known = modules()
    made = nx.DiGraph()
    made.add_nodes_from(known)
    for name, file in known.items():
        made.add_edges_from((name, other) for other in imports(name, file, known) if other != name)
    made.remove_nodes_from(FACE)
    return made


def folder(module: str) -> str:
    """`sites` of `surgeon.sites.ffn`."""
    return module.split(".")[1]


def test_every_folder_has_its_layer(graph: nx.DiGraph) -> None:
    assert {folder(module) for module in graph} == set(RANK)


def test_no_arrow_runs_up_or_sideways(graph: nx.DiGraph) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, other in graph.edges
        if folder(module) != folder(other) and RANK[folder(module)] >= RANK[folder(other)]
    ]
    assert not wrong, "\n".join(["Against the order of the layers:", *sorted(wrong)])


def test_no_circle(graph: nx.DiGraph) -> None:
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles, "\n".join(["Import one another:", *(" and ".join(circle) for circle in circles)])


@pytest.mark.parametrize(
    ("module", "other", "allowed"),
    [("jobs.apply", "passes.base", True), ("passes.base", "jobs.apply", False), ("passes.base", "bench.run", False)],
)
def test_the_order_is_what_is_checked(module: str, other: str, allowed: bool) -> None:
    made = nx.DiGraph([(f"surgeon.{module}", f"surgeon.{other}")])
    if allowed:
        test_no_arrow_runs_up_or_sideways(made)
    else:
        with pytest.raises(AssertionError, match=f"surgeon.{module} imports surgeon.{other}"):
            test_no_arrow_runs_up_or_sideways(made)
