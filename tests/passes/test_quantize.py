"""quantize: small integers in place of the experts' weights, what it reports, and that everything else still works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import get_knobs, set_knobs, set_rule, set_tau
from surgeon.engines import openvino
from surgeon.engines.program import Program
from surgeon.errors import UsageError
from surgeon.graph.traced import fork
from surgeon.measure.meter import measure
from surgeon.measure.sweep import sweep
from surgeon.moe.int8 import TENSORS, Int8MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Mlpify, Moeify, Quantize, Recover
from surgeon.surgery.compiled import compile_graph
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import classifier, labelled, labelled_vectors, stack, tokens, vectors

PATHS = ["blocks.0.ffn.moe", "blocks.1.ffn.moe"]


def converted(traces: Any, name: str = "relu", tau: float = 0.0, **options: Any) -> Any:
    graph = traces(f"stack:{name}")
    Moeify(**{"experts": 4, "router_width": 8, **options}).apply(graph)
    set_tau(graph, tau)
    return graph


def moved(graph: Any, want: torch.Tensor) -> float:
    with torch.no_grad():
        return float((graph(**vectors()) - want).norm() / want.norm())


@pytest.mark.parametrize("name", ["gelu", "relu", "gated", "fused", "biasless"])
@pytest.mark.parametrize("lowered", [False, True])
def test_the_output_stays_near(traces: Any, name: str, lowered: bool) -> None:
    for options, accepted in (({}, 0.01), ({"weights": "int4", "group": 8}, 0.1), ({"weights": "fp8"}, 0.03)):
        graph = converted(traces, name)
        if lowered:
            Lower().apply(graph)
        with torch.no_grad():
            want = graph(**vectors())
        report = Quantize(**options).apply(graph, inputs=vectors())
        assert report.matched == PATHS
        assert {site.form for site in find_moes(graph)} == {"int8"}
        assert 0 < moved(graph, want) < accepted
        assert report.max_error is not None
        assert 0 < report.max_error < 5 * accepted
        assert not report.preserved


def test_nothing_of_the_float_layers_is_left(traces: Any) -> None:
    graph = converted(traces, tau=0.3)
    Lower().apply(graph)
    Quantize().apply(graph, inputs=vectors())
    names = {name.removeprefix("blocks.0.ffn.moe.") for name in graph.state_dict() if ".0.ffn." in name}
    assert names - {"tau"} <= set(TENSORS)
    assert {str(value.dtype) for name, value in graph.state_dict().items() if name.endswith(("w1", "w2"))} == {
        "torch.int8"
    }
    read = [node.args[1].target for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert read  # of other layers
    assert not any(".moe." in target for target in read)
    assert surgeon.get_tau(graph) == dict.fromkeys(PATHS, pytest.approx(0.3))


def test_reports_what_was_lost_and_saved(traces: Any) -> None:
    graph = converted(traces)
    report = Quantize().apply(graph, inputs=vectors(), data=labelled_vectors())
    for site in report.sites:
        assert "4 experts × 8 in 8 bits, error 0." in site.after
        assert "of the selections the same" in site.after
        before, after = site.multiply_adds
        assert before == after
    assert re.match(r"The experts' weights take [1-9]\d*\.\d kB instead of [1-9]\d*\.\d kB\.", report.notes[0])
    assert "Without data" not in " ".join(report.notes)
    halves = Quantize(weights="int4").apply(converted(traces), inputs=vectors(), data=labelled_vectors())
    for site in halves.sites:
        assert "4 experts × 8 in 4 bits, error " in site.after
        assert "of the selections the same" in site.after
    sizes = [float(re.search(r"take (\d+\.\d) kB", made.notes[0])[1]) for made in (report, halves)]  # type: ignore[index]
    assert sizes[1] < 0.8 * sizes[0]  # of small experts: scales and biases are the larger part
    blind = Quantize().apply(converted(traces), inputs=vectors())
    assert "Without data the inputs' sizes are unknown" in " ".join(blind.notes)
    assert all(site.after == "4 experts × 8 in 8 bits" for site in blind.sites)


@pytest.mark.parametrize("name", ["gelu", "gated", "biasless"])
@pytest.mark.parametrize("lowered", [False, True])
def test_counts_the_bytes_and_numbers_of_the_float_layers(traces: Any, name: str, lowered: bool) -> None:
    graph = converted(traces, name, experts=5)  # neither they nor the router fill their panels
    if lowered:
        Lower().apply(graph)
    weights = [tensor for site in find_moes(graph) for tensor in site.weights if tensor is not None]
    want = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    # The tensors of a layer are freed once it is quantised.
    (report,) = Pipeline([Quantize()]).run(graph, inputs=vectors(), consume=True).reports
    assert report.notes[0].endswith(f" instead of {want / 1e3:.1f} kB.")
    assert report.before is not None
    assert report.after is not None
    assert report.before.parameters == report.after.parameters
    assert all(site.parameters[0] == site.parameters[1] for site in report.sites)


def test_data_makes_it_more_exact_where_inputs_differ_in_size(traces: Any) -> None:
    """One input that is a hundred times as large leaves the others few steps."""
    errors = {}
    for smooth in (0.0, 0.5):
        graph = converted(traces)
        with torch.no_grad():
            for block in ("blocks.0", "blocks.1"):
                graph.get_parameter(f"{block}.norm.weight")[3] *= 100
                graph.get_parameter(f"{block}.ffn.moe.w1")[..., 3] /= 100
            want = graph(**vectors())
        Quantize(smooth=smooth).apply(graph, inputs=vectors(), data=labelled_vectors())
        errors[smooth] = moved(graph, want)
    assert errors[0.5] < errors[0.0] / 3


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_knobs_and_costs_work_as_before(traces: Any, weights: Any) -> None:
    graph, before = (converted(traces, router="neurons") for _ in range(2))
    Quantize(weights=weights).apply(graph, inputs=vectors())
    for rule, tau in (("top_k", 0.5), ("max", 0.9)):
        for one in (graph, before):
            set_rule(one, rule)
            set_tau(one, tau)
        cost, layers = measure(graph, (), vectors())
        want, _ = measure(before, (), vectors())
        assert cost.multiply_adds == want.multiply_adds
        assert cost.executed_multiply_adds == pytest.approx(want.executed_multiply_adds, rel=0.02)
        if rule == "top_k":
            assert {layer.share for layer in layers.values()} == {0.5}
    surgeon.compensate(graph, labelled_vectors())
    kept = get_knobs(graph)
    assert set(kept.means) == set(PATHS)
    compensated = graph(**vectors())
    set_tau(graph, 0.1)
    set_knobs(graph, kept)
    assert torch.equal(graph(**vectors()), compensated)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_sweep_and_tune_take_it(traces: Any, weights: Any) -> None:
    graph = converted(traces)
    Quantize(weights=weights).apply(graph, inputs=vectors())
    shares = [
        point.executed
        for point in sweep(
            graph, map(Batch.from_any, labelled_vectors()), "classification", (0.0, 0.5, 1.0), inputs=vectors()
        )
    ]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    surgeon.tune(graph, labelled_vectors(), 0.9, inputs=vectors())
    assert max(surgeon.get_tau(graph).values()) > 0


@pytest.mark.parametrize("name", ["relu", "gated"])
@pytest.mark.parametrize(
    "options", [{}, {"weights": "int4", "group": 16}, {"weights": "fp8"}], ids=["int8", "int4", "fp8"]
)
def test_is_saved_loaded_and_grafted(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    model = stack(name)
    surgery = Pipeline([Moeify(experts=4, router_width=8), Quantize(**options)]).run(
        model, inputs=vectors(), data=labelled_vectors()
    )
    set_tau(surgery.graph, 0.4)
    want = surgery.graph.eval()(**vectors())
    directory = surgery.save(tmp_path / "made")
    loaded = surgeon.load(directory)
    assert torch.allclose(loaded(**vectors()), want, atol=1e-6)
    assert {site.form for site in find_moes(loaded)} == {"int8"}
    grafted = surgeon.graft(model, directory)
    layers = [module for module in grafted.modules() if isinstance(module, Int8MoE)]
    assert [layer.shape.group for layer in layers] == [options.get("group")] * 2
    assert [layer.shape.float8 for layer in layers] == [options.get("weights") == "fp8"] * 2
    assert len(find_moes(surgeon.trace(grafted, vectors()))) == 2
    assert torch.allclose(grafted(**vectors()), want, atol=1e-6)
    assert list(surgeon.get_tau(grafted).values()) == list(surgeon.get_tau(loaded).values())
    assert torch.allclose(surgeon.graft(model, surgery)(**vectors()), want, atol=1e-6)


def test_layers_that_share_a_trunk() -> None:
    graph = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    Mlpify(steps=1).apply(graph, inputs=tokens(), data=labelled(1))
    Moeify(experts=4, router_width=8, steps=2).apply(graph, inputs=tokens(), data=labelled(1))
    graph.eval()
    apart = fork(graph)
    Lower().apply(graph, inputs=tokens())
    for one in (graph, apart):
        with torch.no_grad():
            want = one(**tokens())
        Quantize().apply(one, inputs=tokens())
        assert len([site for site in find_moes(one) if site.form == "int8"]) == 5
        with torch.no_grad():
            assert float((one(**tokens()) - want).norm() / want.norm()) < 0.02


def test_refusals(traces: Any) -> None:
    graph = converted(traces)
    with torch.no_grad():
        graph.get_parameter(f"{PATHS[0]}.w2")[0, 0, 0] = float("nan")
    report = Quantize().apply(graph, inputs=vectors())
    assert [(rejection.path, rejection.code) for rejection in report.rejected] == [(PATHS[0], "not-finite")]
    again = Quantize().apply(graph, inputs=vectors())
    assert {rejection.code for rejection in again.rejected} == {"not-finite", "already-done"}
    with pytest.raises(UsageError, match=r"smooth is 1\.5"):
        Quantize(smooth=1.5)
    with pytest.raises(UsageError, match="group is 12, but must be a multiple of 8"):
        Quantize(weights="int4", group=12)
    with pytest.raises(UsageError, match="group is 0, but must be at least 8"):
        Quantize(weights="int4", group=0)
    for weights in ("int8", "fp8"):
        with pytest.raises(UsageError, match="only weights=int4 have groups"):
            Quantize(weights=weights, group=64)


def test_values_on_the_data_that_are_not_finite(traces: Any) -> None:
    graph, data = converted(traces), labelled_vectors()
    data[0][0]["x"][0, 0, 0] = float("nan")
    report = Quantize().apply(graph, inputs=vectors(), data=data)
    assert {(rejection.path, rejection.code) for rejection in report.rejected} == {
        (path, "not-finite") for path in PATHS
    }
    assert "on the data" in report.rejected[0].reason


def test_large_outputs_have_an_error(traces: Any) -> None:
    """Their squares are infinite in float32."""
    graph = converted(traces)
    with torch.no_grad():
        for path in PATHS:
            graph.get_parameter(f"{path}.w2").mul_(1e25)
    report = Quantize().apply(graph, inputs=vectors(), data=labelled_vectors())
    assert report.sites[0].after.startswith("4 experts × 8 in 8 bits, error 0.")
    assert "error 0.00%" not in report.sites[0].after


def test_sums_that_32_bits_may_not_hold(traces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.passes.quantize.WIDEST", 15)
    report = Quantize().apply(converted(traces), inputs=vectors())
    assert [(rejection.code, rejection.reason) for rejection in report.rejected] == [
        ("too-wide", "16 products would be added up, and 32 bits hold 15")
    ] * 2
    assert Quantize(weights="fp8").apply(converted(traces), inputs=vectors()).matched == PATHS  # sums are no integers


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_float8(traces: Any, name: str) -> None:
    graph = converted(traces, name)
    report = Quantize(weights="fp8").apply(graph, inputs=vectors(), data=labelled_vectors())
    for site in report.sites:
        assert re.match(r"4 experts × 8 in float8, error [2-5]\.\d\d%, \d+\.\d\d% of the selections", site.after)
    assert "Kernels for float8 are for GPUs" in report.notes[1]
    assert {site.shown_form for site in find_moes(graph)} == {"fp8"}
    whole = Quantize().apply(converted(traces, name), inputs=vectors(), data=labelled_vectors())
    assert whole.notes[0] == report.notes[0]  # as many bytes
    assert Quantize().apply(graph, inputs=vectors()).rejected[0].code == "already-done"
    for engine, refuse in (
        ("OpenVINO", lambda: openvino.convert(graph, Program(graph.eval(), vectors()))),
        ("A compiled model", lambda: compile_graph(graph, vectors(), Path("nowhere"))),
    ):
        with pytest.raises(UsageError, match=f"{engine} has no kernels for experts in float8"):
            refuse()


def test_float8_is_as_exact_where_one_input_is_far_larger(traces: Any) -> None:
    """In 8 bits it leaves the others few steps; float16 has enough."""
    errors = {}
    for weights in ("int8", "fp8"):
        graph = converted(traces)
        with torch.no_grad():
            for block in ("blocks.0", "blocks.1"):
                graph.get_parameter(f"{block}.norm.weight")[3] *= 1000
                graph.get_parameter(f"{block}.ffn.moe.w1")[..., 3] /= 1000
            want = graph(**vectors())
        Quantize(weights=weights).apply(graph, inputs=vectors())
        errors[weights] = moved(graph, want)
    assert errors["fp8"] < 0.03 < errors["int8"]


def test_what_trains_comes_first(traces: Any) -> None:
    with pytest.raises(UsageError, match="recover must run before quantize"):
        Pipeline([Moeify(experts=4), Quantize(), Recover()]).check(there=(), has_data=True)
    graph = converted(traces)
    Quantize().apply(graph, inputs=vectors())
    report = Recover(steps=1).apply(graph, inputs=vectors(), data=labelled_vectors())
    assert {rejection.code for rejection in report.rejected} == {"in-op-form"}


def test_lower_leaves_it_alone(traces: Any) -> None:
    graph = converted(traces)
    Quantize(only=(PATHS[0],)).apply(graph, inputs=vectors())
    report = Lower().apply(graph, inputs=vectors())
    assert report.matched == [PATHS[1]]
    assert {site.path: site.form for site in find_moes(graph)} == {PATHS[0]: "int8", PATHS[1]: "dynamic"}
