"""A converted model is loaded, saved, moved, trained and extended by transformers' own functions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgeon
from surgeon.errors import LoadError, UsageError
from surgeon.moe.module import MoE
from surgeon.pretrained.quantizer import SurgeonConfig, fitted
from tests.pretrained.conftest import Shelf

IDS = torch.tensor([[2, 3, 4, 5], [2, 7, 4, 6]])


def moes(model: Any) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def test_it_computes_what_the_dense_model_computes(shelf: Shelf) -> None:
    model = shelf.model()
    assert type(model) is transformers.GPT2LMHeadModel
    assert [moe.form for moe in moes(model)] == ["dynamic"] * 2
    torch.testing.assert_close(model(IDS).logits, shelf.model("dense")(IDS).logits, rtol=1e-4, atol=1e-5)


def test_in_a_fresh_process(shelf: Shelf) -> None:
    code = (
        "import surgeon, sys\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(len(surgeon.get_tau(AutoModelForCausalLM.from_pretrained({str(shelf.exported)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_knobs_are_saved_with_the_model(shelf: Shelf, tmp_path: Path) -> None:
    model = shelf.model()
    surgeon.set_rule(model, "top_k")
    surgeon.set_tau(model, 0.25)
    surgeon.compensate(model, [{"input_ids": IDS}])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert surgeon.get_rule(again) == surgeon.get_rule(model) != surgeon.get_rule(shelf.model())
    assert surgeon.get_tau(again) == surgeon.get_tau(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_dtype_of_weights_but_not_of_tau(shelf: Shelf) -> None:
    model = shelf.model(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {moe.tau.dtype for moe in moes(model)} == {torch.float32}


def test_another_head_and_the_body_alone(shelf: Shelf, tmp_path: Path) -> None:
    body = transformers.AutoModel.from_pretrained(shelf.exported)
    assert len(moes(body)) == 2
    torch.testing.assert_close(
        body(IDS).last_hidden_state, shelf.model().transformer(IDS).last_hidden_state, rtol=1e-5, atol=1e-6
    )
    body.save_pretrained(tmp_path)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(moes(head)) == 2


def test_weights_may_stay_on_disk(shelf: Shelf, tmp_path: Path) -> None:
    model = shelf.model(device_map="auto", max_memory={"cpu": "20KB"}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(model(IDS).logits, shelf.model()(IDS).logits)


def test_trainer(shelf: Shelf, tmp_path: Path) -> None:
    model = shelf.model()
    surgeon.set_tau(model, 0.2)
    before = moes(model)[0].w2.detach().clone()  # type: ignore[union-attr]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_steps=2, learning_rate=1e-2
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not torch.equal(before, moes(model)[0].w2)  # type: ignore[arg-type]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
def test_adapters(shelf: Shelf, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(shelf.model(), config)
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(shelf.model(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


def test_pipelines(shelf: Shelf) -> None:
    write = transformers.pipeline("text-generation", model=str(shelf.exported))
    dense = transformers.pipeline("text-generation", model=str(shelf.dense))
    options: Any = {"max_new_tokens": 4, "do_sample": False}
    assert write("the film was", **options) == dense("the film was", **options)
    assert transformers.pipeline("feature-extraction", model=str(shelf.exported))("the film")


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS.keys())
def test_generate_gives_the_dense_models_tokens(shelf: Shelf, options: dict[str, Any]) -> None:
    padded = torch.tensor([[1, 1, 2, 3], [2, 7, 4, 6]])
    given: Any = {"input_ids": padded, "attention_mask": (padded != 1).long(), "max_new_tokens": 8}
    tokens = []
    for kind in ("dense", "exported"):
        torch.manual_seed(0)
        tokens.append(shelf.model(kind).generate(**given, **options))
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"experts": -1}, "has a wrong experts -1"),
        ({"shared": 4}, "has a wrong experts - shared 0"),
        ({"filling": 1000}, "has a wrong experts [*] size - filling"),
        ({"shared": -1}, "has a wrong shared [+] 1 0"),
        ({"biases": ["b3"]}, "has a wrong biases"),
        ({"router_width": 0}, "has a wrong router_width 0"),
        ({"float8": True}, "has a wrong float8"),
    ],
)
def test_values_that_no_layer_has_are_refused(shelf: Shelf, part: dict[str, Any], message: str) -> None:
    values = shelf.model().config.quantization_config.to_dict()
    next(iter(values["plan"]["layers"].values()))["parts"][0] |= part
    with pytest.raises(LoadError, match=message):
        SurgeonConfig(values["plan"])


def test_a_plan_may_only_replace_functions_that_a_module_holds(shelf: Shelf) -> None:
    model = shelf.model()
    plan = replace(model.config.quantization_config.plan, functions=(("transformer.h.0.mlp", "forward"),))
    with pytest.raises(LoadError, match=r"GPT2LMHeadModel has no function transformer.h.0.mlp.forward"):
        fitted(plan, model)


def test_a_damaged_plan_is_refused_in_words(shelf: Shelf, tmp_path: Path) -> None:
    shelf.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plan = config["quantization_config"]["plan"]
    next(iter(plan["layers"].values()))["parts"][0]["experts"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"config.json is damaged: quantization_config.plan.layers.*experts"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    del config["quantization_config"]["plan"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"config.json is damaged: quantization_config.plan: "):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config["quantization_config"]["schema"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="schema 99, but this version reads schema 1"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_the_plan_has_and_the_files_have_not(shelf: Shelf, tmp_path: Path) -> None:
    shelf.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layer in config["quantization_config"]["plan"]["layers"].values():
        layer["parts"][0]["gated"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"The weight files do not contain transformer\.h\.0\.mlp\.c_fc\.gate"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_not_converted_on_the_way(shelf: Shelf) -> None:
    plan = shelf.model().config.quantization_config
    with pytest.raises(UsageError, match="This checkpoint has no converted layers"):
        shelf.model("dense", quantization_config=plan)
