"""Selection rules: each against its definition written out in plain Python, at the ends of tau, with ties and NaN."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgeon.errors import UsageError
from surgeon.kernels.experts import selected
from surgeon.kernels.selection import RULES, check_rule, selection_threshold

NAN = float("nan")
every_rule = pytest.mark.parametrize("rule", RULES)
small = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Scores whose sums and squares are exact in float32, so that the reference in float64 meets no rounding.
scores_of_a_token = st.lists(st.integers(0, 40).map(lambda n: n / 8), min_size=1, max_size=9)
taus = st.integers(0, 16).map(lambda n: n / 16)


def runs(scores: Tensor, tau: float, rule: str) -> Tensor:
    """The mask of the experts that run."""
    return selected(scores, selection_threshold(scores, torch.tensor(tau), rule))


def reference(scores: list[float], tau: float, rule: str) -> list[bool]:
    """The definition, one expert after the other; experts of one score share their fate."""
    ascending = sorted(scores)
    if rule == "max":
        return [score >= tau * ascending[-1] for score in scores]
    if rule == "top_k":
        skipped = min(math.floor(tau * len(scores)), len(scores) - 1)
    else:
        power, share = (1, tau) if rule == "cumulative" else (2, tau * tau)
        total, running, skipped = sum(score**power for score in scores), 0.0, 0
        for score in ascending[:-1]:
            running += score**power
            skipped += running < share * total
    return [score >= ascending[skipped] for score in scores]


@every_rule
@given(scores=scores_of_a_token, tau=taus)
@example(scores=[0.0, 0.0, 0.0], tau=1.0)
@example(scores=[1.0, 1.0, 2.0], tau=0.5)
@small
def test_each_rule_is_its_definition(rule: str, scores: list[float], tau: float) -> None:
    assert runs(torch.tensor(scores), tau, rule).tolist() == reference(scores, tau, rule)


@every_rule
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 200), low=st.floats(0, 1), high=st.floats(0, 1))
@small
def test_a_larger_tau_runs_fewer_and_never_others(rule: str, seed: int, experts: int, low: float, high: float) -> None:
    scores = torch.rand(4, experts, generator=torch.Generator().manual_seed(seed)) ** 4
    low, high = sorted((low, high))
    many, few = runs(scores, low, rule), runs(scores, high, rule)
    assert bool((few <= many).all())
    assert bool(few.any(-1).all())
    assert bool(few.gather(-1, scores.argmax(-1, keepdim=True)).all())  # the largest always runs
    assert bool(runs(scores, 0.0, rule).all())


@every_rule
@given(seed=st.integers(0, 10**6), tau=st.floats(0, 1))
@small
def test_scale_of_the_scores_does_not_matter(rule: str, seed: int, tau: float) -> None:
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed)) + 1e-3
    assert torch.equal(runs(scores * 1024, tau, rule), runs(scores, tau, rule))


@pytest.mark.parametrize(("rule", "want"), [("max", 1), ("cumulative", 1), ("energy", 1), ("top_k", 1)])
def test_tau_1_runs_only_the_largest_of_distinct_scores(rule: str, want: int) -> None:
    scores = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) + 0.01
    assert runs(scores, 1.0, rule).sum(-1).tolist() == [want] * 50


@every_rule
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 1.0])
def test_equal_scores_run_together(rule: str, tau: float) -> None:
    assert bool(runs(torch.full((3, 6), 0.25), tau, rule).all())
    assert bool(runs(torch.zeros(3, 6), tau, rule).all())
    ran = runs(torch.tensor([0.1, 0.5, 0.5, 0.5, 2.0]), tau, rule).tolist()
    assert ran[1] == ran[2] == ran[3]


@pytest.mark.parametrize("experts", [1, 3, 7, 48, 100, 768, 1000, 4096])
def test_top_k_skips_as_many_as_asked_for(experts: int) -> None:
    scores = torch.randperm(experts, generator=torch.Generator().manual_seed(0)).float()
    for skipped in sorted({*range(0, experts + 1, max(1, experts // 97)), experts - 1, experts}):
        assert int(runs(scores, skipped / experts, "top_k").sum()) == max(1, experts - skipped)


@pytest.mark.parametrize("tau", [0.29, 0.57, 0.1, 0.7])
def test_top_k_takes_a_share_for_what_it_says(tau: float) -> None:
    """0.29 of 100 is 28.999… in floating point."""
    assert int(runs(torch.arange(100.0), tau, "top_k").sum()) == 100 - round(100 * tau)


def test_energy_bounds_the_norm_of_what_is_skipped() -> None:
    scores = torch.rand(200, 30, generator=torch.Generator().manual_seed(0)) ** 3
    for tau in (0.1, 0.3, 0.6):
        ran = runs(scores, tau, "energy")
        skipped = (scores * ~ran).norm(dim=-1) / scores.norm(dim=-1)
        assert float(skipped.max()) <= tau
        smallest = scores.masked_fill(~ran, float("inf")).amin(-1)
        more = (scores.square() * ~ran).sum(-1) + smallest.square()
        assert bool((more.sqrt() >= tau * scores.norm(dim=-1) * (1 - 1e-5)).all())  # one more would be too much


@every_rule
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_a_score_that_is_nan_runs_and_hides_nothing(rule: str, tau: float) -> None:
    scores = torch.tensor([[1.0, NAN, 0.1], [1.0, 0.5, 0.1]])
    ran = runs(scores, tau, rule)
    assert bool(ran[0, 1])
    assert bool(ran[0, 0])
    assert torch.equal(ran[1], runs(scores[1], tau, rule))


@every_rule
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(rule: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    threshold = selection_threshold(scores, torch.tensor(0.5), rule)
    assert threshold.shape == shape[:-1]
    assert threshold.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    each = [runs(token, 0.5, rule) for token in scores.reshape(-1, 6)]
    if each:
        assert torch.equal(runs(scores, 0.5, rule).reshape(-1, 6), torch.stack(each))


@pytest.mark.parametrize("rule", ["cumulative", "energy"])
def test_sums_of_half_precision_scores_are_not_rounded_to_it(rule: str) -> None:
    scores = torch.ones(4096)
    scores[0] = 2.0
    assert torch.equal(runs(scores.bfloat16(), 0.4, rule), runs(scores, 0.4, rule))
    spread = torch.linspace(0.5, 1.0, 4096).bfloat16()
    assert torch.equal(runs(spread, 0.4, rule), runs(spread.double(), 0.4, rule))


class Selects(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("tau", torch.tensor(0.5))

    def forward(self, scores: Tensor) -> Tensor:
        return selection_threshold(scores, self.tau, self.rule)


@every_rule
def test_export_keeps_one_node_whose_rule_can_be_changed(rule: str) -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Selects(rule), (scores,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = program.module()
    (node,) = [node for node in graph.graph.nodes if node.op == "call_function" and "surgeon" in str(node.target)]
    assert (node.target, node.args[2]) == (torch.ops.surgeon.selection_threshold.default, rule)
    more = torch.rand(7, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(graph(more), selection_threshold(more, torch.tensor(0.5), rule))
    node.update_arg(2, "top_k")
    graph.recompile()
    assert torch.equal(graph(more), selection_threshold(more, torch.tensor(0.5), "top_k"))


@every_rule
def test_compiles_without_a_graph_break(rule: str) -> None:
    def compute(scores: Tensor, tau: Tensor) -> Tensor:
        return selected(scores, selection_threshold(scores, tau, rule))

    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Any = torch.compile(compute, fullgraph=True, backend="aot_eager")
        for tau in (0.0, 0.4, 1.0):
            assert torch.equal(compiled(scores, torch.tensor(tau)), compute(scores, torch.tensor(tau)))


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    words = "No selection rule 'best'. There are: max, cumulative, energy, top_k."
    with pytest.raises(UsageError) as error:
        check_rule("best")
    assert str(error.value) == words
    with pytest.raises(UsageError, match="No selection rule 'best'"):
        selection_threshold(torch.rand(3), torch.tensor(0.5), "best")
