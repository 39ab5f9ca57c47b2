"""Texts for causal and masked language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from surgeon.data.files import load_data
from surgeon.data.losses import evaluate
from surgeon.errors import DataError, UsageError

from .tables import CLS, MASK, PAD, SEP, rows, texts, write_lines


def test_causal_text_is_joined_and_cut(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\nd e\na a a\n")
    data = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", max_length=4, eval_fraction=0)
    (batch,) = data.train
    assert sorted(batch.kwargs["input_ids"].tolist()) == [[5, 6, 7, SEP], [8, 9, SEP, 5]]  # a rest of three is dropped
    assert torch.equal(batch.labels, batch.kwargs["input_ids"])
    assert torch.equal(batch.kwargs["attention_mask"], torch.ones(2, 4, dtype=torch.long))
    assert "2 chunks of text to train on" in data.description
    assert torch.isfinite(data.loss(torch.zeros(2, 4, 10), batch))


def test_no_text_is_longer_than_the_model_has_positions(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b c d e\n" * 20)
    config = hf.GPT2Config(n_positions=8, vocab_size=10, bos_token_id=2, eos_token_id=3)
    data = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, config=config, task="causal-lm", eval_fraction=0)
    assert {batch.kwargs["input_ids"].shape[1] for batch in data.train} == {8}


def test_causal_text_shorter_than_a_chunk(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b")
    (batch,) = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", eval_fraction=0).train
    assert batch.kwargs["input_ids"].tolist() == [[5, 6, SEP]]
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("a")  # nothing to predict
    with pytest.raises(DataError, match="contains no samples to train on"):
        load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", eval_fraction=0)


def test_causal_limit_keeps_the_first_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\nd\n")
    path = str(tmp_path / "a.txt")
    data = load_data(path, tokenizer=tokenizer, task="causal-lm", max_length=2, limit=3, eval_fraction=0)
    assert sorted(row[0] for rows in texts(data.train) for row in rows) == [5, 6, 7]


def test_causal_data_held_out(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b c d e\n" * 20)
    data = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", max_length=6, eval_fraction=0.25)
    assert sum(batch.size for batch in data.train) == 15
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, n_positions=8, bos_token_id=2, eos_token_id=3)
    )
    assert evaluate(model, data.eval, data.task).items == 5 * 5


def test_masked_text(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(200))
    data = load_data(path, tokenizer=tokenizer, config=config, task="masked-lm", batch_size=50)
    first, second = (list(data.train) for _ in range(2))
    drawn = total = 0
    for batch in first:
        ids, labels = batch.kwargs["input_ids"], batch.labels
        chosen = labels != -100
        ordinary = (ids != PAD) & (ids != CLS) & (ids != SEP)
        drawn, total = drawn + int(chosen.sum()), total + int(ordinary.sum())
        assert not bool((labels[chosen] < 5).any())  # special tokens are never predicted
        assert bool((ids[chosen] == MASK).any())
        assert bool((ids[batch.kwargs["attention_mask"] == 0] == PAD).all())  # a random token may be one too
    assert 0.08 < drawn / total < 0.25
    assert texts(first) != texts(second)
    assert texts(data.eval) == texts(data.eval)


def test_masked_text_needs_a_mask_token(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    tokenizer.mask_token = None
    with pytest.raises(UsageError, match="needs a tokenizer with a mask token"):
        load_data(write_lines(tmp_path / "a.jsonl", rows(2)), tokenizer=tokenizer, config=config, task="masked-lm")
