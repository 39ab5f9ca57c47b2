"""Gated layers that skip neurons in the model they came from, and as a checkpoint of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon.inputs.neurons import SparseNeurons
from surgeon.measure.load import measure_load
from surgeon.passes import Lower, Recover, SparsifyNeurons
from tests.small_models import Gated

IDS = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def converted(model: nn.Module, *passes: Any) -> Any:
    data = surgeon.Data([{"input_ids": IDS}], task="causal-lm")
    return surgeon.Pipeline([SparsifyNeurons(), *passes]).run(model, inputs={"input_ids": IDS}, data=data)


@pytest.mark.parametrize("passes", [(), (Lower(),), (Recover(steps=2, lr=1e-2), Lower())])
def test_a_layer_takes_the_place_of_its_module(passes: Any, tmp_path: Path) -> None:
    model = llama()
    surgery = converted(model, *passes)
    made = surgeon.graft(model, surgery)
    places = [name for name, module in made.named_modules() if isinstance(module, SparseNeurons)]
    assert places == ["model.layers.0.mlp", "model.layers.1.mlp"]
    graph = surgery.graph.eval()
    for where in (made, graph):
        surgeon.set_tau(where, {"*.0.mlp*": 0.6, "*": 0.3})
    with torch.no_grad():
        got = made(input_ids=IDS).logits
        torch.testing.assert_close(got, graph(input_ids=IDS).logits)
        assert not torch.allclose(got, model(input_ids=IDS).logits, atol=1e-4)
    assert [one.histogram for one in measure_load(made, [{"input_ids": IDS}])] == [
        one.histogram for one in measure_load(graph, [{"input_ids": IDS}])
    ]
    made.save_pretrained(tmp_path)
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    assert surgeon.get_tau(again) == surgeon.get_tau(made)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, got)


class Own(nn.Module):
    """A gated layer in the code of the model, which multiplies with a weight of it itself, before an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.ffn = Gated()

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(F.linear(x, self.gate.weight, self.gate.bias))
        return self.ffn(x + self.down(gate * self.up(x)))  # type: ignore[no-any-return]


def test_a_layer_without_a_place_keeps_what_it_learnt() -> None:
    model, x = Own().eval(), torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))
    data = surgeon.Data([x], loss=lambda outputs, batch: outputs.square().mean())
    passes = [SparsifyNeurons(), Recover(steps=3, lr=1e-2, skip_inputs=0.0), Lower()]
    surgery = surgeon.Pipeline(passes).run(model, inputs=x, data=data)
    made: Any = surgeon.graft(model, surgery)
    assert [one.code for one in made.surgeon_graft.refused] == ["no-place"]
    torch.testing.assert_close(made(x), surgery.graph.eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made.gate.weight, model.gate.weight)
