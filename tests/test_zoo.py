"""Architectures with known answers: required FFNs are found, traps are refused with a reason, and nothing changes.

`quick` cases always run; `pytest --zoo` runs all of them (an hour on two cores).
"""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("case", _cases())
def test_converted_as_known(case: Case, request: pytest.FixtureRequest) -> None:
    if not case.quick and not request.config.getoption("--zoo"):
        pytest.skip("runs with --zoo")
    torch.manual_seed(0)
    model = case.build()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a graph returns no cache
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    args, kwargs = as_args_kwargs(case.inputs(2))

    surgery = Pipeline([Moeify(router_width=8), Lower()]).run(model, inputs=(args, kwargs))

    report = surgery.reports[0]
    assert case.missing(report.matched) == []
    assert case.sprung(report.matched) == []
    if case.exact and case.required_count is not None:
        assert len(report.matched) in (case.required_count, *case.alternatives)
    assert all(rejection.reason for rejection in report.rejected)
    assert (
        relative_error(call_reproducibly(surgery.graph, args, kwargs), call_reproducibly(model, args, kwargs))
        <= case.tolerance
    )
    if not case.fixed_batch:
        torch.manual_seed(2)
        args, kwargs = as_args_kwargs(case.inputs(3))
        assert (
            relative_error(call_reproducibly(surgery.graph, args, kwargs), call_reproducibly(model, args, kwargs))
            <= case.tolerance
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
