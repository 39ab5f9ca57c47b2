"""State dicts: the architecture they are filled into, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from surgeon.errors import LoadError
from surgeon.models.source import load_model
from tests.models.tiny import BERT, GPT2, halve


def test_state_dict_needs_an_architecture(tmp_path: Path, gpt2: nn.Module) -> None:
    torch.save(gpt2.state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoadError) as error:
        load_model(tmp_path / "model.pt")
    assert str(error.value) == "model.pt is a state dict, not a model. Give --arch gpt2."


@pytest.mark.parametrize("named", [True, False])
def test_state_dict_with_a_config(tmp_path: Path, gpt2: transformers.GPT2LMHeadModel, named: bool) -> None:
    config = transformers.GPT2Config(**GPT2, architectures=["GPT2LMHeadModel"] if named else None)
    config.save_pretrained(tmp_path / "arch")
    weights = {name: value for name, value in gpt2.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    source = load_model(tmp_path / "model.safetensors", arch=str(tmp_path / "arch" / "config.json"))
    assert source.kind == "state_dict"
    assert type(source.model) is transformers.GPT2LMHeadModel
    assert source.model.lm_head.weight is source.model.transformer.wte.weight
    ids = torch.arange(6).reshape(2, 3)
    assert torch.equal(source.model(ids).logits, gpt2.eval()(ids).logits)


def test_state_dict_picks_the_head_that_fits(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT)
    config.save_pretrained(tmp_path / "arch")
    for cls in (transformers.BertForMaskedLM, transformers.BertForSequenceClassification, transformers.BertModel):
        torch.save(cls(config).state_dict(), tmp_path / "model.pth")
        assert type(load_model(tmp_path / "model.pth", arch=str(tmp_path / "arch")).model) is cls


def test_state_dict_of_a_function_wrapped_and_in_half_precision(tmp_path: Path, net: nn.Module) -> None:
    state = {f"module.{name}": value.half() for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pt")
    source = load_model(tmp_path / "model.pt", arch="mynet:build")
    assert source.model.linear.weight.dtype == torch.float16
    assert source.notes == (
        "The weights were read from the key 'state_dict'.",
        "The prefix 'module.' was removed from the names of the weights.",
    )


def test_state_dict_that_does_not_fit(tmp_path: Path, net: nn.Module) -> None:
    torch.save({"linear.weight": torch.ones(4, 5), "head": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(LoadError) as error:
        load_model(tmp_path / "model.pt", arch="mynet:build")
    message = str(error.value)
    assert "1 missing: linear.bias" in message
    assert "1 unexpected: head" in message
    assert "1 of the wrong shape: linear.weight (4, 5) instead of (4, 3)" in message


def test_state_dict_of_an_unknown_architecture(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"No architecture 'gtp2'. Did you mean 'gpt2'\?"):
        load_model(tmp_path / "model.pt", arch="gtp2")
    with pytest.raises(LoadError, match="--arch mynet:number returned a int"):
        load_model(tmp_path / "model.pt", arch="mynet:number")
    with pytest.raises(LoadError, match="--arch vit: transformers has no AutoModelForCausalLM"):
        load_model(tmp_path / "model.pt", arch="vit", task="causal-lm")


def test_architecture_by_model_type(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        LoadError, match=r"does not fit --arch vit \(ViTForImageClassification\).*config.json that has them"
    ):
        load_model(tmp_path / "model.pt", arch="vit")


def test_damaged_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    halve(tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="damaged or truncated"):
        load_model(tmp_path / "model.safetensors", arch="gpt2")
