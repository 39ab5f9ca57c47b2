"""Architectures with known answers: required FFNs are found, traps are refused with a reason, and nothing changes.

Every graph is also called at three other shapes, where it computes what the model computes or refuses.

`quick` cases always run; `pytest --zoo` runs all of them (an hour on two cores).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import surgeon
from surgeon.errors import SizeError, TraceError
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.calls import as_args_kwargs
from surgeon.passes import Lower, Moeify
from surgeon.surgery.pipeline import Pipeline

from .zoo import (
    gated,
    huggingface,
    interfaces,
    modes,
    naming,
    plain,
    sharing,
    structures,
    surroundings,
    traps,
    traps_between,
    vision,
)
from .zoo.case import Case

FAMILIES = (
    *(plain, gated),
    *(structures, naming, sharing, interfaces, modes, surroundings),
    *(traps, traps_between, huggingface, vision),
)


def _cases() -> list[object]:
    return [pytest.param(case, id=name) for family in FAMILIES for name, case in family.CASES.items()]


def _other_shapes(case: Case) -> Iterator[tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The inputs of a case with another batch size, another length, and one token, each with a name."""
    torch.manual_seed(2)
    yield "another batch", as_args_kwargs(case.inputs(3))
    args, kwargs = as_args_kwargs(case.inputs(2))
    lengths = [leaf.shape[1] for leaf in pytree.tree_leaves((args, kwargs)) if _has_length(leaf)]
    for name, change in (("another length", 5), ("much longer", 29), ("one token", None)):

        def resized(leaf: Any, change: int | None = change) -> Any:
            if not _has_length(leaf) or leaf.shape[1] != lengths[0]:
                return leaf
            size = 1 if change is None else lengths[0] + change
            return leaf.index_select(1, torch.arange(size) % lengths[0])

        if lengths:
            yield name, pytree.tree_map(resized, (args, kwargs))


def _has_length(leaf: Any) -> bool:
    """Whether the second dimension is one of tokens or samples, and not of the features of a table or an image."""
    return isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.shape[1] > 1 and leaf.dim() < 4


def _outcome(model: nn.Module, graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float) -> str:
    """What a graph does at a shape: "same" output as the model, "refused", "silently wrong", or "fails"."""
    without_cache = {name: value and name != "use_cache" for name, value in kwargs.items() if name == "use_cache"}
    try:
        want = call_reproducibly(model, args, {**kwargs, **without_cache})
    except Exception:
        want = None  # the model does not take the shape itself
    try:
        got = call_reproducibly(graph, args, kwargs)
    except SizeError:
        return "refused"
    except Exception as error:
        return f"fails: {error}" if want is not None else "refused by the model"
    if want is None:
        return "refused by the model"
    return "same" if relative_error(got, want) <= tolerance else "silently wrong"


@pytest.mark.parametrize("case", _cases())
def test_converted_as_known(case: Case, request: pytest.FixtureRequest) -> None:
    if not case.quick and not request.config.getoption("--zoo"):
        pytest.skip("runs with --zoo")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library says of how its model is built
        model = case.build()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a graph returns no cache
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    args, kwargs = as_args_kwargs(case.inputs(2))

    if case.untraceable:
        with pytest.raises(TraceError, match=r"cannot be traced|does not allow"):
            surgeon.trace(model, (args, kwargs))
        return
    surgery = Pipeline([Moeify(router_width=8), Lower()]).run(model, inputs=(args, kwargs))

    report = surgery.reports[0]
    assert case.missing(report.matched) == []
    assert case.sprung(report.matched) == []
    if case.exact and case.required_count is not None:
        assert len(report.matched) in (case.required_count, *case.alternatives)
    assert all(rejection.reason for rejection in report.rejected)
    assert _outcome(model, surgery.graph, args, kwargs, case.tolerance) == "same"
    found = {name: _outcome(model, surgery.graph, *given, case.tolerance) for name, given in _other_shapes(case)}
    # A wrong output without a word is worse than any refusal, and an error that explains nothing is not a refusal.
    assert {name for name, outcome in found.items() if outcome == "silently wrong"} == set(), found
    assert {name for name, outcome in found.items() if outcome.startswith("fails")} == set(), found
    assert case.fixed_batch or found["another batch"] == "same"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
