"""Models whose linear layers skip inputs, alone and beside experts: exported, loaded, saved again and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgeon
from surgeon.errors import LoadError
from surgeon.inputs.module import SparseLinear
from surgeon.moe.module import MoE
from surgeon.passes import Lower, Moeify, SparsifyInputs
from surgeon.pretrained.quantizer import SurgeonConfig
from tests.pretrained.conftest import Shelf

IDS = torch.tensor([[2, 3, 4, 5], [2, 7, 4, 6]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PASSES = {
    "inputs": [SparsifyInputs(tau=0.3), Lower()],
    "both": [Moeify(experts=4), SparsifyInputs(tau=0.3, skip=("*wte",)), Lower()],
}


@pytest.fixture(scope="module", params=["inputs", "both"])
def exported(
    request: pytest.FixtureRequest, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    """The directory of the exported model, and the logits of its graph. A head that shares its weight stays dense."""
    surgery = surgeon.Pipeline(PASSES[request.param]).run(shelf.model("dense").eval(), inputs=INPUTS, data=[INPUTS])
    place = tmp_path_factory.mktemp(request.param) / "exported"
    surgery.save_pretrained(place)
    if request.param == "inputs":
        surgeon.set_tau(surgery.graph, 0.0, "transformer.wte")
    with torch.no_grad():
        return place, surgery.graph.eval()(**INPUTS).logits


def loaded(exported: tuple[Path, torch.Tensor], **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(exported[0], **options)


def layers(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def test_comes_back_as_it_was(exported: Any, shelf: Shelf) -> None:
    model = loaded(exported)
    experts = [module for module in model.modules() if isinstance(module, MoE)]
    assert (len(layers(model)), len(experts)) == ((4, 2) if exported[0].parent.name.startswith("both") else (8, 0))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, exported[1], rtol=1e-4, atol=1e-5)
        dense = shelf.model("dense")(IDS).logits
        assert not torch.allclose(exported[1], dense, rtol=1e-3, atol=1e-3)
        surgeon.set_tau(model, 0.0)
        torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-4, atol=1e-5)


def test_what_selects_inputs_keeps_its_dtype_in_a_model_of_another(exported: Any, tmp_path: Path) -> None:
    model = loaded(exported, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layer, want = layers(model)[0], layers(loaded(exported))[0]
    for name in ("scale", "centre", "levels", "tau"):
        assert torch.equal(getattr(layer, name), getattr(want, name))
        assert getattr(layer, name).dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_generates_with_its_cache(exported: Any) -> None:
    model = loaded(exported)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_tau_is_saved_with_it(exported: Any, tmp_path: Path) -> None:
    model = loaded(exported)
    surgeon.set_tau(model, {"transformer.h.0.attn.c_proj": 0.5, "*": 0.25})
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert surgeon.get_tau(again) == surgeon.get_tau(model)
    assert set(surgeon.get_tau(again).values()) == {0.25, 0.5}
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
def test_adapters_train_through_it(exported: Any) -> None:
    config = peft.LoraConfig(target_modules=["wte"], r=2)
    model = peft.get_peft_model(loaded(exported), config)
    model(IDS, labels=IDS).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_weights_may_stay_on_disk(exported: Any, tmp_path: Path) -> None:
    model = loaded(exported, device_map="auto", max_memory={"cpu": "20KB"}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert "meta" in {layer.weight.device.type for layer in layers(model)}
    assert torch.equal(model(IDS).logits, loaded(exported)(IDS).logits)


def test_is_traced_again(exported: Any) -> None:
    model = loaded(exported).eval()
    graph = surgeon.trace(model, INPUTS)
    assert surgeon.get_tau(graph) == surgeon.get_tau(model)


def test_a_model_with_experts_is_converted_further(shelf: Shelf, tmp_path: Path) -> None:
    made = shelf.model().eval()
    for step in range(2):
        passes = [SparsifyInputs(only=(f"*.h.{step}.*",), tau=0.3)]
        surgery = surgeon.Pipeline(passes).run(made, inputs=INPUTS, data=[INPUTS])
        surgeon.set_tau(surgery.graph, 0.2, "transformer.h.0.attn.c_proj*")
        surgery.save_pretrained(tmp_path / str(step), model=made)
        made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(step))
        assert (len(layers(made)), len(surgeon.find_moes(made))) == (2 * step + 2, 2)
        assert list(surgeon.get_tau(made).values()) == list(surgeon.get_tau(surgery.graph).values())
        with torch.no_grad():
            torch.testing.assert_close(made(IDS).logits, surgery.graph.eval()(**INPUTS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [{"d_in": 0}, {"d_out": -1}])
def test_values_that_no_layer_has_are_refused(part: dict[str, Any]) -> None:
    shape = {"d_in": 4, "d_out": 4, "bias": True, "scale": False, "centre": False} | part
    with pytest.raises(LoadError, match=f"layers.head has a wrong {next(iter(part))}"):
        SurgeonConfig({"layers": {"head": {"parts": [shape]}}})
