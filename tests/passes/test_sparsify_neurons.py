"""sparsify-neurons: what is skipped, what it costs, and that the layers stay what they were at tau 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.data.data import Data
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import UsageError
from surgeon.inputs.calibration import calibrate_neurons
from surgeon.inputs.neuron_site import find_sparse_neurons
from surgeon.measure.load import measure_load
from surgeon.measure.meter import ExpertMeter, measure
from surgeon.measure.sweep import layers_share
from surgeon.measure.tuning import tune
from surgeon.passes import Lower, Moeify, Recover, Refit, SparsifyInputs, SparsifyNeurons
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import HIDDEN, WIDTH, Function, Gated, correlated_vectors, labelled_vectors, stack, vectors


@pytest.mark.parametrize("kind", ["gated", "fused"])
def test_every_gated_layer_skips_its_share(kind: str) -> None:
    model = stack(kind)
    surgery = Pipeline([SparsifyNeurons(), Lower()]).run(model, inputs=vectors(), data=correlated_vectors())
    graph, inputs = surgery.graph.eval(), correlated_vectors(1)[0]
    sites = find_sparse_neurons(graph)
    assert [(site.path, site.form) for site in sites] == [(f"blocks.{i}.ffn.neurons", "dynamic") for i in (0, 1)]
    assert torch.allclose(graph(**inputs), model(**inputs), atol=1e-5)
    before, _ = measure(graph, (), inputs)
    dense, _ = measure(surgeon.trace(model, inputs), (), inputs)
    assert before.multiply_adds == before.executed_multiply_adds == dense.multiply_adds
    errors = []
    for tau in (0.2, 0.5, 0.8):
        set_tau(graph, tau)
        cost, layers = measure(graph, (), inputs)
        assert cost.multiply_adds == before.multiply_adds
        # Other inputs than those it was calibrated on.
        assert all(abs(layer.share - (1 - tau)) < 0.15 for layer in layers.values()), (tau, layers)
        tokens = inputs["x"].shape[0] * inputs["x"].shape[1]
        skipped = sum((1 - layer.share) * HIDDEN * 2 * WIDTH * tokens for layer in layers.values())
        assert before.multiply_adds - cost.executed_multiply_adds == pytest.approx(skipped)
        # The gate, a third of a layer, always runs.
        mean = sum(layer.share for layer in layers.values()) / len(layers)
        assert layers_share(layers) == pytest.approx((1 + 2 * mean) / 3)
        with torch.no_grad():
            errors.append(float((graph(**inputs) - model(**inputs)).norm()))
    assert 0 < errors[0] < errors[1] < errors[2]


class Uneven(nn.Module):
    """A gated layer whose neurons have up and down of several sizes, and add something on the mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ffn = Gated(hidden=64, bias=True)
        size = torch.randn(64).mul(0.7).exp()
        with torch.no_grad():
            self.ffn.gate.bias.sub_(1.0)
            self.ffn.up.weight.mul_(size.unsqueeze(1))
            self.ffn.up.bias.copy_(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)  # type: ignore[no-any-return]


def skipped(tau: float = 0.5, **options: Any) -> float:
    layer = Uneven().eval()
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(64, WIDTH, generator=generator) for _ in range(20)]
    graph = Pipeline([SparsifyNeurons(tau=tau, **options)]).run(layer, inputs=x[0], data=x[1:]).graph.eval()
    with torch.no_grad():
        return float((graph(x[0]) - layer(x[0])).norm())


def test_centres_and_weights_each_make_the_error_smaller() -> None:
    cats = skipped(criterion="magnitude", centre=False)
    weighted, centred = skipped(centre=False), skipped(criterion="magnitude")
    assert weighted < 0.9 * cats
    assert centred < 0.9 * cats
    assert skipped() < min(weighted, centred)


def test_calibration_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    gates, up = torch.randn(2, 300, 8, generator=generator)
    w2 = torch.randn(8, 5, generator=generator)
    found = calibrate_neurons(gates.relu(), up, w2, weighted=True, centred=True)
    assert found.scale is not None
    assert found.centre is not None
    for i in range(8):
        scale = float((up[:, i] ** 2).mean() ** 0.5 * w2[i].norm())
        assert float(found.scale[i]) == pytest.approx(scale)
        small = gates.relu()[:, i] * scale <= found.levels[128]
        assert float(found.centre[i]) == pytest.approx(float((gates.relu() * up)[small, i].mean()), abs=1e-6)
    assert float(found.levels[0]) < 0
    scores = (gates.relu() * found.scale).flatten()
    assert float((scores <= found.levels[192]).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(calibrate_neurons(gates, up, w2, weighted=False, centred=False).levels[0]) == 0


@pytest.mark.parametrize("activation", ["relu", "relu_relu"])
def test_gates_that_are_zero_add_nothing_at_tau_0(activation: str) -> None:
    both = activation == "relu_relu"
    layer = Function(
        lambda m, x: m.down(F.relu(m.gate(x)) * (F.relu(m.up(x)) if both else m.up(x))),
        gate=(WIDTH, 32), up=(WIDTH, 32), down=(32, WIDTH),
    ).eval()  # fmt: skip
    with torch.no_grad():  # at the threshold that skips half, some gates are zero and some are not
        layer.gate.bias.add_(0.7)
    x = [batch["x"] for batch in correlated_vectors(batches=4)]
    graph = Pipeline([SparsifyNeurons(), Lower()]).run(layer, inputs=x[0], data=x).graph.eval()
    (site,) = find_sparse_neurons(graph)
    assert site.layer.shape.activation == activation
    assert bool(site.layer.centre.any())  # type: ignore[union-attr]
    torch.testing.assert_close(graph(x[1]), layer(x[1]), rtol=1e-4, atol=1e-5)
    set_tau(graph, 0.5)
    meter = ExpertMeter(graph)
    meter.call((x[1],), {})
    assert meter.layers[site.path].share < 0.6


def test_tune_and_load_beside_layers_that_skip_inputs() -> None:
    passes = [SparsifyNeurons(), SparsifyInputs(), Lower()]
    graph = Pipeline(passes).run(stack("gated"), inputs=vectors(), data=correlated_vectors()).graph.eval()
    batches = correlated_vectors(1)[:4]
    found = tune(graph, batches, 0.7, inputs=batches[0])
    assert found.cost <= 0.7
    assert found.damage <= found.uniform_damage
    assert get_tau(graph) == pytest.approx(found.taus, abs=1e-6)
    loads = {layer.path: layer for layer in measure_load(graph, batches)}
    assert (loads["blocks.0.ffn.neurons"].unit, loads["blocks.0.ffn.neurons"].experts) == ("neurons", HIDDEN)
    assert loads["head.inputs"].unit == "inputs"


def test_recover_trains_with_neurons_skipped() -> None:
    model = stack("gated")
    losses = []
    for share in (0.9, 0.0):
        passes = [SparsifyNeurons(), Recover(steps=160, lr=1e-2, skip_inputs=share), Lower()]
        surgery = Pipeline(passes).run(model, inputs=vectors(), data=Data.of(labelled_vectors(16)), seed=1)
        graph = surgery.graph.eval()
        assert set(get_tau(graph).values()) == {0.0}
        assert all(float(site.levels[0]) < 0 for site in find_sparse_neurons(graph))
        set_tau(graph, 0.9)
        with torch.no_grad():
            losses.append(sum(float(F.cross_entropy(graph(**x), labels)) for x, labels in labelled_vectors(16)))
    assert losses[0] < losses[1]


def test_saved_and_loaded(tmp_path: Path) -> None:
    surgery = Pipeline([SparsifyNeurons(tau=0.4), Lower()]).run(
        stack("fused"), inputs=vectors(), data=correlated_vectors()
    )
    surgery.save(tmp_path / "saved")
    loaded, inputs = surgeon.load(tmp_path / "saved"), correlated_vectors(1)[0]
    assert torch.equal(loaded(**inputs), surgery.graph.eval()(**inputs))
    assert list(get_tau(loaded).values()) == pytest.approx([0.4] * 2)
    assert [(one.path, one.neurons, one.form) for one in loaded.meta["surgery"].inputs] == [
        (f"blocks.{i}.ffn.neurons", HIDDEN, "dynamic") for i in (0, 1)
    ]


def test_refusals(traces: Any) -> None:
    assert {one.code for one in SparsifyNeurons().explain(traces("stack:gelu"))[1]} == {"no-gate"}
    graph = traces("stack:gated")
    SparsifyNeurons(tau=0.5).apply(graph, data=correlated_vectors())
    assert {one.code for one in SparsifyNeurons().explain(graph)[1]} == {"already-done"}
    assert {one.code for one in Refit().explain(graph)[1]} == {"skips-neurons"}
    broken = [{name: value * float("inf") for name, value in batch.items()} for batch in correlated_vectors()]
    surgery = Pipeline([SparsifyNeurons()]).run(stack("gated"), inputs=vectors(), data=broken, verify="off")
    assert {one.code for one in surgery.reports[0].rejected} == {"not-finite"}


def test_the_order_of_passes_and_options_is_checked() -> None:
    for later in (SparsifyInputs(), Lower()):
        with pytest.raises(UsageError, match=f"sparsify-neurons must run before {later.name}"):
            Pipeline([Moeify(), later, SparsifyNeurons()]).run(
                stack("gated"), inputs=vectors(), data=correlated_vectors()
            )
    with pytest.raises(UsageError, match="needs data"):
        Pipeline([SparsifyNeurons()]).run(stack("gated"), inputs=vectors())
    with pytest.raises(UsageError, match=r"tau is 1.5, but must be from 0 to 1"):
        SparsifyNeurons(tau=1.5)
