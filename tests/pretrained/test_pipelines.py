"""The pipelines of transformers give the same answers with a converted model as with the dense one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils import _pytree as pytree

import surgeon
from surgeon.passes import Lower, Moeify

WORDS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "the", "film", "was", "good", "bad"]
IDS = torch.tensor([[2, 5, 6, 3], [2, 8, 9, 3]])
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
WAVE: dict[str, Any] = {
    **SIZES,
    "conv_dim": (16, 16),
    "conv_stride": (5, 5),
    "conv_kernel": (10, 5),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 4,
    "vocab_size": 8,
    "classifier_proj_size": 16,
}


def tokenizer(_: Path) -> Any:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.BertProcessing(("<sep>", 3), ("<cls>", 2))
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def letters(place: Path) -> Any:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c"])}
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    return transformers.Wav2Vec2CTCTokenizer(str(place / "vocab.json"))


def text(kind: Any) -> Any:
    return kind(transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=16))


def images(_: Path) -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


def sound(_: Path) -> Any:
    return transformers.Wav2Vec2FeatureExtractor()


NOISE = np.random.default_rng(0).standard_normal(1600).astype(np.float32)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
KINDS: dict[str, tuple[Callable[[], Any], Any, dict[str, Callable[[Path], Any]], Any]] = {
    "text-classification": (
        lambda: text(transformers.BertForSequenceClassification),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        {"tokenizer": tokenizer},
        "the film was good",
    ),
    "token-classification": (
        lambda: text(transformers.BertForTokenClassification),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        {"tokenizer": tokenizer},
        "the film was good",
    ),
    "fill-mask": (
        lambda: text(transformers.BertForMaskedLM),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        {"tokenizer": tokenizer},
        "the film was <mask>",
    ),
    "image-classification": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)),
        {"pixel_values": torch.randn(2, 3, 16, 16)},
        {"image_processor": images},
        PICTURE,
    ),
    "audio-classification": (
        lambda: transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**WAVE)),
        {"input_values": torch.randn(2, 1600)},
        {"feature_extractor": sound},
        NOISE,
    ),
    "automatic-speech-recognition": (
        lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**WAVE)),
        {"input_values": torch.randn(2, 1600)},
        {"feature_extractor": sound, "tokenizer": letters},
        NOISE,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_answers(kind: str, tmp_path: Path) -> None:
    build, inputs, parts, given = KINDS[kind]
    torch.manual_seed(0)
    dense = build().eval()
    surgery = surgeon.Pipeline([Moeify(experts=4), Lower()]).run(dense, inputs=inputs)
    surgery.save_pretrained(tmp_path / "out")
    ours = type(dense).from_pretrained(tmp_path / "out")
    assert len(surgeon.get_tau(ours)) == 2
    made = {name: make(tmp_path) for name, make in parts.items()}
    pipelines: Any = [transformers.pipeline(kind, model=model, **made) for model in (dense, ours)]  # type: ignore[call-overload]
    wanted, found = (pytree.tree_leaves(pipeline(given)) for pipeline in pipelines)
    assert wanted
    for mine, other in zip(found, wanted, strict=True):
        number = isinstance(other, float | np.floating)
        assert mine == (pytest.approx(float(other), abs=1e-4) if number else other)
