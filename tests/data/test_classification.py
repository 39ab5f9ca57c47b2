"""Texts to classify: padding, pairs, labels of every form, and what a tokenizer lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from surgeon.data.files import load_data
from surgeon.data.losses import evaluate
from surgeon.errors import DataError, UsageError

from .tables import CLS, PAD, SEP, rows, write_lines


def test_padding_is_masked_and_long_texts_are_cut(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "a b c d e", "label": 1}])
    data = load_data(path, tokenizer=tokenizer, config=config, max_length=5, eval_fraction=0)
    (batch,) = data.train
    assert data.eval is None
    assert sorted(batch.kwargs["input_ids"].tolist()) == [[CLS, 5, SEP, PAD, PAD], [CLS, 5, 6, 7, SEP]]
    assert torch.equal(batch.kwargs["attention_mask"], (batch.kwargs["input_ids"] != PAD).long())


def test_pairs_of_texts(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"premise": "a", "hypothesis": "b c", "gold": 2}] * 2)
    data = load_data(path, tokenizer=tokenizer, config=config, text="premise,hypothesis", label="gold", eval_fraction=0)
    (batch,) = data.train
    assert batch.kwargs["input_ids"].tolist() == [[CLS, 5, SEP, 6, 7, SEP]] * 2
    assert batch.labels.tolist() == [2, 2]


def test_rows_without_text_are_left_out_and_said(
    tmp_path: Path, tokenizer: Any, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*rows(3), {"text": " ", "label": 1}, {"text": None, "label": 1}])
    data = load_data(path, tokenizer=tokenizer, config=config, eval_fraction=0)
    assert sum(batch.size for batch in data.train) == 3
    assert "2 of 5 rows have no text and are left out" in caplog.text


def test_missing_columns(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"words": "a", "kind": 0}])
    with pytest.raises(DataError, match=r"has no text column. Its columns: words, kind. Name the text column"):
        load_data(path, tokenizer=tokenizer, config=config)
    with pytest.raises(DataError, match=r"has no label column. Its columns: words, kind. Name the label column"):
        load_data(path, tokenizer=tokenizer, config=config, text="words")
    with pytest.raises(DataError, match=r"has no column 'sort'. Its columns: words, kind"):
        load_data(path, tokenizer=tokenizer, config=config, text="words", label="sort")
    with pytest.raises(DataError, match=r"row 0: column 'kind' contains int values, not text"):
        load_data(path, tokenizer=tokenizer, config=config, text="kind", label="kind")


def test_tokenizer_troubles(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(5))
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        load_data(path, config=config)
    raw = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    raw.normalizer = normalizers.Replace("b", "")
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    empty = write_lines(tmp_path / "c.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 0}])
    with pytest.raises(DataError, match=r"the tokenizer gives no token for \('b',\)"):
        list(load_data(empty, tokenizer=hf.PreTrainedTokenizerFast(tokenizer_object=raw), config=config).train)
    config.vocab_size = 6
    with pytest.raises(UsageError, match=r"the model has only 6 embeddings: they do not belong together"):
        list(load_data(path, tokenizer=tokenizer, config=config).train)
    config.vocab_size = 10
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="no padding token, but the texts differ in length"):
        list(load_data(path, tokenizer=tokenizer, config=config).train)
    same = write_lines(tmp_path / "b.jsonl", rows(1) * 4)
    assert [batch.size for batch in load_data(same, tokenizer=tokenizer, config=config, eval_fraction=0).train] == [4]


def test_data_trains_a_model(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"[index % 3], "label": index % 3} for index in range(60)])
    data = load_data(path, tokenizer=tokenizer, config=config)
    torch.manual_seed(0)
    model: nn.Module = hf.BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert data.loss is not None
    losses = []
    for _ in range(40):
        for batch in data.train:
            loss = data.loss(model(*batch.args, **batch.kwargs), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    result = evaluate(model, data.eval, data.task)
    assert (result.value, result.items) == (1.0, 6)
