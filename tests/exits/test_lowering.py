"""After lower, what follows an exit runs for the samples that stay, and the answers are those of the masked form."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.dynamic.knobs import set_tau
from surgeon.exits.lowering import plan_skipping
from surgeon.exits.site import find_exits
from surgeon.graph.capture import Capture
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.measure.meter import measure
from surgeon.measure.multiply_adds import Counter
from surgeon.passes import EarlyExit, Lower, Moeify, Pass, SparsifyInputs
from surgeon.sites.rejection import Rejection
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from tests.small_models import WIDTH, classifier, labelled_vectors, stack, tokens, vectors

TAUS = (0.0, 0.55, 0.62, 1.0)


def spread(graph: TracedGraph) -> None:
    """Let heads be sure of some samples and unsure of others."""
    with torch.no_grad():
        for site in find_exits(graph):
            graph.get_parameter(f"{site.path}.out.weight").mul_(2.0)


@functools.cache
def traced() -> TracedGraph:
    return surgeon.trace(classifier("gelu", 3), tokens())


def made(passes: list[Pass[Any]], model: nn.Module | None = None, inputs: Any = None) -> Surgery:
    inputs = tokens() if inputs is None else inputs
    data = [(inputs, torch.arange(len(next(iter(inputs.values())))) % 3)]
    surgery = Pipeline(passes).run(traced() if model is None else model, inputs=inputs, data=data)
    spread(surgery.graph)
    surgery.graph.eval()
    return surgery


@functools.cache
def plain(lowered: bool) -> Surgery:
    """A model with early exits alone. All tests share it: they set tau, and change nothing else."""
    return made([EarlyExit(steps=2, width=8), *([Lower()] if lowered else [])])


def lower(masked: TracedGraph, inputs: Any = None, **options: Any) -> TracedGraph:
    """A lowered copy that shares the parameters."""
    graph = fork(masked)
    Lower(**options).apply(graph, inputs=tokens() if inputs is None else inputs)
    return graph


def batch(rows: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.randint(2, 10, (rows, 1), generator=generator)).long()
    return {"input_ids": torch.randint(1, 50, (rows, 9), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize(
    "before", [[], [Moeify(experts=4, steps=1)], [SparsifyInputs()]], ids=["dense", "experts", "inputs"]
)
def test_both_forms_answer_alike_and_the_count_is_what_runs(before: list[Pass[Any]]) -> None:
    if before:
        exits = EarlyExit(steps=2, width=8)
        masked = made([exits, *before] if isinstance(before[0], SparsifyInputs) else [*before, exits]).graph
        lowered = lower(masked)
        own_parameters(lowered)  # each has a tau of its own
    else:
        masked, lowered = plain(False).graph, plain(True).graph
    assert [site.form for site in find_exits(masked)] == ["masked"] * 2
    assert [site.form for site in find_exits(lowered)] == ["dynamic"] * 2
    x, shares = batch(), set()
    for tau in TAUS:
        for graph in (masked, lowered):
            set_tau(graph, tau if not isinstance(before and before[0], SparsifyInputs) else 0.0)
            set_tau(graph, tau, "blocks.exits.*")
        with Counter() as counter, torch.no_grad():
            answers = lowered(**x)
        assert torch.allclose(answers, masked(**x), atol=1e-5)
        cost, layers = measure(lowered, (), x)
        assert cost.executed_multiply_adds == measure(masked, (), x)[0].executed_multiply_adds
        if not before or isinstance(before[0], Moeify):  # a sparse linear layer counts as dense
            assert cost.executed_multiply_adds == counter.multiply_adds
        shares.add(layers["blocks.exits.0"].share)
    assert {0.0, 1.0} < shares


def test_a_batch_where_all_left_costs_what_comes_before() -> None:
    graph = plain(True).graph
    set_tau(graph, 1.0)
    with Counter() as counter:
        assert graph(**batch()).shape == (24, 3)
    set_tau(graph, 0.0)
    with Counter() as dense:
        graph(**batch())
    assert counter.multiply_adds < 0.4 * dense.multiply_adds


def test_one_exit_can_be_lowered_and_later_the_other() -> None:
    masked = plain(False).graph
    for first in ("blocks.exits.0", "blocks.exits.1"):
        graph = lower(lower(masked, only=(first,)))
        assert [site.form for site in find_exits(graph)] == ["dynamic"] * 2
        for tau in TAUS:
            set_tau(masked, tau)  # of both: they share it
            assert torch.allclose(graph(**batch()), masked(**batch()), atol=1e-5)


@pytest.mark.parametrize("lowered", [False, True])
def test_saved_and_loaded(lowered: bool, tmp_path: Path) -> None:
    surgery = plain(lowered)
    set_tau(surgery.graph, 0.6)
    surgery.save(tmp_path / "saved")
    graph = surgeon.load(tmp_path / "saved")
    assert [site.form for site in find_exits(graph)] == ["dynamic" if lowered else "masked"] * 2
    assert surgeon.get_tau(graph) == surgeon.get_tau(surgery.graph)
    for tau in TAUS:
        set_tau(graph, tau)
        set_tau(surgery.graph, tau)
        assert torch.allclose(graph(**batch()), surgery.graph(**batch()), atol=1e-6)


class Reshaping(nn.Module):
    """Blocks that name the batch in a shape and leave another size open, which an empty batch does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack("gelu", 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner.blocks[0](x)
        x = x.reshape(x.shape[0], -1, 2, WIDTH // 2).reshape(x.shape[0], x.shape[1], -1)
        return self.inner.head(self.inner.blocks[1](x).mean(1))


def test_an_open_size_is_filled_in() -> None:
    graph = made([EarlyExit(steps=1), Lower()], Reshaping().eval(), vectors(3)).graph
    for tau in (0.0, 1.0):
        set_tau(graph, tau)
        assert graph(**vectors(7)).shape == (7, 3)


def test_a_batch_of_one_size_is_refused() -> None:
    with torch.no_grad():
        program = torch.export.export(stack("gelu", 2), (), vectors(3), strict=False)
    graph = program.module()
    assert isinstance(graph, torch.fx.GraphModule)
    EarlyExit().apply(graph, inputs=vectors(3))
    plan = plan_skipping(graph, find_exits(graph)[0])
    assert isinstance(plan, Rejection)
    assert plan.code == "fixed-batch"
    assert Lower().explain(graph)[1] == [plan]


def test_a_value_without_the_batch_in_front_is_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack("gelu", 2)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            x = self.inner.blocks[0](x)
            return self.inner.head(self.inner.blocks[1](x + other.transpose(0, 1)).mean(1))

    x = vectors()["x"]
    inputs = {"x": x, "other": torch.zeros(x.shape[1], x.shape[0], x.shape[2])}
    graph = surgeon.trace(Turned().eval(), inputs)
    EarlyExit().apply(graph, inputs=inputs)
    assert [rejection.code for rejection in Lower().explain(graph)[1]] == ["batch-not-first"]


def test_training_after_lower_reaches_every_part() -> None:
    surgery = Pipeline([EarlyExit(steps=1), Lower()]).run(stack("gelu", 3), inputs=vectors(), data=labelled_vectors(1))
    graph = surgery.graph
    set_tau(graph, 0.6)
    graph(**vectors(16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters() if parameter.requires_grad)


class RowNumbers(nn.Module):
    """Blocks with masks that are picked by numbers of samples, one made before the exit and used after it again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack("gelu", 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]
        x = self.inner.blocks[0](x * attention_mask.bool()[rows, columns].unsqueeze(-1))
        x = self.inner.blocks[1](x * (attention_mask > 1)[rows, columns].unsqueeze(-1))
        return self.inner.head(x.mean(1) + x[rows[:, 0], 0])


def test_numbers_of_samples_are_counted_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (24, 5), generator=generator)
    few = {"x": vectors(3)["x"], "attention_mask": mask[:3]}
    masked = made([EarlyExit(steps=1, pool="first")], RowNumbers().eval(), few).graph
    lowered = lower(masked, few)
    many = {"x": vectors(24)["x"], "attention_mask": mask}
    with torch.no_grad():
        unsure = 1 - Capture(masked, ["linear_default"])(**many)[1]["linear_default"].softmax(-1).amax(-1)
    for tau in (0.0, float(unsure.median()), 1.0):
        set_tau(masked, tau)  # of both: they share it
        assert torch.allclose(lowered(**many), masked(**many), atol=1e-5)
