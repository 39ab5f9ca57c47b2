"""Distillation: the answers and the layers' inputs of the model before the passes, in all passes that fine-tune."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.traced import fork
from surgeon.passes import Mlpify, Moeify, Recover, Sparsify, SwapActivation
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from surgeon.training.distillation import layer_inputs
from surgeon.training.loop import FitReport
from tests.small_models import Function, Inputs, Plain, classifier, labelled_vectors, stack, tokens, vectors

DATA = labelled_vectors(4)


def outputs(graph: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([graph.eval()(**inputs) for inputs, _ in DATA])


def last_fit(surgery: Surgery) -> FitReport:
    fit = surgery.reports[-1].fit
    assert fit is not None
    return fit


# --- the answers ------------------------------------------------------------------------------------------------------


def test_with_a_teacher_its_answers_are_kept_and_labels_are_not_needed() -> None:
    model = stack("gelu")
    unlabelled = [inputs for inputs, _ in DATA]
    expected = outputs(model).log_softmax(-1)
    apart = {}
    for distill in (0.0, 1.0):
        passes = [SwapActivation(), Sparsify(distill=distill, steps=150, lr=3e-3, alpha=1e-4)]
        surgery = Pipeline(passes).run(model, inputs=vectors(), data=unlabelled if distill else DATA)
        shown = last_fit(surgery).losses[-1][1]
        assert ("divergence" in shown, "task loss" in shown) == (bool(distill), not distill)
        found = outputs(surgery.graph).log_softmax(-1)
        apart[distill] = float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))
    assert apart[1.0] < 0.01
    assert apart[1.0] < 0.1 * apart[0.0]


def test_distilled_divergence_is_that_of_the_model_before_all_passes() -> None:
    model, inputs = classifier("gelu", layers=1, dropout=0.0), tokens(8)
    passes = [SwapActivation(), Sparsify(distill=1.0, steps=1, lr=1e-9)]
    surgery = Pipeline(passes).run(model, inputs=inputs, data=[inputs])
    graph = surgery.graph.eval()
    with torch.no_grad():
        expected, found = (one(**inputs).log_softmax(-1) for one in (model, graph))
    want = float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))
    assert last_fit(surgery).losses[0][1]["divergence"] == pytest.approx(want, rel=1e-3)
    assert want > 1e-6


def test_the_teacher_is_not_trained() -> None:
    model = stack("relu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Pipeline([Sparsify(distill=1.0, distill_layers=1.0, steps=3, lr=1e-2)]).run(model, inputs=vectors(), data=DATA)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the inputs of layers ---------------------------------------------------------------------------------------------


def inputs_of_layers(model: Any, inputs: Inputs) -> list[Tensor]:
    """What goes into each block's feed-forward layer."""
    seen: list[Tensor] = []
    hooks = [block.ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for block in model.blocks]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_layer_error_is_relative_to_each_layer_and_leaves_padding_out() -> None:
    model, inputs = classifier("gelu", layers=3, dropout=0.0), tokens(8)
    swapped: Any = classifier("gelu", layers=3, dropout=0.0)
    for block in swapped.blocks:
        block.ffn.act = F.relu
    real = inputs["attention_mask"].bool()
    errors = [
        float((new - old)[real].square().sum() / old[real].square().sum())
        for old, new in zip(inputs_of_layers(model, inputs), inputs_of_layers(swapped, inputs), strict=True)
    ]
    assert errors[0] == 0.0
    assert errors[2] > errors[1] > 1e-5
    passes = [SwapActivation(), Sparsify(distill_layers=1.0, steps=1, lr=1e-9)]
    data = [(inputs, torch.arange(8) % 3)]
    surgery = Pipeline(passes).run(model, inputs=inputs, data=data)
    assert last_fit(surgery).losses[0][1]["layer error"] == pytest.approx(sum(errors) / 3, rel=1e-3)


@pytest.mark.parametrize("kind", ["swap-activation", "sparsify", "recover"])
def test_training_with_it_keeps_the_layers_inputs(kind: str) -> None:
    model, inputs = stack("gelu", layers=3), vectors(8)
    old = torch.cat([value.flatten() for value in inputs_of_layers(model, inputs)])
    apart = {}
    for weight in (0.0, 10.0):
        options: Any = {"distill_layers": weight, "steps": 60, "lr": 3e-3, "distill": 0.5}
        passes: list[Any] = {
            "swap-activation": [SwapActivation(**options)],
            "sparsify": [SwapActivation(), Sparsify(**options)],
            "recover": [SwapActivation(), Moeify(experts=8, steps=2), Recover(**options)],
        }[kind]
        surgery = Pipeline(passes).run(model, inputs=inputs, data=DATA)
        names = layer_inputs(surgeon.trace(model, inputs), surgery.graph)
        with torch.no_grad():
            _, values = surgeon.graph.capture.Capture(surgery.graph.eval(), names)(**inputs)
        new = torch.cat([values[name].flatten() for name in names])
        apart[weight] = float((new - old).square().sum() / old.square().sum())
    assert apart[10.0] < 0.5 * apart[0.0]


def test_inputs_are_found_whatever_became_of_the_layers() -> None:
    model, inputs = classifier("gelu", layers=2, dropout=0.0), tokens()
    original = surgeon.trace(model, inputs)
    layers = layer_inputs(original, original)
    assert len(layers) == 2
    data = [(inputs, torch.arange(3))]
    for passes in ([SwapActivation(), Sparsify(steps=1)], [Moeify(experts=4)]):
        assert layer_inputs(original, Pipeline(passes).run(original, inputs=inputs, data=data).graph) == layers
    replaced = Pipeline([Mlpify(steps=1)]).run(original, inputs=inputs, data=data).graph
    assert set(layer_inputs(original, replaced)) > set(layers)


def chain(layers: int, first: nn.Module) -> nn.Module:
    """Feed-forward layers right behind one another."""
    torch.manual_seed(0)
    parts = {f"ffn{number}": Plain(act=F.relu, dropout=0.0) for number in range(layers)}

    def compute(module: Any, x: Tensor) -> Tensor:
        x = module.first(x)
        for name in parts:
            x = getattr(module, name)(x)
        return x.mean(1)

    return Function(compute, first=first, **parts).eval()


def test_an_input_that_was_not_there_before_is_left_out_with_a_warning(caplog: Any) -> None:
    passes = [Moeify(experts=4), Recover(distill_layers=1.0, steps=1)]
    with caplog.at_level(logging.WARNING, "surgeon"):
        Pipeline(passes).run(chain(2, nn.LayerNorm(16)), inputs=vectors(), data=DATA)
    assert [record.getMessage() for record in caplog.records if "distill_layers" in record.getMessage()] == [
        "distill_layers leaves out ffn1.moe, because its input did not exist before the passes."
    ]


def test_without_any_input_to_compare_it_is_refused() -> None:
    passes = [Sparsify(distill_layers=1.0, steps=1)]
    with pytest.raises(UsageError, match=r"no layer's input existed before the passes\. Use distill"):
        Pipeline(passes).run(chain(1, nn.Identity()), inputs=vectors(), data=DATA)


def test_a_node_that_only_has_the_name_is_not_taken() -> None:
    graph = surgeon.trace(stack("relu"), vectors())
    original = fork(graph)
    first, second = layer_inputs(original, graph)
    nodes = {node.name: node for node in original.graph.nodes}
    nodes[first].name = "another"
    next(node for name, node in nodes.items() if name.startswith("linear")).name = first
    assert layer_inputs(original, graph) == (second,)
