"""Example inputs: made for tiny models of many kinds, which must then run on them; read from files and functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from surgeon.errors import UsageError
from surgeon.models.example_inputs import example_inputs, token_fields
from surgeon.models.given_inputs import inputs_from, inputs_of_program

TEXT = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "vocab_size": 101,
    "max_position_embeddings": 32,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 101,
}
VISION = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "patch_size": 8}
VIDEO = {**VISION, "image_size": 16, "num_frames": 4, "tubelet_size": 2}
CONV = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embedding_groups": 2}
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 101, "n_positions": 32}

TYPES = {"token_type_ids": (2, 8)}

# What each model is given, with the shape of each input.
ZOO: dict[str, tuple[Any, Any, dict[str, tuple[int, ...]]]] = {
    "bert": (hf.BertModel, hf.BertConfig(**TEXT), {"input_ids": (2, 8), "attention_mask": (2, 8), **TYPES}),
    "roberta": (
        hf.RobertaModel,
        hf.RobertaConfig(**TEXT | {"max_position_embeddings": 8}, pad_token_id=1, eos_token_id=2),
        {"input_ids": (2, 6), "attention_mask": (2, 6), "token_type_ids": (2, 6)},
    ),
    "gpt2 classifier": (
        hf.GPT2ForSequenceClassification,
        hf.GPT2Config(**GPT2, **IDS),
        {"input_ids": (2, 8), "attention_mask": (2, 8)},
    ),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**TEXT, num_key_value_heads=1),
        {"input_ids": (2, 8), "attention_mask": (2, 8)},
    ),
    "layoutlm": (
        hf.LayoutLMModel,
        hf.LayoutLMConfig(**TEXT),
        {"input_ids": (2, 8), "attention_mask": (2, 8), **TYPES, "bbox": (2, 8, 4)},
    ),
    "t5": (
        hf.T5Model,
        hf.T5Config(num_layers=1, num_heads=2, d_model=16, d_ff=32, d_kv=8, vocab_size=101),
        {"input_ids": (2, 8), "attention_mask": (2, 8), "decoder_input_ids": (2, 7)},
    ),
    "bart classifier": (
        hf.BartForSequenceClassification,
        hf.BartConfig(**SEQ2SEQ, max_position_embeddings=32, **IDS),
        {"input_ids": (2, 8), "attention_mask": (2, 8)},
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**VISION, image_size=16), {"pixel_values": (2, 3, 16, 16)}),
    "wide vit": (hf.ViTModel, hf.ViTConfig(**VISION, image_size=[16, 24]), {"pixel_values": (2, 3, 16, 24)}),
    "resnet": (
        hf.ResNetModel,
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=1),
        {"pixel_values": (2, 1, 64, 64)},
    ),
    "timesformer": (hf.TimesformerModel, hf.TimesformerConfig(**VIDEO), {"pixel_values": (2, 4, 3, 16, 16)}),
    "videomae": (hf.VideoMAEModel, hf.VideoMAEConfig(**VIDEO), {"pixel_values": (2, 4, 3, 16, 16)}),
    "clip": (
        hf.CLIPModel,
        hf.CLIPConfig(text_config=TEXT | {"eos_token_id": 100}, vision_config=VISION | {"image_size": 16}),
        {"input_ids": (2, 8), "attention_mask": (2, 8), "pixel_values": (2, 3, 16, 16)},
    ),
    "wav2vec2": (
        hf.Wav2Vec2Model,
        hf.Wav2Vec2Config(**{k: v for k, v in TEXT.items() if k != "max_position_embeddings"}, **CONV),
        {"input_values": (2, 160)},
    ),
    "ast": (
        hf.ASTModel,
        hf.ASTConfig(**VISION, max_length=40, num_mel_bins=24),
        {"input_values": (2, 40, 24)},
    ),
    "whisper": (
        hf.WhisperModel,
        hf.WhisperConfig(**SEQ2SEQ, max_source_positions=10, max_target_positions=16, num_mel_bins=8, **IDS),
        {"input_features": (2, 8, 20), "decoder_input_ids": (2, 7)},
    ),
    "vision encoder-decoder": (
        hf.VisionEncoderDecoderModel,
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(**VISION, image_size=16), hf.BertConfig(**TEXT)
        ),
        {"pixel_values": (2, 3, 16, 16), "decoder_input_ids": (2, 7)},
    ),
    "patchtst": (
        hf.PatchTSTModel,
        hf.PatchTSTConfig(
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=8,
            num_hidden_layers=1,
            ffn_dim=8,
        ),
        {"past_values": (2, 16, 2)},
    ),
}


def build(name: str, **changes: Any) -> Any:
    cls, config, _ = ZOO[name]
    torch.manual_seed(0)
    return cls(type(config).from_dict(config.to_dict() | changes)).eval()


@pytest.mark.parametrize("name", ZOO)
def test_model_runs_on_what_is_made_for_it(name: str) -> None:
    model = build(name)
    inputs = example_inputs(model)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == ZOO[name][2]
    with torch.no_grad():
        model(**inputs)
    again = example_inputs(model)
    assert all(torch.equal(value, again[key]) for key, value in inputs.items())


def test_drawn_ids_are_ordinary_up_to_the_marked_end() -> None:
    inputs = example_inputs(build("gpt2 classifier"))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask.tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert ids[0, -1] == ids[1, 5] == 2
    assert ids[1, 6:].tolist() == [0, 0]
    assert int(ids[0, :-1].min()) > 2
    assert int(ids[1, :5].min()) > 2


def test_token_types_are_those_of_a_pair_of_sentences() -> None:
    assert example_inputs(build("bert"))["token_type_ids"].tolist() == [[0] * 4 + [1] * 4] * 2
    assert "token_type_ids" not in example_inputs(build("bert", type_vocab_size=1))


def test_floating_inputs_take_the_models_precision() -> None:
    model = build("vit").bfloat16()
    assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16


def test_classifier_without_padding_id() -> None:
    model = build("gpt2 classifier", pad_token_id=None)
    with pytest.raises(UsageError, match=r"its config has none. Set pad_token_id in config.json"):
        example_inputs(model)


def test_not_a_hugging_face_model() -> None:
    with pytest.raises(UsageError, match=r"Linear is not a Hugging Face model.* Give example inputs\.$") as error:
        example_inputs(nn.Linear(2, 2))
    assert error.value.in_command.endswith("Give example inputs: --inputs module:function, or a file of tensors.")


def test_input_that_cannot_be_made_up() -> None:
    model = build("bert")
    model.main_input_name = "quanta"
    with pytest.raises(UsageError, match="BertModel takes the input 'quanta', which cannot be generated"):
        example_inputs(model)


def test_setting_that_the_config_lacks() -> None:
    model = build("wav2vec2")
    model.main_input_name = "input_features"
    with pytest.raises(UsageError, match=r"Wav2Vec2Model: the config has no input_feat_per_channel or .*num_mel_bins"):
        example_inputs(model)


# --- with a tokenizer or a processor


def tokenizer(**changes: Any) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "it", "how", "would", "there"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fields = ["input_ids", "token_type_ids", "attention_mask"]
    settings = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "model_input_names": fields}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **settings | changes)


def test_tokenizer_pads_two_sentences(capfd: pytest.CaptureFixture[str]) -> None:
    model = build("bert")
    inputs = example_inputs(model, tokenizer=tokenizer())
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert lengths[0] != lengths[1]
    assert min(lengths) >= 4
    assert max(lengths) == inputs["input_ids"].shape[1]
    assert inputs["input_ids"].unique().numel() > 6
    model(**inputs)
    assert capfd.readouterr() == ("", "")


def test_long_sentences_are_cut_to_the_models_positions() -> None:
    inputs = example_inputs(build("bert", max_position_embeddings=6), tokenizer=tokenizer())
    assert inputs["input_ids"].shape == (2, 5)


def test_tokenizer_without_padding() -> None:
    model = build("llama")
    inputs = example_inputs(model, tokenizer=tokenizer(pad_token=None))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert bool(inputs["attention_mask"].all())
    model(**inputs)


def test_token_types_go_to_models_that_have_them() -> None:
    assert "token_type_ids" in token_fields(tokenizer(), ZOO["bert"][1])
    assert "token_type_ids" not in token_fields(tokenizer(), ZOO["gpt2 classifier"][1])


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(UsageError, match=r"gives id \d+, but the model has only 6 embeddings: they do not belong"):
        example_inputs(build("bert", vocab_size=6), tokenizer=tokenizer())


def test_tokenizer_that_makes_nothing_of_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "xyz": 1}, unk_token="[UNK]"))
    single = hf.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[UNK]")
    assert example_inputs(build("bert"), tokenizer=single)["input_ids"].shape == (2, 8)
    assert "Random token ids are used instead" in caplog.text


def test_parts_that_fail_are_blamed() -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("added_tokens")

    with pytest.raises(UsageError, match=r"model's tokenizer fails .*: KeyError: 'added_tokens'. .*tokenizer_config"):
        example_inputs(build("bert"), tokenizer=broken)
    processor = hf.ViTImageProcessor(size={"height": 0, "width": 0})
    with pytest.raises(UsageError, match=r"model's processor fails on ordinary inputs: .*preprocessor_config.json"):
        example_inputs(build("vit"), processor=processor)


def test_image_processor_decides_the_size() -> None:
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16})
    model = build("vit")
    inputs = example_inputs(model, processor=processor)
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    model(**inputs)


def test_feature_extractor_makes_sound() -> None:
    model = build("wav2vec2")
    inputs = example_inputs(model, processor=hf.Wav2Vec2FeatureExtractor(sampling_rate=400, feature_size=1))
    assert inputs["input_values"].shape == (2, 400)
    model(**inputs)


# --- given by the user


@pytest.fixture
def functions(write_module: Callable[[str, str], None]) -> None:
    write_module(
        "my_inputs",
        "import torch\n"
        "def tensor(): return torch.ones(2, 3)\n"
        "def pair(): return [torch.ones(2), torch.zeros(2)]\n"
        "def number(): return 3\n"
        "def nothing(): return {}\n"
        "def broken(): return torch.ones(2) @ torch.ones(3)\n",
    )


def test_inputs_from_a_function(functions: None) -> None:
    assert torch.equal(inputs_from("my_inputs:tensor"), torch.ones(2, 3))
    pair = inputs_from("my_inputs.py:pair")
    assert isinstance(pair, tuple)
    assert len(pair) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_inputs:number", "my_inputs:number gives a value of type int, not a tensor"),
        ("my_inputs:nothing", "my_inputs:nothing gives no tensor"),
        ("my_inputs:broken", "my_inputs:broken raised RuntimeError"),
        ("my_inputs:missing", "has no 'missing'"),
        ("missing.npy", "'missing.npy' is neither a file nor module:function"),
        ("my_inputs.py", "cannot read inputs from .py files"),
    ],
)
def test_inputs_that_fail(functions: None, spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inputs_from(spec)


def test_inputs_from_files(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save((tensor, tensor), tmp_path / "a.pt")
    torch.save({"x": tensor}, tmp_path / "b.pt")
    save_file({"x": tensor}, tmp_path / "c.safetensors")
    np.save(tmp_path / "d.npy", tensor.numpy())
    np.savez(tmp_path / "e.npz", x=tensor.numpy())
    assert len(inputs_from(str(tmp_path / "a.pt"))) == 2
    for name in ("b.pt", "c.safetensors", "e.npz"):
        assert torch.equal(inputs_from(str(tmp_path / name))["x"], tensor)
    assert torch.equal(inputs_from(str(tmp_path / "d.npy")), tensor)


def test_input_files_that_are_not_tensors(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"a.pt holds pickled code, .*run.* Save the inputs as a tensor"):
        inputs_from(str(tmp_path / "a.pt"))
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match=r"b.npy cannot be read as arrays of numbers"):
        inputs_from(str(tmp_path / "b.npy"))
    (tmp_path / "c.npz").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"c.npz cannot be read as arrays of numbers"):
        inputs_from(str(tmp_path / "c.npz"))
    torch.save([1, 2], tmp_path / "d.pt")
    with pytest.raises(UsageError, match=r"d.pt gives no tensor"):
        inputs_from(str(tmp_path / "d.pt"))


def test_inputs_of_program() -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),))
    args, kwargs = inputs_of_program(program)
    assert torch.equal(args[0], torch.ones(2, 3))
    assert kwargs == {}
    program._example_inputs = None
    with pytest.raises(UsageError, match=r"contains no example inputs\. Give example inputs\."):
        inputs_of_program(program)
