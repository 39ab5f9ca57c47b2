"""Experts in every form of a graph: rules, experts that always run, and routers that share their trunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import surgeon
from surgeon.dynamic.knobs import get_rule, get_tau, set_rule, set_tau
from surgeon.errors import UsageError
from surgeon.graph.ownership import own_parameters
from surgeon.graph.snapshot import snapshot
from surgeon.graph.traced import TracedGraph, fork, tensor_key, tensor_of
from surgeon.kernels.experts import selected
from surgeon.kernels.selection import RULES, selection_threshold
from surgeon.measure.meter import measure
from surgeon.moe.module import MoE
from surgeon.moe.rebuild import moe_module
from surgeon.moe.site import find_moes, router_nodes
from surgeon.passes import Lower, Mlpify, Moeify, Quantize
from surgeon.surgery.artifact import load
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.record import read_record
from surgeon.surgery.surgery import Surgery
from tests.small_models import WIDTH, classifier, labelled, labelled_vectors, stack, tokens, vectors

FIRST, SECOND = "blocks.0.ffn.moe", "blocks.1.ffn.moe"
FORMS = ("module", "masked", "dynamic")
every_form = pytest.mark.parametrize("form", [*FORMS, "int8"])


class Made:
    """The same experts in every form; the masked one comes out of a saved surgery."""

    def __init__(self, place: Path, **options: Any) -> None:
        moeify = Moeify(experts=8, router_width=8, steps=20, lr=1e-2, **options)
        surgery = Pipeline([moeify]).run(stack("relu"), inputs=vectors(), data=labelled_vectors())
        self.module = surgery.graph.eval()
        self.place = surgery.save(place)

    def __call__(self, form: str) -> TracedGraph:
        if form == "masked":
            return load(self.place)
        graph = fork(self.module)
        own_parameters(graph)
        if form == "dynamic":
            Lower().apply(graph, inputs=vectors())
        if form == "int8":
            Quantize().apply(graph, inputs=vectors(), data=labelled_vectors())
        return graph.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made") / "one")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two experts of eight always run."""
    return Made(tmp_path_factory.mktemp("shared") / "one", shared=2)


def again(graph: TracedGraph, place: Path) -> TracedGraph:
    """The graph, saved and loaded."""
    return load(Surgery(graph, [], vectors(), [snapshot(graph)]).save(place))


def by_hand(module: MoE, x: Tensor) -> Tensor:
    """The output of an expert layer, one expert after the other."""
    with torch.no_grad():
        scores = module.router(x)
        chosen = selected(scores, selection_threshold(scores, module.tau, module.rule))
        assert module.w1 is not None
        assert module.b1 is not None
        assert module.w2 is not None
        y = torch.zeros(*x.shape[:-1], module.w2.shape[2]) + (0 if module.b2 is None else module.b2)
        for expert in range(len(module.w1)):
            out = F.relu(F.linear(x, module.w1[expert], module.b1[expert])) @ module.w2[expert]
            routed = expert - module.shared
            y = y + (out if routed < 0 else out * chosen[..., routed : routed + 1])
        return y


# --- rules ------------------------------------------------------------------------------------------------------------


@every_form
def test_every_form_is_there(made: Made, form: str) -> None:
    assert {site.form for site in find_moes(made(form))} == {form}


@every_form
def test_rules_are_set_for_all_by_path_and_by_pattern(made: Made, form: str) -> None:
    graph = made(form)
    assert get_rule(graph) == {FIRST: "max", SECOND: "max"}
    assert surgeon.set_rule(graph, "energy") == [FIRST, SECOND]
    assert surgeon.get_rule(graph) == {FIRST: "energy", SECOND: "energy"}
    assert set_rule(graph, "top_k", "blocks.1.ffn") == [SECOND]
    assert set_rule(graph, {SECOND: "cumulative", "*": "max"}) == [FIRST, SECOND]
    assert get_rule(graph) == {FIRST: "max", SECOND: "cumulative"}


def test_knobs_that_stay_as_they_are_do_not_make_torch_compile_again(made: Made) -> None:
    graph = made("dynamic")
    compiled: list[GraphModule] = []

    def count(traced: GraphModule, inputs: list[Any]) -> GraphModule:
        compiled.append(traced)
        return traced

    torch.compiler.reset()
    call = torch.compile(graph, backend=count)
    for rule, tau, times in (("max", 0.0, 1), ("max", 0.5, 1), ("top_k", 0.5, 2), ("top_k", 0.2, 2)):
        set_rule(graph, rule)
        set_tau(graph, tau)
        call(**vectors())
        assert len(compiled) == times


@every_form
def test_a_rule_takes_effect_at_the_next_call_and_costs_what_it_says(made: Made, form: str) -> None:
    graph = made(form)
    set_tau(graph, 0.5)
    outputs = {}
    for rule in RULES:
        set_rule(graph, rule)
        cost, layers = measure(graph, (), vectors())
        outputs[rule] = graph(**vectors())
        if rule == "top_k":
            assert {layer.ran / layer.tokens for layer in layers.values()} == {4.0}
        assert cost.executed is not None
        assert 0 < cost.executed < 1
    assert len({float(output.detach().sum()) for output in outputs.values()}) == len(RULES)
    set_rule(graph, "max")
    assert torch.equal(graph(**vectors()), outputs["max"])


@pytest.mark.parametrize("rule", RULES)
def test_all_forms_select_alike(made: Made, rule: str) -> None:
    graphs = [made(form) for form in FORMS]
    for graph in graphs:
        set_rule(graph, {FIRST: rule})
        set_tau(graph, {FIRST: 0.4, SECOND: 0.2})
    shares = [{path: layer.share for path, layer in measure(graph, (), vectors())[1].items()} for graph in graphs]
    assert shares[0] == shares[1] == shares[2]
    want = graphs[0](**vectors())
    assert all(torch.allclose(graph(**vectors()), want, atol=1e-5) for graph in graphs[1:])


@every_form
def test_rule_and_tau_are_saved(made: Made, form: str, tmp_path: Path) -> None:
    graph = made(form)
    set_rule(graph, {FIRST: "energy", SECOND: "top_k"})
    set_tau(graph, {FIRST: 0.3, SECOND: 0.6})
    loaded = again(graph, tmp_path / "saved")
    assert get_rule(loaded) == {FIRST: "energy", SECOND: "top_k"}
    assert get_tau(loaded) == get_tau(graph)
    assert read_record(tmp_path / "saved").rule == get_rule(graph)
    assert torch.allclose(loaded(**vectors(4)), graph(**vectors(4)), atol=1e-6)
    assert set_rule(loaded, "cumulative") == [FIRST, SECOND]
    assert set(get_rule(loaded).values()) == {"cumulative"}


def test_lowering_keeps_the_rule(made: Made) -> None:
    graph = made("module")
    set_rule(graph, {FIRST: "energy"})
    Lower().apply(graph, inputs=vectors())
    assert get_rule(graph) == {FIRST: "energy", SECOND: "max"}


@every_form
@pytest.mark.parametrize(("rule", "path", "words"), [
    ("best", None, "No selection rule 'best'"),
    ("max", "blocks.7", "No layer 'blocks.7'. Layers that can be set: blocks.0.ffn.moe, blocks.1.ffn.moe"),
    ({FIRST: "energy", "nowhere": "max"}, None, "No layer 'nowhere'"),
    ({FIRST: "energy", SECOND: "best"}, None, "No selection rule 'best'"),
])  # fmt: skip
def test_wrong_rules_change_nothing(made: Made, form: str, rule: Any, path: str | None, words: str) -> None:
    graph = made(form)
    with pytest.raises(UsageError, match=words):
        set_rule(graph, rule, path)
    assert get_rule(graph) == {FIRST: "max", SECOND: "max"}


# --- experts that always run ------------------------------------------------------------------------------------------


@every_form
def test_shared_experts_always_run(shared: Made, form: str) -> None:
    graph = shared(form)
    sites = find_moes(graph)
    assert [(site.shared, site.experts, len(site.routed.w1)) for site in sites] == [(2, 8, 6)] * 2
    assert sites[0].describe == "8 experts × 4, 2 of them always on"
    assert sites[0].router_parameters == 8 * (WIDTH + 6)
    set_rule(graph, "top_k")
    set_tau(graph, 1.0)
    _, layers = measure(graph, (), vectors())
    assert {layer.ran / layer.tokens for layer in layers.values()} == {2.0 + 1.0}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_shared_experts_take_no_part_in_selection(shared: Made, rule: str, tau: float) -> None:
    graph = shared("module")
    set_rule(graph, rule)
    set_tau(graph, tau)
    module = graph.get_submodule(FIRST)
    assert isinstance(module, MoE)
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(module(x), by_hand(module, x), atol=1e-5)


def test_all_forms_agree_on_shared_experts(shared: Made, tmp_path: Path) -> None:
    graphs = [shared(form) for form in FORMS]
    graphs.append(again(graphs[2], tmp_path / "dynamic"))
    late = shared("masked")
    Lower().apply(late, inputs=vectors())
    graphs.append(late)
    for graph in graphs:
        set_tau(graph, 0.4)
    want = graphs[0](**vectors())
    assert all(torch.allclose(graph(**vectors()), want, atol=1e-5) for graph in graphs)
    for graph in graphs:
        set_tau(graph, 0.0)
        assert torch.allclose(graph(**vectors()), stack("relu")(**vectors()), atol=1e-5)


# --- one trunk for several routers ------------------------------------------------------------------------------------

PROJECTIONS = [f"blocks.0.attention.{part}.projection_mlp" for part in "qkv"]


@pytest.fixture(scope="module")
def projected() -> Callable[..., TracedGraph]:
    """Attention with every projection replaced, converted to experts with these options."""
    base = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    Mlpify(steps=1).apply(base, inputs=tokens(), data=labelled(1))

    def make(**options: Any) -> TracedGraph:
        graph = fork(base)
        own_parameters(graph)
        Moeify(**{"experts": 4, "router_width": 8, "steps": 2, **options}).apply(
            graph, inputs=tokens(), data=labelled(1)
        )
        return graph.eval()

    return make


def trunks(graph: TracedGraph) -> dict[str, Any]:
    """What tells one trunk from another, by layer."""
    found = {}
    for site in find_moes(graph):
        if site.form == "module":
            read = list(graph.get_submodule(site.path).router.parameters())  # type: ignore[union-attr]
        else:
            read = [tensor for node in router_nodes(site.nodes[0]) if (tensor := tensor_of(graph, node)) is not None]
        (trunk,) = [tensor for tensor in read if tensor.dim() == 2 and tensor.shape[1] == WIDTH]
        found[site.path.removesuffix(".moe")] = tensor_key(trunk)
    return found


def is_shared(graph: TracedGraph) -> None:
    found = trunks(graph)
    assert {found[path] for path in PROJECTIONS} == {found[PROJECTIONS[0]]}
    assert found["blocks.0.attention.o.projection_mlp"] != found[PROJECTIONS[0]]
    assert found["blocks.0.ffn"] != found[PROJECTIONS[0]]
    assert len(set(found.values())) == 3


def test_projections_of_one_input_share_a_trunk(projected: Any) -> None:
    graph = projected()
    is_shared(graph)
    parameters = {site.path.removesuffix(".moe"): site.router_parameters for site in find_moes(graph)}
    first, *others = PROJECTIONS
    assert parameters[first] == 8 * WIDTH + 8 * 4
    assert [parameters[path] for path in others] == [8 * 4] * 2
    total = sum(site.router_parameters for site in find_moes(graph))
    assert total == sum(
        {id(p): p.numel() for name, p in graph.named_parameters() if ".router." in name and p.dim() == 2}.values()
    )


def test_a_shared_trunk_is_computed_once_when_lowered(projected: Any) -> None:
    graph, apart = projected(), projected(share_trunk=False)
    for one in (graph, apart):
        Lower().apply(one, inputs=tokens())
    calls = [
        str(node.args[1].target) for node in graph.graph.nodes if "linear" in str(node.target) and len(node.args) > 1
    ]
    assert sum(call.endswith("router.fc1.weight") for call in calls) == 3  # of q, k and v; of o; of the FFN
    inputs = tokens()
    rows = inputs["input_ids"].numel()
    saved = measure(apart, (), inputs)[0].multiply_adds - measure(graph, (), inputs)[0].multiply_adds
    assert saved == 2 * 8 * WIDTH * rows
    _, layers = measure(graph, (), inputs)
    routers = sum(layer.tokens * layer.per_token for layer in layers.values())
    experts = sum(layer.multiply_adds for layer in layers.values())
    dense = surgeon.trace(classifier("relu", layers=1, dropout=0.0), inputs)
    attention = 2 * rows * inputs["input_ids"].shape[1] * WIDTH + len(inputs["input_ids"]) * WIDTH * 3
    assert measure(graph, (), inputs)[0].multiply_adds == routers + experts + attention
    assert measure(dense, (), inputs)[0].multiply_adds == experts + attention


def test_a_shared_trunk_is_saved_and_loaded_as_one(projected: Any, tmp_path: Path) -> None:
    graph = projected()
    surgery = Surgery(graph, [], tokens(), [snapshot(graph)])
    loaded = load(surgery.save(tmp_path / "module"))
    is_shared(loaded)
    Lower().apply(loaded, inputs=tokens())
    is_shared(loaded)
    lowered = fork(graph)
    Lower().apply(lowered, inputs=tokens())
    both = load(Surgery(lowered, [], tokens(), [snapshot(lowered)]).save(tmp_path / "dynamic"))
    is_shared(both)
    for one in (graph, loaded, both):
        set_tau(one, 0.5)
    want = graph(**tokens())
    assert torch.allclose(loaded(**tokens()), want, atol=1e-5)
    assert torch.allclose(both(**tokens()), want, atol=1e-5)
    costs = [measure(one, (), tokens())[0].multiply_adds for one in (loaded, both)]
    assert costs[0] == costs[1]


def test_own_parameters_keeps_a_trunk_shared(projected: Any) -> None:
    graph = projected()
    before = set(trunks(graph).values())
    own_parameters(graph)
    is_shared(graph)
    assert not before & set(trunks(graph).values())


def test_trunks_can_be_kept_apart(projected: Any) -> None:
    assert len(set(trunks(projected(share_trunk=False)).values())) == 5


def test_routers_of_an_earlier_run_are_left_alone(projected: Any) -> None:
    graph = projected(only=("*.q.*",))
    name = f"{PROJECTIONS[0]}.moe.router.fc1.weight"
    before = graph.get_parameter(name).detach().clone()
    Moeify(experts=4, router_width=12, only=("*.k.*", "*.v.*"), steps=2).apply(graph, inputs=tokens(), data=labelled(1))
    assert torch.equal(graph.get_parameter(name), before)
    found = trunks(graph)
    assert found[PROJECTIONS[1]] == found[PROJECTIONS[2]] != found[PROJECTIONS[0]]


def test_shared_trunks_are_trained_and_fitted_in_closed_form(projected: Any) -> None:
    graph = projected(router="neurons", epochs=0, steps=None, router_width=6)
    is_shared(graph)
    trunk = graph.get_parameter(f"{PROJECTIONS[0]}.moe.router.fc1.weight")
    rows = torch.cat([graph.get_parameter(f"{path}.moe.w1").flatten(0, 1) for path in PROJECTIONS])
    assert all(bool((rows == row).all(1).any()) for row in trunk)  # neurons of the three layers


# --- routers that score by the hidden values of neurons ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gelu", "gated"])
def test_routers_of_neurons_are_the_same_in_every_form(kind: str, tmp_path: Path) -> None:
    model, options = stack(kind), {"split": "markers", "marked": 4, "router": "representatives", "shared": 1}
    moeify = Moeify(experts=8, rule="top_k", epochs=0, **options)  # type: ignore[arg-type]
    module = Pipeline([moeify]).run(model, inputs=vectors(), data=labelled_vectors()).graph.eval()
    assert torch.allclose(module(**vectors()), model(**vectors()), atol=1e-5)
    dynamic = fork(module)
    Lower().apply(dynamic, inputs=vectors())
    graphs = [module, again(module, tmp_path / "masked"), dynamic, again(dynamic, tmp_path / "dynamic")]
    assert [find_moes(graph)[0].form for graph in graphs] == ["module", "masked", "dynamic", "dynamic"]
    rows = 7 * (2 if kind == "gated" else 1)
    for graph in graphs:
        set_tau(graph, 0.6)
        assert {site.router_parameters for site in find_moes(graph)} == {rows * WIDTH}
        _, layers = measure(graph, (), vectors())
        assert {layer.ran / layer.tokens for layer in layers.values()} == {1.0 + 3.0}
        assert torch.allclose(graph(**vectors(4)), module(**vectors(4)), atol=1e-5)
        rebuilt = moe_module(graph, find_moes(graph)[0])
        assert isinstance(rebuilt, MoE)
        assert rebuilt.router.activation is not None
        x = torch.randn(3, WIDTH)
        assert torch.allclose(rebuilt(x), module.get_submodule(FIRST)(x), atol=1e-5)
        quantised = fork(graph)
        report = Quantize().apply(quantised, inputs=vectors())
        assert {one.code for one in report.rejected} == {"neuron-router"}
