"""Distillation: the answers and the layers' inputs of the model before the passes, in all passes that fine-tune."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.graph.traced import fork
from surgeon.passes import Lower, Mlpify, Moeify, Recover, Sparsify, SwapActivation
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import InputFile
from surgeon.surgery.record import read_record
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


# --- another teacher --------------------------------------------------------------------------------------------------


class Wider(nn.Module):
    """A larger model for the same vectors and classes, or others."""

    def __init__(self, classes: int = 3, seed: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def test_with_another_teacher_its_outputs_are_learned_and_the_layers_stay_those_of_the_model() -> None:
    model, teacher = classifier("relu", dropout=0.0), classifier("gelu", layers=1, dropout=0.5)
    with torch.no_grad():
        teacher.head.weight.mul_(5.0)
    teacher.train()  # it is run in evaluation mode all the same, and left as it was
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    inputs = tokens(8)
    passes = [Sparsify(distill=1.0, distill_layers=1.0, alpha=0.0, steps=60, lr=3e-3)]
    surgery = Pipeline(passes).run(model, inputs=inputs, data=[inputs], teacher=teacher)
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    teacher.eval()
    with torch.no_grad():
        wanted, dense, after = (one(**inputs).log_softmax(-1) for one in (teacher, model, surgery.graph.eval()))
    apart = [float(F.kl_div(found, wanted, log_target=True, reduction="batchmean")) for found in (dense, after)]
    losses = last_fit(surgery).losses
    assert losses[0][1]["divergence"] == pytest.approx(apart[0], rel=1e-3)
    assert losses[0][1]["layer error"] == pytest.approx(0.0, abs=1e-9)
    assert apart[1] < 0.5 * apart[0]


def test_imitation_is_of_the_teacher() -> None:
    model, teacher = stack("gelu"), stack("relu")
    with torch.no_grad():
        teacher.head.weight.mul_(3.0)
    data = Data.of([inputs for inputs, _ in DATA], task="imitate")
    surgery = Pipeline([SwapActivation(steps=200, lr=3e-3)]).run(model, inputs=vectors(), data=data, teacher=teacher)
    assert list(last_fit(surgery).losses[0][1]) == ["divergence"]
    found, wanted, dense = (outputs(one).log_softmax(-1) for one in (surgery.graph, teacher, model))
    apart = [float(F.kl_div(one, wanted, log_target=True, reduction="batchmean")) for one in (dense, found)]
    assert apart[1] < 0.2 * apart[0]


def test_layers_alone_are_not_those_of_the_teacher() -> None:
    with pytest.raises(UsageError, match="No pass learns from a teacher"):
        Pipeline([Sparsify(distill_layers=1.0, steps=1)]).run(
            stack("relu"), inputs=vectors(), data=DATA, teacher=stack("relu")
        )


class Named(Function):
    """A model with a config that names its classes."""

    def __init__(self, *names: str) -> None:
        super().__init__(lambda module, x: module.inner(x=x), inner=stack("relu"))
        self.config = SimpleNamespace(id2label=dict(enumerate(names)), label2id=None)


@pytest.mark.parametrize(("passes", "data", "teacher", "words"), [
    ([Sparsify(distill=0.5, steps=1)], None, stack("relu"), "Give data too"),
    ([Sparsify(steps=1)], DATA, stack("relu"), "No pass learns from a teacher"),
    ([Moeify(steps=1)], DATA, stack("relu"), "No pass learns from a teacher"),
    ([SwapActivation(), Moeify(steps=1)], DATA, stack("relu"), "No pass learns from a teacher"),
    ([Sparsify(distill=0.5, steps=1)], DATA, Wider(4), r"The teacher answers \[3, 4\] .* and the model \[3, 3\]"),
    ([Sparsify(distill=0.5, steps=1)], DATA, nn.Linear(5, 3), r"The teacher cannot be called with the model's inputs"),
], ids=["data", "distill", "moeify", "swap", "classes", "inputs"])  # fmt: skip
def test_teachers_that_cannot_be_learned_from_are_refused_before_anything_runs(
    passes: Any, data: Any, teacher: nn.Module, words: str
) -> None:
    started: list[Any] = []
    with pytest.raises(UsageError, match=words):
        Pipeline(passes).run(stack("relu"), inputs=vectors(), data=data, teacher=teacher, on_pass=started.append)
    assert not started


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    teacher = stack("relu")
    with torch.no_grad():
        teacher.head.bias.fill_(torch.nan)
    with pytest.raises(UsageError, match="outputs on the example inputs contain NaN"):
        Pipeline([Sparsify(distill=0.5, steps=1)]).run(stack("relu"), inputs=vectors(), data=DATA, teacher=teacher)


def test_classes_in_another_order_are_refused_and_names_that_say_nothing_are_not() -> None:
    def distilled(model: nn.Module, teacher: nn.Module) -> None:
        Pipeline([Sparsify(distill=0.5, steps=1)]).run(model, inputs=vectors(), data=DATA, teacher=teacher)

    with pytest.raises(UsageError, match="The teacher's classes are 'b', 'a', 'c', and the model's are 'a', 'b', 'c'"):
        distilled(Named("a", "b", "c"), Named("b", "a", "c"))
    distilled(Named("a", "b", "c"), Named("a", "b", "c"))
    distilled(Named("a", "b", "c"), Named("LABEL_0", "LABEL_1", "LABEL_2"))


def test_the_teacher_is_in_the_record_and_stays_in_that_of_what_goes_on(tmp_path: Path) -> None:
    passes = [Sparsify(distill=0.5, steps=1), Moeify(experts=4, steps=1)]
    surgery = Pipeline(passes).run(stack("relu"), inputs=vectors(), data=DATA, teacher=stack("gelu"))
    surgery.save(tmp_path / "one")
    assert read_record(tmp_path / "one").recipe.teacher == InputFile(None, "module", None)
    Pipeline([Lower()]).run(surgeon.load(tmp_path / "one"), inputs=vectors()).save(tmp_path / "two")
    assert read_record(tmp_path / "two").recipe.teacher == InputFile(None, "module", None)
    Pipeline([Moeify(experts=4)]).run(stack("relu"), inputs=vectors()).save(tmp_path / "none")
    assert read_record(tmp_path / "none").recipe.teacher is None
