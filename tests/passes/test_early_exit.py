"""early-exit: what heads learn, what they answer, and what the knob does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import DataError, PassError, UsageError
from surgeon.exits.heads import FEATURES, LOGITS, nodes_at
from surgeon.exits.site import find_exits
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph, fork
from surgeon.measure.meter import token_load
from surgeon.measure.sweep import sweep, usual_taus
from surgeon.measure.tuning import Tuner
from surgeon.passes import EarlyExit, Lower, Moeify, Recover, Refit
from surgeon.passes.report import dense_layers
from surgeon.surgery.engines import export_onnx, export_openvino
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from tests.small_models import classifier, labelled, labelled_vectors, stack, tokens, vectors


@pytest.fixture(scope="module")
def graph() -> TracedGraph:
    """A classifier of three blocks. All tests share it: change nothing."""
    return surgeon.trace(classifier("gelu", 3), tokens())


def run(graph: Any, *passes: Any, data: Any = None) -> Surgery:
    return Pipeline(list(passes)).run(graph, inputs=tokens(), data=labelled() if data is None else data)


def test_heads_learn_what_the_model_answers(graph: TracedGraph) -> None:
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    surgery = run(graph, EarlyExit(epochs=30, lr=1e-2))
    (report,) = surgery.reports
    assert report.preserved
    assert report.max_error == 0.0
    assert report.fit is not None
    losses = [values["head loss"] for _, values in report.fit.losses]
    assert losses[-1] < 0.5 * losses[0]
    after = surgery.graph.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    set_tau(surgery.graph, 1.0)
    x = tokens(32, seed=5)
    answers, wanted = surgery.graph.eval()(**x), graph(**x)
    assert F.kl_div(answers.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean") < 0.02


def test_heads_learn_labels(graph: TracedGraph) -> None:
    data = labelled(batches=8)
    surgery = run(graph, EarlyExit(epochs=40, lr=1e-2, distill=0.0, width=32, only=("blocks.0",)), data=data)
    set_tau(surgery.graph, 1.0)
    right = [(surgery.graph.eval()(**x).argmax(-1) == y).float().mean() for x, y in data]
    dense = [(graph.eval()(**x).argmax(-1) == y).float().mean() for x, y in data]
    assert torch.stack(right).mean() > torch.stack(dense).mean() + 0.2


def test_labels_that_are_missing_are_asked_for(graph: TracedGraph) -> None:
    unlabelled = [x for x, _ in labelled()]
    assert run(graph, EarlyExit(steps=1), data=unlabelled).reports[0].fit is not None
    with pytest.raises(DataError, match=r"no class for each sample.*distill=1"):
        run(graph, EarlyExit(steps=1, distill=0.5), data=unlabelled)


def test_heads_pool_real_tokens_alone(graph: TracedGraph) -> None:
    made = run(graph, EarlyExit(steps=1)).graph.eval()
    names = [node.name for node in nodes_at(made, FEATURES)]
    x = tokens(4)
    _, values = Capture(made, names)(**x)
    x["input_ids"] = torch.where(x["attention_mask"] == 0, 7, x["input_ids"])  # padding
    _, again = Capture(made, names)(**x)
    for name in names:
        assert values[name].shape == (4, 16)
        assert torch.allclose(values[name], again[name], atol=1e-6)
        assert torch.allclose(values[name].mean(-1), torch.zeros(4), atol=1e-5)


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize("ensemble", [True, False])
def test_an_exit_answers_with_the_weighted_geometric_mean(graph: TracedGraph, cascade: bool, ensemble: bool) -> None:
    made = run(graph, EarlyExit(steps=3, cascade=cascade, ensemble=ensemble)).graph.eval()
    heads = [made.get_submodule(site.path) for site in find_exits(made)]
    names = [node.name for part in (FEATURES, LOGITS) for node in nodes_at(made, part)]
    answers = [site.logits.name for site in find_exits(made)]
    x = tokens(5)
    _, values = Capture(made, dict.fromkeys([*names, *answers]))(**x)
    f1, f2, l1, l2 = (values[name] for name in names)
    read = torch.cat([f2, l1], 1) if cascade else f2
    assert torch.allclose(l1, F.linear(f1, heads[0].out.weight, heads[0].out.bias), atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(l2, F.linear(read, heads[1].out.weight, heads[1].out.bias), atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert torch.equal(values[answers[0]], l1)
    if not ensemble:
        assert torch.equal(values[answers[1]], l2)
        return
    mix, bias = heads[1].get_parameter("mix").exp(), heads[1].get_parameter("mix_bias")
    p = l1.softmax(-1) ** mix[0] * l2.softmax(-1) ** mix[1] * bias.exp()
    assert torch.allclose(values[answers[1]].softmax(-1), p / p.sum(-1, keepdim=True), atol=1e-5)


def sure(graph: TracedGraph) -> TracedGraph:
    """Heads that are sure of some samples."""
    with torch.no_grad():
        for site in find_exits(graph):
            graph.get_parameter(f"{site.path}.out.weight").mul_(4.0)
    return graph


def test_tau_is_set_for_all_exits_or_one_and_swept(graph: TracedGraph) -> None:
    surgery = run(graph, EarlyExit(steps=2, tau=0.25))
    made = sure(surgery.graph)
    assert get_tau(made) == {"blocks.exits.0": 0.25, "blocks.exits.1": 0.25}
    set_tau(made, 1.0, "blocks.exits.1")
    batches = [Batch.from_any(one) for one in labelled(batches=3)]
    points = sweep(made, batches, "classification", (0.0, 0.2, 0.4, 0.6, 1.0), inputs=tokens())
    assert [point.executed for point in points] == sorted((point.executed for point in points), reverse=True)
    assert points[0].executed == 1.0
    assert points[-1].executed == 0.0
    assert points[-1].shares == {"blocks.exits.0": 0.0, "blocks.exits.1": 0.0}
    assert points[-1].multiply_adds < 0.4 * points[0].multiply_adds
    assert any(0.0 < point.executed < 1.0 for point in points)
    assert get_tau(made)["blocks.exits.1"] == 1.0
    assert 0.01 in usual_taus(made)
    assert dense_layers(run(graph, EarlyExit(steps=1), Lower()).reports) == {}


def test_a_budget_is_shared_by_exits_and_experts(graph: TracedGraph) -> None:
    made = sure(run(graph, Moeify(experts=4, steps=2), EarlyExit(steps=2)).graph)
    data = [x for x, _ in labelled(batches=2)]
    tuned = Tuner(made, data, inputs=tokens()).tune(0.7)
    assert tuned.cost <= 0.7
    assert set(tuned.taus) == {f"blocks.{n}.ffn.moe" for n in range(3)} | {"blocks.exits.0", "blocks.exits.1"}
    with pytest.raises(UsageError, match="no time of its own"):
        Tuner(made, data, inputs=tokens(), metric="ms")


def test_what_other_passes_and_measures_say(graph: TracedGraph) -> None:
    made = run(graph, EarlyExit(steps=1)).graph
    for pass_ in (Recover(), Refit()):
        matched, refused = pass_.explain(made)
        assert not matched
        assert {rejection.code for rejection in refused} == {"early-exit"}
    with pytest.raises(UsageError, match="no token has a load"):
        token_load(made, tokens())
    with pytest.raises(UsageError, match="must run before"):
        Pipeline([Lower(), EarlyExit()]).check(there={"moe"}, has_data=True)


def test_no_place_in_a_model_of_its_own_class_or_in_other_engines(tmp_path: Path) -> None:
    model = stack("gelu", 3)
    surgery = Pipeline([EarlyExit(steps=1)]).run(model, inputs=vectors(), data=labelled_vectors(1))
    with pytest.raises(UsageError, match="has early exits"):
        surgeon.graft(model, surgery)
    for write in (export_onnx, export_openvino):
        with pytest.raises(UsageError, match="only torch runs"):
            write(surgery.graph, vectors(), tmp_path / "out", record=surgery._record(), origin=surgery.origin)


def test_data_is_asked_for(graph: TracedGraph) -> None:
    with pytest.raises(UsageError, match="needs data"):
        Pipeline([EarlyExit()]).run(fork(graph), inputs=tokens())
    with pytest.raises(UsageError, match="tau needs heads that were trained"):
        EarlyExit(tau=0.1).apply(fork(graph), inputs=tokens())
    with pytest.raises(PassError, match="the loss is"):
        run(graph, EarlyExit(steps=3, lr=1e38, clip=None))


def test_models_in_half_precision() -> None:
    model = stack("gelu", 3).bfloat16()
    inputs: dict[str, Tensor] = {"x": vectors()["x"].bfloat16()}
    data = [{"x": vectors(8, seed=number)["x"].bfloat16()} for number in range(2)]
    surgery = Pipeline([EarlyExit(steps=2), Lower()]).run(model, inputs=inputs, data=data)
    set_tau(surgery.graph, 0.6)
    assert surgery.graph(**inputs).dtype == torch.bfloat16
