"""A class of tests that every pass must meet. Subclass it, say how to make the pass, and run pytest.

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
from surgeon.passes.base import REWRITING
from surgeon.passes.report import PassReport
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import with_options
from surgeon.testing.models import CLASSES, labelled_vectors, stack, vectors
from surgeon.tracing.quiet import quiet
from surgeon.tracing.trace import trace
from surgeon.training.loop import RunSettings


class PassConformance:
    """Tests of one pass.

    make: returns the pass, with options that suit layers of 16 → 32 → 16. A pass that trains should do two `steps`.
    kind: kind of the feed-forward layers in the small model: "gelu", "relu", "biasless", "gated" or "fused". The model
        also has a linear layer before each of them. layers: their number.
    first: passes that run before this pass. options: values other than the defaults, to test recipes.
    applies_once: whether the pass finds nothing to do in its own result.
    data: gives what a pass calibrates on that needs data for it.
    """

    make: ClassVar[Callable[[], Pass[Any]]]
    kind: ClassVar[str] = "gelu"
    layers: ClassVar[int] = 2
    first: ClassVar[tuple[Pass[Any], ...]] = ()
    options: ClassVar[dict[str, Any]] = {"only": ["blocks.*"]}
    applies_once: ClassVar[bool] = True
    data: ClassVar[Callable[[], Any]] = staticmethod(lambda: labelled_vectors(2))

    def data_for(self, pass_: Pass[Any]) -> Any:
        """Data for a pass that does nothing without them, and trains nothing with them."""
        return type(self).data() if pass_.needs_data and pass_.calibrates else None

    @pytest.fixture
    def pass_(self) -> Pass[Any]:
        """The pass."""
        return type(self).make()

    @pytest.fixture
    def graph(self) -> TracedGraph:
        """A graph to run the pass on, in evaluation mode; each test gets its own."""
        graph = fork(_traced(self.kind, self.layers))
        own_parameters(graph)
        for earlier in self.first:
            earlier.apply(graph, data=self.data_for(earlier))
        return graph.eval()

    # --- the graph

    def test_keeps_what_it_claims_to_keep(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """The output stays the same exactly where the pass says so, and the report has the difference."""
        inputs = vectors()
        want = call_reproducibly(graph, (), inputs)
        report = pass_.apply(graph, inputs=inputs, data=self.data_for(pass_))
        assert report.matched, "the pass changes nothing in the small model"
        got = call_reproducibly(graph, (), inputs)
        assert report.max_error == pytest.approx(relative_error(got, want), rel=1e-3, abs=1e-9)
        assert report.preserved == pass_.keeps_output(fitted=False)
        assert report.max_error is not None
        if report.preserved:
            assert report.max_error <= tolerance_for(want)
        else:
            assert report.max_error > tolerance_for(want)
        assert torch.isfinite(got).all()

    def test_accounts_for_every_parameter(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """New parameters are in modules that the report names. Only those of matched sites are removed or replaced."""
        before = dict(graph.state_dict())
        report = pass_.apply(graph, inputs=vectors())
        after = dict(graph.state_dict())
        made = tuple(f"{path}." for site in report.sites for path in site.made)
        for key in after.keys() - before.keys():
            assert key.startswith(made), key
        for key in before.keys() - after.keys():
            assert any(key.startswith(f"{path}.") for path in report.matched), key
        for key in before.keys() & after.keys():
            replaced = key.startswith(made) and not pass_.preserves
            assert replaced or torch.equal(before[key], after[key]), key

    def test_second_application_matches_nothing(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """If the pass applies once, applying it again changes nothing."""
        pass_.apply(graph)
        if not self.applies_once:
            return
        texts, keys = node_texts(graph), set(graph.state_dict())
        assert pass_.apply(graph).matched == []
        assert node_texts(graph) == texts
        assert set(graph.state_dict()) == keys

    def test_leaves_the_model_and_the_shared_graph_alone(self, pass_: Pass[Any]) -> None:
        """The traced model and the given graph stay as they were, including modes and gradients."""
        model = stack(self.kind, self.layers)
        model.train()
        model.blocks[0].eval()
        model.head.weight.requires_grad_(False)
        graph = trace(model, vectors())
        for earlier in self.first:
            earlier.apply(graph, data=self.data_for(earlier))
        before, shared, texts = state_of(model), state_of(graph), node_texts(graph)
        surgery = Pipeline([pass_]).run(graph, inputs=vectors(), data=labelled_vectors(2))
        assert surgery.reports[0].matched
        assert_same_state(before, state_of(model))
        assert_same_state(shared, state_of(graph))
        assert node_texts(graph) == texts
        assert surgery.graph is not graph
        assert surgery.graph.training

    def test_modes_switch_and_gradients_flow(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """Evaluation is deterministic, training uses dropout, and every parameter except a router's gets a gradient."""
        pass_.apply(graph, inputs=vectors())
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

    def test_other_sizes_run(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """Batch and length stay free."""
        pass_.apply(graph, inputs=vectors())
        for batch, length in ((1, 1), (1, 9), (6, 2)):
            assert graph(**vectors(batch, length)).shape == (batch, CLASSES)

    def test_works_in_training_mode_too(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """A graph in training mode is rewritten in the same way and stays in training mode."""
        graph.train()
        report = pass_.apply(graph, inputs=vectors())
        assert graph.training
        assert all(
            module.training
            for module in graph.modules()
            if isinstance(module, nn.Dropout) or list(module.parameters(False))
        )
        if report.preserved:
            assert report.max_error is not None
            assert report.max_error < 1e-5

    def test_runs_on_a_bare_exported_graph(self, pass_: Pass[Any]) -> None:
        """A graph from `torch.export` works too."""
        batch = torch.export.Dim("batch", min=2)
        inputs = vectors()
        model = stack(self.kind, self.layers)
        with quiet():
            graph = torch.export.export(
                model, (), inputs, strict=False, dynamic_shapes={key: {0: batch} for key in inputs}
            ).module()
        assert isinstance(graph, torch.fx.GraphModule)
        want = model(**inputs)
        for earlier in self.first:
            earlier.apply(graph, data=self.data_for(earlier))
        report = pass_.apply(graph, inputs=inputs)
        assert report.matched
        if report.preserved:
            assert torch.allclose(graph(**inputs), want, atol=1e-5)
        assert graph(**vectors(5)).shape == (5, CLASSES)

    # --- the report

    def test_report_is_filled(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """The report names what was changed and what it cost, and survives JSON."""
        report = pass_.apply(graph, inputs=vectors())
        assert report.name == pass_.name
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
        assert PassReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report

    def test_without_inputs_it_says_that_nothing_was_verified(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """Without example inputs the report makes no claim about the output."""
        report = pass_.apply(graph)
        assert report.max_error is None
        assert report.before is None
        assert any("no example inputs" in note for note in report.notes)

    def test_verification_can_be_switched_off_and_made_full(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """Full verification finds at least the differences that fast verification finds."""
        off = pass_.apply(fork(graph), inputs=vectors(), settings=RunSettings(verify="off"))
        assert off.max_error is None
        assert any("switched off" in note for note in off.notes)
        full = pass_.apply(fork(graph), inputs=vectors(), settings=RunSettings(verify="full"))
        fast = pass_.apply(fork(graph), inputs=vectors())
        assert full.max_error is not None
        assert fast.max_error is not None
        assert full.max_error >= fast.max_error

    def test_fitting_reports_and_dry_runs_do_not_fit(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """A pass that trains reports each step; a dry run trains nothing."""
        data = labelled_vectors(2)
        moments: list[Any] = []
        report = pass_.apply(fork(graph), inputs=vectors(), data=data, settings=RunSettings(progress=moments.append))
        assert (report.fit is not None) == pass_.will_fit
        if report.fit is not None:
            steps = [moment for moment in moments if moment.total and moment.what not in ("calibration", REWRITING)]
            assert report.fit.steps == len(steps)
            assert all(pass_.name in moment.what for moment in steps)
        assert PassReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
        dry = pass_.apply(fork(graph), inputs=vectors(), data=data, settings=RunSettings(dry_run=True))
        assert dry.fit is None
        assert dry.matched == report.matched

    def test_explain_is_what_apply_does(self, pass_: Pass[Any], graph: TracedGraph) -> None:
        """`explain` changes nothing and says what `apply` then does."""
        texts = node_texts(graph)
        matched, rejected = pass_.explain(graph)
        assert node_texts(graph) == texts
        report = pass_.apply(graph)
        assert [site.path for site in matched] == report.matched
        assert tuple(rejected) == report.rejected

    def test_options_survive_the_recipe(self, pass_: Pass[Any]) -> None:
        """Options survive a recipe's JSON and the command line."""
        kind = type(pass_)
        chosen = with_options(kind, self.options)
        assert chosen.options() == self.options
        assert with_options(kind, json.loads(json.dumps(chosen.options()))) == chosen
        assert with_options(kind, {key: _as_typed(value) for key, value in self.options.items()}) == chosen
        assert with_options(kind, {}).options() == {}

    def test_options_have_help_and_the_pass_has_words(self, pass_: Pass[Any]) -> None:
        """Every option has help, the pass has a docstring, and a pass that trains says what happens without data."""
        for option in dataclasses.fields(pass_):
            assert option.metadata["help"].endswith("."), option.name
        assert type(pass_).__doc__
        assert not pass_.trains or pass_.untrained or pass_.needs_data

    # --- failures

    @pytest.mark.parametrize("mode", [True, False])
    def test_failing_rewrite_leaves_the_graph_and_names_the_site(
        self, pass_: Pass[Any], graph: TracedGraph, mode: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error at the second site undoes the first."""
        site = pass_.explain(graph)[0][1].path
        original, count = type(pass_).rewrite, []

        def rewrite(self: Any, work: TracedGraph, place: Any, seen: Any) -> Any:
            count.append(place.path)
            change = original(self, work, place, seen)
            if len(count) == 2:
                raise RuntimeError("broken on purpose")
            return change

        monkeypatch.setattr(type(pass_), "rewrite", rewrite)
        graph.train(mode)
        message = check_untouched(pass_, graph, PassError)
        assert pass_.name in message
        assert site in message
        assert "broken on purpose" in message

    @pytest.mark.parametrize(
        "error", [RuntimeError("broken on purpose"), PassError("broken on purpose"), KeyboardInterrupt()]
    )
    def test_failing_fit_leaves_the_graph(self, pass_: Pass[Any], graph: TracedGraph, error: BaseException) -> None:
        """An error or an interruption in training leaves nothing behind."""
        if not pass_.will_fit:
            return

        def progress(moment: Any) -> None:
            if pass_.name in moment.what:
                raise error

        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SurgeonError
        settings = RunSettings(progress=progress)
        message = check_untouched(pass_, graph, expected, data=labelled_vectors(2), settings=settings)
        if isinstance(error, RuntimeError):
            assert pass_.name in message
            assert "broken on purpose" in message

    @pytest.mark.parametrize("mode", [True, False])
    def test_failing_verification_leaves_the_graph_and_names_the_site(
        self, pass_: Pass[Any], graph: TracedGraph, mode: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pass that changes the output but must not is undone, and the site is named."""
        if not pass_.keeps_output(fitted=False):
            return
        graph.train(mode)
        site = pass_.explain(graph)[0][1].path
        spoil_output(monkeypatch, type(pass_), torch.ops.aten.mul.Tensor, 2.0, site)
        message = check_untouched(pass_, graph, VerificationError)
        assert pass_.name in message
        assert f"the first site that differs is {site}, by 1.0e+00" in message

    def test_values_that_are_not_finite_fail_verification(
        self, pass_: Pass[Any], graph: TracedGraph, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pass that may change the output must not produce values that are not finite."""
        spoil_output(monkeypatch, type(pass_), torch.ops.aten.div.Tensor, 0.0)
        assert pass_.name in check_untouched(pass_, graph, VerificationError)

    def test_refuses_what_is_not_a_graph_of_aten_ops(self, pass_: Pass[Any]) -> None:
        """A graph of modules is refused, and the message says what to do."""
        symbolic = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
        with pytest.raises(SurgeonError, match=f"{pass_.name} takes a graph of ATen ops.*surgeon.trace"):
            pass_.apply(symbolic)


@functools.cache
def _traced(kind: str, layers: int) -> TracedGraph:
    return trace(stack(kind, layers), vectors())


def _as_typed(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{pattern}:{item}" for pattern, item in value.items())
    return ",".join(value) if isinstance(value, list) else str(value)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything about a model's weights and modes that a user could notice."""
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grads": {name: tensor.grad is None for name, tensor in tensors.items() if tensor.is_leaf},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that two results of `state_of` agree, including the identity of the tensors."""
    for key in ("objects", "requires_grad", "grads", "training"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def node_texts(graph: TracedGraph) -> list[str]:
    """The nodes of a graph, as text."""
    return [node.format_node() or "" for node in graph.graph.nodes]


def check_untouched(pass_: Pass[Any], graph: TracedGraph, expected: type[BaseException], **settings: Any) -> str:
    """Check that the pass fails as expected and leaves the graph unchanged. Returns the error's message."""
    before, texts, output = state_of(graph), node_texts(graph), call_reproducibly(graph, (), vectors())
    notes = dict(graph.meta)
    with pytest.raises(expected) as error:
        pass_.apply(graph, inputs=vectors(), **settings)
    assert_same_state(before, state_of(graph))
    assert node_texts(graph) == texts
    assert graph.meta == notes
    assert torch.equal(call_reproducibly(graph, (), vectors()), output)
    return str(error.value)


def spoil_output(
    monkeypatch: pytest.MonkeyPatch, kind: type[Pass[Any]], op: Any, number: float, at: str | None = None
) -> None:
    """Make a pass put `op(output, number)` after each site that it rewrites, or only after the site at `at`."""
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
