"""Every built-in pass meets what is asked of all passes."""

from __future__ import annotations

from typing import Any

from surgeon.passes import (
    EarlyExit,
    HaltTokens,
    Lower,
    Mlpify,
    Moeify,
    Pass,
    Recover,
    Refit,
    Rotate,
    Sparsify,
    SparsifyInputs,
    SparsifyNeurons,
    SwapActivation,
)
from surgeon.passes.registry import all_passes
from surgeon.testing import PassConformance
from surgeon.testing.models import vectors
from tests.small_models import correlated_vectors

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


class TestSparsifyInputs(PassConformance):
    make = staticmethod(SparsifyInputs)
    options = {"criterion": "magnitude", "centre": False, "tau": 0.5}  # noqa: RUF012


class TestSparsifyNeurons(PassConformance):
    make = staticmethod(SparsifyNeurons)
    kind = "gated"
    options = {"criterion": "magnitude", "centre": False, "tau": 0.5}  # noqa: RUF012


class TestEarlyExit(PassConformance):
    make = staticmethod(lambda: EarlyExit(steps=2))
    layers = 3
    options = {"every": 2, "width": 8, "cascade": False, "pool": "mean"}  # noqa: RUF012


class TestHaltTokens(PassConformance):
    make = staticmethod(lambda: HaltTokens(steps=2))
    layers = 3
    options = {"gamma": 2.0, "beta": -1.0, "depth": 1.5, "only": ["blocks.*"]}  # noqa: RUF012


class TestRefit(PassConformance):
    make = staticmethod(Refit)
    first = (SparsifyInputs(tau=0.5),)
    options = {"ridge": 0.5, "rank": 0.25}  # noqa: RUF012
    applies_once = False  # it fits what is there
    data = staticmethod(correlated_vectors)


class TestRotate(PassConformance):
    make = staticmethod(Rotate)
    kind = "pre-norm"
    options = {"heads": False}  # noqa: RUF012
    applies_once = False  # other data have another basis
    data = staticmethod(correlated_vectors)

    def test_accounts_for_every_parameter(self, pass_, graph) -> None:  # type: ignore[no-untyped-def]
        """Weights keep their names and shapes, and get other values. Gains and biases of norms are gone."""
        before = {name: tensor.shape for name, tensor in graph.state_dict().items()}
        pass_.apply(graph, inputs=vectors(), data=correlated_vectors())
        after = {name: tensor.shape for name, tensor in graph.state_dict().items()}
        assert after.items() <= before.items()
        assert all("norm" in name for name in before.keys() - after.keys())
        assert not any("norm" in name for name in after)


def suite_of(kind: type[Pass[Any]]) -> type[PassConformance]:
    """The suite of a pass that needs no options of its own."""
    settings = {"make": staticmethod(kind), "first": EXPERTS if kind.works_on in ("moe", "dynamic") else ()}
    return type(f"Test{kind.__name__}", (PassConformance,), settings)


USUAL = (TestMlpify, TestSwapActivation, TestSparsify, TestMoeify, TestSparsifyInputs, TestRecover, TestLower)
SUITES = [*USUAL, TestSparsifyNeurons, TestEarlyExit, TestHaltTokens, TestRefit, TestRotate]
for name, kind in all_passes().items():
    if kind.__module__.startswith("surgeon.") and name not in [suite.make().name for suite in SUITES]:
        SUITES.append(suite_of(kind))
        globals()[SUITES[-1].__name__] = SUITES[-1]


def test_a_new_pass_gets_a_suite() -> None:
    names = [suite.make().name for suite in SUITES]
    assert sorted(names) == sorted(
        name for name, kind in all_passes().items() if kind.__module__.startswith("surgeon.")
    )
    assert issubclass(suite_of(Lower), PassConformance)
    assert suite_of(Lower).first == TestLower.first
    assert suite_of(SwapActivation).make() == SwapActivation()
