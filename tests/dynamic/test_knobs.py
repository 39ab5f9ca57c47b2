"""Knobs: set for all layers, by path and by pattern, and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgeon
from surgeon.dynamic.knobs import get_knobs, get_rule, get_tau, set_knobs, set_rule, set_tau
from surgeon.errors import UsageError
from surgeon.graph.traced import fork
from tests.small_models import vectors

FIRST, SECOND = "blocks.0.ffn.moe", "blocks.1.ffn.moe"


def test_of_several_patterns_the_first_that_fits_counts(graph: Any) -> None:
    assert set_tau(graph, {"blocks.1.ffn": 0.25, "*": 0.75}) == [FIRST, SECOND]
    assert get_tau(graph) == {FIRST: 0.75, SECOND: 0.25}
    assert set_tau(graph, {"*": 0.5, SECOND: 1.0}) == [FIRST, SECOND]
    assert get_tau(graph) == {FIRST: 0.5, SECOND: 0.5}
    assert set_rule(graph, {SECOND: "energy", "blocks.*": "top_k"}) == [FIRST, SECOND]
    assert get_rule(graph) == {FIRST: "top_k", SECOND: "energy"}
    assert set_rule(graph, {"*": "max", "blocks.0.*": "energy"}) == [FIRST, SECOND]
    assert get_rule(graph) == {FIRST: "max", SECOND: "max"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1 / 3, 1e-5, 1.0])
def test_tau_is_read_as_it_was_set(graph: Any, dtype: torch.dtype, tau: float) -> None:
    half = fork(graph).to(dtype)
    set_tau(half, tau)
    stored = float(torch.tensor(tau, dtype=dtype))
    for value in get_tau(half).values():
        assert value == tau or len(str(value)) <= len(str(stored))
        assert float(torch.tensor(value, dtype=dtype)) == stored
    set_tau(half, 0.05)
    assert set(get_tau(half).values()) == {0.05}


def test_a_pattern_that_another_shadows_must_name_a_layer_all_the_same(graph: Any) -> None:
    with pytest.raises(UsageError, match=r"No layer 'blocks\.7'"):
        set_tau(graph, {"*": 0.5, "blocks.7": 0.25})
    assert set(get_tau(graph).values()) == {0.0}


def test_knobs_are_put_back(graph: Any) -> None:
    set_tau(graph, {FIRST: 0.25, SECOND: 0.5})
    set_rule(graph, {FIRST: "energy", SECOND: "top_k"})
    kept = get_knobs(graph)
    set_tau(graph, 1.0)
    set_rule(graph, "max")
    set_knobs(graph, kept)
    assert get_tau(graph) == {FIRST: 0.25, SECOND: 0.5}
    assert get_rule(graph) == {FIRST: "energy", SECOND: "top_k"}


def test_tau_for_all_by_path_and_by_pattern(graph: Any) -> None:
    first, second = "blocks.0.ffn.moe", "blocks.1.ffn.moe"
    assert surgeon.set_tau(graph, 0.5) == [first, second]
    assert surgeon.get_tau(graph) == {first: 0.5, second: 0.5}
    assert set_tau(graph, 0.25, "blocks.1.ffn") == [second]
    assert get_tau(graph) == {first: 0.5, second: 0.25}
    assert set_tau(graph, 0.125, second) == [second]
    assert set_tau(graph, 1.0, "blocks.*") == [first, second]
    assert set_tau(graph, {first: 0.5, "blocks.1.ffn": 0.0}) == [first, second]
    assert get_tau(graph) == {first: 0.5, second: 0.0}


def test_tau_takes_effect_at_the_next_call(graph: Any) -> None:
    inputs = vectors()
    want = graph(**inputs)
    set_tau(graph, 1.0)
    changed = graph(**inputs)
    assert not torch.allclose(changed, want, atol=1e-5)
    set_tau(graph, 0.0)
    assert torch.equal(graph(**inputs), want)


def test_tau_of_a_fork_is_shared(graph: Any) -> None:
    copied = fork(graph)
    set_tau(copied, 0.5)
    assert set(get_tau(graph).values()) == {0.5}


@pytest.mark.parametrize(("tau", "path", "words"), [
    (1.5, None, "tau is 1.5.*from 0 to 1"),
    (-0.1, None, "tau is -0.1"),
    (float("nan"), None, "tau is nan"),
    (0.5, "blocks.7", "No layer 'blocks.7'. Layers that can be set: blocks.0.ffn.moe, blocks.1.ffn.moe"),
    ({"nowhere": 0.5}, None, "No layer 'nowhere'"),
])  # fmt: skip
def test_wrong_tau(graph: Any, tau: Any, path: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        set_tau(graph, tau, path)
    assert set(get_tau(graph).values()) == {0.0}


def test_tau_without_experts(traces: Any) -> None:
    with pytest.raises(UsageError, match=r"has no layers that skip, so there is nothing to set\. Apply moeify"):
        set_tau(traces("stack:gelu"), 0.5)
    assert get_tau(traces("stack:gelu")) == {}


def test_a_mapping_with_a_wrong_entry_changes_nothing(graph: Any) -> None:
    with pytest.raises(UsageError):
        set_tau(graph, {"blocks.0.ffn": 0.5, "nowhere": 0.5})
    assert set(get_tau(graph).values()) == {0.0}


def test_rules_need_experts(traces: Any) -> None:
    with pytest.raises(UsageError, match=r"no experts, so there is no rule to set\. Apply moeify first"):
        set_rule(traces("stack:relu"), "max")
    assert get_rule(traces("stack:relu")) == {}
