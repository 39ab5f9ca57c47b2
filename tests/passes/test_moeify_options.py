"""moeify's options: what makes neurons alike, experts that always run, values for each site, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph, fork
from surgeon.moe.site import find_moes
from surgeon.passes import Moeify
from surgeon.surgery.recipe import build
from surgeon.training.loop import RunSettings
from tests.passes.experts import layer
from tests.passes.reports import reasons
from tests.small_models import HIDDEN, WIDTH, Gated, Plain, Wrapped, vectors

X = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(0))


def groups(graph: TracedGraph, dense: Tensor, path: str = "ffn.moe") -> list[set[int]]:
    """For every expert the indices of its neurons among the rows of the dense layer."""
    rows = layer(graph, path).w1
    assert rows is not None
    return [{int((dense == row).all(1).nonzero().item()) for row in expert} for expert in rows]


# --- splitting --------------------------------------------------------------------------------------------------------


def firing_together() -> tuple[nn.Module, list[Tensor], list[set[int]]]:
    """A layer in which neurons i, i + 8, i + 16 and i + 24 fire together, whatever their rows look like."""
    torch.manual_seed(0)
    ffn = Plain(act=F.relu, dropout=0.0)
    with torch.no_grad():
        ffn.fc1.weight.copy_(torch.eye(WIDTH).repeat(2, 1)[torch.arange(HIDDEN) % 8])
        # Rows differ in a direction that the data does not have.
        ffn.fc1.weight[:, 8:] = 5 * torch.randn(HIDDEN, 8)
        ffn.fc1.bias.zero_()
    data = []
    for number in range(4):
        x = torch.zeros(8, 4, WIDTH)
        x[..., :8] = torch.rand(8, 4, 8, generator=torch.Generator().manual_seed(number)) - 0.4
        data.append(x)
    return nn.Sequential(ffn), data, [set(range(first, HIDDEN, 8)) for first in range(8)]


@pytest.mark.parametrize("split", ["activations", "auto"])
def test_neurons_that_fire_together_are_put_together(split: Any) -> None:
    model, data, want = firing_together()
    dense = model[0].fc1.weight.detach()
    graph = surgeon.trace(model.eval(), data[0])
    Moeify(experts=8, split=split, router="neurons", epochs=0).apply(graph, inputs=data[0], data=data)
    assert sorted(map(sorted, groups(graph, dense, "0.moe"))) == sorted(map(sorted, want))


@pytest.mark.parametrize(("split", "data"), [("weights", True), ("auto", False)])
def test_rows_are_compared_if_wanted_or_if_there_is_no_data(split: Any, data: bool) -> None:
    model, batches, want = firing_together()
    dense = model[0].fc1.weight.detach()
    graph = surgeon.trace(model.eval(), batches[0])
    Moeify(experts=8, split=split, steps=1).apply(graph, inputs=batches[0], data=batches if data else None)
    assert sorted(map(sorted, groups(graph, dense, "0.moe"))) != sorted(map(sorted, want))


def test_split_at_random_is_a_permutation_that_the_seed_decides() -> None:
    torch.manual_seed(0)
    model = Wrapped(Plain(act=F.relu)).eval()
    dense = model.ffn.fc1.weight.detach()  # type: ignore[union-attr]
    found = []
    for seed in (0, 0, 1):
        graph = surgeon.trace(model, X)
        Moeify(experts=4, split="random").apply(graph, inputs=X, settings=RunSettings(seed=seed))
        found.append(groups(graph, dense))
        assert sorted(index for group in found[-1] for index in group) == list(range(HIDDEN))
    assert found[0] == found[1] != found[2]


# --- experts that always run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("split", ["activations", "weights", "random", "markers"])
def test_neurons_that_are_active_most_often_always_run(gated: bool, split: Any) -> None:
    torch.manual_seed(0)
    ffn: Any = Gated(act=F.relu, bias=True) if gated else Plain(act=F.relu, dropout=0.0)
    busy = {1, 4, 9, 16, 20, 25, 30, 31}
    with torch.no_grad():
        bias = ffn.gate.bias if gated else ffn.fc1.bias
        bias.fill_(-1.5)
        bias[sorted(busy)] = 4.0
        if gated:
            ffn.up.bias.fill_(3.0)
    dense = (ffn.up if gated else ffn.fc1).weight.detach()
    model = Wrapped(ffn).eval()
    graph = surgeon.trace(model, X)
    Moeify(experts=8, shared=2, split=split, steps=1).apply(graph, inputs=X, data=[X])
    found = groups(graph, dense)
    assert found[0] | found[1] == busy
    assert layer(graph, "ffn.moe").shared == 2
    assert torch.allclose(graph(X), model(X), atol=1e-5)
    assert layer(graph, "ffn.moe").router(X).shape == (4, 6, 6)


def test_as_many_marks_as_neurons_tell_nothing() -> None:
    torch.manual_seed(0)
    graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
    with pytest.raises(UsageError, match="ffn: 32 neurons of each token would be marked, but it has 32 neurons"):
        Moeify(experts=4, split="markers", marked=HIDDEN).apply(graph, inputs=X, data=[X])


def test_shared_experts_leave_some_to_route() -> None:
    torch.manual_seed(0)
    graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
    report = Moeify(experts=4, shared=4).apply(fork(graph), inputs=X, data=[X])
    assert reasons(report) == [("ffn", "4 of its 4 experts would always run, which leaves none to route")]
    assert Moeify(experts=4, shared=3, steps=1).apply(graph, inputs=X, data=[X]).matched == ["ffn"]


@pytest.mark.parametrize("options", [{"shared": 1}, {"split": "activations"}, {"split": "markers"}])
def test_what_needs_data_is_refused_without_and_allowed_in_a_dry_run(options: Any) -> None:
    torch.manual_seed(0)
    graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
    with pytest.raises(UsageError, match="need data to see which neurons are active"):
        Moeify(experts=4, **options).apply(fork(graph), inputs=X)
    dry = Moeify(experts=4, **options).apply(fork(graph), inputs=X, data=[X], settings=RunSettings(dry_run=True))
    assert dry.matched == ["ffn"]
    assert dry.fit is None


# --- values for each site ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"expert_size": {"*.0.*": 8, "*": 4}}, [4, 8]),
        ({"expert_size": {"*": 4, "*.0.*": 8}}, [8, 8]),  # the first that fits
        ({"experts": {"blocks.1.ffn": 16}}, [1, 16]),  # the others as usual
        ({"expert_size": "*.0.*:8,*:4"}, [4, 8]),
        ({"experts": "*.1.ffn : 2 , *:4"}, [4, 2]),
    ],
)
def test_numbers_of_experts_for_each_site(traces: Any, options: Any, counts: list[int]) -> None:
    (one,) = build(["moeify"], {"moeify": options})
    graph = traces("stack:relu")
    report = one.apply(graph, inputs=vectors())
    assert [site.experts for site in find_moes(graph)] == counts
    assert build(["moeify"], {"moeify": report.options}) == [one]


def test_a_value_that_fits_no_site_there_is_refused_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Wrapped(Plain(act=F.relu)), Wrapped(Plain(act=F.relu))).eval()
    graph = surgeon.trace(model, X)
    report = Moeify(expert_size={"0.*": 8, "1.*": 33}).apply(graph, inputs=X)
    assert report.matched == ["0.ffn"]
    assert ("1.ffn", "experts of 33 neurons were asked for, but it has 32 neurons") in reasons(report)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"epochs": 0, "router": "trained"}, "epochs is 0, so router=trained would stay random"),
    ({"experts": {"*": 4}, "expert_size": 4}, "give experts or expert_size, not both"),
    ({"experts": {"a": 4, "b": 0}}, "experts is 0, but must be at least 1"),
    ({"shared": -1}, "shared is -1, but must be at least 0"),
    ({"exposure": 1.5}, "exposure is 1.5, but must be from 0 to 1"),
    ({"underestimate": 0.0}, "underestimate is 0.0, but must be above 0"),
    ({"rule": "best"}, "rule is 'best', but must be one of max, cumulative, energy, top_k"),
    ({"split": "even"}, "split is 'even', but must be one of auto, weights, activations, markers, random"),
    ({"router": "none"}, "router is 'none', but must be one of trained, neurons, centres, representatives"),
    ({"objective": "size"}, "objective is 'size', but must be one of norm, relative, log, activation"),
    ({"router": "neurons", "objective": "log"}, "objective=log needs router=trained"),
    ({"router": "neurons", "objective": "activation"}, "objective=activation needs router=trained"),
    ({"router": "centres"}, "router=centres needs objective=activation, because it scores by activations"),
    ({"router": "representatives", "objective": "log"}, "objective=log needs another output than sizes of hidden"),
    ({"router": "representatives", "router_width": 8}, "router_width is 8, but a router of one layer has no"),
    ({"marked": 4}, "marked only has an effect with split=markers"),
    ({"router_depth": 3}, "router_depth is 3, but must be one of 1, 2"),
    ({"router_depth": 1}, "router=neurons has two layers"),
    ({"router_depth": 1, "router": "trained", "router_width": 8}, "router_width is 8, but a router of one"),
    ({"router": "centres", "objective": "activation", "router_width": 8}, "router_width is 8, but router=centres sets"),
    ({"router_output": "exp"}, "router_output is 'exp', but must be one of auto, abs, relu, softplus"),
    ({"router_output": "relu"}, "router_output can be set only with router=trained and objective=norm or relative"),
    ({"router": "trained", "objective": "log", "router_output": "abs"}, "router_output can be set only with"),
    ({"labels": "input"}, "labels is 'input', but must be one of output, hidden"),
    ({"router": "trained", "objective": "activation", "labels": "hidden"}, "labels chooses norms to predict"),
])  # fmt: skip
def test_wrong_options(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"moeify: {words}"):
        Moeify(**options)


def test_layers_with_one_expert_are_told(traces: Any) -> None:
    def notes(experts: int) -> str:
        return " ".join(Moeify(experts=experts, epochs=0).apply(traces("stack:relu"), data=[vectors()]).notes)

    assert "layers have one expert, which always runs, so nothing is saved there" in notes(1)
    assert "one expert" not in notes(2)
