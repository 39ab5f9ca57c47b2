"""A BERT on disk, a GPT-2 in memory, and a module of plain torch in the current directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from surgeon.errors import LoadError
from surgeon.models.user_function import call_spec
from tests.models.tiny import BERT, GPT2, NET


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
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    model = call_spec("mynet:build", LoadError)
    assert isinstance(model, nn.Module)
    yield model
    sys.modules.pop("mynet", None)
