"""Models that write: into their inputs, which stay the caller's, and into themselves, which stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import TraceError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


def test_a_dict_that_is_filled_in_is_no_input() -> None:
    class Fills(Base):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            batch["y"] = self.fc(batch.pop("x"))
            return batch

    batch = {"x": torch.randn(2, 4), "kept": torch.randn(2)}
    graph = surgeon.trace(Fills(), (batch,))
    assert list(batch) == ["x", "kept"]
    assert [name for name, _ in graph.meta["trace"].dynamic] == ["batch_x", "batch_kept"]
    assert any("writes into its inputs (batch['y'], batch['x'])" in note for note in graph.meta["trace"].notes)
    mine = {"x": torch.randn(5, 4), "kept": torch.randn(5)}
    found = graph(mine)
    assert list(mine) == ["x", "kept"]
    assert list(found) == ["kept", "y"]


def test_tensors_of_the_caller_stay() -> None:
    class Overwrites(Base):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            x[:, 0].mul_(2)
            return self.fc(x)

    model, example = Overwrites().eval(), torch.randn(3, 4)
    before = example.clone()
    graph = surgeon.trace(model, example)
    assert torch.equal(example, before)
    x = torch.randn(5, 4)
    mine = x.clone()
    assert torch.equal(graph(mine), model(x.clone()))
    assert torch.equal(mine, x)
    assert any("writes into its inputs (x)" in note for note in graph.meta["trace"].notes)


def test_a_tensor_given_twice_is_two_inputs() -> None:
    class Product(Base):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a) * b

    model, x = Product().eval(), torch.randn(2, 4)
    graph = surgeon.trace(model, {"a": x, "b": x})
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(graph(a=a, b=b), model(a, b))


def test_the_model_stays_as_it_was() -> None:
    class Switches(Base):
        def __init__(self) -> None:
            super().__init__()
            self.kind, self.seen, self.hooked = "sparse", [], False
            self.register_buffer("largest", torch.zeros(()))
            self.long: nn.Module | None = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] < 100 and self.kind == "sparse":
                self.kind, self.long = "full", None
            self.seen.append(1)
            if not self.hooked:  # as transformers does to collect hidden states
                self.hooked = True
                self.fc.register_forward_hook(lambda module, args, output: output * 2)
            return self.fc(x)

    model = Switches()
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgeon.trace(model, torch.randn(2, 4))
    assert model.kind == "sparse"
    assert model.long is not None
    assert model.seen == []
    assert not model.fc._forward_hooks
    assert model.training
    assert "forward" not in vars(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_padded_rows_of_the_fused_encoder_are_noted() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    model, x = Padded().eval(), torch.randn(2, 5, 8)
    padding = torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])
    graph = surgeon.trace(model, (x, padding)).eval()
    assert any("sets padded positions to zero" in note for note in graph.meta["trace"].notes)
    with torch.no_grad():
        fused, plain = model(x, padding), graph(x, padding)
    assert torch.allclose(fused[~padding], plain[~padding], atol=1e-5)
    assert torch.equal(fused[padding], torch.zeros_like(fused[padding]))
    assert surgeon.trace(model, x).meta["trace"].notes == ()


def test_regions_within_regions_stay() -> None:
    class Mixed(Base):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
                with torch.autocast("cpu", enabled=False):
                    y = y.float() + 1
                return self.fc(y).float()

    model, x = Mixed().eval(), torch.randn(3, 4)
    assert torch.allclose(surgeon.trace(model, torch.randn(2, 4))(x), model(x), atol=1e-2)


WRITES: dict[str, Any] = {
    "a slice": lambda x: x[:, 0].zero_(),
    "a view of a view": lambda x: x.transpose(0, 1)[0].mul_(2),
    "detached": lambda x: x.detach().add_(1),
    "a part": lambda x: x.chunk(2, 1)[1].add_(1),
    "reshaped": lambda x: x.reshape(-1).add_(1),
    "out": lambda x: torch.add(x, 1, out=x),
    "a list": lambda x: torch._foreach_mul_([x], 2.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_through_views_stay_inside(name: str) -> None:
    class Writes(Base):
        def forward(self, x: Tensor) -> Tensor:
            WRITES[name](x)
            return self.fc(x)

    model, example, x = Writes().eval(), torch.randn(3, 4), torch.randn(5, 4)
    before, mine = example.clone(), x.clone()
    graph = surgeon.trace(model, example)
    assert torch.equal(graph(mine), model(x.clone()))
    assert torch.equal(mine, x)
    assert torch.equal(example, before)


def test_a_model_that_remembers_its_first_input_is_refused() -> None:
    class Remembers(Base):
        mean: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mean is None:
                self.mean = x.mean()
            return self.fc(x - self.mean)

    with pytest.raises(TraceError, match="changes its own state"):
        surgeon.trace(Remembers(), torch.randn(3, 4))


def test_a_write_into_a_copy_is_no_write_into_the_original() -> None:
    class Copies(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.clone().add_(1)) + self.table.clone().mul_(2) + self.table.to(torch.float32).mul_(3)

    info = surgeon.trace(Copies(), torch.randn(3, 4)).meta["trace"]
    assert info.form == "train"
    assert info.notes == ()
