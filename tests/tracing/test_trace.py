"""Tracing: the graph computes what the model computes, switches as it does, and leaves it alone; else it is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import SizeError, TraceError
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.given import is_aten_graph
from surgeon.graph.traced import TracedGraph
from surgeon.tracing.quiet import quiet
from surgeon.tracing.trace import TraceInfo, adopt, from_program
from tests.small_models import HUGGING_FACE, WIDTH, hugging_face, stack, tokens, vectors


def info(graph: TracedGraph) -> TraceInfo:
    return graph.meta["trace"]


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_equals_the_model_at_other_sizes(traces: Any, name: str) -> None:
    model, inputs, graph = traces.pair(name)
    for batch, length in ((1, 7), (2, 3), (5, 11)):
        if name == "vit":
            given: dict[str, Tensor] = {"pixel_values": torch.randn(batch, 3, 16, 16)}
        else:
            decoder = {"decoder_input_ids": tokens(batch, 4)["input_ids"]} if name == "t5" else {}
            given = {**tokens(batch, length), **decoder}
        if "use_cache" in inspect.signature(model.forward).parameters:
            want = call_reproducibly(model, (), {**given, "use_cache": False})
        else:
            want = call_reproducibly(model, (), given)
        assert relative_error(call_reproducibly(graph, (), given), want) < 1e-5
    assert info(graph).form == "train"
    assert info(graph).max_error is not None
    assert info(graph).max_error < 1e-5
    assert set(inputs) == {place for place, _ in info(graph).dynamic}


def test_parameters_are_the_models_own_objects() -> None:
    model = stack()
    graph = surgeon.trace(model, vectors())
    own = dict(model.named_parameters())
    assert {name: id(p) for name, p in graph.named_parameters()} == {name: id(p) for name, p in own.items()}


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "both"])
def test_inputs_in_every_form(form: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, *terms: Tensor) -> Tensor:
            return self.a(terms[0]) + terms[1]

    model = Sum()
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    if form == "tensor":
        graph = surgeon.trace(nn.Linear(4, 4), x)
        assert graph(x).shape == (3, 4)
        return
    named = nn.Bilinear(4, 4, 2)
    given = {"tuple": (x, y), "dict": {"input1": x, "input2": y}, "both": ((x,), {"input2": y})}[form]
    graph = surgeon.trace(model if form == "tuple" else named, given)
    want = model(x, y) if form == "tuple" else named(x, y)
    call = graph(x, y) if form == "tuple" else graph(**given) if form == "dict" else graph(x, input2=y)
    assert torch.allclose(call, want, atol=1e-6)


def test_output_class_is_kept(traces: Any) -> None:
    output = traces("bert")(**traces.inputs("bert"))
    assert type(output).__name__ == "SequenceClassifierOutput"
    assert output.logits.shape == (3, 3)


def test_batch_of_one_is_doubled_for_tracing() -> None:
    model = stack()
    graph = surgeon.trace(model, vectors(1))
    assert any("batch of 1 was doubled" in note for note in info(graph).notes)
    assert torch.allclose(graph(**vectors(4)), model(**vectors(4)), atol=1e-6)


def test_fixed_batch_is_told() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(3, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.position)

    graph = surgeon.trace(Fixed(), torch.randn(3, 4))
    assert any("Batch size is fixed" in note and "x" in note for note in info(graph).notes)
    assert info(graph).dynamic == (("x", ()),)


def test_fixed_size_refuses_another_with_both_sizes_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(6, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.position)

    graph = surgeon.trace(Fixed(), torch.randn(3, 6, 4))
    assert info(graph).dynamic == (("x", (0,)),)
    assert graph(torch.randn(5, 6, 4)).shape == (5, 6, 4)
    assert info(graph).notes == ("The graph takes inputs of the example's length only: x[1] = 6.",)
    with pytest.raises(SizeError, match=r"dimension 1 of x \[3, 7, 4\] is 7, but the graph only takes 6"):
        graph(torch.randn(3, 7, 4))


def test_half_precision_traces() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)).to(torch.bfloat16)
    graph = surgeon.trace(model, torch.randn(3, WIDTH, dtype=torch.bfloat16))
    assert graph(torch.randn(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- the model is left alone ------------------------------------------------------------------------------------------


def test_training_flags_are_restored() -> None:
    model = stack()
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    graph = surgeon.trace(model, vectors())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert graph.training


def test_flags_and_configs_are_restored_when_tracing_fails() -> None:
    model, inputs = hugging_face("t5")
    model.train()
    caches = [m.config.use_cache for m in model.modules() if hasattr(m, "config")]
    with pytest.raises(TraceError):
        surgeon.trace(model, {"input_ids": inputs["input_ids"]})  # the decoder's input is missing
    assert model.training
    assert [m.config.use_cache for m in model.modules() if hasattr(m, "config")] == caches


def test_caches_are_off_in_the_graph_and_restored_in_every_config(traces: Any) -> None:
    model, inputs, graph = traces.pair("t5")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    assert len(configs) == 3
    fresh = hugging_face("t5")[0]
    assert [config.use_cache for config in configs] == list(
        {id(m.config): m.config.use_cache for m in fresh.modules() if hasattr(m, "config")}.values()
    )
    assert "past_key_values" in model(**inputs)
    assert "past_key_values" not in graph(**inputs)


def test_buffers_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = surgeon.trace(model, torch.randn(5, 4)).eval()
    graph(torch.randn(5, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_random_state_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    surgeon.trace(model, x)
    assert torch.equal(state, torch.get_rng_state())


# --- train and eval ---------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**inputs)
    (output if isinstance(output, Tensor) else output.logits).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gelu", "stack:gated", "bert", "vit"])
def test_gradients_of_a_seeded_training_step_equal_eager(traces: Any, name: str) -> None:
    model, inputs, graph = traces.pair(name)
    want = gradients(model.train(), inputs)
    model.eval()
    got = gradients(graph.train(), inputs)
    assert set(got) == set(want)
    for key, gradient in want.items():
        assert torch.allclose(got[key], gradient, atol=1e-6, rtol=1e-5), key
    off = gradients(graph.eval(), inputs)
    assert any(not torch.allclose(off[key], want[key], atol=1e-4) for key in want)
    model.zero_grad()


def test_switch_follows_every_flag_and_returns_the_graph(traces: Any) -> None:
    graph = traces("stack:gelu")
    inputs = vectors()
    assert graph.train() is graph
    assert all(module.training for module in graph.modules())
    assert not torch.equal(graph(**inputs), graph(**inputs))
    assert graph.eval() is graph
    assert not any(module.training for module in graph.modules())
    assert torch.equal(graph(**inputs), graph(**inputs))


def test_fork_switches_by_itself(traces: Any) -> None:
    graph = traces("stack:gelu")
    copy = adopt(graph).train()
    assert not graph.training
    assert torch.equal(graph(**vectors()), graph(**vectors()))
    assert not torch.equal(copy(**vectors()), copy(**vectors()))


def test_tied_weights_stay_one_object_and_step_once(traces: Any) -> None:
    model, _, graph = traces.pair("gpt2")
    embedding = model.get_parameter("transformer.wte.weight")
    assert model.get_parameter("lm_head.weight") is embedding
    assert sum(p is embedding for p in graph.parameters()) == 1


def test_tied_weights_of_an_exported_program_are_one_object_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    program = torch.export.export(model, (torch.randn(3, 4),), strict=False)
    graph = from_program(program)
    assert len(list(graph.parameters())) == 1


class StochasticDepth(nn.Module):
    """Drops whole residual branches at random, as timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if self.training:
            y = y * torch.bernoulli(torch.full((x.shape[0], 1), 0.5)) / 0.5
        return x + self.b(y)


def test_stochastic_depth_falls_back_to_evaluation_form_with_a_note() -> None:
    model = StochasticDepth()
    x = torch.randn(5, 4)
    graph = surgeon.trace(model, x)
    assert info(graph).form == "eval"
    assert any("evaluation form" in note and "bernoulli" in note for note in info(graph).notes)
    model.eval()
    assert torch.equal(graph.train()(x), model(x))


def test_batch_norm_learns_in_train_only() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    graph = surgeon.trace(model, torch.randn(6, 4))
    x = torch.randn(6, 4)
    assert torch.allclose(graph.eval()(x), model(x), atol=1e-6)
    model.train()
    want = model(x)
    assert torch.allclose(graph.train()(x), want, atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


class CountsCalls(nn.Module):
    """Computes something else at every call: what export saw is not what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such thing")


def test_state_that_changes_between_calls_is_refused() -> None:
    with pytest.raises(TraceError, match=r"CountsCalls cannot be traced: .* changes its own state"):
        surgeon.trace(CountsCalls(), torch.randn(3, 4))


def test_failing_model_is_reported_before_tracing() -> None:
    with pytest.raises(TraceError, match=r"Fails fails on the example inputs.*ValueError: no such thing"):
        surgeon.trace(Fails(), torch.randn(3, 4))


def test_inputs_that_do_not_fit_are_reported() -> None:
    with pytest.raises(TraceError, match="Linear fails on the example inputs"):
        surgeon.trace(nn.Linear(4, 4), torch.randn(3, 5))


# --- graphs that exist already ----------------------------------------------------------------------------------------


def export(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"x": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=64)}}
    with quiet():
        return torch.export.export(model, (), vectors(), strict=False, dynamic_shapes=shapes)


def test_adopts_an_exported_graph() -> None:
    module = export(stack()).module()
    assert isinstance(module, torch.fx.GraphModule)
    assert is_aten_graph(module)
    graph = surgeon.trace(module, vectors())
    assert torch.allclose(graph(**vectors(5)), module(**vectors(5)), atol=1e-6)
    assert info(graph).form == "eval"
    assert {node.op for node in graph.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    assert next(graph.parameters()) is next(module.parameters())


def test_a_graph_with_nodes_of_unknown_shape_is_traced_again() -> None:
    module = export(stack()).module()
    assert isinstance(module, torch.fx.GraphModule)
    relu = next(node for node in module.graph.nodes if node.target is torch.ops.aten.gelu.default)
    del relu.meta["val"]
    assert not is_aten_graph(module)
    assert len(surgeon.find_ffns(surgeon.trace(module, vectors()))[0]) == 2


def test_adopts_a_training_graph_as_one() -> None:
    graph = from_program(export(stack().train()))
    assert info(graph).form == "train"
    assert not graph.training
    assert torch.equal(graph(**vectors()), graph(**vectors()))
    graph.train()
    assert not torch.equal(graph(**vectors()), graph(**vectors()))


def test_a_symbolic_graph_is_no_aten_graph() -> None:
    symbolic = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert not is_aten_graph(symbolic)
    assert is_aten_graph(surgeon.trace(symbolic, torch.randn(3, 4)))
