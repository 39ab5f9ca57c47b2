"""Where tokens can halt, and the block behind it with all tokens and with those that have not halted."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.dynamic.knobs import set_tau
from surgeon.exits.halting import find_halts
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph, aten, fork
from surgeon.measure.meter import measure
from surgeon.measure.multiply_adds import Counter
from surgeon.passes import HaltTokens, Lower, Moeify
from surgeon.sites.rejection import Rejection
from surgeon.testing.models import StackLayer, feed_forward
from tests.small_models import CLASSES, WIDTH, Function, classifier, labelled, stack, tokens, vectors

TAUS = (0.0, 0.4, 0.5, 0.6, 1.0)
SPREAD = HaltTokens(gamma=2.0, beta=-1.0)


@functools.cache
def traced() -> TracedGraph:
    return surgeon.trace(classifier("gelu", 3), tokens())


def halting(graph: TracedGraph | None = None, inputs: Any = None) -> TracedGraph:
    made = fork(traced() if graph is None else graph)
    SPREAD.apply(made, inputs=tokens() if inputs is None else inputs)
    return made


def refused(model: nn.Module, inputs: Any) -> list[Rejection]:
    sites, found = HaltTokens().explain(surgeon.trace(model.eval(), inputs))
    assert not sites
    return found


def test_tokens_that_have_halted_change_no_others_and_are_not_changed() -> None:
    graph = halting()
    sites = find_halts(graph)
    assert [site.path for site in sites] == ["blocks.halting.0", "blocks.halting.1"]
    set_tau(graph, 0.6)
    names = [name for site in sites for name in (site.total.name, site.output.name)]
    x = tokens(6, padded=False)
    _, values = Capture(graph, [*names, sites[0].tokens.name])(**x)
    first, second = (values[site.total.name] > 0.99 for site in sites)
    assert 0 < int(first.sum()) < int(second.sum()) < second.numel()
    tokens_1, tokens_2, tokens_3 = (values[name] for name in (sites[0].tokens.name, names[1], names[3]))
    assert torch.equal(tokens_2[first], tokens_1[first])
    assert torch.equal(tokens_3[second], tokens_2[second])
    assert not torch.isclose(tokens_2[~first], tokens_1[~first]).all(-1).any()
    # The blocks of the model itself, on a sample without the tokens that have halted.
    block = classifier("gelu", 3).blocks[1]
    for row in range(6):
        alone = tokens_1[row][~first[row]][None]
        assert torch.allclose(block(alone, None)[0], tokens_2[row][~first[row]], atol=1e-5)


def test_both_forms_answer_alike_and_the_count_is_what_runs() -> None:
    masked = halting()
    lowered = fork(masked)
    report = Lower().apply(lowered, inputs=tokens())
    assert report.max_error == 0.0
    assert [site.form for site in find_halts(masked)] == ["masked"] * 2
    assert [site.form for site in find_halts(lowered)] == ["dynamic"] * 2
    assert not Lower().explain(lowered)[0]
    costs = []
    for tau in TAUS:
        set_tau(masked, tau)
        set_tau(lowered, tau)
        for rows in (1, 5):
            x = tokens(rows, 9)
            assert torch.allclose(lowered(**x), masked(**x), atol=1e-5)
            assert measure(lowered, (), x) == measure(masked, (), x)
        one = tokens(1, 9)
        with Counter() as counter, torch.no_grad():
            lowered(**one)
        cost, layers = measure(lowered, (), one)
        if tau < 1.0:  # two tokens at least are computed
            assert counter.multiply_adds == cost.executed_multiply_adds
        costs.append(cost.executed_multiply_adds)
        assert [layer.tokens for layer in layers.values()] == [9, 9]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[2] > costs[-1]


def test_costs_of_a_block_fall_with_its_tokens_and_its_attention_with_their_square() -> None:
    graph = halting()
    set_tau(graph, 0.6)
    x = tokens(4, 8, padded=False)
    cost, layers = measure(graph, (), x)
    site = find_halts(graph)[0]
    live = (Capture(graph, [site.total.name])(**x)[1][site.total.name] <= 0.99).sum(-1)
    linear, pairs = 4 * WIDTH**2 + 2 * WIDTH * 32, 2 * WIDTH
    assert site.multiply_adds == linear
    found = layers[site.path]
    assert found.multiply_adds == 4 * (8 * linear + 64 * pairs)
    assert found.executed_multiply_adds == int((live * linear + live**2 * pairs).sum())
    assert found.ran == int(live.sum())
    assert cost.multiply_adds == measure(traced(), (), x)[0].multiply_adds


def test_experts_in_a_block_run_for_its_tokens() -> None:
    graph = halting()
    dense = measure(graph, (), tokens(4, 8, padded=False))[0]
    Moeify(experts=4).apply(graph)
    set_tau(graph, {"*.halting.*": 0.6, "*": 0.0})
    _, layers = measure(graph, (), tokens(4, 8, padded=False))
    for number in (0, 1):
        assert layers[f"blocks.{number + 1}.ffn.moe"].share == pytest.approx(
            layers[f"blocks.halting.{number}"].ran / layers[f"blocks.halting.{number}"].pairs
        )
    assert layers["blocks.0.ffn.moe"].share == 1.0
    set_tau(graph, 0.0)
    cost, layers = measure(graph, (), tokens(4, 8, padded=False))
    routers = sum(layer.per_token * layer.tokens for layer in layers.values())
    assert cost.executed_multiply_adds == cost.multiply_adds == dense.multiply_adds + routers


@pytest.mark.parametrize("lowered", [False, True])
def test_saved_and_loaded(lowered: bool, tmp_path: Path) -> None:
    passes = [replace(SPREAD, steps=1), *([Lower()] if lowered else [])]
    surgery = surgeon.Pipeline(passes).run(traced(), inputs=tokens(), data=labelled(1))
    set_tau(surgery.graph, 0.6)
    surgery.save(tmp_path / "saved")
    graph = surgeon.load(tmp_path / "saved")
    assert [site.form for site in find_halts(graph)] == ["dynamic" if lowered else "masked"] * 2
    assert surgeon.get_tau(graph) == surgeon.get_tau(surgery.graph)
    for tau in TAUS:
        set_tau(graph, tau)
        set_tau(surgery.graph, tau)
        for x in (tokens(1, 5), tokens(6, 11)):
            assert torch.allclose(graph(**x), surgery.graph(**x), atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "vit", "albert"])
def test_models_of_hugging_face(traces: Any, family: str) -> None:
    graph = fork(traces(family))
    assert [site.path for site in SPREAD.explain(graph)[0]]
    attention = sum(node.target is aten.scaled_dot_product_attention.default for node in graph.graph.nodes)
    SPREAD.apply(graph)
    Lower().apply(graph)
    (site,) = find_halts(graph)
    assert site.form == "dynamic"
    inside = [node for node in site.block if node.target is aten.scaled_dot_product_attention.default]
    assert len(inside) == attention - 1


def test_attention_that_is_written_out() -> None:
    def written(module: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (module.q, module.k, module.v))
        scores = q @ k.transpose(-2, -1) / 2 + module.bias
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    parts: dict[str, Any] = dict.fromkeys("qkv", (WIDTH, WIDTH))
    mixed = [Function(written, **parts, bias=torch.randn(1, 2, 5, 5)) for _ in range(2)]
    layers = [StackLayer(feed_forward("gelu")) for _ in range(2)]
    head = Function(lambda m, x: m.head(x.mean(1)), head=(WIDTH, CLASSES))
    model = nn.Sequential(mixed[0], layers[0], mixed[1], layers[1], head)
    graph = surgeon.trace(model.eval(), (vectors()["x"],))
    SPREAD.apply(graph, inputs=(vectors()["x"],))
    lowered = fork(graph)
    Lower().apply(lowered, inputs=(vectors()["x"],))
    for tau in TAUS:
        set_tau(graph, tau)
        set_tau(lowered, tau)
        x = vectors(1, 5, seed=int(100 * tau))["x"]
        assert torch.allclose(graph(x), lowered(x), atol=1e-6)
        assert measure(graph, (x,), {}) == measure(lowered, (x,), {})


class Mixing(nn.Module):
    """Two blocks, of which the second mixes tokens in another way."""

    def __init__(self, mix: Any, **parts: Any) -> None:
        super().__init__()
        self.first, self.mix = StackLayer(feed_forward("gelu")), Function(mix, **parts)
        self.second, self.head = StackLayer(feed_forward("gelu")), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.mix(self.first(x))).mean(1))


@pytest.mark.parametrize(
    ("mix", "code"),
    [
        (lambda m, x: x + m.along(x.transpose(1, 2)).transpose(1, 2), "tokens-meet"),
        (lambda m, x: x - x.mean(1, keepdim=True), "tokens-meet"),
        (lambda m, x: x + torch.nn.functional.scaled_dot_product_attention(
            *[x.unflatten(-1, (2, 8)).transpose(1, 2)] * 3, is_causal=True
        ).transpose(1, 2).flatten(2), "tokens-meet"),
        (lambda m, x: x[:, 1:], "tokens-change"),
        (lambda m, x: torch.cat([x, x], -1)[..., ::2].double().float()[:, :, :], "none"),
    ],
    ids=["along the tokens", "their mean", "causal", "one less", "none of it"],
)  # fmt: skip
def test_tokens_that_meet_elsewhere_are_refused(mix: Any, code: str) -> None:
    torch.manual_seed(0)
    graph = surgeon.trace(Mixing(mix, along=(5, 5)).eval(), {"x": vectors()["x"]})
    sites, found = HaltTokens().explain(graph)
    assert [rejection.code for rejection in found] == ([] if code == "none" else [code])
    assert len(sites) == (code == "none")


def test_a_block_that_cannot_be_masked_ends_it_for_all_before() -> None:
    class Three(Mixing):
        def __init__(self) -> None:
            super().__init__(lambda m, x: x - x.mean(1, keepdim=True))
            self.third = StackLayer(feed_forward("gelu"))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.third(self.mix(self.second(self.first(x)))).mean(1))

    found = refused(Three(), {"x": vectors()["x"]})
    assert {(rejection.path, rejection.code) for rejection in found} == {
        ("first", "tokens-meet"),
        ("second", "tokens-meet"),
    }
    assert any("in the block behind second" in rejection.reason for rejection in found)


def test_what_samples_cannot_leave_tokens_cannot_either(traces: Any) -> None:
    assert [one.code for one in HaltTokens().explain(traces("gpt2"))[1]] == ["answers-tokens"]
    assert [one.code for one in refused(stack("gelu", 1), vectors())] == ["no-blocks"]


def test_a_block_that_needs_the_number_of_tokens_is_not_lowered() -> None:
    def squares(module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 2, 2, WIDTH).flip(-1).reshape(x.shape[0], 4, WIDTH)

    x = vectors(3, 4)["x"]
    graph = surgeon.trace(Mixing(squares).eval(), {"x": x})
    SPREAD.apply(graph, inputs={"x": x})
    report = Lower().apply(graph, inputs={"x": x})
    assert [rejection.code for rejection in report.rejected] == ["needs-length"]
    assert [site.form for site in find_halts(graph)] == ["masked"]
