"""moeify: with every expert the model is what it was; a trained router picks the experts that matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import UsageError
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import fork
from surgeon.measure.meter import ExpertMeter
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Moeify, Sparsify
from surgeon.sites.search import find_ffns
from surgeon.training.loop import RunSettings
from tests.passes.reports import reasons
from tests.small_models import (
    HIDDEN,
    WIDTH,
    Function,
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


def close(got: Tensor, want: Tensor) -> None:
    assert float((got.detach() - want.detach()).abs().max() / want.detach().abs().max()) < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plain(dropout=0.0),
        lambda: Plain(act=F.relu, bias=False),
        lambda: Plain(d_out=7),
        lambda: Plain(act=lambda h: F.gelu(0.5 * h) * 3.0),
        lambda: Gated(),
        lambda: Gated(act=F.relu, bias=True),
        lambda: Fused(),
        lambda: Function(lambda m, x: F.relu(x @ m.w1 + m.b1) @ m.w2, w1=nn.Parameter(torch.randn(WIDTH, HIDDEN)),
                         b1=nn.Parameter(torch.randn(HIDDEN)), w2=nn.Parameter(torch.randn(HIDDEN, WIDTH))),
    ],
    ids=["plain", "biasless", "narrow", "scaled", "gated", "gated_bias", "fused", "raw"],
)  # fmt: skip
@pytest.mark.parametrize("experts", [1, 4, HIDDEN])
def test_all_experts_equal_the_dense_model(make: Any, experts: int) -> None:
    torch.manual_seed(0)
    model = Wrapped(make()).eval()
    graph = surgeon.trace(model, X)
    report = Moeify(experts=experts).apply(graph, inputs=X)
    assert report.matched == ["ffn"]
    close(graph(X), model(X))
    x = torch.randn(3, 9, WIDTH)
    close(graph(x), model(x))


@pytest.mark.parametrize("name", ["gpt2", "bert", "albert", "llama", "phi3", "t5", "vit", "stack:shared"])
def test_all_experts_equal_the_dense_model_in_families(traces: Any, name: str) -> None:
    graph, inputs = traces(name), traces.inputs(name)
    count = len(find_ffns(graph)[0])
    want = graph(**inputs)
    report = Moeify(experts=4, router_width=8).apply(graph, inputs=inputs)
    assert len(report.matched) == count > 0
    got = graph(**inputs)
    close(getattr(got, "logits", got), getattr(want, "logits", want))


def test_shared_weights_become_one_set_of_experts(traces: Any) -> None:
    graph = traces("albert")
    Moeify(experts=4).apply(graph)
    (site,) = find_moes(graph)
    assert len(site.nodes) == 2
    assert sum(isinstance(module, MoE) for module in graph.modules()) == 1


def test_the_layers_own_parameters_go_and_nothing_else(traces: Any) -> None:
    graph = traces("stack:gelu")
    before = dict(graph.state_dict())
    report = Moeify(experts=4).apply(graph)
    gone = {name for name in before if ".ffn." in name}
    assert set(before) - set(graph.state_dict()) == gone
    made = set(graph.state_dict()) - set(before)
    assert {name.rpartition(".moe.")[0] for name in made} == set(report.matched)
    assert [site.made for site in report.sites] == [(f"{path}.moe",) for path in report.matched]
    site = report.sites[0]
    assert site.parameters[0] == sum(p.numel() for p in Plain().parameters())
    assert site.parameters[1] == site.parameters[0] + 8 * (WIDTH + 4) + 8 + 4
    assert site.after == "4 experts × 8, router 8"


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "experts"),
    [({"experts": 8}, 8), ({"expert_size": 4}, 8), ({"expert_size": 32}, 1), ({}, 1)],
)
def test_number_of_experts(traces: Any, options: Any, experts: int) -> None:
    graph = traces("stack:relu")
    Moeify(**options).apply(graph)
    assert {site.experts for site in find_moes(graph)} == {experts}


@pytest.mark.parametrize(
    ("hidden", "shape"),
    [
        (1536, (48, 32)), (3072, (96, 32)), (100, (4, 25)), (31, (1, 31)), (62, (2, 31)),
        # There is no divisor near 32: the last expert is filled up, in narrow layers by as little as possible.
        (1237, (39, 32)), (2011, (63, 32)), (67, (2, 34)), (257, (9, 32)),
    ],
)  # fmt: skip
def test_usual_size_is_about_32(hidden: int, shape: tuple[int, int]) -> None:
    assert Moeify()._shape(SimpleNamespace(path="ffn", neurons=hidden)) == shape  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expert_size": 33}, "experts of 33 neurons were asked for, but it has 32 neurons"),
        ({"experts": 33}, "33 experts were asked for, but it has 32 neurons"),
    ],
)
def test_more_experts_or_neurons_than_any_layer_has(traces: Any, options: Any, words: str) -> None:
    graph = traces("stack:relu")
    code = graph.code
    with pytest.raises(UsageError) as error:
        Moeify(**options).apply(graph)
    assert str(error.value) == f"blocks.0.ffn: {words}"
    assert graph.code == code


def test_narrow_layers_are_left_out_of_many_experts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Wrapped(Plain(hidden=32)), Wrapped(Plain(hidden=7))).eval()
    report = Moeify(experts=8).apply(surgeon.trace(model, X), inputs=X)
    assert report.matched == ["0.ffn"]
    assert ("1.ffn", "8 experts were asked for, but it has 7 neurons") in reasons(report)


@pytest.mark.parametrize(("options", "words"), [
    ({"experts": 4, "expert_size": 8}, "give experts or expert_size, not both"),
    ({"experts": 0}, "experts is 0, but must be at least 1"),
    ({"expert_size": -1}, "expert_size is -1"),
    ({"router_width": 0}, "router_width is 0"),
    ({"tau": 1.5}, "tau is 1.5, but must be from 0 to 1"),
    ({"epochs": 0, "exposure": 0.2}, "exposure only has an effect in training, but epochs is 0"),
    ({"epochs": 0, "underestimate": 2.0}, "underestimate only has an effect in training, but epochs is 0"),
    ({"epochs": 0, "lr": 1e-2}, "lr only has an effect in training, but epochs is 0"),
    ({"epochs": 0, "schedule": "never"}, "schedule is 'never'"),
    ({"router": "trained", "objective": "activation", "underestimate": 2.0}, "underestimate weights the errors of a"),
])  # fmt: skip
def test_wrong_options(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Moeify(**options)


def test_only_and_skip(traces: Any) -> None:
    assert Moeify(experts=4, only=("blocks.0.*",)).apply(traces("stack:relu")).matched == ["blocks.0.ffn"]
    assert Moeify(experts=4, skip=("*.0.ffn",)).apply(traces("stack:relu")).matched == ["blocks.1.ffn"]
    none = Moeify(experts=4, skip=("*",)).apply(traces("stack:relu"))
    assert none.matched == []
    assert none.rejected == ()


def test_tau_is_set_after_all_is_verified(traces: Any) -> None:
    graph = traces("stack:relu")
    report = Moeify(experts=4, tau=0.5, epochs=0).apply(graph, inputs=vectors(), data=labelled_vectors(1))
    assert set(get_tau(graph).values()) == {0.5}
    assert report.max_error is not None
    assert report.max_error < 1e-6


def test_tau_needs_fitted_routers(traces: Any) -> None:
    with pytest.raises(UsageError, match="tau needs routers that were fitted, but there is no data"):
        Moeify(experts=4, tau=0.5).apply(traces("stack:relu"), inputs=vectors())
    graph = traces("stack:relu")
    Moeify(experts=4, tau=0.5).apply(graph, data=labelled_vectors(1), settings=RunSettings(dry_run=True))
    assert set(get_tau(graph).values()) == {0.0}


def test_tau_of_layers_converted_earlier_stays(traces: Any) -> None:
    first = traces("stack:relu")
    Moeify(experts=4, only=("blocks.0.*",), tau=0.1, epochs=0).apply(first, data=labelled_vectors(1))
    second = fork(first)
    Moeify(experts=4, only=("blocks.1.*",), tau=0.5, epochs=0).apply(second, data=labelled_vectors(1))
    assert get_tau(second) == {"blocks.0.ffn.moe": pytest.approx(0.1), "blocks.1.ffn.moe": 0.5}
    assert get_tau(first) == {"blocks.0.ffn.moe": pytest.approx(0.1)}


def test_same_seed_same_experts(traces: Any) -> None:
    states = []
    for seed in (0, 0, 1):
        graph = traces("stack:relu")
        Moeify(experts=4).apply(graph, settings=RunSettings(seed=seed))
        states.append(graph.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


# --- notes and failures -----------------------------------------------------------------------------------------------


def test_untrained_routers_are_told(traces: Any) -> None:
    report = Moeify(experts=4).apply(traces("stack:relu"), inputs=vectors())
    assert any("routers were not trained" in note and "run again with data" in note for note in report.notes)


def test_activations_without_zeros_are_told(traces: Any) -> None:
    gelu, relu = (Moeify(experts=4).apply(traces(f"stack:{kind}")).notes for kind in ("gelu", "relu"))
    assert any("use gelu" in note and "sparsify" in note for note in gelu)
    assert not any("sparsify" in note for note in relu)


def test_a_site_with_weights_that_are_not_finite_is_left_out(traces: Any) -> None:
    graph = traces("stack:relu")
    with torch.no_grad():
        graph.get_parameter("blocks.1.ffn.fc1.weight")[0, 0] = float("nan")
    report = Moeify(experts=4).apply(graph)
    assert report.matched == ["blocks.0.ffn"]
    assert [(refused.path, refused.code) for refused in report.rejected] == [("blocks.1.ffn", "not-finite")]


def test_experts_are_clusters_of_similar_neurons() -> None:
    torch.manual_seed(0)
    ffn = Plain(act=F.relu)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[:4]
    with torch.no_grad():
        ffn.fc1.weight.copy_(directions[torch.arange(HIDDEN) % 4] * torch.linspace(0.5, 2, HIDDEN).unsqueeze(1))
    graph = surgeon.trace(Wrapped(ffn).eval(), X)
    Moeify(experts=4).apply(graph)
    rows = F.normalize(graph.get_parameter("ffn.moe.w1").detach(), dim=-1)
    for expert in rows:
        assert torch.allclose(expert @ expert.t(), torch.ones(8, 8), atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_gated_layers_are_clustered_by_the_gate(fused: bool) -> None:
    torch.manual_seed(0)
    ffn: Any = Fused(act=F.relu, bias=False) if fused else Gated(act=F.relu)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[:4]
    with torch.no_grad():
        (ffn.gate_up if fused else ffn.gate).weight[:HIDDEN].copy_(directions[torch.arange(HIDDEN) % 4])
    graph = surgeon.trace(Wrapped(ffn).eval(), X)
    Moeify(experts=4).apply(graph)
    for expert in graph.get_parameter("ffn.moe.gate").detach():
        assert torch.allclose(expert @ expert.t(), torch.ones(8, 8), atol=1e-4)


# --- the router -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Any:
    """A sparse classifier, split into experts, with its routers trained."""
    data = labelled(6, batch=16)
    model = surgeon.trace(classifier("relu", layers=2, dropout=0.0), tokens())
    passes = [
        Sparsify(alpha=0.03, alpha_schedule="constant", epochs=25, lr=5e-3, schedule="constant"),
        Moeify(experts=16, router="trained", router_width=32, epochs=40, lr=1e-2),
    ]
    return surgeon.Pipeline(passes).run(model, inputs=tokens(), data=data)


def test_router_training_lowers_its_loss(trained: Any) -> None:
    fit = trained.reports[1].fit
    assert fit.losses[-1][1]["router loss"] < 0.3 * fit.losses[0][1]["router loss"]
    assert trained.reports[1].preserved
    assert trained.reports[1].max_error < 1e-6
    assert not any("not trained" in note for note in trained.reports[1].notes)


def run_all(graph: Any, tau: float) -> tuple[Tensor, float, float]:
    """Outputs, task loss, and share of the experts that ran, on the training data."""
    set_tau(graph, tau)
    meter, data = ExpertMeter(graph), [Batch.from_any(item) for item in labelled(6, batch=16)]
    with torch.no_grad():
        outputs = torch.cat([meter.call(item.args, item.kwargs) for item in data])
    loss = F.cross_entropy(outputs, torch.cat([item.labels for item in data if item.labels is not None]))
    ran, pairs = (sum(getattr(layer, name) for layer in meter.layers.values()) for name in ("ran", "pairs"))
    return outputs, float(loss), ran / pairs


def test_learned_router_keeps_what_a_random_one_of_the_same_cost_loses(trained: Any) -> None:
    random = fork(trained.graph)
    own_parameters(random)
    torch.manual_seed(5)
    for module in random.modules():
        if isinstance(module, MoE):
            module.router.fc1.reset_parameters()
            module.router.fc2.reset_parameters()
    dense, dense_loss, _ = run_all(trained.graph, 0.0)
    learned, learned_loss, learned_share = run_all(trained.graph, 0.1)
    guessed, guessed_loss, guessed_share = run_all(random, 0.6)
    set_tau(trained.graph, 0.0)
    assert learned_share < 0.25
    assert learned_share < guessed_share
    assert float((learned - dense).norm()) < 0.3 * float((guessed - dense).norm())
    assert learned_loss - dense_loss < 0.3 * (guessed_loss - dense_loss)


def test_router_training_changes_only_routers(traces: Any) -> None:
    plain, fitted = traces("stack:relu"), traces("stack:relu")
    Moeify(experts=4, split="weights").apply(plain)
    Moeify(experts=4, split="weights", steps=3).apply(fitted, data=Data.of(labelled_vectors()))
    for name, value in plain.state_dict().items():
        assert torch.equal(fitted.state_dict()[name], value) != (".router." in name), name


def test_router_regresses_norms_of_what_the_layer_reads_at_that_moment() -> None:
    """The layer's input is changed in place after it was read."""

    def compute(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        y = m.b(F.relu(m.a(h)))
        h += 1000.0
        return y + h

    torch.manual_seed(0)
    graph = surgeon.trace(Function(compute, a=(WIDTH, HIDDEN), b=(HIDDEN, WIDTH)), X)
    report = Moeify(experts=4, steps=1, lr=1e-9).apply(graph, data=[X])
    assert report.fit is not None
    assert report.fit.losses[0][1]["router loss"] < 10.0


def test_padding_takes_no_part_in_router_training() -> None:
    graph = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    padded = tokens(1, 7, padded=False)
    padded["attention_mask"][0, 4:] = 0
    short = {name: value[:, :4] for name, value in padded.items()}
    losses = []
    for inputs in (padded, short):
        report = Moeify(experts=4, steps=1, lr=1e-9).apply(fork(graph), data=[inputs])
        assert report.fit is not None
        losses.append(report.fit.losses[0][1]["router loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
