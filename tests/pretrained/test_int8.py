"""Models whose experts have weights of 8 or 4 bits: exported, loaded, saved again, generated with, and extended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgeon
from surgeon.moe.int8 import INTEGERS, Int8MoE
from surgeon.passes import Moeify, Quantize
from tests.pretrained.conftest import Shelf

IDS = torch.tensor([[2, 3, 4, 5], [2, 7, 4, 6]])


@pytest.fixture(scope="module", params=["int8", "int4", "fp8"])
def exported(
    request: pytest.FixtureRequest, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    """The directory of the exported model, and the logits of its graph."""
    model = shelf.model("dense").eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    surgery = surgeon.Pipeline([Moeify(experts=4), Quantize(weights=request.param)]).run(model, inputs=inputs)
    surgeon.set_tau(surgery.graph, 0.25)
    place = tmp_path_factory.mktemp(request.param) / "exported"
    surgery.save_pretrained(place)
    with torch.no_grad():
        return place, surgery.graph.eval()(**inputs).logits


def loaded(exported: tuple[Path, torch.Tensor], **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(exported[0], **options)


def test_comes_back_as_it_was(exported: Any, shelf: Shelf) -> None:
    model = loaded(exported)
    assert len([module for module in model.modules() if isinstance(module, Int8MoE)]) == 2
    torch.testing.assert_close(model(IDS).logits, exported[1], rtol=1e-4, atol=1e-5)
    surgeon.set_tau(model, 0.0)
    torch.testing.assert_close(model(IDS).logits, shelf.model("dense")(IDS).logits, rtol=0.05, atol=0.02)


def test_weights_are_small_integers_in_the_file(exported: Any, shelf: Shelf) -> None:
    stored = load_file(exported[0] / "model.safetensors")
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in stored.items() if ".mlp." in name}
    dtypes = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
    dtype = next(dtype for name, dtype in dtypes.items() if exported[0].parent.name.startswith(name))
    assert {name: kinds[name] for name in INTEGERS if name in kinds} == {
        "fc1": torch.int16, "w1": dtype, "w2": dtype,
    }  # fmt: skip


def test_scales_keep_their_dtype_in_a_model_of_another(exported: Any, tmp_path: Path) -> None:
    model = loaded(exported, dtype=torch.bfloat16)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    moe = next(module for module in model.modules() if isinstance(module, Int8MoE))
    assert (moe.w1_scale.dtype, moe.tau.dtype) == (torch.float32, torch.float32)
    assert model(IDS).logits.dtype == torch.bfloat16
    want = next(module for module in loaded(exported).modules() if isinstance(module, Int8MoE))
    for name, tensor in moe.state_dict().items():
        torch.testing.assert_close(tensor, want.state_dict()[name], rtol=0, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again(IDS).logits.dtype == torch.bfloat16


def test_generates_with_its_cache(exported: Any) -> None:
    model = loaded(exported)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with_cache = model.generate(IDS, **options)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))
    beams = model.generate(IDS, num_beams=2, **options)
    assert beams.shape[0] == 2


def test_knobs_are_saved_with_it(exported: Any, tmp_path: Path) -> None:
    model = loaded(exported)
    surgeon.set_rule(model, "top_k")
    surgeon.set_tau(model, 0.5)
    surgeon.compensate(model, [{"input_ids": IDS}])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(surgeon.get_rule(again).values()) == {"top_k"}
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
def test_adapters_train_through_it(exported: Any) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    model = peft.get_peft_model(loaded(exported), config)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_weights_may_stay_on_disk(exported: Any, tmp_path: Path) -> None:
    model = loaded(exported, device_map="auto", max_memory={"cpu": "12KB"}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    moe = next(module for module in model.modules() if isinstance(module, Int8MoE))
    assert moe.w1.device.type == "meta"
    assert torch.equal(model(IDS).logits, loaded(exported)(IDS).logits)


def test_is_traced_again(exported: Any) -> None:
    """A model with quantised layers is a model to trace: its layers are found as they are."""
    model = loaded(exported).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    graph = surgeon.trace(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(graph(**inputs).logits, model(**inputs).logits)
    assert surgeon.get_tau(graph) == surgeon.get_tau(model)
