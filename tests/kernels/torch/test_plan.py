"""How the torch backend decides what to compute."""

from typing import Literal
from unittest.mock import patch

import pytest
import torch

from surgeon.kernels.experts import Experts
from surgeon.kernels.torch import plan as torch_plan
from surgeon.kernels.torch.plan import ByExpert, ByNeuron, InRuns, Together
from tests.kernels.ffn import forced


def plan(
    tokens: int, experts: int, neurons: int, share: float, *, forward: bool = True, sparse: bool = False
) -> ByExpert | ByNeuron | InRuns | Together:
    w = torch.empty(experts, neurons, 768)
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(1) < share * experts
    return torch_plan.plan(mask, Experts(w, None, None, None, w), forward=forward, sparse=sparse)


@pytest.mark.parametrize(
    ("tokens", "experts", "neurons", "share", "way"),
    [
        (2048, 24, 128, 0.2, "by expert"),
        (2048, 24, 128, 0.95, "dense"),
        (2048, 128, 24, 0.2, "by expert"),
        (2048, 128, 24, 0.6, "dense"),
        (2048, 512, 6, 0.05, "by expert"),
        (2048, 512, 6, 0.3, "dense"),
        (1, 24, 128, 0.2, "in runs"),
        (1, 128, 24, 0.2, "in runs"),
        (1, 512, 6, 0.2, "copies"),
        (8, 24, 128, 0.2, "by expert"),
        (8, 128, 24, 0.2, "dense"),
        (1, 512, 6, 0.8, "dense"),
        (1, 24, 128, 1.0, "dense"),
        (8, 128, 24, 1.0, "dense"),
    ],
)
def test_plan_skips_only_where_that_is_faster(
    tokens: int, experts: int, neurons: int, share: float, way: Literal["by expert", "in runs", "copies", "dense"]
) -> None:
    planned = plan(tokens, experts, neurons, share)
    if way == "by expert":
        assert isinstance(planned, ByExpert)
    elif way == "in runs":
        assert isinstance(planned, InRuns)
    else:
        assert isinstance(planned, Together)
        assert (planned.used is not None) == (way == "copies")
        assert (planned.mask is None) == (share == 1.0 or way == "copies")


@pytest.mark.parametrize(
    ("tokens", "experts", "neurons", "share", "way"),
    [
        (1, 24, 128, 0.2, InRuns),
        (1, 128, 24, 0.2, InRuns),
        (1, 512, 6, 0.2, ByNeuron),
        (8, 24, 128, 0.2, ByExpert),
        (8, 128, 24, 0.2, ByNeuron),
        (16, 128, 24, 0.05, ByNeuron),
        (16, 128, 24, 0.5, Together),
        (1, 24, 128, 1.0, Together),
        (2048, 24, 128, 0.2, ByExpert),
    ],
)
def test_plan_reads_neurons_one_by_one_for_few_tokens(
    tokens: int, experts: int, neurons: int, share: float, way: type
) -> None:
    assert isinstance(plan(tokens, experts, neurons, share, sparse=True), way)


def test_plan_shares_what_tokens_have_in_common() -> None:
    w = torch.empty(512, 6, 768)
    mask = torch.zeros(16, 512, dtype=torch.bool)
    mask[:, ::5] = True
    mask[0, 0] = False
    planned = torch_plan.plan(mask, Experts(w, None, None, None, w), sparse=True)
    assert isinstance(planned, Together)
    assert planned.used is not None


def test_plan_in_runs_joins_experts_that_follow_each_other() -> None:
    w = torch.empty(128, 24, 768)
    mask = torch.zeros(16, 128, dtype=torch.bool)
    mask[:, [0, 1, 2, 5, 7, 8]] = True
    planned = torch_plan.plan(mask, Experts(w, None, None, None, w), sparse=True)
    assert isinstance(planned, InRuns)
    assert planned.runs == [slice(0, 72), slice(120, 144), slice(168, 216)]


def test_plan_weighs_calls_more_where_products_of_half_types_are_fast() -> None:
    w = torch.empty(128, 24, 768, dtype=torch.bfloat16)
    mask = torch.rand(2048, 128, generator=torch.Generator().manual_seed(0)) < 0.2
    experts = Experts(w, None, None, None, w)
    for fast, way in ((True, Together), (False, ByExpert)):
        with patch.object(torch_plan, "multiplies", lambda dtype, fast=fast: fast):
            assert isinstance(torch_plan.plan(mask, experts), way)


def test_plan_by_neuron_numbers_the_neurons_of_all_experts() -> None:
    w = torch.empty(128, 3, 768)
    mask = torch.zeros(3, 128, dtype=torch.bool)
    mask[0, [0, 5]] = mask[2, 5] = True
    with forced("by neuron"):
        planned = torch_plan.plan(mask, Experts(w, None, None, None, w), sparse=True)
    assert isinstance(planned, ByNeuron)
    assert planned.columns.tolist() == [0, 1, 2, 15, 16, 17, 15, 16, 17]
    assert planned.ends.tolist() == [0, 6, 6, 9]


def test_plan_by_neuron_takes_a_mask_of_any_layout() -> None:
    w = torch.empty(128, 3, 768)
    mask = torch.zeros(3, 128, dtype=torch.bool)
    mask[0, [0, 5]] = mask[2, 5] = True
    with forced("by neuron"):
        layouts = (mask, mask.t().contiguous().t())
        planned = [torch_plan.plan(m, Experts(w, None, None, None, w), sparse=True) for m in layouts]
    assert all(isinstance(one, ByNeuron) for one in planned)
    assert torch.equal(planned[0].columns, planned[1].columns)  # type: ignore[union-attr]


def test_plan_copies_nothing_where_gradients_are_written() -> None:
    assert isinstance(plan(1, 512, 6, 0.02, forward=False), ByExpert)
    dense = plan(1, 512, 6, 0.2, forward=False)
    assert isinstance(dense, Together)
    assert dense.used is None


def test_plan_by_expert_lists_the_tokens() -> None:
    mask = torch.zeros(2048, 24, dtype=torch.bool)
    mask[:, 0] = True
    mask[[5, 900], 7] = True
    w = torch.empty(24, 128, 768)
    planned = torch_plan.plan(mask, Experts(w, None, None, None, w))
    assert isinstance(planned, ByExpert)
    assert planned.rows[0] is None
    assert isinstance(planned.rows[7], torch.Tensor)
    assert planned.rows[7].tolist() == [5, 900]
    assert list(planned.rows) == [0, 7]
    assert planned.most == 2048


def test_plan_masks_copies_that_not_every_token_selected() -> None:
    w = torch.empty(512, 6, 768)
    mask = torch.zeros(2, 512, dtype=torch.bool)
    mask[0, [3, 4, 400]] = mask[1, [3, 4]] = True
    planned = torch_plan.plan(mask, Experts(w, None, None, None, w))
    assert isinstance(planned, Together)
    assert planned.used is not None
    assert planned.used.tolist() == [3, 4, 400]
    assert planned.mask is not None
    assert planned.mask.tolist() == [[True, True, True], [True, True, False]]
