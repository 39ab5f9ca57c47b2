"""densify: layers that skip nothing are dense layers again, with the weights that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.dynamic.site import find_dynamic
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.measure.meter import measure
from surgeon.passes import Densify, EarlyExit, Lower, Moeify, Quantize, SparsifyInputs, SparsifyNeurons
from surgeon.sites.search import find_ffns
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import Plain, Stack, correlated_vectors, stack, vectors

INPUTS = vectors()


def again(model: torch.nn.Module, *passes: Any, data: Any = None) -> tuple[surgeon.Surgery, torch.Tensor]:
    """The model after the passes and densify, and what it computed before."""
    model.eval()
    return Pipeline([*passes, Densify()]).run(model, inputs=INPUTS, data=data), model(**INPUTS)


@pytest.mark.parametrize("kind", ["gelu", "relu", "biasless", "gated", "fused", "shared"])
@pytest.mark.parametrize("lowered", [False, True])
def test_experts_are_one_layer_again(kind: str, lowered: bool) -> None:
    model = stack(kind)
    surgery, expected = again(model, Moeify(expert_size=5), *[Lower()] * lowered)
    assert torch.allclose(surgery.graph(**INPUTS), expected, atol=1e-6)
    assert not find_dynamic(surgery.graph)
    sites = find_ffns(surgery.graph)[0]
    first = find_ffns(surgeon.trace(model, INPUTS))[0]
    assert [(site.neurons, site.activation, site.gated) for site in sites] == [
        (site.neurons, site.activation, site.gated) for site in first
    ]
    cost = measure(surgery.graph, (), INPUTS)[0].multiply_adds
    assert cost == measure(model, (), INPUTS)[0].multiply_adds
    report = surgery.reports[-1]
    assert report.after is not None
    assert report.after.multiply_adds == cost
    assert "experts × 5" in report.sites[0].before
    assert "FFN 16→32→16" in report.sites[0].after


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS} - {"identity", "relu_relu"}))
def test_every_activation(name: str) -> None:
    torch.manual_seed(0)
    model = Stack(Plain(act=ACTIVATIONS[name].fn))
    surgery, expected = again(model, Moeify(experts=3))
    assert torch.allclose(surgery.graph(**INPUTS), expected, atol=1e-6)
    assert [site.activation for site in find_ffns(surgery.graph)[0]] == [name]


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_inputs_and_neurons(lowered: bool, centre: bool) -> None:
    model = stack("gated")
    passes = [SparsifyNeurons(only=("blocks.0.*",), centre=centre), SparsifyInputs(centre=centre), *[Lower()] * lowered]
    surgery, expected = again(model, *passes, data=correlated_vectors())
    assert torch.allclose(surgery.graph(**INPUTS), expected, atol=1e-5)
    assert not find_dynamic(surgery.graph)
    assert len(find_ffns(surgery.graph)[0]) == 2
    assert measure(surgery.graph, (), INPUTS)[0].multiply_adds == measure(model, (), INPUTS)[0].multiply_adds


def test_only_layers_that_skip_nothing() -> None:
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(stack("relu"), inputs=INPUTS)
    surgery.set_tau({"blocks.1.*": 0.3, "*": 0.0})
    want = surgery.graph(**INPUTS)
    found = Pipeline([Densify()]).run(surgery.graph, inputs=INPUTS)
    assert torch.allclose(found.graph(**INPUTS), want, atol=1e-6)
    assert [site.path for site in find_dynamic(found.graph)] == ["blocks.1.ffn.moe"]
    assert [(refused.code, refused.reason) for refused in found.reports[-1].rejected] == [
        ("skips", "it skips at its tau, which is 0.3 and not 0")
    ]


def test_what_it_cannot_undo() -> None:
    exits = surgeon.trace(stack("relu", 3), INPUTS)
    EarlyExit().apply(exits)
    assert {refused.code for refused in Densify().apply(exits, inputs=INPUTS).rejected} == {"early-exit"}
    int8 = Pipeline([Moeify(experts=4), Quantize()]).run(stack("relu"), inputs=INPUTS).graph
    report = Densify().apply(int8, inputs=INPUTS)
    assert {(refused.code, refused.reason) for refused in report.rejected} == {
        ("unusable-weights", "its experts are stored in int8: run densify first")
    }


@pytest.mark.parametrize("passes", [(Moeify(experts=4),), (SparsifyInputs(),), (SparsifyInputs(), Lower())])
def test_saved_and_grafted(tmp_path: Path, passes: tuple[Any, ...]) -> None:
    model = stack("relu")
    whole = Pipeline(passes).run(
        model, inputs=INPUTS, data=None if passes[0].name == "moeify" else correlated_vectors()
    )
    for parameter in whole.graph.parameters():  # as if they had been trained
        parameter.data.mul_(1.01)
    first = find_dynamic(whole.graph)[0].path
    surgery = Pipeline([Densify(only=(first,))]).run(whole.graph, inputs=INPUTS)
    surgery.earlier = tuple(whole.diff().passes)
    want = surgery.graph(**INPUTS)
    surgery.save(tmp_path / "saved")
    loaded = surgeon.load(tmp_path / "saved")
    assert torch.allclose(loaded(**INPUTS), want, atol=1e-6)
    assert first not in [site.path for site in find_dynamic(loaded)]
    made = surgeon.graft(model, tmp_path / "saved")
    assert torch.allclose(made(**INPUTS), want, atol=1e-5)
    assert not made.surgeon_graft.refused
    assert len(find_dynamic(made)) == len(find_dynamic(loaded))


def test_what_is_dense_again_can_be_converted_again() -> None:
    model = stack("relu")
    passes = [Moeify(experts=4), Densify(only=("blocks.0.*",)), Moeify(experts=8)]
    surgery = Pipeline(passes).run(model, inputs=INPUTS)
    assert [site.describe for site in find_dynamic(surgery.graph)] == ["8 experts × 4", "4 experts × 8"]
    made = surgeon.graft(model, surgery)
    assert torch.allclose(made(**INPUTS), model(**INPUTS), atol=1e-6)
    assert [site.experts for site in find_dynamic(made)] == [8, 4]
