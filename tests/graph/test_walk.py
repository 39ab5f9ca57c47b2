"""Walks over a graph: every node once, in an order that callers rely on, no further than they ask."""

from __future__ import annotations

from itertools import islice

import pytest
from torch.fx import Graph, Node

from surgeon.graph.walk import walk_sources, walk_users


@pytest.fixture
def nodes() -> dict[str, Node]:
    """x → a, b → c (of both) → d; a → e. By name."""
    graph = Graph()
    x = graph.placeholder("x")
    a, b = (graph.call_function(abs, (x,), name=name) for name in "ab")
    c = graph.call_function(max, (a, b), name="c")
    d = graph.call_function(abs, (c,), name="d")
    e = graph.call_function(abs, (a,), name="e")
    graph.output((d, e))
    return {node.name: node for node in graph.nodes}


def names(nodes: object) -> list[str]:
    return [node.name for node in nodes]  # type: ignore[attr-defined]


def test_users_are_met_once_depth_first(nodes: dict[str, Node]) -> None:
    assert names(walk_users(nodes["x"], lambda _: True)) == ["a", "b", "c", "d", "output", "e"]
    assert names(walk_users(nodes["output"], lambda _: True)) == []


def test_users_of_what_stops_the_walk_are_not_met(nodes: dict[str, Node]) -> None:
    assert names(walk_users(nodes["x"], lambda node: node.name == "a")) == ["a", "b", "c", "e"]
    assert names(walk_users(nodes["x"], lambda _: False)) == ["a", "b"]


def test_sources_are_met_once_depth_first(nodes: dict[str, Node]) -> None:
    assert names(walk_sources(nodes["d"])) == ["d", "c", "b", "x", "a"]
    assert names(walk_sources(nodes["x"])) == ["x"]


def test_sources_of_what_stops_the_walk_are_not_met(nodes: dict[str, Node]) -> None:
    assert names(walk_sources(nodes["output"], lambda node: node.name in ("output", "d"))) == ["output", "e", "d", "c"]
    assert names(walk_sources(nodes["d"], lambda _: False)) == ["d"]


def test_the_caller_decides_by_what_it_did_with_a_node(nodes: dict[str, Node]) -> None:
    taken: list[Node] = []
    for node in walk_sources(nodes["d"], taken.__contains__):
        if node.name != "c":
            taken.append(node)
    assert names(taken) == ["d"]
    taken.clear()
    for node in walk_users(nodes["x"], taken.__contains__):
        if node.name != "b":
            taken.append(node)
    assert names(taken) == ["a", "c", "e", "output", "d"] or names(taken) == ["a", "e", "output", "c", "d"]


def test_no_more_is_walked_than_is_asked_for(nodes: dict[str, Node]) -> None:
    asked: list[str] = []

    def through(node: Node) -> bool:
        asked.append(node.name)
        return True

    assert names(islice(walk_sources(nodes["d"], through), 2)) == ["d", "c"]
    assert asked == ["d"]
