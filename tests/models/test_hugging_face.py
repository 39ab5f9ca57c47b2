"""Hugging Face directories: what is loaded of them, what is noted, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from surgeon.errors import LoadError
from surgeon.models.hugging_face import companions
from surgeon.models.source import load_model
from tests.models.tiny import BERT, halve


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_directory_loads_with_the_class_its_config_names(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    before = hashes(bert)
    source = load_model(bert)
    assert source.kind == "hf"
    assert type(source.model) is transformers.BertForSequenceClassification
    assert source.config.num_labels == 3
    assert source.tokenizer("the cat")["input_ids"] == [5, 6]
    assert source.processor is None
    assert source.notes == ()
    assert source.sha256 == hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    with torch.no_grad():
        for parameter in source.model.parameters():
            parameter.zero_()
    assert hashes(bert) == before
    assert capfd.readouterr() == ("", "")


def test_new_and_unused_weights_are_noted(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    source = load_model(bert, task="masked-lm")
    assert type(source.model) is transformers.BertForMaskedLM
    assert source.notes[0].startswith("cls.predictions.bias, ")
    assert source.notes[0].endswith("are newly initialised.")
    assert "does not use" in source.notes[1]
    assert "classifier.bias" in source.notes[1]
    assert capfd.readouterr() == ("", "")


def test_directory_without_architectures_loads_without_a_head(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    del config["architectures"]
    (bert / "config.json").write_text(json.dumps(config))
    assert type(load_model(bert).model) is transformers.BertModel


def test_image_processor_is_loaded(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    source = load_model(tmp_path)
    assert source.processor is not None, source.notes
    assert source.tokenizer is None


def test_tokenizer_that_cannot_be_loaded_is_noted(bert: Path) -> None:
    (bert / "tokenizer.json").write_text("{")
    source = load_model(bert)
    assert source.tokenizer is None
    assert source.notes[0].startswith("tokenizer.json exists but cannot be loaded")


def test_missing_weights(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has a config.json but no weights. It needs one of model.safetensors"):
        load_model(bert)


def test_truncated_weights(bert: Path) -> None:
    halve(bert / "model.safetensors")
    with pytest.raises(LoadError, match=r"^model.safetensors is damaged or truncated"):
        load_model(bert)


def test_missing_shard(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert load_model(tmp_path).kind == "hf"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    listed = rf"The weight file {shard.name}, which model.safetensors.index.json lists, is missing"
    with pytest.raises(LoadError, match=listed):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LoadError, match="does not list the weight files"):
        load_model(tmp_path)


def test_pooler_that_is_not_there_is_noted(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    assert load_model(bert).notes == ("bert.pooler.dense.bias, bert.pooler.dense.weight are newly initialised.",)


def test_body_that_is_not_all_there(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"They do not contain bert.encoder.layer.1.output.dense.weight"):
        load_model(bert)


def change(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod."])
@pytest.mark.parametrize("pickled", [True, False])
def test_weights_of_a_wrapped_model(bert: Path, prefix: str, pickled: bool) -> None:
    weights = load_file(bert / "model.safetensors")
    wrapped = {prefix + name: value for name, value in weights.items()}
    (bert / "model.safetensors").unlink()
    if pickled:
        torch.save(wrapped, bert / "pytorch_model.bin")
    else:
        save_file(wrapped, bert / "model.safetensors", metadata={"format": "pt"})
    source = load_model(bert)
    assert all(torch.equal(value, weights[name]) for name, value in source.model.state_dict().items())
    assert len(source.notes) == 1
    assert repr(prefix.split(".")[0]) in source.notes[0]


def test_weights_of_another_shape_are_named(bert: Path) -> None:
    change(bert, intermediate_size=48)
    with pytest.raises(LoadError) as error:
        load_model(bert)
    message = str(error.value)
    assert "6 of the weights do not have the shapes that config.json asks for" in message
    assert "bert.encoder.layer.0.intermediate.dense.weight (64, 32) instead of (48, 32)" in message
    change(bert, intermediate_size=64, id2label={"0": "x"})
    with pytest.raises(LoadError, match=r"classifier.bias \(3,\) instead of \(1,\)"):
        load_model(bert)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "names the class NoSuchModel.*never run"),
        ({"architectures": ["pipeline"]}, "names the class pipeline"),
        ({"architectures": ["PreTrainedModel"]}, "names the class PreTrainedModel"),
        ({"architectures": "BertModel"}, "gives 'BertModel' as architectures, which is not a list of class names"),
        ({"model_type": "bret"}, "does not know the model type 'bret'. Did you mean 'bert'.*never run"),
        ({"model_type": 3}, "it has no model_type"),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"hidden_act": "nosuch"}, "cannot be loaded as its config.json says: KeyError: 'nosuch'"),
    ],
)
def test_config_that_says_nonsense(bert: Path, settings: dict[str, object], message: str) -> None:
    change(bert, **settings)
    with pytest.raises(LoadError, match=message):
        load_model(bert)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not JSON: Expecting value"),
        ('{"é": 1}'.encode("latin-1"), "it is not UTF-8 at byte 2"),
        pytest.param(f'{{"x": {DEEP}}}'.encode(), "its values are nested too deeply", id="deep"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_damaged_json(bert: Path, name: str, content: bytes, message: str) -> None:
    if "index" in name:
        (bert / "model.safetensors").rename(bert / "part.safetensors")
    (bert / name).write_bytes(content)
    with pytest.raises(LoadError, match=f"cannot read {name}: {message}"):
        load_model(bert)


@pytest.mark.parametrize("shard", [3, "", ".", "../model.safetensors", ["part.safetensors"]])
def test_index_that_does_not_list_files(bert: Path, shard: object) -> None:
    (bert / "model.safetensors").rename(bert / "part.safetensors")
    index = bert / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with pytest.raises(LoadError, match="does not list the weight files"):
        load_model(bert)
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(LoadError, match="has no metadata"):
        load_model(bert)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_damaged_companions_of_a_surgery(bert: Path, name: str) -> None:
    assert companions(bert)[0].num_labels == 3
    (bert / name).write_text("[")
    with pytest.raises(LoadError, match=f"cannot read {name} or a file beside it.*Save the surgery again"):
        companions(bert)


def test_pickled_code_among_the_weights_of_a_directory(bert: Path, net: nn.Module) -> None:
    (bert / "model.safetensors").unlink()
    torch.save(net, bert / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"^pytorch_model.bin holds pickled code"):
        load_model(bert)


def test_weights_in_torch_format(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    torch.save(weights, bert / "pytorch_model.bin")
    model = load_model(bert).model
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])
    halve(bert / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"^pytorch_model.bin was not written by torch.save, or is damaged"):
        load_model(bert)


def test_unknown_task(bert: Path) -> None:
    with pytest.raises(LoadError, match=r"No task 'poetry'. Known: causal-lm"):
        load_model(bert, task="poetry")


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"neither config.json"):
        load_model(tmp_path)


def test_artifact_is_left_to_its_own_loader(bert: Path) -> None:
    (bert / "surgery.json").write_text("{}")
    (bert / "model.pt2").write_bytes(b"program")
    source = load_model(bert)
    assert (source.kind, source.model) == ("artifact", None)
    assert source.sha256 is None  # its record has it
