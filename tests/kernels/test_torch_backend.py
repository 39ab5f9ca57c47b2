"""How the torch backend decides what to compute."""

import pytest
import torch

from surgeon.kernels.torch_backend import Experts, _ByExpert, _ByToken, _Dense, _plan, _runs


def plan(tokens: int, experts: int, neurons: int, share: float, few_tokens: int = 4) -> object:
    w = torch.empty(experts, neurons, 768)
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(1) < share * experts
    return _plan(mask, Experts(w, None, None, None, w), few_tokens)


@pytest.mark.parametrize(
    ("tokens", "experts", "neurons", "share", "way"),
    [
        (2048, 24, 128, 0.2, _ByExpert),
        (2048, 24, 128, 0.95, _Dense),
        (2048, 128, 24, 0.2, _ByExpert),
        (2048, 128, 24, 0.6, _Dense),
        (2048, 512, 6, 0.05, _ByExpert),
        (2048, 512, 6, 0.3, _Dense),
        (1, 24, 128, 0.2, _ByToken),
        (1, 24, 128, 1.0, _Dense),
        (8, 128, 24, 1.0, _Dense),
    ],
)
def test_plan_skips_only_where_that_is_faster(tokens: int, experts: int, neurons: int, share: float, way: type) -> None:
    assert isinstance(plan(tokens, experts, neurons, share), way)


def test_plan_by_expert_lists_the_tokens() -> None:
    mask = torch.zeros(2048, 24, dtype=torch.bool)
    mask[:, 0] = True
    mask[[5, 900], 7] = True
    w = torch.empty(24, 128, 768)
    planned = _plan(mask, Experts(w, None, None, None, w), few_tokens=4)
    assert isinstance(planned, _ByExpert)
    assert planned.rows[0] == slice(None)
    assert planned.rows[7].tolist() == [5, 900]
    assert [expert for expert, rows in enumerate(planned.rows) if rows is None] == [1, 2, 3, 4, 5, 6, *range(8, 24)]


def test_plan_masks_only_what_it_reads_across() -> None:
    w = torch.empty(512, 6, 768)
    mask = torch.zeros(1, 512, dtype=torch.bool)
    mask[0, [3, 4, 6, 400]] = True
    planned = _plan(mask, Experts(w, None, None, None, w), few_tokens=4)
    assert isinstance(planned, _ByToken)
    assert planned.runs == [[(3, 7), (400, 401)]]
    assert planned.mask is mask
    mask[0, 6] = False
    assert _plan(mask, Experts(w, None, None, None, w), few_tokens=4) == _ByToken([[(3, 5), (400, 401)]], None)


def test_runs() -> None:
    assert _runs([], 5) == []
    assert _runs([0, 1, 2, 5, 9], 0) == [(0, 3), (5, 6), (9, 10)]
    assert _runs([0, 1, 2, 5, 9], 2) == [(0, 6), (9, 10)]
