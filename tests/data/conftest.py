"""A tokenizer of ten words, and the config of a model that goes with it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .tables import CLS, SEP, WORDS


@pytest.fixture
def tokenizer() -> Any:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **specials, eos_token="[SEP]")


@pytest.fixture
def config() -> Any:
    return hf.BertConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
        num_labels=3,
        architectures=["BertForSequenceClassification"],
    )
