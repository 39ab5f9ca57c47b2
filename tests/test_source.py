"""Every way to load a model, and every refusal."""

import hashlib
import json
import pickle
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from surgeon.checkpoint import read_program, sha256_of
from surgeon.errors import LoadError
from surgeon.source import check_finite, load_model
from surgeon.user_function import call_spec

BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
GPT2 = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "vocab_size": 101,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(x).relu()

def build():
    torch.manual_seed(0)
    return Net()

def number():
    return 3

def broken():
    raise RuntimeError("no luck")

constant = 3
"""


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = transformers.BertConfig(**BERT, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def gpt2() -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    model = call_spec("mynet:build", LoadError)
    assert isinstance(model, nn.Module)
    yield model
    sys.modules.pop("mynet", None)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


# --- Hugging Face directories


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
    assert source.notes[0].startswith("tokenizer.json is there but cannot be loaded")


def test_missing_weights(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has a config.json but no weights: none of model.safetensors"):
        load_model(bert)


def test_truncated_weights(bert: Path) -> None:
    halve(bert / "model.safetensors")
    with pytest.raises(LoadError, match=r"^model.safetensors is damaged or cut short"):
        load_model(bert)


def test_missing_shard(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert load_model(tmp_path).kind == "hf"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(LoadError, match=rf"lacks the weight file {shard.name}, which model.safetensors.index.json"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LoadError, match="does not list the weight files"):
        load_model(tmp_path)


def test_body_that_is_not_all_there(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"bert.encoder.layer.1.output.dense.weight are missing"):
        load_model(bert)


def test_weights_of_another_size(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_model(bert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "names the class NoSuchModel.*never run"),
        ({"architectures": ["pipeline"]}, "names the class pipeline"),
        ({"model_type": "nosuchtype"}, "config.json cannot be read.*nosuchtype"),
    ],
)
def test_unknown_class(bert: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(LoadError, match=message):
        load_model(bert)


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
    assert source.sha256 == hashlib.sha256(b"program").hexdigest()


# --- files


def test_missing_path() -> None:
    with pytest.raises(LoadError, match=r"No file or directory 'openai/gpt2'.*not downloaded.*hf download openai/gpt2"):
        load_model("openai/gpt2")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"model.onnx: cannot load .onnx files"):
        load_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_needs_trust(tmp_path: Path, net: nn.Module, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(net, path, _use_new_zipfile_serialization=zipped)
    expected = "model.pt holds pickled code, which loading would run. If you trust it: --trust-pickle."
    with pytest.raises(LoadError) as error:
        load_model(path)
    assert str(error.value).startswith(expected)
    source = load_model(path, trust_pickle=True)
    assert source.kind == "pickle"
    assert torch.equal(source.model.linear.weight, net.linear.weight)


def test_pickle_never_runs_without_trust(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    for zipped in (True, False):
        torch.save({"weight": torch.ones(2), "bomb": Bomb()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(LoadError, match="pickled code"):
            load_model(tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()


def test_pickled_class_that_cannot_be_imported(tmp_path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(net, tmp_path / "model.pt")
    monkeypatch.delattr(sys.modules["mynet"], "Net")
    with pytest.raises(LoadError, match=r"Can't get attribute 'Net'.*define it in a module"):
        load_model(tmp_path / "model.pt", trust_pickle=True)
    monkeypatch.delitem(sys.modules, "mynet")
    (tmp_path / "mynet.py").unlink()
    with pytest.raises(LoadError, match=r"needs the Python module 'mynet'.*PYTHONPATH=."):
        load_model(tmp_path / "model.pt", trust_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_file(tmp_path: Path, net: nn.Module, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    halve(path)
    for trust in (False, True):
        with pytest.raises(LoadError, match=r"model.pt was not written by torch.save, or is damaged or cut short"):
            load_model(path, arch="gpt2", trust_pickle=trust)


@pytest.mark.parametrize("content", [b"hello world, this is text", pickle.dumps({"a": 1}), b"PK\x05\x06" + b"\0" * 18])
def test_not_a_torch_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(LoadError, match=r"model.pt was not written by torch.save"):
        load_model(tmp_path / "model.pt")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(LoadError, match=r"model.pt is empty"):
        load_model(tmp_path / "model.pt")


def test_torchscript(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(nn.Linear(2, 2), torch.ones(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(LoadError, match="TorchScript"):
        load_model(tmp_path / "model.pt", trust_pickle=True)


def test_torch_file_with_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(LoadError, match="holds a list, neither a module nor a state dict"):
        load_model(tmp_path / "model.pt")


# --- exported programs


@pytest.fixture
def program(tmp_path: Path, net: nn.Module) -> Path:
    torch.export.save(torch.export.export(net, (torch.ones(2, 3),)), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def rewrite(path: Path, changes: dict[str, bytes]) -> None:
    """Replace or add records of an archive, named without its root folder."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = {name: archive.read(name) for name in archive.namelist()}
    records |= {f"{root}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_program(program: Path, net: nn.Module) -> None:
    source = load_model(program)
    assert source.kind == "pt2"
    x = torch.randn(2, 3)
    assert torch.equal(source.model.module()(x), net(x))


def test_program_with_keyword_inputs_and_an_output_class(tmp_path: Path, gpt2: nn.Module) -> None:
    gpt2.config.use_cache = False
    ids = torch.ones(2, 4, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": None, "output_attentions": False}
    torch.export.save(torch.export.export(gpt2.eval(), (), inputs), tmp_path / "gpt2.pt2")
    program = load_model(tmp_path / "gpt2.pt2").model
    torch.testing.assert_close(program.module()(**inputs).logits, gpt2(**inputs).logits)


def test_truncated_program(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    halve(program)
    with pytest.raises(LoadError, match=r"model.pt2 is damaged or cut short"):
        load_model(program)
    with pytest.raises(LoadError, match=r"model.pt2 cannot be loaded as a torch.export program"):
        load_model(program, trust_pickle=True)
    assert capfd.readouterr() == ("", "")


def test_program_without_a_graph(program: Path) -> None:
    rewrite(program, {"models/model.json": b"{}"})
    with pytest.raises(LoadError, match=r"cannot be loaded as a torch.export program"):
        load_model(program)


def test_zip_that_is_no_program(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt2")
    with pytest.raises(LoadError, match=r"not a torch.export archive"):
        load_model(tmp_path / "model.pt2")


@pytest.mark.parametrize("place", ["example inputs", "weight", "opaque constant", "compiled"])
def test_program_that_would_run_code(program: Path, tmp_path: Path, place: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save((Bomb(),), tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    if place == "example inputs":
        rewrite(program, {"data/sample_inputs/model.pt": bomb})
    elif place == "weight":
        with zipfile.ZipFile(program) as archive:
            config = json.loads(archive.read("model/data/weights/model_weights_config.json"))
        config["config"]["linear.weight"] |= {"use_pickle": True, "path_name": "weight_0"}
        rewrite(
            program,
            {"data/weights/weight_0": bomb, "data/weights/model_weights_config.json": json.dumps(config).encode()},
        )
    elif place == "opaque constant":
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        config = {"config": {"constant": entry}}
        rewrite(
            program,
            {
                "data/constants/opaque_obj_0": pickle.dumps(Bomb()),
                "data/constants/model_constants_config.json": json.dumps(config).encode(),
            },
        )
    else:
        rewrite(program, {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(LoadError, match=r"holds (pickled|compiled) code"):
        load_model(program)
    assert not (tmp_path / "exploded").exists()
    if place == "example inputs":  # the refusal is not for nothing: the reader does unpickle this record
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(LoadError):
                read_program(program, trust_pickle=True)
        assert (tmp_path / "exploded").exists()


# --- state dicts


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
        "The weights are those under 'state_dict'.",
        "The prefix 'module.' was dropped from the weights' names.",
    )


def test_state_dict_that_does_not_fit(tmp_path: Path, net: nn.Module) -> None:
    torch.save({"linear.weight": torch.ones(4, 5), "head": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(LoadError) as error:
        load_model(tmp_path / "model.pt", arch="mynet:build")
    message = str(error.value)
    assert "1 missing: linear.bias" in message
    assert "1 unexpected: head" in message
    assert "1 of another shape: linear.weight (4, 5) instead of (4, 3)" in message


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
    with pytest.raises(LoadError, match="damaged or cut short"):
        load_model(tmp_path / "model.safetensors", arch="gpt2")


# --- functions


@pytest.mark.parametrize("spec", ["mynet:build", "mynet.py:build", "mynet:Net"])
def test_function(net: nn.Module, spec: str) -> None:
    source = load_model(spec)
    assert source.kind == "python"
    assert type(source.model).__name__ == "Net"
    assert len(source.sha256) == 64


def test_hash_of_a_function_is_that_of_its_weights(net: nn.Module) -> None:
    assert load_model("mynet:build").sha256 == load_model("mynet:build").sha256
    assert load_model("mynet:build").sha256 != load_model("mynet:Net").sha256


def test_module_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    try:
        assert load_model("only_here:build").kind == "python"
    finally:
        sys.modules.pop("only_here", None)
    assert sys.path == path


def test_file_imports_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_file.py").write_text(NET)
    (tmp_path / "file.py").write_text("from neighbour_of_file import build")
    try:
        assert load_model(f"{tmp_path}/file.py:build").kind == "python"
    finally:
        sys.modules.pop("neighbour_of_file", None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuchmodule:build", "the Python module 'nosuchmodule' cannot be imported.*PYTHONPATH=."),
        ("nosuchfile.py:build", r"there is no file nosuchfile.py"),
        ("mynet:bild", r"mynet has no 'bild'. Did you mean 'build'\?"),
        ("mynet:constant", "'constant' is a int, not a function"),
        ("mynet:broken", "mynet:broken raised RuntimeError: no luck"),
        ("mynet:number", "returned a int, not a torch.nn.Module"),
    ],
)
def test_function_that_fails(net: nn.Module, spec: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(spec)


def test_file_that_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0")
    for _ in range(2):  # a failed import is not remembered
        with pytest.raises(LoadError, match=r"importing .*bad.py raised ZeroDivisionError"):
            load_model(f"{tmp_path}/bad.py:build")


def test_malformed_spec() -> None:
    with pytest.raises(LoadError, match="'a b' is not module:function"):
        call_spec("a b", LoadError)


# --- hashes and values


def test_hash_of_several_files_depends_on_names_and_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    digest = sha256_of([first, second])
    assert digest == sha256_of([second, first])
    shutil.move(second, tmp_path / "c")
    assert digest != sha256_of([first, tmp_path / "c"])


def test_check_finite(net: nn.Module) -> None:
    check_finite(net)
    with torch.no_grad():
        net.linear.weight[0, :2] = torch.tensor([float("nan"), float("inf")])
        net.linear.bias[0] = float("nan")
    with pytest.raises(LoadError, match=r"linear.weight has 2 of 12 values .* parameters affected: 2"):
        check_finite(net)
