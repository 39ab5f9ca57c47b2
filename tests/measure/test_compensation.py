"""Compensation: the mean of what is skipped, added to every layer's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import SKIPPED_MEAN, get_knobs, set_knobs
from surgeon.errors import DataError, UsageError
from surgeon.graph.traced import TracedGraph
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import sweep
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify
from tests.small_models import labelled_vectors, stack, vectors

DATA = [Batch.from_any(item) for item in labelled_vectors(4)]


def lowered(kind: str = "gelu", layers: int = 1) -> surgeon.Surgery:
    torch.manual_seed(0)
    passes = [Moeify(experts=8, router_width=8, epochs=0), Lower()]
    surgery = surgeon.Pipeline(passes).run(stack(kind, layers=layers), inputs=vectors(), data=DATA)
    surgery.graph.eval()
    return surgery


def layer_outputs(graph: TracedGraph, batch: Batch) -> torch.Tensor:
    """What the first expert layer gives, [N, d]."""
    found: list[torch.Tensor] = []

    class Watch(ExpertMeter):
        def layer(self, *args: Any) -> torch.Tensor:
            found.append(super().layer(*args))
            return found[-1]

    with torch.no_grad():
        Watch(graph).call(batch.args, batch.kwargs)
    return found[0].flatten(0, -2)


def test_the_mean_of_every_layer_is_the_dense_one() -> None:
    graph = lowered().graph
    dense = torch.cat([layer_outputs(graph, batch) for batch in DATA]).mean(0)
    surgeon.set_tau(graph, 0.7)
    sparse = torch.cat([layer_outputs(graph, batch) for batch in DATA]).mean(0)
    assert float((sparse - dense).norm()) > 1e-3
    assert surgeon.compensate(graph, DATA) == [site.path for site in find_moes(graph)]
    compensated = torch.cat([layer_outputs(graph, batch) for batch in DATA]).mean(0)
    assert torch.allclose(compensated, dense, atol=1e-5)
    again = getattr(graph.get_submodule(find_moes(graph)[0].path), SKIPPED_MEAN).clone()
    surgeon.compensate(graph, labelled_vectors(4))  # pairs of inputs and labels serve as well
    assert torch.allclose(getattr(graph.get_submodule(find_moes(graph)[0].path), SKIPPED_MEAN), again, atol=1e-6)


def test_it_goes_when_other_experts_are_skipped() -> None:
    graph = lowered().graph
    dense = graph(**vectors())
    surgeon.set_tau(graph, 0.7)
    sparse = graph(**vectors())
    surgeon.compensate(graph, DATA)
    compensated = graph(**vectors())
    assert not torch.allclose(compensated, sparse, atol=1e-5)
    surgeon.set_tau(graph, 0.7)
    assert torch.equal(graph(**vectors()), compensated)
    knobs = get_knobs(graph)
    surgeon.set_tau(graph, 0.0)
    assert torch.allclose(graph(**vectors()), dense, atol=1e-6)
    surgeon.set_tau(graph, 0.7)
    assert torch.allclose(graph(**vectors()), sparse, atol=1e-6)
    set_knobs(graph, knobs)
    assert torch.equal(graph(**vectors()), compensated)
    surgeon.set_rule(graph, "top_k")
    assert not any(getattr(graph.get_submodule(site.path), SKIPPED_MEAN).any() for site in find_moes(graph))


def test_sweeps_measure_it_as_stored_and_leave_it() -> None:
    graph = lowered(layers=2).graph
    surgeon.set_tau(graph, 0.7)
    surgeon.compensate(graph, DATA)
    want = graph(**vectors())
    sweep(graph, DATA, "classification", [0.0, None, 0.3], inputs=vectors())
    assert torch.equal(graph(**vectors()), want)


def test_it_is_saved(tmp_path: Path) -> None:
    surgery = lowered("relu", layers=2)
    surgeon.set_tau(surgery.graph, 0.7)
    surgeon.compensate(surgery.graph, DATA)
    want = surgery.graph(**vectors())
    surgery.save(tmp_path / "out")
    loaded = surgeon.load(tmp_path / "out")
    assert torch.allclose(loaded(**vectors()), want, atol=1e-6)
    assert all(getattr(loaded.get_submodule(site.path), SKIPPED_MEAN).any() for site in find_moes(loaded))
    surgeon.compensate(loaded, DATA)
    assert torch.allclose(loaded(**vectors()), want, atol=1e-5)


def test_without_data_nothing_is_changed() -> None:
    graph = lowered().graph
    surgeon.set_tau(graph, 0.7)
    surgeon.compensate(graph, DATA)
    want = graph(**vectors())
    with pytest.raises(DataError, match="no batches were given"):
        surgeon.compensate(graph, [])
    assert torch.equal(graph(**vectors()), want)


def test_what_it_needs(traces: Any) -> None:
    with pytest.raises(UsageError, match="The model has no experts, so there are none to compensate for"):
        surgeon.compensate(traces("stack:relu"), DATA)
    graph = traces("stack:relu")
    Moeify(experts=4).apply(graph)
    with pytest.raises(UsageError, match="Apply lower first"):
        surgeon.compensate(graph, DATA)
