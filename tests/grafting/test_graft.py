"""Converted layers in the model they came from: where they go, what they compute, and what stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.data.batch import Batch
from surgeon.errors import UsageError, VerificationError
from surgeon.grafting.parts import MLP, Joined
from surgeon.measure.sweep import sweep
from surgeon.moe.module import MoE
from surgeon.passes import Lower, Mlpify, Moeify, Recover, SwapActivation
from surgeon.surgery.surgery import Surgery
from tests.small_models import labelled_vectors, stack, vectors

X = vectors()


class Whole(nn.Module):
    """A feed-forward layer in a module of its own, with dropout between its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(16, 32), nn.Dropout(0.2), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class AndDropout(Whole):
    """The same, with dropout of its output in its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class HalfDropped(Whole):
    """The same, with dropout of a half, which torch's operators leave out as their default."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)


class Inline(nn.Module):
    """A block that computes the layer in its own code, with an activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.dropout(self.act(self.up(self.norm(x))), 0.3, self.training)), 0.1, False)


class Function(Inline):
    """The same, with an activation that is a plain function in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        del self.act
        self.act = F.gelu  # type: ignore[assignment]


class InlineGated(nn.Module):
    """A block that computes a gated layer in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.act, self.up, self.down = nn.Linear(16, 32), nn.SiLU(), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Calls one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Whole()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)  # type: ignore[no-any-return]


class NoPlace(Inline):
    """A block that calls the activation in its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class NoPlaceGated(InlineGated):
    """A block that computes a gated layer and calls the activation in its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Looks(Inline):
    """A block that looks at a weight of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.down.weight.dtype) + self.down(self.act(self.up(self.norm(x))))  # type: ignore[no-any-return]


def model(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), *layers, nn.Linear(16, 3)).eval()


def operate(made: nn.Module, inputs: Any, passes: Any = None, data: Any = None) -> Surgery:
    return surgeon.Pipeline(passes or (Moeify(experts=4), Lower())).run(made, inputs=inputs, data=data)


def x(batch: int = 4) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 5, 16)


PLACES = {
    Whole: {"1"},
    AndDropout: {"1.parts.0"},
    HalfDropped: {"1"},
    Inline: {"1.up"},
    Function: {"1.up"},
    InlineGated: {"1.gate"},
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_layer_takes_the_place_of_its_modules(kind: Callable[[], nn.Module]) -> None:
    dense = model(kind())
    surgery = operate(dense, x())
    grafted = surgeon.graft(dense, surgery)
    assert set(surgeon.get_tau(grafted)) == PLACES[kind]  # type: ignore[index]
    assert type(grafted) is nn.Sequential
    for batch in (1, 7):
        torch.testing.assert_close(grafted(x(batch)), dense(x(batch)), rtol=1e-4, atol=1e-5)
    surgeon.set_tau(surgery.graph, 0.9)
    surgeon.set_tau(grafted, 0.9)
    assert not torch.allclose(grafted(x()), dense(x()), atol=1e-4)
    torch.testing.assert_close(grafted(x()), surgery.graph(x()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [NoPlace, Looks])
def test_what_has_no_place_stays_dense_and_says_why(kind: Callable[[], nn.Module]) -> None:
    dense = model(Whole(), kind())
    grafted = surgeon.graft(dense, operate(dense, x()))
    (refused,) = grafted.surgeon_graft.refused  # type: ignore[union-attr, misc]
    assert refused.code == ("no-place" if kind is NoPlace else "graft-differs")
    assert refused.path == "2"
    assert set(surgeon.get_tau(grafted)) == {"1"}
    torch.testing.assert_close(grafted(x()), dense(x()), rtol=1e-4, atol=1e-5)


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    dense = model(Twice())
    surgery = operate(dense, x()).set_tau(0.9)
    grafted = surgeon.graft(dense, surgery)
    twice: Any = grafted[1]  # type: ignore[index]
    assert isinstance(twice.first, MoE)
    assert twice.first is twice.second
    torch.testing.assert_close(grafted(x()), surgery.graph(x()), rtol=1e-4, atol=1e-5)


def test_modules_that_are_called_from_a_plain_list_are_replaced_there_too() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)])
            self.order = [*self.parts]

        def forward(self, x: Tensor) -> Tensor:
            for part in self.order:
                x = part(x)
            return x

    dense = model(Listed())
    surgery = operate(dense, x()).set_tau(0.9)
    grafted = surgeon.graft(dense, surgery)
    assert len(surgeon.get_tau(grafted)) == 1
    torch.testing.assert_close(grafted(x()), surgery.graph(x()), rtol=1e-4, atol=1e-5)


def test_nothing_to_put_anywhere_is_an_error() -> None:
    dense = model(NoPlace())
    with pytest.raises(UsageError, match="No converted layer of the graph can be put into Sequential: 1: no module"):
        surgeon.graft(dense, operate(dense, x()))


def test_a_dense_layer_whose_activation_was_replaced_is_refused() -> None:
    dense = model(Whole(), NoPlace())
    data = [(x().mean(1), torch.tensor([0, 1, 2, 0]))]
    surgery = operate(model(Whole(), NoPlace()), x().mean(1), (SwapActivation(epochs=1), Moeify(experts=4)), data)
    with pytest.raises(VerificationError, match="a layer that has to stay dense: 2"):
        surgeon.graft(dense, surgery)


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("gated", [False, True])
def test_a_dense_layer_keeps_what_its_experts_learnt(size: int, gated: bool) -> None:
    dense = model(Whole(), NoPlaceGated() if gated else NoPlace())
    data = [(x().mean(1), torch.tensor([0, 1, 2, 0]))]
    surgery = operate(dense, x().mean(1), (Moeify(expert_size=size), Recover(epochs=5, lr=1e-2), Lower()), data)
    grafted = surgeon.graft(dense, surgery)
    assert [rejection.path for rejection in grafted.surgeon_graft.refused] == ["2"]  # type: ignore[union-attr]
    assert not grafted.surgeon_graft.kept  # type: ignore[union-attr]
    assert not torch.allclose(grafted(x().mean(1)), dense(x().mean(1)), atol=1e-3)
    surgeon.set_tau(surgery.graph, 0.0)
    surgeon.set_tau(grafted, 0.0)
    torch.testing.assert_close(grafted(x().mean(1)), surgery.graph(x().mean(1)), rtol=1e-4, atol=1e-5)


def test_a_grafted_model_can_be_converted_further() -> None:
    dense = model(Whole(), Inline())
    first = surgeon.graft(dense, operate(dense, x(), (Moeify(experts=4, only=("1",)),)))
    surgery = operate(first, x(), (Moeify(experts=2), Lower()))
    surgeon.set_tau(surgery.graph, 0.9)
    surgeon.set_rule(surgery.graph, "top_k", "1")
    second = surgeon.graft(first, surgery)
    assert set(second.surgeon_graft.plan.layers) == {"1", "2.up"}  # type: ignore[union-attr]
    assert surgeon.get_rule(second) == {"1": "top_k", "2.up": "max"}
    assert second[1].form == "dynamic"  # type: ignore[index]
    torch.testing.assert_close(second(x()), surgery.graph(x()), rtol=1e-4, atol=1e-5)
    assert first[1].form == "masked"  # type: ignore[index]
    assert surgeon.get_rule(first) == {"1": "max"}


def test_another_model_is_refused() -> None:
    surgery = operate(model(Whole()), x())
    with pytest.raises(UsageError, match="The graph has a converted layer '1', but the model has no such layer"):
        surgeon.graft(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), surgery)


def test_the_model_stays_as_it_was() -> None:
    dense = model(Whole(), Inline())
    before = copy.deepcopy(dense)
    grafted = surgeon.graft(dense, operate(dense, x()))
    assert [name for name, _ in dense.named_modules()] == [name for name, _ in before.named_modules()]
    for name, value in before.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name])
    with torch.no_grad():
        for parameter in grafted.parameters():
            parameter.zero_()
    torch.testing.assert_close(dense(x()), before(x()))


def test_other_modules_keep_names_hooks_and_modes() -> None:
    dense = model(Whole(), Inline())
    seen: list[str] = []
    dense[1].register_forward_hook(lambda *_: seen.append("layer"))
    dense[2].norm.register_forward_hook(lambda *_: seen.append("norm"))
    dense[2].norm.train()
    grafted = surgeon.graft(dense, operate(dense, x()))
    seen.clear()
    grafted(x())
    assert seen == ["layer", "norm"]
    assert grafted[2].norm.training  # type: ignore[index, union-attr]
    assert not grafted[1].training  # type: ignore[index]


def test_dropout_that_was_around_the_layer_still_acts_in_training() -> None:
    grafted = surgeon.graft(dense := model(AndDropout()), operate(dense, x()))
    part = grafted[1]  # type: ignore[index]
    assert isinstance(part, Joined)
    grafted.train()
    zeros = float((part(x(64)) == 0).float().mean())
    assert 0.05 < zeros < 0.15


def test_a_layer_that_is_not_lowered_can_be_trained() -> None:
    dense = model(Whole())
    grafted = surgeon.graft(dense, operate(dense, x(), (Moeify(experts=4),)))
    layer = grafted[1]  # type: ignore[index]
    assert isinstance(layer, MoE)
    assert layer.form == "masked"
    grafted(x()).sum().backward()
    assert layer.w1 is not None
    assert layer.w1.grad is not None


@pytest.mark.parametrize("passes", [(SwapActivation(),), (Mlpify(epochs=1),)], ids=["swap", "mlpify"])
def test_dense_replacements(passes: Any) -> None:
    dense = stack("gelu")
    surgery = operate(dense, X, passes, labelled_vectors(1))
    grafted = surgeon.graft(dense, surgery)
    assert any(isinstance(module, MLP) for module in grafted.modules())
    torch.testing.assert_close(grafted(**X), surgery.graph(**X), rtol=1e-4, atol=1e-5)


def test_weights_that_passes_trained_come_from_the_surgery() -> None:
    dense = stack("gelu")
    surgery = operate(dense, X, (SwapActivation(epochs=1), Moeify(experts=4, epochs=1), Lower()), labelled_vectors(2))
    surgery.set_tau(0.3)
    grafted = surgeon.graft(stack("gelu"), surgery)
    torch.testing.assert_close(grafted(**X), surgery.graph(**X), rtol=1e-4, atol=1e-5)
    assert surgeon.get_tau(grafted) == pytest.approx(dict.fromkeys(surgeon.get_tau(grafted), 0.3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_own_encoder() -> None:
    torch.manual_seed(0)
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True), 2).eval()
    grafted = surgeon.graft(dense, operate(dense, x()))
    padded = torch.zeros(4, 5, dtype=torch.bool)
    padded[0, 3:] = True
    with torch.no_grad():
        torch.testing.assert_close(grafted(x()), dense(x()), rtol=1e-4, atol=1e-5)
        out, wanted = grafted(x(), src_key_padding_mask=padded), dense(x(), src_key_padding_mask=padded)
    torch.testing.assert_close(out[1:], wanted[1:], rtol=1e-4, atol=1e-5)


def test_knobs_meters_and_compensation_work_on_the_model() -> None:
    dense = stack("relu")
    data = labelled_vectors(3)
    surgery = operate(dense, X, (Moeify(experts=4, epochs=1), Lower()), data)
    grafted = surgeon.graft(dense, surgery)
    for made in (surgery.graph, grafted):
        surgeon.set_rule(made, "top_k")
        surgeon.set_tau(made, 0.5)
    torch.testing.assert_close(surgeon.token_load(grafted, X), surgeon.token_load(surgery.graph, X))
    surgeon.compensate(surgery.graph, data)
    surgeon.compensate(grafted, data)
    torch.testing.assert_close(grafted(**X), surgery.graph(**X), rtol=1e-4, atol=1e-5)
    surgeon.set_tau(grafted, 0.25)
    assert all(not bool(part.skipped_mean.any()) for part in grafted.modules() if isinstance(part, MoE))


def test_sweep_and_tune_find_the_same_as_on_the_graph() -> None:
    dense = stack("relu")
    batches = [Batch.from_any(item) for item in labelled_vectors(3)]
    surgery = operate(dense, X, (Moeify(experts=4, epochs=1), Lower()), labelled_vectors(3))
    grafted = surgeon.graft(dense, surgery)
    swept = [sweep(made, batches, "classification", [0.0, 0.5], inputs=X) for made in (surgery.graph, grafted)]
    costs = [[(point.multiply_adds, point.executed, point.quality) for point in points] for points in swept]
    assert costs[0] == costs[1]
    found = [surgeon.tune(made, batches, 0.9, inputs=X) for made in (surgery.graph, grafted)]
    assert [*found[0].taus.values()] == pytest.approx([*found[1].taus.values()])


def test_from_a_directory(tmp_path: Any) -> None:
    dense = stack("relu")
    surgery = operate(dense, X)
    surgery.save(tmp_path / "saved")
    grafted = surgeon.graft(dense, tmp_path / "saved")
    torch.testing.assert_close(grafted(**X), dense(**X), rtol=1e-4, atol=1e-5)
