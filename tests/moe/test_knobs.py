"""Knobs: set for all layers, by path and by pattern, and put back."""

from __future__ import annotations

from typing import Any

import pytest

import surgeon
from surgeon.errors import UsageError
from surgeon.moe.knobs import get_knobs, get_rule, get_tau, set_knobs, set_rule, set_tau
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify

FIRST, SECOND = "blocks.0.ffn.moe", "blocks.1.ffn.moe"


@pytest.fixture(params=["module", "dynamic"])
def graph(request: pytest.FixtureRequest, traces: Any) -> Any:
    made = traces("stack:gelu")
    Moeify(experts=4, router_width=8).apply(made)
    if request.param == "dynamic":
        Lower().apply(made)
    assert {site.form for site in find_moes(made)} == {request.param}
    return made


def test_of_several_patterns_the_first_that_fits_counts(graph: Any) -> None:
    assert set_tau(graph, {"blocks.1.ffn": 0.25, "*": 0.75}) == [FIRST, SECOND]
    assert get_tau(graph) == {FIRST: 0.75, SECOND: 0.25}
    assert set_tau(graph, {"*": 0.5, SECOND: 1.0}) == [FIRST, SECOND]
    assert get_tau(graph) == {FIRST: 0.5, SECOND: 0.5}
    assert set_rule(graph, {SECOND: "energy", "blocks.*": "top_k"}) == [FIRST, SECOND]
    assert get_rule(graph) == {FIRST: "top_k", SECOND: "energy"}
    assert set_rule(graph, {"*": "max", "blocks.0.*": "energy"}) == [FIRST, SECOND]
    assert get_rule(graph) == {FIRST: "max", SECOND: "max"}


def test_a_pattern_that_another_shadows_must_name_a_layer_all_the_same(graph: Any) -> None:
    with pytest.raises(UsageError, match=r"No layer 'blocks\.7'"):
        set_tau(graph, {"*": 0.5, "blocks.7": 0.25})
    assert set(get_tau(graph).values()) == {0.0}


def test_knobs_are_put_back(graph: Any) -> None:
    set_tau(graph, {FIRST: 0.25, SECOND: 0.5})
    set_rule(graph, {FIRST: "energy", SECOND: "top_k"})
    kept = get_knobs(graph)
    surgeon.set_tau(graph, 1.0)
    surgeon.set_rule(graph, "max")
    set_knobs(graph, kept)
    assert get_tau(graph) == {FIRST: 0.25, SECOND: 0.5}
    assert get_rule(graph) == {FIRST: "energy", SECOND: "top_k"}
