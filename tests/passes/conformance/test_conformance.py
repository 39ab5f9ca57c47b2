"""Every built-in pass meets what is asked of all passes."""

from __future__ import annotations

from surgeon.passes import Lower, Mlpify, Moeify, Recover, Sparsify, SwapActivation
from surgeon.passes.registry import all_passes
from surgeon.testing import PassConformance
from surgeon.testing.models import vectors

EXPERTS = (Moeify(experts=4, router_width=8),)


class TestSwapActivation(PassConformance):
    make = staticmethod(lambda: SwapActivation(steps=2))
    options = {"to": "silu", "only": ["blocks.*"]}  # noqa: RUF012


class TestSparsify(PassConformance):
    make = staticmethod(lambda: Sparsify(steps=2, lr=1e-3))
    options = {"alpha": 0.5, "steps": 7}  # noqa: RUF012


class TestMlpify(PassConformance):
    make = staticmethod(lambda: Mlpify(steps=2))
    options = {"cost_factor": 0.5, "skip": ["blocks.0.*"]}  # noqa: RUF012
    applies_once = False

    def test_its_own_linears_are_those_of_a_feed_forward_layer(self, pass_, graph) -> None:  # type: ignore[no-untyped-def]
        pass_.apply(graph)
        assert not [path for path in pass_.apply(graph, inputs=vectors()).matched if path.endswith((".fc1", ".fc2"))]


class TestMoeify(PassConformance):
    make = staticmethod(lambda: Moeify(experts=4, router_width=8, steps=2))
    kind = "gated"
    options = {"experts": {"*.0.*": 8, "*": 4}, "clip": None, "share_trunk": False}  # noqa: RUF012


class TestRecover(PassConformance):
    make = staticmethod(lambda: Recover(steps=2, lr=1e-3))
    kind = "gated"
    first = EXPERTS
    options = {"tau": 0.5, "distill": 0.25}  # noqa: RUF012
    applies_once = False  # it may go on


class TestLower(PassConformance):
    make = staticmethod(Lower)
    kind = "gated"
    first = EXPERTS
    options = {"only": ["blocks.1.*"]}  # noqa: RUF012


SUITES = (TestMlpify, TestSwapActivation, TestSparsify, TestMoeify, TestRecover, TestLower)


def test_every_pass_is_here() -> None:
    assert [suite.make().name for suite in SUITES] == list(all_passes())
