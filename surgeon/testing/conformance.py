"""What every pass has to meet, as a class of tests: subclass it, say how to make the pass, and run pytest.

>>> from surgeon.testing import PassConformance
>>> class TestClipHidden(PassConformance):
...     make = staticmethod(lambda: ClipHidden(limit=0.1))
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from surgeon.errors import PassError, SurgeonError, VerificationError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.passes import Pass
from surgeon.passes.report import PassReport
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import with_options
from surgeon.testing.models import CLASSES, labelled_vectors, stack, vectors
from surgeon.tracing.trace import quiet, trace
from surgeon.training.loop import RunSettings


class PassConformance:
    """Tests of one pass.

    make: gives the pass, with options that suit layers of 16 → 32 → 16; one that trains should do so for two `steps`.
    kind: what the feed-forward layers of the small model are (see `surgeon.testing.models.feed_forward`). It has a
        linear layer beside each of them.
    first: passes that run before it. options: values other than the default, to be taken through a recipe.
    applies_once: whether it finds nothing to do in what it made.
    """

    make: ClassVar[Callable[[], Pass[Any]]]
    kind: ClassVar[str] = "gelu"
    first: ClassVar[tuple[Pass[Any], ...]] = ()
    options: ClassVar[dict[str, Any]] = {"only": ["blocks.*"]}
    applies_once: ClassVar[bool] = True

    @pytest.fixture
    def one(self) -> Pass[Any]:
        """The pass."""
        return type(self).make()

    @pytest.fixture
    def graph(self) -> TracedGraph:
        """A graph of its own for it to run on, in evaluation mode."""
        graph = fork(_traced(self.kind))
        own_parameters(graph)
        for earlier in self.first:
            earlier.apply(graph)
        return graph.eval()

    # --- the graph

    def test_keeps_what_it_claims_to_keep(self, one: Pass[Any], graph: TracedGraph) -> None:
        """The output stays where the pass says so, changes where it does not, and the report has the difference."""
        inputs = vectors()
        want = call_reproducibly(graph, (), inputs)
        report = one.apply(graph, inputs=inputs)
        assert report.matched, "the pass changes nothing in the small model"
        got = call_reproducibly(graph, (), inputs)
        assert report.max_error == pytest.approx(relative_error(got, want), rel=1e-3, abs=1e-9)
        assert report.preserved == one.keeps_output(fitted=False)
        assert report.max_error is not None
        if report.preserved:
            assert report.max_error <= tolerance_for(want)
        else:
            assert report.max_error > tolerance_for(want)
        assert torch.isfinite(got).all()

    def test_accounts_for_every_parameter(self, one: Pass[Any], graph: TracedGraph) -> None:
        """New parameters lie in modules that the report names, and none but those of matched sites are gone."""
        before = dict(graph.state_dict())
        report = one.apply(graph, inputs=vectors())
        after = dict(graph.state_dict())
        made = tuple(f"{path}." for site in report.sites for path in site.made)
        for key in after.keys() - before.keys():
            assert key.startswith(made), key
        for key in before.keys() - after.keys():
            assert any(key.startswith(f"{path}.") for path in report.matched), key
        for key in before.keys() & after.keys():
            assert torch.equal(before[key], after[key]), key

    def test_second_application_matches_nothing(self, one: Pass[Any], graph: TracedGraph) -> None:
        """Where it applies once, a second time changes nothing."""
        one.apply(graph)
        if not self.applies_once:
            return
        texts, keys = node_texts(graph), set(graph.state_dict())
        assert one.apply(graph).matched == []
        assert node_texts(graph) == texts
        assert set(graph.state_dict()) == keys

    def test_leaves_the_model_and_the_shared_graph_alone(self, one: Pass[Any]) -> None:
        """The model that was traced and the graph that was given stay as they were, modes and gradients included."""
        model = stack(self.kind)
        model.train()
        model.blocks[0].eval()
        model.head.weight.requires_grad_(False)
        graph = trace(model, vectors())
        for earlier in self.first:
            earlier.apply(graph)
        before, shared, texts = state_of(model), state_of(graph), node_texts(graph)
        surgery = Pipeline([one]).run(graph, inputs=vectors(), data=labelled_vectors(2))
        assert surgery.reports[0].matched
        assert_same_state(before, state_of(model))
        assert_same_state(shared, state_of(graph))
        assert node_texts(graph) == texts
        assert surgery.graph is not graph
        assert surgery.graph.training

    def test_modes_switch_and_gradients_flow(self, one: Pass[Any], graph: TracedGraph) -> None:
        """Evaluation repeats itself, training drops out, and every parameter but a router's gets a gradient."""
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

    def test_other_sizes_run(self, one: Pass[Any], graph: TracedGraph) -> None:
        """Batch and length stay free."""
        one.apply(graph, inputs=vectors())
        for batch, length in ((1, 1), (1, 9), (6, 2)):
            assert graph(**vectors(batch, length)).shape == (batch, CLASSES)

    def test_works_in_training_mode_too(self, one: Pass[Any], graph: TracedGraph) -> None:
        """A graph in training mode is rewritten alike and stays in it."""
        graph.train()
        report = one.apply(graph, inputs=vectors())
        assert graph.training
        assert all(
            module.training
            for module in graph.modules()
            if isinstance(module, nn.Dropout) or list(module.parameters(False))
        )
        if report.preserved:
            assert report.max_error is not None
            assert report.max_error < 1e-5

    def test_runs_on_a_bare_exported_graph(self, one: Pass[Any]) -> None:
        """A graph of `torch.export` will do."""
        batch = torch.export.Dim("batch", min=2)
        inputs = vectors()
        model = stack(self.kind)
        with quiet():
            graph = torch.export.export(
                model, (), inputs, strict=False, dynamic_shapes={key: {0: batch} for key in inputs}
            ).module()
        assert isinstance(graph, torch.fx.GraphModule)
        want = model(**inputs)
        for earlier in self.first:
            earlier.apply(graph)
        report = one.apply(graph, inputs=inputs)
        assert report.matched
        if report.preserved:
            assert torch.allclose(graph(**inputs), want, atol=1e-5)
        assert graph(**vectors(5)).shape == (5, CLASSES)

    # --- the report

    def test_report_is_filled(self, one: Pass[Any], graph: TracedGraph) -> None:
        """It names what was changed and what it cost, and goes through JSON and back."""
        report = one.apply(graph, inputs=vectors())
        assert report.name == one.name
        assert [site.path for site in report.sites] == report.matched
        assert report.before is not None
        assert report.after is not None
        assert report.before.parameters > 0
        assert report.after.multiply_adds > 0
        assert report.seconds >= 0
        assert report.fit is None
        nodes = {node.name for node in graph.graph.nodes}
        for site in report.sites:
            assert site.before
            assert site.after
            assert min(*site.parameters, *site.multiply_adds) > 0
            assert site.output[1] in nodes
            for path in site.made:
                graph.get_submodule(path)
        assert all(rejection.path and rejection.code and rejection.reason for rejection in report.rejected)
        assert PassReport.from_json(json.loads(json.dumps(report.to_json()))) == report

    def test_without_inputs_it_says_that_nothing_was_verified(self, one: Pass[Any], graph: TracedGraph) -> None:
        """No example inputs, no claim."""
        report = one.apply(graph)
        assert report.max_error is None
        assert report.before is None
        assert any("no example inputs" in note for note in report.notes)

    def test_verification_can_be_switched_off_and_made_full(self, one: Pass[Any], graph: TracedGraph) -> None:
        """Full verification sees at least what the fast one sees."""
        off = one.apply(fork(graph), inputs=vectors(), settings=RunSettings(verify="off"))
        assert off.max_error is None
        assert any("switched off" in note for note in off.notes)
        full = one.apply(fork(graph), inputs=vectors(), settings=RunSettings(verify="full"))
        fast = one.apply(fork(graph), inputs=vectors())
        assert full.max_error is not None
        assert fast.max_error is not None
        assert full.max_error >= fast.max_error

    def test_fitting_reports_and_dry_runs_do_not_fit(self, one: Pass[Any], graph: TracedGraph) -> None:
        """A pass that trains says so step by step; a dry run trains nothing."""
        data = labelled_vectors(2)
        moments: list[Any] = []
        report = one.apply(fork(graph), inputs=vectors(), data=data, settings=RunSettings(progress=moments.append))
        assert (report.fit is not None) == one.will_fit
        if report.fit is not None:
            steps = [moment for moment in moments if moment.what != "calibration"]
            assert report.fit.steps == len(steps)
            assert all(one.name in moment.what for moment in steps)
        assert PassReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
        dry = one.apply(fork(graph), inputs=vectors(), data=data, settings=RunSettings(dry_run=True))
        assert dry.fit is None
        assert dry.matched == report.matched

    def test_explain_is_what_apply_does(self, one: Pass[Any], graph: TracedGraph) -> None:
        """Explaining changes nothing and tells what applying then does."""
        texts = node_texts(graph)
        matched, rejected = one.explain(graph)
        assert node_texts(graph) == texts
        report = one.apply(graph)
        assert [site.path for site in matched] == report.matched
        assert tuple(rejected) == report.rejected

    def test_options_survive_the_recipe(self, one: Pass[Any]) -> None:
        """Options come back from a recipe's JSON and from the words of a command line."""
        kind = type(one)
        chosen = with_options(kind, self.options)
        assert chosen.options() == self.options
        assert with_options(kind, json.loads(json.dumps(chosen.options()))) == chosen
        assert with_options(kind, {key: _as_typed(value) for key, value in self.options.items()}) == chosen
        assert with_options(kind, {}).options() == {}

    def test_options_have_help_and_the_pass_has_words(self, one: Pass[Any]) -> None:
        """Every option has a sentence, the pass a docstring, and one that trains says what it is without data."""
        for option in dataclasses.fields(one):
            assert option.metadata["help"].endswith("."), option.name
        assert type(one).__doc__
        assert not one.trains or one.untrained or one.needs_data

    # --- failures

    @pytest.mark.parametrize("mode", [True, False])
    def test_failing_rewrite_leaves_the_graph_and_names_the_site(
        self, one: Pass[Any], graph: TracedGraph, mode: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error at the second site undoes the first."""
        site = one.explain(graph)[0][1].path
        original, count = type(one).rewrite, []

        def rewrite(self: Any, work: TracedGraph, place: Any, seen: Any) -> Any:
            count.append(place.path)
            change = original(self, work, place, seen)
            if len(count) == 2:
                raise RuntimeError("broken on purpose")
            return change

        monkeypatch.setattr(type(one), "rewrite", rewrite)
        graph.train(mode)
        message = check_untouched(one, graph, PassError)
        assert one.name in message
        assert site in message
        assert "broken on purpose" in message

    @pytest.mark.parametrize(
        "error", [RuntimeError("broken on purpose"), PassError("broken on purpose"), KeyboardInterrupt()]
    )
    def test_failing_fit_leaves_the_graph(self, one: Pass[Any], graph: TracedGraph, error: BaseException) -> None:
        """An error or an interruption in training leaves nothing behind."""
        if not one.will_fit:
            return

        def progress(moment: Any) -> None:
            if one.name in moment.what:
                raise error

        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SurgeonError
        settings = RunSettings(progress=progress)
        message = check_untouched(one, graph, expected, data=labelled_vectors(2), settings=settings)
        if isinstance(error, RuntimeError):
            assert one.name in message
            assert "broken on purpose" in message

    @pytest.mark.parametrize("mode", [True, False])
    def test_failing_verification_leaves_the_graph_and_names_the_site(
        self, one: Pass[Any], graph: TracedGraph, mode: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What changes the output although it must not is undone, and the site is named."""
        if not one.keeps_output(fitted=False):
            return
        graph.train(mode)
        site = one.explain(graph)[0][1].path
        spoil_output(monkeypatch, type(one), torch.ops.aten.mul.Tensor, 2.0, site)
        message = check_untouched(one, graph, VerificationError)
        assert one.name in message
        assert f"the first site that differs is {site}, by 1.0e+00" in message

    def test_values_that_are_not_finite_fail_verification(
        self, one: Pass[Any], graph: TracedGraph, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pass that may change the output may not break it."""
        spoil_output(monkeypatch, type(one), torch.ops.aten.div.Tensor, 0.0)
        assert one.name in check_untouched(one, graph, VerificationError)

    def test_refuses_what_is_not_a_graph_of_aten_ops(self, one: Pass[Any]) -> None:
        """A graph of modules is refused with what to do."""
        symbolic = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
        with pytest.raises(SurgeonError, match=f"{one.name} works on a graph of ATen ops.*surgeon.trace"):
            one.apply(symbolic)


@functools.cache
def _traced(kind: str) -> TracedGraph:
    return trace(stack(kind), vectors())


def _as_typed(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{pattern}:{item}" for pattern, item in value.items())
    return ",".join(value) if isinstance(value, list) else str(value)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a user could notice about a model's weights and modes."""
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grads": {name: tensor.grad is None for name, tensor in tensors.items() if tensor.is_leaf},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two results of `state_of` agree, down to the identity of the tensors."""
    for key in ("objects", "requires_grad", "grads", "training"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def node_texts(graph: TracedGraph) -> list[str]:
    """The nodes of a graph, as text."""
    return [node.format_node() or "" for node in graph.graph.nodes]


def check_untouched(one: Pass[Any], graph: TracedGraph, expected: type[BaseException], **settings: Any) -> str:
    """The pass fails as expected and leaves the graph as it was; returns what the error says."""
    before, texts, output = state_of(graph), node_texts(graph), call_reproducibly(graph, (), vectors())
    notes = dict(graph.meta)
    with pytest.raises(expected) as error:
        one.apply(graph, inputs=vectors(), **settings)
    assert_same_state(before, state_of(graph))
    assert node_texts(graph) == texts
    assert graph.meta == notes
    assert torch.equal(call_reproducibly(graph, (), vectors()), output)
    return str(error.value)


def spoil_output(
    monkeypatch: pytest.MonkeyPatch, kind: type[Pass[Any]], op: Any, number: float, at: str | None = None
) -> None:
    """Have a pass put `op(output, number)` behind what it makes of each site, or of the one at `at`."""
    original = kind.rewrite

    def rewrite(self: Any, work: TracedGraph, place: Any, seen: Any) -> Any:
        change = original(self, work, place, seen)
        if at not in (None, place.path):
            return change
        node = next(node for node in work.graph.nodes if node.name == change.output[1])
        with work.graph.inserting_after(node):
            spoilt = work.graph.call_function(op, (node, number))
        spoilt.meta = dict(node.meta)
        node.replace_all_uses_with(spoilt, delete_user_cb=lambda user: user is not spoilt)
        return dataclasses.replace(change, output=(change.output[0], spoilt.name))

    monkeypatch.setattr(kind, "rewrite", rewrite)
