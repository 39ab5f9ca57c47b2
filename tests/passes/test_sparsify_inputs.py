"""sparsify-inputs and refit: what is skipped, what it costs, and that the layers stay what they were at tau 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import surgeon
from surgeon.data.data import Data
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.dynamic.site import find_dynamic
from surgeon.errors import UsageError
from surgeon.graph.edit import emit
from surgeon.graph.traced import TracedGraph, fork
from surgeon.inputs.site import find_sparse_linears, sparse_linear
from surgeon.measure.meter import measure
from surgeon.measure.tuning import tune
from surgeon.passes import Lower, Moeify, Recover, Refit, SparsifyInputs
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind
from surgeon.passes.report import SiteChange
from surgeon.sites.linear_site import LinearSite
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import WIDTH, Function, correlated_vectors, labelled_vectors, stack, vectors

KINDS = ["gelu", "relu", "gated", "fused", "biasless", "shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_skips_its_share(kind: str) -> None:
    model = stack(kind)
    surgery = Pipeline([SparsifyInputs(), Lower()]).run(model, inputs=vectors(), data=correlated_vectors())
    graph, inputs = surgery.graph.eval(), correlated_vectors(1)[0]
    sites = find_sparse_linears(graph)
    assert {site.form for site in sites} == {"dynamic"}
    assert not any(node.target is torch.ops.aten.linear.default for node in graph.graph.nodes)
    assert torch.allclose(graph(**inputs), model(**inputs), atol=1e-5)
    before, _ = measure(graph, (), inputs)
    assert before.executed == 1.0
    errors = []
    for tau in (0.2, 0.5, 0.8):
        set_tau(graph, tau)
        cost, layers = measure(graph, (), inputs)
        assert cost.multiply_adds == before.multiply_adds
        # Other inputs than those it was calibrated on, and what was skipped before changes what layers get.
        assert all(abs(layer.share - (1 - tau)) < 0.15 for layer in layers.values()), (tau, layers)
        linears = sum(layer.multiply_adds for layer in layers.values())
        ran = sum(layer.executed_multiply_adds for layer in layers.values())
        assert cost.multiply_adds - cost.executed_multiply_adds == linears - ran > 0
        with torch.no_grad():
            errors.append(float((graph(**inputs) - model(**inputs)).norm()))
    assert 0 < errors[0] < errors[1] < errors[2]


def skipped(options: dict[str, Any], tau: float = 0.5) -> float:
    """The error of one layer whose inputs have their own means, and columns of several sizes."""
    generator = torch.Generator().manual_seed(0)
    usual, size = torch.randn(2, WIDTH, generator=generator)
    layer = Function(lambda m, x: m.mix(x * 0.5 + usual), mix=(WIDTH, WIDTH)).eval()
    with torch.no_grad():
        layer.mix.weight.mul_(size.exp())
    x = [torch.randn(64, WIDTH, generator=generator) for _ in range(20)]
    graph = Pipeline([SparsifyInputs(tau=tau, **options)]).run(layer, inputs=x[0], data=x[1:]).graph.eval()
    with torch.no_grad():
        return float((graph(x[0]) - layer(x[0])).norm())


def test_a_centre_and_weights_each_make_the_error_smaller() -> None:
    magnitude = skipped({"criterion": "magnitude", "centre": False})
    weighted = skipped({"centre": False})
    centred = skipped({"criterion": "magnitude"})
    assert weighted < 0.9 * magnitude
    assert centred < 0.9 * magnitude
    assert skipped({}) < min(weighted, centred)


def test_refit_brings_layers_nearer_at_their_tau() -> None:
    model = stack("gelu")
    sparse = Pipeline([SparsifyInputs(tau=0.6)]).run(model, inputs=vectors(), data=correlated_vectors())
    assert not sparse.reports[0].preserved
    surgery = Pipeline([Refit(), Lower()]).run(sparse.graph, inputs=vectors(), data=correlated_vectors())
    report = surgery.reports[0]
    assert len(report.matched) == 7
    for change in report.sites:
        before, after = (float(error) for error in re.findall(r"([\d.]+)%", change.after))
        assert after < 0.9 * before, change
    inputs = correlated_vectors(1)[0]
    with torch.no_grad():
        errors = [float((one.eval()(**inputs) - model(**inputs)).norm()) for one in (sparse.graph, surgery.graph)]
    assert errors[1] < errors[0]
    # The graph that was given still has the model's weights.
    set_tau(sparse.graph, 0.0)
    assert torch.allclose(sparse.graph.eval()(**inputs), model(**inputs), atol=1e-5)


def test_refit_leaves_what_it_cannot_better() -> None:
    """Inputs that tell nothing of each other."""
    layer = Function(lambda m, x: m.mix(x), mix=(WIDTH, WIDTH)).eval()
    x = [torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    surgery = Pipeline([SparsifyInputs(tau=0.5), Refit(ridge=1e-9)]).run(layer, inputs=x[0], data=x[1:])
    assert surgery.reports[1].sites[0].after.startswith("unchanged: error ")
    assert surgery.reports[1].max_error == 0.0


def test_refit_says_what_it_does_not_fit(traces: Any) -> None:
    graph = traces("stack:gelu")
    Moeify(experts=4).apply(graph)
    SparsifyInputs(tau={"blocks.0.*": 0.5, "*": 0.0}).apply(graph, data=correlated_vectors())
    matched, rejected = Refit().explain(graph)
    assert [site.path for site in matched] == ["blocks.0.mix.inputs"]
    assert [(one.path, one.code) for one in rejected] == [
        ("blocks.0.ffn.moe", "has-experts"),
        ("blocks.1.mix.inputs", "skips-nothing"),
        ("blocks.1.ffn.moe", "has-experts"),
        ("head.inputs", "skips-nothing"),
    ]


def test_tune_finds_a_share_for_each_layer_beside_experts() -> None:
    passes = [Moeify(experts=4, router_width=8), SparsifyInputs(), Lower()]
    graph = Pipeline(passes).run(stack("relu"), inputs=vectors(), data=correlated_vectors()).graph.eval()
    assert [type(site).__name__ for site in find_dynamic(graph)] == [
        "SparseLinearSite", "MoESite", "SparseLinearSite", "MoESite", "SparseLinearSite"
    ]  # fmt: skip
    found = tune(graph, correlated_vectors(1)[:4], 0.6, inputs=correlated_vectors(1)[0])
    assert found.cost <= 0.6
    assert found.damage <= found.uniform_damage
    assert get_tau(graph) == pytest.approx(found.taus, abs=1e-6)
    assert len(set(found.taus.values())) > 2


def test_recover_trains_with_inputs_skipped(tmp_path: Path) -> None:
    """Training at a tau makes the model better there than training with everything."""
    model = stack("gelu")
    passes = [SparsifyInputs(), Recover(steps=160, lr=1e-2, skip_inputs=0.9), Lower()]
    surgery = Pipeline(passes).run(model, inputs=vectors(), data=Data.of(labelled_vectors(16)), seed=1)
    assert set(get_tau(surgery.graph).values()) == {0.0}
    dense = Pipeline([SparsifyInputs(), Recover(steps=160, lr=1e-2, skip_inputs=0.0), Lower()]).run(
        model, inputs=vectors(), data=Data.of(labelled_vectors(16)), seed=1
    )
    losses = []
    for one in (surgery, dense):
        graph = one.graph.eval()
        set_tau(graph, 0.7)
        total = 0.0
        for batch in labelled_vectors(16):
            x, labels = batch
            with torch.no_grad():
                total += float(nn.functional.cross_entropy(graph(**x), labels))
        losses.append(total)
    assert losses[0] < losses[1]


def test_saved_and_loaded(tmp_path: Path) -> None:
    surgery = Pipeline([SparsifyInputs(tau=0.4), Refit(), Lower()]).run(
        stack("fused"), inputs=vectors(), data=correlated_vectors()
    )
    surgery.save(tmp_path / "saved")
    loaded, inputs = surgeon.load(tmp_path / "saved"), correlated_vectors(1)[0]
    assert torch.equal(loaded(**inputs), surgery.graph.eval()(**inputs))
    assert list(get_tau(loaded).values()) == pytest.approx([0.4] * 7)


def test_weights_stored_the_other_way_round_are_not_copied() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 24)), nn.Parameter(torch.randn(24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(*x.shape[:-1], 24)

    model, x = Conv1D().eval(), torch.randn(3, 5, WIDTH)
    graph = Pipeline([SparsifyInputs(), Lower()]).run(model, inputs=x, data=[x] * 4).graph
    (node,) = [node for node in graph.graph.nodes if node.target is sparse_linear]
    assert str(node.args[1].target) == "weight"  # type: ignore[union-attr]
    assert torch.allclose(graph(x), model(x), atol=1e-5)


def test_a_tied_head_gets_a_weight_of_its_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.embedding(ids), self.embedding.weight)

    model, ids = Tied().eval(), torch.randint(0, 20, (3, 5))
    surgery = Pipeline([SparsifyInputs(tau=0.5), Refit(), Lower()]).run(model, inputs=ids, data=[ids] * 4)
    assert torch.equal(surgery.graph.embedding.weight, model.embedding.weight)
    set_tau(surgery.graph, 0.0)
    assert surgery.graph(ids).shape == (3, 5, 20)


def test_what_cannot_be_calibrated_is_refused() -> None:
    broken = [{name: value * float("inf") for name, value in batch.items()} for batch in correlated_vectors()]
    surgery = Pipeline([SparsifyInputs()]).run(stack("gelu"), inputs=vectors(), data=broken, verify="off")
    assert {one.code for one in surgery.reports[0].rejected} == {"not-finite"}


def test_the_order_of_passes_and_options_is_checked() -> None:
    with pytest.raises(UsageError, match="moeify must run before sparsify-inputs"):
        Pipeline([SparsifyInputs(), Moeify()]).run(stack("gelu"), inputs=vectors(), data=correlated_vectors())
    with pytest.raises(UsageError, match="needs data"):
        Pipeline([SparsifyInputs()]).run(stack("gelu"), inputs=vectors())
    with pytest.raises(UsageError, match=r"tau is 1.5, but must be from 0 to 1"):
        SparsifyInputs(tau=1.5)
    with pytest.raises(UsageError, match="no site matches 'nothing'"):
        Pipeline([SparsifyInputs(tau={"nothing": 0.5})]).run(stack("gelu"), inputs=vectors(), data=correlated_vectors())


@dataclass(frozen=True, kw_only=True)
class Nudge(Pass[LinearSite]):
    """Move the inputs of linear layers by a rounding error."""

    name: ClassVar[str] = "nudge"
    works_on: ClassVar[SiteKind] = "linear"

    def find(self, graph: GraphModule) -> Any:
        return find_sparse_linears(graph), []

    def rewrite(self, graph: TracedGraph, site: Any, seen: None) -> SiteChange:
        node = site.nodes[0]
        with graph.graph.inserting_before(node):
            node.update_arg(0, emit(graph, torch.ops.aten.mul.Tensor, node.args[0], 1 + 2e-7, path=site.path))
        return SiteChange(site.path, "", "", (0, 0), (0, 0), (node.name, node.name), made=(site.path,))


def test_what_rounding_moves_across_a_threshold_is_no_difference() -> None:
    """A level is the score of some input. A bit more of it, and the input is read."""
    layer = Function(lambda m, x: m.mix(x), mix=(WIDTH, WIDTH)).eval()
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    passes = [SparsifyInputs(criterion="magnitude", centre=False, tau=0.5)]
    graph = Pipeline(passes).run(layer, inputs=x, data=[x]).graph.eval()
    want = graph(x)
    surgery = Pipeline([Nudge()]).run(graph, inputs=x)
    assert surgery.reports[0].preserved
    assert surgery.reports[0].max_error is not None
    assert 0 < surgery.reports[0].max_error < 1e-5
    assert not torch.allclose(surgery.graph.eval()(x), want, atol=1e-3)


def test_it_is_done_once(traces: Any) -> None:
    graph = traces("stack:gelu")
    SparsifyInputs().apply(graph, data=correlated_vectors())
    again = fork(graph)
    report = SparsifyInputs().apply(again, data=correlated_vectors())
    assert not report.matched
    assert {one.code for one in report.rejected} == {"already-done"}
