"""What a benchmark computes: layers, what their tokens select, and the exact result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from surgeon.bench.layer import MASKS, Case, MaskKind, make_problem
from surgeon.kernels.dynamic_k import selected
from surgeon.kernels.gpu_model.cost import LayerShape

CPU = torch.device("cpu")


def case(tokens: int = 64, share: float = 0.2, mask: MaskKind = "uniform", *, gated: bool = False) -> Case:
    return Case(LayerShape(8, 96, 4, gated), "float32", tokens, mask, share)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("tokens", "share", "pairs"), [(64, 0.2, 307), (1, 0.05, 1), (1, 0.001, 1), (5, 1.0, 120)])
def test_the_share_asked_for_is_selected(mask: MaskKind, tokens: int, share: float, pairs: int) -> None:
    problem = make_problem(case(tokens, share, mask), CPU)
    chosen = selected(problem.scores, problem.threshold)
    assert problem.pairs == int(chosen.sum()) == pairs
    assert problem.executed == pairs / (tokens * 24)
    assert problem.used == int(chosen.any(0).sum())


def test_masks_differ_as_they_say() -> None:
    chosen = {}
    for mask in MASKS:
        problem = make_problem(case(640, 0.2, mask), CPU)
        chosen[mask] = selected(problem.scores, problem.threshold).float()
    popular = {mask: float(one.sum(0).max() / one.sum(0).mean()) for mask, one in chosen.items()}
    assert popular["skewed"] > 3.0 > 1.5 > popular["uniform"]
    alike = {mask: float((one[::16] * one[1::16]).sum() / one[::16].sum()) for mask, one in chosen.items()}
    assert alike["clustered"] > 0.6 > 0.35 > alike["uniform"]


def test_work_is_counted_by_hand() -> None:
    problem = make_problem(dataclasses.replace(case(1, 0.25, gated=True), activation="silu"), CPU)
    assert (problem.pairs, problem.used) == (6, 6)
    assert problem.multiply_adds == 6 * 4 * 8 * 3
    assert problem.weight_bytes == 6 * 4 * 8 * 3 * 4


@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_neurons_that_are_zero_need_no_work(gated: bool) -> None:
    problem = make_problem(case(300, 0.2, gated=gated), CPU)
    w1, b1, gate, b_gate, _ = problem.experts
    values, neurons = 0, set()
    for token, expert in selected(problem.scores, problem.threshold).nonzero().tolist():
        z = (
            b1[expert] + w1[expert] @ problem.x[token]
            if gate is None
            else b_gate[expert] + gate[expert] @ problem.x[token]
        )
        active = (z > 0).nonzero().flatten().tolist()
        values += len(active)
        neurons |= {(expert, neuron) for neuron in active}
    first = 4 * 8 * (2 if gated else 1)
    assert problem.multiply_adds == problem.pairs * first + values * 8
    assert problem.weight_bytes == 4 * (problem.used * first + len(neurons) * 8)


@pytest.mark.parametrize("gated", [False, True])
def test_the_exact_result_is_the_dense_layer_in_float64(gated: bool) -> None:
    problem = make_problem(case(300, 0.2, gated=gated), CPU)
    w1, b1, gate, b_gate, w2 = (None if t is None else t.double() for t in problem.experts.flat())
    x = problem.x[problem.checked].double()
    h = F.linear(x, w1, b1)
    h = h.relu() if gate is None else F.linear(x, gate, b_gate).relu() * h
    assert len(problem.checked) == 256
    assert problem.full.dtype == torch.float64
    torch.testing.assert_close(problem.full, F.linear(h, w2.t(), problem.b2.double()))
    mask = selected(problem.scores, problem.threshold)[problem.checked]
    h = h * mask.repeat_interleave(4, 1)
    torch.testing.assert_close(problem.chosen, F.linear(h, w2.t(), problem.b2.double()))


def test_errors_are_relative_to_the_largest_output() -> None:
    problem = make_problem(case(3), CPU)
    largest = float(problem.chosen.abs().max())
    found = problem.chosen.clone()
    found[1, 2] += 0.5 * largest
    assert problem.error(found, every=False) == pytest.approx(0.5)
    assert problem.error(problem.full, every=True) == 0.0


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = (make_problem(case(), CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.scores, second.scores)
    assert not torch.equal(first.x, other.x)
