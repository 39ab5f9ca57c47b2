"""sparsify: the penalty is the published one, on the right values and real tokens only, and training lowers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.kernels.activations import active_share
from surgeon.passes import Mlpify, Moeify, Sparsify, SwapActivation
from surgeon.passes.sparsify import SparsityTap
from surgeon.sites.search import find_ffns
from surgeon.training.loop import RunSettings
from tests.small_models import (
    WIDTH,
    Fused,
    Gated,
    Plain,
    Wrapped,
    classifier,
    labelled,
    labelled_vectors,
    tokens,
    vectors,
)

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


# --- taps -------------------------------------------------------------------------------------------------------------


def tapped(ffn: nn.Module, **options: Any) -> tuple[TracedGraph, SparsityTap, Tensor]:
    """The graph with its tap, and what goes through the tap for X."""
    torch.manual_seed(0)
    graph = surgeon.trace(Wrapped(ffn).eval(), X)
    Sparsify(**options).apply(graph, inputs=X)
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    tap = graph.get_submodule(str(node.target))
    assert isinstance(tap, SparsityTap)
    _, values = Capture(graph, [node.name])(X)
    return graph, tap, values[node.name].detach()


def pre_activation(ffn: Any) -> Tensor:
    first = {Plain: "fc1", Gated: "gate", Fused: "gate_up"}[type(ffn)]
    return getattr(ffn, first)(F.layer_norm(X, (WIDTH,))).detach()


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_is_penalised_at_its_output(inplace: bool) -> None:
    ffn = Plain(act=F.relu_ if inplace else F.relu)
    _, tap, z = tapped(ffn)
    assert torch.allclose(tap.penalised(z), F.relu(pre_activation(ffn)), atol=1e-6)


@pytest.mark.parametrize("displacement", [-10.0, -0.5])
@pytest.mark.parametrize(
    "act", [F.gelu, F.silu, lambda h: F.silu(h, inplace=True)], ids=["gelu", "silu", "silu_inplace"]
)
def test_others_are_penalised_at_the_shifted_pre_activation(act: Any, displacement: float) -> None:
    ffn = Plain(act=act)
    _, tap, z = tapped(ffn, displacement=displacement)
    want = pre_activation(ffn).clamp(min=displacement) - displacement
    assert torch.allclose(tap.penalised(z), want, atol=1e-5)
    assert (tap.penalised(z) >= 0).all()


@pytest.mark.parametrize("make", [Gated, Fused])
def test_gated_layers_are_penalised_at_the_gate_alone(make: Any) -> None:
    ffn = make(act=F.relu)
    _, tap, z = tapped(ffn)
    assert torch.allclose(tap.penalised(z), F.relu(pre_activation(ffn)[..., :32]), atol=1e-6)


def test_scale_in_front_of_the_activation_counts() -> None:
    ffn = Plain(act=lambda h: F.gelu(h * 0.5))
    _, tap, z = tapped(ffn, displacement=-0.25)
    assert torch.allclose(tap.penalised(z), (0.5 * pre_activation(ffn)).clamp(min=-0.25) + 0.25, atol=1e-6)


def test_active_share_is_of_what_exceeds_a_hundredth_of_the_largest() -> None:
    tap = SparsityTap("relu", None, 4, 1.0, -10.0, projection=False)
    z = torch.tensor([[100.0, 2.0, 0.5, -3.0], [1.0, 1.0, 1.0, 1.0]])
    assert active_share(tap.activations(z)).tolist() == [0.5, 1.0]


def test_tap_returns_its_input() -> None:
    assert SparsityTap("gelu", None, 4, 1.0, -10.0, projection=False)(X) is X


@pytest.mark.parametrize("kind", ["gelu", "gated", "fused", "shared"])
def test_without_data_nothing_changes_and_it_says_so(traces: Any, kind: str) -> None:
    graph, inputs = traces(f"stack:{kind}"), vectors()
    want = graph(**inputs)
    report = Sparsify().apply(graph, inputs=inputs)
    assert torch.equal(graph(**inputs), want)
    assert report.fit is None
    assert report.preserved
    assert report.max_error == 0.0
    assert any("Nothing was fine-tuned" in note and "again with data" in note for note in report.notes)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert len(calls) == 2
    assert len({node.target for node in calls}) == (1 if kind == "shared" else 2)


def test_tapped_layers_are_still_found_and_not_tapped_twice(traces: Any) -> None:
    graph = traces("stack:fused")
    before = [(site.path, site.describe) for site in find_ffns(graph)[0]]
    Sparsify().apply(graph)
    assert [(site.path, site.describe) for site in find_ffns(graph)[0]] == before
    again = Sparsify().apply(graph)
    assert not again.matched
    assert {rejection.reason for rejection in again.rejected} == {"it already has a sparsity tap"}


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
def test_the_tap_is_called_what_it_is_whatever_the_penalty(traces: Any, penalty: Any) -> None:
    report = Sparsify(penalty=penalty).apply(traces("stack:relu"))
    assert [site.made for site in report.sites] == [(f"blocks.{block}.ffn.sparsity_tap",) for block in (0, 1)]


def test_report_says_where_the_tap_is(traces: Any) -> None:
    assert "square Hoyer tap (output)" in Sparsify().apply(traces("stack:relu")).sites[0].after
    assert "pre-activation, D = -5" in Sparsify(displacement=-5).apply(traces("stack:gelu")).sites[0].after


@pytest.mark.parametrize(("option", "words"), [
    ({"alpha": -1.0}, "alpha is -1.0, but must be at least 0"),
    ({"alpha_schedule": "steep"}, "alpha_schedule is 'steep', but must be one of constant, linear, linear_warmup"),
])  # fmt: skip
def test_wrong_options(option: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sparsify(**option)


@pytest.mark.parametrize(("schedule", "penalised"), [("constant", True), ("linear", False), ("linear_warmup", False)])
def test_the_penalty_starts_where_its_schedule_says(traces: Any, schedule: Any, penalised: bool) -> None:
    found = []
    for alpha in (0.0, 1.0):
        graph = traces("stack:relu")
        Sparsify(steps=1, lr=1e-2, alpha=alpha, alpha_schedule=schedule).apply(graph, data=labelled_vectors(1))
        found.append(graph.get_parameter("blocks.0.ffn.fc1.weight"))
    assert torch.equal(*found) != penalised


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[float, Any]:
    """A small classifier, fine-tuned with and without the penalty."""
    model = classifier("relu", layers=1, dropout=0.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result: dict[float, Any] = {"state": state, "model": model}  # type: ignore[dict-item]
    graph = surgeon.trace(model, tokens())
    for alpha in (0.0, 0.3):
        one = Sparsify(alpha=alpha, alpha_schedule="constant", epochs=30, lr=5e-3, schedule="constant")
        result[alpha] = surgeon.Pipeline([one]).run(graph, inputs=tokens(), data=labelled())
    return result


def last(surgery: Any, name: str) -> float:
    return surgery.reports[0].fit.losses[-1][1][name]


def test_training_learns_the_task_and_the_penalty_makes_it_sparse(trained: Any) -> None:
    for alpha in (0.0, 0.3):
        first = trained[alpha].reports[0].fit.losses[0][1]
        assert last(trained[alpha], "task loss") < 0.7 * first["task loss"]
    assert last(trained[0.3], "square Hoyer") < 0.5 * last(trained[0.0], "square Hoyer")
    assert last(trained[0.3], "active") < last(trained[0.0], "active")


def test_training_leaves_the_input_model_alone(trained: Any) -> None:
    for name, value in trained["model"].state_dict().items():
        assert torch.equal(value, trained["state"][name]), name
    assert all(p.grad is None and p.requires_grad for p in trained["model"].parameters())
    graph = trained[0.3].graph
    theirs = {p.data_ptr() for p in trained["model"].parameters()}
    assert not any(p.data_ptr() in theirs for p in graph.parameters())
    assert set(graph.state_dict()) == set(trained["state"])


def test_trained_report(trained: Any) -> None:
    report = trained[0.3].reports[0]
    assert not report.preserved
    assert report.fit.steps == 120
    assert report.max_error > 0
    assert not any("Nothing was fine-tuned" in note for note in report.notes)


def first_penalty(graph: TracedGraph, data: Any) -> dict[str, float]:
    one = Sparsify(steps=1, lr=1e-9, alpha_schedule="constant", alpha=1.0)
    report = one.apply(graph, data=Data.of(data, task="classification"))
    assert report.fit is not None
    return report.fit.losses[0][1]


def test_padding_takes_no_part() -> None:
    graph = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    padded = tokens(1, 7, padded=False)
    padded["attention_mask"][0, 4:] = 0
    short = {name: value[:, :4] for name, value in padded.items()}
    label = torch.tensor([1])
    a, b = (first_penalty(surgeon.graph.traced.fork(graph), [(inputs, label)]) for inputs in (padded, short))
    assert a == pytest.approx(b, rel=1e-5)


def test_dropout_is_on_in_training(traces: Any) -> None:
    graph = traces("stack:relu")
    data = labelled_vectors(1)
    seeds = [
        Sparsify(steps=1, lr=1e-9).apply(surgeon.graph.traced.fork(graph), data=data, settings=RunSettings(seed=seed))
        for seed in (0, 1)
    ]
    losses = [report.fit.losses[0][1]["task loss"] for report in seeds if report.fit is not None]
    assert losses[0] != losses[1]


def test_same_seed_same_result(traces: Any) -> None:
    graph = traces("stack:relu")
    results = []
    for seed in (3, 3, 4):
        copied = surgeon.graph.traced.fork(graph)
        Sparsify(steps=3, lr=1e-3).apply(copied, data=labelled_vectors(3), settings=RunSettings(seed=seed))
        results.append(copied.get_parameter("head.weight").detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_replaced_projections_are_averaged_apart(traces: Any) -> None:
    """One group of values for feed-forward layers and one for replaced projections, each with the weight alpha."""
    graph = traces("stack:relu")
    data = labelled_vectors(1)
    Mlpify(steps=1, lr=1e-6).apply(graph, data=data)
    together = first_penalty(surgeon.graph.traced.fork(graph), data)["square Hoyer"]
    apart = []
    for only in (("blocks.*.ffn",), ("blocks.*.mix.*",)):
        copied = surgeon.graph.traced.fork(graph)
        one = Sparsify(steps=1, lr=1e-9, only=only)
        report = one.apply(copied, data=data)
        assert report.fit is not None
        apart.append(report.fit.losses[0][1]["square Hoyer"])
    assert together == pytest.approx(sum(apart), rel=1e-5)


def test_frozen_and_integer_parameters_do_not_hinder(traces: Any) -> None:
    graph = traces("stack:relu")
    graph.register_buffer("count", torch.zeros((), dtype=torch.int64))
    graph.get_parameter("head.weight").requires_grad_(False)
    Sparsify(steps=1).apply(graph, data=labelled_vectors(1))
    assert not graph.get_parameter("head.weight").requires_grad


def test_goes_before_moeify(traces: Any) -> None:
    graph, inputs = traces("stack:gelu"), vectors()
    reports = [one.apply(graph, inputs=inputs) for one in (SwapActivation(), Sparsify(), Moeify(experts=4))]
    assert [report.matched for report in reports] == [["blocks.0.ffn", "blocks.1.ffn"]] * 3
    assert not any(isinstance(module, SparsityTap) for module in graph.modules())
