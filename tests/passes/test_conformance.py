"""What every pass promises, checked for each one of the table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.agreement import relative_error, run, tolerance_for
from surgeon.data import Data
from surgeon.errors import PassError, SurgeonError, VerificationError
from surgeon.fit import Settings
from surgeon.graph import TracedGraph, fork
from surgeon.passes import PASSES, Lower, Moeify, Pass
from surgeon.pipeline import Pipeline
from surgeon.recipe import build
from surgeon.report import PassReport
from surgeon.tracing import quiet
from tests.models import labelled_vectors, stack, vectors


@dataclass(frozen=True)
class Subject:
    """A pass with small options, the graph it runs on, and what it is fitted with."""

    make: Callable[[], Pass[Any]]
    kind: str = "gelu"
    first: tuple[Pass[Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "swap-activation": Subject(lambda: PASSES["swap-activation"](), options={"to": "silu", "only": ["blocks.*"]}),
    "sparsify": Subject(lambda: PASSES["sparsify"](steps=2, lr=1e-3), options={"alpha": 0.5, "steps": 7}),
    "mlpify": Subject(lambda: PASSES["mlpify"](steps=2), options={"cost_factor": 0.5, "skip": ["blocks.0.*"]}),
    "moeify": Subject(
        lambda: PASSES["moeify"](experts=4, router_width=8, steps=2), "gated", options={"experts": 8, "clip": None}
    ),
    "lower": Subject(
        lambda: PASSES["lower"](), "gated", (Moeify(experts=4, router_width=8),), {"only": ["blocks.1.*"]}
    ),
}
names = pytest.mark.parametrize("name", SUBJECTS)
fits = pytest.mark.parametrize("name", [name for name, cls in PASSES.items() if cls.trains])


def test_every_pass_of_the_table_is_here() -> None:
    assert set(SUBJECTS) == set(PASSES)
    assert all(name == cls.name for name, cls in PASSES.items())


@pytest.fixture
def subject(traces: Any) -> Callable[[str], tuple[Pass[Any], TracedGraph]]:
    """`subject(name)`: the pass and a graph of its own to run on, in evaluation mode."""

    def make(name: str) -> tuple[Pass[Any], TracedGraph]:
        graph = traces(f"stack:{SUBJECTS[name].kind}")
        for one in SUBJECTS[name].first:
            one.apply(graph)
        return SUBJECTS[name].make(), graph.eval()

    return make


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a user could notice about a model's weights and modes."""
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grads": {name: tensor.grad is None for name, tensor in tensors.items() if tensor.is_leaf},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("objects", "requires_grad", "grads", "training"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def node_texts(graph: TracedGraph) -> list[str]:
    return [node.format_node() or "" for node in graph.graph.nodes]


# --- what it does to the graph ----------------------------------------------------------------------------------------


@names
def test_keeps_what_it_claims_to_keep(subject: Any, name: str) -> None:
    one, graph = subject(name)
    inputs = vectors()
    want = run(graph, (), inputs)
    report = one.apply(graph, inputs=inputs)
    assert report.matched
    got = run(graph, (), inputs)
    assert report.max_error == pytest.approx(relative_error(got, want), rel=1e-3, abs=1e-9)
    assert report.preserved == one.preserves
    if report.preserved:
        assert report.max_error <= tolerance_for(want)
    else:
        assert report.max_error > tolerance_for(want)
    assert torch.isfinite(got).all()


@names
def test_accounts_for_every_parameter(subject: Any, name: str) -> None:
    one, graph = subject(name)
    before = dict(graph.state_dict())
    report = one.apply(graph, inputs=vectors())
    after = dict(graph.state_dict())
    made = tuple(site.made + "." for site in report.sites if site.made)
    for key in after.keys() - before.keys():
        assert key.startswith(made), key
    for key in before.keys() - after.keys():
        assert any(key.startswith(path + ".") for path in report.matched), key
    for key in before.keys() & after.keys():
        assert torch.equal(before[key], after[key]), key


@names
def test_second_application_matches_nothing(subject: Any, name: str) -> None:
    one, graph = subject(name)
    one.apply(graph)
    texts, keys = node_texts(graph), set(graph.state_dict())
    if name == "mlpify":  # its own linears are those of a feed-forward layer now
        again = one.apply(graph)
        assert not [path for path in again.matched if path.endswith((".fc1", ".fc2"))]
        return
    again = one.apply(graph)
    assert again.matched == []
    assert node_texts(graph) == texts
    assert set(graph.state_dict()) == keys


@names
def test_leaves_the_model_and_the_shared_graph_alone(subject: Any, name: str) -> None:
    model = stack(SUBJECTS[name].kind)
    model.train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    graph = surgeon.trace(model, vectors())
    for one in SUBJECTS[name].first:
        one.apply(graph)
    before, shared = state_of(model), state_of(graph)
    texts = node_texts(graph)
    one = SUBJECTS[name].make()
    surgery = Pipeline([one]).run(graph, inputs=vectors(), data=labelled_vectors(2))
    assert surgery.reports[0].matched
    assert_same_state(before, state_of(model))
    assert_same_state(shared, state_of(graph))
    assert node_texts(graph) == texts
    assert surgery.graph is not graph
    assert surgery.graph.training


@names
def test_modes_switch_and_gradients_flow(subject: Any, name: str) -> None:
    one, graph = subject(name)
    one.apply(graph, inputs=vectors())
    inputs = vectors()
    assert not graph.training
    assert torch.equal(graph(**inputs), graph(**inputs))
    graph.train()
    assert all(module.training for module in graph.modules())
    assert not torch.equal(graph(**inputs), graph(**inputs))
    graph.eval()(**inputs).square().sum().backward()
    silent = {key for key, p in graph.named_parameters() if p.requires_grad and p.grad is None}
    assert all(".router." in key for key in silent), silent
    assert any(p.grad is not None and p.grad.any() for p in graph.parameters())


@names
def test_other_sizes_run(subject: Any, name: str) -> None:
    one, graph = subject(name)
    one.apply(graph, inputs=vectors())
    for batch, length in ((1, 1), (1, 9), (6, 2)):
        assert graph(**vectors(batch, length)).shape == (batch, 3)


@names
def test_works_in_training_mode_too(subject: Any, name: str) -> None:
    one, graph = subject(name)
    graph.train()
    report = one.apply(graph, inputs=vectors())
    assert graph.training
    assert all(
        module.training
        for module in graph.modules()
        if isinstance(module, torch.nn.Dropout) or list(module.parameters(False))
    )
    if report.preserved:
        assert report.max_error is not None
        assert report.max_error < 1e-5


@names
def test_runs_on_a_bare_exported_graph(name: str) -> None:
    batch = torch.export.Dim("batch", min=2)
    inputs = vectors()
    model = stack(SUBJECTS[name].kind)
    with quiet():
        graph = torch.export.export(
            model, (), inputs, strict=False, dynamic_shapes={key: {0: batch} for key in inputs}
        ).module()
    assert isinstance(graph, torch.fx.GraphModule)
    want = model(**inputs)
    for one in SUBJECTS[name].first:
        one.apply(graph)
    one = SUBJECTS[name].make()
    report = one.apply(graph, inputs=inputs)
    assert report.matched
    got = graph(**inputs)
    if report.preserved:
        assert torch.allclose(got, want, atol=1e-5)
    assert graph(**vectors(5)).shape == (5, 3)


# --- what it says -----------------------------------------------------------------------------------------------------


@names
def test_report_is_filled(subject: Any, name: str) -> None:
    one, graph = subject(name)
    report = one.apply(graph, inputs=vectors())
    assert report.name == name
    assert len(report.sites) == len(report.matched)
    assert [site.path for site in report.sites] == report.matched
    assert report.before is not None
    assert report.after is not None
    assert report.before.parameters > 0
    assert report.after.multiply_adds > 0
    assert report.seconds >= 0
    assert report.fit is None
    made = {node.name for node in graph.graph.nodes}
    for site in report.sites:
        assert site.before
        assert site.after
        assert min(*site.parameters, *site.multiply_adds) > 0
        assert site.output[1] in made
        if site.made:
            graph.get_submodule(site.made)
    assert all(path and reason for path, reason in report.rejected)
    assert PassReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@names
def test_without_inputs_it_says_that_nothing_was_verified(subject: Any, name: str) -> None:
    one, graph = subject(name)
    report = one.apply(graph)
    assert report.max_error is None
    assert report.before is None
    assert any("no example inputs" in note for note in report.notes)


@names
def test_verification_can_be_switched_off_and_made_full(subject: Any, name: str) -> None:
    one, graph = subject(name)
    off = one.apply(fork(graph), inputs=vectors(), settings=Settings(verify="off"))
    assert off.max_error is None
    assert any("switched off" in note for note in off.notes)
    full = one.apply(fork(graph), inputs=vectors(), settings=Settings(verify="full"))
    fast = one.apply(fork(graph), inputs=vectors())
    assert full.max_error is not None
    assert fast.max_error is not None
    assert full.max_error >= fast.max_error


@fits
def test_fitting_reports_and_dry_runs_do_not_fit(subject: Any, name: str) -> None:
    one, graph = subject(name)
    seen = []
    report = one.apply(fork(graph), inputs=vectors(), data=labelled_vectors(2), settings=Settings(progress=seen.append))
    assert report.fit is not None
    assert report.fit.steps == len(seen) == 2
    assert all(name in moment.what for moment in seen)
    assert PassReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    dry = one.apply(fork(graph), inputs=vectors(), data=labelled_vectors(2), settings=Settings(dry_run=True))
    assert dry.fit is None
    assert dry.matched == report.matched


@names
def test_options_survive_the_recipe(name: str) -> None:
    (one,) = build([name], {name: SUBJECTS[name].options})
    options = one.options()
    assert options == SUBJECTS[name].options
    (again,) = build([name], {name: json.loads(json.dumps(options))})
    assert again == one
    (typed,) = build([name], {name: {key: as_typed(value) for key, value in options.items()}})
    assert typed == one
    (default,) = build([name])
    assert default.options() == {}


def as_typed(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


@names
def test_options_have_help_and_the_pass_has_words(name: str) -> None:
    cls = PASSES[name]
    for option in dataclasses.fields(cls):
        assert option.metadata["help"].endswith("."), option.name
    assert cls.__doc__
    assert not cls.trains or cls.untrained or cls.needs_data


@names
def test_explain_is_what_apply_does(subject: Any, name: str) -> None:
    one, graph = subject(name)
    texts = node_texts(graph)
    matched, rejected = one.explain(graph)
    assert node_texts(graph) == texts
    report = one.apply(graph)
    assert [site.path for site in matched] == report.matched
    assert [(rejection.path, rejection.reason) for rejection in rejected] == report.rejected


# --- failing ----------------------------------------------------------------------------------------------------------


def fails_at_second(original: Any) -> Any:
    count = []

    def rewrite(self: Any, graph: TracedGraph, site: Any) -> Any:
        count.append(site.path)
        change = original(self, graph, site)
        if len(count) == 2:
            raise RuntimeError("broken on purpose")
        return change

    return rewrite


def check_untouched(one: Pass[Any], graph: TracedGraph, expected: type[Exception], **settings: Any) -> str:
    before, texts, output = state_of(graph), node_texts(graph), run(graph, (), vectors())
    notes = dict(graph.meta)
    with pytest.raises(expected) as error:
        one.apply(graph, inputs=vectors(), **settings)
    assert_same_state(before, state_of(graph))
    assert node_texts(graph) == texts
    assert graph.meta == notes
    assert torch.equal(run(graph, (), vectors()), output)
    return str(error.value)


@names
@pytest.mark.parametrize("mode", [True, False])
def test_failing_rewrite_leaves_the_graph_and_names_the_site(
    subject: Any, name: str, mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, graph = subject(name)
    site = one.explain(graph)[0][1].path
    monkeypatch.setattr(type(one), "rewrite", fails_at_second(type(one).rewrite))
    graph.train(mode)
    message = check_untouched(one, graph, PassError)
    assert name in message
    assert site in message
    assert "broken on purpose" in message


@fits
@pytest.mark.parametrize(
    "error", [RuntimeError("broken on purpose"), PassError("broken on purpose"), KeyboardInterrupt()]
)
def test_failing_fit_leaves_the_graph(
    subject: Any, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, graph = subject(name)

    def progress(moment: Any) -> None:
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SurgeonError
    message = check_untouched(one, graph, expected, data=labelled_vectors(2), settings=Settings(progress=progress))
    if isinstance(error, RuntimeError):
        assert name in message
        assert "broken on purpose" in message


@pytest.mark.parametrize("name", [name for name, cls in PASSES.items() if cls.preserves])
@pytest.mark.parametrize("mode", [True, False])
def test_failing_verification_leaves_the_graph_and_names_the_site(
    subject: Any, name: str, mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, graph = subject(name)
    graph.train(mode)
    site = one.explain(graph)[0][1].path
    original = type(one).rewrite

    def rewrite(self: Any, work: TracedGraph, place: Any) -> Any:
        change = original(self, work, place)
        if place.path == site:
            node = next(node for node in work.graph.nodes if node.name == change.output[1])
            with work.graph.inserting_after(node):
                doubled = work.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))
            doubled.meta = dict(node.meta)
            node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
            change = dataclasses.replace(change, output=(change.output[0], doubled.name))
        return change

    monkeypatch.setattr(type(one), "rewrite", rewrite)
    message = check_untouched(one, graph, VerificationError)
    assert name in message
    assert f"the first site that differs is {site}, by 1.0e+00" in message


@pytest.mark.parametrize("name", ["swap-activation", "mlpify"])
def test_values_that_are_not_finite_fail_verification(subject: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, graph = subject(name)
    original = type(one).rewrite

    def rewrite(self: Any, work: TracedGraph, place: Any) -> Any:
        change = original(self, work, place)
        node = next(node for node in work.graph.nodes if node.name == change.output[1])
        with work.graph.inserting_after(node):
            infinite = work.graph.call_function(torch.ops.aten.div.Tensor, (node, 0.0))
        infinite.meta = dict(node.meta)
        node.replace_all_uses_with(infinite, delete_user_cb=lambda user: user is not infinite)
        return change

    monkeypatch.setattr(type(one), "rewrite", rewrite)
    assert name in check_untouched(one, graph, VerificationError)


@names
def test_refuses_what_is_no_aten_graph(name: str) -> None:
    symbolic = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(SurgeonError, match=f"{name} works on a graph of ATen ops.*surgeon.trace"):
        SUBJECTS[name].make().apply(symbolic)


# --- in another process -----------------------------------------------------------------------------------------------

READER = """
import json, sys, torch, surgeon
result = {}
for directory in sys.argv[2:]:
    graph = surgeon.load(directory)
    inputs = torch.load(sys.argv[1])
    result[directory] = [graph(**one).tolist() for one in inputs]
print(json.dumps(result))
"""


def test_saved_and_loaded_in_another_process_it_is_the_same(subject: Any, tmp_path: Path) -> None:
    batches = [vectors(), vectors(1, 4), vectors(5, 9)]
    torch.save(batches, tmp_path / "inputs.pt")
    want: dict[str, list[Tensor]] = {}
    for name in SUBJECTS:
        one, graph = subject(name)
        surgery = Pipeline([one]).run(graph, inputs=vectors(), data=labelled_vectors(1))
        directory = str(surgery.save(tmp_path / name))
        want[directory] = [surgery.graph.eval()(**batch) for batch in batches]
    command = [sys.executable, "-W", "error::UserWarning:surgeon", "-c", READER, str(tmp_path / "inputs.pt"), *want]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout.splitlines()[-1])
    for directory, outputs in want.items():
        for a, b in zip(got[directory], outputs, strict=True):
            assert torch.allclose(torch.tensor(a), b, atol=1e-5), directory


def test_all_passes_in_their_usual_order(traces: Any) -> None:
    passes = [SUBJECTS[name].make() for name in PASSES]
    data = Data.of(labelled_vectors(2))
    surgery = Pipeline(passes).run(traces("stack:gelu"), inputs=vectors(), data=data)
    assert [report.name for report in surgery.reports] == list(PASSES)
    assert all(report.matched for report in surgery.reports)
    assert len(surgery.reports[-1].matched) == 2 + 2
    assert isinstance(passes[-1], Lower)
