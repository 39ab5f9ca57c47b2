"""swap-activation: whatever the spelling, one relu node is left, and everything else stays."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.capture import Capture
from surgeon.graph.ops import DROPOUTS
from surgeon.graph.traced import TracedGraph, aten
from surgeon.passes import SwapActivation
from surgeon.sites.search import find_ffns
from surgeon.surgery.recipe import build
from surgeon.training.penalty import Sparsity
from tests.passes.reports import reasons
from tests.small_models import (
    WIDTH,
    Function,
    Fused,
    Gated,
    Plain,
    Wrapped,
    classifier,
    labelled_vectors,
    tokens,
    vectors,
)

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def plain(act: Callable[[Tensor], Tensor]) -> nn.Module:
    return Wrapped(Plain(act=act, dropout=0.0))


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: plain(F.gelu),
    "gelu_tanh": lambda: plain(lambda h: F.gelu(h, approximate="tanh")),
    "gelu_erf": lambda: plain(lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))),
    "quick_gelu": lambda: plain(lambda h: h * torch.sigmoid(1.702 * h)),
    "silu_inplace": lambda: plain(lambda h: F.silu(h, inplace=True)),
    "silu_written": lambda: plain(lambda h: h / (1 + torch.exp(-h))),
    "tanh": lambda: plain(torch.tanh),
    "relu2": lambda: plain(lambda h: F.relu(h).square()),
    "scaled": lambda: plain(lambda h: F.gelu(h * 0.5) * 3.0),
    "dropout": lambda: Wrapped(Plain(dropout=0.3)),
    "gated": lambda: Wrapped(Gated()),
    "gated_dropout": lambda: Wrapped(Gated(dropout=0.3)),
    "fused": lambda: Wrapped(Fused()),
    "interleaved": lambda: Wrapped(Function(interleaved, up=(WIDTH, 64), down=(32, WIDTH))),
}


def interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(F.silu(h[..., ::2]) * h[..., 1::2])


def calls(graph: TracedGraph, target: Any) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_relu(name: str) -> None:
    torch.manual_seed(0)
    model = SPELLINGS[name]().eval()
    graph = surgeon.trace(model, X)
    (before,), _ = find_ffns(graph)
    weights = before.weights(graph)
    found = before.nonlinearity
    report = SwapActivation().apply(graph, inputs=X)
    (after,), rejected = find_ffns(graph)
    assert not rejected
    assert (after.path, after.activation, after.gated) == (before.path, "relu", before.gated)
    # relu(0.5 z) · 2 is relu(z): only the product of the scales means something.
    scale = found.input_scale * found.output_scale
    assert after.nonlinearity.input_scale * after.nonlinearity.output_scale == pytest.approx(scale)
    assert calls(graph, aten.relu.default) == 1
    old = (
        aten.gelu.default,
        aten.silu.default,
        aten.silu_.default,
        aten.erf.default,
        aten.sigmoid.default,
        aten.tanh.default,
    )
    assert not any(calls(graph, op) for op in old)
    x = F.layer_norm(X, (WIDTH,))
    up = F.linear(x, weights.w1, weights.b1)
    hidden = F.relu(up) if weights.gate is None else F.relu(F.linear(x, weights.gate, weights.b_gate)) * up
    assert torch.allclose(graph(X), F.linear(hidden, weights.w2.t(), weights.b2), atol=1e-5)
    (site,) = report.sites
    assert (site.before, site.after) == (before.activation, "relu")
    assert not report.preserved
    assert report.max_error is not None
    assert report.max_error > 1e-3


@pytest.mark.parametrize("name", ["dropout", "gated_dropout"])
def test_dropout_is_kept_and_switched(name: str) -> None:
    graph = surgeon.trace(SPELLINGS[name](), X)
    SwapActivation().apply(graph)
    dropouts = [node for node in graph.graph.nodes if node.target in DROPOUTS]
    assert [node.args[1] for node in dropouts] == [0.3]
    assert not torch.equal(graph.train()(X), graph.train()(X))
    assert torch.equal(graph.eval()(X), graph.eval()(X))


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_follows_the_mode_in_which_it_was_put_in(mode: bool) -> None:
    graph = surgeon.trace(SPELLINGS["dropout"](), X).train(mode)
    SwapActivation().apply(graph)
    assert torch.equal(graph(X), graph(X)) != mode
    assert torch.equal(graph.train(not mode)(X), graph(X)) == mode


def test_evaluation_form_stays_without_dropout() -> None:
    model = Wrapped(Plain(dropout=0.3)).eval()
    exported = torch.export.export(model, (X,), strict=False).module()
    graph = surgeon.trace(exported, X)
    SwapActivation().apply(graph)
    assert torch.equal(graph.train()(X), graph.train()(X))


@pytest.mark.parametrize("to", ["relu", "relu2", "gelu", "silu"])
def test_other_targets(traces: Any, to: str) -> None:
    graph = traces("stack:biasless")
    report = SwapActivation(to=to).apply(graph)
    if to == "relu":
        assert not report.matched
        assert {rejection.reason for rejection in report.rejected} == {"its activation is already relu"}
    else:
        assert {site.activation for site in find_ffns(graph)[0]} == {to}


def test_unknown_target() -> None:
    with pytest.raises(UsageError, match="to is 'softmax', but must be one of relu, relu2, gelu, silu"):
        SwapActivation(to="softmax")


def test_chosen_sites_only(traces: Any) -> None:
    graph = traces("stack:gelu")
    report = SwapActivation(only=("blocks.1.*",)).apply(graph)
    assert report.matched == ["blocks.1.ffn"]
    assert [site.activation for site in find_ffns(graph)[0]] == ["gelu", "relu"]
    report = SwapActivation(skip=("blocks.0.ffn",)).apply(graph)
    assert report.matched == []
    assert reasons(report) == [("blocks.1.ffn", "its activation is already relu")]


def test_shared_weights_are_swapped_at_every_execution(traces: Any) -> None:
    graph = traces("albert")
    report = SwapActivation().apply(graph, inputs=traces.inputs("albert"))
    assert len(report.matched) == 1
    (site,), _ = find_ffns(graph)
    assert (len(site.calls), site.activation) == (2, "relu")


def test_changing_shape_is_refused() -> None:
    graph = surgeon.trace(
        Function(lambda m, x: m.down(F.gelu(m.up(x)).flatten(0, 1)).view(x.shape), up=(WIDTH, 32), down=(32, WIDTH)), X
    )
    report = SwapActivation().apply(graph)
    assert reasons(report) == [("up", "its values change shape between the linear layers")]


def test_parameters_and_costs_stay(traces: Any) -> None:
    graph = traces("stack:gated")
    inputs = vectors()
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    report = SwapActivation().apply(graph, inputs=inputs)
    assert report.before == report.after
    assert set(graph.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


# --- a value for each site, and recovery ------------------------------------------------------------------------------


def test_each_site_gets_its_own_activation(traces: Any) -> None:
    (one,) = build(["swap-activation"], {"swap-activation": {"to": "*.0.*:relu, *:silu"}})
    graph = traces("stack:gelu")
    report = one.apply(graph, inputs=vectors())
    assert [(site.path, site.activation) for site in find_ffns(graph)[0]] == [
        ("blocks.0.ffn", "relu"), ("blocks.1.ffn", "silu")
    ]  # fmt: skip
    assert report.options == {"to": {"*.0.*": "relu", "*": "silu"}}
    assert [site.after for site in report.sites] == ["relu", "silu"]


def test_a_site_without_a_value_is_left(traces: Any) -> None:
    report = SwapActivation(to={"*.0.*": "relu"}).apply(traces("stack:gelu"), inputs=vectors())
    assert report.matched == ["blocks.0.ffn"]
    assert reasons(report) == [("blocks.1.ffn", "the option to has no activation for this site")]


def test_nothing_is_trained_unless_asked_for(traces: Any) -> None:
    graph, data = traces("stack:gelu"), labelled_vectors(2)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    report = SwapActivation().apply(graph, inputs=vectors(), data=data)
    assert report.fit is None
    assert report.notes == (SwapActivation.untrained,)
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    asked = SwapActivation(epochs=1).apply(traces("stack:gelu"), inputs=vectors())
    assert asked.fit is None
    assert any("Nothing was fine-tuned" in note and "give data" in note for note in asked.notes)


@pytest.mark.parametrize("options", [{"epochs": 2.0}, {"steps": 4}])
def test_recovery_trains_as_long_as_asked(traces: Any, options: Any) -> None:
    report = SwapActivation(**options).apply(traces("stack:gelu"), inputs=vectors(), data=labelled_vectors(2))
    assert report.fit is not None
    assert report.fit.steps == 4
    assert set(report.fit.losses[0][1]) == {"task loss"}
    assert not report.preserved


@pytest.mark.parametrize("kind", ["gelu", "gated", "fused", "shared"])
def test_recovery_reports_how_sparse_every_layer_was_and_is(traces: Any, kind: str) -> None:
    """Before: the model as it was, with its own activation; every execution of a layer counts."""
    graph, data = traces(f"stack:{kind}"), labelled_vectors(2)
    to = "silu" if kind == "shared" else "relu"
    ops = {aten.gelu.default, aten.silu.default, aten.relu.default}
    names = defaultdict(list)
    for site in find_ffns(graph)[0]:
        names[site.path] = [node.name for call in site.calls for node in call.cone if node.target in ops]
    with torch.no_grad():
        values = [
            Capture(graph.eval(), [name for group in names.values() for name in group])(**inputs)[1]
            for inputs, _ in data
        ]
    report = SwapActivation(to=to, steps=20, lr=1e-2).apply(graph, inputs=vectors(), data=data)
    assert report.fit is not None
    assert set(report.fit.sparsity) == set(names) == set(report.matched)
    for path, (before, after) in report.fit.sparsity.items():
        a = torch.cat([found[name].flatten(0, -2) for name in names[path] for found in values])
        assert before == Sparsity.of(a)
        assert after != before


def test_recovery_brings_the_answers_back() -> None:
    """Distilled from the model as it was, on inputs without labels."""
    model = classifier("gelu", layers=1, dropout=0.0)
    data = [tokens(8, seed=number) for number in range(4)]
    apart = {}
    for steps in (None, 100):
        options: Any = {} if steps is None else {"steps": steps, "lr": 3e-3, "distill": 1.0}
        surgery = surgeon.Pipeline([SwapActivation(**options)]).run(model, inputs=data[0], data=data)
        with torch.no_grad():
            want, got = (
                torch.cat([one(**inputs) for inputs in data]).softmax(-1) for one in (model, surgery.graph.eval())
            )
        apart[steps] = float((got - want).abs().mean())
    assert apart[100] < 0.1 * apart[None]


@pytest.mark.parametrize(("options", "words"), [
    ({"epochs": -1.0}, "epochs is -1.0, but must be at least 0"),
    ({"epochs": 1.0, "lr": 0.0}, "lr is 0.0, but must be above 0"),
    ({"to": {"*": "relu", "a": "tanh"}}, "to is 'tanh', but must be one of relu, relu2, gelu, silu"),
    ({"distill": 2.0, "steps": 1}, "distill is 2.0, but must be from 0 to 1"),
    ({"distill": 0.5}, "distill only has an effect in training, but epochs is 0"),
    ({"lr": 1e-3}, "lr only has an effect in training, but epochs is 0"),
    ({"warmup": 0.1}, "warmup only has an effect in training, but epochs is 0"),
    ({"accumulate": 2}, "accumulate only has an effect in training, but epochs is 0"),
    ({"precision": "bfloat16"}, "precision only has an effect in training, but epochs is 0"),
    ({"epochs": 0, "clip": None}, "clip only has an effect in training, but epochs is 0"),
])  # fmt: skip
def test_wrong_options(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"swap-activation: {words}"):
        SwapActivation(**options)
