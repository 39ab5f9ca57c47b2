"""halt-tokens: what it trains, and what the other tools make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import UsageError
from surgeon.exits.halting import find_halts
from surgeon.graph.traced import TracedGraph, fork
from surgeon.measure.load import measure_load
from surgeon.measure.meter import token_load
from surgeon.measure.sweep import sweep, usual_taus
from surgeon.measure.tuning import Tuner
from surgeon.passes import EarlyExit, HaltTokens, Lower, Moeify, Recover, Refit
from surgeon.passes.report import dense_layers
from surgeon.surgery.engines import export_onnx, export_openvino
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from tests.small_models import classifier, labelled, labelled_vectors, stack, tokens, vectors

PATHS = ["blocks.halting.0", "blocks.halting.1"]


@pytest.fixture(scope="module")
def graph() -> TracedGraph:
    """A classifier of three blocks. All tests share it: change nothing."""
    return surgeon.trace(classifier("gelu", 3), tokens())


def run(graph: Any, *passes: Any) -> Surgery:
    return Pipeline(list(passes)).run(graph, inputs=tokens(), data=labelled())


@pytest.fixture(scope="module")
def halting(graph: TracedGraph) -> Surgery:
    """With tokens that halt at several blocks. All tests share it: restore tau."""
    return run(graph, HaltTokens(steps=2, gamma=2.0, beta=-1.0))


def test_without_training_the_output_is_the_same(graph: TracedGraph) -> None:
    made = fork(graph)
    report = HaltTokens().apply(made, inputs=tokens())
    assert report.preserved
    assert report.max_error == 0.0
    assert any("tau is 0" in note for note in report.notes)
    assert get_tau(made) == dict.fromkeys(PATHS, 0.0)
    matched, refused = HaltTokens().explain(made)
    assert not matched
    assert {one.code for one in refused} == {"already-done"}


def test_training_makes_tokens_halt_earlier_and_keeps_the_task(graph: TracedGraph) -> None:
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    surgery = run(graph, HaltTokens(epochs=20, lr=1e-2, gamma=2.0, beta=-2.0, depth=1.0, ponder=0.05, distill=0.5))
    report = surgery.reports[0]
    assert not report.preserved
    assert report.fit is not None
    first, last = report.fit.losses[0][1], report.fit.losses[-1][1]
    assert last["blocks"] < first["blocks"] - 0.5
    assert last["task loss"] < first["task loss"]
    assert get_tau(surgery.graph) == dict.fromkeys(PATHS, 0.5)
    assert all(torch.equal(graph.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(site.executed is not None and site.executed < 1 for site in report.sites)
    assert dense_layers(surgery.reports) == {}


def test_training_brings_the_scores_to_the_gaussian(graph: TracedGraph) -> None:
    surgery = run(graph, HaltTokens(epochs=20, lr=1e-2, gamma=2.0, beta=-2.0, depth=1.0, ponder=0.0, prior=1.0))
    fit = surgery.reports[0].fit
    assert fit is not None
    losses = [values["divergence from the prior"] for _, values in fit.losses]
    assert losses[-1] < 0.3 * losses[0]


def test_tau_is_swept(halting: Surgery) -> None:
    batches = [Batch.from_any(one) for one in labelled(batches=2)]
    points = sweep(halting.graph, batches, "classification", (0.0, 0.4, 0.5, 0.7, 1.0), inputs=tokens())
    executed = [point.executed for point in points]
    assert executed == sorted(executed, reverse=True)
    assert (executed[0], executed[-1]) == (1.0, 0.0)
    assert 0.1 < executed[2] < 0.9
    assert points[0].multiply_adds > points[2].multiply_adds > points[-1].multiply_adds
    assert points[-1].layers == 0.0
    assert 0.5 in usual_taus(halting.graph)
    assert get_tau(halting.graph) == dict.fromkeys(PATHS, 0.5)


def test_a_budget_is_shared_by_places_and_experts(graph: TracedGraph) -> None:
    made = run(graph, HaltTokens(steps=2, gamma=2.0, beta=-1.0), Moeify(experts=4, steps=2)).graph
    data = [x for x, _ in labelled(batches=1)]
    tuned = Tuner(made, data, inputs=tokens()).tune(0.7)
    assert tuned.cost <= 0.7
    assert set(tuned.taus) == {f"blocks.{number}.ffn.moe" for number in range(3)} | set(PATHS)
    with pytest.raises(UsageError, match="no time of its own"):
        Tuner(made, data, inputs=tokens(), metric="ms")


def test_the_load_of_a_token_is_how_deep_it_goes(halting: Surgery) -> None:
    x = tokens(4, 9, padded=False)
    set_tau(halting.graph, 0.6)
    load = token_load(halting.graph, x)
    assert load.shape == (4, 9)
    assert set(load.flatten().tolist()) == {0.0, 0.5, 1.0}
    first, second = measure_load(halting.graph, [x])
    assert (first.path, first.unit, first.experts, first.tokens) == (PATHS[0], "blocks", 1, 36)
    assert first.executed.mean == pytest.approx(float((load > 0).float().mean()))
    assert second.executed.mean == pytest.approx(float((load == 1).float().mean()))
    set_tau(halting.graph, 0.5)


def test_some_blocks_alone(graph: TracedGraph) -> None:
    surgery = run(graph, HaltTokens(steps=1, only=("blocks.1",)))
    (site,) = find_halts(surgery.graph)
    assert site.path == "blocks.halting.0"
    assert len(surgery.reports[0].matched) == 1


def test_what_other_passes_say(graph: TracedGraph, halting: Surgery) -> None:
    for pass_ in (Recover(), Refit()):
        matched, refused = pass_.explain(halting.graph)
        assert not matched
        assert {rejection.code for rejection in refused} == {"early-exit"}
        assert all("tokens halt" in rejection.reason for rejection in refused)
    matched, refused = EarlyExit().explain(halting.graph)
    assert not matched
    assert "early-exit" in {rejection.code for rejection in refused}
    leaving = fork(graph)
    EarlyExit().apply(leaving, inputs=tokens())
    assert not HaltTokens().explain(leaving)[0]
    with pytest.raises(UsageError, match="must run before"):
        Pipeline([Moeify(), HaltTokens()]).check(there=set(), has_data=True)
    with pytest.raises(UsageError, match="needs data"):
        Pipeline([HaltTokens()]).run(fork(graph), inputs=tokens())


def test_no_place_in_a_model_of_its_own_class_or_in_other_engines(tmp_path: Path) -> None:
    model = stack("gelu", 3)
    surgery = Pipeline([HaltTokens(steps=1)]).run(model, inputs=vectors(), data=labelled_vectors(1))
    with pytest.raises(UsageError, match="has token halting"):
        surgeon.graft(model, surgery)
    for write in (export_onnx, export_openvino):
        with pytest.raises(UsageError, match="only torch runs"):
            write(surgery.graph, vectors(), tmp_path / "out", record=surgery._record(), origin=surgery.origin)


def test_models_in_half_precision() -> None:
    model = stack("gelu", 3).bfloat16()
    inputs = {"x": vectors()["x"].bfloat16()}
    data = [({"x": vectors(8, seed=number)["x"].bfloat16()}, torch.arange(8) % 3) for number in range(2)]
    surgery = Pipeline([HaltTokens(steps=2, beta=-1.0), Lower()]).run(model, inputs=inputs, data=data)
    assert surgery.graph(**inputs).dtype == torch.bfloat16
    assert find_halts(surgery.graph)[0].form == "dynamic"
