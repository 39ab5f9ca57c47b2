"""Language models with their cache as state of OpenVINO."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon.engines.generation import INPUTS, convert_generator
from surgeon.engines.openvino import Compiled
from surgeon.errors import UsageError
from surgeon.passes import Moeify, Quantize

pytest.importorskip("openvino")
pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch and OpenVINO
]


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50, n_positions=64)).eval()


def llama() -> torch.nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_new_tokens_alone_give_what_all_tokens_give(make: object) -> None:
    assert callable(make)
    torch.manual_seed(0)
    model, ids = make(), torch.randint(0, 50, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    surgery = surgeon.Pipeline([Moeify(expert_size=16), Quantize()]).run(model, inputs=inputs).set_tau(0.3)
    model = surgeon.graft(model, surgery).eval()
    compiled = Compiled(convert_generator(model))
    tokens = torch.randint(0, 50, (3, 8))
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        swapped = model(input_ids=tokens[[1, 0, 2]], attention_mask=torch.ones_like(tokens)).logits
    order = torch.arange(3, dtype=torch.int32)
    for start, end, beams, wanted in (
        (0, 5, order, expected),
        (5, 6, order, expected),
        (6, 8, order[[1, 0, 2]], swapped),
    ):
        new = tokens[beams, start:end]
        given = (new, torch.ones_like(tokens[:, :end]), torch.arange(start, end).repeat(3, 1), beams)
        (found,) = compiled(dict(zip(INPUTS, given, strict=True)))
        assert (found - wanted[:, start:end]).norm() < 0.05 * wanted.norm()


def test_a_model_without_logits_is_refused() -> None:
    model = GPT2Model(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50)).eval()
    with pytest.raises(UsageError, match="GPT2Model is no language model with a cache"):
        convert_generator(model)
