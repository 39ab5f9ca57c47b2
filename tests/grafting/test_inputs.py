"""Linear layers that skip inputs in the model they came from: their places, what they compute, what stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import surgeon
from surgeon.data.batch import Batch
from surgeon.errors import UsageError
from surgeon.inputs.module import SparseLinear
from surgeon.measure.load import measure_load
from surgeon.measure.sweep import sweep
from surgeon.moe.module import MoE
from surgeon.passes import Lower, Moeify, Pass, Recover, SparsifyInputs, SwapActivation
from surgeon.surgery.surgery import Surgery

X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """Attention with queries, keys and values in one layer, as transformers stores it: one row for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = transformers.pytorch_utils.Conv1D(48, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A feed-forward layer in the code of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Looks(Block):
    """The same, in a block that looks at a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.down.weight.dtype))


class Model(nn.Module):
    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.block, self.head = Fused(), block(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.attention(x)))  # type: ignore[no-any-return]


def converted(model: nn.Module, passes: Sequence[Pass[Any]], x: Tensor = X) -> Surgery:
    data = surgeon.Data([x], loss=lambda outputs, batch: outputs.square().mean())
    return surgeon.Pipeline(passes).run(model, inputs=x, data=data)


def skipping(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("criterion", ["weighted", "magnitude"])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("lowered", [True, False])
def test_a_layer_takes_the_place_of_its_module(criterion: Any, centre: bool, lowered: bool) -> None:
    model = Model(Looks).eval()
    passes = [SparsifyInputs(criterion=criterion, centre=centre), *([Lower()] if lowered else [])]
    surgery = converted(model, passes)
    made = surgeon.graft(model, surgery)
    assert skipping(made) == ["attention.qkv", "attention.out", "block.up", "block.down", "head"]
    torch.testing.assert_close(made(X), model(X))
    for where in (made, surgery.graph.eval()):
        surgeon.set_tau(where, {"block.up*": 0.6, "*": 0.3})
    torch.testing.assert_close(made(X), surgery.graph(X))
    assert not torch.allclose(made(X), model(X), rtol=1e-2, atol=1e-2)


def test_knobs_meters_and_sweeps_work_on_the_model() -> None:
    model = Model().eval()
    surgery = converted(model, [Moeify(experts=4), SparsifyInputs(), Lower()])
    made = surgeon.graft(model, surgery)
    assert skipping(made) == ["attention.qkv", "attention.out", "head"]
    assert [name for name, module in made.named_modules() if isinstance(module, MoE)] == ["block.up"]
    assert surgeon.set_tau(made, {"attention.*": 0.5}) == ["attention.qkv", "attention.out"]
    assert surgeon.get_tau(made) == {"attention.qkv": 0.5, "attention.out": 0.5, "block.up": 0.0, "head": 0.0}
    surgeon.set_tau(made, 0.4)
    surgeon.set_tau(surgery.graph, 0.4)
    torch.testing.assert_close(surgeon.token_load(made, X), surgeon.token_load(surgery.graph, X))
    ours, theirs = measure_load(made, [X]), measure_load(surgery.graph, [X])
    assert [layer.histogram for layer in ours] == [layer.histogram for layer in theirs]
    points = [
        sweep(where, [Batch((X,), {})], None, [0.0, 0.5], inputs=X, dense=surgeon.trace(model, X))
        for where in (made, surgery.graph)
    ]
    assert [point.executed for point in points[0]] == pytest.approx([point.executed for point in points[1]])


def test_a_layer_can_be_trained_and_what_recover_trained_is_in_it() -> None:
    model = Model().eval()
    surgery = converted(model, [SparsifyInputs(tau=0.3), Recover(steps=3, lr=1e-2), Lower()])
    made = surgeon.graft(model, surgery)
    torch.testing.assert_close(made(X), surgery.graph.eval()(X))
    assert not torch.allclose(made.get_submodule("head").weight, model.head.weight.t())  # type: ignore[arg-type]
    made(X).sum().backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())


class Tied(nn.Module):
    """A head with the weight of the embedding, beside an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.words(ids))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("passes", [[SparsifyInputs(tau=0.5)], [SparsifyInputs(tau=0.5), Lower()]])
def test_a_head_that_shares_its_weight_stays_dense(passes: Any) -> None:
    model, ids = Tied().eval(), torch.arange(20).reshape(4, 5)
    surgery = converted(model, passes, ids)
    made: Any = surgeon.graft(model, surgery)
    assert skipping(made) == ["mix"]
    (refused,) = made.surgeon_graft.refused
    assert (refused.code, refused.reason) == (
        "tied-weight", "its weight is that of several modules (words, head), which need it as it is",
    )  # fmt: skip
    assert made.head.weight is made.words.weight
    assert made.surgeon_graft.kept == ()
    surgeon.set_tau(made, 0.0)
    torch.testing.assert_close(made(ids), model(ids))


class Reads(nn.Module):
    """A block that multiplies with the weight itself, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.linear(x, self.first.weight, self.first.bias))  # type: ignore[no-any-return]


@pytest.mark.parametrize("lowered", [True, False])
def test_a_layer_without_a_place_keeps_what_it_learnt(lowered: bool) -> None:
    model = Reads().eval()
    passes = [SparsifyInputs(), Recover(steps=3, lr=1e-2, skip_inputs=0.0), *([Lower()] if lowered else [])]
    surgery = converted(model, passes)
    made: Any = surgeon.graft(model, surgery)
    assert [(one.path, one.code) for one in made.surgeon_graft.refused] == [("first", "no-place")]
    torch.testing.assert_close(made(X), surgery.graph.eval()(X))
    assert not torch.allclose(made.first.weight, model.first.weight)
    assert made.surgeon_graft.kept == ()


def test_torchs_own_encoder() -> None:
    """Its attention reads weights itself, and so does its fused path, which gives way."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    surgery = converted(model, [SparsifyInputs(), Lower()])
    made: Any = surgeon.graft(model, surgery)
    assert skipping(made) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert {one.code for one in made.surgeon_graft.refused} == {"no-place"}
    with torch.no_grad():
        torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)
        surgeon.set_tau(made, 0.5)
        assert not torch.allclose(made(X), model(X), rtol=1e-2, atol=1e-2)


def test_inside_of_a_replaced_layer_there_is_no_place() -> None:
    model = Model().eval()
    surgery = converted(model, [SwapActivation(to="relu"), SparsifyInputs()])
    with pytest.raises(UsageError, match=r"inside of it skip inputs.*skip=block\.\*"):
        surgeon.graft(model, surgery)
