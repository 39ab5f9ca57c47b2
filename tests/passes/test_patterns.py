"""Options by path, only and skip too: a pattern that names no site is refused, with the paths there are."""

from __future__ import annotations

from typing import Any

import pytest

from surgeon.errors import UsageError
from surgeon.graph.traced import fork
from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation
from tests.passes.reports import reasons
from tests.small_models import vectors


@pytest.mark.parametrize(
    ("one", "name", "pattern"),
    [
        (Moeify(experts={"*.layer.zero": 4}), "moeify.experts", "*.layer.zero"),
        (Moeify(expert_size={"*.0.*": 4, "blocks.2.ffn": 8}), "moeify.expert_size", "blocks.2.ffn"),
        (Moeify(experts={"*.0.*": 4}, only=("*.1.*",)), "moeify.experts", "*.0.*"),
        (Sparsify(target={"blocks.0": 0.1, "*": 0.2}), "sparsify.target", "blocks.0"),
        (SwapActivation(to={"BLOCKS.*": "relu2", "*": "relu"}), "swap-activation.to", "BLOCKS.*"),
        (Sparsify(only=("*.0.*", "blocks.2.*")), "sparsify.only", "blocks.2.*"),
        (Sparsify(skip=("blocks.1",)), "sparsify.skip", "blocks.1"),
    ],
)
def test_a_pattern_that_names_no_site_is_refused(traces: Any, one: Any, name: str, pattern: str) -> None:
    graph = fork(traces("stack:gelu"))
    code = graph.code
    with pytest.raises(UsageError) as error:
        one.apply(graph, inputs=vectors())
    chosen = one.only == ("*.1.*",)
    there = "blocks.1.ffn" if chosen else "blocks.0.ffn, blocks.1.ffn"
    assert str(error.value) == f"{name}: no site matches '{pattern}'. There are: {there}."
    assert graph.code == code


def test_a_pattern_may_name_a_site_that_is_refused(traces: Any) -> None:
    """Then the reason is that of the site."""
    report = Moeify(experts={"*.0.*": 4, "*.1.*": 10_000}).apply(traces("stack:relu"), inputs=vectors())
    assert report.matched == ["blocks.0.ffn"]
    assert [rejection.path for rejection in report.rejected] == ["blocks.1.ffn"]


def test_where_no_site_is_left_the_pattern_is_not_to_blame(traces: Any) -> None:
    one = SwapActivation(to={"nowhere": "relu"}, skip=("*",))
    assert one.apply(traces("stack:gelu"), inputs=vectors()).matched == []


def test_a_pattern_may_name_a_candidate_that_the_other_leaves_out(traces: Any) -> None:
    """Both are compared with all candidates, those that are refused included."""
    graph = traces("stack:relu")
    one = SwapActivation(only=("blocks.0.*", "blocks.1.*"), skip=("blocks.1.ffn",))
    assert reasons(one.apply(graph, inputs=vectors())) == [("blocks.0.ffn", "its activation is already relu")]


def test_explaining_refuses_it_too_and_a_graph_without_candidates_does_not(traces: Any) -> None:
    with pytest.raises(UsageError, match=r"moeify\.skip: no site matches 'head'"):
        Moeify(skip=("head",)).explain(traces("stack:gelu"))
    assert Lower(skip=("blocks.0.*",)).explain(traces("stack:gelu")) == ([], [])
