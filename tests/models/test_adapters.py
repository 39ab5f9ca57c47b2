"""Adapters of PEFT: merged on loading, kept in Python, refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import surgeon
from surgeon.errors import LoadError
from surgeon.models.source import load_model
from surgeon.passes import Moeify

IDS = torch.arange(10).view(2, 5)
# PEFT reads an attribute of transformers that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_an_adapter_is_merged_into_its_base(tmp_path: Path, gpt2: transformers.GPT2LMHeadModel) -> None:
    gpt2.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(gpt2.eval(), config)
    adapted.get_base_model().name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    source = load_model(tmp_path / "adapter")
    assert isinstance(source.model, transformers.GPT2LMHeadModel)
    assert source.notes[-1] == f"The PEFT adapter (LORA) was merged into the weights of {tmp_path / 'base'}."
    torch.testing.assert_close(source.model(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5)


def test_in_python_adapters_stay(gpt2: transformers.GPT2LMHeadModel) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(gpt2, config).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    surgery = surgeon.Pipeline([Moeify(experts=4)]).run(adapted, inputs=inputs)
    assert any("PEFT adapters, which stay as they are" in note for note in surgery.graph.meta["trace"].notes)
    grafted = surgeon.graft(adapted, surgery)
    assert isinstance(grafted, peft.PeftModel)
    torch.testing.assert_close(grafted(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["org/base", None, 3])
def test_a_base_that_is_not_here(tmp_path: Path, base: object) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    with pytest.raises(LoadError, match=r"is a PEFT adapter \(LORA\) for .*, which is not on this machine"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path, gpt2: transformers.GPT2LMHeadModel) -> None:
    gpt2.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(LoadError, match=r"has no adapter_model\.safetensors"):
        load_model(tmp_path / "adapter")
